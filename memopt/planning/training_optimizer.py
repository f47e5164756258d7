"""An optimizer's states and temporaries from the facts of parameters: nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from memopt.optim import costs, newton_schulz, scratch
from memopt.optim.codecs import Codec
from memopt.optim.grouping import routes_of
from memopt.optim.items import Route
from memopt.optim.parts import Part
from memopt.optim.presets import Policy, resolve
from memopt.optim.routing import Routed
from memopt.optim.updates import BATCH_BYTES
from memopt.planning.training_types import ITEMSIZE, Implementation, ParameterFact, TrainingJob

_STEP_BYTES = 4
"""torch's AdamW keeps the number of the step of every parameter in a float32 tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerBytes:
    """`state`: kept. `scratch`: temporaries at the worst moment of a step. `by_parameter`: states in order."""

    state: int
    scratch: int
    by_parameter: tuple[int, ...]


def optimizer_bytes(job: TrainingJob, parameters: Sequence[ParameterFact]) -> OptimizerBytes:
    """Of the job's optimizer on the trainable ones of `parameters`. Raises BadInput for what the preset refuses."""
    trained = [p for p in parameters if p.trainable]
    if job.implementation != "memopt":
        return _torch_adamw(job.implementation, trained)
    routes = optimizer_routes(job, trained)
    states = tuple(costs.route_bytes(route, route.shape) for route in routes)
    return OptimizerBytes(state=sum(states), scratch=_scratch(routes), by_parameter=states)


def optimizer_routes(job: TrainingJob, trained: Sequence[ParameterFact]) -> list[Route]:
    """What memopt's preset does with each parameter, in the order given."""
    assignments = resolve(job.optimizer, [_routed(p) for p in trained], **dict(job.optimizer_options))
    return [route for route, _ in routes_of(assignments)]


def _routed(p: ParameterFact) -> Routed:
    placeholder = nn.Parameter(torch.empty(p.shape, dtype=getattr(torch, p.dtype), device="meta"))
    return Routed(name=p.name, parameter=placeholder, role=p.role, parts=p.parts, why="", tied=p.tied)


def _torch_adamw(implementation: Implementation, trained: Sequence[ParameterFact]) -> OptimizerBytes:
    """Two moments in the parameter's type. Fused: no temporaries; foreach: one more copy of all parameters (the
    denominators); single: two tensors of the largest parameter (torch.optim.adamw; measured with MemTracker)."""
    sizes = [p.numel * ITEMSIZE[p.dtype] for p in trained]
    states = tuple(2 * n + _STEP_BYTES for n in sizes)
    temporaries = {"fused": 0, "foreach": sum(sizes), "single": 2 * max(sizes, default=0)}[implementation]
    return OptimizerBytes(state=sum(states), scratch=temporaries, by_parameter=states)


def _scratch(routes: Sequence[Route]) -> int:
    """The worst of the updates of all groups: groups are updated one after the other, parameters of one together."""
    groups: dict[tuple[Policy, ...], list[Route]] = {}
    for each in routes:
        groups.setdefault(tuple(routed.policy for routed in each.parts), []).append(each)
    return max((_group_scratch(group) for group in groups.values()), default=0)


def _group_scratch(routes: Sequence[Route]) -> int:
    copies = worst = 0
    alike: dict[tuple[Policy, tuple[int, ...]], int] = {}
    for each in routes:
        for routed in each.parts:
            shape = costs.part_shape(routed, each.shape)
            copied = 8 * prod(shape) if _is_copied(routed.part, each.shape) else 0
            copies += copied  # of weights and gradients, alive until the group is written back (optim.items)
            worst = max(worst, scratch.part_bytes(routed.policy, routed.part, shape) - copied)
            if routed.policy.rule == "muon" and routed.policy.projection is None:
                alike[routed.policy, shape] = alike.get((routed.policy, shape), 0) + 1
    for (policy, shape), count in alike.items():
        worst = max(worst, _muon_batch_bytes(policy, shape, count))
    return copies + worst


def _muon_batch_bytes(policy: Policy, shape: tuple[int, ...], count: int) -> int:
    """Matrices of one shape are orthogonalised together (memopt.optim.updates): the updates, their stack, what
    Newton-Schulz makes of it, and one decoded momentum."""
    elements = prod(shape)
    batch = max(1, min(count, BATCH_BYTES // (4 * elements)))
    each = newton_schulz.scratch_bytes(*shape[-2:], dtype=policy.ns_dtype or torch.float32)
    coded = 4 * elements if policy.codec != Codec.FP32 else 0
    return (2 if batch > 1 else 1) * 4 * elements * batch + batch * prod(shape[:-2]) * each + coded


def _is_copied(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether a part of a parameter is no contiguous piece of it (optim.items.matrix_of)."""
    if part.whole:
        return False
    return not part.view(torch.empty(shape, device="meta")).reshape(part.shape(shape)).is_contiguous() or (
        part.transposed
    )
