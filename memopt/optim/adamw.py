"""AdamW (Loshchilov & Hutter 2019, algorithm 2) on a chunk of a flat vector, with its two moments in one byte record.

The record of a chunk of n elements is [first moment (n) | second moment (n)], float32 or bfloat16, so that one read
and one write move the whole state of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memopt.errors import BadInput
from memopt.optim.rounding import random_lanes, stochastic_round_
from memopt.optim_types import ChunkKey

MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Update rule and state codec. Element-wise: any cut of the vector gives the same result."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    state_dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.state_dtype not in (torch.float32, torch.bfloat16):
            raise BadInput(f"optim_state_dtype: {self.state_dtype} is not supported; use float32 or bfloat16")

    def record_bytes(self, numel: int) -> int:
        """Bytes of the state of `numel` elements."""
        return MOMENTS * numel * self.state_dtype.itemsize

    def scratch_bytes(self, chunk: int) -> int:
        """Bytes of temporaries one update of `chunk` elements needs."""
        return 0 if self.state_dtype == torch.float32 else (MOMENTS + 1) * chunk * 4

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
        """One step; the first `decay_numel` elements of the chunk get weight decay."""
        n = weights.numel()
        stored = record.view(self.state_dtype).view(MOMENTS, n)
        moments = stored if self.state_dtype == torch.float32 else stored.float()
        split = min(max(decay_numel, 0), n)
        for part, decay in ((slice(0, split), self.weight_decay), (slice(split, n), 0.0)):
            if part.start < part.stop:
                self._fused_(weights[part], grads[part], moments[0, part], moments[1, part], decay, lr, key.step)
        if moments is not stored:
            for which in range(MOMENTS):
                lanes = random_lanes(
                    n, seed=self.seed, step=key.step, tensor=MOMENTS * key.tensor + which, position=key.position
                )
                stochastic_round_(moments[which], lanes, stored[which])

    def _fused_(
        self, w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, decay: float, lr: float, step: int
    ) -> None:
        torch._fused_adamw_(
            [w],
            [g],
            [m],
            [v],
            [],
            [torch.tensor(float(step))],
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
