"""Attention over pages whose keys are thinner than their values: the plain torch path of a paged server.

A page holds, per head and token, the kept key channels followed by the whole value. Keys of the last tokens can be
whole all the same: their dropped channels come apart (`Suffix`) and are added to the scores, which are then exact. The
numbers are computed in float32, whatever the pages hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SCORE_BYTES = 64 * 2**20
"""Scores that are in memory together; queries are taken in tiles of as many rows as this allows."""


@dataclass(frozen=True, kw_only=True)
class Suffix:
    """The dropped key channels of the last R tokens of a sequence."""

    keys: torch.Tensor  # (R, H_kv, D - D_kept)
    present: torch.Tensor  # (R,) bool; False where the channels are gone, and the kept ones alone count


def pick(states: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """(T, H, D) and channel numbers (H_kv, n) -> (T, H, n); query heads take the channels of their key-value head."""
    heads, groups = states.shape[1], channels.shape[0]
    index = channels.repeat_interleave(heads // groups, dim=0) if heads != groups else channels
    return states.gather(-1, index.expand(states.shape[0], -1, -1))


def write_rows(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Put rows (T, H, C) at their slots (T,) of the pages (B, H, N, C), in place; a negative slot is padding."""
    real = slots >= 0
    places, page_tokens = slots[real].long(), cache.shape[2]
    cache[places // page_tokens, :, places % page_tokens] = rows[: len(slots)][real].to(cache.dtype)


def gather_rows(cache: torch.Tensor, blocks: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first `tokens` rows of the sequence whose pages are `blocks`, from pages (B, H, N, C): (H, tokens, C)."""
    needed = -(-tokens // cache.shape[2])
    pages = cache[blocks[:needed].long()]  # (n, H, N, C)
    return pages.transpose(0, 1).flatten(1, 2)[:, :tokens]


def thin_attention(
    query: torch.Tensor,  # (Q, H, D), the last Q tokens of the sequence
    rows: torch.Tensor,  # (H_kv, T, D_kept + D): the pages' content of all T tokens
    kept: torch.Tensor,  # (H_kv, D_kept)
    dropped: torch.Tensor,  # (H_kv, D - D_kept)
    *,
    scale: float,
    suffix: Suffix | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q tokens to all T: (Q, H, D) in the dtype of `query`."""
    queries, heads, width = query.shape
    groups, tokens, keep = rows.shape[0], rows.shape[1], kept.shape[1]
    keys = rows[..., :keep].float().transpose(1, 2)  # (H_kv, D_kept, T)
    values = rows[..., keep:].float()
    thin, rest = _by_group(pick(query, kept), groups), None
    if suffix is not None and keep < width:
        extra = (suffix.keys.float() * suffix.present[:, None, None]).permute(1, 2, 0)  # (H_kv, D - D_kept, R)
        rest = _by_group(pick(query, dropped), groups)
    out = torch.empty(groups, heads // groups, queries, width, dtype=torch.float32)
    tile = max(1, _SCORE_BYTES // (4 * heads * tokens))
    first = tokens - queries
    for start in range(0, queries, tile):
        stop = min(queries, start + tile)
        scores = _scores(thin[:, :, start:stop], keys)
        if rest is not None:
            scores[..., tokens - extra.shape[2] :] += _scores(rest[:, :, start:stop], extra)
        positions = torch.arange(first + start, first + stop)
        future = torch.arange(tokens)[None] > positions[:, None]  # (q, T)
        weights = scores.mul_(scale).masked_fill_(future, float("-inf")).softmax(-1)
        out[:, :, start:stop] = (weights.flatten(1, 2) @ values).view(groups, -1, stop - start, width)
    return out.permute(2, 0, 1, 3).reshape(queries, heads, width).to(query.dtype)


def dense_attention(
    query: torch.Tensor,  # (Q, H, D)
    key: torch.Tensor,  # (Q, H_kv, D)
    value: torch.Tensor,  # (Q, H_kv, D)
    *,
    scale: float,
) -> torch.Tensor:
    """Causal attention of a whole prompt to itself with whole keys: (Q, H, D)."""
    heads, groups = query.shape[1], key.shape[1]
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=heads != groups
    )
    return out[0].transpose(0, 1)


def _by_group(query: torch.Tensor, groups: int) -> torch.Tensor:
    """(Q, H, d) -> (H_kv, H / H_kv, Q, d), float32."""
    return query.float().view(query.shape[0], groups, -1, query.shape[-1]).permute(1, 2, 0, 3)


def _scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(H_kv, g, q, d) by (H_kv, d, T) -> (H_kv, g, q, T)."""
    groups, shared, rows, width = query.shape
    return (query.reshape(groups, shared * rows, width) @ keys).view(groups, shared, rows, -1)
