"""Memory and traffic of a process and its descendants, cheap enough to ask fifty times a second."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field

from memopt.profiler.pace import Pace
from memopt.profiler.samplers import (
    ProcessMemory,
    descendants,
    parent_of,
    parse_status,
    process_io,
    process_memory,
    proportional_memory,
    share_memory,
)

_LIST_EVERY_S = 0.2
_YOUNG_S = 0.5  # a short job has begotten and lost its children before the usual time to list them
_OTHERS_EVERY_S = 0.1
_PROPORTIONAL_EVERY_S = 1.0
# A change of the tree makes the old shares wrong, so asking may then cost one part in 20 of the time instead of 400.
_CHANGED_SHARE = 20
_READ_EACH_TIME = 4
_KEPT_OPEN = 64
_STATUS_BYTES = 4096  # the file is about 1.5 KB


@dataclass(frozen=True, slots=True)
class TreeMemory:
    """Bytes of the whole tree at one moment; a page that several processes share counts once.

    `proportional_bytes`: the latest anonymous + shared bytes as the kernel divides them; None where it will not say.
    `hwm_bytes`: high-water marks added up, an upper bound.
    """

    anon_bytes: int = 0
    shmem_bytes: int = 0
    file_bytes: int = 0
    locked_bytes: int = 0
    hwm_bytes: int = 0
    proportional_bytes: int | None = None

    @property
    def charged_bytes(self) -> int:
        """What a DRAM budget counts: anonymous + shared."""
        return self.anon_bytes + self.shmem_bytes


@dataclass(slots=True)
class _Process:
    """One process of the tree. `status` stays open, so that a reused process id is never taken for it; it is None for
    the many of a large tree, where open files would run out.

    `twice`: what its own numbers hold of pages that are shared and counted elsewhere (anon, shmem, file).
    `known`: its shares have been asked for; until then a newcomer, most likely a fork, counts nothing.
    """

    pid: int
    status: int | None
    parent: int | None = None
    memory: ProcessMemory = field(default_factory=ProcessMemory)
    twice: tuple[int, int, int] = (0, 0, 0)
    known: bool = False

    def read(self) -> bool:
        """Refresh `memory`; False when the process is gone. A zombie reads as zeros."""
        found = None
        if self.status is None:
            found = process_memory(self.pid)
        else:
            with contextlib.suppress(OSError):
                found = parse_status(os.pread(self.status, _STATUS_BYTES, 0))
        self.memory = found or ProcessMemory()
        return found is not None

    def ask_shares(self) -> int | None:
        """Find out what is shared; the proportional bytes a budget counts, or None when the kernel will not say."""
        self.known = True
        # before the walk: what the process takes while it lasts must not look like something shared
        self.read()
        shares = proportional_memory(self.pid)
        if shares is None:
            self.twice = (0, 0, 0)
            # either it has just ended, then it has nothing, or we may not ask
            return None if self.read() and self.memory.hwm_bytes > 0 else 0
        memory = self.memory
        self.twice = (
            max(0, shares.undivided_anon_bytes - shares.anon_bytes),
            max(0, memory.shmem_bytes - shares.shmem_bytes),
            max(0, memory.file_bytes - shares.file_bytes),
        )
        return shares.anon_bytes + shares.shmem_bytes

    def outgrew(self) -> bool:
        """Whether its shares cannot be right any more: it gave back, or replaced by exec, what it shared."""
        memory, twice = self.memory, self.twice
        return not self.known or memory.anon_bytes < twice[0] or memory.shmem_bytes < twice[1]

    def once(self) -> tuple[int, int, int]:
        """(anon, shmem, file) bytes without what is counted elsewhere."""
        memory, twice = self.memory, self.twice
        return (
            max(0, memory.anon_bytes - twice[0]),
            max(0, memory.shmem_bytes - twice[1]),
            max(0, memory.file_bytes - twice[2]),
        )

    def close(self) -> None:
        if self.status is not None:
            os.close(self.status)


class TreeSampler:
    """The tree of `root_pid` (default: this process). What was once seen in it stays, whoever adopts it later.

    `adopted`: the tree is every process that becomes a descendant of this one from now on, itself excepted: for a
    program that made itself the subreaper of the command it will run (prctl(2)), so that nothing the command leaves
    behind gets lost.
    """

    def __init__(self, root_pid: int | None = None, *, adopted: bool = False) -> None:
        self._root = os.getpid() if root_pid is None or adopted else root_pid
        self._counts_root = not adopted
        self._strangers = set(descendants(self._root)) if adopted else set()
        self._begun_s = time.monotonic()
        self._tree: dict[int, _Process] = {}
        self._proportional: int | None = None
        self._list = Pace(_LIST_EVERY_S)
        self._others = Pace(_OTHERS_EVERY_S)
        self._shares = Pace(_PROPORTIONAL_EVERY_S)
        self._changed_shares = Pace(0.0, _CHANGED_SHARE)
        self._changed = False
        self._retired = (0, 0)
        self._io = (0, 0)

    def pids(self) -> list[int]:
        """The processes known now."""
        return list(self._tree)

    def sample(self, *, fresh: bool = False) -> TreeMemory:
        """Now. `fresh` lists and reads every process, however recently that was done."""
        now = time.monotonic()
        if fresh or self._list.due(now) or now - self._begun_s < _YOUNG_S:
            with self._list.spending(now):
                self._list_tree()
        self._read(now, fresh)
        self._share_out(now, fresh)
        return self._total()

    def io(self) -> tuple[int, int]:
        """(read, written) device bytes of the tree so far; those of ended processes count with who waited for them."""
        found = [io for pid in self._tree if (io := process_io(pid)) is not None]
        read = self._retired[0] + sum(io.read_bytes for io in found)
        written = self._retired[1] + sum(io.write_bytes for io in found)
        # a process that ended and was waited for by nobody we know takes its count along: never fall back
        self._io = (max(self._io[0], read), max(self._io[1], written))
        return self._io

    def retire(self, pid: int) -> None:
        """Keep the traffic of a process that this one is about to wait for; it is still a zombie."""
        io = process_io(pid)
        gone = self._tree.pop(pid, None)
        if gone is not None:
            gone.close()
        if io is not None:
            self._retired = (self._retired[0] + io.read_bytes, self._retired[1] + io.write_bytes)

    def close(self) -> None:
        """Close the kept files; a second call does nothing."""
        for process in self._tree.values():
            process.close()
        self._tree.clear()

    def _list_tree(self) -> None:
        pids = [*([self._root] if self._counts_root else []), *descendants(self._root)]
        for pid in pids:
            if pid not in self._tree and pid not in self._strangers:
                process = _Process(pid, self._open(pid), parent_of(pid))
                if process.read():
                    self._tree[pid] = process
                    self._changed = True
                else:
                    process.close()
        listed = set(pids)
        self._drop([each for each in self._tree.values() if each.status is None and each.pid not in listed])

    def _open(self, pid: int) -> int | None:
        kept = sum(each.status is not None for each in self._tree.values())
        with contextlib.suppress(OSError):
            return os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC) if kept < _KEPT_OPEN else None
        return None

    def _read(self, now: float, all_of_them: bool) -> None:
        processes = list(self._tree.values())
        if len(processes) <= _READ_EACH_TIME or all_of_them or self._others.due(now):
            with self._others.spending(now):
                gone = [process for process in processes if not process.read()]
        else:
            processes.sort(key=lambda process: -process.memory.charged_bytes)
            gone = [process for process in processes[:_READ_EACH_TIME] if not process.read()]
        self._drop(gone)

    def _drop(self, gone: list[_Process]) -> None:
        for process in gone:
            process.close()
            del self._tree[process.pid]
            self._changed = True

    def _share_out(self, now: float, fresh: bool) -> None:
        """Find out what is counted in more than one process. Alone, a process owns all it has."""
        living = [each for each in self._tree.values() if each.memory.hwm_bytes > 0 and not self._is_before_exec(each)]
        if len(living) <= 1:
            for process in living:
                process.twice, process.known = (0, 0, 0), True
            self._changed = False
            self._proportional = sum(process.memory.charged_bytes for process in living)
            return
        self._changed |= any(process.outgrew() for process in living)
        if fresh or self._shares.due(now) or (self._changed and self._changed_shares.due(now)):
            self._changed = False
            with self._shares.spending(now), self._changed_shares.spending(now):
                found = [process.ask_shares() for process in living]
            told = [nbytes for nbytes in found if nbytes is not None]
            self._proportional = sum(told) if len(told) == len(found) else None

    def _is_before_exec(self, process: _Process) -> bool:
        """Whether a newcomer still runs in its parent's own memory."""
        parent = process.parent
        return not process.known and parent in self._tree and share_memory(process.pid, parent)

    def _total(self) -> TreeMemory:
        processes = [process for process in self._tree.values() if process.known]
        if len(processes) == 1 == len(self._tree) and processes[0].twice == (0, 0, 0):
            memory = processes[0].memory
            return TreeMemory(
                memory.anon_bytes,
                memory.shmem_bytes,
                memory.file_bytes,
                max(memory.locked_bytes, memory.pinned_bytes),
                memory.hwm_bytes,
                self._proportional,
            )
        anon, shmem, files = map(sum, zip((0, 0, 0), *(process.once() for process in processes), strict=True))
        return TreeMemory(
            anon_bytes=anon,
            shmem_bytes=shmem,
            file_bytes=files,
            locked_bytes=sum(max(each.memory.locked_bytes, each.memory.pinned_bytes) for each in processes),
            hwm_bytes=sum(process.memory.hwm_bytes for process in self._tree.values()),
            proportional_bytes=self._proportional,
        )
