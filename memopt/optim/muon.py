"""Muon (Keller Jordan 2024; Liu et al. 2025, arXiv 2502.16982): momentum, orthogonalised, as pure functions.

For every matrix G:  B <- mu B + (1 - mu) G;  N = (1 - mu) G + mu B with Nesterov, else B;  d = scale * U V^T of N.
The weights follow w <- (1 - lr * wd) w - lr d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from memopt.errors import BadInput
from memopt.optim.newton_schulz import EPS, Coefficients, check_matrix, orthogonalize, polynomials


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


def _scaled_(update: torch.Tensor, factor: float) -> torch.Tensor:
    return update if factor == 1 else update.mul_(factor)
