"""The input embedding with only the rows a step needs: gathered from DRAM or SSD, and differentiated as a compact
table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memopt.ledger import Lease, Ledger
from memopt.offload.homes import Homes, frozen_name, gradient_name, weights_name
from memopt.offload.layout import Layout, Unit
from memopt.store.block_store import BlockStore
from memopt.store.regions import Region
from memopt.tiers import Category, Tier
from memopt.units import MiB

_SECTOR = 4096
_MERGE_BYTES = 64 * 1024
"""Rows closer than this are read in one request: a request costs about as much as 64 KiB of transfer on NVMe."""
BOUNCE_BYTES = 8 * MiB


class RowReader:
    """Gathers rows of a table that is cut into tiles. Owns one bounce buffer for unaligned reads."""

    def __init__(self, homes: Homes, ledger: Ledger):
        self._homes, self._ledger = homes, ledger
        self._bounce: Region | None = None
        self._lease: Lease | None = None

    def gather(self, tiles: tuple[Unit, ...], rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(U, D) of `dtype`: the given rows (sorted, of the whole table)."""
        piece = (tiles[0].trained or tiles[0].frozen)[0]
        out = torch.empty(len(rows), piece.shape[1], dtype=dtype)
        for unit in tiles:
            first, last = unit.rows
            lo, hi = torch.searchsorted(rows, torch.tensor([first, last])).tolist()
            if lo == hi:
                continue
            local = rows[lo:hi] - first
            home = self._homes[unit]
            if home.resident:
                table = next(iter(unit.views(home.weights, home.frozen).values()))
                out[lo:hi] = table[local].to(dtype)
            else:
                home.settle()
                name = weights_name(unit.segments[0]) if unit.trained else frozen_name(unit)
                self._read(self._homes.store, name, unit, local, out[lo:hi])
        return out

    def gather_gradient(self, unit: Unit, rows: torch.Tensor) -> torch.Tensor:
        """(U, D) float32: rows (counted in the whole table) of a tile's dense gradient, from DRAM or where it was
        spilled."""
        home, local = self._homes[unit], rows - unit.rows[0]
        width = unit.trained[0].shape[1]
        if home.gradient is not None:
            return home.gradient[: unit.trained[0].numel].view(-1, width)[local].clone()
        out = torch.empty(len(rows), width)
        self._read(self._homes.spill, gradient_name(unit), unit, local, out)
        return out

    def close(self) -> None:
        """Give the bounce buffer back."""
        if self._bounce is not None and self._lease is not None:
            self._bounce.close()
            self._lease.release()
            self._bounce = None

    def _read(self, store: BlockStore, name: str, unit: Unit, rows: torch.Tensor, out: torch.Tensor) -> None:
        piece = (unit.trained or unit.frozen)[0]
        width, dtype = piece.shape[1], piece.dtype
        row_bytes = width * dtype.itemsize
        limit = unit.master_bytes if unit.trained else unit.frozen_bytes
        if self._bounce is None or self._bounce.nbytes < 2 * row_bytes + 2 * _SECTOR:
            self.close()
            nbytes = max(BOUNCE_BYTES, 2 * row_bytes + 2 * _SECTOR)
            self._lease = self._ledger.charge(Tier.DRAM, Category.BUFFERS, nbytes, "bounce buffer of table rows")
            self._bounce = Region(nbytes)
        batch: list[tuple[int, int, int, int]] = []  # first index, last index, file start, bounce start
        used = 0
        for lo, hi, start, stop in _runs(rows.tolist(), row_bytes, limit, self._bounce.nbytes):
            if used + stop - start > self._bounce.nbytes:
                self._flush(store, name, batch, rows, row_bytes, dtype, width, out)
                batch, used = [], 0
            batch.append((lo, hi, start, used))
            used += stop - start
        self._flush(store, name, batch, rows, row_bytes, dtype, width, out)

    def _flush(
        self,
        store: BlockStore,
        name: str,
        batch: list[tuple[int, int, int, int]],
        rows: torch.Tensor,
        row_bytes: int,
        dtype: torch.dtype,
        width: int,
        out: torch.Tensor,
    ) -> None:
        assert self._bounce is not None
        view = self._bounce.view
        reads = []
        for _, hi, start, at in batch:
            length = _up(int(rows[hi - 1]) * row_bytes + row_bytes - start, _SECTOR)
            reads.append(store.read(name, view[at : at + length], start))
        for (lo, hi, start, at), read in zip(batch, reads, strict=True):
            read.wait()
            for index in range(lo, hi):
                offset = at + int(rows[index]) * row_bytes - start
                raw = self._bounce.tensor(torch.uint8, row_bytes, offset)
                out[index] = raw.view(dtype).view(width).to(out.dtype)


def _runs(rows: list[int], row_bytes: int, limit: int, longest: int) -> Iterator[tuple[int, int, int, int]]:
    """Index ranges of rows that one aligned read [start, stop) covers."""
    lo = 0
    while lo < len(rows):
        start = rows[lo] * row_bytes // _SECTOR * _SECTOR
        hi, stop = lo, start
        while hi < len(rows):
            end = _up((rows[hi] + 1) * row_bytes, _SECTOR)
            if hi > lo and (rows[hi] * row_bytes - stop > _MERGE_BYTES or end - start > longest):
                break
            hi, stop = hi + 1, end
        yield lo, hi, start, min(stop, limit)
        lo = hi


def row_bytes(layout: Layout, tokens: int, dtype: torch.dtype) -> dict[Category, int]:
    """Bytes of the table rows a step of `tokens` tokens looks up, and of their gradients (one pending, one growing)."""
    tiles = layout.embed
    piece = (tiles[0].trained or tiles[0].frozen)[0]
    elements = min(tokens, tiles[-1].rows[1]) * piece.shape[1]
    return {
        Category.WEIGHTS: elements * dtype.itemsize,
        Category.GRADIENTS: 2 * elements * 4 if tiles[0].trained else 0,
    }


class CompactEmbedding:
    """An nn.Embedding that holds only some rows: token ids are mapped to positions among them on the way in."""

    def __init__(self, module: nn.Embedding, rows: torch.Tensor):
        self._module, self._rows = module, rows

    @contextmanager
    def bound(self, weight: torch.Tensor) -> Iterator[None]:
        """Within the context the module's table is `weight` (U, D), differentiable if it requires grad."""
        module = self._module
        before, padding = module._parameters["weight"], module.padding_idx
        rows = self._rows.to(weight.device)

        def to_position(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.searchsorted(rows, args[0]), *args[1:])

        handle = module.register_forward_pre_hook(to_position)
        module._parameters["weight"] = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
        if padding is not None:
            at = int(torch.searchsorted(self._rows, padding))
            present = at < len(self._rows) and int(self._rows[at]) == padding
            module.padding_idx = at if present else None
        try:
            yield
        finally:
            handle.remove()
            module._parameters["weight"] = before
            module.padding_idx = padding


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
