"""ThinK the slow and obvious way: everything is cached dense, and what is pruned is set to zero in every step.

One sequence at a time, no padding, loops over heads and channels. Set on a model with `zero_filled`, it works with
transformers' own DynamicCache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "reference_think"


@dataclass
class Layer:
    """What was chosen for a layer."""

    channels: list[list[int]] = field(default_factory=list)  # per KV head
    value_channels: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)  # of the prompt, per KV head
    prompt: int = 0
    seen: int = 0
    whole_from: int = 0  # the first token whose keys are whole
    last_fold: int = 0


@dataclass
class Plan:
    """The settings, and the state of every layer that is pruned."""

    key_keep: float = 0.6
    value_keep: float = 1.0
    observation: int = 32
    recent: int = 32
    fold: str = "keep"
    evict: int | None = None
    score: str = "joint"
    static: dict[int, list[list[int]]] | None = None
    pruned: set[int] | None = None  # None: every layer
    layers: dict[int, Layer] = field(default_factory=dict)


@contextmanager
def zero_filled(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Have `model` attend by the reference."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        index = module.layer_idx
        pruned = plan.pruned is None or index in plan.pruned
        state = plan.layers.get(index)
        first = pruned and state is None
        if pruned and not first:
            assert state is not None
            key, value, attention_mask = _without_pruned(plan, state, query, key, value, attention_mask)
        out = _dense(query, key, value, attention_mask, scaling, options.get("softcap"))
        if first:
            plan.layers[index] = _choose(plan, index, query, key, value, scaling)
        return out, None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, softcap: float | None) -> Tensor:
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    outputs = []
    for head in range(heads):
        scores = query[0, head] @ key[0, head // groups].T * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + (mask[0, 0] if mask.shape[1] == 1 else mask[0, head // groups])[:, : scores.shape[1]]
        outputs.append(torch.softmax(scores, -1) @ value[0, head // groups])
    return torch.stack(outputs, 1)[None]


def _count(dim: int, keep: float) -> int:
    return min(dim, 8 * math.ceil(math.ceil(keep * dim - 1e-9) / 8))


def _best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def _choose(plan: Plan, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Layer:
    heads, tokens, dim = key.shape[1:]
    groups = query.shape[1] // heads
    made = Layer(prompt=tokens, seen=tokens, whole_from=max(0, tokens - plan.recent), last_fold=tokens)
    observed = min(plan.observation, query.shape[2])
    for head in range(heads):
        stacked = [query[0, head * groups + g, -observed:] for g in range(groups)]
        # the window's attention, for values and eviction
        weights = []
        for window in stacked:
            scores = window @ key[0, head].T * scaling
            for i in range(observed):
                scores[i, tokens - observed + i + 1 :] = -torch.inf
            weights.append(torch.softmax(scores, -1))
        survivors = list(range(tokens))
        if plan.evict is not None and plan.evict < tokens:
            mass = sum(w.sum(0) for w in weights)
            pooled = [mass[max(0, i - 3) : i + 4].max().item() for i in range(tokens)]
            newest = max(plan.observation, plan.recent)
            for i in range(tokens - newest, tokens):
                pooled[i] = math.inf
            survivors = _best(pooled, plan.evict)
        made.tokens.append(survivors)
        alive = key[0, head, survivors]
        if plan.static is not None:
            made.channels.append(plan.static[index][head])
        elif plan.score == "joint":
            asking = [query[0, head * groups + g] for g in range(groups)]
            made.channels.append(
                jointly_kept(asking, key[0, head], alive, scaling, plan.recent, _count(dim, plan.key_keep))
            )
        else:
            norms = [
                sum(torch.outer(window[:, j], alive[:, j]).square().sum().item() for window in stacked)
                for j in range(dim)
            ]
            made.channels.append(_best(norms, _count(dim, plan.key_keep)))
        outputs = [w @ value[0, head] for w in weights]
        energies = [sum(o[:, j].square().sum().item() for o in outputs) for j in range(value.shape[3])]
        made.value_channels.append(_best(energies, _count(value.shape[3], plan.value_keep)))
    return made


def jointly_kept(
    queries: list[Tensor], key: Tensor, alive: Tensor, scaling: float, recent: int, count: int
) -> list[int]:
    """The greedy choice by the definition of its error: queries (T, D) of each head of the group, keys (T, D)."""
    rows, weights = [], []
    for asking in queries:
        scores = asking @ key.T * scaling
        for i in range(len(asking)):
            attention = torch.softmax(scores[i, : i + 1], -1)
            rows.append(asking[i])
            weights.append(attention[: max(0, i - recent + 1)].sum().item())
    if sum(weights) == 0:
        weights = [1.0] * len(weights)
    stacked, share = torch.stack(rows).double(), torch.tensor(weights, dtype=torch.float64)
    alive = alive.double()

    def lost(gone: list[int]) -> float:
        return ((stacked[:, gone] @ alive[:, gone].T).square() * share[:, None]).sum().item()

    kept = list(range(key.shape[1]))
    gone: list[int] = []
    while len(kept) > count:
        least = min(reversed(kept), key=lambda channel: lost([*gone, channel]))
        gone.append(least)
        kept.remove(least)
    return kept


def _without_pruned(
    plan: Plan, state: Layer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # the policy's own bookkeeping: what came in with this step, and whether it completes a block
    tokens, count = key.shape[2], query.shape[2]
    state.seen = tokens
    block = max(plan.recent, 32)
    if plan.fold == "prune" and tokens - state.last_fold >= block:
        state.whole_from, state.last_fold = tokens - plan.recent, tokens
    key, value = key.clone(), value.clone()
    seen = torch.zeros(1, key.shape[1], count, tokens)
    for head in range(key.shape[1]):
        dropped = sorted(set(range(key.shape[3])) - set(state.channels[head]))
        key[0, head, : state.whole_from][:, dropped] = 0.0
        dropped = sorted(set(range(value.shape[3])) - set(state.value_channels[head]))
        value[0, head][:, dropped] = 0.0
        for i in range(count):
            seen[0, head, i, tokens - count + i + 1 :] = -torch.inf
        gone = sorted(set(range(state.prompt)) - set(state.tokens[head]))
        seen[0, head, :, gone] = -torch.inf
    return key, value, seen
