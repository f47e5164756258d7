"""Put what was predicted, charged and measured side by side: the report of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memopt import __version__
from memopt.ledger import Ledger
from memopt.machine import Machine
from memopt.plan_types import Prediction
from memopt.profiler.measured import Measured, by_category
from memopt.report_types import ChildUse, DramUse, GpuUse, IoUse, Overhead, Report, SsdUse, Tiers, Verdict
from memopt.tiers import Tier
from memopt.units import GiB, MiB, format_bytes, format_s

_DAY_S = 24 * 60 * 60
_WORTH_TELLING_BYTES = GiB  # less than this says nothing of a day


@dataclass(frozen=True, slots=True, kw_only=True)
class IoTotals:
    """What memopt's own transfers moved (bytes) and took (seconds): `busy_s` some ran, `waited_s` compute waited."""

    read_bytes: int = 0
    write_bytes: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What the job itself has to say; all of it goes into the report as it is. `predicted` is the plan's.

    `write_budget_bytes`: what the process tree may write to devices.
    """

    command: Sequence[str] = ()
    predicted: Mapping[Tier, Prediction] = field(default_factory=dict)
    predicted_write_bytes: int | None = None
    write_budget_bytes: int | None = None
    child: ChildUse | None = None
    results: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    reasons: Sequence[str] = ()
    notes: Sequence[str] = ()


def assemble(measured: Measured, ledger: Ledger, machine: Machine, story: Story, io: IoTotals | None = None) -> Report:
    """The report of one job. A tier nothing was measured, charged or budgeted on is left out (None)."""
    tiers = Tiers(
        gpu=_gpu(measured, ledger, machine, story.predicted),
        dram=_dram(measured, ledger, story.predicted),
        ssd=_ssd(measured, ledger, machine, story, io),
    )
    return Report(
        memopt=__version__,
        command=list(story.command),
        started=measured.started,
        wall_s=measured.wall_s,
        machine=machine,
        verdict=_verdict(tiers, measured),
        tiers=tiers,
        io=_io(io),
        phases=measured.phases,
        timeline=measured.timeline,
        results=dict(story.results),
        config=dict(story.config),
        reasons=list(story.reasons),
        notes=[*machine.notes, *story.notes, *_own_notes(measured, machine)],
        child=story.child,
        overhead=Overhead(samples=measured.samples, cpu_s=measured.cost_s, dram_bytes=measured.own_dram_bytes),
    )


def _common(
    tier: Tier, peak: int | None, measured: Measured, ledger: Ledger, predicted: Mapping[Tier, Prediction]
) -> dict[str, Any]:
    budget = ledger.budget.bytes_of(tier)
    charged = ledger.peak_bytes(tier)
    by = measured.at_peak.get(tier)
    attributed_by = measured.attributed_by if by is not None else "ledger" if charged else None
    # without attribution at the measured peak: what was charged at the ledger's own peak
    by = ledger.at_peak(tier) if by is None else by
    forecast = predicted.get(tier)
    return {
        "budget_bytes": budget,
        "peak_bytes": peak,
        "charged_peak_bytes": charged,
        "predicted_bytes": None if forecast is None else forecast.total_bytes,
        "within": None if budget is None or peak is None else peak <= budget,
        "at_peak": by_category(by, sum(by.values()) if peak is None else peak),
        "attributed_by": attributed_by,
        "kinds_at_peak": dict(measured.kinds_at_peak.get(tier, {})),
        "predicted_at_peak": {} if forecast is None else {str(what): n for what, n in forecast.by_category.items()},
    }


def _used(tier: Tier, peak: int | None, ledger: Ledger, predicted: Mapping[Tier, Prediction]) -> bool:
    return (
        peak is not None or ledger.peak_bytes(tier) > 0 or ledger.budget.bytes_of(tier) is not None or tier in predicted
    )


def _dram(measured: Measured, ledger: Ledger, predicted: Mapping[Tier, Prediction]) -> DramUse:
    container = measured.container
    return DramUse(
        upper_bound_bytes=measured.dram_upper_bound_bytes,
        file_bytes=measured.file_peak_bytes,
        proportional_bytes=measured.proportional_bytes,
        locked_bytes=measured.locked_bytes,
        page_cache_bytes=measured.page_cache_bytes,
        limit_bytes=container.limit_bytes,
        limit_file=container.limit_file,
        working_set_bytes=container.working_set_bytes,
        container_peak_bytes=container.peak_bytes,
        oom_kills=container.oom_kills,
        **_common(Tier.DRAM, measured.dram_peak_bytes, measured, ledger, predicted),
    )


def _gpu(measured: Measured, ledger: Ledger, machine: Machine, predicted: Mapping[Tier, Prediction]) -> GpuUse | None:
    peak = measured.gpu_peak_bytes
    if not _used(Tier.GPU, peak, ledger, predicted):
        return None
    common = _common(Tier.GPU, peak, measured, ledger, predicted)
    if machine.unified:  # one pool: DRAM's budget and verdict are about these bytes too
        common.update(budget_bytes=None, within=None)
    return GpuUse(
        devices=measured.devices,
        pinned_bytes=measured.pinned_bytes,
        alloc_retries=measured.alloc_retries,
        **common,
    )


def _ssd(measured: Measured, ledger: Ledger, machine: Machine, story: Story, io: IoTotals | None) -> SsdUse | None:
    peak = measured.ssd_peak_bytes
    moved = measured.process_read_bytes + measured.process_write_bytes >= MiB
    if not (moved or io or story.write_budget_bytes or _used(Tier.SSD, peak, ledger, story.predicted)):
        return None
    return SsdUse(
        write_budget_bytes=story.write_budget_bytes,
        disks=measured.disks,
        read_bytes=io.read_bytes if io else None,
        write_bytes=io.write_bytes if io else None,
        process_read_bytes=measured.process_read_bytes,
        process_write_bytes=measured.process_write_bytes,
        predicted_write_bytes=story.predicted_write_bytes,
        endurance_bytes=machine.ssd_endurance_bytes,
        **_common(Tier.SSD, peak, measured, ledger, story.predicted),
    )


def _io(io: IoTotals | None) -> IoUse:
    if io is None or io.busy_s <= 0:
        return IoUse(waited_s=io.waited_s if io else 0.0)
    return IoUse(
        waited_s=io.waited_s,
        busy_s=io.busy_s,
        read_per_s=io.read_bytes / io.busy_s,
        write_per_s=io.write_bytes / io.busy_s,
        achieved_per_s=(io.read_bytes + io.write_bytes) / io.busy_s,
    )


def _verdict(tiers: Tiers, measured: Measured) -> Verdict:
    verdicts = [use.within for use in (tiers.gpu, tiers.dram, tiers.ssd) if use is not None]
    if tiers.ssd is not None and tiers.ssd.write_budget_bytes is not None:
        verdicts.append((tiers.ssd.process_write_bytes or 0) <= tiers.ssd.write_budget_bytes)
    if False in verdicts or measured.oom_kills > 0:
        return "over"
    return "within" if True in verdicts else "unbounded"


def _own_notes(measured: Measured, machine: Machine) -> list[str]:
    notes = []
    if measured.gpu_guessed:
        notes.append(
            "the GPU's driver does not tell this job's processes apart here: what the device holds more than at the "
            "start stands in, other jobs' share included"
        )
    if machine.unified and measured.gpu_peak_bytes:
        notes.append("GPU and DRAM are one pool: the GPU's bytes are among those of DRAM, which the budget is about")
    if measured.oom_kills > 0:
        where = f" ({measured.container.oom_kills_file})" if measured.container.oom_kills_file else ""
        notes.append(
            f"the kernel killed {measured.oom_kills} process(es) of this container for memory during the run{where}"
        )
    return [*notes, *_wear(measured, machine)]


def _wear(measured: Measured, machine: Machine) -> list[str]:
    """How long the drive lasts at this rate."""
    written, endurance = measured.process_write_bytes, machine.ssd_endurance_bytes
    if written < _WORTH_TELLING_BYTES or measured.wall_s <= 0:
        return []
    per_day = written / measured.wall_s * _DAY_S
    note = f"written to drives: {format_bytes(written)} in {format_s(measured.wall_s)}, {format_bytes(per_day)} a day"
    if endurance is None:
        return [f"{note} at this rate; the drive's endurance is not known (ssd_endurance_bytes of the machine)"]
    days = endurance / per_day
    return [f"{note} at this rate; the drive's endurance of {format_bytes(endurance)} would last {days:,.0f} days"]
