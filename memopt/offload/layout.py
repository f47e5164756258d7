"""How a model's parameters are cut into units: the lumps that are fetched, computed with and updated together.

A unit is one decoder block, one tile of rows of the embedding or head table, or the small remainder (`rest`). Its
trainable parameters form one flat float32 master vector, the ones with weight decay first, so that an update is a
walk over the vector in chunks of `CHUNK` elements whatever the shapes are. Frozen parameters form a second byte
vector in the dtype of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

CHUNK = 1 << 20
"""Elements an update handles at a time: 4 MiB of weights. Part of the numerics of stochastic rounding, so it is
fixed."""

PAGE = 4096
MASTER_ITEMSIZE = 4


class UnitKind(StrEnum):
    BLOCK = "block"
    EMBED = "embed"
    HEAD = "head"
    REST = "rest"


@dataclass(frozen=True)
class Piece:
    """One parameter (or some rows of one) inside a unit's vector."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    decay: bool = False
    row: int = 0
    """First row of the parameter that this piece holds (tables are cut by rows)."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """This piece of a unit's vector (any dtype), as a view in its own shape and dtype."""
        raw = vector.view(torch.uint8)[self.offset_bytes : self.offset_bytes + self.nbytes]
        return raw.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Unit:
    """A named lump of parameters. `trained` is the float32 master vector, `frozen` the read-only byte vector."""

    name: str
    kind: UnitKind
    index: int
    trained: tuple[Piece, ...] = ()
    frozen: tuple[Piece, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the master vector, padded to whole pages."""
        used = max((p.offset_bytes + p.nbytes for p in self.trained), default=0)
        return _up(used, PAGE) // MASTER_ITEMSIZE

    @property
    def params(self) -> int:
        """Trainable parameters, padding not counted."""
        return sum(p.numel for p in self.trained)

    @property
    def master_bytes(self) -> int:
        return self.numel * MASTER_ITEMSIZE

    @property
    def frozen_bytes(self) -> int:
        return _up(max((p.offset_bytes + p.nbytes for p in self.frozen), default=0), PAGE)

    @property
    def decay_numel(self) -> int:
        """Elements at the front of the master vector that get weight decay."""
        return max((p.offset_bytes + p.nbytes for p in self.trained if p.decay), default=0) // MASTER_ITEMSIZE

    @property
    def rows(self) -> tuple[int, int]:
        """Rows [first, last) of the table this tile holds."""
        piece = (self.trained or self.frozen)[0]
        return piece.row, piece.row + piece.shape[0]

    def chunks(self) -> list[tuple[int, int]]:
        """Element ranges an update walks."""
        return [(a, min(a + CHUNK, self.numel)) for a in range(0, self.numel, CHUNK)]

    def views(self, master: torch.Tensor | None, frozen: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Parameter name -> view of its piece in the unit's two vectors (float32 (numel,) and uint8
        (frozen_bytes,))."""
        out: dict[str, torch.Tensor] = {}
        for vector, pieces in ((master, self.trained), (frozen, self.frozen)):
            for piece in pieces:
                assert vector is not None
                out[piece.name] = piece.of(vector)
        return out


@dataclass(frozen=True)
class ParameterSpec:
    """What the layout needs to know of one parameter of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """As stored in the checkpoint; trained parameters are float32 in memopt whatever this is."""
    trainable: bool
    decay: bool


@dataclass(frozen=True)
class Layout:
    """All units of a model, in the order a forward pass meets them: tables of the entry, blocks, tables of the exit,
    rest."""

    embed: tuple[Unit, ...]
    blocks: tuple[Unit, ...]
    head: tuple[Unit, ...]
    rest: Unit
    tied: bool
    """The head multiplies with the embedding table: `head` is `embed`."""

    @property
    def tables(self) -> tuple[Unit, ...]:
        return self.embed if self.tied else self.embed + self.head

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.tables + self.blocks + (self.rest,)

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return sum(u.params for u in self.units)

    @property
    def frozen_params(self) -> int:
        return sum(p.numel for u in self.units for p in u.frozen)


def build_unit(name: str, kind: UnitKind, index: int, specs: Iterable[ParameterSpec]) -> Unit:
    """Lay whole parameters out in one unit, decayed ones first."""
    specs = list(specs)
    trained = sorted((s for s in specs if s.trainable), key=lambda s: not s.decay)
    return Unit(
        name,
        kind,
        index,
        trained=_place([(s, s.shape, torch.float32, 0) for s in trained]),
        frozen=_place([(s, s.shape, s.dtype, 0) for s in specs if not s.trainable]),
    )


def build_table(kind: UnitKind, spec: ParameterSpec, tile_rows: int) -> tuple[Unit, ...]:
    """Cut a (rows, width) table into tiles of at most `tile_rows` rows."""
    rows, width = spec.shape
    dtype = torch.float32 if spec.trainable else spec.dtype
    units = []
    for index, row in enumerate(range(0, rows, tile_rows)):
        shape = (min(tile_rows, rows - row), width)
        pieces = _place([(spec, shape, dtype, row)])
        side = {"trained": pieces} if spec.trainable else {"frozen": pieces}
        units.append(Unit(f"{kind}.{index}", kind, index, **side))
    return tuple(units)


def build_layout(
    *,
    embed: ParameterSpec,
    head: ParameterSpec | None,
    blocks: Sequence[Sequence[ParameterSpec]],
    rest: Sequence[ParameterSpec],
    tile_rows: int,
) -> Layout:
    """Units of a model. `head` is None when the head uses the embedding table (tied weights).

    Adapter parameters (trainable ones of a block that also has frozen ones) go to `rest`, which stays in DRAM: they are
    small, and a block whose own vector is frozen is never written.
    """
    units = []
    resident = list(rest)
    for index, specs in enumerate(blocks):
        frozen = [s for s in specs if not s.trainable]
        if frozen:
            resident += [s for s in specs if s.trainable]
            specs = frozen
        units.append(build_unit(f"block.{index}", UnitKind.BLOCK, index, specs))
    tables = build_table(UnitKind.EMBED, embed, tile_rows)
    return Layout(
        embed=tables,
        blocks=tuple(units),
        head=tables if head is None else build_table(UnitKind.HEAD, head, tile_rows),
        rest=build_unit("rest", UnitKind.REST, 0, resident),
        tied=head is None,
    )


def _place(items: list[tuple[ParameterSpec, tuple[int, ...], torch.dtype, int]]) -> tuple[Piece, ...]:
    pieces, at = [], 0
    for spec, shape, dtype, row in items:
        piece = Piece(spec.name, tuple(shape), dtype, at, spec.decay, row)
        pieces.append(piece)
        at = _up(at + piece.nbytes, 64)  # a cache line: vector loads of every parameter start aligned
    return tuple(pieces)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
