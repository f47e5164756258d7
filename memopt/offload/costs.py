"""What a choice costs: peak bytes per tier and category, and SSD bytes per step, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from memopt.offload.activations import buffer_count, layer_bytes
from memopt.offload.gradients import held_units
from memopt.offload.layout import CHUNK, Layout, Unit, UnitKind
from memopt.offload.rows import BOUNCE_BYTES, row_bytes
from memopt.offload.updater import ring_bytes, update_scratch_bytes
from memopt.plan_types import Plan, Residence
from memopt.tiers import Category, Tier

_LOGIT_COPIES = 3
"""float32 tensors of (tokens, tile) alive at once in the exit: logits, their gradient, and one temporary of the
softmax."""


@dataclass(frozen=True, kw_only=True)
class JobSizes:
    """One training job in numbers. `layout` depends on the tile and is passed beside."""

    clips: bool
    tokens: int
    """Per optimizer step, all micro-batches."""
    width: int
    compute_dtype: torch.dtype
    on_gpu: bool
    forward_bytes: int
    """Live at the worst moment of one micro-batch in one block, without gradients (offload.trace)."""
    backward_bytes: int
    calls_bytes: int
    """Masks and rotary tables of all micro-batches."""
    runtime_bytes: int
    """Anonymous memory of the process before anything of the job is allocated."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The knobs of one plan (see Plan for what they mean)."""

    residence: Mapping[str, Residence]
    block_slots: int = 2
    head_slots: int = 1
    gradient_slots: int = 1
    head_gradient_slots: int = 1
    ring_buffers: int = 2
    loss_tokens: int = 16
    activation_layers_on_ssd: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Choice:
        """What a plan chose."""
        return cls(**{each.name: getattr(plan, each.name) for each in fields(cls)})


def memory(job: JobSizes, layout: Layout, choice: Choice) -> dict[Tier, dict[Category, int]]:
    """Peak bytes per tier and category. Phases that never coincide count once, with the larger."""
    held = {u.name for u in held_units(layout, clips=job.clips)}
    weights = _resident_weights(layout, choice)
    optimizer = sum(u.record_bytes for u in layout.units if choice.residence[u.name].moments == Tier.DRAM)
    gradients = sum(u.master_bytes for u in layout.units if _gradient_in_dram(u, choice, held))
    for units, slots, grad_slots in (
        (layout.blocks, choice.block_slots, choice.gradient_slots),
        (layout.head, choice.head_slots, choice.head_gradient_slots),
    ):
        weights += slots * max((_streamed(u, choice) for u in units), default=0)
        gradients += grad_slots * max(
            (u.master_bytes for u in units if not _gradient_in_dram(u, choice, held)), default=0
        )
    rows = row_bytes(layout, job.tokens, job.compute_dtype)
    weights += rows[Category.WEIGHTS]
    gradients += rows[Category.GRADIENTS]
    compute, compute_weights = _working(job, layout, choice)
    kept = (buffer_count(len(layout.blocks), choice.activation_layers_on_ssd) + 1) * layer_bytes(
        job.tokens, job.width, job.compute_dtype
    )
    dram = {
        Category.RUNTIME: job.runtime_bytes,
        Category.WEIGHTS: weights,
        Category.GRADIENTS: gradients,
        Category.OPTIMIZER: optimizer,
        Category.ACTIVATIONS: kept,
        Category.BUFFERS: _buffers(job, layout, choice),
    }
    gpu: dict[Category, int] = {}
    if job.on_gpu:
        largest = max(u.numel for u in (*layout.blocks, *layout.head))
        gpu = {
            Category.WEIGHTS: compute_weights,
            Category.GRADIENTS: largest * 4,
            Category.ACTIVATIONS: compute + job.calls_bytes,
        }
    else:
        dram[Category.ACTIVATIONS] += compute + job.calls_bytes
        dram[Category.WEIGHTS] += compute_weights
    return {Tier.DRAM: dram, Tier.GPU: gpu}


@dataclass(frozen=True)
class Traffic:
    """SSD bytes of one step."""

    read_bytes: int
    write_bytes: int


def traffic(job: JobSizes, layout: Layout, choice: Choice, save_every: int) -> Traffic:
    """What one step reads from and writes to the SSD (saves of what lives in DRAM spread over the steps between them).

    AdamW with everything on SSD, float32, without clipping: 16 bytes read (weights twice, weights are in the slot when
    the moments come) and 12 written per parameter. With exact clipping the gradient is written and read once more: 20
    and 16.
    """
    held = {u.name for u in held_units(layout, clips=job.clips)}
    read = write = 0
    last = layout.blocks[-1].name
    for unit in layout.units:
        where = choice.residence[unit.name]
        streamed = _streamed(unit, choice)
        if unit.kind == UnitKind.BLOCK:
            read += streamed * (1 if unit.name == last else 2)
        elif unit.kind == UnitKind.HEAD or (layout.tied and unit.kind == UnitKind.EMBED):
            final = len(layout.head) - 1
            read += streamed * (1 if unit.index == final else 2)
        if unit.kind == UnitKind.EMBED and streamed:
            rows = min(job.tokens, unit.rows[1] - unit.rows[0])
            read += rows * (streamed // max(unit.rows[1] - unit.rows[0], 1))
            read += streamed if unit.trained else 0  # the update passes the table through the ring
        if not unit.trained:
            continue
        moments = unit.record_bytes
        on_ssd = where.moments == Tier.SSD
        read += moments if on_ssd else 0
        write += moments if on_ssd else moments // save_every
        write += unit.master_bytes if where.weights == Tier.SSD else unit.master_bytes // save_every
        if unit.name in held and where.gradient == Tier.SSD:
            read += unit.master_bytes
            write += unit.master_bytes
            if job.clips and unit.kind == UnitKind.EMBED:  # rows of a tied table's gradient, for its norm
                count = unit.rows[1] - unit.rows[0]
                read += min(job.tokens, count) * (unit.master_bytes // count)
    spilled = layer_bytes(job.tokens, job.width, job.compute_dtype) * choice.activation_layers_on_ssd
    return Traffic(read + spilled, write + spilled)


def scratch_bytes(job: JobSizes, layout: Layout, choice: Choice) -> int:
    """Bytes of the scratch files of a run."""
    held = held_units(layout, clips=job.clips)
    gradients = sum(u.master_bytes for u in held if choice.residence[u.name].gradient == Tier.SSD)
    return gradients + layer_bytes(job.tokens, job.width, job.compute_dtype) * choice.activation_layers_on_ssd


def _resident_weights(layout: Layout, choice: Choice) -> int:
    return sum(u.master_bytes + u.frozen_bytes for u in layout.units if choice.residence[u.name].weights == Tier.DRAM)


def _streamed(unit: Unit, choice: Choice) -> int:
    return 0 if choice.residence[unit.name].weights == Tier.DRAM else unit.master_bytes + unit.frozen_bytes


def _gradient_in_dram(unit: Unit, choice: Choice, held: set[str]) -> bool:
    return unit.name in held and choice.residence[unit.name].gradient == Tier.DRAM


def _working(job: JobSizes, layout: Layout, choice: Choice) -> tuple[int, int]:
    """Transient bytes on the computing device: activations of one block or logits; weights in the compute dtype."""
    tile = max(u.rows[1] - u.rows[0] for u in layout.head)
    logits = choice.loss_tokens * (_LOGIT_COPIES * tile * 4 + 4 * job.width * 4)
    activations = max(job.backward_bytes, job.forward_bytes, logits)
    copies = 0
    if job.on_gpu or job.compute_dtype != torch.float32 or any(u.frozen for u in layout.units):
        copies = (
            max(sum(p.numel for p in (*u.trained, *u.frozen)) for u in (*layout.blocks, *layout.head))
            * job.compute_dtype.itemsize
        )
    return activations, copies


def _buffers(job: JobSizes, layout: Layout, choice: Choice) -> int:
    ring = choice.ring_buffers * ring_bytes(layout, choice.residence, clips=job.clips)
    # rows of a tied table's gradient are read for its norm
    rows_on_ssd = job.clips and layout.tied and any(choice.residence[u.name].gradient == Tier.SSD for u in layout.embed)
    bounce = BOUNCE_BYTES if rows_on_ssd or any(_streamed(u, choice) for u in layout.embed) else 0
    zeros = 4 * CHUNK if layout.embed[0].trained and not layout.tied else 0
    return ring + update_scratch_bytes(layout) + bounce + zeros
