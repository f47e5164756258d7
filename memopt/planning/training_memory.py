"""Training in memory (a Trainer, a plain loop): bytes by phase, put together from the trace of a few blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from memopt.planning import allocators
from memopt.planning.training_optimizer import optimizer_bytes, optimizer_routes
from memopt.planning.training_types import (
    ITEMSIZE,
    ParameterFact,
    Pass,
    Segment,
    StepTrace,
    TrainingJob,
    TrainingTraffic,
)
from memopt.tiers import Category, Tier

Use = dict[Tier, dict[Category, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """Tensor bytes of a micro-batch above weights, states and what gradients there were: (all, gradients of them)."""

    forward: tuple[int, int]
    backward: tuple[int, int]


def phases(job: TrainingJob) -> dict[str, Use]:
    """Bytes per phase, tier and category. The first step has no states yet and is never the worst."""
    weights = job.facts.trace(job.variant).parameters
    found: dict[str, Use] = {}
    for name, by_category in tensor_phases(job).items():
        if job.device == "cuda":
            host = held_bytes(weights)[0] if name == "save" else 0
            found[name] = allocators.on_cuda(job, by_category, host)
        else:
            use = {**by_category, Category.WEIGHTS: _anonymous(job, name)}
            found[name] = allocators.on_cpu(job, use, _in_heap(job, name, use))
    return found


def _anonymous(job: TrainingJob, phase: str) -> int:
    """Weights that are no clean pages of the checkpoint's files: transformers maps those and copies nothing until they
    are written to, if they are stored in the type they are wanted in."""
    trace = job.facts.trace(job.variant)
    mapped = {p.name for p in job.facts.parameters if job.pretrained and p.dtype == job.weights_dtype}
    if job.facts.checkpoint_bytes is None:
        mapped = set()
    clean = 0
    for p in trace.parameters:
        base = p.name.replace(".base_layer.", ".")
        if base in mapped and (phase == "load" or not p.trainable):
            clean += p.numel * ITEMSIZE[p.dtype]
    return held_bytes(trace.parameters)[0] + job.facts.buffer_bytes - clean


def _in_heap(job: TrainingJob, phase: str, use: Mapping[Category, int]) -> int:
    """Bytes of tensors among which blocks are made and freed; an update makes few."""
    if phase not in ("forward", "backward"):
        return 0
    parameters = job.facts.trace(job.variant).parameters
    trained = [p for p in parameters if p.trainable]
    copies = 1 + round(use[Category.OPTIMIZER] / max(held_bytes(parameters)[1], 1))
    large = allocators.mapped_bytes(trained, copies) + (
        allocators.mapped_bytes(trained, 1) if use[Category.GRADIENTS] else 0
    )
    frozen = use[Category.WEIGHTS] - held_bytes(trained)[0]
    large += min(max(frozen, 0), allocators.mapped_bytes([p for p in parameters if not p.trainable], 1))
    return max(sum(use.values()) - large, 0)


def tensor_phases(job: TrainingJob) -> dict[str, dict[Category, int]]:
    """Bytes of tensors alone at the peak of each phase."""
    trace = job.facts.trace(job.variant)
    weights, gradients = held_bytes(trace.parameters)
    weights += job.facts.buffer_bytes
    optimizer = optimizer_bytes(job, trace.parameters)
    base = {Category.WEIGHTS: weights, Category.GRADIENTS: 0, Category.OPTIMIZER: optimizer.state}
    found = {"load": {Category.WEIGHTS: weights}}
    # a step of several micro-batches has a first one too, which makes the gradients
    passes = [(micro_peaks(trace, job, later=False), 0)]
    if job.grad_accum > 1:
        passes.append((micro_peaks(trace, job, later=True), gradients))
    for name in ("forward", "backward"):
        total, own, there = max((*getattr(peaks, name), there) for peaks, there in _with_held(passes))
        found[name] = {**base, Category.GRADIENTS: there + own, Category.ACTIVATIONS: total - there - own}
    found["optimizer"] = {**base, Category.GRADIENTS: gradients, Category.BUFFERS: optimizer.scratch}
    if job.save:
        found["save"] = {**base}
    return found


def _with_held(passes: Sequence[tuple[Peaks, int]]) -> Iterator[tuple[Peaks, int]]:
    """Peaks with the gradients that were there before added to all bytes."""
    for peaks, there in passes:
        forward, backward = peaks.forward, peaks.backward
        yield Peaks(forward=(forward[0] + there, forward[1]), backward=(backward[0] + there, backward[1])), there


def held_bytes(parameters: Sequence[ParameterFact]) -> tuple[int, int]:
    """Bytes of all weights, and of the gradients of those that are trained."""
    weights = sum(p.numel * ITEMSIZE[p.dtype] for p in parameters)
    return weights, sum(p.numel * ITEMSIZE[p.dtype] for p in parameters if p.trainable)


def micro_peaks(trace: StepTrace, job: TrainingJob, *, later: bool) -> Peaks:
    """Walk one micro-batch from entry to exit and back, block by block."""
    steps = trace.later if later else trace.first
    forward, backward = list(_forward(trace.kinds, steps)), list(_backward(trace.kinds, steps))
    now = (0, 0)
    peaks = []
    for segments in (forward, backward):
        peak = now
        for segment in segments:
            for moment in segment.moments:
                there = (now[0] + moment.total.at(job.batch_size, job.seq_len), now[1] + moment.gradients)
                peak = max(peak, there)
            end = segment.end
            now = (now[0] + end.total.at(job.batch_size, job.seq_len), now[1] + end.gradients)
        peaks.append(peak)
    return Peaks(forward=peaks[0], backward=peaks[1])


def _forward(kinds: Sequence[int], steps: Pass) -> Iterator[Segment]:
    yield steps.entry_forward
    for kind in kinds:
        yield steps.blocks_forward[kind]
    yield steps.exit_forward


def _backward(kinds: Sequence[int], steps: Pass) -> Iterator[Segment]:
    yield steps.exit_backward
    for kind in reversed(kinds):
        yield steps.blocks_backward[kind]
    yield steps.entry_backward


def traffic(job: TrainingJob) -> TrainingTraffic:
    """Nothing moves in a step but the tokens; a save writes the weights, and the states where asked."""
    parameters = job.facts.trace(job.variant).parameters
    weights, gradients = held_bytes(parameters)
    written = gradients if job.method == "lora" else weights
    states = optimizer_bytes(job, parameters).state
    tokens = 2 * 8 * job.tokens if job.device == "cuda" else 0
    return TrainingTraffic(to_device_bytes=tokens, save_write_bytes=written + states, ssd_space_bytes=written + states)


_UPDATE_FLOPS = 12
"""Of AdamW per element: two moving averages, a root, a division, decay and the step."""


def update_flops(job: TrainingJob, trained: Sequence[ParameterFact]) -> int:
    """Operations of one update: a dozen per element, and the products of Newton-Schulz (Muon: 4 m^2 n + 2 m^3 a step)
    and of the projection (GaLore: there and back)."""
    total = _UPDATE_FLOPS * sum(p.numel for p in trained)
    if job.implementation != "memopt":
        return total
    for route in optimizer_routes(job, trained):
        for routed in route.parts:
            shape = routed.part.shape(route.shape)
            if len(shape) < 2:
                continue
            small, large, policy = min(shape[-2:]), max(shape[-2:]), routed.policy
            if policy.projection is not None:
                total += 4 * prod(shape) * policy.projection.rank
                small = min(small, policy.projection.rank)
            if policy.rule == "muon":
                total += prod(shape[:-2]) * policy.ns_steps * (4 * small**2 * large + 2 * small**3)
    return total
