"""Which steps of a program are looked at closely: looking costs time in proportion to the number of tensors."""

from __future__ import annotations

_FIRST = 3
# Counting may take one part in 300 of the time; one in 50 after a step whose peak nobody was there to explain.
_SHARE, _PEAK_SHARE = 1 / 300, 1 / 50


class Observed:
    """Decides at the end of each step whether the next one is observed: the first three, then as often as is cheap."""

    def __init__(self) -> None:
        self.steps = 0
        self.observed = 0
        self._spent_s = 0.0
        self._due_s = self._soon_s = 0.0

    def ended(self, now_s: float, *, observing: bool, spent_s: float, grown: bool) -> bool:
        """A step is over, at `now_s` of a monotonic clock; whether to observe the next.

        `observing`: it was observed. `spent_s`: all that observing has cost so far. `grown`: memory is higher than it
        ever was at the end of a step before.
        """
        self.steps += 1
        if observing:
            self.observed += 1
            cost_s, self._spent_s = spent_s - self._spent_s, spent_s
            self._due_s, self._soon_s = now_s + cost_s / _SHARE, now_s + cost_s / _PEAK_SHARE
        return self.steps < _FIRST or now_s >= (self._soon_s if grown else self._due_s)

    def note(self) -> str | None:
        """The sentence for a report when some steps were not observed."""
        if self.observed == self.steps:
            return None
        return (
            f"gradients and activations were counted in {self.observed} of {self.steps} steps (the first {_FIRST}, "
            "then as often as counting takes one part in 300 of the time); in the others they are part of `other`"
        )
