"""Run any command and report what it used of GPU, DRAM and SSD, against budgets where some are given."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

from memopt import cgroups
from memopt.errors import BadInput
from memopt.forecast_types import Forecast
from memopt.jobs import command as commands
from memopt.jobs.command import Command, Ended, guardian
from memopt.jobs.memory_group import join_command, limited_group
from memopt.jobs.profile_limits import Limits, find_limits
from memopt.ledger import Ledger
from memopt.profiler.assemble import Story, assemble
from memopt.profiler.journal import Journal
from memopt.profiler.measured import Measured
from memopt.profiler.render_grids import tiers_of
from memopt.profiler.session import Session
from memopt.report_types import ChildUse, Report
from memopt.units import format_bytes, format_s

OnOver = Literal["warn", "stop"]
EXIT_OVER, EXIT_BAD, EXIT_MISSED = 1, 2, 3
_GRACE_S = 10.0
SHORT_S = 1.0
"""Below this a report says that a sampled peak can be low."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What to run and what to hold it to. Sizes are bytes or text (`8GiB`, `80%`); None: no limit.

    `ssd_write`: what the command and all it starts may write to drives. `watch`: directories whose files are the SSD
    tier. `report`: where to save the report. `enforce`: the kernel holds the command to `dram` (it kills what does not
    fit). `on_over`: `warn` says so on stderr, `stop` ends the command too. `interval_s`: between samples; None: as
    `Session` sees fit. `plan`: a plan saved as JSON to compare with; `tolerance`: the share of the predicted bytes a
    measured peak may be off.
    """

    command: tuple[str, ...]
    dram: int | str | None = None
    gpu: int | str | None = None
    ssd: int | str | None = None
    ssd_write: int | str | None = None
    watch: tuple[str, ...] = ()
    report: str | None = None
    enforce: bool = False
    on_over: OnOver = "warn"
    interval_s: float | None = None
    plan: str | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not self.command:
            raise BadInput("no command: write it after --, like memopt profile -- python train.py")
        if self.interval_s is not None and not 0.001 <= self.interval_s <= 60:
            raise BadInput(f"--interval {self.interval_s:g}: write seconds from 0.001 to 60")
        if self.on_over not in ("warn", "stop"):
            raise BadInput(f"--on-over {self.on_over}: write warn or stop")
        if self.enforce and self.dram is None:
            raise BadInput("--enforce needs a budget to enforce: add --dram")
        if self.ssd is not None and not self.watch:
            raise BadInput("--ssd is about the files of directories: name them with --watch DIR")
        if self.tolerance is not None and self.plan is None:
            raise BadInput("--tolerance is about a prediction: name the plan with --plan FILE.json")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise BadInput(f"--tolerance {self.tolerance:g}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """The report, the exit code it amounts to, and sentences that a person must not miss."""

    report: Report
    exit_code: int
    messages: tuple[str, ...] = ()


def profile(config: ProfileConfig, say: Callable[[str], None] | None = None) -> Profiled:
    """Run the command to its end, and that of all it leaves behind. In the main thread.

    The exit code is the command's own when it failed, else 1 over budget (stopped included), 3 when a prediction missed
    by more than the tolerance, else 0. `say` is given what cannot wait until the end (default: lines on stderr).
    Raises BadInput before anything runs.
    """
    say = say or _say
    limits = find_limits(config.gpu, config.dram, config.ssd, config.ssd_write, config.watch)
    forecast = None if config.plan is None else Forecast.load(config.plan)
    commands.find(config.command[0])
    run = _Run(config, limits, forecast, say)
    with ExitStack() as stack:
        group = None
        if config.enforce and limits.budget.dram_bytes is not None:
            group = stack.enter_context(limited_group(limits.budget.dram_bytes))
        journal = None if config.report is None else Journal(config.report, run.report_so_far)
        try:
            measured, ended = run.watch(group, journal)
        except BaseException:
            if journal is not None:
                journal.close(remove=True)
            raise
    return run.finish(measured, ended, journal)


class _Run:
    """One command from start to report."""

    def __init__(
        self, config: ProfileConfig, limits: Limits, forecast: Forecast | None, say: Callable[[str], None]
    ) -> None:
        self.config = config
        self.limits = limits
        self.ledger = Ledger(limits.budget)
        self.say = say
        self.story = _story(config, limits, forecast)
        self.stopped_for: str | None = None
        self._warned: set[str] = set()
        self._machine_kills = cgroups.machine_kill_count()

    def report_so_far(self, measured: Measured) -> Report:
        """What the journal takes."""
        return assemble(measured, self.ledger, self.limits.machine, self.story)

    def watch(self, group: cgroups.Group | None, journal: Journal | None) -> tuple[Measured, Ended]:
        """Run the command under a session."""
        config = self.config
        with guardian() as start:
            session = Session(
                interval_s=config.interval_s,
                watch=config.watch,
                adopted=True,
                group=group,
                unified=self.limits.machine.unified,
                journal=journal,
            )
            with session:
                command = start(join_command(group, list(config.command)) if group else config.command)
                session.sample()
                waiting_told = False

                def look() -> None:
                    nonlocal waiting_told
                    self._look(session, command)
                    if not waiting_told and command.left_behind() and self.stopped_for is None:
                        waiting_told = True
                        self.say(
                            f"the command has ended, {command.left_behind()} process(es) it left behind still run; "
                            "measuring until they end (Ctrl-C: not waiting for them)"
                        )

                command.wait(look, session.retire)
                measured = session.stop()
            ended = command.collect()
        mark = max(measured.dram_upper_bound_bytes, ended.max_resident_bytes or 0)
        return replace(measured, dram_upper_bound_bytes=mark), ended

    def finish(self, measured: Measured, ended: Ended, journal: Journal | None) -> Profiled:
        """Put the report together and save it."""
        child = self._child(measured, ended)
        notes = [*self.story.notes, *self._notes(measured, journal)]
        story = replace(self.story, child=child, notes=notes)
        report = assemble(measured, self.ledger, self.limits.machine, story)
        if child.killed_for_memory or self.stopped_for:
            report = replace(report, verdict="over")
        messages = self._messages(report, child)
        missed = misses(report, self.config.tolerance)
        messages.extend(missed)
        report = replace(report, notes=[*report.notes, *messages])
        code = exit_code(report, missed=bool(missed), stopped=self.stopped_for is not None)
        if journal is not None and self.config.report is not None:
            try:
                report.save(self.config.report)
            except BadInput as error:
                journal.close(remove=False)
                messages.append(f"{error}; what was measured is in its journal")
                code = code or EXIT_BAD
            else:
                journal.close(remove=True)
        return Profiled(report=report, exit_code=code, messages=tuple(messages))

    def _look(self, session: Session, command: Command) -> None:
        """Hold what was sampled against the budgets."""
        budget, limits = self.limits.budget, self.limits
        self._hold("dram", session.dram_peak_bytes(), budget.dram_bytes, command)
        if not limits.machine.unified:
            self._hold("gpu", session.gpu_bytes(), budget.gpu_bytes, command)
        self._hold("ssd", session.ssd_bytes(), budget.ssd_bytes, command)
        if limits.write_bytes is not None:
            self._hold("ssd-write", session.write_bytes(), limits.write_bytes, command)

    def _hold(self, what: str, now_bytes: int | None, budget_bytes: int | None, command: Command) -> None:
        if budget_bytes is None or now_bytes is None or now_bytes <= budget_bytes or what in self._warned:
            return
        self._warned.add(what)
        over = f"over budget now: {what} {format_bytes(now_bytes)} of {format_bytes(budget_bytes)}"
        if self.config.on_over == "stop":
            self.stopped_for = self.stopped_for or over.replace(" now", "")
            command.stop(_GRACE_S)
            over += f"; stopping the command (SIGTERM, in {_GRACE_S:.0f} s SIGKILL)"
        self.say(over)

    def _child(self, measured: Measured, ended: Ended) -> ChildUse:
        evidence = None
        container = measured.container
        if container.oom_kills and (self.config.enforce or ended.exit_code != 0):
            evidence = f"{container.oom_kills_file}: oom_kill went up by {container.oom_kills}"
        elif ended.exit_code == 128 + signal.SIGKILL and self.stopped_for is None:
            before, now = self._machine_kills, cgroups.machine_kill_count()
            if before is not None and now is not None and now.count > before.count:
                evidence = f"{now.file}: oom_kill of the whole machine went up by {now.count - before.count}"
        return ChildUse(
            exit_code=ended.exit_code,
            signal=ended.signal,
            killed_for_memory=evidence is not None,
            evidence=evidence,
        )

    def _messages(self, report: Report, child: ChildUse) -> list[str]:
        messages = overs(report)
        if self.stopped_for:
            messages.append(f"the command was stopped: {self.stopped_for}")
        if child.killed_for_memory:
            limit = report.tiers.dram.limit_bytes
            limited = f"; its limit was {format_bytes(limit)}" if limit is not None else ""
            messages.append(f"the kernel killed the job for memory ({child.evidence}){limited}")
        elif child.exit_code == 128 + signal.SIGKILL and self.stopped_for is None:
            messages.append("the command was killed (SIGKILL), and no counter of the kernel says it was for memory")
        return messages

    def _notes(self, measured: Measured, journal: Journal | None) -> list[str]:
        notes = []
        if measured.wall_s < SHORT_S:
            notes.append(
                f"the command lasted {format_s(measured.wall_s)}: a sampled peak can be low, the kernel's mark cannot"
            )
        if self.limits.budget.gpu_bytes is not None and measured.gpu_peak_bytes is None:
            notes.append("--gpu was given, and the job was not seen on any GPU (no NVML, or none was used)")
        if journal is not None and journal.failed:
            notes.append(journal.failed)
        return notes


def overs(report: Report) -> list[str]:
    """A sentence for each budget that was passed."""
    found = [
        f"over budget: {name} peak {format_bytes(use.peak_bytes or 0)} of {format_bytes(use.budget_bytes or 0)}"
        for name, use in tiers_of(report)
        if use.within is False
    ]
    ssd = report.tiers.ssd
    if ssd is not None and ssd.write_budget_bytes is not None:
        written = ssd.process_write_bytes or 0
        if written > ssd.write_budget_bytes:
            found.append(f"over budget: {format_bytes(written)} written of {format_bytes(ssd.write_budget_bytes)}")
    return found


def exit_code(report: Report, *, missed: bool, stopped: bool) -> int:
    """What `memopt profile` leaves with."""
    child = report.child
    if child is not None and child.exit_code != 0 and not stopped:
        return child.exit_code
    if report.verdict == "over":
        return EXIT_OVER
    return EXIT_MISSED if missed else 0


def misses(report: Report, tolerance: float | None) -> list[str]:
    """A sentence for each tier whose measured peak is off its prediction by more than `tolerance` of it."""
    if tolerance is None:
        return []
    found = []
    for name, use in tiers_of(report):
        if not use.predicted_bytes or use.peak_bytes is None:
            continue
        error = use.peak_bytes / use.predicted_bytes - 1
        if abs(error) > tolerance:
            found.append(
                f"the prediction missed: {name} {format_bytes(use.peak_bytes)} measured, "
                f"{format_bytes(use.predicted_bytes)} predicted ({error:+.1%}, tolerance {tolerance:.1%})"
            )
    return found


def _story(config: ProfileConfig, limits: Limits, forecast: Forecast | None) -> Story:
    settings: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    writes = None
    if forecast is not None and forecast.steps:
        writes = forecast.ssd_write_per_step_bytes * forecast.steps
    return Story(
        command=config.command,
        predicted={} if forecast is None else forecast.predicted(),
        predicted_write_bytes=writes,
        write_budget_bytes=limits.write_bytes,
        config={**settings, "directory": os.getcwd()},
        reasons=() if forecast is None else forecast.reasons,
    )


def _say(text: str) -> None:
    print(f"memopt: {text}", file=sys.stderr, flush=True)
