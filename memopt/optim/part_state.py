"""The states of one part of a parameter, inside the plain dictionary torch's Optimizer keeps for the parameter."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from memopt.optim import codecs
from memopt.optim.codecs import Codec
from memopt.optim.element import Stored
from memopt.optim.rules import Slot
from memopt.optim.sharding import local, wrap

SCALES = "_scale"


class PartState(MutableMapping[str, Any]):
    """A view of a dictionary: the keys that begin with `prefix`, without it."""

    def __init__(self, state: dict[str, Any], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, key: str) -> Any:
        return self.state[self.prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.state[self.prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self.state[self.prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self.state if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a state of `shape`: one per block of the last dimension."""
    return (*shape[:-1], -(-shape[-1] // codecs.BLOCK))


def stored(
    state: PartState,
    slot: Slot,
    codec: Codec,
    values: torch.Tensor,
    *,
    like: torch.Tensor | None = None,
) -> Stored:
    """The state `slot` of what `values` holds (its shape and device); made of zeros when it is not there yet.

    With `like`, a DTensor, `values` are this rank's rows of it, and the state is kept cut in the same way.
    """
    shape = tuple(values.shape) if like is None else (*like.shape[:1], *values.shape[1:])
    codec = codecs.storable(codec, shape)
    if slot.name not in state:
        made, scales = codecs.allocate(codec, tuple(values.shape), device=values.device)
        state[slot.name] = made if like is None else wrap(made, like, shape)
        if scales is not None:
            state[slot.name + SCALES] = scales if like is None else wrap(scales, like, scales_shape(shape))
    kept = state.get(slot.name + SCALES)
    return Stored(codec, local(state[slot.name]), None if kept is None else local(kept), slot.signed)
