"""Scores of key channels added up over prompts, whoever watches them: a prompt's energies come whole or in pieces.

A prompt's score is ThinK's (memopt.kv.channels.channel_scores): mean query energy, summed over the group, times mean
key energy. The mean of the prompts' scores chooses static channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.errors import BadInput
from memopt.kv.channels import group_energy


class PromptEnergy:
    """Energies of one prompt in one layer, piece by piece: its chunks, as a server computes them."""

    def __init__(self, observation: int | None = None) -> None:
        self._observation = observation
        self._query: Tensor | None = None  # (H, D) float64; with an observation the last queries' squares, (n, H, D)
        self._key: Tensor | None = None  # (K, D) float64
        self.tokens = 0

    def add(
        self,
        query: Tensor,  # (T, H, D), after rotary embedding
        key: Tensor,  # (T, K, D), of the same tokens
    ) -> None:
        """Count the prompt's next tokens."""
        self.tokens += len(key)
        keys = key.float().square().sum(0, dtype=torch.float64)
        self._key = keys if self._key is None else self._key + keys
        if self._observation is None:
            queries = query.float().square().sum(0, dtype=torch.float64)
            self._query = queries if self._query is None else self._query + queries
            return
        queries = query[-self._observation :].float().square()
        if self._query is not None:
            queries = torch.cat((self._query, queries))[-self._observation :]
        self._query = queries

    def scores(self) -> Tensor:
        """(K, D) float64, of all tokens so far; raises BadInput when there were none."""
        if self._query is None or self._key is None:
            raise BadInput("a prompt without tokens has no scores")
        query = self._query / self.tokens if self._observation is None else self._query.mean(0, dtype=torch.float64)
        return group_energy(query[None], len(self._key))[0] * (self._key / self.tokens)


class MeanScores:
    """The mean over prompts of every layer's scores."""

    def __init__(self) -> None:
        self._totals: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def add(self, layer: int, scores: Tensor) -> None:
        """One prompt's scores (K, D), or errors of sets (K, D, D), in one layer."""
        one = scores.double()
        self._totals[layer] = self._totals[layer] + one if layer in self._totals else one
        self._counts[layer] = self._counts.get(layer, 0) + 1

    def means(self, dtype: torch.dtype) -> dict[int, Tensor]:
        """By layer, in the shape that was added, float64 on the CPU. `dtype`, the model's, is for the error only.

        Raises:
            BadInput: no prompt, or scores that are not finite.
        """
        if not self._totals:
            raise BadInput("no text to calibrate on")
        means = {layer: total.cpu() / self._counts[layer] for layer, total in sorted(self._totals.items())}
        for layer, mean in means.items():
            if not torch.isfinite(mean).all():
                raise BadInput(f"layer {layer}: scores that are not finite; the model overflows in {dtype}")
        return means
