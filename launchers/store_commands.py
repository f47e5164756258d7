"""`memopt export` and `memopt clean`: what to do with the directory of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the subcommands to `app`."""
    app.command("export")(export)
    app.command("clean")(clean)


def export(
    offload_dir: Annotated[Path, typer.Argument(help="The --offload-dir of a run, finished or interrupted.")],
    output: Annotated[Path, typer.Option(help="Directory for the model.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an output directory that memopt made.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress display.")] = False,
) -> None:
    """Write the model of the last save as a Hugging Face directory."""
    from memopt.jobs.export import export_run

    step = export_run(offload_dir, output, overwrite=overwrite, quiet=quiet)
    if not quiet:
        typer.echo(f"{output}: the model after step {step}")


def clean(
    offload_dir: Annotated[Path, typer.Argument(help="The --offload-dir of a run.")],
    quiet: Annotated[bool, typer.Option(help="Say nothing.")] = False,
) -> None:
    """Remove what memopt put into an offload directory, and nothing else."""
    from memopt.jobs.run_dir import RunDirectory

    left = RunDirectory(offload_dir).clean()
    if not quiet:
        kept = f"; kept {', '.join(left)}, which memopt did not make" if left else ""
        typer.echo(f"{offload_dir}: removed what memopt made{kept}")
