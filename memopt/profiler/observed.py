"""Which steps of a program are looked at closely: looking costs time in proportion to the number of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_FIRST = 3
# Looking may take one part in 300 of the time; one in 50 after a step whose peak nobody was there to explain.
_SHARE, _PEAK_SHARE = 1 / 300, 1 / 50
_PHASES_FREE_S = 0.02  # some hundred steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """What to do in the next step: count gradients and activations (`observe`), find phases (`phases`)."""

    observe: bool
    phases: bool


class Observed:
    """Decides at the end of each step: the first three are observed, then as often as is cheap.

    Phases are found in each step where that alone is cheap (steps of 0.1 s and more), else in the first
    hundred or so and in those observed.
    Seconds are of a monotonic clock.
    """

    def __init__(self) -> None:
        self.steps = self.observed = self.with_phases = 0
        self._now = Next(observe=True, phases=True)
        self._spent_s = self._phases_spent_s = self._cost_s = 0.0
        self._ended_s: float | None = None
        self._due_s = self._soon_s = 0.0
        self._cheap = True

    def ended(self, now_s: float, *, spent_s: float, phases_spent_s: float, grown: Callable[[], bool]) -> Next:
        """A step is over, which was done as was said last; what to do in the next.

        `spent_s`, `phases_spent_s`: all that counting, and finding phases, has cost so far. `grown()`: whether memory
        is higher than it ever was at the end of a step before.
        """
        self.steps += 1
        began_s = now_s if self._ended_s is None else self._ended_s
        phases_cost_s, self._phases_spent_s = phases_spent_s - self._phases_spent_s, phases_spent_s
        if self._now.phases:
            self.with_phases += 1
            self._cheap = phases_spent_s <= _PHASES_FREE_S or phases_cost_s <= _SHARE * (now_s - began_s)
        if self._now.observe:
            self.observed += 1
            cost_s, self._spent_s = spent_s - self._spent_s + phases_cost_s, spent_s
            self._due_s, self._soon_s = began_s + cost_s / _SHARE, began_s + cost_s / _PEAK_SHARE
        self._ended_s = now_s
        observe = self.steps < _FIRST or now_s >= self._due_s or (now_s >= self._soon_s and grown())
        self._now = Next(observe=observe, phases=observe or self._cheap)
        return self._now

    def kept(self, *, observe: bool) -> None:
        """Counting could not be turned on or off as was said."""
        self._now = Next(observe=observe, phases=self._now.phases)

    def notes(self) -> list[str]:
        """Sentences for a report when something was left out."""
        notes = []
        if self.observed < self.steps:
            notes.append(
                f"gradients and activations were counted in {self.observed} of {self.steps} steps (the first {_FIRST}, "
                "then as often as counting takes one part in 300 of the time); in the others they are part of `other`"
            )
        if self.with_phases < self.steps:
            notes.append(
                f"steps are so short that phases were found in {self.with_phases} of {self.steps} only; "
                "times and traffic of phases are of those"
            )
        return notes
