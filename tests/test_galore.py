"""Projection, its state, rotation, residual and adaptive gap against slow references."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from memopt.errors import BadInput
from memopt.optim import rules
from memopt.optim.basis import Method, Side, bases_of
from memopt.optim.parts import Part
from memopt.optim.projection import (
    GAMMA,
    MAX_GAP_FACTOR,
    ORIGINAL,
    GaLore,
    ProjType,
    Rotation,
    back_add_,
    fits,
    low_rank_shape,
    project,
    refresh_,
    residual,
    rotate_first,
    rotate_second,
    shape_of,
    similarity,
    state_shapes,
)
from memopt.optim.roles import Role
from tests.galore_helpers import SHAPES, assert_orthonormal, draw, spectrum
from tests.reference import galore as reference

METHODS = get_args(Method)
PROJ_TYPES = get_args(ProjType)


def columns(state: dict[str, Any], name: str) -> torch.Tensor:
    """A float32 basis of a state."""
    rows: torch.Tensor = state[name]
    return rows.mT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: 0 is not a whole number of 1 or more"),
        ({"rank": -4}, "rank: -4"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"update_proj_gap": 0}, "update_proj_gap: 0"),
        ({"seed": -1}, "seed: -1 is not a whole number of 0 or more"),
        ({"scale": 0.0}, "scale: 0.0 is not a positive number"),
        ({"scale": math.nan}, "scale: nan"),
        ({"proj_type": "both"}, "proj_type: 'both' is unknown; choose from std, reverse_std, left, right, full"),
        ({"basis": "qr"}, "basis: 'qr' is unknown; choose from gram, svd, power, random"),
        ({"basis_dtype": "int4"}, "basis_dtype: 'int4' is unknown; choose from float32, bfloat16, int8"),
        ({"residual": "apollo"}, "residual: 'apollo' is unknown; choose from None, fira"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        GaLore(**settings)
    assert message in str(error.value)


def test_a_rank_too_large_for_a_matrix_is_told_and_one_below_works() -> None:
    assert (
        fits(GaLore(rank=64), 64, 256) == "rank 64 is not below the shorter side of 64 x 256: full rank, no projection"
    )
    assert fits(GaLore(rank=63), 64, 256) is None
    assert fits(GaLore(rank=8), 256, 8) is not None
    # galore-torch crashes on reverse_std, wide, when the rank reaches the shorter side
    for proj_type in PROJ_TYPES:
        config = GaLore(rank=7, proj_type=proj_type)
        assert fits(config, 8, 20) is None
        grad, state = draw(8, 20), {}
        refresh_(config, state, grad, 1)
        assert tuple(project(config, state, grad).shape) == shape_of(config, 8, 20)


def sides_of(proj_type: str, m: int, n: int) -> tuple[bool, bool]:
    return reference.sides(proj_type, tall=m >= n)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if min(s[-2:]) > 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_project_and_back_are_the_products_with_the_bases(shape: tuple[int, ...], proj_type: Any, dtype: Any) -> None:
    config = GaLore(rank=2, proj_type=proj_type, basis_dtype=dtype)
    *batch, m, n = shape
    state: dict[str, Any] = {}
    grad, weights = draw(*shape), draw(*shape, seed=1)
    assert refresh_(config, state, grad, 1) is None
    left, right = sides_of(proj_type, m, n)
    assert ("left" in state, "right" in state) == (left, right)
    low = project(config, state, grad)
    assert tuple(low.shape) == low_rank_shape(config, shape) == (*batch, *shape_of(config, m, n))
    to = grad.double()
    to = state["left"].double() @ to if left else to
    to = to @ state["right"].double().mT if right else to
    torch.testing.assert_close(low, to.float(), rtol=1e-5, atol=1e-5)
    back = to
    back = state["left"].double().mT @ back if left else back
    back = back @ state["right"].double() if right else back
    expected = (0.9 * weights.double() - 0.3 * back).float()
    for strided in (False, True):
        target = weights.mT.contiguous().mT if strided else weights.clone()
        back_add_(config, target, low, state, beta=0.9, alpha=-0.3)
        torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)


def test_weights_that_cannot_be_flattened_are_updated_in_place() -> None:
    config, grad = GaLore(rank=3), draw(2, 3, 9, 7)
    state: dict[str, Any] = {}
    refresh_(config, state, grad, 1)
    low = project(config, state, grad)
    base = torch.zeros(3, 2, 9, 14)
    view = base.transpose(0, 1)[..., ::2]
    back_add_(config, view, low, state, beta=1, alpha=1)
    expected = torch.zeros(2, 3, 9, 7)
    back_add_(config, expected, low, state, beta=1, alpha=1)
    torch.testing.assert_close(view, expected)
    assert not base[..., 1::2].any()


def test_a_convolution_is_projected_as_a_matrix() -> None:
    # galore-torch needs tensorly for these, and fails with up to two output channels
    for shape in ((16, 4, 3, 3), (2, 8, 3, 3), (12, 5, 3, 3, 3)):
        grad = Part(role=Role.CONV).view(draw(*shape))
        config = GaLore(rank=1, basis="gram")
        state: dict[str, Any] = {}
        refresh_(config, state, grad, 1)
        low = project(config, state, grad)
        back = torch.zeros_like(grad)
        back_add_(config, back, low, state, beta=0, alpha=1)
        best = torch.linalg.svdvals(grad.flatten(0, -3)[0])
        torch.testing.assert_close(float((grad - back).norm()), float(best[1:].norm()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_predicted_bytes_are_those_of_the_storage(batch: tuple[int, ...], proj_type: Any, dtype: Any) -> None:
    config = GaLore(rank=20, proj_type=proj_type, basis_dtype=dtype, residual="fira", adaptive=True)
    m, n = 300, 520
    state: dict[str, Any] = {}
    refresh_(config, state, draw(*batch, m, n), 1)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    expected = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert state_shapes(config, m, n, batch=batch) == expected
    assert all(t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in tensors.values())
    assert {type(v) for name, v in state.items() if name not in tensors} == {int}
    if dtype == "int8":
        left, right = sides_of(proj_type, m, n)
        assert ("left_scale" in state, "right_scale" in state) == (left, right)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_stored_bases_are_near_the_exact_ones(dtype: Any, error: float) -> None:
    grad = spectrum(120, 90, falls=0.9)
    exact: dict[str, Any] = {}
    near: dict[str, Any] = {}
    config = GaLore(rank=48)
    refresh_(config, exact, grad, 1)
    refresh_(replace(config, basis_dtype=dtype), near, grad, 1)
    assert near["right"].dtype == {"bfloat16": torch.bfloat16, "int8": torch.int8}[dtype]
    low, wanted = project(config, near, grad), project(config, exact, grad)
    assert float((low - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (10, 10)])
def test_original_mode_is_galore_torch_step_by_step(shape: tuple[int, int], proj_type: Any) -> None:
    # eps far above rounding: projected from both sides, a fresh gradient is diagonal but for its last bits, which a
    # small eps would divide into updates of full size
    lr, beta1, beta2, eps, steps = 0.02, 0.9, 0.999, 1e-2, 50
    config = replace(ORIGINAL, rank=4, update_proj_gap=12, scale=0.5, proj_type=proj_type)
    inputs, target, start = draw(64, shape[0]), draw(64, shape[1], seed=1), draw(*shape, seed=2)

    def gradient(weights: torch.Tensor, made: int) -> torch.Tensor:
        rows = torch.arange(made, made + 16) % 64  # another mini-batch every step
        return inputs[rows].T @ (inputs[rows] @ weights - target[rows]) / 16

    history = reference.train(
        start,
        gradient,
        steps=steps,
        rank=4,
        gap=12,
        scale=0.5,
        proj_type=proj_type,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
    )
    weights = start.clone()
    state: dict[str, Any] = {}
    moments = [torch.zeros(shape_of(config, *shape)) for _ in range(2)]
    for step, (before, expected) in enumerate(zip([start, *history], history, strict=False), start=1):
        # at the reference's weights: a difference in the last bits must not grow through the next SVDs
        grad = gradient(before, step - 1)
        assert refresh_(config, state, grad, step) is None
        low = project(config, state, grad)
        corrected = eps / math.sqrt(1 - beta2**step)
        d = rules.adamw(low, moments[0], moments[1], step=step, beta1=beta1, beta2=beta2, eps=corrected)
        back_add_(config, weights, d, state, beta=1, alpha=-lr * config.scale)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=2e-6)
    assert float((weights - start).norm()) > 0.5


def test_a_gradient_that_is_not_finite_leaves_the_state_alone() -> None:
    config = GaLore(rank=2, update_proj_gap=1)
    bad = draw(5, 7)
    bad[2, 3] = math.nan
    state: dict[str, Any] = {}
    with pytest.raises(BadInput, match="NaN or Inf"):
        refresh_(config, state, bad, 1)
    assert state == {}
    refresh_(config, state, draw(5, 7), 1)
    before = state["left"].clone()
    with pytest.raises(BadInput, match="NaN or Inf"):
        refresh_(config, state, bad, 2)
    assert torch.equal(state["left"], before) and state["next_refresh"] == 2


def test_the_gap_is_counted_from_the_first_step() -> None:
    config = GaLore(rank=2, update_proj_gap=4)
    state: dict[str, Any] = {}
    changed = []
    for step in range(1, 14):
        before = state["right"].clone() if state else None
        refresh_(config, state, draw(9, 6, seed=step), step)
        if before is None or not torch.equal(before, state["right"]):
            changed.append(step)
    assert changed == [1, 5, 9, 13]


def test_a_gradient_of_zeros_is_no_reason_to_choose_a_subspace() -> None:
    # an expert nothing was routed to, or LoRA's A while B is zero
    config = GaLore(rank=2, update_proj_gap=4)
    state: dict[str, Any] = {}
    zeros = torch.zeros(9, 6)
    refresh_(config, state, zeros, 1)
    assert_orthonormal(columns(state, "right"))
    refresh_(config, state, draw(9, 6), 2)
    right = bases_of(draw(9, 6), side=Side.RIGHT, rank=2).right
    assert right is not None
    torch.testing.assert_close(columns(state, "right"), right)
    for step in (3, 4):
        refresh_(config, state, draw(9, 6, seed=step), step)
    torch.testing.assert_close(columns(state, "right"), right)
    assert refresh_(config, state, zeros, 5) is None
    torch.testing.assert_close(columns(state, "right"), right)
    assert refresh_(config, state, draw(9, 6, seed=6), 6) is not None
    assert state["next_refresh"] == 9


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_adaptive_gap_doubles_while_the_subspace_stays_and_ends_somewhere(proj_type: Any) -> None:
    config = GaLore(rank=2, update_proj_gap=3, adaptive=True, rotate=False, proj_type=proj_type)
    state: dict[str, Any] = {}
    steady = spectrum(12, 20, falls=0.3)
    looked = []
    for step in range(1, 300):
        due = step == 1 or step == state["next_refresh"]
        assert refresh_(config, state, steady, step) is None
        if due:
            looked.append(state["gap"])
    assert looked[:6] == [3, 6, 12, 24, 48, 48] and set(looked[5:]) == {3 * MAX_GAP_FACTOR}
    refresh_(config, state, spectrum(12, 20, falls=0.3, seed=5), state["next_refresh"])
    assert state["gap"] == 3


def test_similarity_does_not_depend_on_the_choice_of_vectors() -> None:
    q = torch.linalg.qr(draw(10, 10)).Q
    old, mixed = q[:, :3], q[:, :3] @ torch.linalg.qr(draw(3, 3, seed=1)).Q
    assert similarity(Rotation(mixed.T @ old, None), (10, 99)) == pytest.approx(1.0, abs=1e-5)
    assert similarity(Rotation(q[:, 3:6].T @ old, None), (10, 99)) == pytest.approx(-(3 / 10) / (7 / 10), abs=1e-5)
    chance = [
        similarity(Rotation(torch.linalg.qr(draw(40, 20, seed=s)).Q[:20].T @ torch.eye(20), None), (40, 1))
        for s in range(40)
    ]
    assert sum(chance) / len(chance) == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (2, 9, 11)])
def test_nothing_turns_when_the_subspace_stays(shape: tuple[int, ...], proj_type: Any) -> None:
    config = GaLore(rank=3, update_proj_gap=1, proj_type=proj_type)
    state: dict[str, Any] = {}
    grad = draw(*shape)
    refresh_(config, state, grad, 1)
    rotation = refresh_(config, state, grad, 2)
    assert rotation is not None
    low = (*shape[:-2], *shape_of(config, *shape[-2:]))
    m, v = draw(*low), draw(*low, seed=1).square() + draw(*low).square()
    torch.testing.assert_close(rotate_first(m, rotation), m, rtol=1e-5, atol=1e-5)
    turned = rotate_second(v, m, rotation, beta1=0.9, beta2=0.999, step=2)
    torch.testing.assert_close(turned, v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (2, 9, 11)])
def test_a_momentum_in_a_subspace_that_the_new_one_contains_stays_the_same_matrix(
    shape: tuple[int, ...], proj_type: Any
) -> None:
    config = GaLore(rank=4, update_proj_gap=1, proj_type=proj_type)
    state: dict[str, Any] = {}
    # rank 2 of 4: the momentum fills half of the old subspace, and the new gradient keeps that half and adds another
    u, s, vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    first = 9 * u[..., :2] @ vh[..., :2, :]
    refresh_(config, state, first + u[..., 2:4] @ vh[..., 2:4, :], 1)
    m = project(config, state, first)
    before, after = torch.zeros(shape), torch.zeros(shape)
    back_add_(config, before, m, state, beta=0, alpha=1)
    rotation = refresh_(config, state, first + u[..., 4:6] @ vh[..., 4:6, :], 2)
    assert rotation is not None
    back_add_(config, after, rotate_first(m, rotation), state, beta=0, alpha=1)
    torch.testing.assert_close(before, first, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after, first, rtol=1e-3, atol=1e-4)


def test_the_second_moment_turns_as_ldadam_writes_it() -> None:
    turn = draw(4, 4) / 2
    m, v = draw(4, 6, seed=1), draw(4, 6, seed=2).square() / 50
    expected = reference.rotated_second(v, m, turn, beta1=0.9, beta2=0.99, made=7)
    hyper = {"beta1": 0.9, "beta2": 0.99, "step": 8}
    left = rotate_second(v, m, Rotation(turn, None), **hyper)  # type: ignore[arg-type]
    right = rotate_second(v.T, m.T, Rotation(None, turn), **hyper)  # type: ignore[arg-type]
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right, expected.T, rtol=1e-4, atol=1e-5)
    assert bool((left >= 0).all())
    # both sides: the same, on pairs of coordinates
    other = draw(6, 6, seed=3) / 2
    both = rotate_second(v, m, Rotation(turn, other), **hyper)  # type: ignore[arg-type]
    pairs = reference.rotated_second(
        v.reshape(-1, 1), m.reshape(-1, 1), torch.kron(turn, other), beta1=0.9, beta2=0.99, made=7
    )
    torch.testing.assert_close(both, pairs.view(4, 6), rtol=1e-4, atol=1e-5)


def test_turned_moments_are_those_of_gradients_projected_on_the_new_subspace() -> None:
    # gradients inside the old subspace, uncorrelated coordinates: LDAdam's formula is then exact in expectation
    old = torch.linalg.qr(draw(12, 4)).Q
    new = old @ torch.linalg.qr(draw(4, 4, seed=1)).Q
    scales = torch.tensor([4.0, 2.0, 1.0, 0.5])[:, None]
    samples = draw(20_000, 4, 1, seed=2) * scales + 1.0
    m, v = samples.mean(0), samples.square().mean(0)
    turned = (new.T @ old) @ samples
    steps = 10**9  # no bias left
    rotation = Rotation(new.T @ old, None)
    found = rotate_second(v, m, rotation, beta1=0.9, beta2=0.999, step=steps)
    torch.testing.assert_close(rotate_first(m, rotation), turned.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, turned.square().mean(0), rtol=0.03, atol=0.03)


def test_rotate_off_leaves_the_moments() -> None:
    config = GaLore(rank=3, update_proj_gap=1, rotate=False)
    state: dict[str, Any] = {}
    assert refresh_(config, state, draw(9, 6), 1) is None
    assert refresh_(config, state, draw(9, 6, seed=1), 2) is None


def test_fira_is_the_slow_one_column_by_column() -> None:
    config = GaLore(rank=3, residual="fira", update_proj_gap=100)
    m, n = 8, 12
    state: dict[str, Any] = {}
    tall: dict[str, Any] = {}
    last: float | None = None
    limited = 0
    for step in range(1, 9):
        grad = draw(m, n, seed=step) * (4.0 if step in (3, 6) else 1.0)
        for each, one in ((state, grad), (tall, grad.T)):
            refresh_(config, each, one, step)
        low = project(config, state, grad)
        d = low.sign() * draw(3, n, seed=50 + step).abs()
        expected, norm = reference.fira_residual(grad, columns(state, "left"), d, last)
        limited += last is not None and norm == pytest.approx(1.01 * last)
        last = norm
        found = residual(config, state, grad, low, d)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert float(state["residual_norm"]) == pytest.approx(norm, rel=1e-4)
        mirrored = residual(config, tall, grad.T, project(config, tall, grad.T), d.T)
        torch.testing.assert_close(mirrored, expected.T, rtol=1e-3, atol=1e-4)
    assert 2 <= limited < 8 and GAMMA == 1.01


def test_fira_of_a_batch_is_that_of_each_matrix() -> None:
    for proj_type in PROJ_TYPES:
        config = GaLore(rank=3, residual="fira", proj_type=proj_type)
        state: dict[str, Any] = {}
        alone: list[dict[str, Any]] = [{}, {}]
        for step in (1, 2):
            grad = draw(2, 8, 12, seed=step) * torch.tensor([1.0, float(step * 3)])[:, None, None]
            refresh_(config, state, grad, step)
            low = project(config, state, grad)
            found = residual(config, state, grad, low, low.sign())
            assert state["residual_norm"].shape == (2,)
            for i in range(2):
                refresh_(config, alone[i], grad[i], step)
                one = residual(config, alone[i], grad[i], project(config, alone[i], grad[i]), low[i].sign())
                torch.testing.assert_close(found[i], one, rtol=1e-4, atol=1e-5)


def test_full_scales_the_residual_of_the_whole_matrix_by_one_factor() -> None:
    config = GaLore(rank=3, residual="fira", proj_type="full")
    state: dict[str, Any] = {}
    grad = draw(8, 12)
    refresh_(config, state, grad, 1)
    low = project(config, state, grad)
    outside = grad.clone()
    back_add_(config, outside, low, state, beta=1, alpha=-1)
    torch.testing.assert_close(residual(config, state, grad, low, 3 * low), 3 * outside, rtol=1e-4, atol=1e-5)


def test_fira_survives_gradients_of_zeros() -> None:
    config = GaLore(rank=2, residual="fira")
    state: dict[str, Any] = {}
    for step, factor in enumerate((0.0, 1.0, 0.0, 1.0), start=1):
        grad = draw(6, 9, seed=step) * factor
        refresh_(config, state, grad, step)
        low = project(config, state, grad)
        found = residual(config, state, grad, low, torch.ones_like(low))
        assert bool(found.isfinite().all())
        # zeros do not forbid what comes after them
        assert (float(found.norm()) > 0.5) == (factor > 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_saved_state_continues_bit_for_bit_in_the_middle_of_a_gap(dtype: Any, method: Method) -> None:
    config = GaLore(
        rank=16, update_proj_gap=3, basis=method, basis_dtype=dtype, residual="fira", adaptive=True, proj_type="full"
    )

    def steps(weights: torch.Tensor, state: dict[str, Any], numbers: range) -> torch.Tensor:
        for step in numbers:
            grad = draw(64, 96, seed=step // 2) + 0.1 * weights
            rotation = refresh_(config, state, grad, step, seed_key=11)
            low = project(config, state, grad)
            m = state.setdefault("exp_avg", torch.zeros_like(low))
            m = m if rotation is None else rotate_first(m, rotation)
            state["exp_avg"] = m = m.lerp(low, 0.1)
            rest = residual(config, state, grad, low, m)
            back_add_(config, weights, m, state, beta=0.99, alpha=-0.1)
            weights.sub_(rest, alpha=0.1)
        return weights

    whole = steps(torch.zeros(64, 96), {}, range(1, 12))
    state: dict[str, Any] = {}
    weights = steps(torch.zeros(64, 96), state, range(1, 6))
    file = io.BytesIO()
    torch.save((weights, state), file)
    file.seek(0)
    weights, loaded = torch.load(file, weights_only=True)
    assert torch.equal(steps(weights, loaded, range(6, 12)), whole)
