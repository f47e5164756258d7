"""A time line of bounded size that keeps the peaks and the valleys."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.report_types import Timeline


@dataclass(frozen=True, slots=True)
class Point:
    """One sample: seconds since the start, bytes per tier (None where a tier is not there)."""

    t_s: float
    dram_bytes: int
    gpu_bytes: int | None = None
    ssd_bytes: int | None = None


class Thinner:
    """Takes any number of points, gives back at most `max_points`, evenly spread over the whole time.

    Samples are gathered in buckets of equal count; a bucket keeps its lowest and its highest point by DRAM. When the
    buckets run out, neighbours are merged and each new bucket takes twice as many samples.
    """

    def __init__(self, max_points: int = 2000) -> None:
        if max_points < 4:
            raise ValueError(f"max_points = {max_points}; must be at least 4")
        self._max_buckets = max_points // 2
        self._stride = 1
        self._buckets: list[tuple[Point, Point]] = []
        self._in_last = 0

    def add(self, point: Point) -> None:
        """Take one sample; they come in order of time."""
        if self._buckets and self._in_last < self._stride:
            self._buckets[-1] = _merge(self._buckets[-1], (point, point))
            self._in_last += 1
            return
        if len(self._buckets) == self._max_buckets:
            self._halve()
            if self._in_last < self._stride:
                self.add(point)
                return
        self._buckets.append((point, point))
        self._in_last = 1

    def points(self) -> list[Point]:
        """What is kept, in order of time."""
        kept: list[Point] = []
        for low, high in self._buckets:
            if low is high:
                kept.append(low)
            else:
                kept.extend(sorted((low, high), key=lambda point: point.t_s))
        return kept

    def timeline(self) -> Timeline:
        """What is kept, as the report holds it."""
        points = self.points()
        return Timeline(
            t_s=[round(point.t_s, 4) for point in points],
            gpu_bytes=[point.gpu_bytes for point in points],
            dram_bytes=[point.dram_bytes for point in points],
            ssd_bytes=[point.ssd_bytes for point in points],
        )

    def _halve(self) -> None:
        old = self._buckets
        self._buckets = [_merge(old[i], old[i + 1]) for i in range(0, len(old) - 1, 2)]
        self._in_last = 2 * self._stride
        if len(old) % 2:
            self._buckets.append(old[-1])
            self._in_last = self._stride
        self._stride *= 2


def _merge(first: tuple[Point, Point], second: tuple[Point, Point]) -> tuple[Point, Point]:
    low = min(first[0], second[0], key=lambda point: point.dram_bytes)
    high = max(first[1], second[1], key=lambda point: point.dram_bytes)
    return low, high
