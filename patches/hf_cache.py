"""`ThinKCache`: a key-value cache for Hugging Face models whose pruned channels are really gone.

The prompt is attended to densely, layer by layer, by the model's own attention; each layer is pruned as soon as its own
attention has run, so that at most one layer's dense keys exist above the thin cache. Everything after that goes through
memopt.kv.state.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from memopt.errors import BadInput
from memopt.kv.channel_file import ChannelSets, load_channels
from memopt.kv.channels import kept_count
from memopt.kv.joint import ASKED, observe_spread
from memopt.kv.rows import Rows
from memopt.kv.settings import Fold, Score, Storage, ThinSettings, check_number
from memopt.kv.state import ThinState
from memopt.kv.window import Window, observe
from memopt.patches import hf_attention
from memopt.patches.hf_attention import Stock, ThinKeys
from memopt.patches.hf_identity import identity_of, weights_digest

OLDEST = (5, 16)
"""The first transformers whose cache layers have the interface used here."""


class ThinLayer(DynamicLayer):
    """One layer's cache: dense while the prompt comes in, then a `ThinState`."""

    is_sliding = False

    def __init__(self, settings: ThinSettings, *, kept: Tensor | None = None, prompt_tokens: int | None = None) -> None:
        super().__init__()
        self._settings, self._kept, self._prompt_tokens = settings, kept, prompt_tokens
        self.drafts_expected = False
        self.state: ThinState | None = None
        self._dense_keys: Tensor | None = None
        self._dense_values: Rows | None = None
        self._window: Window | None = None
        self._asked: Window | None = None  # the queries of score="joint"
        self._real: Tensor | None = None  # (B, T) bool, while dense and where something is padded
        self._scaling = 1.0
        self._waiting = False  # between `update` and `attend`

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Called by `update` for the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._dense_values = Rows.like(value_states, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Add tokens; a handle in place of the keys, which only the attention functions of this cache understand."""
        if key_states.requires_grad or value_states.requires_grad:
            raise BadInput(
                "ThinKCache is for inference: call the model under torch.inference_mode() or torch.no_grad()"
            )
        if self._waiting:
            raise BadInput(
                "the model's attention ran without ThinKCache (its attention implementation was changed after the cache"
                " was made, or the cache was closed), so nothing was pruned; make a new ThinKCache and use that"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._waiting = True
        if self.state is not None:
            self.state.append(key_states, value_states)
            return ThinKeys(self, key_states, self.state.tokens, value_states), value_states
        assert self._dense_values is not None
        # the first keys are held as they come, without a copy: they live until this layer's attention has run
        self._dense_keys = key_states if self._dense_keys is None else torch.cat([self._dense_keys, key_states], 2)
        self._dense_values.append(value_states)
        return ThinKeys(self, key_states, self._dense_keys.shape[2], value_states), value_states

    def attend(
        self, stock: Stock, module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the newest queries; prunes when the prompt is complete."""
        self._waiting = False
        scaling = options.get("scaling")
        scaling = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        for name in ("s_aux", "position_bias"):
            if options.get(name) is not None:
                raise BadInput(f"{type(module).__name__} adds {name} to its attention, which ThinKCache does not do")
        if self.state is not None:
            # transformers' sdpa leaves softcapping out; what follows the prompt must not differ from it in that
            softcap = None if stock is sdpa_attention_forward else options.get("softcap")
            wanted = bool(options.get("output_attentions"))
            return self.state.attend(query, mask, scaling=scaling, softcap=softcap, weights=wanted)
        assert self._dense_keys is not None and self._dense_values is not None
        output = stock(module, query, self._dense_keys, self._dense_values.view(), mask, **options)
        self._after_dense(query, mask, scaling)
        return output

    def prune(self) -> None:
        """Prune now, with the queries seen last; nothing to do when pruned or empty."""
        if self.state is None and self._dense_keys is not None:
            self._prune(self._dense_keys.shape[2])

    def get_seq_length(self) -> int:
        """Tokens seen, also those that eviction took."""
        if self.state is not None:
            return self.state.tokens
        return 0 if self._dense_keys is None else self._dense_keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made over all tokens seen; eviction cuts them itself."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Empty, ready for another prompt."""
        self._forget()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: -n removes n; a positive number is the length to keep."""
        length = self.get_seq_length()
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        if count == 0 or length == 0:
            return
        if count >= length:
            self.reset()
        elif self.state is not None:
            self.state.crop(count)
        else:
            assert self._dense_keys is not None and self._dense_values is not None
            self._dense_keys = self._dense_keys[:, :, :-count]
            self._dense_values.crop(count)
            self._window = None if self._window is None else _without_last(self._window, length - count)
            self._asked = None if self._asked is None else _without_last(self._asked, length - count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Batch rows in another order, for beam search."""
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row `repeats` times."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these batch rows."""
        self._map_batch(lambda x: x[indices])

    def activate_past_recording(self) -> None:
        """Called where tokens may be taken back: assisted generation puts drafts behind the prompt."""
        if self._settings.fold == "prune":
            raise BadInput("fold='prune' drops channels that drafts taken back would have left whole; use fold='keep'")
        self.drafts_expected = True

    def offload(self) -> None:
        """Refused: the thin cache stays where the model is."""
        raise BadInput("ThinKCache does not offload its layers to the CPU; use it without offloading")

    def tensors(self) -> list[Tensor]:
        """Everything that holds memory."""
        if self.state is not None:
            return self.state.tensors()
        dense = [] if self._dense_keys is None else [self._dense_keys]
        values = [] if self._dense_values is None else self._dense_values.tensors()
        queries = [tensor for each in (self._window, self._asked) if each is not None for tensor in each.tensors()]
        return [*dense, *values, *queries]

    def _forget(self) -> None:
        self.state = self._dense_keys = self._dense_values = self._window = self._asked = self._real = None
        self._waiting = False

    @torch.no_grad()
    def _after_dense(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        assert self._dense_keys is not None
        tokens, count = self._dense_keys.shape[2], query.shape[2]
        self._scaling = scaling
        self._real = _real_tokens(mask, tokens, query.shape[0])
        prompt = tokens if self._prompt_tokens is None else min(self._prompt_tokens, tokens)
        if self._prompt_tokens is None and self.drafts_expected:
            raise BadInput(
                "assisted generation puts drafts behind the prompt, and they would choose the channels; say where the"
                " prompt ends: ThinKCache(model, ..., prompt_tokens=input_ids.shape[1])"
            )
        start = tokens - count
        if start < prompt:
            real = None if self._real is None else self._real[:, start:prompt]
            query = query[:, :, : prompt - start]
            self._window = observe(query, real, start, self._settings.observation, self._window)
            if self._kept is None and self._settings.score == "joint":
                self._asked = observe_spread(query, real, start, ASKED, self._asked)
        if self._prompt_tokens is None or tokens >= self._prompt_tokens:
            self._prune(prompt)

    @torch.no_grad()
    def _prune(self, prompt: int) -> None:
        keys, values, window, asked = self._dense_keys, self._dense_values, self._window, self._asked
        assert keys is not None and values is not None and window is not None
        later = keys[:, :, prompt:], values.view()[:, :, prompt:].clone()
        values.crop(values.length - prompt)
        # let go of here, so that what is replaced can be freed inside
        self._dense_keys = self._dense_values = self._window = self._asked = None
        self.state = ThinState.prune(
            self._settings,
            keys[:, :, :prompt],
            values,
            window,
            scaling=self._scaling,
            real=None if self._real is None else self._real[:, :prompt],
            asked=asked,
            kept=self._kept,
        )
        self._real = None
        if later[0].shape[2]:
            self.state.append(*later)

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state.map_batch(change)
        elif self._dense_keys is not None and self._dense_values is not None:
            self._dense_keys = change(self._dense_keys)
            self._dense_values.map_batch(change)
            self._real = None if self._real is None else change(self._real)
            self._window = None if self._window is None else _mapped(self._window, change)
            self._asked = None if self._asked is None else _mapped(self._asked, change)


class ThinKCache(Cache, AbstractContextManager["ThinKCache"]):
    """A cache with thinner keys (ThinK, arXiv 2407.21018) for any dense-attention Hugging Face causal LM.

    ```python
    cache = memopt.ThinKCache(model, key_keep=0.6)
    out = model.generate(**inputs, past_key_values=cache)
    ```

    `key_keep` and `value_keep` are shares of a head's channels (rounded up to a multiple of 8). Queries from all of the
    prompt choose the key channels together (memopt.kv.joint); with score="think", the paper's, only the `observation`
    last do, each channel alone. Those choose the value channels too. The `recent` newest tokens stay whole. Tokens
    after the prompt stay whole with fold="keep", or are pruned like the prompt a block at a time with fold="prune".
    `evict` keeps so many tokens of the prompt per KV head (SnapKV) before the channels are pruned. `storage` "int8" or
    "int4" codes all but the newest tokens (KIVI). `channels` is a file of `memopt calibrate-keys`: static channels
    instead of each prompt's own.

    The prompt is what the first forward brings. Where it comes in several pieces (chunked prefill) or with drafts
    behind it (assisted generation), `prompt_tokens` says how many tokens it has, or `prune()` ends it by hand.

    The model's attention is replaced by one that knows this cache (and behaves as before with any other), until
    `close()`, the end of the `with` block, or the end of the cache's life.

    Raises:
        BadInput: settings that cannot be, or a model this cache does not serve, with the reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        key_keep: float | None = None,
        value_keep: float = 1.0,
        *,
        observation: int = 32,
        recent: int = 32,
        fold: Fold = "keep",
        evict: int | None = None,
        storage: Storage | None = None,
        score: Score = "joint",
        channels: Path | str | None = None,
        prompt_tokens: int | None = None,
    ) -> None:
        _refuse_versions()
        text = served(model)
        if channels is not None and not isinstance(channels, str | os.PathLike):
            raise BadInput(f"channels = {channels!r}: must be the path of a file of memopt calibrate-keys")
        sets = None if channels is None else load_channels(Path(channels), _identity(model))
        if key_keep is not None:
            check_number("key_keep", key_keep)
        if prompt_tokens is not None:
            check_number("prompt_tokens", prompt_tokens, whole=True)
        if prompt_tokens is not None and prompt_tokens < 1:
            raise BadInput(f"prompt_tokens = {prompt_tokens}: must be at least 1")
        self.settings = ThinSettings(
            key_keep=_key_keep(key_keep, sets),
            value_keep=value_keep,
            observation=observation,
            recent=recent,
            fold=fold,
            evict=evict,
            storage=storage,
            score=score,
        )
        layers = DynamicCache(config=text).layers
        pruned = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not pruned:
            raise BadInput(f"{text.model_type}: no layer attends to the whole context, so there is nothing to prune")
        for index in pruned:
            kept = None if sets is None else sets.keys.get(index)
            if sets is not None and kept is None:
                raise BadInput(f"{channels} has no channels for layer {index}, which is to be pruned; calibrate again")
            layers[index] = ThinLayer(self.settings, kept=kept, prompt_tokens=prompt_tokens)
        super().__init__(layers=layers)
        self._attach(model)

    def prune(self) -> None:
        """Take the prompt as complete and prune now; for chunked prefill with a `prompt_tokens` not reached."""
        for layer in self._thin():
            layer.prune()

    def close(self) -> None:
        """Give the model its own attention back, and the cache's memory. Twice does no harm."""
        self._finalizer()
        self.reset()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cache_bytes(self) -> int:
        """Bytes of all storage the cache holds, each counted once."""
        storages = {}
        for layer in self.layers:
            # a layer of another kind, with linear attention for one, has its states in whatever it calls them
            held = layer.tensors() if isinstance(layer, ThinLayer) else vars(layer)
            for tensor in _tensors_in(held):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> ThinKCache:
        """A cache of its own with the same content: one prefilled prefix, many continuations."""
        model = self._model()
        if model is None or not self._finalizer.alive:
            raise BadInput("a closed ThinKCache cannot be copied")
        made = type(self).__new__(type(self))
        kept = {name: value for name, value in vars(self).items() if name not in ("_model", "_finalizer", "layers")}
        made.__dict__.update(kept, layers=copy.deepcopy(self.layers, memo))
        made._attach(model)
        return made

    def _attach(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._finalizer = weakref.finalize(self, hf_attention.attach(model))

    def _thin(self) -> list[ThinLayer]:
        return [layer for layer in self.layers if isinstance(layer, ThinLayer)]


def _tensors_in(held: object) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors_in(part)


def _refuse_versions() -> None:
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        raise BadInput(
            f"ThinKCache needs transformers {OLDEST[0]}.{OLDEST[1]} or later, not {transformers.__version__}:"
            " pip install -U transformers"
        )


def served(model: PreTrainedModel) -> Any:
    """The configuration of the language model; BadInput with the reason for models the cache does not serve."""
    if not isinstance(model, PreTrainedModel):
        inside = "; give it the model inside, get_base_model()" if hasattr(model, "get_base_model") else ""
        raise BadInput(f"ThinKCache needs a Hugging Face model, not {type(model).__name__}{inside}")
    config = model.config
    text = config.get_text_config(decoder=True)
    name = f"{text.model_type}:"
    if config.is_encoder_decoder:
        raise BadInput(f"{name} encoder-decoder models have caches of another shape; ThinKCache serves causal LMs")
    if getattr(text, "kv_lora_rank", None):
        raise BadInput(
            f"{name} multi-head latent attention caches a compressed latent already; there is nothing to prune"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise BadInput(f"{name} layers that read another layer's keys would need its dense keys; ThinKCache drops them")
    if text.model_type == "doge":
        raise BadInput(f"{name} its masks are made of all cached values, which ThinKCache does not hand out")
    static = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if static not in (None, "dynamic"):
        raise BadInput(
            f"{name} its generation_config wants a {static!r} cache, whose shapes never change, so no channel could go;"
            " set model.generation_config.cache_implementation = None"
        )
    return text


def _identity(model: PreTrainedModel) -> Any:
    embedding = model.get_input_embeddings()
    return identity_of(model.config, weights=weights_digest(embedding.weight))


def _key_keep(asked: float | None, sets: ChannelSets | None) -> float:
    if sets is None:
        return 0.6 if asked is None else asked
    if asked not in (None, sets.keep) and kept_count(sets.model.head_dim, asked or 0.0) != sets.count:
        raise BadInput(
            f"key_keep = {asked} keeps {kept_count(sets.model.head_dim, asked or 0.0)} channels, the channel file"
            f" {sets.count} (keep {sets.keep}); leave key_keep out, or calibrate again"
        )
    return sets.count / sets.model.head_dim


def _real_tokens(mask: Tensor | None, tokens: int, batch: int) -> Tensor | None:
    """Which tokens are no padding, (B, T) bool, as the last query of each row sees them; None: all."""
    if mask is None:
        return None
    last = mask[:, 0, -1, :tokens]
    real = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    return None if bool(real.all()) else real.expand(batch, -1)


def _mapped(window: Window, change: Callable[[Tensor], Tensor]) -> Window:
    return Window(query=change(window.query), position=change(window.position), real=change(window.real))


def _without_last(window: Window, tokens: int) -> Window:
    return Window(query=window.query, position=window.position, real=window.real & (window.position < tokens))
