"""The one authority that hands out bytes: charge before you allocate, release when the bytes are gone."""

from __future__ import annotations

import threading
from types import TracebackType

from memopt.budget import Budget
from memopt.errors import OverBudget
from memopt.tiers import Category, Tier
from memopt.units import format_bytes

_KNOBS = {
    Tier.GPU: "raise --gpu, or lower --batch-size or --seq-len",
    Tier.DRAM: "raise --dram, or lower --batch-size or --seq-len",
    Tier.SSD: "raise --ssd, or use --optim-state-dtype bfloat16",
}
_HOLDERS_NAMED = 3


class Lease:
    """Bytes held until `release`; also a context manager. Made by `Ledger.charge` only."""

    __slots__ = ("_ledger", "category", "nbytes", "tier", "what")

    def __init__(self, ledger: Ledger, tier: Tier, category: Category, nbytes: int, what: str) -> None:
        self._ledger = ledger
        self.tier = tier
        self.category = category
        self.nbytes = nbytes
        self.what = what

    def release(self) -> None:
        """Give the bytes back. A second call does nothing."""
        self._ledger._give_back(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Lease({self.what!r}, {format_bytes(self.nbytes)} {self.category} on {self.tier})"


class Ledger:
    """Counts charged bytes per tier and category against a budget. Thread-safe; unlimited tiers are counted too."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._lock = threading.Lock()
        self._leases: dict[Tier, set[Lease]] = {tier: set() for tier in Tier}
        self._now: dict[Tier, dict[Category, int]] = {tier: dict.fromkeys(Category, 0) for tier in Tier}
        self._peak: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self._at_peak: dict[Tier, dict[Category, int]] = {tier: dict.fromkeys(Category, 0) for tier in Tier}

    def charge(self, tier: Tier, category: Category, nbytes: int, what: str, *, knob: str | None = None) -> Lease:
        """Reserve `nbytes` under the name `what`; raises OverBudget (and charges nothing) when they do not fit.

        `knob` replaces the general advice of the tier in the error by the one that fits this use.
        """
        if nbytes < 0:
            raise ValueError(f"charge {what!r}: {nbytes} bytes is negative")
        with self._lock:
            used = sum(self._now[tier].values())
            budget = self.budget.bytes_of(tier)
            if budget is not None and used + nbytes > budget:
                raise self._over(tier, nbytes, what, budget, used, knob or _KNOBS[tier])
            lease = Lease(self, tier, category, nbytes, what)
            self._leases[tier].add(lease)
            self._now[tier][category] += nbytes
            if used + nbytes > self._peak[tier]:
                self._peak[tier] = used + nbytes
                self._at_peak[tier] = dict(self._now[tier])
            return lease

    def charged_bytes(self, tier: Tier) -> int:
        """Bytes held now."""
        with self._lock:
            return sum(self._now[tier].values())

    def charged_by(self, tier: Tier) -> dict[Category, int]:
        """Bytes held now, by category."""
        with self._lock:
            return dict(self._now[tier])

    def free_bytes(self, tier: Tier) -> int | None:
        """Bytes that could still be charged; None when the tier is not limited."""
        budget = self.budget.bytes_of(tier)
        return None if budget is None else budget - self.charged_bytes(tier)

    def peak_bytes(self, tier: Tier) -> int:
        """The most that was ever held at once."""
        with self._lock:
            return self._peak[tier]

    def at_peak(self, tier: Tier) -> dict[Category, int]:
        """Bytes by category at the first moment the peak was reached."""
        with self._lock:
            return dict(self._at_peak[tier])

    def holders(self, tier: Tier) -> list[tuple[str, int]]:
        """(what, bytes) of everything held now, the largest first; equal names are added up."""
        with self._lock:
            return self._holders(tier)

    def _holders(self, tier: Tier) -> list[tuple[str, int]]:
        by_name: dict[str, int] = {}
        for lease in self._leases[tier]:
            by_name[lease.what] = by_name.get(lease.what, 0) + lease.nbytes
        return sorted(by_name.items(), key=lambda item: (-item[1], item[0]))

    def _give_back(self, lease: Lease) -> None:
        with self._lock:
            if lease in self._leases[lease.tier]:
                self._leases[lease.tier].remove(lease)
                self._now[lease.tier][lease.category] -= lease.nbytes

    def _over(self, tier: Tier, wanted: int, what: str, budget: int, used: int, knob: str) -> OverBudget:
        holders = tuple(self._holders(tier)[:_HOLDERS_NAMED])
        held = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in holders) or "nothing yet"
        message = (
            f"{tier} budget of {format_bytes(budget)}: {what} wants {format_bytes(wanted)}, "
            f"{format_bytes(budget - used)} is free; largest holders: {held}; {knob}"
        )
        return OverBudget(
            message,
            tier=tier,
            wanted_bytes=wanted,
            free_bytes=budget - used,
            budget_bytes=budget,
            holders=holders,
            knob=knob,
        )
