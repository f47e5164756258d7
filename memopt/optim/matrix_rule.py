"""A rule that needs a whole parameter at once, on flat vectors: matrices, gradients and states are views of them.

The numerics are those of `memopt.optim.updates`, which the optimizer in memory uses too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from memopt.optim import scratch, state_record
from memopt.optim.element import Hyper
from memopt.optim.items import Item, Route, RoutedPart, matrix_of
from memopt.optim.part_state import PartState
from memopt.optim.updates import Means, update_
from memopt.optim_types import ChunkKey

_PAGE = 4096
_SPLITTABLE = 4096
"""Elements from which the matrices of a batch are updated apart; smaller ones would keep other states than in a batch
(codecs.storable)."""


@dataclass(frozen=True, kw_only=True)
class MatrixRule:
    """How one parameter is updated; meets `memopt.optim_types.UpdateRule`. A batch of matrices (fused experts) is
    updated matrix by matrix. A record holds the states of the parts one after the other, in whole pages."""

    route: Route
    weight_decay: float = 0.0
    seed: int = 0

    @cached_property
    def whole(self) -> int:
        shape = self.route.shape
        matrix = prod(shape[1:])
        batch = all(len(routed.part.shape(shape)) == 3 for routed in self.route.parts)
        return matrix if batch and matrix >= _SPLITTABLE and 4 * matrix % _PAGE == 0 else prod(shape)

    @property
    def block(self) -> int:
        return 1

    def record_bytes(self, numel: int) -> int:
        """Bytes of the state of the whole parameter, or of `whole` of its elements."""
        shape = self._shape(numel)
        return _pages(sum(state_record.nbytes(p.policy, p.part.shape(shape)) for p in self.route.parts))

    def scratch_bytes(self, numel: int) -> int:
        """Bytes of temporaries one update of so many elements needs."""
        shape = self._shape(numel)
        return max(scratch.part_bytes(p.policy, p.part, p.part.shape(shape)) for p in self.route.parts)

    def update_(
        self,
        weights: torch.Tensor,  # (n,) float32, updated in place; what is beyond the parameter is left alone
        grads: torch.Tensor,  # (n,) float32
        record: torch.Tensor,  # (record_bytes(n),) uint8, updated in place
        *,
        decay_numel: int,
        lr: float,
        key: ChunkKey,
    ) -> None:
        """One step on the whole parameter, or on `whole` of its elements."""
        shape = self._shape(weights.numel())
        weights, grads = (flat[: prod(shape)].view(shape) for flat in (weights, grads))
        decay = self.weight_decay if decay_numel else 0.0
        at = 0
        for routed in self.route.parts:
            policy, size = routed.policy, routed.part.shape(shape)
            mine = record[at : at + state_record.nbytes(policy, size)]
            at += mine.numel()
            matrix, copied = matrix_of(routed.part, weights)
            state = state_record.unpack(policy, size, mine)
            item = Item(
                name=self.route.name + ("." + routed.prefix.rstrip(".") if routed.prefix else ""),
                policy=policy,
                weights=matrix,
                grad=matrix_of(routed.part, grads)[0],
                state=PartState(state, ""),
                step=key.step,
            )
            update_([item], _hyper(routed, lr, decay), Means(seed=self.seed))
            state_record.pack_(policy, size, mine, state)
            if copied:
                view = routed.part.view(weights)
                view.copy_(matrix.view(view.shape))

    def _shape(self, numel: int) -> tuple[int, ...]:
        """Shape of so many elements: of one matrix of a batch, or of the parameter (whose vector may be padded)."""
        shape = self.route.shape
        return (1, *shape[1:]) if numel < prod(shape) else shape


def _hyper(routed: RoutedPart, lr: float, weight_decay: float) -> Hyper:
    policy = routed.policy
    return Hyper(
        lr=lr,
        weight_decay=weight_decay,
        beta1=policy.betas[0],
        beta2=policy.betas[1],
        eps=policy.eps,
        momentum=policy.momentum,
        nesterov=policy.nesterov,
    )


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
