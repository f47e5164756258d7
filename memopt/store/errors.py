"""What can go wrong with bytes on the SSD; each message names the place and what to do about it."""

from __future__ import annotations

from memopt.errors import StoreError


class StoreMissing(StoreError):
    """There is no store in that directory."""


class StoreExists(StoreError):
    """A store is there already."""


class StoreForeign(StoreError):
    """The directory holds files that memopt did not make; none of them is touched."""


class StoreVersion(StoreError):
    """The store was written in another format."""


class StoreIncomplete(StoreError):
    """The store was interrupted while it was being created: nothing was ever saved in it."""


class StoreLocked(StoreError):
    """Another process (or another object in this one) has the store open."""


class StoreFull(StoreError):
    """The file system has no room. Fields: `wanted_bytes`, `free_bytes`."""

    def __init__(self, message: str, *, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


class StoreIOError(StoreError):
    """The kernel refused or cut short a transfer. Fields: `path`, `offset`, `nbytes`, `errno` (0 at end of file)."""

    def __init__(self, message: str, *, path: str, offset: int, nbytes: int, errno: int) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.nbytes = nbytes
        self.errno = errno


class StoreMisaligned(StoreError, ValueError):
    """An address, offset or length is not the multiple that direct I/O needs."""


class StoreCorrupt(StoreError):
    """Bytes on the SSD are not the bytes that were written."""


class StoreReadOnly(StoreError):
    """A write to something that may not be written (any more)."""


class StoreUnwritten(StoreError):
    """A read of, or a commit with, a tensor that was not (wholly) written."""


class StoreClosed(StoreError):
    """The object was closed before this call."""


class StoreTimeout(StoreError, TimeoutError):
    """What was waited for did not happen in the time given."""
