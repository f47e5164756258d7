"""Update rules one element at a time in Python's own floats (float64), straight from the papers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    m: dict[int, float] = field(default_factory=dict)
    v: dict[int, float] = field(default_factory=dict)
    t: int = 0

    def step(self, weights: list[float], grads: list[float]) -> list[float]:
        """The new weights."""
        self.t += 1
        out = []
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            self.m[i] = self.beta1 * self.m.get(i, 0.0) + (1 - self.beta1) * g
            self.v[i] = self.beta2 * self.v.get(i, 0.0) + (1 - self.beta2) * g * g
            m_hat = self.m[i] / (1 - self.beta1**self.t)
            v_hat = self.v[i] / (1 - self.beta2**self.t)
            out.append(w - self.lr * self.weight_decay * w - self.lr * m_hat / (math.sqrt(v_hat) + self.eps))
        return out


@dataclass
class Lion:
    """Chen et al. 2023, algorithm 2."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    m: dict[int, float] = field(default_factory=dict)

    def step(self, weights: list[float], grads: list[float]) -> list[float]:
        """The new weights."""
        out = []
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            old = self.m.get(i, 0.0)
            c = self.beta1 * old + (1 - self.beta1) * g
            sign = 0.0 if c == 0 else math.copysign(1.0, c)
            out.append(w - self.lr * (sign + self.weight_decay * w))
            self.m[i] = self.beta2 * old + (1 - self.beta2) * g
        return out


@dataclass
class Sgd:
    """Sutskever et al. 2013 as torch.optim.SGD has it (no dampening), with decoupled decay."""

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    b: dict[int, float] = field(default_factory=dict)

    def step(self, weights: list[float], grads: list[float]) -> list[float]:
        """The new weights."""
        out = []
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            self.b[i] = self.momentum * self.b.get(i, 0.0) + g
            d = g + self.momentum * self.b[i] if self.nesterov else self.b[i]
            out.append((1 - self.lr * self.weight_decay) * w - self.lr * d)
        return out
