"""What a report says, as tables and sentences of plain text: terminal, page and Markdown show the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memopt.report_types import ChildUse, DramUse, GpuUse, Overhead, Phase, Report, SsdUse, TierUse
from memopt.tiers import Category, Tier
from memopt.units import format_bytes, format_per_s, format_s

NONE = "-"
_LOSSES_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A small table of text. The first column is a name, all others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def trimmed(self) -> Grid:
        """Without the columns that say nothing in any row."""
        told = [i for i in range(len(self.columns)) if i == 0 or any(row[i] != NONE for row in self.rows)]
        rows = tuple(tuple(row[i] for i in told) for row in self.rows)
        return Grid(title=self.title, columns=tuple(self.columns[i] for i in told), rows=rows)


def tiers_of(report: Report) -> Iterator[tuple[Tier, TierUse]]:
    """The tiers the job touched, the fastest first."""
    for tier, use in ((Tier.GPU, report.tiers.gpu), (Tier.DRAM, report.tiers.dram), (Tier.SSD, report.tiers.ssd)):
        if use is not None:
            yield tier, use


def verdict_words(report: Report) -> str:
    """The verdict in two or three words."""
    return {"within": "within budget", "over": "OVER BUDGET", "unbounded": "no budget was given"}[report.verdict]


def verdict_reason(report: Report) -> str:
    """What the verdict rests on, in one line: who killed the job, the tiers that are over, else all with a budget.

    That the job itself failed stands there too: a job that ended early may have kept its budget by that.
    """
    child = report.child
    if child is not None and child.killed_for_memory:
        return f"the kernel killed the job for memory ({child.evidence or 'its own count went up'})"
    reason = _budget_reason(report)
    if child is not None and child.exit_code != 0:
        failed = f"the job itself failed ({child.signal or f'exit code {child.exit_code}'})"
        return f"{reason}; {failed}" if reason else failed
    return reason


def _budget_reason(report: Report) -> str:
    told = [(tier, use, use.peak_bytes, use.budget_bytes) for tier, use in tiers_of(report)]
    over = [
        f"{tier} peaked at {format_bytes(peak)}, {format_bytes(peak - budget)} over its {format_bytes(budget)}"
        for tier, use, peak, budget in told
        if use.within is False and peak is not None and budget is not None
    ]
    if over:
        return "; ".join(over)
    if report.verdict == "over" and report.tiers.dram.oom_kills:
        return f"the kernel killed {report.tiers.dram.oom_kills} process(es) of the container for memory"
    if report.verdict == "unbounded":
        return "; ".join(f"{tier} peaked at {format_bytes(peak)}" for tier, _, peak, _ in told if peak is not None)
    return "; ".join(
        f"{tier} {format_bytes(peak)} of {format_bytes(budget)}"
        for tier, _, peak, budget in told
        if peak is not None and budget is not None
    )


def error_of(predicted: int | None, measured: int | None) -> float | None:
    """How far the prediction was off, as a share of what was measured; above zero: too much was predicted."""
    if predicted is None or not measured or measured < 0:
        return None
    return predicted / measured - 1


def tier_grid(report: Report) -> Grid:
    """One row per tier: budget, predicted, measured, how far off, share of the budget, verdict."""
    rows = []
    for tier, use in tiers_of(report):
        share = use.peak_bytes / use.budget_bytes if use.budget_bytes and use.peak_bytes is not None else None
        rows.append(
            (
                str(tier),
                bytes_text(use.budget_bytes),
                bytes_text(use.predicted_bytes),
                bytes_text(use.peak_bytes),
                percent(error_of(use.predicted_bytes, use.peak_bytes)),
                NONE if share is None else f"{share:.0%}",
                {True: "within", False: "OVER", None: NONE}[use.within],
            )
        )
    columns = ("tier", "budget", "predicted", "measured", "error", "of budget", "verdict")
    return Grid(title="tiers", columns=columns, rows=tuple(rows))


def categories_of(use: TierUse) -> list[tuple[str, int | None, int | None]]:
    """(category, predicted, measured) bytes at the peak; `other` always, last. Names of newer versions are kept.

    Without any attribution everything that was measured is `other`.
    """
    measured = dict(use.at_peak)
    if not measured and use.peak_bytes is not None:
        measured = {str(Category.OTHER): use.peak_bytes}
    names = [str(category) for category in Category if category is not Category.OTHER]
    names += sorted((measured.keys() | use.predicted_at_peak.keys()) - set(names) - {str(Category.OTHER)})
    found: list[tuple[str, int | None, int | None]] = []
    for name in [*names, str(Category.OTHER)]:
        told = measured.get(name, 0), use.predicted_at_peak.get(name)
        if any(told) or name == Category.OTHER:
            found.append((name, told[1], told[0] if use.peak_bytes is not None or name in measured else None))
    return found


def category_grids(report: Report) -> Iterator[Grid]:
    """One per tier: what its bytes were at the peak, as predicted and as measured."""
    for tier, use in tiers_of(report):
        if use.peak_bytes is None and not use.predicted_at_peak and not any(use.at_peak.values()):
            continue
        rows = [
            (
                name,
                bytes_text(predicted),
                bytes_text(measured),
                percent(error_of(predicted, measured)),
                percent_of(measured, use.peak_bytes),
            )
            for name, predicted, measured in categories_of(use)
        ]
        total = bytes_text(use.predicted_bytes), bytes_text(use.peak_bytes)
        rows.append(("all", *total, percent(error_of(use.predicted_bytes, use.peak_bytes)), NONE))
        columns = (f"{tier} at its peak", "predicted", "measured", "error", "share")
        yield Grid(title=f"{tier} at its peak", columns=columns, rows=tuple(rows)).trimmed()


def in_order(phases: list[Phase]) -> list[Phase]:
    """By start, an outer phase before those inside it; a session appends a phase when it ends."""
    return sorted(phases, key=lambda phase: (phase.start_s, -phase.end_s))


def phase_grid(report: Report) -> Grid | None:
    """Phases of one name added up, in order of appearance; None without phases."""
    groups: dict[str, list[Phase]] = {}
    for phase in in_order(report.phases):
        groups.setdefault(phase.name, []).append(phase)
    if not groups:
        return None
    rows = tuple(
        (
            name,
            str(len(phases)),
            format_s(sum(phase.end_s - phase.start_s for phase in phases)),
            bytes_text(_most([phase.gpu_peak_bytes for phase in phases])),
            bytes_text(_most([phase.dram_peak_bytes for phase in phases])),
            bytes_text(_sum([phase.read_bytes for phase in phases])),
            bytes_text(_sum([phase.write_bytes for phase in phases])),
        )
        for name, phases in groups.items()
    )
    columns = ("phase", "times", "time", "gpu peak", "dram peak", "read", "written")
    return Grid(title="phases", columns=columns, rows=rows).trimmed()


def device_grid(report: Report) -> Grid | None:
    """One row per GPU; None without GPUs."""
    if report.tiers.gpu is None or not report.tiers.gpu.devices:
        return None
    rows = tuple(
        (
            f"{each.index} {each.name}",
            bytes_text(each.used_bytes),
            bytes_text(each.process_bytes),
            bytes_text(each.reserved_bytes),
            bytes_text(each.allocated_bytes),
            bytes_text(each.others_bytes),
        )
        for each in report.tiers.gpu.devices
    )
    columns = ("gpu", "device", "this job", "reserved", "allocated", "others")
    return Grid(title="GPUs at their peaks", columns=columns, rows=rows).trimmed()


def disk_grid(report: Report) -> Grid | None:
    """One row per block device; None where none was watched."""
    if report.tiers.ssd is None or not report.tiers.ssd.disks:
        return None
    rows = tuple(
        (
            each.name,
            format_bytes(each.read_bytes),
            format_bytes(each.write_bytes),
            NONE if each.read_wait_s is None else format_s(each.read_wait_s),
            NONE if each.write_wait_s is None else format_s(each.write_wait_s),
            NONE if each.queue is None else f"{each.queue:.1f}",
        )
        for each in report.tiers.ssd.disks
    )
    columns = ("disk, all jobs", "read", "written", "read wait", "write wait", "queue")
    return Grid(title="disks", columns=columns, rows=rows).trimmed()


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """(subject, sentence) pairs: what no table has room for."""
    if not report.complete:
        yield "incomplete", "made from the samples on disk: the profiler itself was killed before the end"
    if report.child is not None:
        yield "job", _child(report.child)
    if report.tiers.gpu is not None:
        yield from (("gpu", text) for text in _gpu_facts(report.tiers.gpu))
    yield from (("dram", text) for text in _dram_facts(report.tiers.dram))
    if report.tiers.ssd is not None:
        yield from (("ssd", text) for text in _ssd_facts(report.tiers.ssd))
    io = report.io
    if io.achieved_per_s is not None:
        rates = f"{format_per_s(io.achieved_per_s)} ({_rate(io.read_per_s)} read, {_rate(io.write_per_s)} written)"
        yield "io", f"{rates} over {format_s(io.busy_s)} of transfers; compute waited {format_s(io.waited_s)}"
    if report.overhead is not None:
        yield "watching", _overhead(report.overhead, report.wall_s)


def result_lines(results: dict[str, object]) -> Iterator[tuple[str, str]]:
    """(name, value) of what the job was for; nested data is for the JSON."""
    for name, value in results.items():
        if value is None or isinstance(value, dict) or value == []:
            continue
        if isinstance(value, list) and len(value) > 2 * _LOSSES_SHOWN:
            ends = [*map(_short, value[:_LOSSES_SHOWN]), "...", *map(_short, value[-_LOSSES_SHOWN:])]
            yield name, f"{', '.join(ends)} ({len(value)} values)"
        else:
            yield name, _short(value)


def bytes_text(nbytes: int | None) -> str:
    """For reading; `-` where nothing is known."""
    return NONE if nbytes is None else format_bytes(nbytes)


def percent(share: float | None) -> str:
    """`+2.5%`; `-` where nothing is known."""
    return NONE if share is None else f"{share:+.1%}"


def percent_of(part: int | None, whole: int | None) -> str:
    """`31%` of `whole`; `-` where it cannot be said."""
    return NONE if part is None or not whole else f"{part / whole:.0%}"


def _child(child: ChildUse) -> str:
    text = f"left with exit code {child.exit_code}"
    if child.signal is not None:
        text += f", ended by {child.signal}"
    if child.killed_for_memory:
        text += f"; the kernel killed for memory ({child.evidence or 'its own count went up'})"
    return text


def _attribution(use: TierUse) -> Iterator[str]:
    if use.charged_peak_bytes:
        yield f"{format_bytes(use.charged_peak_bytes)} charged to memopt's ledger at the most"
    named = any(nbytes for name, nbytes in use.at_peak.items() if name != Category.OTHER)
    if use.attributed_by is None and use.peak_bytes and not named and not isinstance(use, SsdUse):
        yield "nobody said what the bytes were: all is other"
    if use.attributed_by == "torch":
        yield "categories by torch's own modules, optimizers and allocator; the rest is other"
    if use.kinds_at_peak:
        kinds = ", ".join(f"{format_bytes(n)} {name.replace('_', ' ')}" for name, n in use.kinds_at_peak.items())
        yield f"at the peak: {kinds}"


def _gpu_facts(gpu: GpuUse) -> Iterator[str]:
    yield from _attribution(gpu)
    if gpu.pinned_bytes:
        yield f"{format_bytes(gpu.pinned_bytes)} of host memory pinned by torch at the most (it counts as dram)"
    if gpu.alloc_retries:
        yield f"torch's allocator had to free its cache and try again {gpu.alloc_retries} time(s): memory was tight"


def _dram_facts(dram: DramUse) -> Iterator[str]:
    yield from _attribution(dram)
    if dram.proportional_bytes is not None:
        yield (
            f"{format_bytes(dram.proportional_bytes)} with each shared page counted once (PSS less file pages), "
            "the most of one look a second or fewer"
        )
    if dram.locked_bytes:
        yield f"{format_bytes(dram.locked_bytes)} locked or pinned at the most, among the above"
    if dram.upper_bound_bytes is not None:
        files = bytes_text(dram.file_bytes)
        yield (
            f"the kernel's upper bound is {format_bytes(dram.upper_bound_bytes)}, file pages included "
            f"(at most {files} of those, reclaimable)"
        )
    if dram.page_cache_bytes is not None:
        yield f"{format_bytes(dram.page_cache_bytes)} of the watched files in the page cache at the most"
    yield from _container_facts(dram)


def _container_facts(dram: DramUse) -> Iterator[str]:
    told = []
    if dram.limit_bytes is not None:
        told.append(f"limit {format_bytes(dram.limit_bytes)} ({dram.limit_file or 'where it is set is not known'})")
    if dram.working_set_bytes is not None:
        told.append(f"working set {format_bytes(dram.working_set_bytes)} at the most")
    if dram.container_peak_bytes is not None:
        told.append(f"kernel's mark {format_bytes(dram.container_peak_bytes)}, page cache included")
    if dram.oom_kills is not None:
        told.append(f"{dram.oom_kills} killed for memory")
    if told:
        yield f"container: {'; '.join(told)}"


def _ssd_facts(ssd: SsdUse) -> Iterator[str]:
    yield from _attribution(ssd)
    if ssd.read_bytes is not None and ssd.write_bytes is not None:
        yield f"{format_bytes(ssd.read_bytes)} read and {format_bytes(ssd.write_bytes)} written by memopt"
    if ssd.process_read_bytes is not None and ssd.process_write_bytes is not None:
        read, written = format_bytes(ssd.process_read_bytes), format_bytes(ssd.process_write_bytes)
        yield f"{read} read and {written} written by the whole process tree, as the kernel counts"
    written_bytes = ssd.write_bytes if ssd.write_bytes is not None else ssd.process_write_bytes
    if ssd.predicted_write_bytes is not None:
        off = percent(error_of(ssd.predicted_write_bytes, written_bytes))
        yield f"{format_bytes(ssd.predicted_write_bytes)} of writes predicted (error {off})"
    if ssd.write_budget_bytes and written_bytes is not None:
        share = written_bytes / ssd.write_budget_bytes
        yield f"{share:.0%} of the {format_bytes(ssd.write_budget_bytes)} that may be written"
    if ssd.endurance_bytes and written_bytes:
        yield f"this run used {written_bytes / ssd.endurance_bytes:.4%} of the drive's endurance"


def _overhead(overhead: Overhead, wall_s: float) -> str:
    share = f" ({overhead.cpu_s / wall_s:.2%} of the run)" if wall_s > 0 else ""
    memory = "" if overhead.dram_bytes is None else f", {format_bytes(overhead.dram_bytes)} resident"
    return f"{overhead.samples} samples, {overhead.cpu_s:.3f} s of CPU time{share}{memory}"


def _most(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return str(value)


def _rate(bytes_per_s: float | None) -> str:
    return NONE if bytes_per_s is None else format_per_s(bytes_per_s)
