"""The contract between an update rule and whoever holds weights, gradients and state: parts of flat vectors."""

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
    """How some parameters are updated. Immutable and hashable: parameters with equal rules lie together and are updated
    together, unless the rule needs `whole` matrices."""

    @property
    def whole(self) -> int:
        """0: any elements can be updated apart from all others. Else a parameter needs a vector of its own, which is
        updated this many elements at a time, or (where they do not fill whole pages) all at once."""

    @property
    def block(self) -> int:
        """Parameters begin, and may be cut, at multiples of this many elements: those share a part of the state."""

    def record_bytes(self, numel: int) -> int:
        """Bytes of the state of `numel` elements that are updated together."""

    def scratch_bytes(self, numel: int) -> int:
        """Bytes of temporaries that one update of `numel` elements needs."""

    def update_(
        self,
        weights: torch.Tensor,  # (n,) float32, updated in place
        grads: torch.Tensor,  # (n,) float32, consumed
        record: torch.Tensor,  # (record_bytes(n),) uint8, updated in place; zeros before the first step
        *,
        decay_numel: int,
        lr: float,
        key: ChunkKey,
    ) -> None:
        """One step; the first `decay_numel` elements get weight decay."""
