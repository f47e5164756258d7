"""The gradient of a unit as the update sees it: dense in memory, dense on SSD, or the few rows of a table a batch
touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from memopt.offload.layout import Layout, Unit, UnitKind


@dataclass(frozen=True)
class RowGradient:
    """The gradient of an embedding table: zero but for the rows whose tokens occurred."""

    rows: torch.Tensor
    """(U,) int64, sorted, without repetition."""
    values: torch.Tensor
    """(U, D) float32."""

    def of(self, unit: Unit) -> RowGradient:
        """The part that falls on one tile, rows still counted in the whole table."""
        first, last = unit.rows
        lo, hi = torch.searchsorted(self.rows, torch.tensor([first, last])).tolist()
        return RowGradient(self.rows[lo:hi], self.values[lo:hi])

    def add_to_(self, chunk: torch.Tensor, unit: Unit, start: int) -> None:
        """Add the elements start ... start + n of the tile's flat vector to `chunk` (n,) float32."""
        first, _ = unit.rows
        width = self.values.shape[1]
        stop = start + chunk.numel()
        row_lo, row_hi = start // width, -(-stop // width)
        lo, hi = torch.searchsorted(self.rows, torch.tensor([first + row_lo, first + row_hi])).tolist()
        for row, values in zip((self.rows[lo:hi] - first).tolist(), self.values[lo:hi], strict=True):
            a, b = max(row * width, start), min((row + 1) * width, stop)
            if a < b:
                chunk[a - start : b - start] += values[a - row * width : b - row * width]


def squared_norm(vector: torch.Tensor) -> float:
    """Sum of squares of a flat float32 vector; partial sums of 64 Ki elements are added in float64.

    (`vector_norm(dtype=float64)` would copy the whole vector.)
    """
    return math.fsum(float(torch.linalg.vector_norm(part)) ** 2 for part in vector.split(1 << 16))


def held_units(layout: Layout, *, clips: bool) -> list[Unit]:
    """Units whose dense gradient is kept beyond the backward of the unit: all with clipping, else the tied table.

    An untied embedding's gradient is a few rows and always in DRAM.
    """
    if clips:
        return [u for u in layout.units if u.trained and (layout.tied or u.kind != UnitKind.EMBED)]
    return [u for u in (*(layout.embed if layout.tied else ()), layout.rest) if u.trained]
