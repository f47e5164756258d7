"""A tiny language model with every role, batches for it, and short runs of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memopt.jobs.optimizer import build_optimizer
from memopt.optim.optimizer import Optimizer

VOCAB, WIDTH, FFN, SEQ = 100, 72, 136, 6
SMALL_RANK: dict[str, Any] = {"rank": 5, "update_proj_gap": 3}


class Norm(nn.Module):
    """A norm, by its class's name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight)


class Attention(nn.Module):
    """Grouped queries without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 3, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 3, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, 24).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, s, WIDTH))


class Mlp(nn.Module):
    """Gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, FFN, bias=False)
        self.up_proj = nn.Linear(WIDTH, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One block."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(WIDTH), Norm(WIDTH)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLM(nn.Module):
    """Two blocks, untied head; a causal language model's parts without a framework."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = Norm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean loss of predicting each token from those before it; tokens (B, S) int64."""
        x = self.embed_tokens(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return functional.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyLM:
    """The same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyLM().to(dtype)


def tokens(step: int, rows: int = 4) -> torch.Tensor:
    """The batch of a step, (rows, SEQ)."""
    return torch.randint(VOCAB, (rows, SEQ), generator=torch.Generator().manual_seed(1000 + step))


def options_of(preset: str) -> dict[str, Any]:
    """A rank that fits the tiny model, and a gap that refreshes within a short run."""
    return dict(SMALL_RANK) if "galore" in preset else {}


def built(model: nn.Module, preset: str, **options: Any) -> Optimizer:
    """`build_optimizer` at tiny sizes."""
    return build_optimizer(model, preset, **{"lr": 1e-2, **options_of(preset), **options})


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[int] | range,
    *,
    micro: int = 1,
    before_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """The losses of these steps; each batch in `micro` equal parts."""
    losses = []
    for step in steps:
        total = 0.0
        for part in tokens(step).chunk(micro):
            loss = model(part) / micro
            loss.backward()
            total += loss.item()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def weights(model: nn.Module) -> torch.Tensor:
    """All parameters, one after the other."""
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])
