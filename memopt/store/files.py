"""One file read and written past the page cache, whole transfers only, every failure raised with its place."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from memopt.errors import StoreError
from memopt.store.errors import StoreFull, StoreIOError, StoreMisaligned
from memopt.units import format_bytes

BLOCK_BYTES = 4096  # what every transfer of the store is a multiple of; covers all common drives and file systems

_libc = ctypes.CDLL(None, use_errno=True)
_TMPFS_MAGIC = 0x01021994  # linux/magic.h
_RAMFS_MAGIC = 0x858458F6
_STATX_DIOALIGN = 0x2000  # linux/stat.h
_AT_EMPTY_PATH = 0x1000


class DirectFile:
    """A file of fixed size with synchronous, whole transfers at given offsets; safe to use from several threads.

    `direct` says whether the page cache is bypassed; where the file system refuses that, `reason` says why and the
    same calls go through the page cache, which is asked to drop what was moved. `align_bytes` is what addresses,
    offsets and lengths must be multiples of. With `padded=True` a transfer may end inside a block: the rest of the
    block is the owner's padding, skipped by reads and written as zeros.
    """

    def __init__(self, path: Path, fd: int, *, writable: bool, padded: bool) -> None:
        self.path = path
        self.writable = writable
        self.nbytes = os.fstat(fd).st_size
        self.align_bytes, self.reason = _direct_support(path, fd)
        self.direct = not self.reason
        if not self.direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # pages read ahead would stay in the cache
        self._fd = fd
        self._padded = padded
        self._local = threading.local()

    @classmethod
    def create(cls, path: str | os.PathLike[str], nbytes: int, *, padded: bool = False) -> DirectFile:
        """Make `path` with all of its `nbytes` reserved on the disk. Raises StoreFull (and leaves no file) if it
        does not fit, StoreError if the path exists or cannot be made."""
        path = Path(path)
        fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            _reserve(path, fd, nbytes)
            return cls(path, fd, writable=True, padded=padded)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False, padded: bool = False) -> DirectFile:
        """Open an existing file. Raises StoreError, naming it, if that is not possible."""
        path = Path(path)
        fd = _open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            return cls(path, fd, writable=writable, padded=padded)
        except BaseException:
            os.close(fd)
            raise

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset`. Raises StoreIOError (also at end of file) or StoreMisaligned."""
        view = self._checked(view, offset)
        body = len(view) - len(view) % BLOCK_BYTES if self._padded else len(view)
        self._move(os.preadv, view[:body], offset, "read")
        if body < len(view):
            spare = self._spare()
            self._move(os.preadv, spare, offset + body, "read")
            view[body:] = spare[: len(view) - body]
        if not self.direct:
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    def write_from(self, view: memoryview, offset: int) -> None:
        """Write all of `view` at byte `offset`; durable after `sync`. Raises as `read_into`, and StoreFull."""
        view = self._checked(view, offset)
        body = len(view) - len(view) % BLOCK_BYTES if self._padded else len(view)
        self._move(os.pwritev, view[:body], offset, "write")
        if body < len(view):
            spare = self._spare()
            rest = len(view) - body
            spare[:rest] = view[body:]
            spare[rest:] = bytes(BLOCK_BYTES - rest)
            self._move(os.pwritev, spare, offset + body, "write")
        if not self.direct:
            # Starts the write-back of these pages; they are dropped by the next call that finds them clean.
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Return when everything written is on the medium (fdatasync). Raises StoreIOError."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed("sync", error, 0, self.nbytes) from error
        if not self.direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def disk_bytes(self) -> int:
        """Bytes this file takes on the disk, by its block count."""
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, view: memoryview, offset: int) -> memoryview:
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        align, nbytes = self.align_bytes, len(view)
        trouble = ""
        if offset < 0 or offset % align:
            trouble = f"offset {offset}"
        elif nbytes % align and not self._padded:
            trouble = f"length {nbytes}"
        elif self.direct and nbytes and np.frombuffer(view, np.uint8).ctypes.data % align:
            trouble = "the buffer's address"
        if trouble:
            raise StoreMisaligned(
                f"{self.path}: {trouble} is not a multiple of {align}, which direct I/O needs here; "
                "use a buffer of a BufferPool or Region and whole blocks"
            )
        return view

    def _move(self, call: object, view: memoryview, offset: int, verb: str) -> None:
        done, nbytes = 0, len(view)
        while done < nbytes:
            try:
                moved = call(self._fd, [view[done:] if done else view], offset + done)  # type: ignore[operator]
            except OSError as error:
                raise self._failed(verb, error, offset + done, nbytes - done) from error
            before, done = done, done + moved
            if self.direct and done < nbytes:
                done -= done % self.align_bytes  # the kernel stopped inside a block: take the whole block again
            if done <= before:
                raise StoreIOError(
                    f"{self.path}: {verb} of {nbytes - before} bytes at {offset + before} stopped after {moved} bytes "
                    f"(the file has {os.fstat(self._fd).st_size} of the expected {self.nbytes} bytes); "
                    "the file was cut off: restore it, or start over with a new directory",
                    path=str(self.path),
                    offset=offset + before,
                    nbytes=nbytes - before,
                    errno=0,
                )

    def _spare(self) -> memoryview:
        """One aligned block per thread, for the block a padded transfer ends in."""
        spare: memoryview | None = getattr(self._local, "spare", None)
        if spare is None:
            spare = memoryview(mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            self._local.spare = spare
        return spare

    def _failed(self, verb: str, error: OSError, offset: int, nbytes: int) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return no_room(self.path, nbytes, f"{verb} at {offset}")
        remedy = "check the drive (dmesg) and its cables" if error.errno == errno.EIO else "check the file system"
        return StoreIOError(
            f"{self.path}: {verb} of {nbytes} bytes at {offset} failed: {error.strerror}; {remedy}",
            path=str(self.path),
            offset=offset,
            nbytes=nbytes,
            errno=error.errno or 0,
        )


def free_bytes(path: Path) -> int:
    """Bytes an unprivileged process can still write to the file system of `path`; 0 if that cannot be told."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize


def no_room(path: Path, wanted_bytes: int, what: str) -> StoreFull:
    """The error of a full file system (or quota)."""
    free = free_bytes(path if path.exists() else path.parent)
    return StoreFull(
        f"{path}: {what} wants {format_bytes(wanted_bytes)}, {format_bytes(free)} is free on this file system; "
        "free space, use another --offload-dir, or need less (--optim-state-dtype bfloat16)",
        wanted_bytes=wanted_bytes,
        free_bytes=free,
    )


def is_tmpfs(path: str | os.PathLike[str]) -> bool:
    """Whether files under `path`, which need not exist yet, live in DRAM (tmpfs, ramfs) rather than on a drive."""
    path = Path(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    buffer = ctypes.create_string_buffer(512)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(path, BLOCK_BYTES, "a new file") from error
        raise StoreError(f"{path}: cannot be opened: {error.strerror}; check the path and its permissions") from error


def _reserve(path: Path, fd: int, nbytes: int) -> None:
    """Give the file its size and its blocks, so that a full disk shows now and not in the middle of a run."""
    if nbytes == 0:
        return
    while _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise no_room(path, nbytes, "reserving its size")
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise StoreError(f"{path}: reserving {format_bytes(nbytes)} failed: {os.strerror(code)}")
        # Not posix_fallocate: the C library would write every block of the file to make up for it.
        if free_bytes(path) < nbytes:
            raise no_room(path, nbytes, "its size")
        os.ftruncate(fd, nbytes)
        return


def _direct_support(path: Path, fd: int) -> tuple[int, str]:
    """Turn direct I/O on for `fd` if it works; (alignment, why not). Without it the alignment is 1."""
    if is_tmpfs(path):  # newer kernels accept the flag there and ignore it
        return 1, "tmpfs keeps files in DRAM; there is nothing to bypass"
    align = _reported_alignment(fd)
    if align == 0:
        return 1, "the file system reports no support for direct I/O"
    if align > BLOCK_BYTES:
        return 1, f"the file system wants {align}-byte alignment, more than the {BLOCK_BYTES} used here"
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as probe:
            os.preadv(fd, [probe], 0)  # some file systems take the flag and refuse the transfer
    except OSError as error:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return 1, f"the file system refuses direct I/O ({error.strerror})"
    return align, ""


def _reported_alignment(fd: int) -> int:
    """Bytes from statx (Linux 6.1); 0 = direct I/O unsupported; 4096 where the kernel does not say."""
    buffer = ctypes.create_string_buffer(256)
    if not hasattr(_libc, "statx") or _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return BLOCK_BYTES
    words = np.frombuffer(buffer.raw, np.uint32)
    if not int(words[0]) & _STATX_DIOALIGN:
        return BLOCK_BYTES
    memory_align, offset_align = int(words[38]), int(words[39])  # stx_dio_mem_align, stx_dio_offset_align
    return max(memory_align, offset_align) if offset_align else 0
