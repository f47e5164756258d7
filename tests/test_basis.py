"""Bases of gradients against singular vectors in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from memopt.errors import BadInput
from memopt.optim import basis
from memopt.optim.basis import Bases, Method, Side, bases_of
from tests.galore_helpers import SHAPES, angle, assert_orthonormal, draw, spectrum

METHODS = get_args(Method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("shape", SHAPES)
def test_basis_spans_the_largest_singular_directions(shape: tuple[int, ...], side: Side, method: Method) -> None:
    rank = max(1, min(shape[-2:]) // 4)
    grad = spectrum(*shape, falls=0.5)
    u, _, vh = torch.linalg.svd(grad.double())
    exact = Bases(u[..., :rank], vh[..., :rank, :].mT)
    # power is one step of a tracker: it starts near, and must come nearer
    start = Bases(*(torch.linalg.qr(b.float() + 0.02 * draw(*b.shape, seed=3)).Q for b in exact))
    found = bases_of(grad, side=side, rank=rank, method=method, previous=start, seed=1)
    assert (found.left is None) == (side is Side.RIGHT)
    assert (found.right is None) == (side is Side.LEFT)
    tolerance = {"gram": 2e-3, "svd": 1e-4, "random": 2e-3, "power": 2e-2}[method]
    for made, wanted, began in zip(found, exact, start, strict=True):
        if made is not None:
            assert made.shape == wanted.shape and made.dtype == torch.float32
            assert_orthonormal(made)
            assert angle(made, wanted) <= min(tolerance, angle(began, wanted) if method == "power" else 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_a_basis_keeps_nearly_as_much_of_the_gradient_as_the_best_one(shape: tuple[int, int], method: Method) -> None:
    grad = spectrum(*shape, falls=0.9)
    rank = 6
    best = float(torch.linalg.svdvals(grad)[rank:].norm())
    for side in (Side.LEFT, Side.RIGHT):
        left, right = bases_of(grad, side=side, rank=rank, method=method)
        kept = grad if left is None else left @ left.T @ grad
        kept = kept if right is None else kept @ right @ right.T
        assert float((grad - kept).norm()) <= best * (1.03 if method == "random" else 1.00001)


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_of_full_belong_together(method: Method) -> None:
    grad = spectrum(20, 30, falls=0.5)
    left, right = bases_of(grad, side=Side.FULL, rank=4, method=method)
    assert left is not None and right is not None
    low = left.T @ grad @ right
    torch.testing.assert_close(low.diagonal(), 0.5 ** torch.arange(4.0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", list(Side))
def test_bases_hold_no_more_than_they_need(side: Side, method: Method) -> None:
    # galore-torch keeps a view of the whole factor of the SVD: 16,384 elements instead of 2,048 for (256, 128), rank 16
    found = bases_of(draw(2, 40, 56), side=side, rank=3, method=method)
    for made, size in zip(found, (40, 56), strict=True):
        assert made is None or made.untyped_storage().nbytes() == 4 * 2 * 3 * size


@pytest.mark.parametrize("method", METHODS)
def test_bases_are_deterministic_and_the_same_in_any_batch(method: Method) -> None:
    grad, previous = draw(3, 12, 20), Bases(torch.linalg.qr(draw(3, 12, 5, seed=2)).Q, None)
    together = bases_of(grad, side=Side.LEFT, rank=5, method=method, previous=previous, seed=7).left
    again = bases_of(grad, side=Side.LEFT, rank=5, method=method, previous=previous, seed=7).left
    assert together is not None and again is not None
    assert torch.equal(together, again)
    for i in range(3):
        alone = Bases(previous.left[i], None)  # type: ignore[index]
        one = bases_of(grad[i], side=Side.LEFT, rank=5, method=method, previous=alone, seed=7).left
        assert one is not None and torch.equal(one, together[i])


@pytest.mark.parametrize("method", ["gram", "random"])
@pytest.mark.parametrize("side", list(Side))
def test_signs_do_not_depend_on_the_sign_of_the_gradient(side: Side, method: Method) -> None:
    grad = draw(12, 20)
    plus, minus = (bases_of(g, side=side, rank=4, method=method) for g in (grad, -grad))
    one, other = (b.left if b.left is not None else b.right for b in (plus, minus))
    assert one is not None and other is not None
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert bool((one.gather(0, one.abs().argmax(0, keepdim=True)) > 0).all())


def test_random_follows_its_seed() -> None:
    grad = draw(30, 40)
    one, same, other = (bases_of(grad, side=Side.LEFT, rank=4, method="random", seed=s).left for s in (1, 1, 2))
    assert one is not None and same is not None and other is not None
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_the_size_of_the_gradient_does_not_matter(size: float, method: Method) -> None:
    grad = spectrum(10, 16, falls=0.5)
    left, _ = bases_of(grad * size, side=Side.LEFT, rank=3, method=method)
    expected = torch.linalg.svd(grad.double()).U[:, :3]
    assert left is not None and angle(left, expected) < 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", list(Side))
def test_a_gradient_of_zeros_or_of_low_rank_still_gets_an_orthonormal_basis(side: Side, method: Method) -> None:
    one = torch.outer(draw(9), draw(14, seed=1))
    for grad in (torch.zeros(9, 14), one):
        for made in bases_of(grad, side=side, rank=4, method=method):
            assert made is None or made.isfinite().all()
            if made is not None:
                assert_orthonormal(made)
    kept = torch.linalg.qr(draw(9, 4)).Q
    left = bases_of(torch.zeros(9, 14), side=Side.LEFT, rank=4, method=method, previous=Bases(kept, None)).left
    assert left is not None and torch.equal(left, kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_is_named_as_such(method: Method, bad: float) -> None:
    grad = draw(5, 7)
    grad[2, 3] = bad
    with pytest.raises(BadInput, match="NaN or Inf"):
        bases_of(grad, side=Side.LEFT, rank=2, method=method)


def test_a_rank_outside_the_matrix_is_named() -> None:
    for rank in (0, 6):
        with pytest.raises(BadInput, match=rf"rank: {rank} is outside 1\.\.5 for a gradient of shape \(5, 7\)"):
            bases_of(draw(5, 7), side=Side.LEFT, rank=rank)


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("failures", [1, 2, 3, 4])
def test_what_does_not_converge_is_tried_in_other_ways(
    monkeypatch: pytest.MonkeyPatch, method: Method, failures: int
) -> None:
    left = failures
    found = []

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def decompose(matrix: torch.Tensor, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            found.append((original.__name__, matrix.dtype))
            if left >= 0:
                raise basis.LinAlgError("did not converge")
            return original(matrix, **keywords)

        return decompose

    grad = spectrum(20, 14, falls=0.5)
    exact = torch.linalg.svd(grad.double()).Vh[:3].T
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh))
    monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd))
    right = bases_of(grad, side=Side.RIGHT, rank=3, method=method).right
    # without any eigenvectors, random's columns are not turned to the largest directions
    unturned = failures == 4 or (method == "gram" and failures == 3)
    assert right is not None and angle(right, exact) < (3e-2 if unturned else 1e-3)
    ways = [("linalg_svd", torch.float32)] * (method == "svd") + [
        ("linalg_eigh", torch.float32),
        ("linalg_eigh", torch.float64),
        ("linalg_eigh", torch.float32),
    ]
    assert found == ways[: failures + 1]


def test_a_basis_that_is_not_finite_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def eigh(matrix: torch.Tensor) -> Any:
        found = real(matrix)
        return found if matrix.dtype == torch.float64 else type(found)((found[0], found[1] * math.nan))

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    left = bases_of(draw(6, 9), side=Side.LEFT, rank=2).left
    assert left is not None and bool(left.isfinite().all())
