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


def groups(controller: str, root: Path = _ROOT) -> list[Group]:
    """The groups this process is in for `controller`, the nearest first, up to the mount of each hierarchy."""
    found: list[Group] = []
    mounts = _mounts(root)
    for line in _lines(root / "proc/self/cgroup"):
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


def memory_limit(root: Path = _ROOT) -> Limit | None:
    """The smallest memory limit on the way up. v2's `memory.high` counts: passing it throttles a job to a crawl."""
    limits = []
    for group in groups("memory", root):
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


def oom_kills(root: Path = _ROOT) -> int | None:
    """Processes the kernel killed for memory in this process's own group so far; None where it does not count them."""
    for group in groups("memory", root):
        name = "memory.events" if group.version == 2 else "memory.oom_control"
        for line in _lines(group.path / name):
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.isdigit():
                return int(value)
    return None


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
