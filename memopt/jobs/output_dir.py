"""The directory a result is written to: it appears whole, and only what memopt wrote is ever replaced."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memopt.errors import BadInput

MARKER = "memopt.json"
_MARK = '{"written_by": "memopt"}\n'


def check_output(output: Path, *, overwrite: bool, offload_dir: Path | None = None) -> None:
    """Raises BadInput when `output` cannot become a result; to be called before the work, and again after it."""
    if offload_dir is not None and offload_dir.absolute().resolve().is_relative_to(output.absolute().resolve()):
        raise BadInput(f"--output {output} would replace --offload-dir {offload_dir}; name another directory")
    if output.is_symlink() and not output.exists():
        raise BadInput(f"--output {output} is a link to nothing; remove it or name another directory")
    if output.exists() and not output.is_dir():
        raise BadInput(f"--output {output} is a file; name a directory")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise BadInput(f"--output {output}: {parent} is a file; name another directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"--output {output}: {parent} cannot be written to; name another directory")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise BadInput(f"--output {output} exists; name another directory, or replace it with --overwrite")
    if not (output / MARKER).exists():
        raise BadInput(
            f"--output {output} was not written by memopt (it has no {MARKER}), and --overwrite "
            f"replaces only what memopt "
            "wrote; remove it yourself or name another directory"
        )


@contextmanager
def replace_output(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A place beside `output` to write to (it does not exist yet); it takes the place of `output` at the end.

    Raises BadInput when `output` was filled by somebody else meanwhile; the result then stands under a new name.
    """
    output = output.absolute()
    beside = output.with_name(f".{output.name}.memopt-new")
    _tidy(beside, output)
    beside.mkdir(parents=True)
    try:
        (beside / MARKER).write_text(_MARK)
        place = beside / "result"
        yield place
        (place / MARKER).write_text(_MARK)
        try:
            check_output(output, overwrite=overwrite)
        except BadInput as error:
            kept = next(p for n in itertools.count(1) if not (p := output.with_name(f"{output.name}-{n}")).exists())
            place.rename(kept)
            raise BadInput(f"{error}; the finished result is in {kept}") from None
        if output.exists():
            output.rename(beside / "replaced")
        place.rename(output)
        _sync(output.parent)
    finally:
        _tidy(beside, output)


def _tidy(beside: Path, output: Path) -> None:
    """Remove what writing a result left, after putting back what it was about to replace."""
    if not beside.exists():
        return
    if (beside / "replaced").exists() and not output.exists():
        (beside / "replaced").rename(output)
    if (beside / MARKER).exists():
        shutil.rmtree(beside)
    elif any(beside.iterdir()):
        raise BadInput(f"{beside} is in the way and was not made by memopt; remove it or name another --output")
    else:
        beside.rmdir()


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
