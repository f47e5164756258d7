"""What training will need: bytes of every tier by phase, traffic and work of one step. Pure functions of a job."""

from __future__ import annotations

from collections.abc import Mapping

from memopt.forecast_types import PhaseForecast
from memopt.planning import training_memory, training_offload, training_zero
from memopt.planning.training_optimizer import optimizer_bytes
from memopt.planning.training_types import TrainingFlops, TrainingJob, TrainingTraffic
from memopt.tiers import Category, Tier

PHASES = ("load", "forward", "backward", "optimizer", "save")


def training_phases(job: TrainingJob) -> tuple[PhaseForecast, ...]:
    """Bytes per tier and category at the peak of load, forward, backward, optimizer and save.

    Raises BadInput when the job's variant was not traced, and Infeasible when memopt's engine cannot keep the budget.
    """
    if job.engine in ("cpu-offload", "ssd"):
        found = training_offload.phases(job)
    elif job.engine in ("zero3", "zero-infinity"):
        found = training_zero.phases(job)
    else:
        found = training_memory.phases(job)
    return tuple(PhaseForecast(name=name, use=_plain(found[name])) for name in PHASES if name in found)


def training_traffic(job: TrainingJob) -> TrainingTraffic:
    """Bytes that one optimizer step moves. Raises as `training_phases`."""
    if job.engine in ("cpu-offload", "ssd"):
        return training_offload.traffic_of(job)
    if job.engine in ("zero3", "zero-infinity"):
        return training_zero.traffic(job)
    return training_memory.traffic(job)


def training_flops(job: TrainingJob) -> TrainingFlops:
    """Operations of one optimizer step: two per multiplication of a weight with a token, forward; twice that backward,
    of a frozen weight once (no gradient of its own); attention's two products with all earlier tokens.

    memopt's own engine and gradient checkpointing compute the blocks' forward a second time.
    """
    facts = job.facts
    parameters = facts.trace(job.variant).parameters
    head = facts.hidden * facts.vocab
    matrices = [p for p in parameters if len(p.shape) >= 2 and (p.layer is not None)]
    tokens = job.tokens
    span = min(job.seq_len, facts.sliding_window or job.seq_len)
    # causal: half of all pairs
    attention = 2 * 2 * facts.layers * facts.heads * facts.head_dim * span // 2 * tokens
    blocks = 2 * tokens * sum(p.numel for p in matrices) + attention
    forward = blocks + 2 * tokens * head
    own = 2 * tokens * sum(p.numel for p in matrices if p.trainable)
    table_is_trained = any(p.trainable for p in parameters if p.layer is None and p.shape[-1:] == (facts.hidden,))
    own += 2 * tokens * head if table_is_trained else 0
    backward = forward + attention + own
    again = blocks if job.gradient_checkpointing or job.engine in ("cpu-offload", "ssd") else 0
    trained = [p for p in parameters if p.trainable]
    return TrainingFlops(
        forward=forward,
        backward=backward,
        recomputed=again,
        optimizer=training_memory.update_flops(job, trained),
    )


def training_state(job: TrainingJob) -> dict[Category, int]:
    """Weights, gradients and optimizer states of the whole job wherever they are: what no knob but method, types and
    optimizer changes."""
    parameters = job.facts.trace(job.variant).parameters
    weights, gradients = training_memory.held_bytes(parameters)
    return {
        Category.WEIGHTS: weights,
        Category.GRADIENTS: gradients,
        Category.OPTIMIZER: optimizer_bytes(job, parameters).state,
    }


def _plain(use: Mapping[Tier, Mapping[Category, int]]) -> dict[str, dict[str, int]]:
    return {str(tier): {str(c): n for c, n in by.items() if n} for tier, by in use.items() if any(by.values())}
