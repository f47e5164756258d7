"""What a session saw, as plain data between the session and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from memopt.profiler.container import ContainerUse
from memopt.report_types import DeviceUse, DiskUse, Phase, Timeline
from memopt.tiers import Category, Tier

Attributed = Mapping[Tier, Mapping[Category, int]]
"""Bytes by tier and category at one moment, as somebody who knows the job accounts for them."""
AttributedBy = Literal["ledger", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a session saw. Bytes and seconds; None for a tier that is not there.

    `dram_peak_bytes`: sampled peak of anonymous + shared memory of the process tree. `dram_upper_bound_bytes`: the
    kernel's high-water marks added up (they include file pages, and what happened before the session). `at_peak`: what
    was attributed at the peak of each tier, by `attributed_by`; without `OTHER`, which is the rest of the peak.
    `cost_s` is CPU time: of the sampling alone, or of all of this process when it watches another (`watching`).
    `own_dram_bytes`: what this process holds then. `gpu_guessed`: the driver did not tell the job's processes apart.
    The other fields mean what the report's fields of the same name do.
    """

    started: str
    wall_s: float
    dram_peak_bytes: int
    dram_start_bytes: int
    dram_upper_bound_bytes: int
    file_peak_bytes: int
    gpu_peak_bytes: int | None
    ssd_peak_bytes: int | None
    process_read_bytes: int
    process_write_bytes: int
    oom_kills: int
    samples: int
    cost_s: float
    phases: list[Phase] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)
    at_peak: Attributed = field(default_factory=dict)
    attributed_by: AttributedBy | None = None
    kinds_at_peak: Mapping[Tier, Mapping[str, int]] = field(default_factory=dict)
    proportional_bytes: int | None = None
    locked_bytes: int | None = None
    page_cache_bytes: int | None = None
    container: ContainerUse = field(default_factory=ContainerUse)
    devices: list[DeviceUse] = field(default_factory=list)
    gpu_guessed: bool = False
    pinned_bytes: int | None = None
    alloc_retries: int | None = None
    disks: list[DiskUse] = field(default_factory=list)
    watching: bool = False
    own_dram_bytes: int | None = None


def by_category(attributed: Mapping[Category, int], measured_bytes: int) -> dict[str, int]:
    """Every category by name; `other` is what is left of the measured bytes (signed: below zero, more was attributed
    than is there)."""
    named = {str(category): attributed.get(category, 0) for category in Category}
    named[Category.OTHER] = named[Category.OTHER] + measured_bytes - sum(named.values())
    return named
