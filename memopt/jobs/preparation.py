"""From a configuration to a plan: model, data, costs, budget. Nothing of the job's own memory is allocated yet."""

from __future__ import annotations

import functools
import gc
import inspect
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memopt.errors import BadInput
from memopt.jobs.config import FinetuneConfig
from memopt.jobs.data import BatchOrder, TokenDataset, prepare
from memopt.jobs.data_sources import source_bytes
from memopt.jobs.limits import Limits
from memopt.jobs.model_costs import ModelCosts, model_costs
from memopt.jobs.model_layout import layout_digest
from memopt.jobs.opened_model import OpenedModel, open_model
from memopt.jobs.progress import Progress
from memopt.jobs.rules import Rules
from memopt.jobs.steps import GivenSteps, PackedSteps, Steps
from memopt.offload.costs import JobSizes
from memopt.offload.heap import settle_heap, trim_heap
from memopt.offload.layout import Layout
from memopt.offload.model import Batch
from memopt.patches.hf_checkpoint import load_config
from memopt.plan_types import Infeasible, Plan
from memopt.planning.finetune import FinetuneJob, plan_finetune
from memopt.profiler.samplers import process_memory
from memopt.units import MiB

RUNTIME_GROWTH_BYTES = 48 * MiB
"""What the process takes beyond what is planned: thread stacks, matrix-product workspaces, the allocator's free lists.
Measured on 7M to 400M parameter models: 20 to 50 MiB, in part out of what a plan sets aside for other things."""
_RUNTIME_STEP_BYTES = 16 * MiB


def planned_runtime(charged_bytes: int) -> int:
    """What a plan sets aside for the process itself, in bytes, from what it has charged before the job allocates.

    In whole steps: two processes that differ by a library's MiB or two then mostly make the same plan, which is what
    `memopt plan` predicts, and a smallest budget that was stated is mostly enough for the process that gets it.
    """
    return -(-(charged_bytes + RUNTIME_GROWTH_BYTES) // _RUNTIME_STEP_BYTES) * _RUNTIME_STEP_BYTES


def update_threads(rules: Rules, *, on_gpu: bool) -> int:
    """Threads of the optimizer: one keeps up with element-wise updates beside a CPU's computation; Newton-Schulz takes
    more work than a step of few tokens."""
    alone = not on_gpu and not any(rule.whole for rule in rules.of.values())
    return 1 if alone else torch.get_num_threads()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that is known before memory is taken."""

    config: FinetuneConfig
    model: OpenedModel
    steps: Steps
    eval_steps: PackedSteps | None
    tokenizer: Any
    limits: Limits
    costs: ModelCosts
    notes: tuple[str, ...]

    def settle_plan(self, offload: bool, kept: dict[str, Any] | None) -> tuple[Prepared, Plan]:
        """Plan; with `--batch-size auto` the micro-batch is the largest divisor of the step that fits."""
        if self.config.batch_size != "auto":
            return self, plan_finetune(self._job(offload, kept), self.limits.budget, self.limits.machine)
        assert isinstance(self.steps, PackedSteps)
        sequences = self.config.grad_accum
        sizes = [b for b in range(sequences, 0, -1) if sequences % b == 0]
        if kept is not None:
            sizes = [int(kept["batch_size"])]
        for size in sizes:
            order = replace(self.steps.order, batch_size=size, grad_accum=sequences // size)
            steps = PackedSteps(self.steps.dataset, order, self.steps.packed_positions)
            costs = model_costs(
                self.model.layered, self.model.layout(10**9), steps.largest(), self.limits.compute.dtype
            )
            tried = replace(self, steps=steps, costs=costs)
            try:
                return tried, plan_finetune(tried._job(offload, kept), self.limits.budget, self.limits.machine)
            except Infeasible:
                if size == sizes[-1]:
                    raise
        raise AssertionError("unreachable")

    @property
    def max_tokens(self) -> int:
        """Tokens that are in the model at once: of the largest step, or evaluation."""
        return max(steps.max_tokens for steps in (self.steps, self.eval_steps) if steps is not None)

    def micro_size(self) -> int:
        """Sequences per micro-batch."""
        return int(self.steps.largest()["input_ids"].shape[0])

    def identity(self, layout: Layout) -> dict[str, Any]:
        """What a resumed run must share with the one that was interrupted."""
        return {
            "fingerprint": self.config.fingerprint(),
            "data": self.steps.identity(),
            "steps": self.steps.total,
            "layout": layout_digest(layout),
            "compute": [self.limits.compute.device.type, str(self.limits.compute.dtype)],
        }

    def _job(self, offload: bool, kept: dict[str, Any] | None) -> FinetuneJob:
        gc.collect()
        trim_heap()
        memory = process_memory()
        rows, width = self.model.table_shape
        micro_batches = max(1, self.max_tokens // self.steps.largest()["input_ids"].numel())
        sizes = JobSizes(
            clips=self.config.max_grad_norm > 0,
            tokens=self.max_tokens,
            width=self.costs.width,
            compute_dtype=self.limits.compute.dtype,
            on_gpu=self.limits.compute.device.type == "cuda",
            forward_bytes=self.costs.forward_bytes,
            backward_bytes=self.costs.backward_bytes,
            calls_bytes=self.costs.calls_bytes * micro_batches,
            runtime_bytes=planned_runtime(memory.charged_bytes if memory else 0),
        )
        return FinetuneJob(
            sizes=sizes,
            layout_of=functools.cache(self.model.layout),
            rows=rows,
            row_bytes=4 * width,
            steps=self.steps.total,
            offload=offload,
            save_every=self.config.save_every,
            compute_threads=torch.get_num_threads(),
            update_threads=update_threads(self.model.rules, on_gpu=sizes.on_gpu),
            kept=kept,
        )


def prepare_job(
    config: FinetuneConfig,
    limits: Limits,
    batches: Iterable[Sequence[Batch]] | None,
    progress: Progress,
    work: Path,
) -> Prepared:
    """Open model and data, measure one micro-batch. `work`: where packed data may be written."""
    settle_heap()
    compute = limits.compute
    source, data, config = _sources(config, work)
    # what is wrong with the model is said before what is wrong with its tokenizer
    load_config(source, weights=config.init == "pretrained")
    tokenizer = _tokenizer(source, required=batches is None)
    model = open_model(config, source, compute.dtype, tokenizer=tokenizer)
    notes = [*limits.notes, *model.notes, compute.reason]
    limit = getattr(model.hf_config, "max_position_embeddings", None) or config.seq_len
    seq_len = min(config.seq_len, int(limit))
    if seq_len < config.seq_len:
        notes.append(f"seq_len: {config.seq_len} is more than the model's {limit} positions; using {seq_len}")
    takes_positions = "position_ids" in inspect.signature(model.layered.module.forward).parameters
    rows = model.layered.embedding.weight.shape[0]
    if batches is not None:
        if config.batch_size == "auto":
            raise BadInput("batch_size = 'auto' with batches: they are used as they are; leave it out")
        head_rows = model.layered.head.weight.shape[0]
        steps: Steps = GivenSteps(batches, config.max_steps, tokens=rows, targets=head_rows)
    else:
        assert data is not None and tokenizer is not None
        dataset = _dataset(data, tokenizer, seq_len, rows, work / "train.tokens", progress)
        order = BatchOrder(
            n_sequences=len(dataset),
            batch_size=1 if config.batch_size == "auto" else config.batch_size,
            grad_accum=config.grad_accum,
            seed=config.seed,
            epochs=config.epochs,
            max_steps=config.max_steps,
        )
        steps = PackedSteps(dataset, order, takes_positions)
    eval_steps = None
    if config.eval_data is not None:
        assert tokenizer is not None
        held_out = _dataset(config.eval_data, tokenizer, seq_len, rows, work / "eval.tokens", progress)
        size = max(1, steps.max_tokens // seq_len)  # no more tokens at once than a step has
        order = BatchOrder(n_sequences=len(held_out), batch_size=1, grad_accum=size, seed=None, epochs=1)
        eval_steps = PackedSteps(held_out, order, takes_positions)
    largest = [each.largest() for each in (steps, eval_steps) if each is not None]
    micro = max(largest, key=lambda micro: micro["input_ids"].numel())
    try:
        costs = model_costs(model.layered, model.layout(10**9), micro, compute.dtype)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        if batches is None:
            raise
        given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in micro.items())
        raise BadInput(
            f"batches: {type(model.layered.module).__name__} ({limit} positions) takes no micro-batch of {given} "
            f"({str(error).splitlines()[0]})"
        ) from error
    if batches is None:
        notes.append(
            "packed documents do not attend to each other"
            if costs.packs
            else f"{type(model.layered.module).__name__} cannot keep packed documents apart: attention crosses them"
        )
    if costs.estimated:
        notes.append("one kind of block cannot be followed without values: its activations are estimated, generously")
    notes += model.rules.notes
    return Prepared(
        config=config,
        model=model,
        steps=steps,
        eval_steps=eval_steps,
        tokenizer=tokenizer,
        limits=limits,
        costs=costs,
        notes=tuple(notes),
    )


def _sources(config: FinetuneConfig, work: Path) -> tuple[str, str | None, FinetuneConfig]:
    if config.model != "demo":
        return config.model, config.data, config
    from memopt.jobs.demo_model import prepare_demo

    demo = prepare_demo(work)
    return os.fspath(demo.model_dir), config.data or os.fspath(demo.corpus_dir), config.with_changes(init="random")


def _tokenizer(source: str, *, required: bool) -> Any:
    from memopt.jobs.tokenizing import load_tokenizer

    try:
        return load_tokenizer(source)
    except BadInput:
        if required:
            raise
        return None


def _dataset(
    source: str, tokenizer: Any, seq_len: int, vocab_size: int, path: Path, progress: Progress
) -> TokenDataset:
    with progress.work(f"packing {source}", source_bytes(source)) as work:
        return prepare(source, tokenizer, seq_len=seq_len, vocab_size=vocab_size, path=path, on_bytes=work.advance)
