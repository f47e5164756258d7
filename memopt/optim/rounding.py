"""Stochastic rounding of float32 to bfloat16, reproducible from (seed, step, tensor, position) alone.

Adam's second moment moves by a factor of 1 - beta2 = 0.001 a step, less than half a bfloat16 ulp (2^-9): with
rounding to nearest it would stand still. Rounding up with a probability equal to the fraction cut off keeps it right
on average.
"""

from __future__ import annotations

import numpy as np
import torch

_WORDS_PER_COUNTER = 4
_LANES = 16
"""Philox yields four 64-bit words per counter value: sixteen 16-bit lanes, one per element."""


def random_lanes(numel: int, *, seed: int, step: int, tensor: int, position: int) -> torch.Tensor:
    """(numel,) int32 in [0, 65536): the random bits of elements `position`... of a tensor, however it is cut.

    `position` must be a multiple of 16. The generator is counter-based (Philox4x64, Salmon et al. 2011): no state is
    kept.
    """
    if position % _LANES:
        raise ValueError(f"position must be a multiple of {_LANES}, got {position}")
    generator = np.random.Philox(
        key=np.array([seed & (2**64 - 1), (tensor << 32 | step) & (2**64 - 1)], dtype=np.uint64),
        counter=np.array([position // _LANES, 0, 0, 0], dtype=np.uint64),
    )
    words = -(-numel // _LANES) * _WORDS_PER_COUNTER
    return torch.from_numpy(generator.random_raw(words).view(np.uint16)[:numel].astype(np.int32))


def stochastic_round_(values: torch.Tensor, lanes: torch.Tensor, out: torch.Tensor) -> None:
    """Round `values` (n,) float32 into `out` (n,) bfloat16 using `lanes` (n,) int32; `values` is consumed."""
    bits = values.view(torch.int32)
    bits.add_(lanes).bitwise_right_shift_(16)  # cutting the low half truncates; the random carry makes it unbiased
    out.view(torch.int16).copy_(bits)
