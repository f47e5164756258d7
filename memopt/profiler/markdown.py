"""A report, or a comparison of two, as Markdown for the summary of a CI run or a comment on a pull request."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

from memopt import atomic
from memopt.profiler.compare import Comparison
from memopt.profiler.render_grids import (
    Grid,
    category_grids,
    device_grid,
    disk_grid,
    facts,
    phase_grid,
    tier_grid,
    verdict_reason,
    verdict_words,
)
from memopt.report_types import Report
from memopt.units import format_s

_MARKS = {"within": "✅", "over": "❌", "unbounded": "⚪"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!])")


def save_markdown(text: str, path: str | Path) -> None:
    """Write it in one atomic step. Raises BadInput when the path cannot be written."""
    atomic.save_text("markdown", path, text)


def report_markdown(report: Report) -> str:
    """The verdict and the tiers in sight, the rest folded away."""
    reason = verdict_reason(report)
    where = f"`{_code(shlex.join(report.command) or 'a job')}` on {escaped(report.machine.name)}"
    lines = [
        f"### {_MARKS[report.verdict]} memopt: {verdict_words(report)}",
        "",
        *([escaped(reason) + ".", ""] if reason else []),
        f"{where}, {format_s(report.wall_s)}",
        "",
        grid_markdown(tier_grid(report).trimmed()),
        "",
        "<details><summary>What the bytes were, phases, notes</summary>",
        "",
    ]
    for grid in (*category_grids(report), phase_grid(report), device_grid(report), disk_grid(report)):
        if grid is not None:
            lines += [grid_markdown(grid), ""]
    told = [f"- {subject}: {escaped(text)}" for subject, text in facts(report)]
    told += [f"- reason: {escaped(reason)}" for reason in report.reasons]
    told += [f"- note: {escaped(note)}" for note in report.notes]
    if told:
        lines += [*told, ""]
    lines += ["</details>", ""]
    return "\n".join(lines)


def comparison_markdown(comparison: Comparison) -> str:
    """What grew, shrank or is over; what stayed is folded away."""
    mark = "❌" if comparison.over else "✅"
    lines = [
        f"### {mark} memopt: {escaped(comparison.verdict())}",
        "",
        grid_markdown(comparison.grid(changed_only=True)),
        "",
    ]
    lines += [f"- {escaped(note)}" for note in comparison.notes]
    whole = [
        "<details><summary>All that was compared</summary>",
        "",
        grid_markdown(comparison.grid()),
        "",
        "</details>",
    ]
    return "\n".join([*lines, *([""] if comparison.notes else []), *whole, ""])


def grid_markdown(grid: Grid) -> str:
    """A table; the first column to the left, all others to the right."""
    rows = [grid.columns, tuple(":--" if k == 0 else "--:" for k in range(len(grid.columns)))]
    head = [_row(rows[0], escape=True), _row(rows[1], escape=False)]
    return "\n".join([*head, *(_row(row, escape=True) for row in grid.rows)])


def escaped(text: str) -> str:
    """One line of Markdown that shows `text` as it is: no markup, no HTML, no mentions."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return _SPECIAL.sub(r"\\\1", plain).replace("@", "@\u200b")


def _code(text: str) -> str:
    """Inside backquotes nothing is markup but a backquote."""
    return " ".join(text.split()).replace("`", "'")


def _row(cells: tuple[str, ...], *, escape: bool) -> str:
    return "| " + " | ".join(escaped(cell) if escape else cell for cell in cells) + " |"
