"""Traffic, waiting and queues of the machine's drives, from /proc/diskstats (Documentation/admin-guide/iostats.rst)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from memopt.report_types import DiskUse

_ROOT = Path("/")
_SECTOR_BYTES = 512  # the file's unit, whatever the drive's sectors are
_IN_MEMORY = ("loop", "ram", "zram")


@dataclass(frozen=True, slots=True)
class DiskCounts:
    """Counters of one drive since the machine started; milliseconds summed over requests."""

    reads: int
    read_sectors: int
    read_ms: int
    writes: int
    write_sectors: int
    write_ms: int
    queue_ms: int


def disk_counts(root: Path = _ROOT) -> dict[str, DiskCounts]:
    """Counters by name of whole drives. Left out: partitions, devices in memory, and those built on others (LVM, RAID,
    encryption), whose traffic is already the others'."""
    drives = {name for name in _names(root / "sys/block") if not name.startswith(_IN_MEMORY)}
    drives = {name for name in drives if not _names(root / "sys/block" / name / "slaves")}
    found = {}
    with contextlib.suppress(OSError):
        for line in (root / "proc/diskstats").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) >= 14 and fields[2] in drives:
                reads, _, read_sectors, read_ms, writes, _, write_sectors, write_ms, _, _, queue_ms = map(
                    int, fields[3:14]
                )
                found[fields[2]] = DiskCounts(reads, read_sectors, read_ms, writes, write_sectors, write_ms, queue_ms)
    return found


def disk_use(before: dict[str, DiskCounts], after: dict[str, DiskCounts], wall_s: float) -> list[DiskUse]:
    """What the drives did in `wall_s` seconds; those that did nothing, or were not there at both ends, are left out."""
    used = []
    for name, now in sorted(after.items()):
        then = before.get(name)
        if then is None or now.reads < then.reads or now.writes < then.writes:
            continue
        reads, writes = now.reads - then.reads, now.writes - then.writes
        if reads + writes == 0:
            continue
        used.append(
            DiskUse(
                name=name,
                read_bytes=(now.read_sectors - then.read_sectors) * _SECTOR_BYTES,
                write_bytes=(now.write_sectors - then.write_sectors) * _SECTOR_BYTES,
                read_wait_s=(now.read_ms - then.read_ms) / 1000 / reads if reads else None,
                write_wait_s=(now.write_ms - then.write_ms) / 1000 / writes if writes else None,
                queue=(now.queue_ms - then.queue_ms) / 1000 / wall_s if wall_s > 0 else None,
            )
        )
    return used


def _names(directory: Path) -> list[str]:
    try:
        return [entry.name for entry in directory.iterdir()]
    except OSError:
        return []
