"""The errors a person can meet; each carries the exit code of the command line."""

from __future__ import annotations

from memopt.tiers import Tier


class MemoptError(Exception):
    """Base of every error memopt raises on purpose: its text is one line that says what, where and what to do."""

    exit_code: int = 1


class BadInput(MemoptError, ValueError):
    """Something the caller gave (flag, file, value) cannot be used."""

    exit_code = 2


class OverBudget(MemoptError):
    """A charge would pass the budget of a tier. `holders` are (what, bytes), the largest first."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        tier: Tier,
        wanted_bytes: int,
        free_bytes: int,
        budget_bytes: int,
        holders: tuple[tuple[str, int], ...] = (),
        knob: str = "",
    ) -> None:
        super().__init__(message)
        self.tier = tier
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes
        self.budget_bytes = budget_bytes
        self.holders = holders
        self.knob = knob


class StoreError(MemoptError):
    """A block store or one of its files is missing, damaged, locked, full or not ours."""

    exit_code = 2


class Interrupted(MemoptError):
    """The person asked to stop; what was saved stays saved."""

    exit_code = 130


class NonFinite(MemoptError):
    """A loss, a gradient or the norm of the gradients is NaN or infinite. Nothing was updated with it."""
