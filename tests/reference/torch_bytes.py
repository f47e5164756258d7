"""Bytes of a PyTorch program the slow, obvious way: addresses of storages in a set, and a walk of autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind plain tensors, each once; told apart by their address."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    sizes.pop(0, None)  # empty ones
    return sum(sizes.values())


def weight_bytes(model: nn.Module) -> int:
    """All parameters."""
    return distinct_bytes(model.parameters())


def gradient_bytes(model: nn.Module) -> int:
    """What `.grad` holds now."""
    return distinct_bytes(p.grad for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """All tensors of a flat optimizer state."""
    return distinct_bytes(v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))


def saved_bytes(result: torch.Tensor, model: nn.Module) -> int:
    """What the graph behind `result` has saved, less parameters and buffers.

    Reads the `_saved_*` attributes that every node of the graph has, and `saved_tensors` of Python functions.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: list[torch.Tensor] = []
    nodes: list[Any] = [result.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        values.extend(getattr(node, "saved_tensors", ()))
        for value in values:
            found.extend(t for t in (value if isinstance(value, list | tuple) else [value]) if torch.is_tensor(t))
    return distinct_bytes(t for t in found if t.untyped_storage().data_ptr() not in own)
