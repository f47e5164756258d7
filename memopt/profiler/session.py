"""Watch a job: a background thread samples every tier and remembers peaks, phases and a time line."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from memopt import cgroups
from memopt.profiler.gpu_sampler import GpuSampler
from memopt.profiler.samplers import resident_bytes
from memopt.profiler.thinning import Point, Thinner
from memopt.profiler.tree_sampler import TreeSampler, tree_io
from memopt.report_types import Phase, Timeline

_GPU_EVERY_S = 0.1
_SSD_EVERY_S = 1.0
_PHASES_KEPT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a session saw. Bytes and seconds; None for a tier that is not there.

    `dram_peak_bytes`: sampled peak of anonymous + shared memory of the process tree. `dram_upper_bound_bytes`: the
    kernel's high-water marks added up (they include file pages, and what happened before the session).
    """

    started: str
    wall_s: float
    dram_peak_bytes: int
    dram_start_bytes: int
    dram_upper_bound_bytes: int
    file_peak_bytes: int
    gpu_peak_bytes: int | None
    ssd_peak_bytes: int | None
    process_read_bytes: int
    process_write_bytes: int
    oom_kills: int
    samples: int
    cost_s: float
    phases: list[Phase] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)


@dataclass(slots=True)
class _Peaks:
    dram: int = 0
    files: int = 0
    upper_bound: int = 0
    gpu: int | None = None
    ssd: int | None = None


@dataclass(slots=True)
class _OpenPhase:
    name: str
    start_s: float
    dram: int = 0
    gpu: int | None = None

    def closed(self, end_s: float) -> Phase:
        return Phase(
            name=self.name, start_s=self.start_s, end_s=end_s, dram_peak_bytes=self.dram, gpu_peak_bytes=self.gpu
        )


class Session:
    """Samples between `start` and `stop`; a context manager; used once.

    `watch`: directories whose real size is the SSD tier. `limit_bytes` with `on_over(now_bytes, limit_bytes)`: called
    once per crossing, in the sampling thread. `interval_s`: between samples of this process; children are read ten
    times, and listed once, a second; so a peak shorter than that can be missed, which is why the kernel's own mark is
    kept beside the sampled one.
    """

    def __init__(
        self,
        *,
        interval_s: float = 0.02,
        watch: Iterable[str | Path] = (),
        limit_bytes: int | None = None,
        on_over: Callable[[int, int], None] | None = None,
    ) -> None:
        if interval_s <= 0:
            raise ValueError(f"interval_s = {interval_s}; must be more than zero")
        self._interval_s = interval_s
        self._watch = [Path(path) for path in watch]
        self._over = _OverWatch(limit_bytes, on_over)
        self._gpu = GpuSampler()
        self._thinner = Thinner()
        self._peaks = _Peaks()
        self._phases: list[Phase] = []
        self._open: list[_OpenPhase] = []
        self._last = Point(0.0, 0)
        self._samples = 0
        self._cost_s = 0.0
        self._lock = threading.Lock()
        self._thread = _Ticker(self._tick, interval_s)
        self._begun: _Begun | None = None
        self._measured: Measured | None = None

    def start(self) -> Session:
        """Take the first sample and start the thread."""
        if self._begun is not None:
            raise RuntimeError("a session is used once; make a new one")
        self._gpu.reset_peak()
        self._begun = _Begun(datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic(), tree_io())
        self._tick(fresh=True)
        self._begun.dram_bytes = self._last.dram_bytes
        self._thread.start()
        return self

    def stop(self) -> Measured:
        """Take the last sample and end the thread; what was seen. A second call returns the same."""
        if self._measured is None:
            begun = self._running()
            self._thread.stop()
            self._tick(fresh=True)
            self._measured = self._result(begun)
            begun.tree.close()
            self._gpu.close()
        return self._measured

    def sample(self) -> int:
        """Sample now, children included, besides the thread; the DRAM bytes seen."""
        self._running()
        if self._measured is None:
            self._tick(fresh=True)
        return self._last.dram_bytes

    def dram_bytes(self) -> int:
        """The latest sample of anonymous + shared memory of the tree."""
        return self._last.dram_bytes

    def gpu_bytes(self) -> int | None:
        """The latest sample of the GPU."""
        return self._last.gpu_bytes

    def ssd_bytes(self) -> int | None:
        """The latest sample of the watched directories."""
        return self._last.ssd_bytes

    def dram_peak_bytes(self) -> int:
        """The highest sample so far."""
        return self._peaks.dram

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside; phases may nest and repeat. Samples at both ends.

        After a thousand of them a phase is added to the last one of its name, so that a long run stays small.
        """
        begun = self._running()
        opened = _OpenPhase(name, time.monotonic() - begun.at_s)
        with self._lock:
            self._open.append(opened)
        self._tick()
        try:
            yield
        finally:
            self._tick()
            with self._lock:
                self._open.remove(opened)
                end_s = time.monotonic() - begun.at_s
                _keep(self._phases, opened.closed(end_s))

    def __enter__(self) -> Session:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _running(self) -> _Begun:
        if self._begun is None:
            raise RuntimeError("the session is not started; use `with Session(...)` or call start()")
        return self._begun

    def _tick(self, *, fresh: bool = False) -> None:
        begun = self._running()
        cpu = time.thread_time()
        with self._lock:
            if self._measured is not None:
                return
            memory = begun.tree.sample(fresh=fresh)
            t_s = time.monotonic() - begun.at_s
            gpu, ssd = self._slow_tiers(begun, t_s, fresh)
            self._last = Point(t_s, memory.charged_bytes, gpu, ssd)
            self._thinner.add(self._last)
            self._samples += 1
            peaks = self._peaks
            peaks.dram = max(peaks.dram, memory.charged_bytes)
            peaks.files = max(peaks.files, memory.file_bytes)
            peaks.upper_bound = max(peaks.upper_bound, memory.hwm_bytes)
            peaks.gpu, peaks.ssd = _highest(peaks.gpu, gpu), _highest(peaks.ssd, ssd)
            for opened in self._open:
                opened.dram = max(opened.dram, memory.charged_bytes)
                opened.gpu = _highest(opened.gpu, gpu)
            self._cost_s += time.thread_time() - cpu
        self._over.see(memory.charged_bytes)

    def _slow_tiers(self, begun: _Begun, t_s: float, fresh: bool) -> tuple[int | None, int | None]:
        gpu, ssd = self._last.gpu_bytes, self._last.ssd_bytes
        if fresh or t_s >= begun.gpu_due_s:
            begun.gpu_due_s = t_s + _GPU_EVERY_S
            found = self._gpu.sample()
            gpu = None if found is None else found.charged_bytes
        if self._watch and (fresh or t_s >= begun.ssd_due_s):
            begun.ssd_due_s = t_s + _SSD_EVERY_S
            ssd = resident_bytes(self._watch)
        return gpu, ssd

    def _result(self, begun: _Begun) -> Measured:
        read_bytes, write_bytes = tree_io()
        peaks = self._peaks
        return Measured(
            started=begun.iso,
            wall_s=time.monotonic() - begun.at_s,
            dram_peak_bytes=peaks.dram,
            dram_start_bytes=begun.dram_bytes,
            dram_upper_bound_bytes=peaks.upper_bound,
            file_peak_bytes=peaks.files,
            gpu_peak_bytes=_highest(peaks.gpu, self._gpu.allocator_peak_bytes()),
            ssd_peak_bytes=peaks.ssd,
            # a child that ended without being waited for takes its count along
            process_read_bytes=max(0, read_bytes - begun.io_bytes[0]),
            process_write_bytes=max(0, write_bytes - begun.io_bytes[1]),
            oom_kills=(cgroups.oom_kills() or 0) - begun.oom_kills,
            samples=self._samples,
            cost_s=self._cost_s,
            phases=list(self._phases),
            timeline=self._thinner.timeline(),
        )


class _Begun:
    """The state of things when the session began, and when the slow tiers are due again."""

    def __init__(self, iso: str, at_s: float, io_bytes: tuple[int, int]) -> None:
        self.iso = iso
        self.at_s = at_s
        self.io_bytes = io_bytes
        self.tree = TreeSampler()
        self.oom_kills = cgroups.oom_kills() or 0
        self.dram_bytes = 0
        self.gpu_due_s = 0.0
        self.ssd_due_s = 0.0


class _OverWatch:
    """Calls back once each time a limit is crossed upwards."""

    def __init__(self, limit_bytes: int | None, on_over: Callable[[int, int], None] | None) -> None:
        self._limit_bytes = limit_bytes
        self._on_over = on_over
        self._is_over = False

    def see(self, now_bytes: int) -> None:
        if self._limit_bytes is None or self._on_over is None:
            return
        was_over, self._is_over = self._is_over, now_bytes > self._limit_bytes
        if self._is_over and not was_over:
            self._on_over(now_bytes, self._limit_bytes)


class _Ticker:
    """A daemon thread that calls `tick` again and again; its error is raised by `stop`."""

    def __init__(self, tick: Callable[[], None], interval_s: float) -> None:
        self._tick = tick
        self._interval_s = interval_s
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="memopt-profiler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            while not self._end.wait(self._interval_s):
                self._tick()
        except BaseException as error:  # carried to the caller of stop()
            self._error = error


def _keep(phases: list[Phase], phase: Phase) -> None:
    if len(phases) >= _PHASES_KEPT:
        for index in range(len(phases) - 1, -1, -1):
            last = phases[index]
            if last.name == phase.name:
                phases[index] = dataclasses.replace(
                    last,
                    end_s=phase.end_s,
                    dram_peak_bytes=_highest(last.dram_peak_bytes, phase.dram_peak_bytes),
                    gpu_peak_bytes=_highest(last.gpu_peak_bytes, phase.gpu_peak_bytes),
                )
                return
    phases.append(phase)


def _highest(first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)
