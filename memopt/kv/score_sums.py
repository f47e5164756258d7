"""What key channels are worth, averaged over prompts, whoever computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from memopt.errors import BadInput

LEAST_TOKENS = 16
"""Shorter windows say nothing about a context."""
MULTIPLE = 16
"""Kept channels are rounded up to this where they are chosen once for all: it suits vLLM's kernels."""
RECENT = 32
"""Tokens that are taken to stay whole when channels are chosen for many prompts (memopt.kv.joint)."""


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
