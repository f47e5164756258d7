"""`memopt.ProfilerCallback`: any Hugging Face Trainer (transformers 5.16 and later, trl's too) measured and reported.

Uses the Trainer's callbacks, and hooks of the model and the optimizer, which go away when training ends.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from memopt.budget import Budget
from memopt.errors import BadInput, OverBudget
from memopt.patches.hf_callback import LoggingCallback
from memopt.profiler.over import OnOver
from memopt.profiler.program import Profiler
from memopt.report_types import Report
from memopt.tiers import Category, Tier

_CUT_SHORT = "training ended without the Trainer saying so (an error, or an interruption)"


class ProfilerCallback(LoggingCallback):
    """Measures from the beginning of training to its end; every call of `train` is a run of its own.

    Logs `memopt/dram_bytes`, `memopt/dram_peak_bytes`, `memopt/dram/weights_bytes` and the like with each training
    loss. Phases: forward, backward and optimizer as they are called, evaluate, save. `budget`: a Budget or text like
    `dram=8GiB,gpu=20GiB`; when it is passed, `on_over="warn"` warns once, `"raise"` raises OverBudget at the end of the
    step, `"stop"` ends training there as if it were done. `report`: the file the report is written to (with `-rank1`
    and so on in its name for other processes than the first).

    A Trainer tells its callbacks nothing of an exception. What was measured is then reported by `close()` (or by
    leaving `with callback:`), when the next run begins, when the callback is garbage, or when the interpreter ends.
    """

    def __init__(
        self,
        *,
        budget: Budget | str | None = None,
        report: str | Path | None = None,
        on_over: OnOver = "warn",
        watch_dirs: Iterable[str | Path] = (),
        interval_s: float | None = None,
        activations: bool = True,
    ) -> None:
        if on_over not in get_args(OnOver):
            raise BadInput(f"on_over {on_over!r} is not one of {', '.join(get_args(OnOver))}")
        self._path = None if report is None else Path(report)
        self._on_over = on_over
        self._watch_dirs = list(watch_dirs)
        self._options: dict[str, Any] = {"budget": budget, "interval_s": interval_s, "activations": activations}
        self._make(self._path)  # bad input is told now, not when training begins
        self._over: OverBudget | None = None
        self._phase: AbstractContextManager[None] | None = None
        self._report: Report | None = None
        self.profiler: Profiler | None = None
        """The one that is measuring; None between runs."""

    @property
    def report(self) -> Report:
        """The report of the last run."""
        if self._report is None:
            raise RuntimeError("no run has ended yet; the report is there after train(), or after close()")
        return self._report

    def attach(self, trainer: Trainer) -> Callable[[], None]:
        """Add to a Trainer ahead of what prints and reports, so that TensorBoard and the like get the numbers too.

        (`trainer.add_callback` puts a callback last: the numbers are then in the history only.) Returns the undo.
        """
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        flow = [index for index, found in enumerate(callbacks) if isinstance(found, DefaultFlowCallback)]
        # after the one that decides what a step ends with
        callbacks.insert(flow[0] + 1 if flow else 0, callbacks.pop())

        def undo() -> None:
            self.close()
            if self in trainer.callback_handler.callbacks:
                trainer.remove_callback(self)

        return undo

    def close(self) -> None:
        """End a run that the Trainer has left without saying so, and report it. Otherwise does nothing."""
        if self.profiler is not None:
            self.profiler.note(_CUT_SHORT)
            self._finish()

    def __enter__(self) -> ProfilerCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "profiler", None) is not None:
            self.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Model and optimizer are in their final form now."""
        self.close()
        self._over = None
        path = self._path
        if path is not None and args.process_index > 0:
            path = path.with_name(f"{path.stem}-rank{args.process_index}{path.suffix}")
        profiler = self._make(path)
        profiler.watch(*(thing for thing in (model, optimizer) if thing is not None))
        self.profiler = profiler.__enter__()
        atexit.register(_close_if_there, weakref.ref(self))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What came after the last step is over."""
        self._end_phase()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Act on the budget; then comes evaluating and saving, if at all."""
        if self.profiler is None:
            return
        self.profiler.step()
        if self._over is not None and self._on_over == "raise":
            over, self._over = self._over, None
            self._finish()
            raise over
        if self._over is not None and self._on_over == "stop":
            control.should_training_stop = True
        self._next_phase(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluating and saving come after an epoch too."""
        self._next_phase(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saving comes after evaluating."""
        self._end_phase()
        if self.profiler is not None and control.should_save:
            self._begin_phase("save")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint has been written."""
        self._end_phase()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the report, and take the hooks away."""
        if self.profiler is not None:
            self._finish()

    def numbers(self) -> dict[str, int]:
        """What is logged: bytes now by tier and category, peaks and budgets."""
        if self.profiler is None:
            return {}
        now = self.profiler.sample()
        found: dict[str, int] = {}
        for tier in Tier:
            nbytes = now.bytes_of(tier)
            if nbytes is None:
                continue
            found[f"memopt/{tier}_bytes"] = nbytes
            found[f"memopt/{tier}_peak_bytes"] = self.profiler.peak_bytes(tier) or nbytes
            budget = self.profiler.budget.bytes_of(tier)
            if budget is not None:
                found[f"memopt/{tier}_budget_bytes"] = budget
            held = now.categories.get(tier, {})
            found.update(
                (f"memopt/{tier}/{category}_bytes", held[category]) for category in Category if held.get(category)
            )
        return found

    def _make(self, path: Path | None) -> Profiler:
        on_over = self._on_over if self._on_over == "warn" else self._passed
        return Profiler(report=path, on_over=on_over, watch_dirs=self._watch_dirs, **self._options)

    def _passed(self, error: OverBudget) -> None:
        # an exception in the middle of a step would leave the Trainer without the report; it waits for the end of it
        self._over = error

    def _next_phase(self, control: TrainerControl) -> None:
        self._end_phase()
        if control.should_evaluate:
            self._begin_phase("evaluate")
        elif control.should_save:
            self._begin_phase("save")

    def _begin_phase(self, name: str) -> None:
        if self.profiler is not None:
            self._phase = self.profiler.phase(name)
            self._phase.__enter__()

    def _end_phase(self) -> None:
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.__exit__(None, None, None)

    def _finish(self) -> None:
        profiler = self.profiler
        assert profiler is not None
        try:
            self._end_phase()
        finally:
            self.profiler = None
            profiler.__exit__(None, None, None)
            self._report = profiler.report


def _close_if_there(reference: weakref.ref[ProfilerCallback]) -> None:
    callback = reference()
    if callback is not None:
        callback.close()
