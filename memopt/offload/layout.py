"""How a model's parameters are cut into units: the lumps that are fetched, computed with and updated together.

A unit is one decoder block, one tile of rows of the embedding or head table, or the small remainder (`rest`). Its
trainable parameters form one flat float32 master vector. Those that share an update rule form a segment of it, the ones
with weight decay first, so that an update is a walk over the segment in chunks of `CHUNK` elements whatever the shapes
are; a matrix that must be updated as a whole is a segment of its own. Frozen parameters form a second byte vector in
the dtype of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch

from memopt.optim_types import UpdateRule

CHUNK = 1 << 20
"""Elements an update handles at a time: 4 MiB of weights. Part of the numerics of stochastic rounding, so it is
fixed."""

PAGE = 4096
MASTER_ITEMSIZE = 4
_LINE_BYTES = 64
"""A cache line: vector loads of every parameter start aligned."""


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
    rule: UpdateRule | None = None
    """How it is updated; None: it is frozen."""

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """This piece of a unit's vector (any dtype), as a view in its own shape and dtype."""
        raw = vector.view(torch.uint8)[self.offset_bytes : self.offset_bytes + self.nbytes]
        return raw.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Segment:
    """A run of a unit's master vector that one rule updates: elements `start` to `stop`, whole pages."""

    name: str
    """What its tensors in the store are called by."""
    rule: UpdateRule
    start: int
    stop: int
    decay_numel: int
    """Elements at its front that get weight decay."""
    record_start: int
    """Where its records begin among those of the unit, in bytes; on a page."""

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def span_numel(self) -> int:
        """Elements updated together; the last ones may be fewer."""
        whole = self.rule.whole
        if not whole:
            return min(CHUNK, self.numel)
        return whole if whole * MASTER_ITEMSIZE % PAGE == 0 else self.numel

    @cached_property
    def span_record_bytes(self) -> int:
        """Bytes of optimizer state of a whole span."""
        return self.rule.record_bytes(self.span_numel)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of optimizer state."""
        full, rest = divmod(self.numel, self.span_numel)
        return full * self.span_record_bytes + (self.rule.record_bytes(rest) if rest else 0)

    @cached_property
    def scratch_bytes(self) -> int:
        """Bytes of temporaries that the update of a span takes."""
        return self.rule.scratch_bytes(self.span_numel)


@dataclass(frozen=True)
class Span:
    """Elements `start` to `stop` of a unit's master vector that are updated together, with their record."""

    segment: Segment
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def decay_numel(self) -> int:
        """Elements at its front that get weight decay."""
        return min(max(self.segment.decay_numel - self.offset, 0), self.numel)

    @property
    def offset(self) -> int:
        """Elements between the start of the segment and its own."""
        return self.start - self.segment.start

    @property
    def record_offset(self) -> int:
        """Bytes of records between the start of the segment's and its own."""
        return self.offset // self.segment.span_numel * self.segment.span_record_bytes

    @property
    def record_bytes(self) -> int:
        whole = self.numel == self.segment.span_numel
        return self.segment.span_record_bytes if whole else self.segment.rule.record_bytes(self.numel)


@dataclass(frozen=True)
class Unit:
    """A named lump of parameters. `trained` is the float32 master vector, `frozen` the read-only byte vector."""

    name: str
    kind: UnitKind
    index: int
    trained: tuple[Piece, ...] = ()
    frozen: tuple[Piece, ...] = ()

    @cached_property
    def numel(self) -> int:
        """Elements of the master vector, padded to whole pages."""
        used = max((p.offset_bytes + p.nbytes for p in self.trained), default=0)
        return _up(used, PAGE) // MASTER_ITEMSIZE

    @cached_property
    def params(self) -> int:
        """Trainable parameters, padding not counted."""
        return sum(p.numel for p in self.trained)

    @cached_property
    def master_bytes(self) -> int:
        return self.numel * MASTER_ITEMSIZE

    @cached_property
    def frozen_bytes(self) -> int:
        return _up(max((p.offset_bytes + p.nbytes for p in self.frozen), default=0), PAGE)

    @property
    def rows(self) -> tuple[int, int]:
        """Rows [first, last) of the table this tile holds."""
        piece = (self.trained or self.frozen)[0]
        return piece.row, piece.row + piece.shape[0]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The master vector by update rule, in order and without gaps."""
        found: list[Segment] = []
        record = 0
        for pieces in _runs(self.trained):
            rule, start = pieces[0].rule, pieces[0].offset_bytes // MASTER_ITEMSIZE
            assert rule is not None
            end = pieces[-1].offset_bytes + pieces[-1].nbytes
            decayed = max((p.offset_bytes + p.nbytes for p in pieces if p.decay), default=pieces[0].offset_bytes)
            segment = Segment(
                f"{self.name}.{len(found)}" if found else self.name,
                rule,
                start,
                _up(end, PAGE) // MASTER_ITEMSIZE,
                decayed // MASTER_ITEMSIZE - start,
                record,
            )
            found.append(segment)
            record = _up(record + segment.record_bytes, PAGE)
        return tuple(found)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """What an update walks."""
        return tuple(
            Span(s, a, min(a + s.span_numel, s.stop))
            for s in self.segments
            for a in range(s.start, s.stop, s.span_numel)
        )

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of the records of all segments, each from a page on."""
        return max((_up(s.record_start + s.record_bytes, PAGE) for s in self.segments), default=0)

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
    rule: UpdateRule | None
    """How it is trained; None: not at all."""
    decay: bool

    @property
    def trainable(self) -> bool:
        return self.rule is not None


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
    """Lay whole parameters out in one unit: rule by rule, decayed ones first, then those that are updated whole."""
    specs = list(specs)
    order: dict[UpdateRule, int] = {}
    for spec in specs:
        if spec.rule is not None:
            order.setdefault(spec.rule, len(order))

    def place(spec: ParameterSpec) -> tuple[bool, int, bool]:
        assert spec.rule is not None
        return (True, 0, False) if spec.rule.whole else (False, order[spec.rule], not spec.decay)

    trained = sorted((s for s in specs if s.trainable), key=place)
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
    pieces: list[Piece] = []
    at = 0
    for spec, shape, dtype, row in items:
        rule = spec.rule
        if rule is not None and pieces and _parted(pieces[-1].rule, rule):
            at = _up(at, PAGE)
        at = _up(at, _LINE_BYTES if rule is None else math.lcm(_LINE_BYTES, rule.block * MASTER_ITEMSIZE))
        pieces.append(Piece(spec.name, tuple(shape), dtype, at, spec.decay, row, rule))
        at += pieces[-1].nbytes
    return tuple(pieces)


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces by segment."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if not runs or _parted(runs[-1][-1].rule, piece.rule):
            runs.append([])
        runs[-1].append(piece)
    return runs


def _parted(before: UpdateRule | None, after: UpdateRule | None) -> bool:
    """Whether a new segment begins between two parameters with these rules."""
    return before != after or (after is not None and after.whole > 0)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
