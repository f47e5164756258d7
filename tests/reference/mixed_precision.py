"""The obvious mixed-precision loop: bfloat16 copies of float32 masters, fresh every step; gradients added up in
float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn


def train_in_bfloat16(
    model: nn.Module,
    steps: Sequence[Sequence[Mapping[str, torch.Tensor]]],
    *,
    lr: float,
    decay: set[str],
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss of every step and the final masters. `model` is converted; no autocast."""
    masters = {n: nn.Parameter(p.detach().float().clone()) for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [m for n, m in masters.items() if n in decay], "weight_decay": weight_decay},
            {"params": [m for n, m in masters.items() if n not in decay], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    model.to(torch.bfloat16).train()
    losses = []
    for batch in steps:
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(masters[name])
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        count = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in batch)
        total = 0.0
        for micro in batch:
            inputs = {k: v for k, v in micro.items() if k != "labels"}
            logits = model(**inputs, use_cache=False).logits.float()
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / count).backward()
            total += float(loss.detach())
            for name, param in model.named_parameters():
                gradient = masters[name].grad
                assert gradient is not None and param.grad is not None
                gradient.add_(param.grad)
                param.grad = None
        if max_grad_norm:
            nn.utils.clip_grad_norm_(list(masters.values()), max_grad_norm)
        optimizer.step()
        losses.append(total / count)
    return losses, {n: m.detach().clone() for n, m in masters.items()}
