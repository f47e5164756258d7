"""The small files of a store: the marker that says it is ours, the index of its tensors, the manifest of each commit.

`memopt-store.json` is written first and removed last. `index.json` never changes. `manifest.json` is replaced by each
commit in one step. Index and manifest carry a checksum of their own text.
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

import memopt
from memopt.errors import BadInput, StoreError
from memopt.store.errors import StoreCorrupt, StoreExists, StoreVersion
from memopt.store.extents import Extent, KindPolicy, TensorSpec
from memopt.store.files import no_room

FORMAT = 1
MARKER, INDEX, MANIFEST, LOCK = "memopt-store.json", "index.json", "manifest.json", "lock"
TEMPORARY = ".tmp"
OWN_FILES = (INDEX, MANIFEST, MANIFEST + TEMPORARY, LOCK)

_KIND = re.compile(r"[a-z][a-z0-9_-]{0,40}")
_FILE = re.compile(r"[a-z][a-z0-9_-]*\.(bin|json|json\.tmp)|lock")


class UnknownOutcome(StoreError):
    """A commit failed where it may or may not have happened."""


@dataclass(frozen=True)
class Marker:
    """What `memopt-store.json` says."""

    id: str
    memopt: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """What never changes in a store."""

    id: str
    chunk_bytes: int
    kinds: dict[str, KindPolicy]
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Manifest:
    """One commit: its number, the user's meta, and per tensor the committed slot (`0`, `1`, `-`) and its sums."""

    id: str
    commit: int
    meta: dict[str, Any]
    slots: str
    sums: bytes


def data_file(kind: str) -> str:
    """The name of the file that holds a kind. Raises BadInput for a kind that cannot name a file."""
    if not _KIND.fullmatch(kind):
        raise BadInput(f"kind {kind!r}: use lower-case letters, digits, '-' and '_', a letter first")
    return f"{kind}.bin"


def write_marker(directory: Path, store_id: str, files: Sequence[str]) -> None:
    """Claim the directory. Raises StoreExists if it is claimed already."""
    marker = {"format": FORMAT, "memopt": memopt.__version__, "id": store_id, "files": [*files, *OWN_FILES]}
    path = directory / MARKER
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError as error:
        raise StoreExists(f"{directory} holds a store already; resume it, or remove it first (memopt clean)") from error
    except OSError as error:
        raise _cannot_write(path, error, 0) from error
    _write_out(path, fd, json.dumps(marker, indent=1).encode() + b"\n")
    sync_directory(directory)


def read_marker(directory: Path, *, any_format: bool = False) -> Marker:
    """Raises StoreVersion for another format (unless `any_format`), StoreCorrupt for one that makes no sense."""
    path = directory / MARKER
    try:
        raw = json.loads(_read(path))
        marker = Marker(str(raw["id"]), str(raw["memopt"]), tuple(raw["files"]))
        found = int(raw["format"])
        if (found == FORMAT or any_format) and not all(
            isinstance(name, str) and _FILE.fullmatch(name) for name in marker.files
        ):
            raise ValueError("it lists names that no store has")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"{path} is damaged ({error}); nothing was touched, remove the store by hand") from error
    if found != FORMAT and not any_format:
        raise StoreVersion(
            f"{directory} was made by memopt {marker.memopt} in store format {found}, this is memopt "
            f"{memopt.__version__} with format {FORMAT}; use that version, or remove the store (memopt clean)"
        )
    return marker


def write_index(directory: Path, index: Index) -> None:
    """Write what never changes, durably."""
    body = {
        "id": index.id,
        "chunk_bytes": index.chunk_bytes,
        "kinds": {kind: asdict(policy) for kind, policy in index.kinds.items()},
        "tensors": [[s.name, s.kind, s.nbytes, dict(s.meta), s.chunk_bytes] for s in index.specs],
    }
    replace(directory, INDEX, _sealed(body, "TensorSpec.meta"))


def read_index(directory: Path) -> Index:
    """Raises StoreCorrupt if it is not as it was written."""
    body = _unsealed(directory / INDEX)
    return Index(
        body["id"],
        body["chunk_bytes"],
        {kind: KindPolicy(**policy) for kind, policy in body["kinds"].items()},
        tuple(TensorSpec(*tensor) for tensor in body["tensors"]),
    )


def encode_manifest(store_id: str, commit: int, meta: Mapping[str, Any], slots: str, sums: bytes) -> bytes:
    """The text of a manifest. Raises BadInput for a meta that JSON cannot hold."""
    text = base64.b64encode(sums).decode("ascii")
    body = {"id": store_id, "commit": commit, "slots": slots, "sums": text, "meta": dict(meta)}
    return _sealed(body, "the meta of the commit")


def read_manifest(directory: Path) -> Manifest:
    """The last durable commit. Raises StoreCorrupt if it is not as it was written."""
    path = directory / MANIFEST
    body = _unsealed(path)
    try:
        sums = base64.b64decode(body["sums"], validate=True)
    except binascii.Error as error:
        raise StoreCorrupt(f"{path}: its checksums cannot be decoded ({error})") from error
    return Manifest(body["id"], body["commit"], body["meta"], body["slots"], sums)


def pack(extents: Sequence[Extent], fresh: set[Extent]) -> tuple[str, bytes]:
    """Slots and sums of all extents as they will be once those in `fresh` are committed."""
    slots: list[str] = []
    sums: list[bytes] = []
    for extent in extents:
        slot = extent.write_slot if extent in fresh else extent.committed
        slots.append("-" if slot is None else str(slot))
        if slot is not None:
            sums.append(extent.sums[slot].tobytes())
    return "".join(slots), b"".join(sums)


def unpack(extents: Sequence[Extent], manifest: Manifest, path: Path) -> None:
    """Give fresh extents the committed state of a manifest. Raises StoreCorrupt if the two do not belong together."""
    sums = array("Q")
    sums.frombytes(manifest.sums)
    wanted = sum(len(extent.state) for extent, slot in zip(extents, manifest.slots, strict=False) if slot != "-")
    if len(manifest.slots) != len(extents) or len(sums) != wanted:
        raise StoreCorrupt(f"{path} and {INDEX} do not belong together; restore both from one backup")
    at = 0
    for extent, slot in zip(extents, manifest.slots, strict=True):
        if slot == "-":
            continue
        extent.committed = int(slot)
        count = len(extent.state)
        extent.sums[extent.committed] = sums[at : at + count]
        at += count


def replace(directory: Path, name: str, text: bytes) -> None:
    """Replace a file in one durable step. Raises StoreFull or StoreError with the old one in place, or UnknownOutcome
    when it failed after the point of no return."""
    temporary = directory / (name + TEMPORARY)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cannot_write(temporary, error, len(text)) from error
    _write_out(temporary, fd, text)
    try:
        os.rename(temporary, directory / name)
        sync_directory(directory)
    except OSError as error:
        raise UnknownOutcome(f"{directory / name}: replacing it failed: {error.strerror}; check the drive") from error


def sync_directory(directory: Path) -> None:
    """Make the entries of a directory durable. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_out(path: Path, fd: int, text: bytes) -> None:
    try:
        left = memoryview(text)
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
    except OSError as error:
        raise _cannot_write(path, error, len(text)) from error
    finally:
        os.close(fd)


def _cannot_write(path: Path, error: OSError, nbytes: int) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(path, nbytes, "writing it")
    return StoreError(f"{path} cannot be written: {error.strerror}; check the directory and its permissions")


def _sealed(body: dict[str, Any], what: str) -> bytes:
    try:
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadInput(f"{what} cannot be written as JSON: {error}; use plain finite values") from error
    return b'{"xxh3":"%016x","body":' % xxhash.xxh3_64_intdigest(text) + text + b"}\n"


def _unsealed(path: Path) -> dict[str, Any]:
    raw = _read(path)
    head = len(b'{"xxh3":"0123456789abcdef","body":')
    text = raw[head:-2]
    if raw[:head] != b'{"xxh3":"%016x","body":' % xxhash.xxh3_64_intdigest(text):
        raise StoreCorrupt(f"{path} is damaged: its checksum does not fit its text; restore it from a backup")
    body: dict[str, Any] = json.loads(text)
    return body


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; check the directory and its permissions") from error
