"""memopt's own engine's job (`FinetuneJob`) from a `TrainingJob`: what `memopt finetune` would plan with."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memopt.jobs.config import OPTIMIZER_OPTIONS, FinetuneConfig
from memopt.jobs.model_costs import model_costs
from memopt.jobs.model_layout import model_layout
from memopt.jobs.preparation import planned_runtime, update_threads
from memopt.jobs.rules import update_rules
from memopt.offload.costs import JobSizes
from memopt.offload.layout import Layout
from memopt.patches.hf_checkpoint import build_skeleton, decay_names
from memopt.patches.hf_model import HFLayeredModel
from memopt.planning.finetune import FinetuneJob
from memopt.planning.training_types import TrainingJob

if TYPE_CHECKING:
    from memopt.patches.hf_lora import Adapted

_SETTINGS = {"scale": "proj_scale", "state_dtype": "optim_state_dtype"}
"""What a configuration calls an option of an optimizer, where it has another name."""


def offload_job(job: TrainingJob, hf_config: Any) -> FinetuneJob:
    """What `memopt.finetune` plans with. Raises BadInput for what its engine cannot do."""
    compute = getattr(torch, job.autocast or job.weights_dtype)
    module = build_skeleton(hf_config, dtype=compute)
    decay = decay_names(module)
    dtypes = {p.name: getattr(torch, p.dtype) for p in job.facts.parameters}
    options = {_SETTINGS.get(name, name): value for name, value in job.optimizer_options.items()}
    known = {*OPTIMIZER_OPTIONS, "optim_state_dtype", "eps"}
    settings = {name: value for name, value in options.items() if name in known}
    config = FinetuneConfig.of(
        model=job.facts.source, method=job.method, optimizer=job.optimizer, max_grad_norm=job.max_grad_norm, **settings
    )
    if job.method == "lora":
        adapted = with_adapters(module, job.lora_rank, job.lora_targets)
        stored = dtypes
        dtypes = {n: stored[adapted.base(n)] for n, p in adapted.module.named_parameters() if not p.requires_grad}
        module, decay = adapted.module, decay_names(adapted.module)
    layered = HFLayeredModel(module)
    rules = update_rules(config, module)

    @functools.cache
    def layout_of(tile_rows: int) -> Layout:
        return model_layout(layered, decay=decay, dtypes=dtypes, rules=rules.of, tile_rows=tile_rows)

    costs = model_costs(layered, layout_of(10**9), _micro(job), compute)
    tables = (layered.embedding.weight, layered.head.weight)
    width = max(int(t.shape[1]) for t in tables)
    on_gpu = job.device == "cuda"
    return FinetuneJob(
        sizes=JobSizes(
            clips=job.max_grad_norm > 0,
            tokens=job.tokens,
            width=costs.width,
            compute_dtype=compute,
            on_gpu=on_gpu,
            forward_bytes=costs.forward_bytes,
            backward_bytes=costs.backward_bytes,
            calls_bytes=costs.calls_bytes * job.grad_accum,
            runtime_bytes=planned_runtime(job.runtime_bytes),
        ),
        layout_of=layout_of,
        rows=max(int(t.shape[0]) for t in tables),
        row_bytes=4 * width,
        steps=job.steps,
        offload=job.engine == "ssd",
        save_every=job.save_every,
        compute_threads=torch.get_num_threads(),
        update_threads=update_threads(rules, on_gpu=on_gpu),
    )


def with_adapters(module: nn.Module, rank: int, targets: tuple[str, ...] | None) -> Adapted:
    """A skeleton with the adapters of a plan, which asks for shapes only. Raises BadInput."""
    from memopt.patches.hf_lora import adapt

    name: Any = getattr(module, "name_or_path", None) or None  # what peft compares with
    return adapt(module, rank=rank, alpha=float(rank), dropout=0.0, target_modules=targets, base_name=name)


def _micro(job: TrainingJob) -> dict[str, torch.Tensor]:
    """A micro-batch of the job's shape; of packed documents, two in each sequence (as PackedSteps.largest makes)."""
    tokens = torch.zeros(job.batch_size, job.seq_len, dtype=torch.int64)
    micro = {"input_ids": tokens, "labels": tokens}
    if job.packed:
        positions = torch.arange(job.seq_len)
        positions[job.seq_len // 2 :] -= job.seq_len // 2
        micro["position_ids"] = positions.expand(job.batch_size, -1)
    return micro
