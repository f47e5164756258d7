"""An element-wise rule on any cut of a flat vector, with its states in one byte record.

The record of n elements is [first state | second state | scales of the first | scales of the second], so that one read
and one write move the whole state of a chunk. The blocks of 8-bit states lie along the vector, 256 elements each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from memopt.errors import BadInput
from memopt.optim import codecs, native
from memopt.optim.codecs import Codec
from memopt.optim.element import CHUNK, GRANULARITY, SLOTS, Hyper, Stored, Task, step_
from memopt.optim.rounding import random_lanes, stochastic_round_
from memopt.optim.rules import Granularity
from memopt.optim_types import ChunkKey

_PLAIN_8BIT_BYTES = 36
"""Temporaries per element of decoding, the rule and encoding, without the native kernels."""


@dataclass(frozen=True, kw_only=True)
class ChunkRule:
    """Update rule and state codec; meets `memopt.optim_types.UpdateRule`.

    The steps are those of `memopt.optim.element`, by the same kernels. Only the random bits of bfloat16 states come
    from somewhere else, from ChunkKey: they do not depend on where parameters are cut.
    """

    rule: str = "adamw"
    codec: Codec = Codec.FP32
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        known = [name for name, granularity in GRANULARITY.items() if granularity == Granularity.ELEMENT]
        if self.rule not in known:
            raise BadInput(f"rule: {self.rule!r} does not update elements one by one; choose from {', '.join(known)}")
        if self.codec == Codec.INT8_LINEAR:
            raise BadInput(f"codec: {self.codec} is for Muon's momentum; use {Codec.INT8} with {self.rule}")

    @property
    def whole(self) -> int:
        return 0

    @property
    def block(self) -> int:
        return codecs.BLOCK if self.codec == Codec.INT8 else 1

    def record_bytes(self, numel: int) -> int:
        """Bytes of the state of `numel` elements; additive over whole blocks."""
        return len(SLOTS[self.rule]) * codecs.nbytes(self.codec, (numel,))

    def scratch_bytes(self, numel: int) -> int:
        """Bytes of temporaries one update of `numel` elements needs."""
        states = len(SLOTS[self.rule])
        plain = 0 if self.rule == "adamw" else 4 * numel  # torch's kernel needs nothing
        if self.codec == Codec.BF16:
            return plain + 4 * states * numel + 6 * numel  # and the random bits
        if self.codec == Codec.INT8:
            return 0 if native.available() else _PLAIN_8BIT_BYTES * min(numel, CHUNK)
        return plain

    def update_(
        self,
        weights: torch.Tensor,  # (n,) float32, updated in place
        grads: torch.Tensor,  # (n,) float32
        record: torch.Tensor,  # (record_bytes(n),) uint8, updated in place
        *,
        decay_numel: int,
        lr: float,
        key: ChunkKey,
    ) -> None:
        """One step; the first `decay_numel` elements get weight decay."""
        states = self._stored(record, weights.numel())
        split = min(max(decay_numel, 0), weights.numel())
        if self.codec == Codec.INT8:
            self._whole_(weights, grads, states, split, lr, key.step)
        elif self.codec == Codec.FP32:
            self._parts_(weights, grads, states, split, lr, key.step)
        else:
            loaded = [Stored(Codec.FP32, s.values.float(), None, s.signed) for s in states]
            self._parts_(weights, grads, loaded, split, lr, key.step)
            self._round_(loaded, states, key)

    def _parts_(
        self, w: torch.Tensor, g: torch.Tensor, states: Sequence[Stored], split: int, lr: float, step: int
    ) -> None:
        for part, decay in ((slice(0, split), self.weight_decay), (slice(split, w.numel()), 0.0)):
            if part.start < part.stop:
                mine = tuple(replace(s, values=s.values[part]) for s in states)
                task = Task(weights=w[part], grad=g[part], states=mine, step=step)
                step_(self.rule, self._hyper(lr, decay), [task])

    def _whole_(
        self, w: torch.Tensor, g: torch.Tensor, states: Sequence[Stored], split: int, lr: float, step: int
    ) -> None:
        decay = self.weight_decay if split == w.numel() else 0.0
        if 0 < split < w.numel():  # maybe in the middle of a block: decay beforehand, so that no block is cut
            w[:split].mul_(1 - lr * self.weight_decay)
        step_(self.rule, self._hyper(lr, decay), [Task(weights=w, grad=g, states=tuple(states), step=step)])

    def _round_(self, loaded: Sequence[Stored], states: Sequence[Stored], key: ChunkKey) -> None:
        for which, (x, state) in enumerate(zip(loaded, states, strict=True)):
            lanes = random_lanes(
                x.values.numel(),
                seed=self.seed,
                step=key.step,
                tensor=len(states) * key.tensor + which,
                position=key.position,
            )
            stochastic_round_(x.values, lanes, state.values)

    def _stored(self, record: torch.Tensor, numel: int) -> list[Stored]:
        slots = SLOTS[self.rule]
        values, scales = codecs.allocate(self.codec, (numel,), device="meta")
        behind = len(slots) * values.nbytes
        return [
            Stored(
                self.codec,
                _at(record, i * values.nbytes, values),
                None if scales is None else _at(record, behind + i * scales.nbytes, scales),
                slot.signed,
            )
            for i, slot in enumerate(slots)
        ]

    def _hyper(self, lr: float, weight_decay: float) -> Hyper:
        return Hyper(
            lr=lr,
            weight_decay=weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )


def _at(record: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return record[start : start + like.nbytes].view(like.dtype)
