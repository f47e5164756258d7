"""Newton-Schulz against singular value decompositions, Muon against a plain loop and against torch.optim.Muon."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import associative_memory
from memopt.errors import BadInput
from memopt.jobs.optimizer import build_optimizer
from memopt.optim import updates
from memopt.optim.muon import MuonSettings, Scale, direction, momentum_, scale
from memopt.optim.newton_schulz import Coefficients, orthogonalize, orthogonalize_each, polynomials, scratch_bytes
from memopt.optim.optimizer import Optimizer
from tests.reference.muon import polar_factor, run_muon, through_quintics

SHAPES = [(33, 33), (17, 60), (60, 17), (1, 9), (9, 1), (1, 1), (2, 3, 12, 20), (4, 20, 12)]
BANDS = {Coefficients.POLAR_EXPRESS: (0.84, 1.15), Coefficients.JORDAN: (0.68, 1.21)}
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 0.08}
"""Absolute, on entries of matrices of singular values near 1."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def each(stack: torch.Tensor) -> list[np.ndarray]:
    return list(stack.reshape(-1, *stack.shape[-2:]).float().numpy())


class PeakBytes(TorchDispatchMode):
    """Most bytes alive at once in storages that appeared while it was on."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known and key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.peak = max(self.peak, sum(self.alive.values()))


@pytest.mark.parametrize("coefficients", Coefficients)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_its_polynomials_on_the_singular_values(
    shape: tuple[int, ...], dtype: torch.dtype, coefficients: Coefficients
) -> None:
    matrix = random(*shape)
    got = orthogonalize(matrix, coefficients=coefficients, dtype=dtype)
    assert got.shape == matrix.shape and got.dtype == torch.float32
    for mine, source in zip(each(got), each(matrix), strict=True):
        np.testing.assert_allclose(mine, through_quintics(source, coefficients, 5), atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("coefficients", Coefficients)
@pytest.mark.parametrize("shape", [(40, 40), (24, 90), (90, 24), (3, 16, 40)])
def test_singular_values_end_in_the_stated_band_around_the_polar_factor(
    shape: tuple[int, ...], coefficients: Coefficients
) -> None:
    low, high = BANDS[coefficients]
    matrix = random(*shape, seed=1)
    got = orthogonalize(matrix, coefficients=coefficients)
    for mine, source in zip(each(got), each(matrix), strict=True):
        values = np.linalg.svd(source, compute_uv=False)
        assert values.min() > 2e-3 * np.linalg.norm(source), "a sample below what the bands are stated for"
        ours = np.linalg.svd(mine, compute_uv=False)
        assert low < ours.min() and ours.max() < high
        worst = max(1 - low, high - 1)
        assert np.linalg.norm(mine - polar_factor(source), 2) < worst


@pytest.mark.parametrize("coefficients", Coefficients)
def test_the_bands_hold_over_the_whole_range(coefficients: Coefficients) -> None:
    shares = np.geomspace(1e-3 if coefficients == Coefficients.POLAR_EXPRESS else 2e-3, 1, 200_001)
    x = shares / (1.02 if coefficients == Coefficients.POLAR_EXPRESS else 1)
    for a, b, c in polynomials(coefficients, 5):
        x = a * x + b * x**3 + c * x**5
    low, high = BANDS[coefficients]
    assert low < x.min() and x.max() < high


def test_more_steps_repeat_the_last_polynomial_and_settle_at_its_fixed_point() -> None:
    assert polynomials(Coefficients.POLAR_EXPRESS, 8)[5:] == [polynomials(Coefficients.POLAR_EXPRESS, 5)[-1]] * 3
    values = torch.linalg.svdvals(orthogonalize(random(20, 30), steps=30))
    torch.testing.assert_close(values, torch.full((20,), 1.0353), atol=2e-4, rtol=0)


def test_rank_deficient_matrices_keep_their_rank_and_their_directions() -> None:
    matrix = random(30, 4) @ random(4, 50, seed=1)
    got = orthogonalize(matrix)
    values = torch.linalg.svdvals(got)
    assert (values[4:] < 1e-3).all() and ((values[:4] > 0.84) & (values[:4] < 1.15)).all()
    assert np.linalg.norm(got.numpy() - polar_factor(matrix.numpy()), 2) < 0.16


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("coefficients", Coefficients)
def test_zeros_give_zeros_and_trouble_stays_in_its_own_matrix(dtype: torch.dtype, coefficients: Coefficients) -> None:
    stack = random(4, 6, 9)
    clean = orthogonalize(stack, coefficients=coefficients, dtype=dtype)
    stack[1] = 0
    stack[2, 3, 4] = torch.nan
    got = orthogonalize(stack, coefficients=coefficients, dtype=dtype)
    assert (got[1] == 0).all() and got[2].isnan().all()
    assert torch.equal(got[0], clean[0]) and torch.equal(got[3], clean[3])
    assert orthogonalize(torch.zeros(0, 5)).shape == (0, 5)
    assert orthogonalize(torch.full((3, 4), 1e-30)).abs().max() < 1e-15


def test_the_size_of_the_matrix_does_not_matter_and_the_input_stays() -> None:
    matrix = random(8, 12)
    before = matrix.clone()
    torch.testing.assert_close(orthogonalize(matrix * 1e6), orthogonalize(matrix * 1e-4))
    assert torch.equal(matrix, before)
    leaf = torch.nn.Parameter(matrix)
    assert not orthogonalize(leaf).requires_grad
    torch.testing.assert_close(orthogonalize(matrix.t().contiguous().t()), orthogonalize(matrix))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(40, 40), (24, 90), (90, 24), (16, 17)])
def test_scratch_bytes_is_what_is_alive_at_most(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random(5, *shape)
    with PeakBytes(matrix) as seen:
        orthogonalize(matrix, dtype=dtype)
    norms = 3 * 64
    assert 5 * scratch_bytes(*shape, dtype=dtype) <= seen.peak <= 5 * scratch_bytes(*shape, dtype=dtype) + norms


def test_a_stack_need_not_be_held_to_be_orthogonalised() -> None:
    matrices = [random(2, 7, 11, seed=seed) for seed in range(3)]
    got = orthogonalize_each(iter(matrices), count=3, shape=(2, 7, 11), device=torch.device("cpu"))
    assert torch.equal(got, orthogonalize(torch.stack(matrices)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps: Newton-Schulz needs at least 1, got 0"),
        ({"coefficients": "taylor"}, "coefficients: 'taylor' is not known.*polar_express, jordan"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        orthogonalize(random(3, 4), **arguments)


def test_vectors_are_refused_before_anything_moves() -> None:
    buffer = torch.zeros(4)
    with pytest.raises(BadInput, match=r"matrix: .* got float32 of shape \(4,\)"):
        direction(random(4), buffer, MuonSettings())
    with pytest.raises(BadInput, match="got int64"):
        orthogonalize(torch.ones(2, 2, dtype=torch.int64))
    assert (buffer == 0).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 1.0}, "momentum: .* got 1.0"),
        (
            {"scale": "rms"},
            "scale: 'rms' is not known to Muon; choose one of match_rms_adamw, original, spectral, none",
        ),
        ({"eps": 0.0}, "eps: must be above 0"),
        ({"dtype": torch.int8}, "dtype: torch.int8"),
        ({"steps": -1}, "steps: "),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        MuonSettings(**settings)


def test_scales() -> None:
    assert scale(64, 256, Scale.MATCH_RMS_ADAMW) == pytest.approx(3.2)
    assert scale(256, 64, Scale.ORIGINAL) == 2 and scale(64, 256, Scale.ORIGINAL) == 1
    assert scale(256, 64, Scale.SPECTRAL) == 2 and scale(64, 256, Scale.SPECTRAL) == 0.5
    assert scale(3, 5, Scale.NONE) == 1
    update = orthogonalize(random(96, 200)) * scale(96, 200, Scale.MATCH_RMS_ADAMW)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1), "the size of AdamW's updates"


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mode", Scale)
@pytest.mark.parametrize("coefficients", Coefficients)
def test_twenty_steps_equal_the_plain_loop(nesterov: bool, mode: Scale, coefficients: Coefficients) -> None:
    stack = random(3, 10, 21)
    grads = [random(3, 10, 21, seed=seed) for seed in range(1, 21)]
    weight, buffer = stack.clone(), torch.zeros_like(stack)
    settings = MuonSettings(nesterov=nesterov, scale=mode, coefficients=coefficients)
    for grad in grads:
        weight.mul_(1 - 0.02 * 0.1).sub_(direction(grad, buffer, settings), alpha=0.02)
    for i in range(3):
        expected, momentum = run_muon(
            stack[i].numpy(),
            [grad[i].numpy() for grad in grads],
            lr=0.02,
            weight_decay=0.1,
            momentum=0.95,
            nesterov=nesterov,
            scale=mode,
            coefficients=coefficients,
        )
        np.testing.assert_allclose(weight[i].numpy(), expected, atol=2e-5, rtol=0)
        np.testing.assert_allclose(buffer[i].numpy(), momentum, atol=1e-6, rtol=0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mode", [Scale.ORIGINAL, Scale.MATCH_RMS_ADAMW])
@pytest.mark.parametrize("shape", [(48, 48), (40, 96), (96, 40), (33, 65), (1, 9)])
def test_twenty_steps_equal_torch_bit_for_bit(shape: tuple[int, int], mode: Scale, nesterov: bool) -> None:
    theirs = torch.nn.Parameter(random(*shape))
    ours, buffer = theirs.detach().clone(), torch.zeros(shape)
    lr, decay = 0.02, 0.1
    optimizer = torch.optim.Muon([theirs], lr=lr, weight_decay=decay, nesterov=nesterov, adjust_lr_fn=mode.value)
    settings = MuonSettings(nesterov=nesterov, scale=Scale.NONE, coefficients=Coefficients.JORDAN, dtype=torch.bfloat16)
    for seed in range(1, 21):
        theirs.grad = random(*shape, seed=seed)
        optimizer.step()
        update = direction(theirs.grad, buffer, settings)
        ours.mul_(1 - lr * decay).add_(update, alpha=-lr * scale(*shape, mode))
    assert torch.equal(buffer, optimizer.state[theirs]["momentum_buffer"])
    assert torch.equal(ours, theirs.detach())


def test_without_nesterov_the_buffer_itself_is_the_update() -> None:
    buffer = torch.zeros(3, 4)
    assert momentum_(random(3, 4), buffer, momentum=0.9, nesterov=False) is buffer


class Matrices(torch.nn.Module):
    """Hidden matrices of a few shapes, stacks among them."""

    SHAPES = ((12, 20), (20, 12), (12, 20), (3, 12, 20), (12, 20), (2, 20, 12), (12, 20))

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(random(*shape, seed=seed) for seed, shape in enumerate(self.SHAPES))

    def steps(self, count: int, **options: Any) -> Optimizer:
        optimizer = build_optimizer(self, "muon", lr=0.1, overrides={"layers.*": "muon"}, **options)
        for step in range(count):
            for i, each in enumerate(self.layers):
                each.grad = random(*each.shape, seed=100 * step + i)
            optimizer.step()
        return optimizer


@pytest.mark.parametrize("limit_bytes", [1, 20_000])
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_how_matrices_are_batched_changes_no_bit_on_cpu(
    limit_bytes: int, state_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, apart = Matrices(), Matrices()
    whole = together.steps(3, state_dtype=state_dtype)
    monkeypatch.setattr(updates, "BATCH_BYTES", limit_bytes)
    cut = apart.steps(3, state_dtype=state_dtype)
    for mine, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(mine, other)
    states = [list(each.state_dict()["state"].values()) for each in (whole, cut)]
    for one, two in zip(*states, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one if isinstance(one[name], torch.Tensor))


def test_one_batch_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ParameterList(random(16, 24, seed=seed) for seed in range(24))
    optimizer = build_optimizer(model, "muon", lr=0.1, overrides={"layers.*": "muon"})
    monkeypatch.setattr(updates, "BATCH_BYTES", 3 * scratch_bytes(16, 24))
    peaks = []
    for _ in range(2):
        for each in model.parameters():
            each.grad = torch.ones_like(each)
        held = [t for each in model.parameters() for t in (each, each.grad)]
        held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        with PeakBytes(*held) as seen:
            optimizer.step()
        peaks.append(seen.peak)
    one, updated = 4 * 16 * 24, 2
    assert 3 * scratch_bytes(16, 24) < peaks[-1] <= 3 * scratch_bytes(16, 24) + (3 + updated) * one + 2048


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_on_cuda_as_on_cpu(dtype: torch.dtype | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    stack = random(4, 96, 160)
    got = orthogonalize(stack.cuda(), dtype=dtype).cpu()
    expected = orthogonalize(stack, dtype=dtype or torch.bfloat16)
    torch.testing.assert_close(got, expected, atol=0.05 if dtype is None else 2e-3, rtol=0)
    alone = torch.stack([orthogonalize(each.cuda(), dtype=dtype).cpu() for each in stack])
    torch.testing.assert_close(got, alone, atol=0.05 if dtype is None else 2e-3, rtol=0)


@pytest.mark.parametrize("coupled", [False, True])
def test_muon_learns_rare_facts_as_well_as_common_ones_where_others_do_not(coupled: bool) -> None:
    problem = associative_memory.problem(classes=99, coupled=coupled)
    worst = {
        name: associative_memory.worst_when_best_is(problem, update(problem.gradient), 1 - 0.1)
        for name, update in associative_memory.UPDATES.items()
    }
    assert worst["Muon"] > 0.85 and math.isclose(worst["Muon, exact SVD"], 0.896, abs_tol=2e-3)
    assert worst["GD"] < 0.02
    assert worst["SignGD"] < 0.1 if coupled else worst["SignGD"] > 0.899
