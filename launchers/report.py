"""`memopt report`: show a saved report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.report_types import Report


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    app.command("report")(_report)


def _report(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A report saved with --report.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the checked JSON instead of a table.")] = False,
) -> None:
    """Show a saved report: budgets, predictions, measured peaks and what the bytes were."""
    report = Report.load(file)
    if as_json:
        typer.echo(report.to_json(), nl=False)
        return
    from memopt.profiler.render import render

    render(report)
