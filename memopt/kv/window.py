"""What the last queries of a prompt look at: the basis of every choice about its tokens and channels.

Shapes: B batch, H query heads, K key-value heads, G = H / K, W queries of the window, T tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.kv.channels import energy, group_energy, last_real

POOL = 7
"""Tokens over which eviction spreads attention, SnapKV's kernel (arXiv 2404.14469): neighbours of what matters stay."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The observed queries, after rotary embedding, and where they stand."""

    query: Tensor  # (B, H, W, D)
    position: Tensor  # (B, W) int64, the token each query belongs to
    real: Tensor  # (B, W) bool, False at padding

    def tensors(self) -> list[Tensor]:
        """Everything that holds memory."""
        return [self.query, self.position, self.real]

    def last(self, real: Tensor, count: int) -> Window:
        """The last `count` queries of each row that are `real` (B, W), in order; a row with fewer has padding too."""
        chosen = last_real(real, count)
        index = chosen[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        query, position = self.query.gather(2, index), self.position.gather(1, chosen)
        return Window(query=query, position=position, real=real.gather(1, chosen))


def continued(query: Tensor, real: Tensor | None, start: int, past: Window | None) -> Window:
    """All queries of `past`, then the new `query` (B, H, Q, D), whose first is at position `start`.

    `real` (B, Q) tells padding, None that there is none.
    """
    batch, _, new, _ = query.shape
    position = torch.arange(start, start + new, device=query.device).expand(batch, -1)
    if real is None:
        real = torch.ones(batch, new, dtype=torch.bool, device=query.device)
    if past is not None:
        query = torch.cat([past.query, query], 2)
        position = torch.cat([past.position, position], 1)
        real = torch.cat([past.real, real], 1)
    return Window(query=query, position=position, real=real)


def observe(query: Tensor, real: Tensor | None, start: int, count: int, past: Window | None = None) -> Window:
    """The last `count` real queries of each row, out of `past` and the new `query` (B, H, Q, D).

    `start` is the position of the first new query; `real` (B, Q) tells padding, None that there is none.
    """
    whole = continued(query, real, start, past)
    return whole.last(whole.real, count)


def window_weights(window: Window, key: Tensor, real: Tensor | None, scaling: float, head: int) -> Tensor:
    """Attention of the window's queries of KV head `head` over the keys (B, K, T, D), causal: (B, G, W, T) float32.

    Padding gives and gets nothing.
    """
    groups = window.query.shape[1] // key.shape[1]
    query = window.query[:, head * groups : (head + 1) * groups].float() * scaling
    scores = query @ key[:, head].float().transpose(1, 2)[:, None]  # (B, G, W, T)
    tokens = torch.arange(key.shape[2], device=key.device)
    seen = tokens <= window.position[..., None]  # (B, W, T)
    if real is not None:
        seen = seen & real[:, None, :]
    scores = scores.masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    return torch.softmax(scores, -1) * (seen.any(-1) & window.real)[:, None, :, None] * seen[:, None]


def value_scores(window: Window, key: Tensor, value: Tensor, real: Tensor | None, scaling: float) -> Tensor:
    """Energy of every value channel in the window's outputs, (B, K, Dv) float32: what dropping it would lose.

    Not the energy of the values alone: a channel that is large only where nobody looks costs nothing.
    """
    outputs = []
    for head in range(key.shape[1]):
        weights = window_weights(window, key, real, scaling, head)
        outputs.append(weights @ value[:, head].float()[:, None])  # (B, G, W, Dv)
    return group_energy(energy(torch.cat(outputs, 1), window.real), key.shape[1])


def surviving_tokens(
    window: Window, key: Tensor, real: Tensor | None, *, capacity: int, newest: int, scaling: float
) -> Tensor:
    """SnapKV's choice for every KV head: positions (B, K, capacity) int64, padding first, then rising.

    The `newest` real tokens always stay; the others by the attention they get from the window, summed over its queries
    and the head's group and spread over their neighbours.
    """
    batch, heads, tokens, _ = key.shape
    present = real if real is not None else torch.ones(batch, tokens, dtype=torch.bool, device=key.device)
    after = present.flip(1).cumsum(1).flip(1)  # real tokens from here to the end
    always = present & (after <= newest)
    chosen = []
    for head in range(heads):
        mass = window_weights(window, key, real, scaling, head).sum((1, 2))  # (B, T)
        pooled = torch.nn.functional.max_pool1d(mass[:, None], POOL, stride=1, padding=POOL // 2)[:, 0]
        pooled = pooled.masked_fill(~present, -1.0).masked_fill(always, torch.inf)
        best = pooled.sort(dim=-1, descending=True, stable=True).indices[:, :capacity]
        # padding goes in front, so that the newest tokens are the last rows wherever the padding was
        rank = torch.where(present.gather(1, best), best, best - tokens)
        chosen.append(rank.sort(-1).values % tokens)
    return torch.stack(chosen, 1)
