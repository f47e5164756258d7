"""The slow, obvious training loop: the whole model in memory, torch.optim.AdamW, micro-batches one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn


def train_in_memory(
    model: nn.Module,
    steps: Sequence[Sequence[Mapping[str, torch.Tensor]]],
    *,
    lr: Callable[[int], float],
    decay: set[str],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    before_forward: Callable[[int, int], None] = lambda step, micro: None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Loss of every step; the model is trained in place. The loss is the mean over all target tokens of a step.

    With another `optimizer` than AdamW, which knows the parameters, its settings count.
    """
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if p.requires_grad and n in decay],
            "weight_decay": weight_decay,
        },
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and n not in decay], "weight_decay": 0.0},
    ]
    optimizer = optimizer or torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=eps)
    model.train()
    losses = []
    for step, batch in enumerate(steps):
        count = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in batch)
        total = 0.0
        for index, micro in enumerate(batch):
            before_forward(step, index)
            logits = model(**{k: v for k, v in micro.items() if k != "labels"}, use_cache=False).logits.float()
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / count).backward()
            total += float(loss.detach())
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
    return losses
