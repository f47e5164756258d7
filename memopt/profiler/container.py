"""What the kernel counts of the container around a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memopt import cgroups

_ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerUse:
    """Bytes and counts of one memory group during a session; None = the kernel does not say.

    `peak_bytes`: the kernel's own mark, page cache included; None when the mark is older than the session.
    """

    limit_bytes: int | None = None
    limit_file: str | None = None
    working_set_bytes: int | None = None
    peak_bytes: int | None = None
    oom_kills: int | None = None
    oom_kills_file: str | None = None


class ContainerSampler:
    """Watches `group` (default: the one this process is in) from now on."""

    def __init__(self, group: cgroups.Group | None = None, root: Path = _ROOT) -> None:
        self._group = group or cgroups.memory_group(root)
        self._limit = cgroups.memory_limit(root, group)
        self._working_set_bytes: int | None = None
        self._mark_bytes, self._kills = self._marks()
        self._new = group is not None

    def sample(self) -> None:
        """Look at what is used now."""
        usage = None if self._group is None else cgroups.memory_usage(self._group)
        if usage is not None:
            self._working_set_bytes = max(self._working_set_bytes or 0, usage.working_set_bytes)

    def use(self) -> ContainerUse:
        """What was seen until now."""
        mark_bytes, kills = self._marks()
        moved = mark_bytes is not None and (self._new or mark_bytes > (self._mark_bytes or 0))
        before = 0 if self._kills is None else self._kills.count
        return ContainerUse(
            limit_bytes=None if self._limit is None else self._limit.limit_bytes,
            limit_file=None if self._limit is None else str(self._limit.file),
            working_set_bytes=self._working_set_bytes,
            peak_bytes=mark_bytes if moved else None,
            oom_kills=None if kills is None else kills.count - before,
            oom_kills_file=None if kills is None else str(kills.file),
        )

    def _marks(self) -> tuple[int | None, cgroups.Count | None]:
        if self._group is None:
            return None, None
        return cgroups.memory_mark(self._group), cgroups.kill_count(self._group)
