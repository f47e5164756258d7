"""What the container around this process allows: memory and CPU limits of cgroup v1 and v2, read up the hierarchy.

Every function takes `root`, the directory under which `proc` and the mounted hierarchies are found, so that a test
can hand in a made-up tree. A file that is missing or says "no limit" is no limit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

# v1 writes "no limit" as the largest page-aligned signed 64-bit number; nothing real comes near 2**60
_NO_LIMIT = 2**60
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Group:
    """One directory of a cgroup hierarchy."""

    path: Path
    version: int


@dataclass(frozen=True, slots=True)
class Limit:
    """A number of bytes and the file that sets it."""

    limit_bytes: int
    file: Path


@dataclass(frozen=True, slots=True)
class Count:
    """How often something happened so far, and the file that says so."""

    count: int
    file: Path


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of one group now. `file_bytes`: of those, page cache, which the kernel takes back when it needs it."""

    used_bytes: int
    file_bytes: int

    @property
    def working_set_bytes(self) -> int:
        """What is used less all file pages (kubelet subtracts only the inactive ones)."""
        return max(0, self.used_bytes - self.file_bytes)


def groups(controller: str, root: Path = _ROOT, pid: int | str = "self") -> list[Group]:
    """The groups a process is in for `controller`, the nearest first, up to the mount of each hierarchy."""
    found: list[Group] = []
    mounts = _mounts(root)
    for line in _lines(root / f"proc/{pid}/cgroup"):
        _, _, rest = line.partition(":")
        names, _, inside = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        version = 1 if names else 2
        for fstype, options, mount_root, mount_point in mounts:
            if fstype == ("cgroup2" if version == 2 else "cgroup") and (version == 2 or controller in options):
                found.extend(_upwards(root, Path(mount_point), mount_root, inside, version))
                break
    return found


def memory_limit(root: Path = _ROOT, inside: Group | None = None) -> Limit | None:
    """The smallest memory limit on the way up. v2's `memory.high` counts: passing it throttles a job to a crawl.

    `inside`: a group below this process's own one, to begin with.
    """
    limits = []
    for group in [*([inside] if inside else []), *groups("memory", root)]:
        names = ("memory.limit_in_bytes",) if group.version == 1 else ("memory.max", "memory.high")
        for name in names:
            value = _number(group.path / name)
            if value is not None and value < _NO_LIMIT:
                limits.append(Limit(value, group.path / name))
    return min(limits, key=lambda limit: limit.limit_bytes, default=None)


def cpu_limit(root: Path = _ROOT) -> float | None:
    """CPUs' worth of time the tightest quota on the way up allows."""
    quotas = []
    for group in groups("cpu", root):
        if group.version == 2:
            quota, _, period = _text(group.path / "cpu.max").partition(" ")
        else:
            quota, period = _text(group.path / "cpu.cfs_quota_us"), _text(group.path / "cpu.cfs_period_us")
        # "max" in v2 and -1 in v1 mean no quota
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def whole_cpus(available: int, quota: float | None) -> int:
    """Threads worth starting: the CPUs one may run on, within the quota rounded up, at least one."""
    return max(1, available if quota is None else min(available, math.ceil(quota)))


def memory_group(root: Path = _ROOT) -> Group | None:
    """This process's own memory group; None where there is none."""
    return next(iter(groups("memory", root)), None)


def memory_usage(group: Group) -> Usage | None:
    """What a memory group uses now, page cache included; None where the kernel does not say (the root of v2)."""
    version = group.version
    used = _number(group.path / ("memory.usage_in_bytes" if version == 1 else "memory.current"))
    if used is None:
        return None
    prefix = "total_" if version == 1 else ""
    stat = _keyed(group.path / "memory.stat")
    return Usage(used, sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive")))


def memory_mark(group: Group) -> int | None:
    """The most a group ever used, page cache included, since it was made; None where the kernel keeps no mark."""
    return _number(group.path / ("memory.max_usage_in_bytes" if group.version == 1 else "memory.peak"))


def kill_count(group: Group) -> Count | None:
    """Processes of a memory group that the kernel killed for memory; None where it does not count them."""
    file = group.path / ("memory.events" if group.version == 2 else "memory.oom_control")
    kills = _keyed(file).get("oom_kill")
    return None if kills is None else Count(kills, file)


def machine_kill_count(root: Path = _ROOT) -> Count | None:
    """The same for the whole machine, every container of it."""
    file = root / "proc/vmstat"
    kills = _keyed(file).get("oom_kill")
    return None if kills is None else Count(kills, file)


def oom_kills(root: Path = _ROOT) -> int | None:
    """Processes the kernel killed for memory in this process's own group so far; None where it does not count them."""
    found = (kill_count(group) for group in groups("memory", root))
    return next((count.count for count in found if count is not None), None)


def _upwards(root: Path, mount_point: Path, mount_root: str, inside: str, version: int) -> list[Group]:
    base = root / mount_point.relative_to("/")
    # in a cgroup namespace the path can lie outside of what is mounted; then the mount itself is all one can see
    path = inside
    if mount_root != "/":
        path = inside.removeprefix(mount_root) if (inside + "/").startswith(mount_root + "/") else "/"
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    nearest_first = [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [Group(directory, version) for directory in nearest_first]


def _mounts(root: Path) -> list[tuple[str, list[str], str, str]]:
    """(fstype, super options, root within the file system, mount point) of every mount."""
    mounts = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, dash, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if dash and len(fields) >= 5 and len(tail) >= 3:
            mounts.append((tail[0], tail[2].split(","), _unescape(fields[3]), _unescape(fields[4])))
    return mounts


def _unescape(path: str) -> str:
    """mountinfo writes blanks, tabs and backslashes as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _lines(file: Path) -> list[str]:
    return _text(file).splitlines()


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None


def _keyed(file: Path) -> dict[str, int]:
    """A file of `name number` lines."""
    pairs = (line.split(" ") for line in _lines(file))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
