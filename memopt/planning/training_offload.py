"""Training by memopt's own streaming engine: the plan of `memopt finetune`, by phase."""

from __future__ import annotations

from memopt.errors import BadInput
from memopt.machine import Machine
from memopt.offload.costs import Choice, Traffic, memory, scratch_bytes, traffic
from memopt.offload.layout import Layout
from memopt.offload.storage import state_bytes
from memopt.plan_types import Plan
from memopt.planning.finetune import FinetuneJob, plan_finetune
from memopt.planning.training_types import TrainingJob, TrainingTraffic
from memopt.tiers import Category, Tier

Use = dict[Tier, dict[Category, int]]


def planned(job: TrainingJob) -> Plan:
    """The plan. Raises Infeasible with the smallest sufficient budget, BadInput when the job was not prepared."""
    return plan_finetune(_own(job), job.budget, job.machine or Machine(name="any machine"))


def phases(job: TrainingJob) -> dict[str, Use]:
    """Bytes per phase. What the engine holds does not change between the phases of a step: buffers are made once."""
    own = _own(job)
    _, layout, choice = _settled(job)
    whole = {tier: dict(by) for tier, by in memory(own.sizes, layout, choice).items() if by}
    if own.offload:
        files = _space(own, layout, choice)
        if files:
            whole[Tier.SSD] = files
    found = {name: whole for name in ("forward", "backward", "optimizer")}
    idle: Use = {tier: {**by, Category.ACTIVATIONS: 0} for tier, by in whole.items()}
    found["load"] = idle
    if job.save:
        found["save"] = idle
    return found


def traffic_of(job: TrainingJob) -> TrainingTraffic:
    """Bytes of one step, from the plan."""
    own = _own(job)
    plan, layout, choice = _settled(job)
    moved: Traffic = traffic(own.sizes, layout, choice, plan.save_every)
    compute = own.sizes.compute_dtype.itemsize
    weights = sum(p.numel for u in layout.units for p in (*u.trained, *u.frozen)) * compute
    gradients = sum(u.master_bytes for u in layout.units)
    on_gpu = own.sizes.on_gpu
    return TrainingTraffic(
        to_device_bytes=2 * weights if on_gpu else 0,
        from_device_bytes=gradients if on_gpu else 0,
        ssd_read_bytes=moved.read_bytes if own.offload else 0,
        ssd_write_bytes=moved.write_bytes if own.offload else 0,
        ssd_space_bytes=sum(_space(own, layout, choice).values()) if own.offload else 0,
        save_write_bytes=sum(u.master_bytes + u.record_bytes for u in layout.units if u.trained),
    )


def _own(job: TrainingJob) -> FinetuneJob:
    if job.offload is None:
        raise BadInput(f"engine = {job.engine!r}: call memopt.jobs.model_facts.prepare on the job first")
    return job.offload


def _settled(job: TrainingJob) -> tuple[Plan, Layout, Choice]:
    plan = planned(job)
    return plan, _own(job).layout_of(plan.tile_rows), Choice.of(plan)


def _space(own: FinetuneJob, layout: Layout, choice: Choice) -> dict[Category, int]:
    """Bytes of the files in the offload directory: the state with its second version, and scratch files."""
    state, scratch = state_bytes(layout), scratch_bytes(own.sizes, layout, choice)
    weights = 2 * sum(u.master_bytes for u in layout.units) + sum(u.frozen_bytes for u in layout.units)
    return {
        Category.WEIGHTS: min(weights, state),
        Category.OPTIMIZER: max(state - weights, 0),
        Category.BUFFERS: scratch,
    }
