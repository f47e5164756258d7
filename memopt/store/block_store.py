"""Named tensors on the SSD that survive a crash: aligned extents, checksums, two versions and an atomic commit.

A directory holds one preallocated file per kind of tensor, and the small files of `manifest`. What was written since
the last commit is what reads return, and what a crash forgets: `BlockStore.open` finds exactly the last durable commit.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from memopt.errors import StoreError
from memopt.store import directory as on_disk
from memopt.store import manifest as records
from memopt.store.errors import StoreClosed, StoreCorrupt, StoreReadOnly, StoreUnwritten
from memopt.store.extents import CHUNK_BYTES, Extent, KindPolicy, Op, TensorSpec
from memopt.store.files import DirectFile
from memopt.store.transfer import Hook, IoPool, Piece, SerialThread, Transfer


class BlockStore:
    """Tensors by name; made by `create` or `open`. Safe to use from several threads.

    Requests on the same chunks take effect in the order they were made; the later one starts when the earlier one is
    done. The pool is the caller's: the store neither owns nor closes it.
    """

    def __init__(self, parts: on_disk.OpenParts, pool: IoPool) -> None:
        """Use `create` or `open`."""
        self.directory = parts.directory
        self.writable = parts.writable
        self._index = parts.index
        self._extents = parts.extents
        self._files = parts.files
        self._lock_file = parts.lock
        self._pool = pool
        self._meta = parts.manifest.meta
        self._commits = parts.manifest.commit
        self._lock = threading.Lock()
        self._dirty: set[Extent] = set()
        self._writes: set[Transfer] = set()  # under way, of kinds with versions: what a commit waits for
        self._all: set[Transfer] = set()  # everything under way: what close waits for
        self._committing = Transfer(0)  # the newest commit
        self._committer = SerialThread("memopt-commit")
        self._failed: BaseException | None = None
        self._closed = False

    @classmethod
    def create(
        cls,
        directory: str | Path,
        specs: Sequence[TensorSpec],
        *,
        kinds: Mapping[str, KindPolicy],
        pool: IoPool,
        chunk_bytes: int = CHUNK_BYTES,
        meta: Mapping[str, Any] | None = None,
    ) -> BlockStore:
        """Make a store with all of its space reserved; `meta` is that of its first, empty commit.

        Raises StoreForeign, StoreExists, StoreIncomplete, StoreVersion or StoreLocked by what is in the directory,
        StoreFull (with nothing left behind), BadInput for specs or a meta that cannot be stored.
        """
        parts = on_disk.create(Path(directory), tuple(specs), dict(kinds), chunk_bytes, dict(meta or {}))
        return cls(parts, pool)

    @classmethod
    def open(cls, directory: str | Path, pool: IoPool, writable: bool = True) -> BlockStore:
        """Open what `create` made, at its last durable commit. One writer, or many readers, at a time.

        Raises StoreMissing, StoreForeign, StoreIncomplete, StoreVersion, StoreLocked or StoreCorrupt.
        """
        return cls(on_disk.open_parts(Path(directory), writable=writable), pool)

    @staticmethod
    def destroy(directory: str | Path) -> None:
        """Remove the files a store's marker lists, and the directory if nothing else is in it.

        Raises StoreMissing or StoreForeign where there is no marker, StoreLocked while the store is in use.
        """
        on_disk.destroy(Path(directory))

    @property
    def id(self) -> str:
        """What tells this store from every other one."""
        return self._index.id

    @property
    def chunk_bytes(self) -> int:
        """Where writes may start and stop, and what one checksum covers, unless the tensor's spec says otherwise."""
        return self._index.chunk_bytes

    @property
    def kinds(self) -> dict[str, KindPolicy]:
        """How each kind is kept."""
        return self._index.kinds

    @property
    def meta(self) -> dict[str, Any]:
        """The user's meta of the last durable commit."""
        with self._lock:
            return self._meta

    @property
    def commits(self) -> int:
        """How many commits are durable; 0 in a new store."""
        with self._lock:
            return self._commits

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of `create` within each kind."""
        return list(self._extents)

    @property
    def written_names(self) -> list[str]:
        """The tensors that can be read as a whole, committed or not."""
        with self._lock:
            return [name for name, extent in self._extents.items() if extent.whole()]

    @property
    def direct(self) -> bool:
        """Whether all files bypass the page cache; `why_not_direct` has the reason where not."""
        return not self.why_not_direct

    @property
    def why_not_direct(self) -> str:
        """Why some file goes through the page cache; empty if none does."""
        return next((file.reason for file in self._files.values() if not file.direct), "")

    def spec(self, name: str) -> TensorSpec:
        """What `create` was given for a tensor. Raises StoreError for an unknown name."""
        return self._extent(name).spec

    def nbytes_on_disk(self) -> int:
        """Bytes the whole store takes on the disk, by block counts."""
        return on_disk.disk_bytes(self.directory)

    def chunk_bytes_of(self, name: str) -> int:
        """Where writes of a tensor may start and stop, and what one checksum of it covers. Raises as `spec`."""
        return self._extent(name).chunk_bytes

    def read(self, name: str, view: memoryview, offset: int = 0) -> Transfer:
        """Fill `view` with the newest content from byte `offset` on: what was written since the last commit where
        there is such, chunk by chunk, else what was committed.

        The range starts at a multiple of 4096 and ends at one or at the end of the tensor; the view has to be aligned
        for direct I/O. Whole chunks are checked against their checksums, parts of a chunk are not. Raises
        StoreUnwritten, StoreMisaligned; the ticket raises StoreCorrupt, StoreIOError.
        """
        return self._issue(self._extent(name), view, offset, write=False)

    def write(self, name: str, view: memoryview, offset: int = 0) -> Transfer:
        """Write new content from byte `offset` on; durable, as a part of all, with the next commit.

        The range starts at a multiple of `chunk_bytes_of(name)` and ends at one or at the end of the tensor. A tensor
        touched between two commits has to be rewritten as a whole before the second. While a commit is under way, a
        write to a kind with versions starts when that commit is over. Raises StoreReadOnly, StoreMisaligned; the ticket
        raises StoreIOError, StoreFull.
        """
        extent = self._extent(name)
        if not self.writable:
            raise StoreReadOnly(f"{self.directory} was opened read-only; open it with writable=True to write {name!r}")
        if extent.policy.versions:
            self._require_sound()
        return self._issue(extent, view, offset, write=True)

    def commit(self, meta: Mapping[str, Any] | None = None) -> Transfer:
        """Make all writes issued so far the durable state, together with `meta` (None keeps the last one).

        Runs in the background, one commit after the other. The ticket raises StoreUnwritten, naming the tensors, when
        one was rewritten only in part or a write failed: nothing is committed then, and one may write on and try
        again. After a failure of the drive itself the store takes no more writes and must be opened anew. Raises
        BadInput for a meta that JSON cannot hold.
        """
        if not self.writable:
            raise StoreReadOnly(f"{self.directory} was opened read-only; open it with writable=True to commit")
        self._require_sound()
        if meta is not None:
            records.encode_manifest(self._index.id, 0, meta, "", b"")  # a bad meta shows here, not in the background
            meta = dict(meta)
        with self._lock:
            self._require_open()
            before = list(self._writes)
            self._committing = self._committer.run(lambda: self._commit(meta, before))
            return self._committing

    def close(self) -> None:
        """Wait for what is under way, then close the files and release the lock. Does not commit."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            under_way = list(self._all)
        for ticket in under_way:
            _settled(ticket)
        self._committer.close()
        for file in self._files.values():
            file.close()
        self._lock_file.release()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _extent(self, name: str) -> Extent:
        try:
            return self._extents[name]
        except KeyError:
            raise StoreError(f"{self.directory} has no tensor {name!r}; it holds {len(self._extents)} others") from None

    def _require_open(self) -> None:
        if self._closed:
            raise StoreClosed(f"the store {self.directory} was closed before this request")

    def _require_sound(self) -> None:
        if self._failed is not None:
            raise StoreError(
                f"{self.directory} takes no writes after a failed commit ({self._failed}); "
                "close it and open it anew: it will be at its last durable commit"
            )

    def _issue(self, extent: Extent, view: memoryview, offset: int, *, write: bool) -> Transfer:
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        first, last = extent.chunks_of(offset, len(view), write=write)
        versioned = write and extent.policy.versions > 0
        with self._lock:
            self._require_open()
            earlier = extent.conflicts(first, last, write=write)
            if versioned and not self._committing.done():
                earlier.append(self._committing)
            ticket = Transfer() if earlier else self._start(extent, view, offset, write=write)
            op = Op(first, last, write, ticket)
            extent.under_way.append(op)
            self._all.add(ticket)
            if versioned:
                self._writes.add(ticket)
        ticket.then(lambda _: self._over(extent, op, moved=not earlier))
        if earlier:
            # Whether the earlier ones failed is for their callers; the chunks themselves tell what can be done.
            Transfer.all(earlier).then(lambda _: self._start_late(extent, op, view, offset))
        return ticket

    def _start_late(self, extent: Extent, op: Op, view: memoryview, offset: int) -> None:
        try:
            if op.write and extent.policy.versions:
                self._require_sound()
            with self._lock:
                inner = self._start(extent, view, offset, write=op.write)
        except BaseException as error:
            op.ticket.complete(error)
            return
        inner.then(lambda part: self._landed(extent, op, part.error))

    def _start(self, extent: Extent, view: memoryview, offset: int, *, write: bool) -> Transfer:
        """Cut the range into pieces of whole chunks of one slot each and hand them to the pool. Under the lock."""
        if write:
            extent.check_writable()
        size = extent.chunk_bytes
        most = max(1, self._pool.piece_bytes // size)
        pieces: list[Piece] = []
        places: list[tuple[int, int]] = []  # (slot, offset in the extent) of each piece
        at, end = offset, offset + len(view)
        while at < end:
            chunk = at // size
            slot = extent.write_slot if write else extent.slot_of(chunk)
            stop = (chunk + 1) * size
            for following in range(chunk + 1, min(chunk + most, len(extent.state))):
                if stop >= end or (not write and extent.slot_of(following) != slot):
                    break
                stop += size
            stop = min(stop, end)
            # What is beyond the content of the last chunk is padding, which belongs to the same piece.
            stop = end if stop >= extent.spec.nbytes else stop
            pieces.append((view[at - offset : stop - offset], extent.offsets[slot] + at))
            places.append((slot, at))
            at = stop
        file = self._files[extent.spec.kind]
        hook = (_stamp if write else _verify)(extent, places, file) if extent.policy.verify else None
        ticket = self._pool.submit(file, pieces, write=write, hook=hook)
        if write:
            extent.mark_fresh(offset // size, (min(end, extent.spec.nbytes) - 1) // size)
            if extent.policy.versions:
                self._dirty.add(extent)
        return ticket

    def _landed(self, extent: Extent, op: Op, error: BaseException | None) -> None:
        if op.write and error is not None:
            with self._lock:
                extent.mark_broken(op.first, op.last)
        op.ticket.complete(error)

    def _over(self, extent: Extent, op: Op, *, moved: bool) -> None:
        with self._lock:
            extent.under_way.remove(op)
            self._all.discard(op.ticket)
            self._writes.discard(op.ticket)
            if moved and op.write and op.ticket.error is not None:
                extent.mark_broken(op.first, op.last)

    def _commit(self, meta: dict[str, Any] | None, before: list[Transfer]) -> None:
        cause = next((error for error in map(_settled, before) if error is not None), None)
        self._require_sound()
        # No write to a kind with versions starts while this runs: `_issue` holds them back until the ticket is done.
        with self._lock:
            dirty = set(self._dirty)
            if meta is None:
                meta = self._meta
        trouble = sorted(filter(None, (extent.trouble() for extent in dirty)))
        if trouble or cause is not None:
            raise StoreUnwritten(
                f"{self.directory}: a commit needs all of a tensor; incomplete: {', '.join(trouble[:5]) or cause}"
                f"{' and others' if len(trouble) > 5 else ''}; write the rest, then commit again"
            ) from cause
        slots, sums = records.pack(tuple(self._extents.values()), dirty)
        text = records.encode_manifest(self._index.id, self._commits + 1, meta, slots, sums)
        try:
            for kind in {extent.spec.kind for extent in dirty}:
                self._files[kind].sync()
        except BaseException as error:
            self._failed = error  # after a failed sync nothing tells which of the written bytes are on the medium
            raise
        try:
            records.replace(self.directory, records.MANIFEST, text)
        except records.UnknownOutcome as error:
            self._failed = error
            raise
        with self._lock:
            for extent in dirty:
                extent.settle()
            self._dirty -= dirty
            self._meta = meta
            self._commits += 1


def _stamp(extent: Extent, places: list[tuple[int, int]], file: DirectFile) -> Hook:
    """Take the checksums of the chunks of a piece before it is written."""

    def stamp(index: int, view: memoryview) -> None:
        slot, at = places[index]
        size = extent.chunk_bytes
        for chunk in range(at // size, -(-min(at + len(view), extent.spec.nbytes) // size)):
            start = chunk * size - at
            extent.sums[slot][chunk] = xxhash.xxh3_64_intdigest(view[start : start + extent.chunk_size(chunk)])

    return stamp


def _verify(extent: Extent, places: list[tuple[int, int]], file: DirectFile) -> Hook:
    """Compare the checksums of the whole chunks of a piece after it was read."""

    def verify(index: int, view: memoryview) -> None:
        slot, at = places[index]
        size = extent.chunk_bytes
        for chunk in range(-(-at // size), len(extent.state)):
            start, length = chunk * size - at, extent.chunk_size(chunk)
            if start + length > len(view):
                return
            found, expected = xxhash.xxh3_64_intdigest(view[start : start + length]), extent.sums[slot][chunk]
            if found != expected:
                place = extent.offsets[slot] + chunk * size
                raise StoreCorrupt(
                    f"tensor {extent.spec.name!r}: the {length} bytes at {place} of {file.path} are not what was "
                    f"written (checksum {found:016x}, expected {expected:016x}); check the drive, then restore the "
                    "store from a backup or start over"
                )

    return verify


def _settled(ticket: Transfer) -> BaseException | None:
    """Wait for a ticket; its error, if any, is returned."""
    try:
        ticket.wait()
    except BaseException as error:
        if error is not ticket.error:
            raise
    return ticket.error
