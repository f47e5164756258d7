"""The directory a result is written to: it appears whole, and only what memopt wrote is ever replaced."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from memopt.errors import BadInput
from memopt.store.errors import StoreFull
from memopt.store.files import free_bytes
from memopt.units import format_bytes

MARKER = "memopt.json"


def check_output(output: Path, *, overwrite: bool, keep: Mapping[str, Path] | None = None) -> None:
    """Raises BadInput when `output` cannot become a result; to be called before the work, and again after it.

    `keep`: what must not lie in it, by the flag that names it.
    """
    for flag, path in (keep or {}).items():
        if path.absolute().resolve().is_relative_to(output.absolute().resolve()):
            raise BadInput(f"--output {output} would replace {flag} {path}; name another directory")
    if output.is_symlink() and not output.exists():
        raise BadInput(f"--output {output} is a link to nothing; remove it or name another directory")
    if output.exists() and not output.is_dir():
        raise BadInput(f"--output {output} is a file; name a directory")
    if os.path.ismount(output):
        raise BadInput(
            f"--output {output} is a mount point, which cannot be replaced as a whole; name a directory in it"
        )
    parent = _nearest(output)
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
    if foreign := _foreign(output):
        raise BadInput(
            f"--output {output} holds files that memopt did not write ({', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}), and --overwrite would remove them; move them, or name another "
            "directory"
        )


def require_space(output: Path, nbytes: int) -> None:
    """Raises StoreFull when a result of that size has no room beside what is there."""
    parent = _nearest(output)
    free = free_bytes(parent)
    if free < nbytes and os.statvfs(parent).f_blocks:  # some file systems do not tell
        raise StoreFull(
            f"--output {output}: the model takes {format_bytes(nbytes)}, {format_bytes(free)} is free there; free some "
            "space or name another directory",
            wanted_bytes=nbytes,
            free_bytes=free,
        )


def check_file(path: Path, flag: str) -> None:
    """Raises BadInput when no file can be written at `path`; to be called before the work."""
    directory = path.absolute().parent
    if path.is_dir():
        raise BadInput(f"{flag} {path} is a directory; name a file")
    if not directory.is_dir():
        raise BadInput(f"{flag} {path}: there is no directory {directory}; make it, or name another file")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise BadInput(f"{flag} {path}: {directory} cannot be written to; name another file")


@contextmanager
def replace_output(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A place beside `output` to write to (it does not exist yet); it takes the place of `output` at the end.

    Raises BadInput when `output` was filled by somebody else meanwhile; the result then stands under a new name.
    """
    output = output.resolve()  # a link may lead to a larger disk
    beside = output.with_name(f".{output.name}.memopt-new")
    _tidy(beside, output)
    beside.mkdir(parents=True)
    try:
        _mark(beside)
        place = beside / "result"
        yield place
        _mark(place)
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


def _nearest(path: Path) -> Path:
    """What exists of the way to `path`."""
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _mark(directory: Path) -> None:
    names = sorted(entry.name for entry in directory.iterdir())
    (directory / MARKER).write_text(json.dumps({"written_by": "memopt", "files": [*names, MARKER]}) + "\n")


def _foreign(output: Path) -> list[str]:
    """What stands in a result beside what its marker lists; a marker of before lists nothing, and all is ours."""
    try:
        about = json.loads((output / MARKER).read_text())
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict):
        raise BadInput(
            f"--output {output}: {MARKER} in it cannot be read; remove it yourself or name another directory"
        )
    names = about.get("files")
    return [] if names is None else sorted({entry.name for entry in output.iterdir()} - set(names))


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
