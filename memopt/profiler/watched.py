"""The directories that are a job's SSD tier: the blocks its files take, and what the page cache holds of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from memopt.profiler.pace import Pace
from memopt.profiler.page_cache import cached_bytes
from memopt.profiler.samplers import resident_bytes

_RESIDENT_EVERY_S = 1.0
_CACHED_EVERY_S = 2.0


class WatchedFiles:
    """Looks at `paths` when it is time; walking many files takes long, and is then done less often."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._paths = [Path(path) for path in paths]
        self._resident = Pace(_RESIDENT_EVERY_S)
        self._cached = Pace(_CACHED_EVERY_S)
        self._resident_bytes: int | None = None
        self._cached_peak_bytes: int | None = None

    def sample(self, t_s: float, *, fresh: bool) -> int | None:
        """Bytes the files take; None without paths."""
        if not self._paths:
            return None
        if fresh or self._resident.due(t_s):
            with self._resident.spending(t_s):
                self._resident_bytes = resident_bytes(self._paths)
        if fresh or self._cached.due(t_s):
            with self._cached.spending(t_s):
                now = cached_bytes(self._paths)
            if now is not None:
                self._cached_peak_bytes = max(self._cached_peak_bytes or 0, now)
        return self._resident_bytes

    def cached_peak_bytes(self) -> int | None:
        """The most the page cache held of the files."""
        return self._cached_peak_bytes
