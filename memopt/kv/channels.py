"""Which channels of the cached keys (and values) matter to the queries: scores and choice.

ThinK (arXiv 2407.21018): drop the channels j of a head whose part of the scores, ||Q[:, j] K[:, j]ᵀ||_F, is smallest.
That norm is ||Q[:, j]||·||K[:, j]||, so no product of queries and keys is needed. With grouped queries, the norm over
the stacked queries of the group is exactly the sum of the group's query energies times the key energy: one choice per
KV head.

Shapes: B batch, H query heads, K key-value heads, G = H / K, Q queries, T cached tokens, D channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memopt.errors import BadInput


def kept_count(head_dim: int, keep: float, *, multiple: int = 8) -> int:
    """How many of `head_dim` channels stay for a share `keep`: ceil(keep · D), rounded up to `multiple`, at most D.

    Whole multiples keep rows aligned for vector loads and let kernels divide.

    Raises:
        BadInput: `keep` is outside (0, 1].
    """
    if not 0.0 < keep <= 1.0:
        raise BadInput(f"keep = {keep}: the share of channels to keep must lie in (0, 1]")
    if head_dim < 1 or multiple < 1:
        raise BadInput(f"head_dim = {head_dim}, multiple = {multiple}: both must be at least 1")
    # the tolerance keeps 0.6 * 80 = 48.00000000000001 from becoming 49
    wanted = max(1, math.ceil(keep * head_dim - 1e-9))
    return min(head_dim, -(-wanted // multiple) * multiple)


def energy(x: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean square of every channel over the real tokens, in float32: (..., N, D) -> (..., D).

    `real` is bool, (B, N) for all heads or (B, K, N); a row without real tokens gives zeros.
    """
    # the norm accumulates in float32 as it reads: no squares of the size of x
    if real is None:
        whole: Tensor = torch.linalg.vector_norm(x, dim=-2, dtype=torch.float32).square()
        return whole / x.shape[-2]
    weight = (real if real.dim() == 3 else real[:, None])[..., None]
    total: Tensor = torch.linalg.vector_norm(x * weight, dim=-2, dtype=torch.float32).square()
    return total / weight.sum(-2).clamp(min=1)


def group_energy(query_energy: Tensor, kv_heads: int) -> Tensor:
    """Energies of query heads (B, H, D) summed over the group of each KV head: (B, K, D)."""
    batch, heads, dim = query_energy.shape
    if heads % kv_heads:
        raise BadInput(f"{heads} query heads do not divide into {kv_heads} key-value heads")
    return query_energy.view(batch, kv_heads, heads // kv_heads, dim).sum(2)


def channel_scores(
    query: Tensor,  # (B, H, Q, D), the observed queries, after rotary embedding
    key: Tensor,  # (B, K, T, D), all cached keys, after rotary embedding
    *,
    query_real: Tensor | None = None,  # (B, Q) bool, False at padding
    key_real: Tensor | None = None,  # (B, T) or (B, K, T) bool, False at padding
) -> Tensor:
    """ThinK's score of every channel, (B, K, D) float32: the squared Frobenius norm, by means instead of sums.

    Means make the scores of prompts of different lengths comparable, so that static choices can average them.
    """
    return group_energy(energy(query, query_real), key.shape[1]) * energy(key, key_real)


def choose(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, rising: (..., D) -> (..., count) int64. Ties go to the lower index."""
    dim = scores.shape[-1]
    if not 1 <= count <= dim:
        raise BadInput(f"{count} channels to keep of {dim}")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values


def complement(kept: Tensor, head_dim: int) -> Tensor:
    """The channels not in `kept`, in rising order: (..., N) -> (..., head_dim - N)."""
    free = torch.ones(*kept.shape[:-1], head_dim, dtype=torch.bool, device=kept.device).scatter(-1, kept, False)
    return free.nonzero()[:, -1].view(*kept.shape[:-1], head_dim - kept.shape[-1])


def take(x: Tensor, channels: Tensor) -> Tensor:
    """The given channels of every token: x (B, K, N, D), channels (B or 1, K, C) -> (B, K, N, C), contiguous."""
    return x.gather(-1, channels[:, :, None, :].expand(x.shape[0], -1, x.shape[2], -1))


def take_query(query: Tensor, channels: Tensor) -> Tensor:
    """The channels of each query head's KV head: query (B, H, Q, D), channels (B or 1, K, C) -> (B, K, G * Q, C).

    Rows of one KV head are ordered by query head, then by query.
    """
    batch, heads, count, dim = query.shape
    kv_heads = channels.shape[1]
    return take(query.reshape(batch, kv_heads, heads // kv_heads * count, dim), channels)


def spread(x: Tensor, channels: Tensor, head_dim: int) -> Tensor:
    """The reverse of `take`: (B, K, N, C) into (B, K, N, head_dim), zeros elsewhere."""
    out = x.new_zeros(*x.shape[:-1], head_dim)
    return out.scatter_(-1, channels[:, :, None, :].expand(x.shape[0], -1, x.shape[2], -1), x)


def last_real(real: Tensor, count: int) -> Tensor:
    """Positions of each row's last `count` real tokens, in order: real (B, N) bool -> (B, min(count, N)) int64.

    A row with fewer has positions of padding in front.
    """
    # a stable sort puts padding first and leaves the real tokens in order
    return real.to(torch.int8).sort(dim=-1, stable=True).indices[:, -count:]
