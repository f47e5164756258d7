"""Scores of key channels averaged over many prompts, from a Hugging Face model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from memopt.errors import BadInput
from memopt.kv.channel_file import ModelIdentity
from memopt.kv.channels import channel_scores
from memopt.kv.joint import drop_order, set_errors
from memopt.kv.score_sums import RECENT, MeanScores
from memopt.kv.settings import Score
from memopt.kv.window import observe
from memopt.patches.hf_attention import Stock, ThinKeys, attach
from memopt.patches.hf_cache import served
from memopt.patches.hf_identity import identity_of, weights_digest


class _ScoringLayer(DynamicLayer):
    """Attends like the stock layer over one window, and adds up what its channels are worth. Keeps nothing."""

    def __init__(self, index: int, observation: int | None, recent: int | None, means: MeanScores) -> None:
        super().__init__()
        self._index, self._observation, self._recent, self._means = index, observation, recent, means
        self._now: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        self._now = key_states, value_states
        return ThinKeys(self, key_states, key_states.shape[2], value_states), value_states

    def attend(
        self, stock: Stock, module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        assert self._now is not None
        key, value = self._now
        self._now = None
        count = query.shape[2] if self._observation is None else min(self._observation, query.shape[2])
        if self._recent is None:
            scores = channel_scores(query[:, :, -count:], key)
        else:
            scaling = options.get("scaling")
            scaling = query.shape[3] ** -0.5 if scaling is None else float(scaling)
            asked = observe(query, None, 0, count)
            scores = set_errors(asked, key, None, scaling=scaling, recent=self._recent)
        self._means.add(self._index, scores.sum(0))
        return stock(module, query, key, value, mask, **options)

    def get_seq_length(self) -> int:
        return 0


def score_channels(
    model: PreTrainedModel,
    windows: Iterable[Tensor],  # token ids (T,), one prompt each
    *,
    observation: int | None = None,
    score: Score = "joint",
    recent: int = RECENT,
    on_window: Callable[[int], None] | None = None,
) -> tuple[ModelIdentity, dict[int, Tensor], int]:
    """The model's identity, a score of every key channel by layer, (K, D) float64, and the tokens seen.

    score="joint": the turn in which a greedy choice drops the channel, by the errors of sets averaged over the windows,
    the queries weighted by the attention they pay beyond `recent` tokens (memopt.kv.joint); the largest are to be kept,
    however many. "think": the mean of the published score.

    Every layer that attends to the whole context is scored. `observation`: only so many of each window's last queries
    count (None: all of them, since static channels serve every position). `on_window` hears the tokens of each window.

    Raises:
        BadInput: no window, a model whose attention cannot be observed, or scores that are not finite.
    """
    text, sums = served(model), MeanScores()
    layers = [
        _ScoringLayer(index, observation, recent if score == "joint" else None, sums)
        if type(layer) is DynamicLayer
        else layer
        for index, layer in enumerate(DynamicCache(config=text).layers)
    ]
    scoring = {index: layer for index, layer in enumerate(layers) if isinstance(layer, _ScoringLayer)}
    if not scoring:
        raise BadInput(f"{text.model_type}: no layer attends to the whole context, so there is nothing to calibrate")
    cache, tokens = Cache(layers=layers), 0
    undo = attach(model)
    try:
        with torch.inference_mode():
            for window in windows:
                for index, layer in enumerate(layers):
                    if index not in scoring and layer.is_initialized:
                        layer.reset()
                model(window[None].to(model.device), past_key_values=cache, logits_to_keep=1)
                tokens += len(window)
                if on_window is not None:
                    on_window(len(window))
    finally:
        undo()
    means = sums.means(model.dtype)
    if score == "joint":
        means = {index: drop_order(mean, mean.shape[-1]) for index, mean in means.items()}
    embedding = model.get_input_embeddings()
    assert embedding is not None
    return identity_of(model.config, weights=weights_digest(embedding.weight)), means, tokens
