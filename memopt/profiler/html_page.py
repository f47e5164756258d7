"""A report as one page: no network, no files beside it, readable without its scripts but for the time line.

The charts are drawn by uPlot (MIT), which lies in `vendor/` and goes into the page with its licence.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from memopt import atomic
from memopt.profiler.render_grids import (
    Grid,
    bytes_text,
    categories_of,
    category_grids,
    device_grid,
    disk_grid,
    error_of,
    facts,
    percent,
    phase_grid,
    result_lines,
    tiers_of,
    verdict_reason,
    verdict_words,
)
from memopt.profiler.render_series import Panel, panels_of
from memopt.report_types import Report, TierUse
from memopt.tiers import Category, Tier
from memopt.units import format_bytes, format_s

_UPLOT = "uPlot-1.6.32"
_KNOWN = {str(category) for category in Category}


def save_html(report: Report, path: str | Path) -> None:
    """Write the page in one atomic step. Raises BadInput when the path cannot be written."""
    atomic.save_text("page", path, html_page(report))


def html_page(report: Report) -> str:
    """The page as text. What comes from the report is escaped, and its policy lets no script run but the page's own."""
    scripts = [_part("vendor", f"{_UPLOT}.min.js"), _part("page", "report.js")]
    policy = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    title = f"{verdict_words(report)}: {_command(report)}"
    panels = panels_of(report)
    body = "\n".join(
        [
            _header(report),
            _verdict(report),
            f'<div class="tiers">{"".join(_tier_card(tier, use) for tier, use in tiers_of(report))}</div>',
            _time_line(report, panels),
            _at_peak(report),
            *(_table_section(grid) for grid in (phase_grid(report), device_grid(report), disk_grid(report)) if grid),
            _pairs_section("What else was seen", facts(report)),
            _pairs_section("What the job was for", result_lines(report.results)),
            _list_section("Why it was done so", report.reasons),
            _list_section("Notes", report.notes),
            _configuration(report),
        ]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src {policy}; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_text(title[:120])}</title>
<style>
{_part("vendor", f"{_UPLOT}.min.css")}
{_part("page", "report.css")}</style>
</head>
<body>
<main>
{body}
<footer>memopt {_text(report.memopt)}, {_text(report.schema)}. Sizes are binary: 1 GiB = 1024³ bytes. An error above
zero means that too much was predicted. Charts by uPlot.</footer>
</main>
<script type="application/json" id="data">{_json(_chart_data(report, panels))}</script>
<!--
uPlot {_UPLOT.partition("-")[2]}
{_part("vendor", "uPlot-LICENSE")}-->
{"".join(f"<script>{script}</script>{chr(10)}" for script in scripts)}</body>
</html>
"""


def _part(folder: str, name: str) -> str:
    return resources.files("memopt.profiler").joinpath(folder, name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(data: Any) -> str:
    """JSON that no `</script>`, `<!--` or odd line end inside it can end."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(value: object) -> str:
    return html.escape(str(value))


def _command(report: Report) -> str:
    return shlex.join(report.command) or "a job"


def _moment(started: str) -> str:
    try:
        return f"{datetime.fromisoformat(started):%Y-%m-%d %H:%M:%S %Z}".strip()
    except ValueError:
        return started


def _header(report: Report) -> str:
    told = ", ".join(
        [
            report.machine.name,
            f"{report.machine.cpu_count} CPUs",
            *([report.machine.gpu_name] if report.machine.gpu_name else []),
            _moment(report.started),
            format_s(report.wall_s),
        ]
    )
    return (
        f'<header><div><h1><code>{_text(_command(report))}</code><br><span class="soft">{_text(told)}</span></h1></div>'
        '<button id="theme" type="button" title="the other colours">Dark</button></header>'
    )


def _verdict(report: Report) -> str:
    mark = {"within": "✓", "over": "✕", "unbounded": "–"}[report.verdict]
    words = verdict_words(report)
    words = words if report.verdict == "over" else words[0].upper() + words[1:]
    return (
        f'<section class="verdict {_text(report.verdict)}"><span class="mark" aria-hidden="true">{mark}</span>'
        f"<div><strong>{_text(words)}</strong><p>{_text(verdict_reason(report))}</p></div></section>"
    )


def _tier_card(tier: Tier, use: TierUse) -> str:
    verdict = {
        True: '<span class="good">within</span>',
        False: '<span class="bad">over</span>',
        None: "<span>no budget</span>",
    }[use.within]
    budget = f" of {format_bytes(use.budget_bytes)}" if use.budget_bytes is not None else ""
    parts = [
        f'<section><div class="tier-name"><span>{tier}</span>{verdict}</div>',
        f'<div class="big">{bytes_text(use.peak_bytes)}<small>{budget}</small></div>',
        _budget_bar(use),
    ]
    if use.predicted_bytes is not None:
        off = percent(error_of(use.predicted_bytes, use.peak_bytes))
        parts.append(f'<div class="soft">predicted {format_bytes(use.predicted_bytes)}, error {off}</div>')
    return "".join(parts) + "</section>"


def _budget_bar(use: TierUse) -> str:
    whole = max(use.budget_bytes or 0, use.peak_bytes or 0, use.predicted_bytes or 0)
    if not whole or use.budget_bytes is None:
        return ""
    parts = [f'<i class="{"over" if use.within is False else ""}" style="width:{_share(use.peak_bytes, whole)}"></i>']
    if use.predicted_bytes is not None:
        left = _share(use.predicted_bytes, whole)
        parts.append(f'<b class="predicted" style="left:{left}" title="predicted"></b>')
    if use.budget_bytes < whole:
        parts.append(f'<b style="left:{_share(use.budget_bytes, whole)}" title="budget"></b>')
    return f'<div class="bar">{"".join(parts)}</div>'


def _share(part: int | None, whole: int) -> str:
    return f"{max(0.0, min(1.0, (part or 0) / whole)):.2%}"


def _time_line(report: Report, panels: Sequence[Panel]) -> str:
    if not panels or len(report.timeline.t_s) < 2:
        return ""
    idle = "Point at a chart to read it; drag to zoom in, double-click to see all."
    parts = [f'<p id="readout" data-idle="{idle}" style="margin:0">{idle}</p>']
    if report.phases:
        parts.append('<div class="panel" data-panel="phases"></div>')
    for number, panel in enumerate(panels):
        parts.append(
            f'<div class="tier-chart"><h3>{panel.tier}</h3><div class="panel" data-panel="{number}"></div></div>'
        )
    return f'<section class="long"><h2>Over time</h2>{"".join(parts)}</section>'


def _at_peak(report: Report) -> str:
    grids = list(category_grids(report))
    uses = {f"{tier} at its peak": (tier, use) for tier, use in tiers_of(report)}
    parts = []
    for grid in grids:
        tier, use = uses[grid.title]
        parts.append(f'<div class="at-peak"><h3>{tier}</h3>{_stacks(use)}{_table(grid, swatches=True)}</div>')
    return f'<section class="long"><h2>What the bytes were at the peak</h2>{"".join(parts)}</section>' if parts else ""


def _stacks(use: TierUse) -> str:
    found = categories_of(use)
    rows = {"predicted": [(name, n) for name, n, _ in found], "measured": [(name, n) for name, _, n in found]}
    if not any(n for _, n in rows["predicted"]):
        del rows["predicted"]
    whole = max(sum(max(0, n or 0) for _, n in row) for row in rows.values())
    if not whole:
        return ""
    strips = []
    for title, row in rows.items():
        segments = "".join(
            f'<i class="{"other" if name == Category.OTHER else ""}" title="{_text(name)} {format_bytes(n)}" '
            f'style="width:{_share(n, whole)};background:{_colour(name)}">{_text(name)}</i>'
            for name, n in row
            if n and n > 0
        )
        strips.append(f'<span>{title}</span><div class="strip">{segments}</div>')
    return f'<div class="stack">{"".join(strips)}</div>'


def _colour(category: str) -> str:
    return f"var(--c-{category})" if category in _KNOWN else "var(--c-runtime)"


def _table(grid: Grid, swatches: bool = False) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in grid.columns)
    rows = "".join(_row(row, swatches) for row in grid.rows)
    return f'<div class="scroll"><table class="grid"><tr>{head}</tr>{rows}</table></div>'


def _row(row: tuple[str, ...], swatches: bool) -> str:
    swatch = ""
    if swatches and row[0] != "all":
        swatch = f'<span class="swatch" style="background:{_colour(row[0])}"></span>'
    cells = "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
    return f'<tr class="{"all" if row[0] == "all" else ""}"><td>{swatch}{_text(row[0])}</td>{cells}</tr>'


def _table_section(grid: Grid) -> str:
    title = grid.title[0].upper() + grid.title[1:]
    return f"<section><h2>{_text(title)}</h2>{_table(grid)}</section>"


def _pairs_section(title: str, pairs: Iterable[tuple[str, str]]) -> str:
    items, last = "", ""
    for subject, text in pairs:
        items += ("" if subject == last else f"<dt>{_text(subject)}</dt>") + f"<dd>{_text(text)}</dd>"
        last = subject
    return f"<section><h2>{title}</h2><dl>{items}</dl></section>" if items else ""


def _list_section(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<section><h2>{title}</h2><ul>{items}</ul></section>" if items else ""


def _configuration(report: Report) -> str:
    if not report.config:
        return ""
    text = json.dumps(report.to_dict()["config"], indent=1, ensure_ascii=False)
    return f"<section><details><summary>Configuration</summary><pre>{_text(text)}</pre></details></section>"


def _chart_data(report: Report, panels: Sequence[Panel]) -> dict[str, Any]:
    return {
        "t": report.timeline.t_s,
        "panels": [
            {
                "tier": str(panel.tier),
                "budget": panel.budget_bytes,
                "predicted": panel.predicted_bytes,
                "measured": panel.measured,
                "categories": panel.categories,
            }
            for panel in panels
        ],
        "phases": [{"name": phase.name, "start": phase.start_s, "end": phase.end_s} for phase in report.phases],
    }
