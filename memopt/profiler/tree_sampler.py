"""Memory of this process and its descendants, cheap enough to ask fifty times a second."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from memopt.profiler.samplers import ProcessMemory, children, parse_status, process_io, tree_memory

# Listing descendants walks all of /proc; a child's memory is one small file.
_LIST_EVERY_S = 1.0
_CHILDREN_EVERY_S = 0.1
_STATUS_BYTES = 4096  # the file is about 1.5 KB


@dataclass(frozen=True, slots=True)
class TreeMemory:
    """Bytes of the whole tree at one moment."""

    charged_bytes: int
    file_bytes: int
    hwm_bytes: int


class TreeSampler:
    """Keeps /proc/self/status open (one pread per sample); lists children at most once a second."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        self._pids: list[int] = []
        self._children = ProcessMemory()
        self._listed_at = self._children_at = float("-inf")

    def sample(self, *, fresh: bool = False) -> TreeMemory:
        """Now. `fresh` lists and reads the children too, however recently that was done."""
        now = time.monotonic()
        if fresh or now - self._listed_at >= _LIST_EVERY_S:
            self._pids = children()
            self._listed_at = now
        if fresh or now - self._children_at >= _CHILDREN_EVERY_S:
            self._children = tree_memory(self._pids)
            self._children_at = now
        own = parse_status(os.pread(self._status, _STATUS_BYTES, 0))
        return TreeMemory(
            charged_bytes=own.charged_bytes + self._children.charged_bytes,
            file_bytes=own.file_bytes + self._children.file_bytes,
            hwm_bytes=own.hwm_bytes + self._children.hwm_bytes,
        )

    def io(self) -> tuple[int, int]:
        """(read, written) device bytes of the processes known now; those of ended children count with the parent."""
        return _io_of(self._pids)

    def close(self) -> None:
        """Close the kept file; a second call does nothing."""
        if self._status >= 0:
            os.close(self._status)
            self._status = -1


def tree_io() -> tuple[int, int]:
    """(read, written) device bytes of this process and its living descendants; ended children count with the parent."""
    return _io_of(children())


def _io_of(pids: list[int]) -> tuple[int, int]:
    every: list[int | str] = ["self", *pids]
    found = [io for pid in every if (io := process_io(pid)) is not None]
    return sum(io.read_bytes for io in found), sum(io.write_bytes for io in found)
