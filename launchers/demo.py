"""`memopt demo`: train a model on this machine inside a budget its training state exceeds several times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.errors import MemoptError
from memopt.jobs.config import FinetuneConfig

_DRAM = "512MiB"
_STEPS = 30
_COMPARED = 5
"""Losses at the start and at the end that are averaged and compared."""


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    app.command("demo")(demo)


def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where to work; needs 4 GiB while it runs.")] = Path(".demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=2 * _COMPARED)] = _STEPS,
    dram: Annotated[str, typer.Option(help="Budget.")] = _DRAM,
) -> None:
    """Train a 112M-parameter Llama on the Python standard library's sources inside 512 MiB of DRAM.

    Leaves 0 only if the run stayed within its budget, the training state is at least three times the budget, and the
    loss fell. The model and the report stay in the directory, the offloaded state is removed.
    """
    from memopt.jobs.finetune import finetune
    from memopt.jobs.run_dir import MARKER, RunDirectory
    from memopt.profiler.render import render

    run = RunDirectory(directory / "offload")
    if (run.path / MARKER).exists():
        run.clean()
    config = FinetuneConfig(
        model="demo",
        offload_dir=str(run.path),
        output=str(directory / "model"),
        overwrite=True,
        dram=dram,
        seq_len=256,
        max_steps=steps,
        lr=1e-3,
        warmup_steps=4,
        report=str(directory / "report.json"),
    )
    report = finetune(config)
    run.clean()
    render(report)
    budget, state = report.tiers.dram.budget_bytes or 0, int(report.results["training_state_bytes"])
    losses = report.results["losses"]
    first, last = (sum(part) / _COMPARED for part in (losses[:_COMPARED], losses[-_COMPARED:]))
    typer.echo(
        f"loss {first:.3f} -> {last:.3f} (means of {_COMPARED} steps); training state "
        f"{state / budget:.1f} times the budget; "
        f"within budget: {'yes' if report.verdict == 'within' else 'no'}"
    )
    if report.verdict != "within" or last >= first or state < 3 * budget:
        raise MemoptError("the demo did not show what it should: see the line above")
