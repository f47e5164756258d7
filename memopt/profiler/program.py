"""`memopt.Profiler`: watch the program it is used in, tier by tier and category by category, against a budget."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from memopt.budget import Budget
from memopt.errors import BadInput, OverBudget
from memopt.ledger import Ledger
from memopt.machine import Machine, dram_capacity
from memopt.profiler.assemble import Story, assemble
from memopt.profiler.journal import Journal
from memopt.profiler.measured import Attributed, Measured
from memopt.profiler.over import Contract, OnOver, Stop
from memopt.profiler.program_phases import Now, OpenPhases
from memopt.profiler.prometheus import FileWriter, Server, State, exposition, metrics_of, write
from memopt.profiler.samplers import process_memory
from memopt.profiler.session import Session
from memopt.report_types import Report
from memopt.tiers import Category, Tier

if TYPE_CHECKING:
    from memopt.profiler.torch_watch import TorchWatch

_PASSES = {"forward", "backward", "prefill", "decode"}
# Tiers that are looked at when a phase begins or ends; DRAM is looked at with every sample.
_AT_BOUNDARIES = (Tier.GPU, Tier.SSD)
_GROWTH = 1.01
_NOT_RUNNING = "the profiler is not running; use it inside `with memopt.Profiler(...) as prof:`"


class Profiler:
    """Measures between entering and leaving its `with` block; used once. Any program; PyTorch ones in more detail.

    `budget`: a Budget, or text like `dram=8GiB,gpu=20GiB`. When it is passed: `on_over="warn"` warns once per tier;
    `"raise"` raises OverBudget in the program's own thread, at the next beginning or end of a phase, `step()`, or at
    the end of the block; `"stop"` leaves the block there without an error (`stopped` says so); a function is called
    there with the OverBudget. `enforce=True` besides makes torch refuse to allocate more than the gpu budget on the
    current CUDA device (BadInput where there is none).
    Gradients and activations are counted in the first steps and then as often as that is cheap; the report says so.
    `watch_dirs`: directories whose size is the SSD tier. `report`: where the report is written, also after an error.
    `interval_s`: between samples; None: 0.02 s while memory grows, up to 0.1 s. `activations=False` sets no
    saved-tensor hooks (needed for `torch.func.grad`).
    `auto_phases=False` leaves phases to `phase()`.
    """

    def __init__(
        self,
        *,
        budget: Budget | str | None = None,
        watch_dirs: Iterable[str | Path] = (),
        on_over: OnOver | Callable[[OverBudget], None] = "warn",
        report: str | Path | None = None,
        interval_s: float | None = None,
        enforce: bool = False,
        activations: bool = True,
        auto_phases: bool = True,
    ) -> None:
        if not callable(on_over) and on_over not in get_args(OnOver):
            raise BadInput(f"on_over {on_over!r} is not one of {', '.join(get_args(OnOver))}, or a function")
        if report is not None and not Path(report).resolve().parent.is_dir():
            raise BadInput(f"report {str(report)!r}: there is no directory {Path(report).parent}; make it first")
        self.budget = _budget(budget)
        if enforce and self.budget.gpu_bytes is None:
            raise BadInput("enforce=True limits the GPU, and no gpu budget is given; add one, like gpu=20GiB")
        watch_dirs = [Path(directory) for directory in watch_dirs]
        if self.budget.ssd_bytes is not None and not watch_dirs:
            raise BadInput("an ssd budget is held against watch_dirs, and none are given; name the directories")
        self._enforce = enforce
        self._report_path = None if report is None else Path(report)
        self._activations, self._auto = activations, auto_phases
        self._contract = Contract(self.budget, on_over)
        self._make_session = functools.partial(
            Session,
            interval_s=interval_s,
            watch=watch_dirs,
            limit_bytes=self.budget.dram_bytes,
            on_over=lambda now, _: self._see(Tier.DRAM, now),
            attribution=lambda: {} if self._torch is None else self._torch.attributed(),
        )
        self._started: Session | None = None
        self._journal: Journal | None = None
        self._torch: TorchWatch | None = None
        self._before: list[Any] = []
        self._cleanup = contextlib.ExitStack()
        self._phases = OpenPhases(lambda name: self._session.phase(name))
        self._thread: int | None = None
        self._steps = 0
        self._peaks: dict[Tier, int] = {}
        self._notes: list[str] = []
        self._files: list[FileWriter] = []
        self._report: Report | None = None
        self.stopped = False

    def watch(self, *watched: Any) -> None:
        """Attribute what these hold, and find phases by their calls: modules, optimizers, key-value caches.

        Weak references are held. Before the `with` block too. Raises BadInput for what cannot hold tensors.
        """
        for thing in watched:
            if thing is None or isinstance(thing, str | bytes | int | float | type):
                raise BadInput(f"watch({thing!r}): give a module, an optimizer, or a cache that holds tensors")
        if self._report is not None:
            raise RuntimeError("the profiler has ended; watch before or inside its `with` block")
        if self._thread is None:
            self._before.extend(watched)
            return
        self._watch(watched)
        self._session.sample()  # the highest moment may be behind, when nobody could say whose the bytes were

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside: load, forward, backward, optimizer, save, prefill, decode, or anything else."""
        self._boundary()
        self._begin(name, by_hand=True)
        try:
            yield
        finally:
            self._end(name, by_hand=True)
        self._boundary()

    def step(self) -> int:
        """One step of the program is done; how many so far. Where a budget that was passed is acted on."""
        self._running()
        self._steps += 1
        self._close_phases(found_only=True)
        self._step_ended()
        self._boundary()
        return self._steps

    def note(self, text: str) -> None:
        """A sentence for the report."""
        self._notes.append(text)

    def sample(self) -> Now:
        """Measure now."""
        self._running()
        if self._torch is not None and self._own_thread():
            self._torch.attribution.look(force=True)
        self._session.sample()
        return self.latest()

    def latest(self) -> Now:
        """The latest sample, taken without measuring again. From any thread."""
        sizes = {
            Tier.GPU: self._session.gpu_bytes(),
            Tier.DRAM: self._session.dram_bytes(),
            Tier.SSD: self._session.ssd_bytes(),
        }
        found = {tier: self._categories(tier, nbytes) for tier, nbytes in sizes.items() if nbytes is not None}
        return Now(
            dram_bytes=sizes[Tier.DRAM] or 0,
            gpu_bytes=sizes[Tier.GPU],
            ssd_bytes=sizes[Tier.SSD],
            categories={tier: by for tier, by in found.items() if by},
        )

    def peak_bytes(self, tier: Tier) -> int | None:
        """The highest sample of a tier so far; None when it is not there."""
        return self._session.peak_bytes(tier)

    def io_bytes(self) -> tuple[int, int]:
        """Bytes the process tree has read from and written to devices since the start, as the kernel counts."""
        return self._session.io_bytes()

    def metrics(self) -> str:
        """The latest sample as Prometheus' text format. From any thread; also after the `with` block."""
        return exposition(metrics_of(self._session, self._state()))

    def write_metrics(self, path: str | Path, *, every_s: float | None = None) -> None:
        """Write `metrics()` to a `.prom` file for node_exporter's textfile collector, each time in one step.

        With `every_s` also that often from now on, and at the end of the block. Raises BadInput.
        """
        self._running()
        if every_s is None:
            write(Path(path), self.metrics())
        else:
            self._files.append(FileWriter(Path(path), self.metrics, every_s))

    def serve_metrics(self, port: int = 0, *, host: str = "127.0.0.1") -> Server:
        """Serve `metrics()` under http://host:port/metrics until the end of the block; 0 takes a free port.

        Only this machine can read it unless `host` says otherwise ("0.0.0.0": everybody who can reach it). Raises
        BadInput when the port is taken.
        """
        self._running()
        server = Server(self.metrics, port, host)
        self._cleanup.callback(server.close)
        return server

    @property
    def steps(self) -> int:
        """How often `step` was called."""
        return self._steps

    @property
    def report(self) -> Report:
        """What was measured; there once the `with` block has been left."""
        if self._report is None:
            raise RuntimeError("the report is there after the `with` block; inside it use sample()")
        return self._report

    def __enter__(self) -> Profiler:
        if self._thread is not None:
            raise RuntimeError("a profiler is used once; make a new one")
        if self._enforce:
            self._cleanup.enter_context(_gpu_limited_to(self.budget.gpu_bytes or 0))
        if self._report_path is not None:
            # what a kill of this process leaves
            self._journal = Journal(self._report_path, self._report_so_far)
        self._started = self._make_session(journal=self._journal)
        self._thread = threading.get_ident()
        before, self._before = self._before, []
        self._watch(before)
        self._session.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        self.stopped = isinstance(error, Stop)
        try:
            self._finish(error)
        except Exception as failure:
            if error is None or self.stopped:
                raise
            error.add_note(f"memopt: no report of this run: {type(failure).__name__}: {failure}")
        if error is None:
            with contextlib.suppress(Stop):  # there is nothing left to stop
                self._contract.settle()
        return self.stopped or None

    def _finish(self, error: BaseException | None) -> None:
        with contextlib.ExitStack() as last:
            for file in self._files:
                last.callback(file.close)
            with self._cleanup:
                measured = self._stop()
            self._report = self._finished(measured, error)
            if self._report_path is not None and self._journal is not None:
                try:
                    self._report.save(self._report_path)
                except BadInput:
                    self._journal.close(remove=False)
                    raise
                self._journal.close(remove=True)

    def _stop(self) -> Measured:
        self._close_phases()
        if self._torch is None:
            return self._session.stop()
        self._torch.attribution.look(force=True)
        try:
            return self._session.stop()
        finally:
            self._torch.close()

    def _finished(self, measured: Measured, error: BaseException | None) -> Report:
        peaks = {
            Tier.GPU: measured.gpu_peak_bytes,
            Tier.DRAM: measured.dram_peak_bytes,
            Tier.SSD: measured.ssd_peak_bytes,
        }
        for tier, peak in peaks.items():
            if tier not in self._contract.told:  # a peak between two boundaries
                self._contract.see(tier, peak, functools.partial(measured.at_peak.get, tier))
        notes = [*self._notes, *self._contract.told.values(), *(self._torch.notes() if self._torch is not None else ())]
        if self.budget.gpu_bytes is not None and measured.gpu_peak_bytes is None:
            notes.append("a gpu budget was given, but this process used no CUDA device")
        if self._journal is not None and self._journal.failed:
            notes.append(self._journal.failed)
        notes.extend(file.failed for file in self._files if file.failed)
        if error is not None and not self.stopped:
            notes.append(f"the program ended with {type(error).__name__}")
        return assemble(measured, Ledger(self.budget), _machine(), self._story(notes))

    def _report_so_far(self, measured: Measured) -> Report:
        notes = [*self._notes, *self._contract.told.values()]
        return assemble(measured, Ledger(self.budget), _machine(), self._story(notes))

    def _story(self, notes: list[str]) -> Story:
        return Story(command=sys.argv, results={"steps": self._steps} if self._steps else {}, notes=notes)

    def _watch(self, watched: Iterable[Any]) -> None:
        watch = self._torch
        if watched and watch is None:
            from memopt.profiler.torch_watch import TorchWatch  # here: not every program has torch

            memory = process_memory()
            watch = TorchWatch(
                charged_bytes=0 if memory is None else memory.charged_bytes,
                activations=self._activations,
                begin=self._auto_begin if self._auto else None,
                end=self._auto_end,
            )
        if watch is not None:
            for thing in watched:
                watch.watch(thing)
        self._torch = watch  # only now: a sample before would find nothing to attribute

    def _state(self) -> State:
        return State(
            budget=self.budget,
            categories=self.latest().categories,
            crossings=self._contract.crossings,
            phases=self._phases.names(),
            steps=self._steps,
            running=self._report is None,
        )

    def _attributed(self) -> Attributed:
        return {} if self._torch is None else self._torch.attribution()

    def _categories(self, tier: Tier, now_bytes: int) -> Mapping[Category, int]:
        by = dict(self._attributed().get(tier, {}))
        return {**by, Category.OTHER: now_bytes - sum(by.values())} if by else {}

    def _see(self, tier: Tier, now_bytes: int | None) -> None:
        self._contract.see(tier, now_bytes, lambda: self._categories(tier, now_bytes or 0))

    def _boundary(self) -> None:
        self._running()
        for tier in _AT_BOUNDARIES:
            if self.budget.bytes_of(tier) is not None:
                now = self._session.gpu_bytes() if tier is Tier.GPU else self._session.ssd_bytes()
                self._see(tier, now)
        if self._own_thread():
            self._contract.settle()

    def _auto_begin(self, name: str) -> None:
        if name != "backward":  # not in the middle of one
            self._boundary()
        if name == "forward" and self._torch is not None and self._own_thread():
            self._torch.forward_begins(self._grown)
        self._begin(name)

    def _auto_end(self, name: str) -> None:
        self._end(name)
        if self._steps == 0 and name == "optimizer":
            self._step_ended()
        elif self._steps == 0 and name == "backward" and self._torch is not None:
            self._torch.backward_ended()

    def _step_ended(self) -> None:
        if self._torch is not None and self._own_thread():
            self._torch.step_ended(self._grown)

    def _grown(self) -> bool:
        """Whether a tier is higher than it was at the end of any step so far."""
        now = {tier: self._session.peak_bytes(tier) or 0 for tier in (Tier.GPU, Tier.DRAM)}
        grown = any(nbytes > _GROWTH * self._peaks.get(tier, 0) for tier, nbytes in now.items())
        self._peaks = now
        return grown

    def _begin(self, name: str, *, by_hand: bool = False) -> None:
        if self._phases.begin(name, by_hand=by_hand) and self._torch is not None and name in _PASSES:
            self._torch.attribution.passing(+1)

    def _end(self, name: str, *, by_hand: bool = False) -> None:
        if self._phases.end(name, by_hand=by_hand) and self._torch is not None and name in _PASSES:
            self._torch.attribution.passing(-1)

    def _close_phases(self, *, found_only: bool = False) -> None:
        for name in self._phases.close(found_only=found_only):
            if self._torch is not None and name in _PASSES:
                self._torch.attribution.passing(-1)

    @property
    def _session(self) -> Session:
        if self._started is None:
            raise RuntimeError(_NOT_RUNNING)
        return self._started

    def _own_thread(self) -> bool:
        return threading.get_ident() == self._thread

    def _running(self) -> None:
        if self._thread is None or self._report is not None:
            raise RuntimeError(_NOT_RUNNING)


def _budget(given: Budget | str | None) -> Budget:
    if isinstance(given, Budget):
        return given
    text = given or ""
    return Budget.parse(text, Machine.capacities() if "%" in text else None)


def _machine() -> Machine:
    """What is known without importing torch or starting CUDA, where the program has not."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        return Machine.capacities()
    total, note = dram_capacity()
    return Machine(name=os.uname().nodename, cpu_count=os.cpu_count() or 1, dram_bytes=total, notes=(note,))


@contextlib.contextmanager
def _gpu_limited_to(nbytes: int) -> Iterator[None]:
    """torch's allocator refuses more than this on the current CUDA device. Raises BadInput without one."""
    import torch

    if not torch.cuda.is_available():
        raise BadInput("enforce=True needs a CUDA device, and torch finds none; leave enforce out, or the gpu budget")
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
