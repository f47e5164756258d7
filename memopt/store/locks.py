"""One writer or many readers of a directory, across processes, released by the kernel when a process dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from memopt.errors import StoreError
from memopt.store.errors import StoreLocked

_ATTEMPTS = 8


class StoreLock:
    """An flock on `path`, exclusive for writers (who create the file) and shared for readers.

    Raises StoreLocked, naming the process that holds it, and never waits.
    """

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY
        for _ in range(_ATTEMPTS):
            try:
                fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise StoreError(f"{path}: the lock cannot be opened: {error.strerror}; check permissions") from error
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                raise StoreLocked(
                    f"{path.parent} is in use by {holder_of(path)}; wait for it, stop it, or use another directory"
                ) from error
            if _is_at(fd, path):
                self._fd = fd
                return
            os.close(fd)  # removed together with its store between open and flock
        raise StoreLocked(f"{path.parent} is being removed and made again by another process; use another directory")

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def holder_of(path: Path) -> str:
    """`process 1234` by the kernel's list of locks, or `another process` where that does not tell."""
    try:
        stat = os.stat(path)
        inode = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
        with open("/proc/locks", encoding="ascii", errors="replace") as locks:
            for line in locks:
                words = line.split()
                if len(words) > 5 and words[1] == "FLOCK" and words[5] == inode and int(words[4]) > 0:
                    return f"process {words[4]}"
    except (OSError, ValueError):
        pass
    return "another process"


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
