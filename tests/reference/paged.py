"""Attention with thin keys, one score at a time."""

from __future__ import annotations

import torch


def causal(
    query: torch.Tensor,  # (Q, H, D), the last Q tokens
    keys: torch.Tensor,  # (T, H_kv, D)
    values: torch.Tensor,  # (T, H_kv, D)
    kept: torch.Tensor,  # (H_kv, D_kept)
    whole: torch.Tensor,  # (T,), whether a token's dropped channels count
    scale: float,
) -> torch.Tensor:
    """(Q, H, D)."""
    queries, heads, _ = query.shape
    tokens, groups, width = keys.shape
    out = torch.zeros(queries, heads, values.shape[-1])
    for h in range(heads):
        group = h // (heads // groups)
        mask = torch.zeros(width).index_fill(0, kept[group], 1.0)
        for i in range(queries):
            seen = tokens - queries + i + 1
            scores = torch.stack(
                [(query[i, h] * keys[t, group] * (1.0 if whole[t] else mask)).sum() * scale for t in range(seen)]
            )
            out[i, h] = scores.softmax(0) @ values[:seen, group]
    return out
