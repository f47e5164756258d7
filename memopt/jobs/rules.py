"""The update rule of every parameter of a streamed run, from the preset and the options of its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn

from memopt.jobs.config import OPTIMIZER_OPTIONS, FinetuneConfig
from memopt.optim import native
from memopt.optim.chunked import ChunkRule
from memopt.optim.codecs import Codec
from memopt.optim.grouping import routes_of
from memopt.optim.items import Route
from memopt.optim.matrix_rule import MatrixRule
from memopt.optim.presets import PRESETS, Assignment, Policy, resolve
from memopt.optim.routing import route
from memopt.optim_types import UpdateRule

_RESOLVED_AS = {"proj_scale": "scale"}
"""What `presets.resolve` calls a setting, where it has another name."""


@dataclass(frozen=True)
class Rules:
    """`of[name]` is the rule of a trained parameter; `notes` say what was chosen."""

    of: Mapping[str, UpdateRule]
    notes: tuple[str, ...]


def update_rules(config: FinetuneConfig, module: nn.Module) -> Rules:
    """The rules of all parameters of `module` with a gradient. Raises BadInput."""
    options: dict[str, Any] = {_RESOLVED_AS.get(name, name): getattr(config, name) for name in OPTIMIZER_OPTIONS}
    resolved = resolve(config.optimizer, route(module), state_dtype=config.optim_state_dtype, eps=config.eps, **options)
    assignments = [replace(each, policy=_with_betas(each.policy, config)) for each in resolved]
    rules = {made.name: _rule(made, config) for made, _ in routes_of(assignments)}
    return Rules(rules, tuple(_notes(config, assignments, rules)))


def _with_betas(policy: Policy, config: FinetuneConfig) -> Policy:
    first, second = policy.betas
    betas = (first if config.beta1 is None else config.beta1, second if config.beta2 is None else config.beta2)
    return replace(policy, betas=betas)


def _rule(made: Route, config: FinetuneConfig) -> UpdateRule:
    policy = made.parts[0].policy
    if len(made.parts) > 1 or policy.shape_aware:
        return MatrixRule(route=made, weight_decay=config.weight_decay, seed=config.seed)
    return ChunkRule(
        rule=policy.rule,
        codec=policy.codec,
        beta1=policy.betas[0],
        beta2=policy.betas[1],
        eps=policy.eps,
        momentum=policy.momentum,
        nesterov=policy.nesterov,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )


def _notes(config: FinetuneConfig, assignments: Sequence[Assignment], rules: Mapping[str, UpdateRule]) -> Sequence[str]:
    preset = PRESETS[config.optimizer]
    sizes: dict[str, int] = {}
    roles: dict[str, dict[str, None]] = {}
    for each in assignments:
        label = each.policy.label
        sizes[label] = sizes.get(label, 0) + _numel(each)
        roles.setdefault(label, {})[str(each.part.role)] = None
    total = sum(sizes.values())
    shares = [f"{label} for {100 * n / total:.3g} % ({', '.join(roles[label])})" for label, n in sizes.items()]
    seen = {each.routed.name: each.routed.parameter.numel() for each in assignments}
    state = sum(rules[name].record_bytes(numel) for name, numel in seen.items())
    notes = [
        f"optimizer {config.optimizer}: {'; '.join(shares)} of the parameters",
        f"optimizer state takes {state / total:.2f} bytes per parameter, master weights are float32",
    ]
    low_rank = preset.main.projection is not None
    wanted = [each for each in assignments if low_rank and each.part.role in preset.roles]
    full = sum(each.policy.projection is None for each in wanted)
    if full:
        notes.append(f"{full} of {len(wanted)} matrices are no larger than the rank and are trained at full rank")
    if preset.shape_aware and not any(each.policy.shape_aware for each in assignments):
        how = " and ".join(sizes)
        notes.append(
            f"optimizer {config.optimizer} finds no matrix of a hidden layer to work on: all is trained by {how}"
        )
    if any(isinstance(rule, ChunkRule) and rule.codec == Codec.INT8 for rule in rules.values()):
        notes.append(
            "blocks of 8-bit states lie along flat vectors: where rows are no multiple of 256, an optimizer in memory "
            "cuts them elsewhere"
        )
    if any(each.policy.codec == Codec.INT8 for each in assignments) and not native.available():
        notes.append(f"8-bit steps are slow: {native.why_not()}")
    return notes


def _numel(each: Assignment) -> int:
    return prod(each.part.shape(tuple(each.routed.parameter.shape)))
