"""The highest bytes of each tier so far, and whose they were then; for the whole session and for each phase."""

from __future__ import annotations

from collections.abc import Mapping

from memopt.profiler.measured import Attributed, by_category
from memopt.profiler.thinning import Point
from memopt.report_types import Phase
from memopt.tiers import Category, Tier
from memopt.units import MiB

# A peak that creeps up by less than this is not worth asking again whose bytes they are: `other` takes the difference.
_WORTH_BYTES = MiB
_WORTH_SHARE = 500


class Peaks:
    """Peaks by tier. `see` takes samples in order of time."""

    def __init__(self) -> None:
        self._bytes: dict[Tier, int] = {}
        self._asked_at: dict[Tier, int] = {}
        self._attributed: dict[Tier, Mapping[Category, int]] = {}
        self._attributed_at: dict[Tier, int] = {}

    def worth_asking(self, point: Point) -> bool:
        """Whether a tier is so far above its last attributed peak that its categories should be asked for."""
        for tier in Tier:
            now, asked = point.bytes_of(tier), self._asked_at.get(tier)
            if now is not None and (asked is None or now > asked + _margin(asked)):
                return True
        return False

    def see(self, point: Point, *, asked: bool) -> list[Tier]:
        """Take one sample; the tiers it is the new peak of. `asked`: its categories are of this very moment, because it
        was worth asking; else they may be a little older."""
        risen = []
        for tier in Tier:
            now = point.bytes_of(tier)
            if now is None:
                continue
            peak = self._bytes.get(tier, -1)
            by = None if point.attributed is None else point.attributed.get(tier)
            # Whoever attributes may not have looked at the peak: the highest moment that is known stands for it; where
            # nobody knew any before, only when little has gone since the peak.
            known = self._attributed_at.get(tier, peak - _margin(peak))
            if by is not None and (asked or tier not in self._attributed) and now > known:
                self._attributed[tier], self._attributed_at[tier] = by, now
            if asked:
                self._asked_at[tier] = max(now, self._asked_at.get(tier, 0))
            if now > peak:
                self._bytes[tier] = now
                risen.append(tier)
        return risen

    def of(self, tier: Tier) -> int | None:
        """The highest bytes of a tier; None when it was never there."""
        return self._bytes.get(tier)

    def attributed(self) -> Attributed:
        """What was attributed at the peak of each tier."""
        return dict(self._attributed)


def _margin(nbytes: int) -> int:
    return max(_WORTH_BYTES, nbytes // _WORTH_SHARE)


class OpenPhase:
    """A phase that has begun: its own peaks, and the traffic of the process tree when it began."""

    __slots__ = ("name", "peaks", "read_bytes", "start_s", "write_bytes")

    def __init__(self, name: str, start_s: float) -> None:
        self.name, self.start_s = name, start_s
        self.read_bytes = self.write_bytes = 0
        self.peaks: Peaks | None = None

    def worth_asking(self, point: Point) -> bool:
        """As of `Peaks`."""
        return self.peaks is None or self.peaks.worth_asking(point)

    def see(self, point: Point, *, asked: bool) -> None:
        """Take one sample."""
        if self.peaks is None:
            self.peaks = Peaks()
        self.peaks.see(point, asked=asked)

    def closed(self, end_s: float, read_bytes: int, write_bytes: int, *, latest: Point) -> Phase:
        """The phase as the report holds it; traffic as counted at its end, `latest` where it saw no sample."""
        peaks = self.peaks
        attributed = {} if peaks is None else peaks.attributed()
        return Phase(
            name=self.name,
            start_s=self.start_s,
            end_s=end_s,
            dram_peak_bytes=latest.dram_bytes if peaks is None else peaks.of(Tier.DRAM),
            gpu_peak_bytes=latest.gpu_bytes if peaks is None else peaks.of(Tier.GPU),
            read_bytes=max(0, read_bytes - self.read_bytes),
            write_bytes=max(0, write_bytes - self.write_bytes),
            at_peak={str(tier): by_category(by, peaks.of(tier) or 0) for tier, by in attributed.items()}
            if peaks is not None
            else {},
        )


def merged(first: Phase, second: Phase) -> Phase:
    """Two stretches of one name as one: the later end, the higher peaks, the traffic of both."""
    at_peak = dict(first.at_peak) if second.at_peak else first.at_peak
    for tier, by in second.at_peak.items():
        # `other` is in it, so the sum is what was measured
        if sum(by.values()) > sum(at_peak.get(tier, {}).values()) or tier not in at_peak:
            at_peak[tier] = by
    return Phase(
        name=first.name,
        start_s=first.start_s,
        end_s=second.end_s,
        dram_peak_bytes=highest(first.dram_peak_bytes, second.dram_peak_bytes),
        gpu_peak_bytes=highest(first.gpu_peak_bytes, second.gpu_peak_bytes),
        read_bytes=(first.read_bytes or 0) + (second.read_bytes or 0),
        write_bytes=(first.write_bytes or 0) + (second.write_bytes or 0),
        at_peak=at_peak,
    )


def highest(first: int | None, second: int | None) -> int | None:
    """The larger of what is there."""
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)
