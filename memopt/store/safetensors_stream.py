"""Writing a safetensors file piece by piece: the header first, then each tensor when its bytes are at hand.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length of the header, the header
(JSON padded with spaces to 8 bytes), then the tensors back to back. With all tensors written, the file equals byte for
byte the one that `safetensors.torch.save_file` makes, which is what keeps every element aligned to its own size.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from memopt.errors import BadInput, StoreError
from memopt.units import MiB, format_bytes

# Ordered as safetensors orders its types: sorting by it, largest first, is what the reference writer does.
_TYPES: tuple[tuple[str, torch.dtype], ...] = (
    ("BOOL", torch.bool),
    ("U8", torch.uint8),
    ("I8", torch.int8),
    ("F8_E5M2", torch.float8_e5m2),
    ("F8_E4M3", torch.float8_e4m3fn),
    ("I16", torch.int16),
    ("U16", torch.uint16),
    ("F16", torch.float16),
    ("BF16", torch.bfloat16),
    ("I32", torch.int32),
    ("U32", torch.uint32),
    ("F32", torch.float32),
    ("C64", torch.complex64),
    ("F64", torch.float64),
    ("I64", torch.int64),
    ("U64", torch.uint64),
)
_CODE_OF = {dtype: code for code, dtype in _TYPES}
_DTYPE_OF = dict(_TYPES)
_RANK_OF = {dtype: rank for rank, (_, dtype) in enumerate(_TYPES)}

PIECE_BYTES = 8 * MiB
# Dirty pages are handed to the disk and dropped each time this much was written, so the page cache stays this small.
FLUSH_BYTES = 64 * MiB


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a tensor in a file will be, before its values are known."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in _CODE_OF:
            raise BadInput(f"{self.dtype} cannot be stored in a safetensors file; convert the tensor first")

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def dtype_from_code(code: str) -> torch.dtype | None:
    """The torch type behind a safetensors type code such as `BF16`; None when torch has none (packed 4-bit types)."""
    return _DTYPE_OF.get(code)


class SafetensorsWriter:
    """One safetensors file, its tensors written in any order.

    The file is created at its full size at once, so a full disk shows here and not in the middle. `close` raises when
    a tensor is missing; `abandon` closes without asking. As a context manager: `close` after success, else `abandon`.
    Raises StoreError, naming path and offset, when the disk refuses; FileExistsError when `path` exists.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        header, self._offsets, self.nbytes = _layout(specs, dict(metadata or {}))
        self._missing = dict(specs)
        self._dirty_bytes = 0
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._allocate()
            self._pwrite(memoryview(header), 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put the values of tensor `name` (on CPU, of the announced shape and type) in their place, once."""
        spec = self._missing.get(name)
        if spec is None:
            raise KeyError(f"{name} was not announced for {self.path}, or is already written")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"{name}: announced as {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if spec.nbytes:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self._pwrite(flat.numpy().data, self._offsets[name])
        del self._missing[name]

    @property
    def complete(self) -> bool:
        return not self._missing

    def close(self) -> None:
        """Make the file durable. Raises StoreError if a tensor was never written or the disk fails."""
        if self._fd < 0:
            return
        if self._missing:
            names = ", ".join(sorted(self._missing)[:3])
            self.abandon()
            raise StoreError(f"{self.path}: {len(self._missing)} tensors were never written ({names}, ...)")
        try:
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror} while making it durable") from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is; the caller removes it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _allocate(self) -> None:
        try:
            os.posix_fallocate(self._fd, 0, self.nbytes)
        except OSError as error:
            # a file system without preallocation tells about a full disk later, at the write
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                return
            raise self._refused(error, self.nbytes, 0) from error

    def _pwrite(self, data: memoryview, offset: int) -> None:
        position = 0
        while position < data.nbytes:
            piece = data[position : position + PIECE_BYTES]
            try:
                written = os.pwrite(self._fd, piece, offset + position)
                self._dirty_bytes += written
                if self._dirty_bytes >= FLUSH_BYTES:
                    os.fdatasync(self._fd)
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    self._dirty_bytes = 0
            except OSError as error:
                raise self._refused(error, data.nbytes - position, offset + position) from error
            if written <= 0:
                raise StoreError(f"{self.path}: nothing was written at offset {offset + position}")
            position += written

    def _refused(self, error: OSError, wanted_bytes: int, offset: int) -> StoreError:
        free = os.statvfs(self.path.parent)
        return StoreError(
            f"{self.path}: {error.strerror} writing {format_bytes(wanted_bytes)} at offset {offset}; "
            f"{format_bytes(free.f_bavail * free.f_frsize)} are free there"
        )


def _layout(specs: Mapping[str, TensorSpec], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The encoded header, the offset of each tensor in the file, and the size of the whole file in bytes."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: (-_RANK_OF[specs[name].dtype], name)):
        spec = specs[name]
        begins[name], end = end, end + spec.nbytes
        entries[name] = {
            "dtype": _CODE_OF[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: start + begin for name, begin in begins.items()}, start + end
