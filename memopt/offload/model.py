"""What the engine needs of a model: an entry, a list of blocks, an exit; and how tensors are put into modules.

B = batch, S = sequence, D = width, T = any number of tokens, V = vocabulary (or a tile of it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block, the hidden state apart: masks, rotary tables and flags."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def tensors(self) -> list[torch.Tensor]:
        flat, _ = torch.utils._pytree.tree_flatten((self.args, dict(self.kwargs)))
        return [x for x in flat if isinstance(x, torch.Tensor)]


@dataclass(frozen=True)
class Entry:
    """One micro-batch after the model's own entry: the first hidden state (B, S, D) and the call of every block."""

    hidden: torch.Tensor
    calls: Sequence[BlockCall]


class LayeredModel(Protocol):
    """A causal language model handed over by a patch (memopt.patches.hf_model for Hugging Face)."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    @property
    def embedding(self) -> nn.Embedding: ...

    @property
    def head(self) -> nn.Linear: ...

    def enter(self, batch: Batch) -> Entry:
        """Embeddings, masks, rotary tables; differentiable when gradients are enabled."""

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, T, D) -> (1, T, V): final norm, head and whatever the model does to its logits."""


class Binder:
    """Puts tensors into the modules that own a set of parameters, and takes them out again.

    A parameter that is used by several modules is bound in each. Outside `bound` every parameter is its meta
    placeholder.
    """

    def __init__(self, module: nn.Module):
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {}
        names: dict[int, str] = {}
        for prefix, child in module.named_modules(remove_duplicate=True):
            for attr, param in child._parameters.items():
                if param is not None:
                    name = names.setdefault(id(param), f"{prefix}.{attr}" if prefix else attr)
                    self._owners.setdefault(name, []).append((child, attr))

    @property
    def names(self) -> list[str]:
        """Canonical names, as `named_parameters` gives them."""
        return list(self._owners)

    def name_of(self, param: torch.Tensor | None) -> str | None:
        """Canonical name of a placeholder parameter."""
        for name, owners in self._owners.items():
            module, attr = owners[0]
            if param is not None and module._parameters[attr] is param:
                return name
        return None

    def inside(self, module: nn.Module) -> set[str]:
        """Names of the parameters a submodule owns."""
        members = set(module.modules())
        return {name for name, owners in self._owners.items() if any(m in members for m, _ in owners)}

    def shared(self) -> dict[str, list[tuple[nn.Module, str]]]:
        """Parameters with more than one owner."""
        return {name: owners for name, owners in self._owners.items() if len(owners) > 1}

    @contextmanager
    def bound(self, tensors: Mapping[str, torch.Tensor], requires_grad: bool) -> Iterator[dict[str, nn.Parameter]]:
        """Within the context the named parameters are these tensors (no copy)."""
        params = {name: nn.Parameter(t, requires_grad=requires_grad) for name, t in tensors.items()}
        with self.bound_params(params):
            yield params

    @contextmanager
    def bound_params(self, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
        before = []
        try:
            for name, param in params.items():
                for module, attr in self._owners[name]:
                    before.append((module, attr, module._parameters[attr]))
                    module._parameters[attr] = param
            yield
        finally:
            for module, attr, old in reversed(before):
                module._parameters[attr] = old


def first(output: Any) -> torch.Tensor:
    """The hidden state of a block's output (some blocks return a tuple)."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden
