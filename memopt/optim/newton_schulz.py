"""The nearest orthogonal matrix by matrix products alone (Newton-Schulz), for batches of matrices.

With G = U S V^T, five odd polynomials of degree five, X <- a X + (b A + c A^2) X with A = X X^T, drive every singular
value of G / ||G||_F towards 1 and leave U and V: X is then close to U V^T, the polar factor of G.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from enum import StrEnum

import torch

from memopt.errors import BadInput


class Coefficients(StrEnum):
    """Which polynomials: what becomes of a singular value that is the share x of the Frobenius norm, in five steps.

    - polar_express: 0.84..1.15 for every x from 1e-3 to 1, closest to U V^T (Amsel et al. 2025, arXiv 2505.16932, for
      five steps; numbers as in microsoft/dion, which made them with a safety of 1.02).
    - jordan: 0.68..1.21 for x from 2e-3 to 1; more steps do not come nearer to 1 (Keller Jordan, "Muon", 2024; what
      torch.optim.Muon uses).
    """

    POLAR_EXPRESS = "polar_express"
    JORDAN = "jordan"


EPS = 1e-7
"""Least norm divided by, as in torch.optim.Muon: zeros stay zeros, and what is nearly zero does not become large."""
_POLYNOMIALS: dict[Coefficients, tuple[tuple[float, float, float], ...]] = {
    Coefficients.POLAR_EXPRESS: (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    Coefficients.JORDAN: ((3.4445, -4.7750, 2.0315),),
}
_BF16_UNITS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
_NORM_FACTOR = {Coefficients.POLAR_EXPRESS: 1.02, Coefficients.JORDAN: 1.0}
"""Polar Express diverges just above 1; rounding in bfloat16 must not carry a singular value there (its safety)."""


@torch.no_grad()
def orthogonalize(
    matrix: torch.Tensor,  # (..., m, n)
    *,
    coefficients: Coefficients = Coefficients.POLAR_EXPRESS,
    steps: int = 5,
    dtype: torch.dtype | None = None,
    eps: float = EPS,
) -> torch.Tensor:
    """(..., m, n): near U V^T of every matrix, in the dtype of `matrix` (float32), which is left as it is.

    `dtype` is what the products are computed in; None: see `working_dtype`. Zeros give zeros; a matrix with NaN or Inf
    gives NaN, and only that matrix of the batch. Polar Express has five polynomials: more steps repeat the last, whose
    fixed point is 1.035. Raises BadInput.
    """
    work = torch.empty(check_matrix(matrix).shape, dtype=dtype or working_dtype(matrix.device), device=matrix.device)
    return _iterate(work.copy_(matrix), polynomials(coefficients, steps), _NORM_FACTOR[coefficients], eps, matrix.dtype)


@torch.no_grad()
def orthogonalize_each(
    matrices: Iterable[torch.Tensor],  # `count` of (..., m, n), float32
    *,
    count: int,
    shape: Sequence[int],  # (..., m, n)
    device: torch.device,
    coefficients: Coefficients = Coefficients.POLAR_EXPRESS,
    steps: int = 5,
    dtype: torch.dtype | None = None,
    eps: float = EPS,
) -> torch.Tensor:
    """(count, ..., m, n) float32: `orthogonalize(torch.stack(list(matrices)))` without holding the stack.

    Each matrix is taken once and may be dropped by whoever makes them when the next is asked for. Raises BadInput.
    """
    work = torch.empty((count, *shape), dtype=dtype or working_dtype(device), device=device)
    for slot, matrix in zip(work, matrices, strict=True):
        slot.copy_(check_matrix(matrix))
    return _iterate(work, polynomials(coefficients, steps), _NORM_FACTOR[coefficients], eps, torch.float32)


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA; float32 elsewhere: CPUs without matrix units multiply bfloat16 slower than float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def faster_products(device: torch.device) -> str | None:
    """A sentence where another dtype than the default would be much faster; None elsewhere.

    The default does not depend on the CPU, so that a run goes on with the same numbers on another one.
    """
    if device.type != "cpu" or not any(getattr(torch.cpu, name, bool)() for name in _BF16_UNITS):
        return None
    return (
        "Newton-Schulz computes in float32; this CPU multiplies bfloat16 matrices in hardware, so "
        'ns_dtype="bfloat16" (what GPUs and torch.optim.Muon use) is several times as fast'
    )


def polynomials(coefficients: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of each of `steps` steps. Raises BadInput."""
    if coefficients not in _POLYNOMIALS:
        choices = ", ".join(Coefficients)
        raise BadInput(f"coefficients: {coefficients!r} is not known to Newton-Schulz; choose one of {choices}")
    if steps < 1:
        raise BadInput(f"steps: Newton-Schulz needs at least 1, got {steps}; 5 is usual")
    known = _POLYNOMIALS[coefficients]
    return list(itertools.islice(itertools.chain(known, itertools.repeat(known[-1])), steps))


def scratch_bytes(m: int, n: int, *, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that one (m, n) matrix takes while it is orthogonalised, its float32 result included, `matrix` not.

    Two copies of the matrix and two of its small Gram matrix; in another dtype than float32, two copies and the float32
    result if that is more. A batch takes so much for each of its matrices. What the BLAS library packs is not counted.
    """
    copies = 2 * m * n * dtype.itemsize
    result = 0 if dtype == torch.float32 else m * n * torch.float32.itemsize
    return copies + max(2 * min(m, n) ** 2 * dtype.itemsize, result)


def check_matrix(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix`, if it is what Newton-Schulz can take. Raises BadInput."""
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise BadInput(
            f"matrix: Newton-Schulz needs real matrices (..., m, n), got {str(matrix.dtype).removeprefix('torch.')} of "
            f"shape {tuple(matrix.shape)}; give vectors and tables to another rule"
        )
    return matrix


def _iterate(
    work: torch.Tensor,  # (..., m, n) contiguous, consumed
    steps: list[tuple[float, float, float]],
    norm_factor: float,
    eps: float,
    result_dtype: torch.dtype,
) -> torch.Tensor:
    *batch, m, n = work.shape
    if work.numel() == 0:
        return work.to(result_dtype)
    x = work.view(math.prod(batch), m, n)
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).mul_(norm_factor).clamp_(min=eps))
    spare = torch.empty_like(x)
    gram = x.new_empty(x.shape[0], min(m, n), min(m, n))
    update = torch.empty_like(gram)
    for a, b, c in steps:
        # on the smaller side, from whichever side of X that is: no transposed copy is ever made
        torch.bmm(*((x, x.mT) if m <= n else (x.mT, x)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=update)
        torch.baddbmm(x, *((update, x) if m <= n else (x, update)), beta=a, out=spare)
        x, spare = spare, x
    del gram, update
    return x.to(result_dtype).view(work.shape)
