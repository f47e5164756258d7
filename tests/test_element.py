"""Element-wise rules: every path against the reference loop, at odd shapes, and the paths against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pytest
import torch

from memopt.optim import element, native
from memopt.optim.codecs import Codec, allocate, storable
from memopt.optim.element import SLOTS, Hyper, Stored, Task, plain_step_, step_
from tests.offload_helpers import one_thread  # noqa: F401
from tests.reference import rules as reference

HYPER = Hyper(lr=1e-2, weight_decay=0.1, beta1=0.85, beta2=0.97, eps=1e-6, momentum=0.9, nesterov=False)
SHAPES = [(1,), (7,), (3, 5), (1, 300), (65, 130), (2, 9, 257)]
STEPS = 6


class Reference(Protocol):
    def step(self, weights: list[float], grads: list[float]) -> list[float]: ...


def reference_of(rule: str, hyper: Hyper) -> Reference:
    if rule == "adamw":
        return reference.AdamW(hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)
    if rule == "lion":
        return reference.Lion(hyper.lr, hyper.beta1, hyper.beta2, hyper.weight_decay)
    return reference.Sgd(hyper.lr, hyper.momentum, hyper.nesterov, hyper.weight_decay)


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fresh(rule: str, codec: Codec, shape: tuple[int, ...]) -> tuple[Stored, ...]:
    codec = storable(codec, shape)
    return tuple(Stored(codec, *allocate(codec, shape, device="cpu"), slot.signed) for slot in SLOTS[rule])


def run(
    rule: str,
    codec: Codec,
    shape: tuple[int, ...],
    step: Callable[[Task], None],
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = STEPS,
) -> torch.Tensor:
    weights, states = drawn(shape, 0, dtype), fresh(rule, codec, shape)
    for number in range(1, steps + 1):
        step(Task(weights=weights, grad=drawn(shape, number, dtype), states=states, step=number, name="w"))
    return weights


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("way", ["plain", "chosen"])
def test_float32_states_are_the_reference(rule: str, nesterov: bool, shape: tuple[int, ...], way: str) -> None:
    hyper = Hyper(**{**HYPER.__dict__, "nesterov": nesterov})
    slow = reference_of(rule, hyper)
    expected = drawn(shape, 0).double().flatten().tolist()
    for number in range(1, STEPS + 1):
        expected = slow.step(expected, drawn(shape, number).double().flatten().tolist())
    function: Callable[[Task], None] = {
        "plain": lambda task: plain_step_(rule, hyper, task),
        "chosen": lambda task: step_(rule, hyper, [task]),
    }[way]
    got = run(rule, Codec.FP32, shape, function)
    torch.testing.assert_close(got.flatten().double(), torch.tensor(expected).double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("rule", "codec"),
    [
        (rule, codec)
        for rule in ("adamw", "lion", "sgd")
        for codec in (Codec.FP32, Codec.INT8, Codec.INT8_LINEAR)  # of bfloat16 the random bits go by the pieces
        if (rule, codec) != ("adamw", Codec.INT8_LINEAR)  # refused by Policy: second moments do not fit equal steps
    ],
)
def test_how_a_tensor_is_cut_changes_no_bit(rule: str, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (40, 700)
    whole = run(rule, codec, shape, lambda task: plain_step_(rule, HYPER, task))
    for chunk in (256, 512, 5000):
        monkeypatch.setattr(element, "CHUNK", chunk)
        assert torch.equal(run(rule, codec, shape, lambda task: plain_step_(rule, HYPER, task)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_the_kernel_does_what_the_plain_path_does(rule: str, dtype: torch.dtype) -> None:
    if not native.available():
        pytest.skip(native.why_not())
    shape = (33, 300)
    plain = run(rule, Codec.INT8, shape, lambda task: plain_step_(rule, HYPER, task), dtype=dtype)
    kernel = run(rule, Codec.INT8, shape, lambda task: step_(rule, HYPER, [task]), dtype=dtype)
    moved = (plain - drawn(shape, 0, dtype)).float().norm()
    assert (plain - kernel).float().norm() < 1e-2 * moved


@pytest.mark.parametrize(
    ("rule", "codec", "within"),
    [
        ("adamw", Codec.BF16, 0.02),
        ("adamw", Codec.INT8, 0.06),
        ("sgd", Codec.BF16, 0.02),
        ("sgd", Codec.INT8, 0.06),
        ("sgd", Codec.INT8_LINEAR, 0.06),
    ],
)
def test_compact_states_stay_near_exact_ones(rule: str, codec: Codec, within: float) -> None:
    shape = (64, 512)
    exact = run(rule, Codec.FP32, shape, lambda task: step_(rule, HYPER, [task]), steps=20)
    compact = run(rule, codec, shape, lambda task: step_(rule, HYPER, [task]), steps=20)
    moved = (exact - drawn(shape, 0)).norm()
    assert (exact - compact).norm() < within * moved


def test_bfloat16_second_moments_do_not_stand_still() -> None:
    # with rounding to nearest, 1 - beta2 = 0.001 is below half an ulp and v would never move
    hyper = Hyper(lr=0.0, beta2=0.999)
    states = fresh("adamw", Codec.BF16, (64, 64))
    weights, grad = torch.zeros(64, 64), torch.ones(64, 64)
    for number in range(1, 301):
        step_("adamw", hyper, [Task(weights=weights, grad=grad, states=states, step=number, name="w")])
    assert states[1].load().mean().item() == pytest.approx(1 - 0.999**300, rel=0.02)


def test_many_tensors_are_one_call_each() -> None:
    alone, together = [], []
    for shape in ((70, 80), (65, 300), (5,)):
        alone.append(run("adamw", Codec.INT8, shape, lambda task: step_("adamw", HYPER, [task]), steps=1))
        together.append(
            Task(weights=drawn(shape, 0), grad=drawn(shape, 1), states=fresh("adamw", Codec.INT8, shape), step=1)
        )
    step_("adamw", HYPER, together)
    for a, task in zip(alone, together, strict=True):
        assert torch.equal(a, task.weights)


def test_empty_tensors_are_left_alone() -> None:
    states = fresh("adamw", Codec.FP32, (0, 8))
    step_("adamw", HYPER, [Task(weights=torch.zeros(0, 8), grad=torch.zeros(0, 8), states=states, step=1)])
