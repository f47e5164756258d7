"""A time line of bounded size that keeps the peaks and the valleys."""

from __future__ import annotations

from dataclasses import dataclass, field

from memopt.profiler.measured import Attributed, by_category
from memopt.report_types import Timeline
from memopt.tiers import Tier


@dataclass(frozen=True, slots=True)
class Point:
    """One sample: seconds since the start, bytes per tier (None where a tier is not there), and whose they were."""

    t_s: float
    dram_bytes: int
    gpu_bytes: int | None = None
    ssd_bytes: int | None = None
    attributed: Attributed | None = field(default=None, compare=False)

    def bytes_of(self, tier: Tier) -> int | None:
        """The sample of one tier."""
        if tier is Tier.GPU:
            return self.gpu_bytes
        return self.dram_bytes if tier is Tier.DRAM else self.ssd_bytes


_Bucket = tuple[Point, ...]
_MOST_IN_BUCKET = 2 * len(Tier)


class Thinner:
    """Takes any number of points, gives back at most `max_points`, evenly spread over the whole time.

    Samples are gathered in buckets of equal count; a bucket keeps its lowest and its highest point of every tier. When
    the points become too many, neighbours are merged and each new bucket takes twice as many samples.
    """

    def __init__(self, max_points: int = 2000) -> None:
        if max_points < _MOST_IN_BUCKET:
            raise ValueError(f"max_points = {max_points}; must be at least {_MOST_IN_BUCKET}")
        self._max_points = max_points
        self._stride = 1
        self._buckets: list[_Bucket] = []
        self._in_last = 0
        self._kept = 0

    def add(self, point: Point) -> None:
        """Take one sample; they come in order of time."""
        if self._buckets and self._in_last < self._stride:
            self._in_last += 1
            last = self._buckets[-1]
            if all(_within(point.bytes_of(tier), last, tier) for tier in Tier):
                return  # the usual case, and the cheap one
            self._kept -= len(last)
            self._buckets[-1] = _extremes((*last, point))
        else:
            self._buckets.append((point,))
            self._in_last = 1
        self._kept += len(self._buckets[-1])
        while self._kept > self._max_points:
            self._halve()

    def points(self) -> list[Point]:
        """What is kept, in order of time."""
        return [point for bucket in self._buckets for point in bucket]

    def timeline(self) -> Timeline:
        """What is kept, as the report holds it."""
        points = self.points()
        return Timeline(
            t_s=[round(point.t_s, 4) for point in points],
            gpu_bytes=[point.gpu_bytes for point in points],
            dram_bytes=[point.dram_bytes for point in points],
            ssd_bytes=[point.ssd_bytes for point in points],
            categories=_categories(points),
        )

    def _halve(self) -> None:
        old = self._buckets
        self._buckets = [_extremes(old[i] + old[i + 1]) for i in range(0, len(old) - 1, 2)]
        if len(old) % 2:
            self._buckets.append(old[-1])
        else:
            self._in_last += self._stride
        self._stride *= 2
        self._kept = sum(map(len, self._buckets))


def _within(nbytes: int | None, points: _Bucket, tier: Tier) -> bool:
    """Whether a sample is neither higher nor lower than what is kept."""
    if nbytes is None:
        return True
    kept = [value for point in points if (value := point.bytes_of(tier)) is not None]
    return bool(kept) and min(kept) <= nbytes <= max(kept)


def _extremes(points: _Bucket) -> _Bucket:
    """The lowest and highest point of each tier, in order of time; of equal ones the first."""
    kept: set[int] = set()
    for tier in Tier:
        values = [(nbytes, index) for index, point in enumerate(points) if (nbytes := point.bytes_of(tier)) is not None]
        if values:
            kept.add(min(values)[1])
            kept.add(max(values, key=lambda value: (value[0], -value[1]))[1])
    return tuple(point for index, point in enumerate(points) if index in kept)


def _categories(points: list[Point]) -> dict[str, dict[str, list[int | None]]]:
    found: dict[str, dict[str, list[int | None]]] = {}
    tiers = [tier for tier in Tier if any(point.attributed and tier in point.attributed for point in points)]
    for tier in tiers:
        rows = [_named(point, tier) for point in points]
        used = {name for row in rows for name, nbytes in row.items() if nbytes} | {"other"}
        names = [name for name in by_category({}, 0) if name in used]
        found[str(tier)] = {name: [row.get(name) for row in rows] for name in names}
    return found


def _named(point: Point, tier: Tier) -> dict[str, int]:
    measured = point.bytes_of(tier)
    if measured is None or point.attributed is None or tier not in point.attributed:
        return {}
    return by_category(point.attributed[tier], measured)
