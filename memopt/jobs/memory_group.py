"""A memory limit the kernel enforces: a child of the memory cgroup (v1 or v2) this process is in."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from memopt.cgroups import Group, memory_group
from memopt.errors import BadInput

_REMOVE_TRIES, _REMOVE_EVERY_S = 50, 0.1
_REMEDY = (
    "leave --enforce out, run as root, or under a group of your own "
    "(systemd-run --user --scope -p Delegate=yes memopt profile ...)"
)


@contextlib.contextmanager
def limited_group(limit_bytes: int, root: Path = Path("/")) -> Iterator[Group]:
    """A new group limited to `limit_bytes` of memory and no swap, removed at the end.

    Put a process in by writing its id to `cgroup.procs`. The limit covers page cache too, which the kernel takes back
    before it kills. Raises BadInput that says why when such a group cannot be made here.
    """
    own = memory_group(root)
    if own is None:
        raise BadInput(f"--enforce: no memory cgroup is mounted here; {_REMEDY}")
    group = _make(own, limit_bytes)
    try:
        yield group
    finally:
        _remove(group.path)


def join_command(group: Group, command: list[str]) -> list[str]:
    """`command`, run inside the group from its first instruction on."""
    return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.path / "cgroup.procs"), *command]


def _make(own: Group, limit_bytes: int) -> Group:
    path = own.path / f"memopt-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
    except OSError as error:
        raise BadInput(f"--enforce: {own.path}: no group may be made here ({error.strerror}); {_REMEDY}") from error
    try:
        if own.version == 1:
            (path / "memory.limit_in_bytes").write_text(str(limit_bytes))
            _write_if_there(path / "memory.memsw.limit_in_bytes", str(limit_bytes))
        else:
            if not (path / "memory.max").exists():
                # fails with EBUSY where processes and controllers may not share a group (v2, outside of the root)
                (own.path / "cgroup.subtree_control").write_text("+memory")
            (path / "memory.max").write_text(str(limit_bytes))
            _write_if_there(path / "memory.swap.max", "0")
    except OSError as error:
        _remove(path)
        raise BadInput(f"--enforce: {own.path}: the limit cannot be set ({error.strerror}); {_REMEDY}") from error
    return Group(path, own.version)


def _write_if_there(file: Path, text: str) -> None:
    """Swap is accounted only where the kernel was built and started for it."""
    with contextlib.suppress(OSError):
        if file.exists():
            file.write_text(text)


def _remove(path: Path) -> None:
    for _ in range(_REMOVE_TRIES):  # a process that has just ended leaves its group a moment later
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(_REMOVE_EVERY_S)
