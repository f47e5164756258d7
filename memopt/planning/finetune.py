"""The plan of a fine-tuning job: from the smallest that works upwards, each byte spent where it saves most traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from memopt.budget import Budget
from memopt.machine import Machine
from memopt.offload.costs import Choice, JobSizes, Traffic, memory, scratch_bytes, traffic
from memopt.offload.gradients import held_units
from memopt.offload.layout import Layout, UnitKind
from memopt.offload.storage import state_bytes
from memopt.offload.updater import ring_bytes, update_scratch_bytes
from memopt.plan_types import Infeasible, Plan, Prediction, Residence
from memopt.tiers import Tier
from memopt.units import MiB, format_bytes, format_per_s

_MIN_TILE_BYTES = 4 * MiB
_LOSS_TOKENS = (16, 32, 64, 128, 256)
"""Beyond 256 tokens the matrix product of the head gains nothing more (measured: within 3 % on CPU)."""
_COMFORTS: tuple[dict[str, int], ...] = (
    {"ring_buffers": 3},
    {"gradient_slots": 2},
    {"block_slots": 3},
    {"ring_buffers": 4},
    {"ring_buffers": 6},
    {"ring_buffers": 8},
)
"""Buffers that keep the drive busy while the processor computes, in the order in which they help."""
_RING_BYTES = 256 * MiB
"""Three ring buffers (one read, one updated, one written) may be larger together, where whole matrices pass; more may
not: they would take from what saves traffic."""
SAVE_EVERY_IN_DRAM = 50
"""Steps between saves when the state lives in DRAM: a save writes 12 bytes per parameter."""


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """What is to be planned. `layout_of(tile_rows)` cuts the model with tables of at most that many rows a tile."""

    sizes: JobSizes
    layout_of: Callable[[int], Layout]
    rows: int
    """Rows of the larger table."""
    row_bytes: int
    steps: int
    offload: bool
    """There is a directory to offload to."""
    save_every: int | None
    compute_threads: int
    update_threads: int
    kept: Mapping[str, Any] | None = None
    """Numeric choices of the run that is resumed (Plan.numerics)."""


def plan_finetune(job: FinetuneJob, budget: Budget, machine: Machine) -> Plan:
    """Choose everything. Raises Infeasible with the smallest sufficient budget of the tier that is short."""
    candidates = [_resident(job, budget), *([_streaming(job, budget)] if job.offload else [])]
    found = next((c for c in candidates if c is not None), None)
    if found is None:
        raise _infeasible(job, budget)
    tile_rows, choice = found
    layout = job.layout_of(tile_rows)
    on_ssd = any(Tier.SSD in (r.weights, r.moments, r.gradient) for r in choice.residence.values())
    state_on_ssd = any(Tier.SSD in (r.weights, r.moments) for r in choice.residence.values())
    save_every = job.save_every or (1 if state_on_ssd else SAVE_EVERY_IN_DRAM)
    moved = traffic(job.sizes, layout, choice, save_every)
    if job.offload:
        _check_ssd(job, layout, choice, budget)
    predicted = {t: Prediction(by_category=c) for t, c in memory(job.sizes, layout, choice).items() if c}
    kept = job.kept or {}
    return Plan(
        residence=choice.residence,
        block_slots=choice.block_slots,
        head_slots=choice.head_slots,
        gradient_slots=choice.gradient_slots,
        head_gradient_slots=choice.head_gradient_slots,
        ring_buffers=choice.ring_buffers,
        tile_rows=tile_rows,
        loss_tokens=choice.loss_tokens,
        activation_layers_on_ssd=choice.activation_layers_on_ssd,
        io_workers=4,
        save_every=save_every,
        compute_threads=int(kept.get("compute_threads", job.compute_threads)),
        update_threads=int(kept.get("update_threads", job.update_threads)),
        predicted=predicted,
        ssd_read_per_step_bytes=moved.read_bytes,
        ssd_write_per_step_bytes=moved.write_bytes,
        steps=job.steps,
        step_s=_io_s(moved, machine),
        reasons=tuple(_reasons(job, layout, choice, moved, save_every, machine, on_ssd, predicted)),
    )


def smallest_dram_bytes(job: FinetuneJob) -> int:
    """DRAM of the most frugal plan."""
    return min(_dram(job, *candidate) for candidate in _least(job))


def _resident(job: FinetuneJob, budget: Budget) -> tuple[int, Choice] | None:
    """Everything in DRAM, if that fits."""
    for tile_rows in _tiles(job):
        choice = _everything(job, tile_rows)
        for tokens in reversed(_loss_tokens(job)):
            grown = replace(choice, loss_tokens=tokens)
            if _fits(job, tile_rows, grown, budget):
                return tile_rows, grown
    return None


def _everything(job: FinetuneJob, tile_rows: int) -> Choice:
    in_dram = Residence(weights=Tier.DRAM, moments=Tier.DRAM, gradient=Tier.DRAM)
    residence = {u.name: in_dram for u in job.layout_of(tile_rows).units}
    return Choice(residence=residence, loss_tokens=_loss_tokens(job)[0], gradient_slots=2)


def _least(job: FinetuneJob) -> Iterator[tuple[int, Choice]]:
    """What the smallest budget is looked for among; a very small model needs less than the buffers of streaming."""
    for tile_rows in _tiles(job):
        yield tile_rows, _everything(job, tile_rows)
    if job.offload:
        yield from _frugal(job)


def _streaming(job: FinetuneJob, budget: Budget) -> tuple[int, Choice] | None:
    """Start frugal, then take every improvement that still fits, the one that saves most first."""
    start = next((c for c in _frugal(job) if _fits(job, *c, budget)), None)
    if start is None:
        return None
    tile_rows, choice = start
    for change in _COMFORTS:
        better = replace(choice, **change)  # type: ignore[arg-type]
        ring = ring_bytes(job.layout_of(tile_rows), better.residence, clips=job.sizes.clips) * better.ring_buffers
        if better.ring_buffers <= 3 or ring <= _RING_BYTES:
            choice = _if_fits(job, tile_rows, choice, better, budget)
    for tokens in _loss_tokens(job):
        choice = _if_fits(job, tile_rows, choice, replace(choice, loss_tokens=max(tokens, choice.loss_tokens)), budget)
    for rows in _tiles(job):
        if rows > tile_rows:
            wider = _retiled(job, choice, rows)
            if _fits(job, rows, wider, budget):
                tile_rows, choice = rows, wider
                break
    for grown in _placements(job, job.layout_of(tile_rows), choice):
        choice = _if_fits(job, tile_rows, choice, grown(choice), budget)
    return tile_rows, choice


def _frugal(job: FinetuneJob) -> Iterator[tuple[int, Choice]]:
    """Least memory, with a whole table first if cutting it saves nothing."""
    for tile_rows in _tiles(job):
        layout = job.layout_of(tile_rows)
        residence = {u.name: Residence() for u in layout.units}
        residence["rest"] = Residence(weights=Tier.DRAM, moments=Tier.DRAM, gradient=Tier.DRAM)
        yield (
            tile_rows,
            Choice(
                residence=residence,
                head_slots=_head_slots(layout),
                activation_layers_on_ssd=len(layout.blocks),
                loss_tokens=_loss_tokens(job)[0],
            ),
        )


def _retiled(job: FinetuneJob, choice: Choice, tile_rows: int) -> Choice:
    layout = job.layout_of(tile_rows)
    residence = {u.name: choice.residence.get(u.name, Residence()) for u in layout.units}
    return replace(choice, residence=residence, head_slots=_head_slots(layout))


def _placements(job: FinetuneJob, layout: Layout, choice: Choice) -> Iterator[Callable[[Choice], Choice]]:
    """Moves from SSD to DRAM, most traffic saved per byte first: weights cross three times a step, the others twice."""
    held = {u.name for u in held_units(layout, clips=job.sizes.clips)}
    tables_last = sorted(layout.units, key=lambda u: u.kind == UnitKind.EMBED and not layout.tied)
    for unit in tables_last:
        yield lambda c, name=unit.name: _moved(c, name, weights=Tier.DRAM)  # type: ignore[misc]
    for layer in reversed(range(choice.activation_layers_on_ssd)):
        yield lambda c, layer=layer: (  # type: ignore[misc]
            replace(c, activation_layers_on_ssd=layer) if c.activation_layers_on_ssd == layer + 1 else c
        )
    for unit in layout.units:
        if unit.trained and unit.name in held:
            yield lambda c, name=unit.name: _moved(c, name, gradient=Tier.DRAM)  # type: ignore[misc]
    for unit in layout.units:
        if unit.trained:
            yield lambda c, name=unit.name: _moved(c, name, moments=Tier.DRAM)  # type: ignore[misc]


def _moved(choice: Choice, name: str, **where: Tier) -> Choice:
    return replace(choice, residence={**choice.residence, name: replace(choice.residence[name], **where)})


def _if_fits(job: FinetuneJob, tile_rows: int, old: Choice, new: Choice, budget: Budget) -> Choice:
    return new if new is not old and _fits(job, tile_rows, new, budget) else old


def _fits(job: FinetuneJob, tile_rows: int, choice: Choice, budget: Budget) -> bool:
    need = memory(job.sizes, job.layout_of(tile_rows), choice)
    limits = {Tier.DRAM: budget.dram_bytes, Tier.GPU: budget.gpu_bytes}
    return all(limit is None or sum(need[tier].values()) <= limit for tier, limit in limits.items())


def _dram(job: FinetuneJob, tile_rows: int, choice: Choice) -> int:
    return sum(memory(job.sizes, job.layout_of(tile_rows), choice)[Tier.DRAM].values())


def _tiles(job: FinetuneJob) -> list[int]:
    """Tile sizes to consider: the whole table, halves, quarters, ... down to 4 MiB."""
    if job.kept:
        return [int(job.kept["tile_rows"])]
    tiles = [job.rows]
    while -(-tiles[-1] // 2) * job.row_bytes >= _MIN_TILE_BYTES:
        tiles.append(-(-tiles[-1] // 2))
    return tiles


def _loss_tokens(job: FinetuneJob) -> list[int]:
    return [int(job.kept["loss_tokens"])] if job.kept else list(_LOSS_TOKENS)


def _head_slots(layout: Layout) -> int:
    return 1 if len(layout.head) == 1 else 2


def _infeasible(job: FinetuneJob, budget: Budget) -> Infeasible:
    smallest = min(_least(job), key=lambda c: _dram(job, *c))
    need = memory(job.sizes, job.layout_of(smallest[0]), smallest[1])
    dram, gpu = (sum(need[t].values()) for t in (Tier.DRAM, Tier.GPU))
    knobs = "Other knobs: a smaller --seq-len, --batch-size or --grad-accum"
    if budget.gpu_bytes is not None and (gpu > budget.gpu_bytes or budget.dram_bytes is None):
        return Infeasible(Tier.GPU, budget.gpu_bytes, gpu, f"{knobs}, --dtype bfloat16, or --device cpu.")
    largest = sorted(need[Tier.DRAM].items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{category} {format_bytes(n)}" for category, n in largest)
    if not job.offload:
        knobs = "Give an --offload-dir on an SSD to need far less. " + knobs
    return Infeasible(Tier.DRAM, budget.dram_bytes or 0, dram, f"It needs {parts}. {knobs}.")


def _check_ssd(job: FinetuneJob, layout: Layout, choice: Choice, budget: Budget) -> None:
    need = state_bytes(layout) + scratch_bytes(job.sizes, layout, choice)
    if budget.ssd_bytes is not None and need > budget.ssd_bytes:
        raise Infeasible(
            Tier.SSD,
            budget.ssd_bytes,
            need,
            "Two versions of weights and moments make the run crash-safe; --optim-state-dtype bfloat16 or int8, and "
            "optimizers such as galore8bit, need less.",
        )


def _io_s(moved: Traffic, machine: Machine) -> float:
    """Seconds the SSD needs for a step, when its speed is known."""
    if not machine.ssd_read_per_s or not machine.ssd_write_per_s:
        return 0.0
    return moved.read_bytes / machine.ssd_read_per_s + moved.write_bytes / machine.ssd_write_per_s


def _reasons(
    job: FinetuneJob,
    layout: Layout,
    choice: Choice,
    moved: Traffic,
    save_every: int,
    machine: Machine,
    on_ssd: bool,
    predicted: Mapping[Tier, Prediction],
) -> Iterator[str]:
    state = sum(u.master_bytes + u.record_bytes + u.master_bytes for u in layout.units)
    dram = predicted[Tier.DRAM].total_bytes
    yield (
        f"training state (weights, gradients, optimizer) is {format_bytes(state)}; the plan needs "
        f"{format_bytes(dram)} of DRAM"
    )
    if not on_ssd:
        yield "everything fits in DRAM: no step reads from the SSD"
    else:
        for what in ("weights", "moments", "gradient"):
            names = [u for u in layout.units if u.trained or what == "weights"]
            resident = sum(getattr(choice.residence[u.name], what) == Tier.DRAM for u in names)
            yield f"{what}: {resident} of {len(names)} units live in DRAM, the others on SSD"
    wholes = [s for u in layout.units for s in u.segments if s.rule.whole]
    if wholes:
        ring = ring_bytes(layout, choice.residence, clips=job.sizes.clips)
        yield (
            f"{len(wholes)} matrices are updated as a whole, on the CPU: for the largest, {format_bytes(ring)} in each "
            f"of {choice.ring_buffers} ring buffers and {format_bytes(update_scratch_bytes(layout))} of temporaries"
        )
    if choice.activation_layers_on_ssd:
        yield (
            f"boundary activations of {choice.activation_layers_on_ssd} of {len(layout.blocks)} layers go "
            f"to SSD: the budget is tight"
        )
    if len(layout.head) > 1:
        yield (
            f"the vocabulary is cut into {len(layout.head)} tiles so that it does not set the peak; the "
            f"head is computed twice"
        )
    if job.sizes.clips:
        yield (
            "clipping needs the global norm first: gradients are held and each update rides on the next step's forward"
        )
    else:
        yield "no clipping: each unit is updated as soon as its gradient is complete"
    yield f"saved every {save_every} step{'s' if save_every > 1 else ''}" + (
        ": the state is on SSD anyway" if save_every == 1 and on_ssd else ""
    )
    if moved.write_bytes:
        total = moved.write_bytes * job.steps
        wear = ""
        if machine.ssd_endurance_bytes:
            wear = f", {100 * total / machine.ssd_endurance_bytes:.2g} % of the drive's endurance"
        yield (
            f"SSD traffic per step: {format_bytes(moved.read_bytes)} read, {format_bytes(moved.write_bytes)} written; "
            f"{format_bytes(total)} written in {job.steps} steps{wear}"
        )
        if seconds := _io_s(moved, machine):
            speed = (moved.read_bytes + moved.write_bytes) / seconds
            yield f"the SSD alone needs {seconds:.2f} s per step at {format_per_s(speed)}"
