"""Staging memory: a fixed number of buffers of one exact size, lent out; waiting for one is the back-pressure."""

from __future__ import annotations

import threading
import time

import torch

from memopt.errors import StoreError
from memopt.ledger import Ledger
from memopt.store.errors import StoreClosed, StoreTimeout
from memopt.store.regions import PAGE_BYTES, Region, round_up, tensor_on
from memopt.tiers import Category, Tier
from memopt.units import format_bytes


class Buffer:
    """A loan of one buffer, from `BufferPool.acquire` until `release`. `who` is the holder named in errors."""

    __slots__ = ("_index", "_pool", "_view", "who")

    def __init__(self, pool: BufferPool, index: int, view: memoryview, who: str) -> None:
        self._pool = pool
        self._index = index
        self._view: memoryview | None = view
        self.who = who

    @property
    def view(self) -> memoryview:
        """The bytes, page-aligned and of exactly the pool's size."""
        if self._view is None:
            raise StoreError(f"buffer {self._index} of {self._pool.what} is used after its release by {self.who}")
        return self._view

    def tensor(self, dtype: torch.dtype, numel: int, offset_bytes: int = 0) -> torch.Tensor:
        """A flat tensor of `numel` elements on these bytes; not to be used after `release`."""
        return tensor_on(self.view, dtype, numel, offset_bytes)

    def release(self) -> None:
        """Give the buffer back. Raises StoreError when that was done before."""
        if self._view is None:
            raise StoreError(f"buffer {self._index} of {self._pool.what} was released twice by {self.who}")
        self._view = None
        self._pool._give_back(self._index)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._view is not None:
            self.release()


class BufferPool:
    """`count` buffers of `nbytes` each (rounded up to the page only) in one region, charged to the ledger once.

    `pin=True` registers the region with CUDA where there is a device. Raises OverBudget when the ledger has no room.
    """

    def __init__(
        self, nbytes: int, count: int, ledger: Ledger, category: Category, what: str, pin: bool = False
    ) -> None:
        if nbytes <= 0 or count <= 0:
            raise ValueError(f"{what}: {count} buffers of {nbytes} bytes")
        self.nbytes = nbytes
        self.count = count
        self.what = what
        self._stride = round_up(nbytes, PAGE_BYTES)
        self._lease = ledger.charge(Tier.DRAM, category, self._stride * count, what)
        try:
            self._region = Region(self._stride * count, pin=pin)
        except BaseException:
            self._lease.release()
            raise
        self.pinned = self._region.pinned
        self._free = list(reversed(range(count)))
        self._holders: dict[int, str] = {}
        self._closed = False
        self._freed = threading.Condition()

    def acquire(self, timeout_s: float | None = None, who: str = "") -> Buffer:
        """Borrow a buffer, waiting until one is free. `who` (default: the thread's name) is named in errors.

        Raises StoreTimeout, naming the holders, after `timeout_s`; StoreClosed when the pool is or gets closed.
        """
        who = who or threading.current_thread().name
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._freed:
            while not self._free and not self._closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise StoreTimeout(
                        f"{self.what}: none of {self.count} buffers of {format_bytes(self.nbytes)} became free in "
                        f"{timeout_s} s for {who}; they are held by {', '.join(self._holders.values())}"
                    )
                self._freed.wait(left)
            if self._closed:
                raise StoreClosed(f"{self.what}: the buffer pool was closed")
            index = self._free.pop()
            self._holders[index] = who
            start = index * self._stride
            return Buffer(self, index, self._region.view[start : start + self.nbytes], who)

    def free_count(self) -> int:
        """How many buffers nobody holds."""
        with self._freed:
            return len(self._free)

    def holders(self) -> list[str]:
        """Who holds a buffer now."""
        with self._freed:
            return list(self._holders.values())

    def close(self) -> None:
        """Refuse further loans and wake those who wait. The memory and its charge go with the last loan."""
        with self._freed:
            self._closed = True
            self._freed.notify_all()
            self._end_if_idle()

    def __enter__(self) -> BufferPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_back(self, index: int) -> None:
        with self._freed:
            del self._holders[index]
            self._free.append(index)
            self._freed.notify()
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._closed and not self._holders:
            self._region.close()
            self._lease.release()
