"""The state of one matrix, or of a batch of them, as bytes at fixed places: what a store can keep.

The places follow from policy and shape alone. A record of zeros is the state before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch

from memopt.optim import codecs, projection
from memopt.optim.element import SLOTS
from memopt.optim.part_state import SCALES
from memopt.optim.presets import Policy

_NUMBERS = ("next_refresh", "gap")
"""Whole numbers above 0 that a state may hold besides tensors; 0 in a record stands for none."""
_LINE_BYTES = 64
"""A cache line: every tensor starts on one, the numbers fill the first."""


@dataclass(frozen=True)
class Place:
    """One tensor of the state, `start` bytes from the start of its record."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize


@cache
def places(policy: Policy, shape: tuple[int, ...]) -> tuple[Place, ...]:
    """The tensors of the state of a part of `shape`: (n,), (m, n) or (B, m, n)."""
    worked = shape
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if policy.projection is not None:
        *batch, m, n = shape
        worked = (*batch, *projection.shape_of(policy.projection, m, n))
        tensors = projection.state_shapes(policy.projection, m, n, batch=tuple(batch))
    values, scales = codecs.allocate(codecs.storable(policy.codec, worked), worked, device="meta")
    for slot in SLOTS[policy.rule]:
        tensors[slot.name] = (tuple(values.shape), values.dtype)
        if scales is not None:
            tensors[slot.name + SCALES] = (tuple(scales.shape), scales.dtype)
    found: list[Place] = []
    at = _LINE_BYTES
    for name, (size, dtype) in tensors.items():
        found.append(Place(name, size, dtype, at))
        at = -(-found[-1].stop // _LINE_BYTES) * _LINE_BYTES
    return tuple(found)


def nbytes(policy: Policy, shape: tuple[int, ...]) -> int:
    """Bytes of the record of a part of `shape`, whole cache lines."""
    return -(-places(policy, shape)[-1].stop // _LINE_BYTES) * _LINE_BYTES


def unpack(policy: Policy, shape: tuple[int, ...], record: torch.Tensor) -> dict[str, Any]:
    """The state in a record (nbytes,) uint8, as `memopt.optim.updates` takes it; tensors are views of the record."""
    state: dict[str, Any] = {
        place.name: record[place.start : place.stop].view(place.dtype).view(place.shape)
        for place in places(policy, shape)
    }
    state |= {name: int(x) for name, x in zip(_NUMBERS, _numbers(record).tolist(), strict=True) if x}
    return state


def pack_(policy: Policy, shape: tuple[int, ...], record: torch.Tensor, state: dict[str, Any]) -> None:
    """Bring a state that was unpacked from `record` and updated since back into it."""
    known = {place.name: place for place in places(policy, shape)}
    if unknown := state.keys() - known.keys() - set(_NUMBERS):
        raise AssertionError(f"{sorted(unknown)} of {policy.label} have no place in a record")
    for name, place in known.items():
        kept = record[place.start : place.stop].view(place.dtype).view(place.shape)
        if state[name].data_ptr() != kept.data_ptr():
            kept.copy_(state[name])
    _numbers(record).copy_(torch.tensor([state.get(name, 0) for name in _NUMBERS]))


def _numbers(record: torch.Tensor) -> torch.Tensor:
    return record[: 8 * len(_NUMBERS)].view(torch.int64)
