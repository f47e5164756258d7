"""A memory limit the kernel enforces: run a command in a child of the memory cgroup (v1 or v2) this process is in."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memopt.cgroups import Group, groups

_REMOVE_TRIES, _REMOVE_EVERY_S = 50, 0.1


class NotPermitted(Exception):
    """No limited group can be made here; the text says why."""


@dataclass(frozen=True, kw_only=True)
class KernelCount:
    """What the kernel counted in a group, page cache and kernel memory included. None: this kernel does not say.

    `limit_hits`: times the limit was met and pages were reclaimed, file pages first (v1 of Linux 6.18 says 0, even
    after a kill). `oom_kills`: processes killed because that was not enough: with none of them, the limit held.
    """

    limit_bytes: int
    peak_bytes: int | None
    limit_hits: int | None
    oom_kills: int | None


@dataclass(frozen=True)
class MemoryGroup:
    """A group with a limit, for as long as the `with` block of `memory_group` lasts."""

    path: Path
    version: int
    limit_bytes: int

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, run inside the group from its first instruction on."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def count(self) -> KernelCount:
        """The kernel's counters so far."""
        if self.version == 1:
            peak, hits = "memory.max_usage_in_bytes", _number(self.path / "memory.failcnt")
            kills = _keyed(self.path / "memory.oom_control", "oom_kill")
        else:
            peak, hits = "memory.peak", _keyed(self.path / "memory.events", "max")
            kills = _keyed(self.path / "memory.events", "oom_kill")
        return KernelCount(
            limit_bytes=self.limit_bytes, peak_bytes=_number(self.path / peak), limit_hits=hits, oom_kills=kills
        )


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new child group limited to `limit_bytes` of memory and no swap; removed at the end. Raises NotPermitted."""
    own = next(iter(groups("memory")), None)
    if own is None:
        raise NotPermitted("no memory cgroup is mounted")
    group = _make(own, limit_bytes)
    try:
        yield group
    finally:
        _remove(group.path)


def _make(own: Group, limit_bytes: int) -> MemoryGroup:
    path = own.path / f"memopt-bench-{os.getpid()}-{random.randrange(10**6)}"
    try:
        path.mkdir()
    except OSError as error:
        raise NotPermitted(f"{own.path}: no child group may be made here ({error.strerror})") from error
    try:
        if own.version == 1:
            (path / "memory.limit_in_bytes").write_text(str(limit_bytes))
            _write_if_there(path / "memory.memsw.limit_in_bytes", str(limit_bytes))
        else:
            if not (path / "memory.max").exists():
                # fails with EBUSY where processes and controllers may not share a group (v2, outside of the root)
                (own.path / "cgroup.subtree_control").write_text("+memory")
            (path / "memory.max").write_text(str(limit_bytes))
            _write_if_there(path / "memory.swap.max", "0")
    except OSError as error:
        _remove(path)
        raise NotPermitted(f"{path.parent}: the limit cannot be set ({error.strerror})") from error
    return MemoryGroup(path, own.version, limit_bytes)


def _write_if_there(file: Path, text: str) -> None:
    """Swap is accounted only where the kernel was built and started for it."""
    with contextlib.suppress(OSError):
        if file.exists():
            file.write_text(text)


def _remove(path: Path) -> None:
    for _ in range(_REMOVE_TRIES):  # a process that has just ended leaves its group a moment later
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(_REMOVE_EVERY_S)


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text(encoding="ascii"))
    return None


def _keyed(file: Path, key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return None
