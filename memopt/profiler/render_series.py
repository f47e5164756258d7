"""The time line of a report per tier: what was measured, and the categories that fill it, `other` included."""

from __future__ import annotations

from dataclasses import dataclass, field

from memopt.profiler.render_grids import tiers_of
from memopt.report_types import Report
from memopt.tiers import Category, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One tier over time; all lists are as long as the report's `t_s`, bytes, None where nothing was sampled.

    `categories`: in order of stacking, `other` (measured less attributed, below zero where more was attributed than
    measured) last; empty where nothing was attributed.
    """

    tier: Tier
    budget_bytes: int | None
    predicted_bytes: int | None
    measured: list[int | None]
    categories: dict[str, list[int | None]] = field(default_factory=dict)


def panels_of(report: Report) -> list[Panel]:
    """The tiers that were sampled or attributed over time, the fastest first."""
    line = report.timeline
    sampled = {Tier.GPU: line.gpu_bytes, Tier.DRAM: line.dram_bytes, Tier.SSD: line.ssd_bytes}
    found = []
    for tier, use in tiers_of(report):
        measured = _as_long(sampled[tier], len(line.t_s))
        categories = _categories(line.categories.get(str(tier), {}), measured)
        if any(n is not None for n in measured) or categories:
            found.append(
                Panel(
                    tier=tier,
                    budget_bytes=use.budget_bytes,
                    predicted_bytes=use.predicted_bytes,
                    measured=measured,
                    categories=categories,
                )
            )
    return found


def _categories(attributed: dict[str, list[int | None]], measured: list[int | None]) -> dict[str, list[int | None]]:
    named = {name: _as_long(values, len(measured)) for name, values in attributed.items() if name != Category.OTHER}
    if not any(any(values) for values in named.values()):
        return {}
    known = [str(category) for category in Category]
    order = sorted(named, key=lambda name: (known.index(name) if name in known else len(known), name))
    other: list[int | None] = []
    for k, total in enumerate(measured):
        held = sum(values[k] or 0 for values in named.values())
        other.append(None if total is None else total - held)
    return {**{name: named[name] for name in order if any(named[name])}, str(Category.OTHER): other}


def _as_long(values: list[int | None], length: int) -> list[int | None]:
    """A tier that was never sampled may have an empty list."""
    return [*values[:length], *[None] * (length - len(values))]
