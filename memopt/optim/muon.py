"""Muon (Keller Jordan 2024; Liu et al. 2025, arXiv 2502.16982): momentum, orthogonalised, as pure functions.

For every matrix G:  B <- mu B + (1 - mu) G;  N = (1 - mu) G + mu B with Nesterov, else B;  d = scale * U V^T of N.
The weights follow w <- (1 - lr * wd) w - lr d.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from memopt.errors import BadInput
from memopt.optim.newton_schulz import (
    EPS,
    Coefficients,
    check_matrix,
    orthogonalize,
    orthogonalize_each,
    polynomials,
    scratch_bytes,
    working_dtype,
)
from memopt.units import MiB

SCRATCH_LIMIT_BYTES = 32 * MiB
"""Two float32 1024 x 1024 matrices at once; above that size products fill a CPU or a GPU on their own."""


class Scale(StrEnum):
    """What an orthogonalised (m, n) update, rows = outputs, is multiplied by.

    - match_rms_adamw: 0.2 sqrt(max(m, n)), the size of AdamW's updates, so AdamW's lr and weight decay can be kept
      (Liu et al. 2025, section 2.2)
    - original: sqrt(max(1, m / n)) (Jordan 2024)
    - spectral: sqrt(m / n) (Bernstein 2025, "Deriving Muon"; dion's default)
    - none: 1
    """

    MATCH_RMS_ADAMW = "match_rms_adamw"
    ORIGINAL = "original"
    SPECTRAL = "spectral"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class MuonSettings:
    """Everything but lr and weight decay. `dtype` is that of the Newton-Schulz products; None: see `working_dtype`."""

    momentum: float = 0.95
    nesterov: bool = True
    scale: Scale = Scale.MATCH_RMS_ADAMW
    coefficients: Coefficients = Coefficients.POLAR_EXPRESS
    steps: int = 5
    dtype: torch.dtype | None = None
    eps: float = EPS

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise BadInput(f"momentum: Muon's must be from 0 to below 1, got {self.momentum}; 0.95 is usual")
        if self.eps <= 0:
            raise BadInput(f"eps: must be above 0, got {self.eps}; {EPS} is usual")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise BadInput(f"dtype: {self.dtype} cannot hold Newton-Schulz products; use float32 or bfloat16")
        scale(1, 1, self.scale)
        polynomials(self.coefficients, self.steps)


def momentum_(
    grad: torch.Tensor,  # float32, any shape
    momentum_buffer: torch.Tensor,  # as grad, updated in place
    *,
    momentum: float,
    nesterov: bool,
) -> torch.Tensor:
    """What is to be orthogonalised, by torch.optim.Muon's arithmetic (an average, not Jordan's sum; a factor apart).

    Without Nesterov it is `momentum_buffer` itself, not a copy.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    return grad.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer


def scale(m: int, n: int, mode: Scale) -> float:
    """The factor of an (m, n) update; `mode` decides (see Scale). Raises BadInput."""
    match mode:
        case Scale.MATCH_RMS_ADAMW:
            return 0.2 * math.sqrt(max(m, n))
        case Scale.ORIGINAL:
            return math.sqrt(max(1, m / max(n, 1)))
        case Scale.SPECTRAL:
            return math.sqrt(m / max(n, 1))
        case Scale.NONE:
            return 1.0
    raise BadInput(f"scale: {mode!r} is not known to Muon; choose one of {', '.join(Scale)}")


@torch.no_grad()
def direction(
    grad: torch.Tensor,  # (..., m, n) float32: a stack of matrices
    momentum_buffer: torch.Tensor,  # (..., m, n) float32, updated in place
    settings: MuonSettings,
) -> torch.Tensor:
    """d (..., m, n) float32 of a stack of equal shapes, in one batched call; the scale is in it.

    With Scale.NONE, and `lr * scale(m, n, mode)` as the step of the weights, rounding is torch.optim.Muon's. Raises
    BadInput.
    """
    m, n = check_matrix(grad).shape[-2:]
    update = momentum_(grad, momentum_buffer, momentum=settings.momentum, nesterov=settings.nesterov)
    result = orthogonalize(
        update, coefficients=settings.coefficients, steps=settings.steps, dtype=settings.dtype, eps=settings.eps
    )
    return _scaled_(result, scale(m, n, settings.scale))


def directions(
    grads: Sequence[torch.Tensor],  # (..., m, n) float32, of any shapes
    momentum_buffers: Sequence[torch.Tensor],  # as grads, updated in place
    settings: MuonSettings,
    *,
    limit_bytes: int = SCRATCH_LIMIT_BYTES,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, d) of each gradient, batch by batch as `batches` has it, so that one batch is in memory at a time.

    A buffer moves when its batch's turn comes: take all of them. How matrices are batched changes no result by more
    than rounding: on CPU the results are the same bits; CUDA's libraries may choose another kernel for another batch.
    A gradient whose stack of matrices alone passes the limit is worked off in slices. Raises BadInput.
    """
    for batch in batches(grads, dtype=settings.dtype, limit_bytes=limit_bytes):
        first = grads[batch[0]]
        step = _matrices_within(first, settings.dtype, limit_bytes)
        if len(batch) == 1 and step < math.prod(first.shape[:-2]):
            yield batch[0], _sliced(first, momentum_buffers[batch[0]], settings, step)
            continue
        pairs = [(grads[i], momentum_buffers[i]) for i in batch]
        yield from zip(batch, _stacked(pairs, settings), strict=True)


def batches(
    matrices: Sequence[torch.Tensor], *, dtype: torch.dtype | None = None, limit_bytes: int = SCRATCH_LIMIT_BYTES
) -> list[list[int]]:
    """Indices of `matrices` (..., m, n) that go through Newton-Schulz together: same shape, same device.

    The scratch of a batch (`scratch_bytes`) stays within `limit_bytes`, unless it is a single one. Only shapes and
    devices are looked at. Groups come in the order of their first member.
    """
    groups: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.device), []).append(index)
    found: list[list[int]] = []
    for members in groups.values():
        first = matrices[members[0]]
        size = max(1, _matrices_within(first, dtype, limit_bytes) // max(1, math.prod(first.shape[:-2])))
        found.extend(members[start : start + size] for start in range(0, len(members), size))
    return found


def _matrices_within(like: torch.Tensor, dtype: torch.dtype | None, limit_bytes: int) -> int:
    m, n = check_matrix(like).shape[-2:]
    return max(1, limit_bytes // max(1, scratch_bytes(m, n, dtype=dtype or working_dtype(like.device))))


def _sliced(grad: torch.Tensor, buffer: torch.Tensor, settings: MuonSettings, step: int) -> torch.Tensor:
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    for lead in itertools.product(*(range(size) for size in grad.shape[:-3])):
        for to, g, b in zip(*(each[lead].split(step) for each in (out, grad, buffer)), strict=True):
            to.copy_(direction(g, b, settings))
    return out


@torch.no_grad()
def _stacked(pairs: list[tuple[torch.Tensor, torch.Tensor]], settings: MuonSettings) -> torch.Tensor:
    like = pairs[0][0]
    m, n = like.shape[-2:]
    result = orthogonalize_each(
        (momentum_(g, b, momentum=settings.momentum, nesterov=settings.nesterov) for g, b in pairs),
        count=len(pairs),
        shape=like.shape,
        device=like.device,
        coefficients=settings.coefficients,
        steps=settings.steps,
        dtype=settings.dtype,
        eps=settings.eps,
    )
    return _scaled_(result, scale(m, n, settings.scale))


def _scaled_(update: torch.Tensor, factor: float) -> torch.Tensor:
    return update if factor == 1 else update.mul_(factor)
