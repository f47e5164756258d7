"""A store as a directory: making it, opening it, removing it, and telling it from what is not ours."""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.errors import BadInput, StoreError
from memopt.store import manifest as records
from memopt.store.errors import StoreCorrupt, StoreExists, StoreForeign, StoreIncomplete, StoreMissing
from memopt.store.extents import Extent, KindPolicy, TensorSpec, lay_out
from memopt.store.files import BLOCK_BYTES, DirectFile, free_bytes, no_room
from memopt.store.locks import StoreLock

_HARMLESS = {"lost+found"}  # what a fresh file system has


@dataclass(frozen=True)
class OpenParts:
    """All a `BlockStore` is made of; `extents` by name, `files` by kind."""

    directory: Path
    writable: bool
    index: records.Index
    manifest: records.Manifest
    extents: dict[str, Extent]
    files: dict[str, DirectFile]
    lock: StoreLock


def create(
    directory: Path,
    specs: tuple[TensorSpec, ...],
    kinds: dict[str, KindPolicy],
    chunk_bytes: int,
    meta: dict[str, Any],
) -> OpenParts:
    """Lay a new store out in a new or empty directory; on any failure what was made is removed again."""
    _check(specs, kinds, chunk_bytes)
    extents, sizes = lay_out(specs, kinds, chunk_bytes)
    index = records.Index(uuid.uuid4().hex, chunk_bytes, kinds, specs)
    first = records.Manifest(index.id, 0, meta, "-" * len(extents), b"")
    text = records.encode_manifest(first.id, 0, meta, first.slots, b"")
    made = _make_directory(directory)
    with contextlib.ExitStack() as undo:
        if made:
            undo.callback(_remove_directory, directory)
        _refuse_occupied(directory)
        lock = StoreLock(directory / records.LOCK, exclusive=True)
        undo.callback(_unlink, directory / records.LOCK)
        undo.callback(lock.release)
        names = {kind: records.data_file(kind) for kind in kinds}
        records.write_marker(directory, index.id, list(names.values()))
        undo.callback(_unlink, directory / records.MARKER)
        total = sum(sizes.values())
        if free_bytes(directory) < total:
            raise no_room(directory, total, "the store")
        files: dict[str, DirectFile] = {}
        for kind, name in names.items():
            files[kind] = DirectFile.create(directory / name, sizes[kind], padded=True)
            undo.callback(_unlink, directory / name)
            undo.callback(files[kind].close)
        for name in records.OWN_FILES:
            if name != records.LOCK:
                undo.callback(_unlink, directory / name)
        records.write_index(directory, index)
        records.replace(directory, records.MANIFEST, text)
        undo.pop_all()
    return OpenParts(directory, True, index, first, extents, files, lock)


def open_parts(directory: Path, *, writable: bool) -> OpenParts:
    """Read what is there and check that it is whole."""
    _require_marker(directory)
    records.read_marker(directory)
    with contextlib.ExitStack() as undo:
        lock = StoreLock(directory / records.LOCK, exclusive=writable)
        undo.callback(lock.release)
        _require_manifest(directory)
        index, manifest = records.read_index(directory), records.read_manifest(directory)
        extents, sizes = lay_out(index.specs, index.kinds, index.chunk_bytes)
        if index.id != manifest.id:
            raise StoreCorrupt(f"{directory}: index and manifest are of two stores; restore both from one backup")
        records.unpack(tuple(extents.values()), manifest, directory / records.MANIFEST)
        files: dict[str, DirectFile] = {}
        for kind, policy in index.kinds.items():
            path = directory / records.data_file(kind)
            if policy.versions:
                file = _open_data(path, sizes[kind], writable=writable)
            elif writable:
                file = _open_scratch(path, sizes[kind])
            else:
                continue
            files[kind] = file
            undo.callback(file.close)
        undo.pop_all()
    return OpenParts(directory, writable, index, manifest, extents, files, lock)


def destroy(directory: Path) -> None:
    """Remove what the marker lists; the marker goes last, so that an interrupted removal can be repeated."""
    _require_marker(directory)
    marker = records.read_marker(directory, any_format=True)
    lock = StoreLock(directory / records.LOCK, exclusive=True)
    try:
        for name in marker.files:
            if name != records.LOCK:
                _unlink(directory / name)
        _unlink(directory / records.LOCK)
        _unlink(directory / records.MARKER)
    finally:
        lock.release()
    _remove_directory(directory)


def disk_bytes(directory: Path) -> int:
    """Bytes on the disk of the marker and all it lists."""
    total = 0
    for name in (records.MARKER, *records.read_marker(directory).files):
        with contextlib.suppress(FileNotFoundError):
            total += os.lstat(directory / name).st_blocks * 512
    return total


def _check(specs: tuple[TensorSpec, ...], kinds: dict[str, KindPolicy], chunk_bytes: int) -> None:
    if chunk_bytes <= 0 or chunk_bytes % BLOCK_BYTES:
        raise BadInput(f"chunk_bytes is {chunk_bytes}; it must be a positive multiple of {BLOCK_BYTES}")
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise BadInput(f"tensor {spec.name!r} is listed twice; names must differ")
        if spec.kind not in kinds:
            raise BadInput(f"tensor {spec.name!r} is of kind {spec.kind!r}, which has no policy; add it to kinds")
        seen.add(spec.name)
    for kind in kinds:
        records.data_file(kind)


def _make_directory(directory: Path) -> bool:
    """Whether it had to be made."""
    if directory.is_dir():
        return False
    if directory.exists() or directory.is_symlink():
        raise StoreError(f"{directory} is not a directory; name one that is, or that does not exist yet")
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise StoreError(f"{directory} cannot be made: {error.strerror}; check the path and its permissions") from error
    return True


def _entries(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory)) - _HARMLESS
    except OSError as error:
        raise StoreError(f"{directory} cannot be listed: {error.strerror}; check its permissions") from error


def _refuse_occupied(directory: Path) -> None:
    there = _entries(directory)
    if records.MARKER in there:
        records.read_marker(directory)
        _require_manifest(directory)
        raise StoreExists(f"{directory} holds a store already; resume it, or remove it first (memopt clean)")
    # An empty lock alone is what a creation leaves that was killed at its very start.
    lock = directory / records.LOCK
    if there and not (there == {records.LOCK} and lock.is_file() and lock.stat().st_size == 0):
        raise _foreign(directory, there)


def _require_marker(directory: Path) -> None:
    if not directory.exists():
        raise StoreMissing(f"{directory} does not exist; there is no store to open")
    if not directory.is_dir():
        raise StoreError(f"{directory} is not a directory, so it is no store")
    there = _entries(directory)
    if records.MARKER not in there:
        if there:
            raise _foreign(directory, there)
        raise StoreMissing(f"{directory} is empty; there is no store to open")


def _require_manifest(directory: Path) -> None:
    if not (directory / records.MANIFEST).exists():
        raise StoreIncomplete(
            f"{directory}: making this store was interrupted, nothing was saved in it; remove it (memopt clean) and "
            "start over"
        )


def _foreign(directory: Path, there: set[str]) -> StoreForeign:
    return StoreForeign(
        f"{directory} holds files that memopt did not make ({', '.join(sorted(there)[:3])}{', ...' * (len(there) > 3)})"
        " and no store; use an empty or a new directory"
    )


def _open_data(path: Path, nbytes: int, *, writable: bool) -> DirectFile:
    if not path.exists():
        raise StoreCorrupt(f"{path} is missing; restore it from a backup, or start over")
    file = DirectFile.open(path, writable=writable, padded=True)
    if file.nbytes != nbytes:
        file.close()
        raise StoreCorrupt(
            f"{path} has {file.nbytes} bytes instead of {nbytes}: it was cut off or extended; restore it, or start over"
        )
    return file


def _open_scratch(path: Path, nbytes: int) -> DirectFile:
    """The old file where it still fits, so that its blocks need not be reserved again."""
    if path.exists():
        file = DirectFile.open(path, writable=True, padded=True)
        if file.nbytes == nbytes and file.disk_bytes() >= nbytes:
            return file
        file.close()
        path.unlink()
    return DirectFile.create(path, nbytes, padded=True)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _remove_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # something else is in it, or it is a mount point: not ours to remove
        directory.rmdir()
