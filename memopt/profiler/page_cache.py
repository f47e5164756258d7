"""How much of a file the page cache holds: cachestat(2) where the kernel has it (Linux 6.5), else mincore(2)."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from memopt.profiler.samplers import files_under

_CACHESTAT = 451  # the same number on every architecture Linux gave it to, alpha excepted
_MAP_SHARED, _PROT_READ = 1, 1
_MAP_FAILED = ctypes.c_void_p(-1).value
_WINDOW_BYTES = 1 << 30


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recent"))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * (ctypes.c_int,), ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return libc


def cached_bytes(paths: Iterable[Path]) -> int | None:
    """Bytes the page cache holds of the regular files in and under `paths`; None when the kernel would say of none."""
    found = [
        nbytes
        for name, status in files_under(paths)
        if stat.S_ISREG(status.st_mode) and (nbytes := cached_bytes_of(name)) is not None
    ]
    return sum(found) if found else None


def cached_bytes_of(path: str | Path) -> int | None:
    """Bytes the page cache holds of one file; None when it is gone, may not be read, or the kernel will not say."""
    try:
        # O_NONBLOCK: a file that has meanwhile become a pipe must not stop us
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        pages = by_cachestat(file)
        return by_mincore(file) if pages is None else pages
    finally:
        os.close(file)


def by_cachestat(file: int) -> int | None:
    """Bytes in the page cache of an open file; None on a kernel or file system without cachestat."""
    counts, whole = _Counts(), _Range(0, 0)  # length 0: to the end of the file
    if _libc().syscall(_CACHESTAT, file, ctypes.byref(whole), ctypes.byref(counts), 0) != 0:
        return None
    return int(counts.cache) * mmap.PAGESIZE


def by_mincore(file: int) -> int | None:
    """The same through a mapping. The kernel only tells of files one owns or may write (others look fully cached)."""
    libc = _libc()
    size, total = os.fstat(file).st_size, 0
    for offset in range(0, size, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, size - offset)
        address = libc.mmap(None, length, _PROT_READ, _MAP_SHARED, file, offset)
        if address == _MAP_FAILED:
            return None
        try:
            resident = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
            if libc.mincore(address, length, resident) != 0:
                return None
            # the lowest bit says resident, the others mean nothing
            total += sum(byte & 1 for byte in resident.raw) * mmap.PAGESIZE
        finally:
            libc.munmap(address, length)
    return total
