"""Watch a job: a background thread samples every tier and remembers peaks, phases and a time line."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from memopt import cgroups
from memopt.profiler.attribution import Attribution
from memopt.profiler.gpu_sampler import GpuSampler
from memopt.profiler.measured import Attributed, AttributedBy, Measured
from memopt.profiler.peaks import OpenPhase, Peaks, highest, merged
from memopt.profiler.samplers import resident_bytes
from memopt.profiler.thinning import Point, Thinner
from memopt.profiler.ticker import OverWatch, Ticker
from memopt.profiler.tree_sampler import TreeSampler, tree_io
from memopt.report_types import Phase
from memopt.tiers import Tier

_GPU_EVERY_S = 0.1
_SSD_EVERY_S = 1.0
_PHASES_KEPT = 1000


class Session:
    """Samples between `start` and `stop`; a context manager; used once.

    `watch`: directories whose real size is the SSD tier. `limit_bytes` with `on_over(now_bytes, limit_bytes)`: called
    once per crossing, in the sampling thread. `interval_s`: between samples of this process; children are read ten
    times, and listed once, a second; so a peak shorter than that can be missed, which is why the kernel's own mark is
    kept beside the sampled one. `attribution`: says by tier and category whose the bytes are now; called in the
    sampling thread and at the ends of phases, along the time line and when a peak grows, so it must be quick and
    thread-safe; its error ends the session. `attributed_by` names it in the report.
    """

    def __init__(
        self,
        *,
        interval_s: float = 0.02,
        watch: Iterable[str | Path] = (),
        limit_bytes: int | None = None,
        on_over: Callable[[int, int], None] | None = None,
        attribution: Callable[[], Attributed] | None = None,
        attributed_by: AttributedBy = "torch",
    ) -> None:
        if interval_s <= 0:
            raise ValueError(f"interval_s = {interval_s}; must be more than zero")
        self._interval_s = interval_s
        self._watch = [Path(path) for path in watch]
        self._over = OverWatch(limit_bytes, on_over)
        self._attribution = Attribution(attribution)
        self._attributed_by: AttributedBy | None = None if attribution is None else attributed_by
        self._gpu = GpuSampler()
        self._thinner = Thinner()
        self._peaks = Peaks()
        self._files_bytes = self._hwm_bytes = 0
        self._phases: list[Phase] = []
        self._open: list[OpenPhase] = []
        self._last = Point(0.0, 0)
        self._samples = 0
        self._cost_s = 0.0
        self._lock = threading.Lock()
        self._thread = Ticker(self._tick, lambda: self._interval_s)
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
        return self._peaks.of(Tier.DRAM) or 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside; phases may nest and repeat. Samples at both ends.

        After a thousand of them a phase is added to the last one of its name, so that a long run stays small.
        """
        begun = self._running()
        opened = OpenPhase(name, time.monotonic() - begun.at_s, *begun.tree.io())
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
                _keep(self._phases, opened.closed(end_s, *begun.tree.io()))

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
            point = Point(t_s, memory.charged_bytes, gpu, ssd)
            counted = [self._peaks, *(opened.peaks for opened in self._open)]
            rising = any(peaks.worth_asking(point) for peaks in counted)
            attributed = self._attribution.latest(t_s, at_peak=rising, fresh=fresh)
            self._last = point if attributed is None else replace(point, attributed=attributed)
            for peaks in counted:
                peaks.see(self._last, asked=rising)
            self._thinner.add(self._last)
            self._samples += 1
            self._files_bytes = max(self._files_bytes, memory.file_bytes)
            self._hwm_bytes = max(self._hwm_bytes, memory.hwm_bytes)
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
            dram_peak_bytes=peaks.of(Tier.DRAM) or 0,
            dram_start_bytes=begun.dram_bytes,
            dram_upper_bound_bytes=self._hwm_bytes,
            file_peak_bytes=self._files_bytes,
            gpu_peak_bytes=highest(peaks.of(Tier.GPU), self._gpu.allocator_peak_bytes()),
            ssd_peak_bytes=peaks.of(Tier.SSD),
            # a child that ended without being waited for takes its count along
            process_read_bytes=max(0, read_bytes - begun.io_bytes[0]),
            process_write_bytes=max(0, write_bytes - begun.io_bytes[1]),
            oom_kills=(cgroups.oom_kills() or 0) - begun.oom_kills,
            samples=self._samples,
            cost_s=self._cost_s,
            phases=list(self._phases),
            timeline=self._thinner.timeline(),
            at_peak=peaks.attributed(),
            attributed_by=self._attributed_by,
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


def _keep(phases: list[Phase], phase: Phase) -> None:
    if len(phases) >= _PHASES_KEPT:
        for index in range(len(phases) - 1, -1, -1):
            if phases[index].name == phase.name:
                phases[index] = merged(phases[index], phase)
                return
    phases.append(phase)
