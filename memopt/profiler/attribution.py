"""Ask whose bytes they are, no more often than it is worth."""

from __future__ import annotations

import time
from collections.abc import Callable

from memopt.profiler.measured import Attributed

_EVERY_S = 0.1
# The answer of a job with many tensors takes milliseconds. On the time line asking may take one part in 200 of the
# time; while a peak grows, one in 20, because the peak is what people read.
_LINE_PAUSE = 200
_PEAK_PAUSE = 20


class Attribution:
    """Keeps the latest answer of `ask`, and asks again when it is old enough or a peak needs it."""

    def __init__(self, ask: Callable[[], Attributed] | None) -> None:
        self._ask = ask
        self._last: Attributed | None = None
        self._line_due_s = self._peak_due_s = float("-inf")

    def latest(self, t_s: float, *, at_peak: bool, fresh: bool = False) -> Attributed | None:
        """The answer to use at `t_s`; None when nobody can say."""
        if self._ask is None:
            return None
        if fresh or t_s >= (self._peak_due_s if at_peak else self._line_due_s):
            began = time.thread_time()
            self._last = {tier: dict(by) for tier, by in self._ask().items()}
            cost_s = time.thread_time() - began
            self._line_due_s = t_s + max(_EVERY_S, _LINE_PAUSE * cost_s)
            self._peak_due_s = t_s + _PEAK_PAUSE * cost_s
        return self._last
