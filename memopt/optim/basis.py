"""Orthonormal bases of the directions a gradient matrix is largest in: the subspaces GaLore trains in.

Four ways, each a pure function of one gradient:

- gram: eigenvectors of the smaller of G G^T and G^T G. The same subspace as an SVD, without its cost.
- svd: the singular vectors as LAPACK gives them, signs included, which is what galore-torch uses.
- power: subspace iterations from the previous basis (Vogels et al. 2019, PowerSGD; Robert et al. 2025, LDAdam).
- random: a randomised range finder with power iterations (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1).

"power" without a previous basis is "gram". A decomposition that does not converge is tried again as gram, in float64 on
the CPU, and at last as random, which always ends.

The matrices of a batch are worked on one after the other, so that scratch does not grow with the batch and a matrix
gets the same basis in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Literal, NamedTuple

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from memopt.errors import BadInput

Method = Literal["gram", "svd", "power", "random"]

POWER_ITERATIONS = 2
"""Subspace iterations of "power". From a basis that shares 70 % with the best one, one iteration leaves out 2.9 % more
of the gradient than the best, two 0.4 %, four 0.04 % (512 x 1376, rank 128; benchmarks/galore_basis.py)."""
RANDOM_ITERATIONS = 2
"""Power iterations of "random". On slowly falling spectra none leaves out 40 % more than the best basis, two 2 %."""
OVERSAMPLING = 8
"""Columns the range finder draws beyond the rank (Halko et al. 2011, section 4.2, recommend 5 or 10)."""
_SMALLEST, _LARGEST = 1e-12, 1e12
"""Gradients whose largest entry is outside are scaled first: their squares would leave float32's range."""


class Side(StrEnum):
    """Which singular vectors of G (m, n) span the subspace."""

    LEFT = "left"
    RIGHT = "right"
    FULL = "full"


class Bases(NamedTuple):
    """Orthonormal columns; a side that is not used is None."""

    left: torch.Tensor | None  # (..., m, r)
    right: torch.Tensor | None  # (..., n, r)


_Pair = tuple[torch.Tensor | None, torch.Tensor | None]


def bases_of(
    grad: torch.Tensor,  # (..., m, n) float32
    *,
    side: Side,
    rank: int,
    method: Method = "gram",
    previous: Bases | None = None,
    seed: int = 0,
) -> Bases:
    """Bases of the `rank` largest singular directions of every matrix of `grad`, float32, in storage of their own.

    `previous` is where "power" starts, and what a gradient of zeros keeps (without it, it gets the first unit vectors).
    `seed` decides the draw of "random", which is the same for all matrices of a batch. The sign of a column is fixed
    by its entry of largest magnitude, by the previous basis ("power"), or by LAPACK ("svd").

    Raises BadInput for a rank outside 1..min(m, n) and for a gradient with a NaN or an infinity.
    """
    *batch, m, n = grad.shape
    if not 1 <= rank <= min(m, n):
        raise BadInput(f"rank: {rank} is outside 1..{min(m, n)} for a gradient of shape {tuple(grad.shape)}")
    grads = grad.reshape(-1, m, n)
    made = Bases(
        None if side is Side.RIGHT else grad.new_empty((len(grads), rank, m), dtype=torch.float32).mT,
        None if side is Side.LEFT else grad.new_empty((len(grads), rank, n), dtype=torch.float32).mT,
    )
    before = Bases(None, None) if previous is None else previous
    for i, matrix in enumerate(grads):
        left, right = (None if b is None else b.reshape(-1, *b.shape[-2:])[i].float() for b in before)
        found = _one(matrix.float(), side, rank, method, (left, right), seed)
        for place, basis in zip(made, found, strict=True):
            if place is not None and basis is not None:
                place[i].copy_(basis)
    return Bases(*(None if b is None else b.unflatten(0, batch) if batch else b[0] for b in made))


def _one(grad: torch.Tensor, side: Side, rank: int, method: Method, previous: _Pair, seed: int) -> _Pair:
    """`bases_of` for one matrix (m, n)."""
    low, high = torch.aminmax(grad)
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest):
        raise BadInput("gradient: it holds NaN or Inf, so it has no subspace to project on; skip this step")
    if largest == 0:
        return _of_nothing(grad, side, rank, previous)
    if not _SMALLEST < largest < _LARGEST:
        grad = grad / largest
    start = previous[0] if _from_left(grad, side) else previous[1]
    if method == "power" and start is not None:
        return _power(grad, side, start)
    last = (
        lambda: _gram(grad, side, rank),
        lambda: _on_cpu_in_double(grad, side, rank),
        lambda: _random(grad, side, rank, seed),
    )
    if method == "svd":
        return _first_that_works(lambda: _svd(grad, side, rank), *last)
    return last[-1]() if method == "random" else _first_that_works(*last)


def _from_left(grad: torch.Tensor, side: Side) -> bool:
    """Whether to work on the left vectors: the side asked for; of both, the smaller, from which the other follows."""
    return side is Side.LEFT or (side is Side.FULL and grad.shape[0] <= grad.shape[1])


def _first_that_works(*ways: Callable[[], _Pair]) -> _Pair:
    """The first result that is finite, of ways that may not converge; the last way's result as it is."""
    for way in ways[:-1]:
        try:
            found = way()
        except LinAlgError:
            continue
        if all(basis is None or bool(basis.isfinite().all()) for basis in found):
            return found
    return ways[-1]()


def _of_nothing(grad: torch.Tensor, side: Side, rank: int, previous: _Pair) -> _Pair:
    def unit(size: int) -> torch.Tensor:
        return torch.eye(size, rank, dtype=grad.dtype, device=grad.device)

    left, right = previous
    return (
        None if side is Side.RIGHT else unit(grad.shape[0]) if left is None else left,
        None if side is Side.LEFT else unit(grad.shape[1]) if right is None else right,
    )


def _gram(grad: torch.Tensor, side: Side, rank: int) -> _Pair:
    """Eigenvectors of the smaller Gram matrix; the other side is carried over by G.

    Directions whose singular value is below about 5e-4 of the largest (the root of float32's rounding) come out mixed;
    together they hold less than a millionth of the energy.
    """
    wide = grad.shape[0] <= grad.shape[1]
    # eigh reads one triangle only, so the rounding that makes the product unsymmetric has no effect
    small = torch.linalg.eigh(grad @ grad.T if wide else grad.T @ grad).eigenvectors[:, -rank:].flip(-1)
    return _both(grad, side, _signed(small), is_left=wide)


def _on_cpu_in_double(grad: torch.Tensor, side: Side, rank: int) -> _Pair:
    left, right = _gram(grad.double().cpu(), side, rank)
    return (None if left is None else left.to(grad), None if right is None else right.to(grad))


def _svd(grad: torch.Tensor, side: Side, rank: int) -> _Pair:
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    return (None if side is Side.RIGHT else u[:, :rank], None if side is Side.LEFT else vh[:rank].T)


def _power(grad: torch.Tensor, side: Side, start: torch.Tensor) -> _Pair:
    """P <- QR(G G^T P) from the previous P (mirrored for the right side)."""
    is_left = _from_left(grad, side)
    matrix = grad if is_left else grad.T
    basis = start
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix @ (matrix.T @ basis))
    return _both(grad, side, basis, is_left=is_left)


def _random(grad: torch.Tensor, side: Side, rank: int, seed: int) -> _Pair:
    """Range of G times a thin random matrix, sharpened by power iterations, then turned to its largest directions."""
    is_left = _from_left(grad, side)
    matrix = grad if is_left else grad.T
    columns = min(rank + OVERSAMPLING, *grad.shape)
    # drawn on the CPU: the same numbers whatever device the gradient is on
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], columns, generator=generator, dtype=torch.float32).to(grad)
    basis = _orthonormal(matrix @ sketch)
    for _ in range(RANDOM_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    core = basis.T @ matrix
    try:
        inner = torch.linalg.eigh(core @ core.T).eigenvectors[:, -rank:].flip(-1)
        basis = _orthonormal(basis @ inner)
    except LinAlgError:
        basis = basis[:, :rank]  # the iterations have put the largest directions first, nearly
    return _both(grad, side, _signed(basis), is_left=is_left)


def _both(grad: torch.Tensor, side: Side, basis: torch.Tensor, *, is_left: bool) -> _Pair:
    """The sides asked for, given the basis of one: the other is QR(G^T U) (or QR(G V)), in the same order."""
    have, want = (Side.LEFT, Side.RIGHT) if is_left else (Side.RIGHT, Side.LEFT)
    if side is have:
        return (basis, None) if is_left else (None, basis)
    other = _orthonormal(grad.T @ basis if is_left else grad @ basis)
    if side is want:
        other = _signed(other)
        return (None, other) if is_left else (other, None)
    return (basis, other) if is_left else (other, basis)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Q of the QR decomposition with a positive diagonal of R: of near-orthonormal columns, nearly themselves."""
    q, r = torch.linalg.qr(columns)
    return _flipped(q, r.diagonal() < 0)


def _signed(basis: torch.Tensor) -> torch.Tensor:
    """Columns turned so that the entry of largest magnitude is positive (the first of equals)."""
    peak = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return _flipped(basis, peak < 0)


def _flipped(columns: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    return torch.where(which, -columns, columns)
