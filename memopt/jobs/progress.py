"""What a person sees of a run while it runs: a bar on a terminal, lines elsewhere, JSON lines in a file."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich import progress as bars
from rich.console import Console

from memopt.budget import Budget
from memopt.errors import BadInput, StoreError
from memopt.tiers import Tier
from memopt.units import format_bytes, format_per_s, format_s

# Away from a terminal: every step of the first few, then at most one line in this many seconds.
_FIRST_LINES = 3
_LINE_EVERY_S = 10.0
_RATE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as it goes to the screen and to the log file. `step` counts from 1: steps done so far."""

    step: int
    loss: float
    lr: float
    grad_norm: float | None = None
    tokens: int = 0
    step_s: float = 0.0
    waited_s: float = 0.0
    dram_bytes: int | None = None
    gpu_bytes: int | None = None
    ssd_bytes: int | None = None
    ssd_read_bytes: int = 0
    ssd_write_bytes: int = 0
    io_busy_s: float = 0.0
    saved_step: int | None = None
    eval_loss: float | None = None


class Work:
    """A long piece of work that is not steps: bytes done out of `total_bytes` (None when unknown)."""

    def __init__(self, bar: bars.Progress | None, task: bars.TaskID | None) -> None:
        self._bar = bar
        self._task = task
        self.done_bytes = 0

    def advance(self, nbytes: int) -> None:
        """`nbytes` more are done."""
        self.done_bytes += nbytes
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=nbytes, detail=format_bytes(self.done_bytes))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Say no more, where rich would end the program."""
        self.quiet = True


class Progress:
    """Shows steps, notes and other work as they happen; also the writer of `--log-file`.

    `total_steps` may be set later, as long as it is before the first `update`. `first_step` is what was done before
    (a resumed run). `file` and `terminal` are for tests. Raises BadInput when the log file cannot be written.
    """

    def __init__(
        self,
        total_steps: int = 0,
        quiet: bool = False,
        log_file: str | Path | None = None,
        budget: Budget | None = None,
        *,
        first_step: int = 0,
        file: TextIO | None = None,
        terminal: bool | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.first_step = first_step
        self._quiet = quiet
        self._budget = budget or Budget()
        self._console = _Console(file=file or sys.stderr, force_terminal=terminal, soft_wrap=True, highlight=False)
        self._bar: bars.Progress | None = None
        self._steps_task: bars.TaskID | None = None
        self._recent: deque[StepRecord] = deque(maxlen=_RATE_STEPS)
        self._last_line_s = -math.inf
        self._shown = 0
        self._log = _open_log(log_file) if log_file is not None else None

    def __enter__(self) -> Progress:
        if not self._quiet and self._console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(bar_width=20),
                bars.TextColumn("{task.fields[detail]}"),
                bars.TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def update(self, record: StepRecord) -> None:
        """A step is done: show it, and append it to the log file."""
        self.log(asdict(record))
        self._recent.append(record)
        if self._quiet:
            return
        text = self._describe(record)
        if self._bar is not None:
            if self._steps_task is None:
                self._steps_task = self._bar.add_task(
                    "training", total=self.total_steps or None, completed=self.first_step, detail=""
                )
            self._bar.update(self._steps_task, completed=record.step, detail=text)
            return
        self._shown += 1
        now = time.monotonic()
        is_last = record.step == self.total_steps
        if self._shown <= _FIRST_LINES or is_last or now - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = now
            self._print(text + self._remaining(record))

    def silence(self) -> None:
        """Show no more: there is nobody to look at it."""
        self._quiet = True

    def note(self, text: str) -> None:
        """A sentence worth reading now: a choice and its reason, a warning, a saved step."""
        if not self._quiet:
            self._print(text)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one JSON line to the log file, if there is one; it is on its way to disk when this returns.

        NaN and Inf, which JSON has no numbers for, become null. Raises StoreError when the disk refuses.
        """
        if self._log is None:
            return
        plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        try:
            line = (json.dumps(plain) + "\n").encode()
            while line:
                line = line[self._log.write(line) :]
        except OSError as error:
            raise StoreError(
                f"log_file {self._log.name}: cannot be written ({error.strerror}); free some space, or name another, "
                "and go on with --resume"
            ) from error

    @contextmanager
    def work(self, description: str, total_bytes: int | None = None) -> Iterator[Work]:
        """Show a long piece of other work (loading, tokenising, exporting) while the block runs."""
        if self._bar is not None:
            task = self._bar.add_task(description, total=total_bytes, detail="")
            try:
                yield Work(self._bar, task)
            finally:
                self._bar.remove_task(task)
            return
        began_s = time.monotonic()
        work = Work(None, None)
        yield work
        done = f", {format_bytes(work.done_bytes)}" if work.done_bytes else ""
        self.note(f"{description}: {format_s(time.monotonic() - began_s)}{done}")

    def _print(self, text: str) -> None:
        # a terminal that was closed, a pipe whose reader left: no reason to stop training
        with contextlib.suppress(OSError):
            (self._bar.console if self._bar is not None else self._console).print(text, markup=False)

    def _describe(self, record: StepRecord) -> str:
        seconds = sum(each.step_s for each in self._recent)
        parts = [f"step {record.step}/{self.total_steps or '?'}", f"loss {record.loss:.4f}"]
        if record.eval_loss is not None:
            parts.append(f"eval {record.eval_loss:.4f}")
        if seconds > 0:
            parts.append(f"{sum(each.tokens for each in self._recent) / seconds:,.0f} tokens/s")
        used = {Tier.GPU: record.gpu_bytes, Tier.DRAM: record.dram_bytes, Tier.SSD: record.ssd_bytes}
        for tier, nbytes in used.items():
            if nbytes is not None:
                budget = self._budget.bytes_of(tier)
                allowed = f" of {format_bytes(budget)}" if budget is not None else ""
                parts.append(f"{tier.value} {format_bytes(nbytes)}{allowed}")
        moved = sum(each.ssd_read_bytes + each.ssd_write_bytes for each in self._recent)
        if moved and seconds > 0:
            parts.append(f"ssd {format_per_s(moved / seconds)}")
        return " · ".join(parts)

    def _remaining(self, record: StepRecord) -> str:
        left = self.total_steps - record.step
        if left <= 0 or not self._recent:
            return ""
        return f" · {format_s(left * sum(each.step_s for each in self._recent) / len(self._recent))} left"


def _open_log(path: str | Path) -> FileIO:
    """Open for appending, on a fresh line even when a crash cut the last one short."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(path, "a")  # unbuffered: closed by the owner's __exit__ without anything left to write
        if file.tell() and not _ends_a_line(path):
            file.write(b"\n")
    except OSError as error:
        raise BadInput(f"log_file {path}: cannot be written ({error.strerror}); name another file") from None
    return file


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
