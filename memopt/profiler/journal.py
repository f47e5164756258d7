"""A session's journal: what was seen so far, as lines on disk, so that a kill of this process still leaves a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from memopt.journal import JournalFile
from memopt.profiler.measured import Measured
from memopt.profiler.thinning import Point
from memopt.report_types import Report

_EVERY_S = 2.0
# A long job writes less often, so that its journal stays small: a thousandth of the run is what a kill can lose.
_SHARE_OF_RUN = 1000
_COST_SHARE = 1 / 1000  # of the time, in CPU seconds


class Journal:
    """Made for one session; `report` makes the report of what was seen so far. Raises BadInput when `path` cannot be
    written. A disk that fills up later ends the journal, not the job."""

    def __init__(self, path: str | Path, report: Callable[[Measured], Report]) -> None:
        self._file = JournalFile(Path(path))
        self._report = report
        self._due_s = 0.0
        self._phases = 0
        self.failed: str | None = None

    def due(self, t_s: float) -> bool:
        """Whether it is time to write again."""
        return self.failed is None and t_s >= self._due_s

    def write(self, measured: Measured, points: list[Point]) -> None:
        """Take what was seen so far and the samples since the last time."""
        began = time.thread_time()
        new = replace(measured, phases=measured.phases[self._phases :])
        samples: dict[str, list[Any]] = {
            "t_s": [round(point.t_s, 4) for point in points],
            "gpu_bytes": [point.gpu_bytes for point in points],
            "dram_bytes": [point.dram_bytes for point in points],
            "ssd_bytes": [point.ssd_bytes for point in points],
        }
        try:
            self._file.write(self._report(new).to_dict(), samples, first_phase=self._phases)
            self._phases = len(measured.phases)
        except OSError as error:
            self.failed = f"the journal ended early: {error.strerror}; a kill of the profiler would have lost the rest"
        cost_s = time.thread_time() - began
        self._due_s = measured.wall_s + max(_EVERY_S, measured.wall_s / _SHARE_OF_RUN, cost_s / _COST_SHARE)

    def close(self, *, remove: bool) -> None:
        """Close the file; `remove` when the report is safe."""
        self._file.close(remove=remove)
