"""Attention over a thin cache: exact scores of what is kept, without ever putting the dropped channels back.

`keys` holds the kept channels of all tokens; `tail` the dropped channels of the newest tokens, which therefore are
whole. Scores are q_kept · keysᵀ, plus q_dropped · tailᵀ on the columns of the tail: one softmax, nothing scattered to
full width.

Shapes: B batch, H query heads, K key-value heads, G = H / K, Q queries, T cached tokens, R tokens of the tail, D
channels of a head of which C are kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from memopt.kv.channels import spread, take_query
from memopt.units import MiB

_SCORES_BYTES = 64 * MiB
"""Scores held at a time; long steps after pruning (a second turn) go through in blocks of queries."""


def thin_attention(
    query: Tensor,  # (B, H, Q, D)
    keys: Iterable[Tensor],  # pieces (B, K, n, C) in order, T rows in all
    tail: Tensor,  # (B, K, R, D - C), the last R tokens
    values: Iterable[Tensor],  # pieces (B, K, n, Cv) in order, T rows in all
    order: Tensor,  # (B, K, D) int, the kept channels, then the dropped ones
    *,
    scaling: float,
    mask: Tensor | None = None,  # (B or 1, 1, K or H, Q, T) broadcastable; bool (True: seen) or added to the scores
    softcap: float | None = None,
    value_channels: Tensor | None = None,  # (B, K, Cv), where the values' channels belong in a head
    value_dim: int | None = None,  # channels of a head of the output, with value_channels
) -> tuple[Tensor, Tensor]:
    """The output (B, Q, H, Dv), contiguous, and the weights (B, H, Q, T) in float32.

    `mask` broadcasts to (B, K, G, Q, T).
    """
    batch, heads, count, dim = query.shape
    kv_heads = order.shape[1]
    groups = heads // kv_heads
    ordered = take_query(query * scaling, order.long())  # (B, K, G·Q, D)
    kept = dim - tail.shape[-1]
    scores = _scores(ordered, kept, keys, tail).view(batch, kv_heads, groups, count, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = _masked(scores, mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    flat = weights.view(batch * kv_heads, groups * count, -1).to(query.dtype)
    out = _weighted(flat, values).view(batch, kv_heads, groups * count, -1)
    if value_channels is not None:
        assert value_dim is not None
        out = spread(out, value_channels.long(), value_dim)
    out = out.view(batch, heads, count, -1).transpose(1, 2).contiguous()
    return out, weights.view(batch, heads, count, -1)


def queries_at_once(batch: int, heads: int, tokens: int) -> int:
    """How many queries fit a block of scores of 64 MiB."""
    return max(1, _SCORES_BYTES // (4 * batch * heads * max(1, tokens)))


def causal_mask(queries: int, tokens: int, device: torch.device) -> Tensor:
    """(Q, T) bool: the last query sees all `tokens`, the one before all but the last."""
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)


def _scores(ordered: Tensor, kept: int, keys: Iterable[Tensor], tail: Tensor) -> Tensor:
    query = ordered[..., :kept].flatten(0, 1)
    pieces = [torch.bmm(query, piece.flatten(0, 1).transpose(1, 2)) for piece in keys]
    scores = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
    rows = tail.shape[2]
    if rows and kept < ordered.shape[-1]:
        dropped = ordered[..., kept:].flatten(0, 1)
        scores[..., scores.shape[-1] - rows :].baddbmm_(dropped, tail.flatten(0, 1).transpose(1, 2))
    return scores


def _weighted(weights: Tensor, values: Iterable[Tensor]) -> Tensor:
    out, start = None, 0
    for piece in values:
        end = start + piece.shape[2]
        part = torch.bmm(weights[..., start:end], piece.flatten(0, 1))
        out = part if out is None else out + part
        start = end
    assert out is not None, "attention over an empty cache"
    return out


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        # the least number, not -inf: a padded query that sees nothing must not become NaN
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask
