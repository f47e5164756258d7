"""GaLore as galore-torch 1.0 computes it, one matrix at a time: what the original mode must give.

The basis is the SVD of the current gradient, taken when the number of steps made so far is a multiple of the gap; the
moments stay what they are when it changes; Adam is the one of old Hugging Face versions, whose eps is added before
the bias is corrected; no weight decay. Fira's residual, column by column, is here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def train(
    weights: torch.Tensor,  # (m, n)
    gradient: Callable[[torch.Tensor, int], torch.Tensor],
    *,
    steps: int,
    rank: int,
    gap: int,
    scale: float,
    proj_type: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[torch.Tensor]:
    """The weights after every step; `gradient` is called with the weights and the steps made so far."""
    weights = weights.clone()
    history = []
    m = v = left = right = None
    for done in range(steps):
        grad = gradient(weights, done)
        if done % gap == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            left, right = u[:, :rank], vh[:rank, :]
        assert left is not None and right is not None
        uses_left, uses_right = sides(proj_type, tall=grad.shape[0] >= grad.shape[1])
        low = grad
        low = left.T @ low if uses_left else low
        low = low @ right.T if uses_right else low
        m = torch.zeros_like(low) if m is None else m
        v = torch.zeros_like(low) if v is None else v
        m = beta1 * m + (1 - beta1) * low
        v = beta2 * v + (1 - beta2) * low * low
        step = done + 1
        step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        update = m / (v.sqrt() + eps)
        update = left @ update if uses_left else update
        update = update @ right if uses_right else update
        weights = weights - step_size * scale * update
        history.append(weights)
    return history


def sides(proj_type: str, *, tall: bool) -> tuple[bool, bool]:
    """Whether the gradient is multiplied from the left, and from the right."""
    return {
        "std": (not tall, tall),
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


def fira_residual(
    grad: torch.Tensor,  # (m, n)
    left: torch.Tensor,  # (m, r), orthonormal columns
    direction: torch.Tensor,  # (r, n)
    last_norm: float | None,
) -> tuple[torch.Tensor, float]:
    """Fira's S of this step, limited in growth, and its norm, for a projection from the left."""
    low = left.T @ grad
    outside = grad - left @ low
    for column in range(grad.shape[1]):
        outside[:, column] *= float(direction[:, column].norm()) / float(low[:, column].norm())
    norm = float(outside.norm())
    if last_norm is not None and norm / last_norm > 1.01:
        outside *= 1.01 * last_norm / norm
        norm = 1.01 * last_norm
    return outside, norm


def rotated_second(
    v: torch.Tensor,  # (r, n)
    m: torch.Tensor,  # (r, n)
    turn: torch.Tensor,  # (r, r)
    *,
    beta1: float,
    beta2: float,
    made: int,
) -> torch.Tensor:
    """LDAdam's second moment in new coordinates, entry by entry, after `made` steps."""
    unbiased = 1 - beta2**made
    out = torch.zeros_like(v)
    for i in range(v.shape[0]):
        for column in range(v.shape[1]):
            mean = m[:, column] / (1 - beta1**made)
            variance = v[:, column] / unbiased - mean * mean
            total = float((turn[i] * turn[i] * variance).sum()) + float((turn[i] * mean).sum()) ** 2
            out[i, column] = abs(total) * unbiased
    return out
