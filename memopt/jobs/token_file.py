"""Packed token sequences on disk: a 4 KiB JSON header, then one record of `seq_len` int32 tokens and flags each.

A file appears under its name only when it is whole (written aside, synced, renamed), and is read with `pread`, so that
its bytes are file pages and never the process's own memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import BadInput, StoreError
from memopt.jobs.packing import LOSS, PAD, START
from memopt.jobs.packing import Sequence as Packed

FORMAT = "memopt.tokens/1"
_HEADER_BYTES = 4096
_BYTES_PER_TOKEN = 5


def write_token_file(path: Path, sequences: Iterable[Packed], seq_len: int, about: dict[str, Any]) -> None:
    """Write `sequences` (tokens and flags, each (seq_len,)) to `path`, atomically; `about` joins the header.

    Raises StoreError when the disk refuses; whatever goes wrong, no file and no half of one is left.
    """
    part = path.with_name(path.name + ".part")
    digest = hashlib.blake2b(digest_size=16)
    counts = {"sequences": 0, "tokens": 0, "target_tokens": 0, "documents": 0, "padding": 0}
    try:
        with open(part, "wb") as file:
            file.write(bytes(_HEADER_BYTES))
            for tokens, flags in sequences:
                record = tokens.astype("<i4", copy=False).tobytes() + flags.tobytes()
                digest.update(record)
                file.write(record)
                _count(counts, flags)
            header = {"format": FORMAT, "seq_len": seq_len, "hash": digest.hexdigest(), **counts, **about}
            encoded = json.dumps(header).encode()
            if len(encoded) > _HEADER_BYTES:
                raise StoreError(f"{path}: its description takes {len(encoded)} bytes of {_HEADER_BYTES}")
            file.seek(0)
            file.write(encoded.ljust(_HEADER_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot write the tokens ({error.strerror}); free some space there or name another directory"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


class TokenFile:
    """A token file open for reading. Raises StoreError when it is not one, or is cut short."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error.strerror}); check the directory") from None
        try:
            self.header = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise
        self.seq_len: int = self.header["seq_len"]

    def _read_header(self) -> dict[str, Any]:
        try:
            header: dict[str, Any] = json.loads(os.pread(self._fd, _HEADER_BYTES, 0))
            whole = _HEADER_BYTES + header["sequences"] * header["seq_len"] * _BYTES_PER_TOKEN
        except (ValueError, KeyError, TypeError):
            header, whole = {}, 0
        if header.get("format") != FORMAT:
            raise StoreError(f"{self.path}: not a token file of this memopt; delete it to have it remade")
        size = os.fstat(self._fd).st_size
        if size != whole:
            raise StoreError(f"{self.path}: {size} bytes where its header says {whole}; delete it to have it remade")
        return header

    def __len__(self) -> int:
        return int(self.header["sequences"])

    @property
    def content_hash(self) -> str:
        """Hash of all tokens and flags: equal hashes are equal training data."""
        return str(self.header["hash"])

    def read(self, indices: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Tokens and flags of some sequences, each (len(indices), seq_len)."""
        tokens = np.empty((len(indices), self.seq_len), np.int32)
        flags = np.empty((len(indices), self.seq_len), np.uint8)
        size = self.seq_len * _BYTES_PER_TOKEN
        for row, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"{self.path}: sequence {index} of {len(self)}")
            record = os.pread(self._fd, size, _HEADER_BYTES + index * size)
            if len(record) != size:
                raise StoreError(f"{self.path}: short read of sequence {index}; the file was changed while in use")
            tokens[row] = np.frombuffer(record, "<i4", self.seq_len)
            flags[row] = np.frombuffer(record, np.uint8, self.seq_len, offset=4 * self.seq_len)
        return tokens, flags

    def verify(self) -> None:
        """Read it all and compare with the hash in the header. Raises StoreError when a byte has changed."""
        digest = hashlib.blake2b(digest_size=16)
        size = self.seq_len * _BYTES_PER_TOKEN
        for index in range(len(self)):
            digest.update(os.pread(self._fd, size, _HEADER_BYTES + index * size))
        if digest.hexdigest() != self.content_hash:
            raise StoreError(f"{self.path}: its bytes do not match their hash; delete it to have it remade")

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def require_targets(file: TokenFile, source: str) -> None:
    """BadInput when `file` holds nothing to learn."""
    if len(file) == 0:
        raise BadInput(f"data {source}: holds no text at all; give some")
    if file.header["target_tokens"] == 0:
        raise BadInput(f"data {source}: no token has a predecessor to be predicted from; give longer documents")


def _count(counts: dict[str, int], flags: NDArray[np.uint8]) -> None:
    padding = int(np.count_nonzero(flags & PAD))
    counts["sequences"] += 1
    counts["padding"] += padding
    counts["tokens"] += len(flags) - padding
    # the label of a sequence's first token is dropped by the shift
    counts["target_tokens"] += int(np.count_nonzero(flags[1:] & LOSS))
    counts["documents"] += int(np.count_nonzero(flags & START)) - (1 if padding else 0)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
