"""Update rules as pure functions: a direction d from a gradient and the rule's states, all float32.

The weights follow `w <- (1 - lr * wd) * w - lr * d`, whatever the rule. `step` counts from 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch


class Granularity(StrEnum):
    """How much of a parameter one update must see at once."""

    ELEMENT = "element"
    BLOCK = "block"
    ROW = "row"
    MATRIX = "matrix"


@dataclass(frozen=True)
class Slot:
    """One state of a rule, of the shape of what the rule works on."""

    name: str
    signed: bool


EXP_AVG = Slot("exp_avg", signed=True)
EXP_AVG_SQ = Slot("exp_avg_sq", signed=False)
MOMENTUM = Slot("momentum_buffer", signed=True)


def adamw(
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> torch.Tensor:
    """AdamW's direction (Loshchilov & Hutter 2019, algorithm 2), any shape; updates both moments in place."""
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    return exp_avg.div(denominator).div_(1 - beta1**step)


def lion(grad: torch.Tensor, exp_avg: torch.Tensor, *, beta1: float, beta2: float) -> torch.Tensor:
    """Lion's direction (Chen et al. 2023, algorithm 2), any shape; updates the momentum in place."""
    direction = exp_avg.lerp(grad, 1 - beta1).sign_()
    exp_avg.lerp_(grad, 1 - beta2)
    return direction


def sgd(grad: torch.Tensor, momentum_buffer: torch.Tensor, *, momentum: float, nesterov: bool) -> torch.Tensor:
    """SGD with momentum as torch defines it (Sutskever et al. 2013), any shape; updates the momentum in place."""
    momentum_buffer.mul_(momentum).add_(grad)
    return grad.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer.clone()
