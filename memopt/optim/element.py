"""One step of an element-wise rule on a list of tensors, by the fastest way that is there and exact.

float32 AdamW goes to torch's fused kernel, 8-bit states on a CPU to our own (memopt/optim/native.py), 8-bit states on a
GPU to the backend that was given (bitsandbytes). Everything else, and everything when a kernel is missing, is done by
the pure functions of rules.py, `CHUNK` elements at a time, so that no temporary is as large as the tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from memopt.optim import native, rules
from memopt.optim.codecs import BLOCK, Codec, decode, encode_
from memopt.optim.rounding import random_lanes, stochastic_round_

CHUNK = 1 << 20
"""Elements per piece of the plain path: three float32 temporaries of 4 MiB."""
SLOTS = {
    "adamw": (rules.EXP_AVG, rules.EXP_AVG_SQ),
    "lion": (rules.EXP_AVG,),
    "sgd": (rules.MOMENTUM,),
    "muon": (rules.MOMENTUM,),
}
"""States of each rule, in the order of the rule's arguments."""
GRANULARITY = {
    "adamw": rules.Granularity.ELEMENT,
    "lion": rules.Granularity.ELEMENT,
    "sgd": rules.Granularity.ELEMENT,
    "muon": rules.Granularity.MATRIX,
}


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What one group applies in one step."""

    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    nesterov: bool = False


@dataclass(frozen=True)
class Stored:
    """One state as it is kept: values in the codec's dtype, and the scales of its blocks if the codec has any."""

    codec: Codec
    values: torch.Tensor
    scales: torch.Tensor | None
    signed: bool

    def load(self) -> torch.Tensor:
        """The state in float32; of a float32 state, the state itself."""
        if self.codec == Codec.FP32:
            return self.values
        return decode(self.codec, self.values, self.scales, signed=self.signed)

    def store(self, x: torch.Tensor) -> None:
        """Keep float32 `x`, of the state's shape."""
        if x is not self.values:
            encode_(self.codec, x, self.values, self.scales, signed=self.signed)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One tensor to update: all of one shape, contiguous; weights and gradient in float32 or bfloat16."""

    weights: torch.Tensor
    grad: torch.Tensor
    states: tuple[Stored, ...]
    step: int
    """Updates of this tensor, this one included."""
    name: str = ""
    """Seeds the random bits of bfloat16 states."""


class DeviceKernels(Protocol):
    """8-bit steps of a library for a device that has no kernel of ours."""

    def takes(self, rule: str, task: Task) -> bool:
        """Whether `step_` can do this task exactly as the plain path would, up to rounding."""

    def step_(self, rule: str, hyper: Hyper, task: Task) -> None:
        """One step in place."""


def step_(
    rule: str, hyper: Hyper, tasks: Sequence[Task], *, kernels: DeviceKernels | None = None, seed: int = 0
) -> None:
    """One step of `adamw`, `lion` or `sgd` on every task, in place."""
    fused: dict[torch.device, list[Task]] = {}
    eight_bit: list[Task] = []
    for task in tasks:
        if task.weights.numel() == 0:
            continue
        if _torch_takes(rule, task):
            fused.setdefault(task.weights.device, []).append(task)
        elif _native_takes(task):
            eight_bit.append(task)
        elif kernels is not None and kernels.takes(rule, task):
            kernels.step_(rule, hyper, task)
        else:
            plain_step_(rule, hyper, task, seed=seed)
    for device, group in fused.items():
        _torch_adamw_(hyper, group, device)
    if eight_bit:
        _native_step_(rule, hyper, eight_bit)


def plain_step_(rule: str, hyper: Hyper, task: Task, *, seed: int = 0) -> None:
    """The reference path of `step_`: decode, direction, encode, a piece at a time."""
    pieces = _pieces(task.weights)
    weights, grad = _as_rows(task.weights), _as_rows(task.grad)
    states = [(s, _as_rows(s.values), None if s.scales is None else _as_rows(s.scales)) for s in task.states]
    for number, (rows, cols, blocks) in enumerate(pieces):
        w, g = weights[rows, cols], grad[rows, cols].float()
        stored = [
            Stored(s.codec, values[rows, cols], None if scales is None else scales[rows, blocks], s.signed)
            for s, values, scales in states
        ]
        loaded = [s.load() for s in stored]
        d = direction(rule, hyper, g, loaded, task.step)
        apply_(w, d, hyper)
        for which, (s, x) in enumerate(zip(stored, loaded, strict=True)):
            if s.codec == Codec.BF16:
                _store_bfloat16(s.values, x, seed, task, which, number)
            else:
                s.store(x)


def direction(rule: str, hyper: Hyper, grad: torch.Tensor, states: Sequence[torch.Tensor], step: int) -> torch.Tensor:
    """Direction of an element-wise rule (rules.py); updates the float32 `states` in place."""
    if rule == "adamw":
        return rules.adamw(grad, *states, step=step, beta1=hyper.beta1, beta2=hyper.beta2, eps=hyper.eps)
    if rule == "lion":
        return rules.lion(grad, *states, beta1=hyper.beta1, beta2=hyper.beta2)
    assert rule == "sgd", rule
    return rules.sgd(grad, *states, momentum=hyper.momentum, nesterov=hyper.nesterov)


def apply_(weights: torch.Tensor, d: torch.Tensor, hyper: Hyper, *, scale: float = 1.0) -> None:
    """w <- (1 - lr * wd) * w - lr * scale * d, computed in float32 whatever the dtype of `weights`."""
    exact = weights if weights.dtype == torch.float32 else weights.float()
    if hyper.weight_decay:
        exact.mul_(1 - hyper.lr * hyper.weight_decay)
    exact.add_(d, alpha=-hyper.lr * scale)
    if exact is not weights:
        weights.copy_(exact)


def name_seed(name: str) -> int:
    """A number that belongs to a name, the same in every process."""
    return zlib.crc32(name.encode())


def _torch_takes(rule: str, task: Task) -> bool:
    float32 = all(t.dtype == torch.float32 for t in (task.weights, task.grad))
    device = task.weights.device.type in ("cpu", "cuda")
    return rule == "adamw" and float32 and device and all(s.codec == Codec.FP32 for s in task.states)


def _torch_adamw_(hyper: Hyper, tasks: Sequence[Task], device: torch.device) -> None:
    steps = {task.step: torch.tensor(float(task.step), device=device) for task in tasks}
    torch._fused_adamw_(
        [t.weights for t in tasks],
        [t.grad for t in tasks],
        [t.states[0].values for t in tasks],
        [t.states[1].values for t in tasks],
        [],
        [steps[t.step] for t in tasks],
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
    )


def _native_takes(task: Task) -> bool:
    on_cpu = task.weights.device.type == "cpu"
    return on_cpu and native.available() and all(s.codec == Codec.INT8 for s in task.states)


def _native_step_(rule: str, hyper: Hyper, tasks: Sequence[Task]) -> None:
    weights, grads, steps = [t.weights for t in tasks], [t.grad for t in tasks], [t.step for t in tasks]
    states: list[list[torch.Tensor]] = []
    for which in range(len(SLOTS[rule])):
        kept = [t.states[which] for t in tasks]
        states += [[s.values for s in kept], [s.scales for s in kept if s.scales is not None]]
    lr, decay, beta1, beta2 = hyper.lr, hyper.weight_decay, hyper.beta1, hyper.beta2
    if rule == "adamw":
        native.adamw8_(
            weights, grads, *states, steps=steps, lr=lr, beta1=beta1, beta2=beta2, eps=hyper.eps, weight_decay=decay
        )
    elif rule == "lion":
        native.lion8_(weights, grads, *states, steps=steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay)
    else:
        native.sgd8_(
            weights,
            grads,
            *states,
            steps=steps,
            lr=lr,
            momentum=hyper.momentum,
            nesterov=hyper.nesterov,
            weight_decay=decay,
        )


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(1, -1) if tensor.ndim < 2 else tensor.view(-1, tensor.shape[-1])


def _pieces(tensor: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, columns and blocks of pieces of at most CHUNK elements; columns are cut between blocks."""
    rows, cols = _as_rows(tensor).shape
    wide = max(BLOCK, min(cols, CHUNK) // BLOCK * BLOCK) if cols > CHUNK else cols
    tall = max(1, CHUNK // max(wide, 1))
    for row in range(0, rows, tall):
        for col in range(0, cols, max(wide, 1)):
            end = min(col + wide, cols)
            yield slice(row, min(row + tall, rows)), slice(col, end), slice(col // BLOCK, -(-end // BLOCK))


def _store_bfloat16(values: torch.Tensor, x: torch.Tensor, seed: int, task: Task, which: int, piece: int) -> None:
    # rounding to nearest would let the second moment stand still (rounding.py)
    tensor = (name_seed(task.name) + which) & 0xFFFFFFFF
    lanes = random_lanes(x.numel(), seed=seed, step=task.step, tensor=tensor, position=piece * CHUNK)
    flat = torch.empty(x.numel(), dtype=torch.bfloat16, device=x.device)
    stochastic_round_(x.reshape(-1).clone(), lanes.to(x.device), flat)
    values.copy_(flat.view(values.shape))
