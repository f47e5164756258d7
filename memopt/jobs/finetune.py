"""Fine-tune a model inside a memory budget: plan, load, train, save, export, report."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memopt.errors import BadInput, Interrupted, OverBudget, StoreError
from memopt.jobs.config import FinetuneConfig
from memopt.jobs.interrupts import Stop, interruptible
from memopt.jobs.limits import find_limits
from memopt.jobs.opened_model import write_model
from memopt.jobs.output_dir import check_file, check_output, replace_output, require_space
from memopt.jobs.preparation import Prepared, prepare_job
from memopt.jobs.progress import Progress, StepRecord
from memopt.jobs.resume import claimed, refuse_or_resume, require_same_run
from memopt.jobs.run_dir import RunDirectory
from memopt.jobs.schedule import lr_at
from memopt.jobs.steps import PackedSteps
from memopt.ledger import Ledger
from memopt.offload.engine import Engine, EngineSettings
from memopt.offload.engine import Progress as Done
from memopt.offload.gradients import held_units
from memopt.offload.layout import Layout
from memopt.offload.model import Batch
from memopt.offload.storage import create_scratch, create_state, fill_state, scratch_specs
from memopt.plan_types import Plan
from memopt.profiler.assemble import IoTotals, Story, assemble
from memopt.profiler.session import Session
from memopt.report_types import Report
from memopt.store.block_store import BlockStore
from memopt.store.transfer import IoPool
from memopt.tiers import Category, Tier
from memopt.units import format_bytes


def finetune(config: FinetuneConfig, batches: Iterable[Sequence[Batch]] | None = None) -> Report:
    """Run the job that `config` describes and return its report.

    `batches`: optimizer steps, each a list of micro-batches (dicts of `input_ids`, `labels` and whatever else the
    model's forward takes, (B, S) int64), used as they are instead of `data`.
    Raises BadInput, Infeasible (before anything is allocated), OverBudget, NonFinite, StoreError, and Interrupted
    (after a save).
    """
    if config.data is None and batches is None and config.model != "demo":
        raise BadInput("no data: give `data`, or `batches`")
    directory = RunDirectory(Path(config.offload_dir)) if config.offload_dir else None
    _check_places(config, directory)
    notes = directory.look() if directory else []
    with interruptible(directory), ExitStack() as stack:
        if directory is not None and not config.dry_run:
            stack.enter_context(claimed(directory, config))
        if config.report is not None:  # only now: it may lie in the directory
            check_file(Path(config.report), "--report")
        saved = refuse_or_resume(config, directory, notes)
        watch = [directory.path] if directory else []
        over = threading.Event()
        limits = find_limits(config, directory.path if directory else None)
        ledger = Ledger(limits.budget)
        session = Session(
            watch=watch,
            limit_bytes=limits.budget.dram_bytes,
            on_over=lambda now, limit: over.set(),
            attribution=lambda: {tier: ledger.charged_by(tier) for tier in Tier},
            attributed_by="ledger",
        )
        stack.enter_context(session)
        log_file = None if config.dry_run else config.log_file
        progress = stack.enter_context(Progress(quiet=config.quiet, log_file=log_file, budget=limits.budget))
        stop = stack.enter_context(Stop(progress).listening())
        if directory is not None and not config.dry_run:
            work = directory.path
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memopt-")))
        with session.phase("prepare"):
            prepared = prepare_job(config, limits, batches, progress, work)
            for steps in (prepared.steps, prepared.eval_steps):
                if isinstance(steps, PackedSteps):
                    stack.callback(steps.dataset.close)
            kept = saved["plan"] if saved else None
            prepared, plan = prepared.settle_plan(directory is not None, kept)
        run = _Run(prepared, plan, directory, ledger, session, progress, stop, over, [*notes, *prepared.notes], saved)
        stack.callback(run.pool.close)
        run.tell_plan()
        if config.dry_run:
            return run.report(0, {"dry_run": True})
        return run.train()


def _check_places(config: FinetuneConfig, directory: RunDirectory | None) -> None:
    """Raises BadInput for files and directories that would be in each other's way."""
    sources = {"--model": config.model, "--data": config.data, "--eval-data": config.eval_data}
    keep = {flag: Path(name) for flag, name in sources.items() if name and os.path.exists(name)}
    if directory is not None:
        keep["--offload-dir"] = directory.path
    if config.output is not None:
        check_output(Path(config.output), overwrite=config.overwrite, keep=keep)
    places = {"--output": config.output, "--report": config.report, "--log-file": config.log_file}
    for flag, name in places.items():
        if name is not None and directory is not None:
            directory.refuse_own(Path(name), flag)


@dataclass
class _Run:
    """One training, from plan to report."""

    prepared: Prepared
    plan: Plan
    directory: RunDirectory | None
    ledger: Ledger
    session: Session
    progress: Progress
    stop: Stop
    over: threading.Event
    notes: list[str]
    saved: dict[str, Any] | None
    losses: list[float] = field(default_factory=list)
    eval_losses: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.config = self.prepared.config
        self.layout: Layout = self.prepared.model.layout(self.plan.tile_rows)
        predicted = self.plan.predicted[Tier.DRAM].by_category
        self.ledger.charge(Tier.DRAM, Category.RUNTIME, predicted[Category.RUNTIME], "interpreter and libraries")
        self.pool = IoPool(self.plan.io_workers)
        self.step_times: list[float] = []
        self.engine_waited_s = 0.0

    def tell_plan(self) -> None:
        """Show the plan and why it is so."""
        for reason in (*self.notes, *self.plan.reasons):
            self.progress.note(reason)

    def train(self) -> Report:
        """Load, train, save, export; the report."""
        config, steps = self.config, self.prepared.steps
        with ExitStack() as stack:
            stack.enter_context(_threads(self.plan.compute_threads))
            store, scratch = self._stores(stack)
            engine = stack.enter_context(self._engine(store, scratch))
            start = engine.progress.step
            self.progress.total_steps, self.progress.first_step = steps.total, start
            with self.stop.finishing():
                with self.session.phase("train"):
                    if self.prepared.eval_steps is not None and start == 0:
                        self._evaluate(engine)
                    for step in range(start, steps.total):
                        if self._stopping:
                            break
                        self._step(engine, step)
                    else:
                        if self.prepared.eval_steps is not None and (
                            config.eval_every is None or steps.total % config.eval_every
                        ):
                            self._evaluate(engine)
                with self.session.phase("save"):
                    engine.save() if self.directory is not None else engine.flush()
            self.engine_waited_s = engine.waited_s
            self._stop_if_asked(engine)
            if config.output is not None:
                with self.session.phase("export"):
                    self._export(engine, Path(config.output))
            return self.report(engine.progress.step, {})

    def report(self, steps_done: int, more: dict[str, Any]) -> Report:
        """Assemble the report, and save it where asked."""
        measured = self.session.stop()
        config = self.config
        results: dict[str, Any] = {
            "steps": steps_done,
            "tokens": self.tokens,
            "losses": self.losses,
            "final_loss": self.losses[-1] if self.losses else None,
            "eval_losses": self.eval_losses,
            "skipped_steps": self.skipped,
            "parameters": self.layout.params,
            "frozen_parameters": self.layout.frozen_params,
            "training_state_bytes": training_state_bytes(self.layout),
            "step_s_median": sorted(self.step_times)[len(self.step_times) // 2] if self.step_times else None,
            "output": config.output,
            "plan": self.plan.to_dict(),
            **more,
        }
        story = Story(
            command=["memopt", "finetune"],
            predicted=self.plan.predicted,
            predicted_write_bytes=self.plan.ssd_write_total_bytes,
            results=results,
            config=config.to_dict(),
            reasons=self.plan.reasons,
            notes=self.notes,
        )
        io = IoTotals(
            read_bytes=self.pool.read_bytes,
            write_bytes=self.pool.written_bytes,
            busy_s=self.pool.busy_s,
            waited_s=self.engine_waited_s,
        )
        report = assemble(measured, self.ledger, self.prepared.limits.machine, story, io if self.directory else None)
        if config.report:
            report.save(config.report)
        return report

    def _stores(self, stack: ExitStack) -> tuple[BlockStore | None, BlockStore | None]:
        if self.directory is None:
            self._check_output_space()
            return None, None
        prepared, plan = self.prepared, self.plan
        identity = prepared.identity(self.layout)
        if self.saved is not None:
            require_same_run(self.directory, self.saved, identity)
            store = stack.enter_context(BlockStore.open(self.directory.state, self.pool))
            self.progress.note(f"resuming after step {store.meta['step']} of {prepared.steps.total}")
        else:
            self.directory.remember(self.config.to_dict())
            store = stack.enter_context(create_state(self.directory.state, self.layout, self.pool, {}))
        if not store.direct:
            self.notes.append(f"the page cache is used: {store.why_not_direct}")
        specs = scratch_specs(
            self.layout,
            plan,
            held_units(self.layout, clips=self.config.max_grad_norm > 0),
            tokens=prepared.max_tokens,
            width=prepared.costs.width,
            dtype=prepared.limits.compute.dtype,
        )
        self.directory.forget(self.directory.scratch)
        scratch = create_scratch(self.directory.scratch, specs, self.pool)
        if scratch is not None:
            stack.callback(BlockStore.destroy, self.directory.scratch)
            stack.enter_context(scratch)
        self._check_output_space()
        if self.saved is None:  # all space is reserved by now: a full disk is known before the long part
            total = sum(u.master_bytes + u.frozen_bytes for u in self.layout.units)
            with self.session.phase("load"), self.progress.work("loading the model", total) as work:
                fill_state(store, self.layout, prepared.model.read, self._meta(identity, 0, 0), work.advance)
        return store, scratch

    def _engine(self, store: BlockStore | None, scratch: BlockStore | None) -> Engine:
        prepared = self.prepared
        settings = EngineSettings(
            device=prepared.limits.compute.device,
            compute_dtype=prepared.limits.compute.dtype,
            clip_norm=self.config.max_grad_norm,
            seed=self.config.seed,
            width=prepared.costs.width,
            max_tokens=prepared.max_tokens,
            skip_nonfinite=self.config.skip_nonfinite,
        )
        meta = store.meta if store is not None else {}
        return Engine(
            prepared.model.layered,
            self.layout,
            self.plan,
            store,
            scratch,
            self.ledger,
            settings,
            initial=prepared.model.read,
            progress=Done(int(meta.get("step", 0)), int(meta.get("updates", 0))),
            about=self._meta(prepared.identity(self.layout), 0, 0),
        )

    def _meta(self, identity: dict[str, Any], step: int, updates: int) -> dict[str, Any]:
        plan = {**self.plan.numerics(), "batch_size": self.prepared.micro_size()}
        return {**identity, "plan": plan, "step": step, "updates": updates}

    def _step(self, engine: Engine, step: int) -> None:
        config, steps = self.config, self.prepared.steps
        began, waited = time.perf_counter(), engine.waited_s
        read, written, busy = self.pool.read_bytes, self.pool.written_bytes, self.pool.busy_s
        lr = lr_at(step, steps.total, lr=config.lr, schedule=config.schedule, warmup_steps=config.warmup_steps)
        save = self.directory is not None and (step + 1) % self.plan.save_every == 0
        result = engine.step(steps.batch(step), lr=lr, save=save)
        self.step_times.append(time.perf_counter() - began)
        self.losses.append(result.loss)
        self.tokens += result.target_tokens
        self.skipped += result.skipped
        eval_loss = None
        if config.eval_every is not None and (step + 1) % config.eval_every == 0:
            eval_loss = self._evaluate(engine)
        self.progress.update(
            StepRecord(
                step=step + 1,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                tokens=result.target_tokens,
                step_s=self.step_times[-1],
                waited_s=engine.waited_s - waited,
                dram_bytes=self.session.dram_bytes(),
                gpu_bytes=self.session.gpu_bytes(),
                ssd_bytes=self.session.ssd_bytes(),
                ssd_read_bytes=self.pool.read_bytes - read,
                ssd_write_bytes=self.pool.written_bytes - written,
                io_busy_s=self.pool.busy_s - busy,
                saved_step=engine.saved_step if self.directory else None,
                eval_loss=eval_loss,
            )
        )

    @property
    def _stopping(self) -> bool:
        return self.stop.asked or self.over.is_set()

    def _evaluate(self, engine: Engine) -> float | None:
        """The held-out loss; None when it was broken off to stop."""
        held_out = self.prepared.eval_steps
        assert held_out is not None
        total = count = 0.0
        for step in range(held_out.total):
            if self._stopping:
                return None
            loss, tokens = engine.evaluate(held_out.batch(step))
            total, count = total + loss * tokens, count + tokens
        loss = total / count
        self.eval_losses.append([engine.progress.step, loss])
        self.progress.note(f"held-out loss after step {engine.progress.step}: {loss:.4f}")
        return loss

    def _check_output_space(self) -> None:
        """Raises StoreFull while there is nothing to lose."""
        if self.config.output is not None:
            require_space(Path(self.config.output), self.prepared.model.output_bytes)

    def _where(self, engine: Engine) -> str:
        if self.directory is None:
            return "there is no --offload-dir, so nothing was saved"
        return f"the state after step {engine.progress.step} is saved in {self.directory.path}; go on with --resume"

    def _stop_if_asked(self, engine: Engine) -> None:
        where = self._where(engine)
        if self.stop.asked:
            self.report(engine.progress.step, {"interrupted": True})
            raise Interrupted(f"interrupted; {where}")
        if self.over.is_set():
            report = self.report(engine.progress.step, {"stopped": "over budget"})
            peak, budget = report.tiers.dram.peak_bytes or 0, report.tiers.dram.budget_bytes or 0
            raise OverBudget(
                f"the process used {format_bytes(peak)} of DRAM, over the budget of "
                f"{format_bytes(budget)}; stopped: {where}, "
                "with a larger --dram",
                tier=Tier.DRAM,
                wanted_bytes=peak,
                free_bytes=0,
                budget_bytes=budget,
                holders=tuple(self.ledger.holders(Tier.DRAM)),
            )

    def _export(self, engine: Engine, output: Path) -> None:
        try:
            with replace_output(output, overwrite=self.config.overwrite) as place:
                write_model(
                    self.prepared.model, self.layout, place, lambda name: engine.parameters([name])[name], self.progress
                )
        except (OSError, StoreError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise StoreError(f"--output {output} could not be written ({what}); {self._where(engine)}") from error


def training_state_bytes(layout: Layout) -> int:
    """Weights, gradients and optimizer state, frozen weights included: what would have to be in memory."""
    return sum(2 * u.master_bytes + u.record_bytes + u.frozen_bytes for u in layout.units)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
