"""What grew between two reports: tiers, categories, phases and traffic, judged by one tolerance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from memopt.profiler.render_grids import NONE, Grid, bytes_text, categories_of, in_order, percent, tiers_of
from memopt.report_types import Phase, Report, SsdUse, TierUse
from memopt.tiers import Category, Tier
from memopt.units import MiB, format_bytes, format_s, parse_bytes

# one page here or there, or a thread's arena, is no growth; allocators hand out memory in steps of about this size
FLOOR_BYTES = MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Growth that is still fine: a share of what was there, and never less than `FLOOR_BYTES`; or bytes."""

    share: float | None = None
    nbytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """`5%` or `64MiB`. Raises BadInput otherwise."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", text)
        if match is not None:
            return cls(share=float(match[1]) / 100)
        return cls(nbytes=parse_bytes(text, field="tolerance"))

    def allowed_bytes(self, of_bytes: int) -> int:
        """The growth allowed to something of this size."""
        if self.nbytes is not None:
            return self.nbytes
        return max(FLOOR_BYTES, int((self.share or 0.0) * of_bytes))

    def __str__(self) -> str:
        return format_bytes(self.nbytes) if self.nbytes is not None else f"{(self.share or 0.0) * 100:.4g}%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Bytes before and after; None: not in that report. `over`: grew by more than the tolerance allows.

    `judged`: counts for the verdict. What depends on the page cache or on the machine is shown only.
    """

    what: str
    before: int | None
    after: int | None
    over: bool = False
    judged: bool = True

    @property
    def grew_bytes(self) -> int | None:
        """After less before; None where one of them is not there."""
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All changes in order (tiers, categories, phases, traffic), and what makes the two hard to compare."""

    changes: tuple[Change, ...]
    tolerance: str
    wall_s: tuple[float, float]
    notes: tuple[str, ...] = ()

    @property
    def over(self) -> tuple[Change, ...]:
        """What grew by more than the tolerance."""
        return tuple(change for change in self.changes if change.over)

    def verdict(self) -> str:
        """One line."""
        if not self.over:
            return f"nothing grew by more than {self.tolerance}"
        first = max(self.over, key=lambda change: change.grew_bytes or 0)
        grew = _signed(first.grew_bytes)
        return f"GREW: {len(self.over)} of {len(self.changes)} by more than {self.tolerance}; most: {first.what} {grew}"

    def grid(self, *, changed_only: bool = False) -> Grid:
        """A row per change; `changed_only`: what grew or shrank by more than a mebibyte, and all tiers."""
        rows = []
        for change in self.changes:
            if changed_only and not (
                change.over or " " not in change.what or abs(change.grew_bytes or 0) > FLOOR_BYTES
            ):
                continue
            share = None if not change.before or change.grew_bytes is None else change.grew_bytes / change.before
            verdict = "OVER" if change.over else "fine" if change.judged and change.grew_bytes is not None else NONE
            row = (bytes_text(change.before), bytes_text(change.after), _signed(change.grew_bytes), percent(share))
            rows.append((change.what, *row, verdict))
        wall = self.wall_s[1] / self.wall_s[0] - 1 if self.wall_s[0] > 0 else None
        rows.append(("time", format_s(self.wall_s[0]), format_s(self.wall_s[1]), NONE, percent(wall), NONE))
        columns = ("what", "base", "now", "grew by", "", "verdict")
        return Grid(title="what grew", columns=columns, rows=tuple(rows))


def compare(base: Report, now: Report, tolerance: Tolerance) -> Comparison:
    """Both reports side by side.

    Judged are measured peaks of tiers and phases, the categories at the peak, and the bytes memopt's own I/O moved or
    the process tree wrote. A category is allowed the tolerance of its whole tier: a share of little would be noise.
    """
    changes = [*_tiers(base, now, tolerance), *_phases(base, now, tolerance), *_traffic(base, now, tolerance)]
    return Comparison(
        changes=tuple(changes),
        tolerance=str(tolerance),
        wall_s=(base.wall_s, now.wall_s),
        notes=tuple(_notes(base, now)),
    )


def _change(what: str, before: int | None, after: int | None, tolerance: Tolerance, of: int | None = None) -> Change:
    grew = None if before is None or after is None else after - before
    over = grew is not None and grew > tolerance.allowed_bytes(max(0, of if of is not None else before or 0))
    return Change(what=what, before=before, after=after, over=over)


def _uses(report: Report) -> dict[Tier, TierUse]:
    return dict(tiers_of(report))


def _tiers(base: Report, now: Report, tolerance: Tolerance) -> Iterator[Change]:
    before, after = _uses(base), _uses(now)
    for tier in Tier:
        one, two = before.get(tier), after.get(tier)
        peaks = one.peak_bytes if one else None, two.peak_bytes if two else None
        if peaks == (None, None):
            continue
        # a tier that the base did not touch at all has grown from nothing
        yield _change(str(tier), 0 if one is None else peaks[0], 0 if two is None else peaks[1], tolerance)
        if one is None or two is None or one.attributed_by != two.attributed_by:
            continue
        categories = [{name: measured for name, _, measured in categories_of(use)} for use in (one, two)]
        names = [*{**categories[0], **categories[1]}]
        if names == [str(Category.OTHER)]:
            continue  # nothing was attributed: it would be the tier once more
        for name in names:
            held = [each.get(name, 0) for each in categories]
            yield _change(f"{tier} {name}", held[0], held[1], tolerance, of=peaks[0])


def _phases(base: Report, now: Report, tolerance: Tolerance) -> Iterator[Change]:
    before, after = _phase_peaks(base.phases), _phase_peaks(now.phases)
    for key in {**before, **after}:
        name, tier = key
        yield _change(f"{name}, {tier}", before.get(key), after.get(key), tolerance)


def _phase_peaks(phases: list[Phase]) -> dict[tuple[str, Tier], int]:
    peaks: dict[tuple[str, Tier], int] = {}
    for phase in in_order(phases):
        for tier, nbytes in ((Tier.GPU, phase.gpu_peak_bytes), (Tier.DRAM, phase.dram_peak_bytes)):
            if nbytes is not None:
                peaks[phase.name, tier] = max(peaks.get((phase.name, tier), 0), nbytes)
    return peaks


def _traffic(base: Report, now: Report, tolerance: Tolerance) -> Iterator[Change]:
    # without an SSD tier memopt moved nothing; what the job did is not known then
    nothing = SsdUse(read_bytes=0, write_bytes=0)
    one, two = base.tiers.ssd or nothing, now.tiers.ssd or nothing
    for what, before, after, judged in (
        ("read by memopt", one.read_bytes, two.read_bytes, True),
        ("written by memopt", one.write_bytes, two.write_bytes, True),
        ("written by the job", one.process_write_bytes, two.process_write_bytes, True),
        # what the page cache held before the job decides this one
        ("read by the job", one.process_read_bytes, two.process_read_bytes, False),
    ):
        if not before and not after:
            continue
        if judged:
            yield _change(what, before, after, tolerance)
        else:
            yield Change(what=what, before=before, after=after, judged=False)


def _notes(base: Report, now: Report) -> Iterator[str]:
    if base.machine.name != now.machine.name or base.machine.gpu_name != now.machine.gpu_name:
        names = [
            f"{each.name}{f' with {each.gpu_name}' if each.gpu_name else ''}" for each in (base.machine, now.machine)
        ]
        yield f"different machines: {names[0]}, now {names[1]}"
    if base.command != now.command:
        yield f"different jobs: {' '.join(base.command) or 'a job'}, now {' '.join(now.command) or 'a job'}"
    different = sorted(
        name for name in base.config.keys() | now.config.keys() if base.config.get(name) != now.config.get(name)
    )
    if different:
        yield f"different settings: {', '.join(different)}"
    if base.memopt != now.memopt:
        yield f"different versions of memopt: {base.memopt}, now {now.memopt}"
    for name, report in (("base", base), ("new", now)):
        if not report.complete:
            yield f"the {name} report is incomplete: its peaks may be too low"
    for tier, use in _uses(now).items():
        other = _uses(base).get(tier)
        if other is not None and other.attributed_by != use.attributed_by:
            told = f"{other.attributed_by or 'nobody'}, now {use.attributed_by or 'nobody'}"
            yield f"{tier}: attributed by {told}; categories are not compared"


def _signed(nbytes: int | None) -> str:
    return NONE if nbytes is None else f"{'+' if nbytes > 0 else ''}{format_bytes(nbytes)}"
