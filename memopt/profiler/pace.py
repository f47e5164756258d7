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
