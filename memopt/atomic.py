"""Small files that are either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from memopt.errors import BadInput


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step that survives a crash. Raises OSError, leaving what was there."""
    write_bytes(path, text.encode("utf-8"))


def save_text(what: str, path: str | Path, text: str) -> None:
    """`write_text` to where a person asked for it. Raises BadInput, naming `what` it is, when it cannot be written."""
    try:
        write_text(Path(path), text)
    except OSError as error:
        raise BadInput(f"{what} {str(path)!r} cannot be written: {error.strerror}; choose another path") from error


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` for bytes."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _umask() -> int:
    """The process's umask, read from the kernel: asking through os.umask would change it for other threads."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
