"""`memopt report`: show a saved report, or make a page, a trace, Markdown or a comparison of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.errors import BadInput
from memopt.forecast_types import Forecast
from memopt.report_types import Report

_STDOUT = Path("-")


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    app.command("report")(_report)


def _report(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A report saved with --report.")],
    page: Annotated[
        Path | None, typer.Option("--html", metavar="OUT.html", help="Write one page that needs no network.")
    ] = None,
    perfetto: Annotated[
        Path | None,
        typer.Option("--perfetto", metavar="OUT.json", help="Write a Chrome trace for ui.perfetto.dev."),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option("--merge", metavar="TRACE.json", help="With --perfetto: add it to this trace of torch.profiler."),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="OUT.md", help="Write Markdown for CI summaries and comments; - is stdout."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--compare", metavar="BASE.json", help="Say what grew since this report; leave with 1 if too much."
        ),
    ] = None,
    tolerance: Annotated[
        str | None, typer.Option("--tolerance", metavar="SIZE", help="With --compare: growth allowed [default: 5%].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checked JSON instead of a table.")] = False,
) -> None:
    """Show a saved report (or plan): budgets, predictions, measured peaks and what the bytes were.

    Several outputs can be asked for at once. The table is printed when nothing else is asked for, or with --compare.
    """
    if merge is not None and perfetto is None:
        raise BadInput("--merge adds the report to a trace; give --perfetto OUT.json too")
    if tolerance is not None and base is None:
        raise BadInput("--tolerance is about a comparison; give --compare BASE.json too")
    if as_json and markdown == _STDOUT:
        raise BadInput("--json and --markdown - both want stdout; give one of them a file")
    _refuse_to_overwrite([file, base, merge], [page, perfetto, markdown])
    if Forecast.is_at(file):
        if any(each is not None for each in (page, perfetto, base)):
            raise BadInput(f"{str(file)!r} is a plan, not a report: it has tables, --markdown and --json only")
        _show_plan(Forecast.load(file), markdown, as_json)
        return
    report = Report.load(file)
    over = False
    comparison = None
    if base is not None:
        from memopt.profiler.compare import Tolerance, compare

        comparison = compare(Report.load(base), report, Tolerance.parse(tolerance or "5%"))
        over = bool(comparison.over)
    if page is not None:
        from memopt.profiler.html_page import save_html

        save_html(report, page)
    if perfetto is not None:
        from memopt.profiler.perfetto import save_trace

        for note in save_trace(report, perfetto, merge):
            typer.echo(f"memopt: note: {note}", err=True)
    if markdown is not None:
        from memopt.profiler.markdown import comparison_markdown, report_markdown, save_markdown

        text = report_markdown(report)
        if comparison is not None:
            text = f"{comparison_markdown(comparison)}\n{text}"
        if markdown == _STDOUT:
            typer.echo(text, nl=False)
        else:
            save_markdown(text, markdown)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    elif comparison is not None and markdown != _STDOUT:
        from memopt.profiler.render import render_comparison

        render_comparison(comparison)
    elif page is None and perfetto is None and markdown is None:
        from memopt.profiler.render import render

        render(report)
    if over:
        raise typer.Exit(1)


def _show_plan(forecast: Forecast, markdown: Path | None, as_json: bool) -> None:
    from memopt.profiler.forecast_render import markdown as plan_markdown
    from memopt.profiler.forecast_render import render
    from memopt.profiler.markdown import save_markdown

    if markdown == _STDOUT:
        typer.echo(plan_markdown(forecast), nl=False)
    elif markdown is not None:
        save_markdown(plan_markdown(forecast), markdown)
    if as_json:
        typer.echo(forecast.to_json(), nl=False)
    elif markdown is None:
        render(forecast)


def _refuse_to_overwrite(inputs: list[Path | None], outputs: list[Path | None]) -> None:
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is None or path == _STDOUT:
            continue
        if path.resolve() in taken:
            raise BadInput(f"{str(path)!r} would be read and overwritten, or written twice; name another file")
        taken.add(path.resolve())
