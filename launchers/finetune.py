"""`memopt finetune`: fine-tune a model inside a stated memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memopt.errors import BadInput
from memopt.jobs.config import FinetuneConfig, read_settings
from memopt.launchers.options import command

if TYPE_CHECKING:
    from memopt.report_types import Report

# One line per paragraph: the help keeps line ends.
DOC = (
    "Fine-tune a causal language model inside a stated memory budget, and show where every byte went.\n\n"
    "What does not fit in memory lives in --offload-dir, which is the checkpoint too: after an interruption, the same "
    "command with --resume goes on from there.\n\n"
    "Sizes are binary: 512MiB, 24GiB, 1TiB, 80%."
)


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    app.command("finetune")(command(FinetuneConfig, run, DOC))


def build_config(flags: dict[str, Any], file: Path | None) -> FinetuneConfig:
    """The settings of the file under those of the flags. BadInput when what a run needs is missing."""
    settings = {**(read_settings(file) if file is not None else {}), **flags}
    if "model" not in settings:
        raise BadInput("no model: name a directory, a hub id or demo with --model")
    config = FinetuneConfig.of(**settings)
    if config.data is None and config.model != "demo":
        raise BadInput("no data: name a .txt or .jsonl file, a directory of them or a data set with --data")
    if config.output is None and not config.dry_run:
        raise BadInput("no output: name the directory for the trained model with --output, or only plan with --dry-run")
    return config


def run(flags: dict[str, Any], file: Path | None) -> None:
    """Run the job, print its report and leave with 0 when it stayed within budget, else 1."""
    config = build_config(flags, file)
    # imported late: the help and every usage error come before torch
    from memopt.jobs.finetune import finetune
    from memopt.profiler.render import render

    report = finetune(config)
    if not config.quiet:
        render(report)
    raise typer.Exit(exit_code(report))


def exit_code(report: Report) -> int:
    """0 within budget (or with none), 1 over it."""
    return 1 if report.verdict == "over" else 0
