"""A memory limit the kernel enforces, and what the kernel counted: commands in a child of this process's group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memopt.cgroups import Group
from memopt.errors import BadInput
from memopt.jobs.memory_group import join_command, limited_group


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

    group: Group
    limit_bytes: int

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, run inside the group from its first instruction on."""
        return join_command(self.group, list(command))

    def count(self) -> KernelCount:
        """The kernel's counters so far."""
        path = self.group.path
        if self.group.version == 1:
            peak, hits = "memory.max_usage_in_bytes", _number(path / "memory.failcnt")
            kills = _keyed(path / "memory.oom_control", "oom_kill")
        else:
            peak, hits = "memory.peak", _keyed(path / "memory.events", "max")
            kills = _keyed(path / "memory.events", "oom_kill")
        return KernelCount(
            limit_bytes=self.limit_bytes, peak_bytes=_number(path / peak), limit_hits=hits, oom_kills=kills
        )


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new child group limited to `limit_bytes` of memory and no swap; removed at the end. Raises NotPermitted."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(limited_group(limit_bytes))
        except BadInput as error:
            raise NotPermitted(str(error)) from error
        yield MemoryGroup(group, limit_bytes)


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
