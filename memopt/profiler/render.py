"""A report for the terminal: the verdict first, one bar per budget, and what the bytes were."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from memopt.profiler.compare import Comparison
from memopt.profiler.render_grids import (
    Grid,
    category_grids,
    device_grid,
    disk_grid,
    facts,
    phase_grid,
    result_lines,
    tier_grid,
    tiers_of,
    verdict_reason,
    verdict_words,
)
from memopt.report_types import Report, TierUse
from memopt.units import format_s

# with this many cells the widest row of the tier table takes 79 columns
_BAR_CELLS = 10
_COLOURS = {"within": "bold green", "over": "bold red", "unbounded": "bold yellow"}


def render(report: Report, console: Console | None = None) -> None:
    """Print to `console` (default: stdout). Plain lines without colour or boxes when that is not a terminal."""
    console = console or Console()
    console.print(renderable(report, plain=not console.is_terminal))


def renderable(report: Report, *, plain: bool = False) -> RenderableType:
    """The report as something rich can print; `plain` draws no boxes and only ASCII bars."""
    parts: list[RenderableType | None] = [_headline(report), Text(""), _tier_table(report, plain)]
    grids = [*category_grids(report), phase_grid(report), device_grid(report), disk_grid(report)]
    for grid in grids:
        if grid is not None:
            parts += [Text(""), grid_table(grid, plain=plain)]
    parts.append(Text(""))
    parts.append(_pairs(list(facts(report))))
    reasons = [("reason", reason) for reason in report.reasons]
    parts.append(_pairs([*result_lines(report.results), *reasons, *(("note", note) for note in report.notes)]))
    return Group(*(part for part in parts if part is not None))


def render_text(report: Report, width: int = 120) -> str:
    """The report as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable(report, plain=True))
    return capture.get()


def grid_table(grid: Grid, *, plain: bool = False) -> Table:
    """A grid as rich prints it: the name on the left, numbers right-aligned."""
    table = _new_table(plain)
    for number, title in enumerate(grid.columns):
        table.add_column(title, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in grid.rows:
        style = {"other": "dim", "all": "bold"}.get(row[0], "")
        table.add_row(*(Text(cell) for cell in row), style=style)
    return table


def _headline(report: Report) -> Text:
    text = Text(verdict_words(report), style=_COLOURS[report.verdict])
    reason = verdict_reason(report)
    text.append(f": {reason}" if reason else "", style="none")
    text.append(f"\n{report.machine.name}, {format_s(report.wall_s)}, memopt {report.memopt}", style="dim")
    return text


def _pairs(pairs: list[tuple[str, str]]) -> Table | None:
    """Sentences under their subjects; what wraps stays under the sentence."""
    if not pairs:
        return None
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for subject, text in pairs:
        table.add_row(Text(f"{subject}:"), Text(text))
    return table


def _new_table(plain: bool) -> Table:
    return Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _tier_table(report: Report, plain: bool) -> Table:
    grid = tier_grid(report)
    table = _new_table(plain)
    for number, title in enumerate(grid.columns):
        numeric = 0 < number < len(grid.columns) - 2
        table.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for row, (_, use) in zip(grid.rows, tiers_of(report), strict=True):
        colour = {True: "green", False: "bold red", None: "none"}[use.within]
        table.add_row(*row[:-2], _bar(use, row[-2], plain), Text(row[-1], style=colour))
    return table


def _bar(use: TierUse, share_text: str, plain: bool) -> Text:
    if not use.budget_bytes or use.peak_bytes is None:
        return Text(share_text)
    share = use.peak_bytes / use.budget_bytes
    # rounded down: only what reaches its budget fills the bar
    filled = min(_BAR_CELLS, int(share * _BAR_CELLS))
    full, empty = ("#", ".") if plain else ("█", "░")
    bar = Text(full * filled, style="red" if share > 1 else "green")
    bar.append(empty * (_BAR_CELLS - filled), style="dim")
    bar.append(f" {share_text}", style="none")
    return bar


def render_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print what grew to `console` (default: stdout)."""
    console = console or Console()
    headline = Text(comparison.verdict(), style="bold red" if comparison.over else "bold green")
    notes = _pairs([("note", note) for note in comparison.notes])
    table = grid_table(comparison.grid(), plain=not console.is_terminal)
    parts: list[RenderableType] = [headline, Text(""), table]
    if notes is not None:
        parts += [Text(""), notes]
    console.print(Group(*parts))
