"""Watch a job: a background thread samples every tier and remembers peaks, phases and a time line."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from memopt import cgroups
from memopt.profiler.attribution import Attribution
from memopt.profiler.measured import Attributed, AttributedBy, Measured
from memopt.profiler.pace import Allowance
from memopt.profiler.peaks import OpenPhase, Peaks, highest, merged
from memopt.profiler.readers import Readers
from memopt.profiler.samplers import process_memory
from memopt.profiler.thinning import Point, Thinner
from memopt.profiler.ticker import OverWatch, Ticker
from memopt.report_types import Phase, Timeline
from memopt.tiers import Tier

_PHASES_KEPT = 1000
# A short job is over before the usual interval has passed a few times: begin fast, slow down with every sample.
_FIRST_PAUSE_S, _PAUSE_GROWS = 0.002, 1.1
# Once memory has stopped growing, the usual interval is longer: a thread of Python that wakes up costs the program more
# than the sample itself, because it takes the interpreter's lock away from the computing thread.
_USUAL_S, _CALM_TIMES, _CALM_AFTER_S, _GROWTH = 0.02, 5, 2.0, 1.01
# Watching takes less than half of one hundredth of a core: a quarter of one in the thread, where the pauses grow when a
# sample is dear (many processes), and an eighth at the ends of phases. What it may take at once is for short jobs.
_THREAD_SHARE, _THREAD_FREE_S = 1 / 400, 0.01
_EDGES_SHARE, _EDGES_FREE_S = 1 / 800, 0.01
# One dear look, as at the shares of new processes, must not leave the job unseen: a budget is held against each sample.
# What is dear is spaced out by itself (`Pace`), so that samples this far apart stay cheap.
_UNSEEN_S = 0.25
# The end of one phase is the beginning of the next: one sample serves both.
_SAME_MOMENT_S = 1e-4
_JOURNAL_POINTS = 6


class JournalWriter(Protocol):
    """Where a session puts what it has seen so far, so that the death of this process does not lose it."""

    def due(self, t_s: float) -> bool:
        """Whether it is time to write again."""

    def write(self, measured: Measured, points: list[Point]) -> None:
        """Take what was seen so far (without a time line) and the samples since the last time, thinned."""


class Session:
    """Samples between `start` and `stop`; a context manager; used once.

    `watch`: directories whose real size is the SSD tier. `limit_bytes` with `on_over(now_bytes, limit_bytes)`: called
    once per crossing, in the sampling thread. `interval_s`: between samples, shorter at first, longer (up to 0.25 s)
    where sampling would take more than a quarter of one hundredth of a core; None: 0.02 s while memory grows, up to
    0.1 s once no tier has grown by 1 % for two seconds. The tree is listed five times a second. A peak shorter than
    that can be missed, which is why the kernel's own mark is kept beside the sampled one. `attribution`: says by tier
    and category whose the bytes are now, or None when it cannot tell at this moment; called in the sampling thread and
    at the ends of phases, along the time line and when a peak grows, so it must be quick and thread-safe; its error
    ends the session. `attributed_by` names it in the report.

    `root_pid`: watch that process and its descendants instead of this process and its own. `adopted`: watch all
    descendants of this process but not itself (it is the subreaper of what it runs). `group`: the job's own memory
    group, default the one this process is in. `unified`: the machine's GPU and DRAM are one pool.
    """

    def __init__(
        self,
        *,
        interval_s: float | None = None,
        watch: Iterable[str | Path] = (),
        limit_bytes: int | None = None,
        on_over: Callable[[int, int], None] | None = None,
        attribution: Callable[[], Attributed | None] | None = None,
        attributed_by: AttributedBy = "torch",
        root_pid: int | None = None,
        adopted: bool = False,
        group: cgroups.Group | None = None,
        unified: bool = False,
        journal: JournalWriter | None = None,
    ) -> None:
        if interval_s is not None and interval_s <= 0:
            raise ValueError(f"interval_s = {interval_s}; must be more than zero")
        self._interval_s = _USUAL_S if interval_s is None else interval_s
        self._calm_times = _CALM_TIMES if interval_s is None else 1
        self._pause_s = min(_FIRST_PAUSE_S, self._interval_s)
        self._open_readers = partial(
            Readers, root_pid=root_pid, adopted=adopted, watch=list(watch), group=group, unified=unified
        )
        self._watching = adopted or root_pid is not None
        self._over = OverWatch(limit_bytes, on_over)
        self._attribution = Attribution(attribution)
        self._attributed_by: AttributedBy | None = None if attribution is None else attributed_by
        self._journal = journal
        self._seen = _Seen(journaled=journal is not None)
        self._lock = threading.Lock()
        self._thread = Ticker(self._thread_tick, self._next_pause)
        self._begun: _Begun | None = None
        self._measured: Measured | None = None

    def start(self) -> Session:
        """Take the first sample and start the thread."""
        if self._begun is not None:
            raise RuntimeError("a session is used once; make a new one")
        self._begun = _Begun(self._open_readers())
        self._tick(fresh=True)
        self._begun.dram_bytes = self._seen.last.dram_bytes
        self._thread.start()
        return self

    def stop(self) -> Measured:
        """Take the last sample and end the thread; what was seen. A second call returns the same."""
        if self._measured is None:
            begun = self._running()
            self._thread.stop()
            self._tick(fresh=True)
            self._measured = replace(self._result(begun), timeline=self._seen.thinner.timeline())
            begun.readers.close()
        return self._measured

    def sample(self) -> int:
        """Sample now, children included, besides the thread; the DRAM bytes seen."""
        self._running()
        if self._measured is None:
            self._tick(fresh=True)
        return self._seen.last.dram_bytes

    def dram_bytes(self) -> int:
        """The latest sample of anonymous + shared memory of the tree."""
        return self._seen.last.dram_bytes

    def gpu_bytes(self) -> int | None:
        """The latest sample of the GPUs."""
        return self._seen.last.gpu_bytes

    def ssd_bytes(self) -> int | None:
        """The latest sample of the watched directories."""
        return self._seen.last.ssd_bytes

    def dram_peak_bytes(self) -> int:
        """The highest sample so far."""
        return self._seen.peaks.of(Tier.DRAM) or 0

    def peak_bytes(self, tier: Tier) -> int | None:
        """The highest sample of a tier so far; None when it is not there."""
        return self._seen.peaks.of(tier)

    def write_bytes(self) -> int:
        """Bytes the process tree has written to devices since the start."""
        return self.io_bytes()[1]

    def io_bytes(self) -> tuple[int, int]:
        """Bytes the process tree has read from and written to devices since the start."""
        begun = self._running()
        with self._lock:
            read_bytes, write_bytes = begun.readers.tree.io()
        return max(0, read_bytes - begun.io_bytes[0]), max(0, write_bytes - begun.io_bytes[1])

    def pids(self) -> list[int]:
        """The processes of the tree known now."""
        return self._running().readers.tree.pids()

    def retire(self, pid: int) -> None:
        """Keep what a process of the tree did; call it before waiting for a process this one adopted."""
        with self._lock:
            self._running().readers.tree.retire(pid)

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Name what happens inside; phases may nest and repeat. Samples at both ends, until that has cost more than one
        part in 800 of the time (some ten ends a second): then at some ends only, and a phase without any sample takes
        the latest one, and its traffic is known no better.

        After a thousand of them a phase is added to the last one of its name, so that a long run stays small.
        """
        return _InPhase(self, name)

    def __enter__(self) -> Session:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _running(self) -> _Begun:
        if self._begun is None:
            raise RuntimeError("the session is not started; use `with Session(...)` or call start()")
        return self._begun

    def _edge(self, begun: _Begun) -> tuple[int, int]:
        """Sample at an end of a phase where that is affordable; the traffic so far."""
        now_s = begun.elapsed_s()
        if now_s - begun.edge_s > _SAME_MOMENT_S and begun.edges.left_s(now_s) > 0:
            cpu = time.thread_time()
            self._tick()
            with self._lock:
                begun.edge_io = begun.readers.tree.io()
                cost_s = time.thread_time() - cpu
                self._seen.cost_s += max(0.0, cost_s - self._seen.tick_cost_s)  # the sample itself is in it
                begun.edge_s = begun.elapsed_s()
                begun.edges.spend(cost_s, begun.edge_s)
        return begun.edge_io

    def _thread_tick(self) -> None:
        begun = self._running()
        # the end of a phase may just have been looked at
        if begun.elapsed_s() - self._seen.last.t_s > self._pause_s / 2:
            self._tick()
            begun.thread.spend(self._seen.tick_cost_s, begun.elapsed_s())

    def _next_pause(self) -> float:
        begun = self._running()
        calm = self._seen.last.t_s - self._seen.grew_s > _CALM_AFTER_S
        longest_s = self._interval_s * (self._calm_times if calm else 1)
        self._pause_s = min(longest_s, self._pause_s * _PAUSE_GROWS)
        return max(self._pause_s, min(_UNSEEN_S, begun.thread.wait_s(begun.elapsed_s())))

    def _tick(self, *, fresh: bool = False) -> None:
        begun = self._running()
        cpu = time.thread_time()
        with self._lock:
            if self._measured is not None:
                return
            seen, t_s = self._seen, begun.elapsed_s()
            point = begun.readers.read(t_s, fresh=fresh)
            counted: list[Peaks | OpenPhase] = [seen.peaks, *seen.open]
            rising = self._attributed_by is not None and any(each.worth_asking(point) for each in counted)
            attributed = self._attribution.latest(t_s, at_peak=rising, fresh=fresh)
            if attributed is not None:
                point = replace(point, attributed=attributed)
            asked = rising and self._attribution.asked
            seen.take(point, asked, begun.readers, current=self._attribution.current)
            seen.tick_cost_s = time.thread_time() - cpu
            if self._journal is not None and seen.since_journal is not None and self._journal.due(t_s):
                self._journal.write(self._result(begun), seen.since_journal.points())
                seen.since_journal = Thinner(_JOURNAL_POINTS)
            seen.cost_s += time.thread_time() - cpu
        self._over.see(point.dram_bytes)

    def _result(self, begun: _Begun) -> Measured:
        seen, readers = self._seen, begun.readers
        read_bytes, write_bytes = readers.tree.io()
        wall_s = begun.elapsed_s()
        container = readers.container()
        own = process_memory() if self._watching else None
        return Measured(
            started=begun.iso,
            wall_s=wall_s,
            dram_peak_bytes=seen.peaks.of(Tier.DRAM) or 0,
            dram_start_bytes=begun.dram_bytes,
            dram_upper_bound_bytes=readers.hwm_peak_bytes,
            file_peak_bytes=readers.file_peak_bytes,
            gpu_peak_bytes=highest(seen.peaks.of(Tier.GPU), readers.gpu.allocator_peak_bytes()),
            ssd_peak_bytes=seen.peaks.of(Tier.SSD),
            process_read_bytes=max(0, read_bytes - begun.io_bytes[0]),
            process_write_bytes=max(0, write_bytes - begun.io_bytes[1]),
            oom_kills=container.oom_kills or 0,
            samples=seen.samples,
            # what watches another process does nothing else: all it costs counts, not the sampling alone
            cost_s=time.process_time() - begun.cpu_s if self._watching else seen.cost_s,
            phases=list(seen.phases),
            timeline=Timeline(),
            at_peak=seen.peaks.attributed(),
            attributed_by=self._attributed_by,
            kinds_at_peak=dict(seen.kinds),
            proportional_bytes=readers.proportional_peak_bytes,
            locked_bytes=readers.locked_peak_bytes,
            page_cache_bytes=readers.cached_peak_bytes(),
            container=container,
            devices=readers.gpu.devices(),
            gpu_guessed=readers.gpu.guessed(),
            pinned_bytes=readers.gpu.pinned_bytes(),
            alloc_retries=readers.gpu.alloc_retries(),
            disks=readers.disks(wall_s),
            watching=self._watching,
            own_dram_bytes=None if own is None else own.charged_bytes,
        )


class _InPhase:
    """Inside of a phase; a class of its own because a loop may pass here a thousand times a second."""

    __slots__ = ("_name", "_opened", "_session")

    def __init__(self, session: Session, name: str) -> None:
        self._session, self._name = session, name
        self._opened: OpenPhase | None = None

    def __enter__(self) -> None:
        begun = self._session._running()
        self._opened = opened = OpenPhase(self._name, begun.elapsed_s())
        self._session._seen.open.append(opened)  # in one step, which needs no lock
        opened.read_bytes, opened.write_bytes = self._session._edge(begun)

    def __exit__(self, *_: object) -> None:
        session, opened = self._session, self._opened
        assert opened is not None
        begun, seen = session._running(), session._seen
        io = session._edge(begun)
        with session._lock:
            seen.open.remove(opened)
            _keep(seen.phases, opened.closed(begun.elapsed_s(), *io, latest=seen.last))


class _Begun:
    """The state of things when the session began. Seconds are of the monotonic clock; only `iso` is the wall's."""

    def __init__(self, readers: Readers) -> None:
        self.readers = readers
        self.iso = datetime.now(UTC).isoformat(timespec="microseconds")
        self.at_s = time.monotonic()
        self.cpu_s = time.process_time()
        readers.tree.sample(fresh=True)
        self.io_bytes = readers.tree.io()
        self.dram_bytes = 0
        self.edge_io = self.io_bytes
        self.edge_s = float("-inf")
        self.edges = Allowance(_EDGES_SHARE, _EDGES_FREE_S)
        self.thread = Allowance(_THREAD_SHARE, _THREAD_FREE_S)

    def elapsed_s(self) -> float:
        return time.monotonic() - self.at_s


class _Seen:
    """What the samples so far add up to."""

    def __init__(self, *, journaled: bool) -> None:
        self.last = Point(0.0, 0)
        self.peaks = Peaks()
        self.kinds: dict[Tier, dict[str, int]] = {}
        self.phases: list[Phase] = []
        self.open: list[OpenPhase] = []
        self.thinner = Thinner()
        self.since_journal = Thinner(_JOURNAL_POINTS) if journaled else None
        self.grew_s = 0.0
        self._grown: dict[Tier, float] = {}
        self.samples = 0
        self.cost_s = 0.0
        self.tick_cost_s = 0.0

    def take(self, point: Point, asked: bool, readers: Readers, *, current: bool) -> None:
        """One sample. `current`: what is attributed belongs to this moment, and may stand at a peak."""
        self.last = point
        asked = asked and current
        seen = point if current else replace(point, attributed=None)
        risen = self.peaks.see(seen, asked=asked)
        if risen:
            kinds = readers.kinds()
            self.kinds.update({tier: kinds[tier] for tier in risen if tier in kinds})
        for tier in risen:
            now = point.bytes_of(tier) or 0
            if now > _GROWTH * self._grown.get(tier, 0.0):
                self._grown[tier], self.grew_s = now, point.t_s
        for opened in self.open.copy():
            opened.see(seen, asked=asked)
        self.thinner.add(point)
        if self.since_journal is not None:
            self.since_journal.add(point)
        self.samples += 1


def _keep(phases: list[Phase], phase: Phase) -> None:
    if len(phases) >= _PHASES_KEPT:
        for index in range(len(phases) - 1, -1, -1):
            if phases[index].name == phase.name:
                phases[index] = merged(phases[index], phase)
                return
    phases.append(phase)
