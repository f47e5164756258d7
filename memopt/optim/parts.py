"""Which elements of a parameter one update treats as one matrix (or a batch of matrices).

Most parameters are one part. A fused projection is cut, so that queries, keys and values are orthogonalised, projected
or routed apart; fused experts are a batch of matrices; a table stored input-first is turned round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memopt.optim.roles import Role


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows `start`..`start + length` of every one of `groups` equal groups of rows; by default, all of them.

    Contiguous fused rows [q | k | v] are one group; per-head interleaved rows [q0 k0 v0 q1 k1 v1 ...] are as many
    groups as there are heads (or key-value heads).
    """

    role: Role
    groups: int = 1
    start: int = 0
    length: int | None = None
    """Rows of one group; None: all of them."""
    transposed: bool = False
    """The parameter is stored as (inputs, outputs); rows are counted on its transpose."""

    @property
    def whole(self) -> bool:
        """Every element of the parameter, in its own order."""
        return self.length is None and not self.transposed

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of this part: a vector or scalar as it is; (m, n) or (batch, m, n) parameters as (batch, groups, rows,
        n); a convolution (out, in, ...) as the matrix (out, in * ...)."""
        if tensor.ndim < 2:
            return tensor
        matrix = tensor.flatten(1) if self._flattens(tensor.ndim) else tensor
        matrix = matrix.transpose(-1, -2) if self.transposed else matrix
        matrix = matrix if matrix.ndim == 3 else matrix.unsqueeze(0)
        grouped: torch.Tensor = matrix.unflatten(1, (self.groups, -1))
        return grouped if self.length is None else grouped.narrow(2, self.start, self.length)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part of a parameter of `shape` as it is updated: (n,), (m, n), or a batch (b, m, n)."""
        if len(shape) < 2:
            return tuple(shape)
        *batch, m, n = (shape[0], math.prod(shape[1:])) if self._flattens(len(shape)) else shape
        if self.transposed:
            m, n = n, m
        return (*batch, m if self.length is None else self.groups * self.length, n)

    def _flattens(self, ndim: int) -> bool:
        return ndim > 3 or (ndim == 3 and self.role is Role.CONV)
