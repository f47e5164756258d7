"""The report of one job: what was predicted, charged and measured. Plain frozen data, schema `memopt.report/1`.

Numbers are bytes and seconds; None = not known or not there. Measured and predicted never share a field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from memopt import atomic, journal
from memopt.decode import decode
from memopt.errors import BadInput
from memopt.machine import Machine

SCHEMA_NAME = "memopt.report"
SCHEMA_VERSION = 1
SCHEMA = f"{SCHEMA_NAME}/{SCHEMA_VERSION}"

Verdict = Literal["within", "over", "unbounded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """Bytes of one tier.

    `peak_bytes`: measured; for DRAM the sampled peak of anonymous + shared memory of the process tree.
    `upper_bound_bytes`: the kernel's own high-water mark (VmHWM, summed over the tree), file pages included.
    `file_bytes`: the most file-backed pages seen resident; clean and reclaimable, in no budget.
    `within`: peak_bytes <= budget_bytes; None without a budget. `at_peak`: bytes by category, `other` = peak - what was
    attributed; `attributed_by` says who attributed ("ledger": memopt's own leases, "torch": modules, optimizers and
    allocator of a program; None: nobody, all is `other`). `kinds_at_peak`: the same bytes as the operating system or
    the driver tells them apart ("anonymous", "shared"; "allocated", "cached", "non_torch").
    """

    budget_bytes: int | None = None
    peak_bytes: int | None = None
    upper_bound_bytes: int | None = None
    file_bytes: int | None = None
    predicted_bytes: int | None = None
    charged_peak_bytes: int | None = None
    within: bool | None = None
    at_peak: dict[str, int] = field(default_factory=dict)
    predicted_at_peak: dict[str, int] = field(default_factory=dict)
    attributed_by: Literal["ledger", "torch"] | None = None
    kinds_at_peak: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DramUse(TierUse):
    """DRAM of the process tree, and of the container around it.

    `proportional_bytes`: the most seen of PSS less file pages, each shared page counted once over the tree (sampled
    about once a second; None where it cannot be read). `locked_bytes`: the most locked or pinned, already among the
    anonymous or shared ones. `page_cache_bytes`: the most that the page cache held of the watched files. `limit_bytes`
    and `limit_file`: the container's limit and where it is set. `working_set_bytes`: the most the container used less
    its file pages. `container_peak_bytes`: the kernel's own mark for the container, page cache included. `oom_kills`:
    processes the kernel killed for memory in the container during the run.
    """

    proportional_bytes: int | None = None
    locked_bytes: int | None = None
    page_cache_bytes: int | None = None
    limit_bytes: int | None = None
    limit_file: str | None = None
    working_set_bytes: int | None = None
    container_peak_bytes: int | None = None
    oom_kills: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """Peaks of one GPU. `allocated_bytes` and `reserved_bytes`: torch's allocator in this process; `process_bytes`: the
    driver's number for the process tree; `used_bytes`: the whole device, other processes included; `others_bytes`: the
    most that others held.
    """

    index: int
    name: str
    used_bytes: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    others_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUse(TierUse):
    """All GPUs the job used, added up. `pinned_bytes`: the most of host memory that torch held pinned (it is DRAM)."""

    devices: list[DeviceUse] = field(default_factory=list)
    pinned_bytes: int | None = None
    alloc_retries: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """One block device during the run, all processes of the machine together.

    `read_wait_s`, `write_wait_s`: mean seconds of a request, queueing included; `queue`: mean requests under way.
    """

    name: str
    read_bytes: int
    write_bytes: int
    read_wait_s: float | None = None
    write_wait_s: float | None = None
    queue: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SsdUse(TierUse):
    """Space (`st_blocks`) and traffic of the SSD; `endurance_bytes` is what the drive may be written in its life.

    `read_bytes` and `write_bytes` are what memopt's own I/O moved; `process_read_bytes` and `process_write_bytes` what
    the kernel counts for the process tree (/proc/PID/io), checkpoint and output files included.
    """

    read_bytes: int | None = None
    write_bytes: int | None = None
    process_read_bytes: int | None = None
    process_write_bytes: int | None = None
    predicted_write_bytes: int | None = None
    endurance_bytes: int | None = None
    write_budget_bytes: int | None = None
    disks: list[DiskUse] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """One entry per tier; None for a tier the job did not touch."""

    gpu: GpuUse | None = None
    dram: DramUse = field(default_factory=DramUse)
    ssd: SsdUse | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IoUse:
    """`waited_s`: compute stood still for I/O. `busy_s`: at least one transfer ran. Rates are bytes per busy second."""

    waited_s: float = 0.0
    busy_s: float = 0.0
    read_per_s: float | None = None
    write_per_s: float | None = None
    achieved_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A named stretch of the run; seconds since the start. `read_bytes` and `write_bytes`: device traffic of the
    process tree meanwhile. `at_peak`: bytes by tier and category at the phase's peak of each tier, where attributed.
    """

    name: str
    start_s: float
    end_s: float
    dram_peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    read_bytes: int | None = None
    write_bytes: int | None = None
    at_peak: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Equally long lists; thinned so that minima and maxima stay. None where a tier was not sampled.

    `categories`: tier -> category -> bytes at each time, where they were attributed (memopt's leases, or a torch
    program's own tensors); `other` is what is left of the measured bytes.
    """

    t_s: list[float] = field(default_factory=list)
    gpu_bytes: list[int | None] = field(default_factory=list)
    dram_bytes: list[int | None] = field(default_factory=list)
    ssd_bytes: list[int | None] = field(default_factory=list)
    categories: dict[str, dict[str, list[int | None]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildUse:
    """The command that was profiled from outside. `exit_code` is what a shell would see (128 + signal).

    `killed_for_memory`: the kernel's count of kills in the container went up; `evidence` says which file told.
    """

    exit_code: int
    signal: str | None = None
    killed_for_memory: bool = False
    evidence: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What watching cost: samples taken, CPU seconds of the sampling thread, and its resident bytes."""

    samples: int
    cpu_s: float
    dram_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a job asked for, was given and used.

    `config` is the effective configuration (the run can be repeated from it), `reasons` the sentences behind the
    automatic choices, `results` what the job was for (final_loss, steps, tokens, losses, ...), plain JSON values.
    """

    memopt: str
    command: list[str]
    started: str
    wall_s: float
    machine: Machine
    verdict: Verdict
    tiers: Tiers
    io: IoUse = field(default_factory=IoUse)
    phases: list[Phase] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)
    results: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    child: ChildUse | None = None
    overhead: Overhead | None = None
    complete: bool = True
    """False for a report made from samples on disk after the profiler itself was killed."""
    schema: str = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; numbers that JSON cannot say (NaN, infinities) become None."""
        plain = cast(dict[str, Any], _plain(dataclasses.asdict(self)))
        return {"schema": plain.pop("schema"), **plain}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON in one atomic step. Raises BadInput when the path cannot be written."""
        atomic.save_text("report", path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a saved report. Raises BadInput when it is missing, cut short, something else, or newer than this.

        Where the profiler was killed, or has not finished yet, its journal beside `path` tells what it saw until then.
        """
        where = f"report {str(path)!r}"
        if journal.is_newest(Path(path)):
            return cls.from_dict(journal.restore(Path(path)), where=where)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"{where} cannot be read: {error.strerror}; check the path") from error
        except ValueError as error:
            raise BadInput(f"{where} is cut short or not JSON ({error}); run the job again with --report") from error
        return cls.from_dict(data, where=where)

    @classmethod
    def from_dict(cls, data: object, *, where: str = "report") -> Report:
        """A report from JSON data. Fields this version does not know are ignored within the same schema version."""
        schema = data.get("schema") if isinstance(data, dict) else None
        name, _, version = schema.partition("/") if isinstance(schema, str) else ("", "", "")
        if name != SCHEMA_NAME or not version.isdigit():
            raise BadInput(f"{where} is not a memopt report (schema {schema!r}, wanted {SCHEMA!r})")
        if int(version) > SCHEMA_VERSION:
            raise BadInput(f"{where} was written by a newer memopt ({schema}, this one reads {SCHEMA}); upgrade memopt")
        report: Report = decode(cls, data, where)
        line = report.timeline
        columns = [line.gpu_bytes, line.dram_bytes, line.ssd_bytes]
        columns += [column for by in line.categories.values() for column in by.values()]
        if any(len(column) != len(line.t_s) for column in columns):
            raise BadInput(f"{where}: timeline: lists of different lengths; the file is damaged or not ours")
        return report


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
