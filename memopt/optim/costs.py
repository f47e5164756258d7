"""Bytes of optimizer state from shapes alone: nothing is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from memopt.optim import codecs, projection
from memopt.optim.element import SLOTS
from memopt.optim.items import Route, RoutedPart
from memopt.optim.part_state import SCALES, scales_shape
from memopt.optim.presets import Policy
from memopt.optim.sharding import is_sharded, local


def part_bytes(policy: Policy, shape: tuple[int, ...]) -> int:
    """State of a part of `shape`: (n,), (m, n) or (B, m, n)."""
    if policy.projection is None or len(shape) < 2:
        worked, extra = shape, 0
    else:
        *batch, m, n = shape
        worked = (*batch, *projection.shape_of(policy.projection, m, n))
        tensors = projection.state_shapes(policy.projection, m, n, batch=tuple(batch)).values()
        extra = sum(math.prod(size) * dtype.itemsize for size, dtype in tensors)
    codec = codecs.storable(policy.codec, worked)
    return len(SLOTS[policy.rule]) * codecs.nbytes(codec, worked) + extra


def route_bytes(route: Route, shape: tuple[int, ...]) -> int:
    """State of a whole parameter of `shape`."""
    return sum(part_bytes(routed.policy, part_shape(routed, shape)) for routed in route.parts)


def held_bytes(route: Route, param: torch.Tensor) -> int:
    """State that this rank holds of a parameter."""
    if not is_sharded(param):
        return route_bytes(route, tuple(param.shape))
    total = 0
    for routed in route.parts:
        shape = part_shape(routed, tuple(param.shape))
        whole = part_bytes(routed.policy, shape)
        rows = max(param.shape[0], 1)
        total += whole * local(param).shape[0] // rows if route.by_rows(routed) else whole
    return total


def part_shape(routed: RoutedPart, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the item a part of a parameter of `shape` becomes: (n,), (m, n) or (b, m, n)."""
    return routed.part.shape(shape)


def kept_by_rows(route: Route, key: str, value: torch.Tensor, param: torch.Tensor) -> bool:
    """Whether the whole tensor `value`, kept under `key`, is a state (or its scales) that goes with the rows of
    `param`."""
    if not any(route.by_rows(routed) for routed in route.parts):
        return False
    slots = {slot.name for group in SLOTS.values() for slot in group}
    shape = tuple(param.shape) if param.ndim <= 3 else (param.shape[0], math.prod(param.shape[1:]))
    expected = {name: shape for name in slots} | {name + SCALES: scales_shape(shape) for name in slots if shape}
    return expected.get(key) == tuple(value.shape)


def total_bytes(routes: Iterable[tuple[Route, torch.Tensor]]) -> int:
    """State of many parameters on this rank."""
    return sum(held_bytes(route, param) for route, param in routes)
