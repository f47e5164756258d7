"""`memopt plan`: will a job fit, what takes the bytes, how long is a step, what could be done about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memopt import atomic
from memopt.errors import BadInput
from memopt.jobs.plan_config import PlanConfig, read_plan_settings
from memopt.launchers.options import command

if TYPE_CHECKING:
    from memopt.forecast_types import Forecast

# One line per paragraph: the help keeps line ends.
DOC = (
    "Plan a job before it runs: bytes of GPU, DRAM and SSD by category, seconds of a step, and what would help.\n\n"
    "Only the model's configuration and the headers of its weights are read; nothing is loaded or allocated.\n\n"
    "Leaves with 0 when the job fits, 1 when it does not, 2 when it cannot be planned.\n\n"
    "Sizes are binary: 512MiB, 24GiB, 1TiB, 80%."
)


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    app.command("plan")(command(PlanConfig, run, DOC))


def run(flags: dict[str, Any], file: Path | None) -> None:
    """Plan, print or write the plan, and leave with 0 when the job fits, else 1."""
    settings = {**(read_plan_settings(file) if file is not None else {}), **flags}
    if "model" not in settings:
        raise BadInput("no model: name a directory, a config.json or a hub id with --model")
    config = PlanConfig.of(**settings)
    # imported late: the help and every usage error come before torch
    from memopt.jobs.plan import plan

    forecast = plan(config)
    _write(forecast, config)
    if config.json:
        typer.echo(forecast.to_json(), nl=False)
    elif not config.quiet:
        from memopt.profiler.forecast_render import render

        render(forecast)
    raise typer.Exit(exit_code(forecast))


def exit_code(forecast: Forecast) -> int:
    """0 when the job fits, or when no budget was given; 1 when it does not fit."""
    return 1 if forecast.verdict == "does not fit" else 0


def _write(forecast: Forecast, config: PlanConfig) -> None:
    if config.report is not None:
        forecast.save(config.report)
    if config.markdown is not None:
        from memopt.profiler.forecast_render import markdown

        atomic.save_text("markdown", config.markdown, markdown(forecast))
