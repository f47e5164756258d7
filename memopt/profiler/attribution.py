"""Ask whose bytes they are, no more often than it is worth."""

from __future__ import annotations

from collections.abc import Callable

from memopt.profiler.measured import Attributed
from memopt.profiler.pace import Pace
from memopt.tiers import Category

# The answer of a job with many tensors takes milliseconds. On the time line asking may take one part in 1000 of the
# time; while a peak grows, one in 20, because the peak is what people read.
_LINE_EVERY_S, _LINE_SHARE = 0.1, 1000
_PEAK_SHARE = 20
# What comes and goes within a step: of no use once nobody counts it any more.
_PASSING = (Category.ACTIVATIONS, Category.GRADIENTS)


class Attribution:
    """Keeps the latest answer of `ask`, and asks again when it is old enough or a peak needs it.

    An answer of None says that nobody knows at this moment: then the answer kept stands for what stays from step to
    step only, and is not `current`. `asked`: whether the answer is of the last call's own moment.
    """

    def __init__(self, ask: Callable[[], Attributed | None] | None) -> None:
        self.current = True
        self.asked = False
        self._ask = ask
        self._last: Attributed | None = None
        self._line = Pace(_LINE_EVERY_S, _LINE_SHARE)
        self._peak = Pace(0.0, _PEAK_SHARE)

    def latest(self, t_s: float, *, at_peak: bool, fresh: bool = False) -> Attributed | None:
        """The answer to use at `t_s`; None when nobody can say."""
        if self._ask is None:
            return None
        self.asked = fresh or (self._peak if at_peak or not self.current else self._line).due(t_s)
        if self.asked:
            with self._line.spending(t_s), self._peak.spending(t_s):
                found = self._ask()
            self.current = found is not None
            if found is not None:
                self._last = {tier: dict(by) for tier, by in found.items()}
            elif self._last is not None:
                self._last = {
                    tier: {category: nbytes for category, nbytes in by.items() if category not in _PASSING}
                    for tier, by in self._last.items()
                }
        return self._last
