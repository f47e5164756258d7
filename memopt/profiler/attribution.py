"""Ask whose bytes they are, no more often than it is worth."""

from __future__ import annotations

from collections.abc import Callable

from memopt.profiler.measured import Attributed
from memopt.profiler.pace import Pace

# The answer of a job with many tensors takes milliseconds. On the time line asking may take one part in 200 of the
# time; while a peak grows, one in 20, because the peak is what people read.
_LINE_EVERY_S, _LINE_SHARE = 0.1, 200
_PEAK_SHARE = 20


class Attribution:
    """Keeps the latest answer of `ask`, and asks again when it is old enough or a peak needs it."""

    def __init__(self, ask: Callable[[], Attributed] | None) -> None:
        self._ask = ask
        self._last: Attributed | None = None
        self._line = Pace(_LINE_EVERY_S, _LINE_SHARE)
        self._peak = Pace(0.0, _PEAK_SHARE)

    def latest(self, t_s: float, *, at_peak: bool, fresh: bool = False) -> Attributed | None:
        """The answer to use at `t_s`; None when nobody can say."""
        if self._ask is None:
            return None
        if fresh or (self._peak if at_peak else self._line).due(t_s):
            with self._line.spending(t_s), self._peak.spending(t_s):
                self._last = {tier: dict(by) for tier, by in self._ask().items()}
        return self._last
