"""The directory a result is written to: it appears whole, and only what memopt wrote is ever replaced."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memopt.errors import BadInput

MARKER = "memopt.json"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises BadInput when `output` cannot become a result."""
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInput(f"--output {output} is a file; name a directory")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise BadInput(f"--output {output} exists; name another directory, or replace it with --overwrite")
    if not (output / MARKER).exists():
        raise BadInput(
            f"--output {output} was not written by memopt (it has no {MARKER}), and --overwrite replaces only what memopt "
            "wrote; remove it yourself or name another directory"
        )


@contextmanager
def replace_output(output: Path) -> Iterator[Path]:
    """A place to write to, beside `output`; it takes the place of `output` at the end."""
    place = output.with_name(f".{output.name}.new")
    if place.exists():
        shutil.rmtree(place)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield place
        (place / MARKER).write_text('{"written_by": "memopt"}\n')
        if output.exists():
            old = output.with_name(f".{output.name}.old")
            output.rename(old)
            place.rename(output)
            shutil.rmtree(old)
        else:
            place.rename(output)
    finally:
        if place.exists():
            shutil.rmtree(place)
