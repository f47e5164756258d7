"""The three ways to update an item: element-wise, orthogonalised (Muon), and in a low-rank subspace (GaLore)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from memopt.optim import muon, projection
from memopt.optim.element import SLOTS, DeviceKernels, Hyper, Stored, Task, apply_, name_seed, step_
from memopt.optim.items import Item
from memopt.optim.newton_schulz import orthogonalize, orthogonalize_each, scratch_bytes, working_dtype
from memopt.optim.part_state import stored
from memopt.optim.presets import Policy
from memopt.optim.rules import EXP_AVG_SQ
from memopt.optim.sharding import rows_of, whole, wrap
from memopt.units import MiB

BATCH_BYTES = 64 * MiB
"""Matrices of one shape are orthogonalised together up to this many bytes of scratch (four float32 1024 x 1024 ones).
Above that size products fill a CPU or a GPU on their own."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """What updates use besides the items."""

    seed: int = 0
    kernels: DeviceKernels | None = None


def update_(items: Sequence[Item], hyper: Hyper, means: Means) -> None:
    """One step on every item, in place."""
    element: dict[str, list[Item]] = {}
    orthogonal: list[Item] = []
    for item in items:
        if item.policy.projection is not None:
            low_rank_(item, hyper, means)
        elif item.policy.rule == "muon":
            orthogonal.append(item)
        else:
            element.setdefault(item.policy.rule, []).append(item)
    for rule, group in element.items():
        tasks = [_task(item, item.weights, item.grad) for item in group]
        step_(rule, hyper, tasks, kernels=means.kernels, seed=means.seed)
    for batch in _batches(orthogonal):
        muon_(batch, hyper)


def muon_(items: Sequence[Item], hyper: Hyper) -> None:
    """One step of Muon on items of one shape and policy: momentum, orthogonalisation, scaled update."""
    policy = items[0].policy
    shape = _whole_shape(items[0])
    directions = orthogonalize_each(
        (_momentum(item, hyper) for item in items),
        count=len(items),
        shape=shape,
        device=items[0].weights.device,
        coefficients=policy.coefficients,
        steps=policy.ns_steps,
        dtype=policy.ns_dtype,
    )
    size = muon.scale(shape[-2], shape[-1], policy.scale_mode)
    for item, d in zip(items, directions, strict=True):
        mine = d if item.like is None else rows_of(d, item.like)
        apply_(item.weights, mine, hyper, scale=size)


def _momentum(item: Item, hyper: Hyper) -> torch.Tensor:
    """What is to be orthogonalised, of the whole matrix; the item's state moves."""
    (momentum,) = _states(item, item.weights)
    buffer = momentum.load()
    update = muon.momentum_(item.grad.float(), buffer, momentum=hyper.momentum, nesterov=hyper.nesterov)
    momentum.store(buffer)
    if item.like is None:
        return update
    return whole(wrap(update, item.like, (item.like.shape[0], *update.shape[1:])))


def low_rank_(item: Item, hyper: Hyper, means: Means) -> None:
    """One step in the subspace of the gradient (GaLore, Zhao et al. 2024, algorithm 2): project, step, project back."""
    config, state = item.policy.projection, item.state
    assert config is not None
    grad = item.grad.float()
    rotation = projection.refresh_(config, state, grad, item.step, name_seed(item.name) ^ means.seed)
    low = projection.project(config, state, grad)
    if rotation is not None:
        _rotate(item, low, rotation, hyper)
    if item.policy.rule == "muon":
        d = _low_rank_muon(item, low, hyper)
    else:
        # the element-wise step on zeros with lr 1 is minus its direction, by the same kernels as everywhere
        d = torch.zeros_like(low)
        step_(
            item.policy.rule,
            replace(hyper, lr=1.0, weight_decay=0.0),
            [_task(item, d, low)],
            kernels=means.kernels,
            seed=means.seed,
        )
        d.neg_()
    rest = projection.residual(config, state, grad, low, d) if config.residual is not None else None
    weights = item.weights if item.weights.dtype == torch.float32 else item.weights.float()
    alpha = -hyper.lr * config.scale
    projection.back_add_(config, weights, d, state, beta=1 - hyper.lr * hyper.weight_decay, alpha=alpha)
    if rest is not None:
        weights.add_(rest, alpha=alpha)
    if weights is not item.weights:
        item.weights.copy_(weights)


def _low_rank_muon(item: Item, low: torch.Tensor, hyper: Hyper) -> torch.Tensor:
    policy = item.policy
    (momentum,) = _states(item, low)
    buffer = momentum.load()
    update = muon.momentum_(low, buffer, momentum=hyper.momentum, nesterov=hyper.nesterov)
    momentum.store(buffer)
    d = orthogonalize(update, coefficients=policy.coefficients, steps=policy.ns_steps, dtype=policy.ns_dtype)
    m, n = item.weights.shape[-2:]
    size = muon.scale(m, n, policy.scale_mode)
    # an orthonormal matrix of rank r has sqrt(r / min(m, n)) of the size a full one has: keep the size of the update
    return d.mul_(size * (min(m, n) / min(low.shape[-2:])) ** 0.5)


def _rotate(item: Item, low: torch.Tensor, rotation: projection.Rotation, hyper: Hyper) -> None:
    states = _states(item, low)
    first = states[0].load()
    if len(states) > 1:
        assert SLOTS[item.policy.rule][1] == EXP_AVG_SQ
        second = states[1].load()
        turned = projection.rotate_second(second, first, rotation, beta1=hyper.beta1, beta2=hyper.beta2, step=item.step)
        _keep(states[1], turned)
    _keep(states[0], projection.rotate_first(first, rotation))


def _keep(state: Stored, x: torch.Tensor) -> None:
    if state.scales is None:
        state.values.copy_(x)
    else:
        state.store(x)


def _task(item: Item, weights: torch.Tensor, grad: torch.Tensor) -> Task:
    return Task(weights=weights, grad=grad, states=_states(item, weights), step=item.step, name=item.name)


def _states(item: Item, values: torch.Tensor) -> tuple[Stored, ...]:
    slots = SLOTS[item.policy.rule]
    return tuple(stored(item.state, slot, item.policy.codec, values, like=item.like) for slot in slots)


def _batches(items: Sequence[Item]) -> list[list[Item]]:
    """Items of one shape, policy and device together, in batches of at most BATCH_BYTES of scratch, or of one."""
    alike: dict[tuple[tuple[int, ...], Policy, torch.device], list[Item]] = {}
    for item in items:
        alike.setdefault((_whole_shape(item), item.policy, item.weights.device), []).append(item)
    batches = []
    for (shape, policy, device), group in alike.items():
        dtype = policy.ns_dtype or working_dtype(device)
        each = prod(shape[:-2]) * scratch_bytes(*shape[-2:], dtype=dtype)
        size = max(1, BATCH_BYTES // max(each, 1))
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


def _whole_shape(item: Item) -> tuple[int, ...]:
    """(..., m, n) of the matrix that an item is, or is the rows of."""
    return tuple(item.weights.shape if item.like is None else (item.like.shape[0], *item.weights.shape[1:]))
