"""bitsandbytes' public 8-bit step, as it is called for GPUs, against our own; its CPU path takes the same arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from memopt.optim.codecs import Codec, allocate
from memopt.optim.element import SLOTS, Hyper, Stored, Task, plain_step_
from memopt.optim.rules import Slot
from tests.offload_helpers import one_thread  # noqa: F401

bnb_kernels = pytest.importorskip("memopt.patches.bnb_kernels")
pytest.importorskip("bitsandbytes")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def task_of(rule: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Task:
    generator = torch.Generator().manual_seed(5)
    weights, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))

    def made(slot: Slot) -> Stored:
        return Stored(Codec.INT8, *allocate(Codec.INT8, shape, device=device), slot.signed)

    return Task(weights=weights, grad=grad, states=tuple(made(slot) for slot in SLOTS[rule]), step=1, name="w")


def again(task: Task, step: int) -> Task:
    grad = torch.randn(task.grad.shape, generator=torch.Generator().manual_seed(step)).to(task.grad)
    return Task(weights=task.weights, grad=grad, states=task.states, step=step, name=task.name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_each_of_twenty_steps_is_within_one_code(rule: str, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    kernels = bnb_kernels.BitsAndBytes()
    hyper = Hyper(lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.99)
    theirs = task_of(rule, (24, 512), dtype, device)
    assert kernels.takes(rule, theirs)
    for step in range(1, 21):
        theirs = again(theirs, step)
        ours = copy.deepcopy(theirs)  # from the same state every time: a code's difference would grow with the steps
        kernels.step_(rule, hyper, theirs)
        plain_step_(rule, hyper, ours)
        for a, b in zip(theirs.states, ours.states, strict=True):
            apart = (a.values.int() - b.values.int()).abs() > 1
            # its CPU path looks codes up in 65536 bins, and beside zero several codes share one
            assert b.scales is not None
            scale = b.scales.repeat_interleave(256, dim=1)
            assert not (apart & ((a.load() - b.load()).abs() > 2**-15 * scale)).any()
            assert apart.float().mean() < 2e-2
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(theirs.weights, ours.weights, rtol=tolerance, atol=tolerance * hyper.lr)


@pytest.mark.parametrize(
    ("rule", "shape", "change", "taken"),
    [
        ("adamw", (24, 512), {}, True),
        ("adamw", (24, 500), {}, False),
        ("adamw", (6000,), {}, True),
        ("sgd", (24, 512), {}, False),
        ("adamw", (24, 512), {"grad": torch.zeros(24, 512, dtype=torch.bfloat16)}, False),
    ],
)
def test_it_takes_what_it_does_alike(rule: str, shape: tuple[int, ...], change: dict[str, Any], taken: bool) -> None:
    task = task_of(rule, shape, torch.float32, "cpu")
    task = Task(**{**{f: getattr(task, f) for f in ("weights", "grad", "states", "step", "name")}, **change})
    assert bnb_kernels.BitsAndBytes().takes(rule, task) is taken
