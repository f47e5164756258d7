"""When to ask again for something that costs time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Due every `every_s` seconds, and never so often that asking takes more than one part in `share` of the time.

    `now_s` is any monotonic clock's; cost is CPU seconds of the calling thread.
    """

    def __init__(self, every_s: float, share: int = 400) -> None:
        self._every_s = every_s
        self._share = share
        self._due_s = float("-inf")

    def due(self, now_s: float) -> bool:
        """Whether it is time."""
        return now_s >= self._due_s

    @contextmanager
    def spending(self, now_s: float) -> Iterator[None]:
        """Around the work; sets when it is due next."""
        began = time.thread_time()
        try:
            yield
        finally:
            self._due_s = now_s + max(self._every_s, self._share * (time.thread_time() - began))


class Allowance:
    """CPU seconds that may be spent on looking: `free_s` at once, then `share` of the time that passes.

    What is not spent is saved up to `free_s`. Seconds are any monotonic clock's.
    """

    def __init__(self, share: float, free_s: float) -> None:
        self._share, self._free_s = share, free_s
        self._left_s = free_s
        self._at_s: float | None = None

    def left_s(self, now_s: float) -> float:
        """What may be spent now; below zero after too much was."""
        if self._at_s is not None and now_s > self._at_s:
            self._left_s = min(self._free_s, self._left_s + (now_s - self._at_s) * self._share)
        self._at_s = now_s
        return self._left_s

    def spend(self, cost_s: float, now_s: float) -> None:
        """Take what was spent."""
        self._left_s = self.left_s(now_s) - cost_s

    def wait_s(self, now_s: float) -> float:
        """How long until there is something to spend."""
        return max(0.0, -self.left_s(now_s) / self._share)
