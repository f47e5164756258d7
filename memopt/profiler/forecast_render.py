"""A plan for the eye: a bar per budget, what the bytes are at the binding peak, what bounds a step, what would help."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from memopt.forecast_types import Forecast, Suggestion
from memopt.tiers import Category, Tier
from memopt.units import MiB, format_bytes, format_s

_BAR_CELLS = 24
_VERDICTS = {
    "fits": ("FITS", "bold green"),
    "does not fit": ("DOES NOT FIT", "bold red"),
    "unbounded": ("NO BUDGET", "yellow"),
}


def render(forecast: Forecast, console: Console | None = None) -> None:
    """Print to `console` (default: stdout). Plain lines without colour or boxes when that is not a terminal."""
    console = console or Console()
    console.print(renderable(forecast, plain=not console.is_terminal))


def render_text(forecast: Forecast, width: int = 120) -> str:
    """The plan as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable(forecast, plain=True))
    return capture.get()


def renderable(forecast: Forecast, *, plain: bool = False) -> RenderableType:
    """The plan as something rich can print; `plain` draws no boxes and only ASCII bars."""
    parts: list[RenderableType] = [
        _headline(forecast),
        Text(),
        _tiers(forecast, plain),
        Text(),
        _bytes_table(forecast, plain),
    ]
    if time := list(_time(forecast)):
        parts += [Text(), *(Text(line) for line in time)]
    if forecast.suggestions:
        parts += [Text(), _suggestions(forecast, plain)]
    if forecast.smallest:
        parts += [Text(), _smallest(forecast)]
    if forecast.reasons:
        parts += [Text(), *(Text(f"note: {reason}", style="dim") for reason in forecast.reasons)]
    return Group(*parts)


def _headline(forecast: Forecast) -> Text:
    word, style = _VERDICTS[forecast.verdict]
    text = Text(word, style=style)
    text.append(f"  {forecast.job}", style="bold")
    text.append("\nassuming " + "; ".join(forecast.assumptions), style="none")
    return text


def _table(plain: bool) -> Table:
    return Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _used(forecast: Forecast) -> list[Tier]:
    return [tier for tier in Tier if forecast.binding(tier) is not None]


def _tiers(forecast: Forecast, plain: bool) -> Table:
    table = _table(plain)
    table.add_column("tier", no_wrap=True)
    table.add_column("needs", justify="right", no_wrap=True)
    table.add_column("budget", justify="right", no_wrap=True)
    table.add_column("share of budget", no_wrap=True)
    table.add_column("peak in", no_wrap=True)
    for tier in _used(forecast):
        phase = forecast.binding(tier)
        assert phase is not None
        need, budget = phase.total_bytes(tier), forecast.budgets.get(str(tier))
        limit = "no limit" if budget is None else format_bytes(budget)
        table.add_row(str(tier), format_bytes(need), limit, _bar(need, budget, plain), phase.name)
    return table


def _bar(need: int, budget: int | None, plain: bool) -> Text:
    if not budget:
        return Text("-")
    share = need / budget
    filled = min(_BAR_CELLS, round(share * _BAR_CELLS))
    full, empty = ("#", ".") if plain else ("█", "░")
    bar = Text(full * filled, style="red" if share > 1 else "green")
    bar.append(empty * (_BAR_CELLS - filled), style="dim")
    bar.append(f" {_percent(share)}", style="bold red" if share > 1 else "none")
    return bar


def _percent(share: float) -> str:
    """Never 100 % for what is more than all of it."""
    text = f"{share:.0%}"
    return ">100%" if share > 1 and text == "100%" else text


def _bytes_table(forecast: Forecast, plain: bool) -> Table:
    """One row per category that some tier holds at its binding peak."""
    table = _table(plain)
    table.add_column("at the peak", no_wrap=True)
    held = _held(forecast)
    for tier in held:
        table.add_column(str(tier), justify="right", no_wrap=True)
    for category in Category:
        row = [held[tier].get(str(category), 0) for tier in held]
        if any(row):
            table.add_row(str(category), *(format_bytes(n) if n else "-" for n in row))
    return table


def _held(forecast: Forecast) -> dict[Tier, dict[str, int]]:
    return {tier: phase.use[str(tier)] for tier in Tier if (phase := forecast.binding(tier)) is not None}


def _time(forecast: Forecast) -> Iterator[str]:
    time = forecast.time
    if time is not None:
        rate = f", {_rate(time.tokens_per_s)} tokens/s" if time.tokens_per_s else ""
        yield f"step: {format_s(time.step_s)}{rate}; {time.bound} sets the pace"
        if time.hidden:
            yield f"      {time.hidden}"
    seconds = [f"{phase.name} {format_s(phase.seconds)}" for phase in forecast.phases if phase.seconds is not None]
    if seconds:
        yield f"phases: {', '.join(seconds)}"
    if forecast.ssd_read_per_step_bytes or forecast.ssd_write_per_step_bytes:
        yield (
            f"ssd per step: {format_bytes(forecast.ssd_read_per_step_bytes)} read, "
            f"{format_bytes(forecast.ssd_write_per_step_bytes)} written"
        )


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _suggestions(forecast: Forecast, plain: bool) -> Table:
    table = _table(plain)
    table.add_column("what would help", no_wrap=True)
    table.add_column(f"saves {forecast.suggestions[0].tier}", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("", ratio=1)
    for each in forecast.suggestions:
        style = "none" if each.enough or forecast.verdict != "does not fit" else "dim"
        table.add_row(
            Text(each.flag, style="bold" if each.enough else "none"),
            format_bytes(each.saved_bytes),
            _slow_down(each),
            "same" if each.same_result else "differs",
            Text("yes" if each.enough else "-", style="green" if each.enough else "none"),
            Text(each.text, style=style),
        )
    return table


def _slow_down(suggestion: Suggestion) -> str:
    return "?" if suggestion.slow_down is None else f"x{suggestion.slow_down:.2f}"


def _smallest(forecast: Forecast) -> Text:
    budgets = _smallest_budgets(forecast)
    if not forecast.smallest_flags:
        return Text(f"the smallest budget that works: {budgets}", style="bold")
    enough = all(need <= forecast.budgets.get(tier, need) for tier, need in forecast.smallest.items())
    words = "it fits with" if enough else "the least it can be brought to:"
    flags = " ".join(forecast.smallest_flags)
    return Text(f"{words} {flags}" + (f" (needs {budgets})" if enough else f" with {budgets}"), style="bold")


def _smallest_budgets(forecast: Forecast) -> str:
    """As flags; rounded up to whole MiB."""
    return " ".join(f"--{tier} {-(-need // MiB)}MiB" for tier, need in forecast.smallest.items())


def markdown(forecast: Forecast) -> str:
    """The plan as Markdown, for a pull request or a summary of a CI run."""
    word = _VERDICTS[forecast.verdict][0].capitalize()
    lines = [f"### {word}: {forecast.job}", "", f"Assuming {'; '.join(forecast.assumptions)}.", ""]
    lines += _rows(["tier", "needs", "budget", "share", "peak in"], _tier_rows(forecast)) + [""]
    held = _held(forecast)
    categories = [c for c in Category if any(held[tier].get(str(c)) for tier in held)]
    lines += _rows(
        ["at the peak", *map(str, held)],
        [[str(c), *(format_bytes(held[tier].get(str(c), 0)) for tier in held)] for c in categories],
    )
    lines += ["", *(f"- {' '.join(line.split())}" for line in _time(forecast))]
    if forecast.suggestions:
        lines += ["", *_rows(["what would help", "saves", "time", "result", "fits", ""], _suggestion_rows(forecast))]
    if forecast.smallest:
        lines += ["", f"**{_smallest(forecast).plain}**"]
    if forecast.reasons:
        lines += ["", *(f"- {reason}" for reason in forecast.reasons)]
    return "\n".join(lines) + "\n"


def _tier_rows(forecast: Forecast) -> Iterator[list[str]]:
    for tier in _used(forecast):
        phase = forecast.binding(tier)
        assert phase is not None
        need, budget = phase.total_bytes(tier), forecast.budgets.get(str(tier))
        share = _percent(need / budget) if budget else "-"
        yield [str(tier), format_bytes(need), format_bytes(budget) if budget else "no limit", share, phase.name]


def _suggestion_rows(forecast: Forecast) -> Iterator[list[str]]:
    for each in forecast.suggestions:
        yield [
            f"`{each.flag}`",
            f"{format_bytes(each.saved_bytes)} of {each.tier}",
            _slow_down(each),
            "same" if each.same_result else "differs",
            "yes" if each.enough else "",
            each.text,
        ]


def _rows(header: list[str], rows: Iterator[list[str]] | list[list[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
