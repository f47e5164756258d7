"""`memopt probe`: measure this machine and print a profile for --machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt import atomic
from memopt.errors import BadInput
from memopt.units import parse_bytes


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    app.command("probe")(_probe)


def _probe(
    directory: Annotated[
        Path, typer.Option("--dir", help="Directory on the drive to measure: the one your runs will use.")
    ] = Path("."),
    out: Annotated[Path | None, typer.Option("--out", help="Write the profile here instead of printing it.")] = None,
    size: Annotated[str, typer.Option("--size", help="Size of the temporary test file.")] = "512MiB",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but the profile or errors.")] = False,
) -> None:
    """Measure this machine (memory, drive, arithmetic, copies to the GPU) and print a profile for --machine."""
    nbytes = parse_bytes(size, field="--size")
    # imported late: usage errors come before torch
    from memopt.jobs.probe import probe

    text = probe(directory, nbytes=nbytes).to_toml()
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        atomic.write_text(out, text)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}; choose another path") from error
    if not quiet:
        typer.echo(f"profile written; use it with --machine {out}", err=True)
