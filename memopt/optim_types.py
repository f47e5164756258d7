"""The contract between an update rule and whoever holds weights, gradients and state: chunks of flat vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class ChunkKey:
    """Which elements of which tensor at which step: all that stochastic rounding may depend on."""

    step: int
    """Optimizer step, the first is 1."""
    tensor: int
    position: int


class UpdateRule(Protocol):
    """An optimizer whose update of a chunk needs nothing outside the chunk."""

    def record_bytes(self, numel: int) -> int:
        """Bytes of the state of `numel` elements."""

    def scratch_bytes(self, chunk: int) -> int:
        """Bytes of temporaries one update of `chunk` elements needs."""

    def update_(
        self,
        weights: torch.Tensor,  # (n,) float32, updated in place
        grads: torch.Tensor,  # (n,) float32, consumed
        record: torch.Tensor,  # (record_bytes(n),) uint8, updated in place
        *,
        decay_numel: int,
        lr: float,
        key: ChunkKey,
    ) -> None:
        """One step on one chunk; its first `decay_numel` elements get weight decay."""
