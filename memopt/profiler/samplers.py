"""Pure readers: each call asks the kernel or the driver once and returns plain numbers. Nothing is kept, nothing raises
because a process has just ended: what cannot be read is None or missing.

Which number answers which question (proc(5)):
- anonymous memory and shared memory (/dev/shm, pinned buffers that the driver maps shared) are what a budget counts;
- file-backed pages are clean, the kernel takes them back, they are reported apart;
- locked pages (VmLck) are already among the anonymous or shared ones;
- VmHWM is the high-water mark of all three kinds together, an upper bound of the first two.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of one process, from /proc/PID/status."""

    anon_bytes: int = 0
    shmem_bytes: int = 0
    file_bytes: int = 0
    locked_bytes: int = 0
    hwm_bytes: int = 0

    @property
    def charged_bytes(self) -> int:
        """What a DRAM budget counts: anonymous + shared."""
        return self.anon_bytes + self.shmem_bytes


@dataclass(frozen=True, slots=True)
class ProcessIo:
    """Bytes one process moved to and from devices, from /proc/PID/io. Writes count when pages are dirtied."""

    read_bytes: int = 0
    write_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of one device. `process_bytes`: this process, context and libraries included; None when nobody can say."""

    used_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    process_bytes: int | None = None

    @property
    def charged_bytes(self) -> int:
        """What a GPU budget counts: the driver's number for this process, else what torch reserved."""
        return self.reserved_bytes if self.process_bytes is None else max(self.process_bytes, self.reserved_bytes)


_FIELDS = {
    b"RssAnon": "anon_bytes",
    b"RssShmem": "shmem_bytes",
    b"RssFile": "file_bytes",
    b"VmLck": "locked_bytes",
    b"VmHWM": "hwm_bytes",
}


def parse_status(text: bytes) -> ProcessMemory:
    """The memory fields of /proc/PID/status; a kernel thread or a zombie has none, which reads as zeros."""
    values: dict[str, int] = {}
    for line in text.splitlines():
        key, _, rest = line.partition(b":")
        name = _FIELDS.get(key)
        if name is not None:
            values[name] = int(rest.split()[0]) * 1024
    return ProcessMemory(**values)


def process_memory(pid: int | str = "self", root: Path = _ROOT) -> ProcessMemory | None:
    """Memory of one process; None when it is gone."""
    with contextlib.suppress(OSError):
        return parse_status((root / "proc" / str(pid) / "status").read_bytes())
    return None


def process_io(pid: int | str = "self", root: Path = _ROOT) -> ProcessIo | None:
    """Device traffic of one process; None when it is gone or not ours to ask."""
    with contextlib.suppress(OSError):
        text = (root / "proc" / str(pid) / "io").read_text(encoding="ascii")
        values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        return ProcessIo(int(values["read_bytes"]), int(values["write_bytes"]))
    return None


def children(pid: int | None = None) -> list[int]:
    """All living descendants of a process (default: this one)."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def tree_memory(pids: Iterable[int | str]) -> ProcessMemory:
    """The sum over processes. Shared pages that several of them map count once per process: an upper bound."""
    found = [memory for pid in pids if (memory := process_memory(pid)) is not None]
    return ProcessMemory(
        anon_bytes=sum(memory.anon_bytes for memory in found),
        shmem_bytes=sum(memory.shmem_bytes for memory in found),
        file_bytes=sum(memory.file_bytes for memory in found),
        locked_bytes=sum(memory.locked_bytes for memory in found),
        hwm_bytes=sum(memory.hwm_bytes for memory in found),
    )


def resident_bytes(paths: Iterable[Path]) -> int:
    """Bytes that files and directories (walked, links not followed) really take on their file systems.

    Counted in blocks, so a sparse file costs what is written, and once per inode.
    """
    seen: set[tuple[int, int]] = set()
    total = 0
    for path in paths:
        for status in _stats(path):
            key = (status.st_dev, status.st_ino)
            if key not in seen:
                seen.add(key)
                total += status.st_blocks * 512  # stat(2): always units of 512 bytes
    return total


def _stats(path: Path) -> Iterator[os.stat_result]:
    try:
        status = os.lstat(path)
    except OSError:
        return
    yield status
    if not _is_directory(status):
        return
    try:
        entries = list(os.scandir(path))
    except OSError:
        return
    for entry in entries:
        yield from _stats(Path(entry.path))


def _is_directory(status: os.stat_result) -> bool:
    return (status.st_mode & 0o170000) == 0o040000
