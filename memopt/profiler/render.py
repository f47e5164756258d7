"""A report for the eye: a table with one bar per budget, and what the bytes were."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from memopt.report_types import Report, SsdUse, TierUse
from memopt.tiers import Category
from memopt.units import format_bytes, format_per_s, format_s

_BAR_CELLS = 16
_COLOURS = {"within": "green", "over": "bold red", "unbounded": "yellow"}
_LOSSES_SHOWN = 3


def render(report: Report, console: Console | None = None) -> None:
    """Print to `console` (default: stdout). Plain lines without colour or boxes when that is not a terminal."""
    console = console or Console()
    console.print(renderable(report, plain=not console.is_terminal))


def renderable(report: Report, *, plain: bool = False) -> RenderableType:
    """The report as something rich can print; `plain` draws no boxes and only ASCII bars."""
    parts: list[RenderableType] = [_headline(report), _tier_table(report, plain), _category_table(report, plain)]
    parts.extend(Text(line) for line in _facts(report))
    parts.extend(Text(f"reason: {reason}") for reason in report.reasons)
    parts.extend(Text(f"note: {note}") for note in report.notes)
    return Group(*parts)


def render_text(report: Report, width: int = 120) -> str:
    """The report as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable(report, plain=True))
    return capture.get()


def _headline(report: Report) -> Text:
    words = {"within": "within budget", "over": "OVER BUDGET", "unbounded": "no budget was given"}
    text = Text(words[report.verdict], style=_COLOURS[report.verdict])
    text.append(f"  {report.machine.name}, {format_s(report.wall_s)}", style="none")
    return text


def _tiers(report: Report) -> Iterator[tuple[str, TierUse]]:
    for name, use in (("gpu", report.tiers.gpu), ("dram", report.tiers.dram), ("ssd", report.tiers.ssd)):
        if use is not None:
            yield name, use


def _new_table(plain: bool) -> Table:
    return Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _tier_table(report: Report, plain: bool) -> Table:
    table = _new_table(plain)
    table.add_column("tier", no_wrap=True)
    for title in ("budget", "predicted", "charged", "measured peak"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("share of budget", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, use in _tiers(report):
        verdict = {True: "within", False: "OVER", None: "-"}[use.within]
        table.add_row(
            name,
            _bytes(use.budget_bytes),
            _bytes(use.predicted_bytes),
            _bytes(use.charged_peak_bytes),
            _bytes(use.peak_bytes),
            _bar(use, plain),
            Text(verdict, style={True: "green", False: "bold red", None: "none"}[use.within]),
        )
    return table


def _bar(use: TierUse, plain: bool) -> Text:
    if not use.budget_bytes or use.peak_bytes is None:
        return Text("-")
    share = use.peak_bytes / use.budget_bytes
    filled = min(_BAR_CELLS, round(share * _BAR_CELLS))
    full, empty = ("#", ".") if plain else ("█", "░")
    bar = Text(full * filled, style="red" if share > 1 else "green")
    bar.append(empty * (_BAR_CELLS - filled), style="dim")
    bar.append(f" {share:.0%}", style="none")
    return bar


def _category_table(report: Report, plain: bool) -> Table:
    """One row per category that any tier holds at its peak; `other` is always there."""
    tiers = list(_tiers(report))
    table = _new_table(plain)
    table.add_column("at the peak", no_wrap=True)
    for name, _ in tiers:
        table.add_column(name, justify="right", no_wrap=True)
    for category in Category:
        held = [use.at_peak.get(category, 0) for _, use in tiers]
        if any(held) or category is Category.OTHER:
            table.add_row(str(category), *(_bytes(nbytes) for nbytes in held))
    return table


def _facts(report: Report) -> Iterator[str]:
    dram = report.tiers.dram
    if dram.upper_bound_bytes is not None:
        files = _bytes(dram.file_bytes)
        yield (
            f"dram: the kernel's upper bound is {_bytes(dram.upper_bound_bytes)}, file pages included "
            f"(at most {files} of those, reclaimable)"
        )
    if report.tiers.ssd is not None:
        yield from _ssd_facts(report.tiers.ssd)
    io = report.io
    if io.achieved_per_s is not None:
        rates = f"{format_per_s(io.achieved_per_s)} ({_rate(io.read_per_s)} read, {_rate(io.write_per_s)} written)"
        yield f"io: {rates} over {format_s(io.busy_s)} of transfers; compute waited {format_s(io.waited_s)}"
    yield from _results(report.results)


def _ssd_facts(ssd: SsdUse) -> Iterator[str]:
    if ssd.read_bytes is not None and ssd.write_bytes is not None:
        yield f"ssd: {format_bytes(ssd.read_bytes)} read and {format_bytes(ssd.write_bytes)} written by memopt"
    if ssd.process_read_bytes is not None and ssd.process_write_bytes is not None:
        read, written = format_bytes(ssd.process_read_bytes), format_bytes(ssd.process_write_bytes)
        yield f"ssd: {read} read and {written} written by the whole process tree, as the kernel counts"
    written_bytes = ssd.write_bytes if ssd.write_bytes is not None else ssd.process_write_bytes
    if ssd.endurance_bytes and written_bytes:
        yield f"ssd: this run used {written_bytes / ssd.endurance_bytes:.4%} of the drive's endurance"


def _results(results: dict[str, object]) -> Iterator[str]:
    for name, value in results.items():
        if value is None or isinstance(value, dict) or value == []:
            continue  # nested data (the plan) is for the JSON
        if isinstance(value, list) and len(value) > 2 * _LOSSES_SHOWN:
            ends = [*map(_short, value[:_LOSSES_SHOWN]), "...", *map(_short, value[-_LOSSES_SHOWN:])]
            yield f"{name}: {', '.join(ends)} ({len(value)} values)"
        else:
            yield f"{name}: {_short(value)}"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return str(value)


def _bytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)


def _rate(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else format_per_s(bytes_per_s)
