"""What happens when a program passes its budget: a warning, an error, or a clean stop."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Literal

from memopt.budget import Budget
from memopt.errors import OverBudget
from memopt.tiers import Category, Tier
from memopt.units import format_bytes

OnOver = Literal["warn", "raise", "stop"]
_NAMED = 3
_KNOBS = {
    Tier.GPU: "raise the gpu budget, or lower the batch size or the sequence length",
    Tier.DRAM: "raise the dram budget, or lower the batch size or the sequence length",
    Tier.SSD: "raise the ssd budget, or keep fewer checkpoints in the watched directories",
}


class Stop(Exception):
    """Leaves the `with` block of a profiler that was told to stop when over budget; the block swallows it."""


class OverWarning(UserWarning):
    """A budget was passed; the program goes on."""


class Contract:
    """Holds a budget against what is measured. `see` may be called from any thread; `settle` by the program's own."""

    def __init__(self, budget: Budget, on_over: OnOver | Callable[[OverBudget], None]) -> None:
        self._budget = budget
        self._on_over = on_over
        self._lock = threading.Lock()
        self._over: set[Tier] = set()
        self._pending: list[OverBudget | Stop] = []
        self._unheard: list[str] = []
        self.told: dict[Tier, str] = {}
        self.crossings: dict[Tier, int] = dict.fromkeys(Tier, 0)

    def see(self, tier: Tier, now_bytes: int | None, ask: Callable[[], Mapping[Category, int] | None] = dict) -> None:
        """Compare one tier with its budget; acts when it is crossed upwards. A warning comes at the first time only.

        `ask`: the bytes by category, for the message.
        """
        budget = self._budget.bytes_of(tier)
        if budget is None or now_bytes is None:
            return
        with self._lock:
            if now_bytes <= budget:
                self._over.discard(tier)
                return
            if tier in self._over:
                return
            self._over.add(tier)
            self.crossings[tier] += 1
        categories = ask() or {}
        text = _message(tier, now_bytes, budget, categories)
        with self._lock:
            first = tier not in self.told
            self.told.setdefault(tier, text)
            if self._on_over == "raise" or callable(self._on_over):
                self._pending.append(_error(text, tier, now_bytes, budget, categories))
            elif self._on_over == "stop":
                self._pending.append(Stop(text))
        if first and self._on_over == "warn":
            self._warn(text)

    def settle(self) -> None:
        """Raise what is due, OverBudget or Stop, or give it to the function that was asked for."""
        with self._lock:
            unheard, self._unheard = self._unheard, []
            pending = self._pending.pop(0) if self._pending else None
        for text in unheard:
            warnings.warn(text, OverWarning, stacklevel=4)
        if pending is None:
            return
        if callable(self._on_over) and isinstance(pending, OverBudget):
            self._on_over(pending)
        else:
            raise pending

    def _warn(self, text: str) -> None:
        try:
            warnings.warn(text, OverWarning, stacklevel=3)
        except Warning:  # warnings are errors here, and those belong into the program's own thread
            with self._lock:
                self._unheard.append(text)


def _largest(categories: Mapping[Category, int]) -> list[tuple[str, int]]:
    ranked = sorted(categories.items(), key=lambda item: -item[1])
    return [(str(category), nbytes) for category, nbytes in ranked if nbytes > 0][:_NAMED]


def describe(categories: Mapping[Category, int]) -> str:
    """The largest categories: `weights 1.20 GiB, activations 512.00 MiB`."""
    return ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in _largest(categories))


def _message(tier: Tier, now_bytes: int, budget: int, categories: Mapping[Category, int]) -> str:
    held = describe(categories)
    return (
        f"{tier} budget of {format_bytes(budget)}: {format_bytes(now_bytes)} in use, "
        f"{format_bytes(now_bytes - budget)} too much{'; largest: ' + held if held else ''}; {_KNOBS[tier]}"
    )


def _error(text: str, tier: Tier, now_bytes: int, budget: int, categories: Mapping[Category, int]) -> OverBudget:
    return OverBudget(
        text,
        tier=tier,
        wanted_bytes=now_bytes,
        free_bytes=budget - now_bytes,
        budget_bytes=budget,
        holders=tuple(_largest(categories)),
        knob=_KNOBS[tier],
    )
