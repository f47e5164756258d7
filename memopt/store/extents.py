"""Where the bytes of a named tensor are: slots, chunks, and which of them hold the newest content.

An extent is one tensor's place in the file of its kind. A kind with two versions gives it two slots: the committed one
is never written; the other takes what is new, chunk by chunk, until a commit makes it the committed one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memopt.errors import BadInput
from memopt.store.errors import StoreMisaligned, StoreReadOnly, StoreUnwritten
from memopt.store.files import BLOCK_BYTES
from memopt.store.regions import round_up
from memopt.store.transfer import Transfer
from memopt.units import MiB

CHUNK_BYTES = 4 * MiB

_OLD, _FRESH, _BROKEN = 0, 1, 2


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be stored: any name without `/` and control characters, its kind, its size in bytes, and a small
    JSON-able `meta` (dtype, shape) that is handed back as it was. `chunk_bytes` is where its writes may start and stop,
    a multiple of 4096; None: the store's."""

    name: str
    kind: str
    nbytes: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or any(ord(char) < 32 or ord(char) == 127 for char in self.name):
            raise BadInput(f"tensor name {self.name!r}: empty, or has '/' or control characters; rename the tensor")
        if self.nbytes <= 0:
            raise BadInput(f"tensor {self.name!r}: {self.nbytes} bytes cannot be stored; leave empty tensors out")
        if self.chunk_bytes is not None and (self.chunk_bytes <= 0 or self.chunk_bytes % BLOCK_BYTES):
            raise BadInput(
                f"tensor {self.name!r}: chunk_bytes is {self.chunk_bytes}; make it a positive multiple of {BLOCK_BYTES}"
            )


@dataclass(frozen=True, kw_only=True)
class KindPolicy:
    """How the tensors of one kind are kept.

    `versions=2`: rewritten between commits, a crash brings the last commit back. `1`: written before the first commit
    that contains them, read-only from then on. `0`: scratch, gone when the store is closed. `verify=False` turns the
    checksums of the kind off.
    """

    versions: int = 2
    verify: bool = True

    def __post_init__(self) -> None:
        if self.versions not in (0, 1, 2):
            raise BadInput(f"KindPolicy.versions is {self.versions!r}; it must be 0 (scratch), 1 or 2")


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """A request under way on the chunks `first` to `last` of an extent."""

    first: int
    last: int
    write: bool
    ticket: Transfer


class Extent:
    """The state of one tensor. Not thread-safe: the store calls it under its lock, except for `sums`, whose entries
    belong to the request under way on their chunk."""

    __slots__ = ("chunk_bytes", "committed", "fresh_count", "offsets", "policy", "spec", "state", "sums", "under_way")

    def __init__(self, spec: TensorSpec, policy: KindPolicy, offsets: tuple[int, ...], chunk_bytes: int) -> None:
        chunks = -(-spec.nbytes // chunk_bytes)
        self.spec = spec
        self.policy = policy
        self.offsets = offsets
        self.chunk_bytes = chunk_bytes
        self.committed: int | None = None
        self.sums = [array("Q", bytes(8 * chunks)) for _ in offsets]
        self.state = bytearray(chunks)
        self.fresh_count = 0
        self.under_way: list[Op] = []

    @property
    def padded_bytes(self) -> int:
        """The size on the disk of one slot."""
        return round_up(self.spec.nbytes, BLOCK_BYTES)

    @property
    def write_slot(self) -> int:
        """The slot that takes new content."""
        return 1 - self.committed if self.committed is not None and self.policy.versions == 2 else 0

    def slot_of(self, chunk: int) -> int:
        """The slot with the newest content of a chunk. Raises StoreUnwritten where there is none."""
        state = self.state[chunk]
        if state == _FRESH:
            return self.write_slot
        if state == _OLD and self.committed is not None:
            return self.committed
        trouble = "its last write failed" if state == _BROKEN else "it was never written"
        raise StoreUnwritten(f"tensor {self.spec.name!r}: chunk {chunk} cannot be read, {trouble}; write it first")

    def chunk_size(self, chunk: int) -> int:
        """Bytes of content in a chunk; the last may be short."""
        return min(self.chunk_bytes, self.spec.nbytes - chunk * self.chunk_bytes)

    def chunks_of(self, offset: int, nbytes: int, *, write: bool) -> tuple[int, int]:
        """First and last chunk of a range. Raises StoreMisaligned if it is not one that can be moved."""
        end, total = offset + nbytes, self.spec.nbytes
        unit = self.chunk_bytes if write else BLOCK_BYTES
        at_end = end == total or end == self.padded_bytes
        if nbytes <= 0 or offset < 0 or offset % unit or (not at_end and (end % unit or end > total)):
            raise StoreMisaligned(
                f"tensor {self.spec.name!r} ({total} bytes): cannot {'write' if write else 'read'} {nbytes} bytes at "
                f"{offset}; start at a multiple of {unit} and stop at one, or at the end of the tensor"
            )
        return offset // self.chunk_bytes, (min(end, total) - 1) // self.chunk_bytes

    def conflicts(self, first: int, last: int, *, write: bool) -> list[Transfer]:
        """Requests under way that a new one on these chunks has to wait for."""
        return [op.ticket for op in self.under_way if op.first <= last and op.last >= first and (write or op.write)]

    def check_writable(self) -> None:
        """Raises StoreReadOnly for a committed tensor of a one-version kind."""
        if self.policy.versions == 1 and self.committed is not None:
            raise StoreReadOnly(
                f"tensor {self.spec.name!r} of kind {self.spec.kind!r} was committed and has one version only; "
                "give the kind two versions to rewrite it"
            )

    def mark_fresh(self, first: int, last: int) -> None:
        """New content is on its way to these chunks of the write slot."""
        self._mark(first, last, _FRESH)

    def mark_broken(self, first: int, last: int) -> None:
        """A write of these chunks failed: what the write slot holds there is unknown."""
        self._mark(first, last, _BROKEN)

    def whole(self) -> bool:
        """Whether all of the tensor can be read."""
        return self.fresh_count == len(self.state) or (self.committed is not None and _BROKEN not in self.state)

    def trouble(self) -> str:
        """Why what was written since the last commit cannot be committed; empty if it can."""
        if self.fresh_count == len(self.state):
            return ""
        broken = self.state.count(_BROKEN)
        reason = f", writing {broken} failed" if broken else ""
        return f"{self.spec.name!r} ({self.fresh_count} of {len(self.state)} chunks written{reason})"

    def settle(self) -> None:
        """The write slot was committed."""
        self.committed = self.write_slot
        self.state = bytearray(len(self.state))
        self.fresh_count = 0

    def _mark(self, first: int, last: int, state: int) -> None:
        was = self.state[first : last + 1].count(_FRESH)
        count = last + 1 - first
        self.state[first : last + 1] = bytes([state]) * count
        self.fresh_count += (count if state == _FRESH else 0) - was


def lay_out(
    specs: Iterable[TensorSpec], kinds: Mapping[str, KindPolicy], chunk_bytes: int
) -> tuple[dict[str, Extent], dict[str, int]]:
    """The extents by name and the file size by kind: all first slots in the order of `specs`, then all second ones.

    A pure function of its arguments: a store is laid out anew, not looked up, when it is opened.
    """
    by_kind: dict[str, list[TensorSpec]] = {kind: [] for kind in kinds}
    for spec in specs:
        by_kind[spec.kind].append(spec)
    extents: dict[str, Extent] = {}
    sizes: dict[str, int] = {}
    for kind, members in by_kind.items():
        slot_bytes = sum(round_up(spec.nbytes, BLOCK_BYTES) for spec in members)
        slots = max(1, kinds[kind].versions)
        at = 0
        for spec in members:
            offsets = tuple(at + slot * slot_bytes for slot in range(slots))
            extents[spec.name] = Extent(spec, kinds[kind], offsets, spec.chunk_bytes or chunk_bytes)
            at += round_up(spec.nbytes, BLOCK_BYTES)
        sizes[kind] = slot_bytes * slots
    return extents, sizes
