"""Which channels may go together: the query-driven score of a whole set of channels, and which queries ask.

ThinK's score is one channel's part of the scores alone. What dropping a set R changes is, over queries q and keys k,

    Σ_q w_q Σ_k (q_R · k_R)² = 1_Rᵀ (A ∘ B) 1_R,    A = Σ_q w_q q qᵀ,    B = Σ_k k kᵀ,

whose diagonal is ThinK's score (with w = 1): channels can cancel, or add up. R is built by dropping, one at a time, the
channel that adds least to it. w_q is the attention that a query pays to tokens farther back than the `recent` newest,
which stay whole: a query that looks only at its neighbours loses nothing by what is dropped far away, and most queries
of a text do. So all of the prompt is asked, up to `ASKED` queries of it, evenly apart, and not its end alone.

Shapes: B batch, H query heads, K key-value heads, G = H / K, W queries, T tokens, D channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memopt.kv.window import Window, continued, window_weights

ASKED = 256
"""At most so many queries of a prompt are asked: their attention costs 2 · ASKED / T of the prompt's own."""
_AT_ONCE = 32
"""Queries whose attention exists at a time: float32, over all tokens."""


def observe_spread(query: Tensor, real: Tensor | None, start: int, count: int, past: Window | None = None) -> Window:
    """Real queries of each row evenly apart, at most `count`, out of `past` and the new `query` (B, H, Q, D).

    Every s-th, counted from the row's first real token, with s the smallest power of two that leaves so few: the same
    ones however the prompt came in, and wherever its padding stands. `start` is the position of the first new query;
    `real` (B, Q) tells padding, None that there is none.
    """
    whole = continued(query, real, start, past)
    position, real = whole.position, whole.real
    # the first real token is a multiple of every step, so `past` still has it
    first = position.masked_fill(~real, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    rank = (position - first) * real
    length = rank.amax(1, keepdim=True) + 1
    step = torch.ones_like(length)
    while bool((length > step * count).any()):
        step = torch.where(length > step * count, step * 2, step)
    wanted = real & (rank % step == 0)
    return whole.last(wanted, int(wanted.sum(1).amax().clamp(min=1)))


def far_attention(asked: Window, key: Tensor, real: Tensor | None, scaling: float, recent: int, head: int) -> Tensor:
    """The share of its attention that each query of KV head `head` pays beyond `recent` tokens: (B, G, W) float32.

    Where no query of a row looks that far (a prompt that is not longer), all of its real queries count the same.
    """
    tokens = torch.arange(key.shape[2], device=key.device)
    shares = []
    for begin in range(0, asked.query.shape[2], _AT_ONCE):
        part = Window(
            query=asked.query[:, :, begin : begin + _AT_ONCE],
            position=asked.position[:, begin : begin + _AT_ONCE],
            real=asked.real[:, begin : begin + _AT_ONCE],
        )
        far = tokens <= (part.position - recent)[..., None]  # (B, W, T)
        shares.append((window_weights(part, key, real, scaling, head) * far[:, None]).sum(-1))
    share = torch.cat(shares, -1)
    nobody = share.sum((1, 2), keepdim=True) == 0
    return torch.where(nobody, asked.real[:, None].to(share.dtype), share)


def set_errors(
    asked: Window,
    key: Tensor,  # (B, K, T, D), where the queries look, after rotary embedding
    real: Tensor | None,  # (B, T) bool, False at padding
    *,
    scaling: float,
    recent: int,
    pruned: Tensor | None = None,  # (B, K, N, D), the keys that lose channels, if not all of `key`
    pruned_real: Tensor | None = None,  # (B, K, N) bool
) -> Tensor:
    """A ∘ B of every KV head, (B, K, D, D) float32, by means over queries and tokens instead of sums."""
    kv_heads = key.shape[1]
    groups = asked.query.shape[1] // kv_heads
    lost = key if pruned is None else pruned
    there = real if pruned is None else pruned_real
    errors = []
    for head in range(kv_heads):
        share = far_attention(asked, key, real, scaling, recent, head)
        query = (asked.query[:, head * groups : (head + 1) * groups].float() * share.sqrt()[..., None]).flatten(1, 2)
        count = asked.real.sum(1).clamp(min=1)[:, None, None]
        ours = lost[:, head].float()  # one head at a time: no float32 copy of a layer's keys
        tokens: Tensor | int = ours.shape[1]
        if there is not None:
            present = there if there.dim() == 2 else there[:, head]
            ours = ours * present[..., None]
            tokens = present.sum(1).clamp(min=1)[:, None, None]
        errors.append((query.transpose(1, 2) @ query / count) * (ours.transpose(1, 2) @ ours / tokens))
    return torch.stack(errors, 1)


def drop_order(errors: Tensor, count: int) -> Tensor:
    """Scores that keep what a greedy choice would: errors (..., D, D), symmetric, -> (..., D) float32.

    `count` channels are dropped one at a time, each the one that adds least to the error of all dropped so far (of
    equals the last); they score by their turn, from 0, and all others infinity.
    """
    dim = errors.shape[-1]
    flat = errors.reshape(-1, dim, dim)
    added = flat.diagonal(dim1=1, dim2=2).clone()
    scores = torch.full_like(added, math.inf)
    for turn in range(count):
        # of equals argmin may give any; the order of channels settles it
        least = added.amin(1, keepdim=True)
        channel = dim - 1 - (added == least).flip(1).to(torch.int8).argmax(1, keepdim=True)
        scores.scatter_(1, channel, float(turn))
        added += 2 * flat.gather(1, channel[..., None].expand(-1, 1, dim))[:, 0]
        added.scatter_(1, channel, math.inf)
    return scores.reshape(errors.shape[:-1])
