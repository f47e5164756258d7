"""Hugging Face causal language models as the engine sees them: entry, blocks, exit.

The model keeps driving its own entry and exit. Its blocks are replaced for the length of a call by probes that
record how each block is called; the engine then calls the real blocks itself. No model code is known here, only the
conventions every transformers causal LM follows: `_no_split_modules`, `get_input_embeddings`, `get_output_embeddings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from memopt.errors import BadInput
from memopt.offload.model import Batch, BlockCall, Entry
from memopt.offload.trace import returns_tuple


def text_config(config: Any) -> Any:
    """The language model's part of a transformers configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class HFLayeredModel:
    """Adapter of a transformers causal LM to `memopt.offload.model.LayeredModel`. Undone by dropping it: nothing is
    patched outside a call.

    Raises BadInput for a model whose blocks cannot be found, that changes the hidden state between its blocks, that
    hands its blocks a differentiable tensor, or that shares parameters across blocks.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._name = type(module).__name__
        self._list_path, blocks = _find_blocks(module)
        self.blocks = list(blocks)
        self.embedding, self.head = self._tables()
        self._check_sharing()
        self._returns_tuple: bool | None = None

    @property
    def blocks_path(self) -> str:
        """Where the blocks are, `model.layers` for instance."""
        return self._list_path

    def block_prefix(self, index: int) -> str:
        return f"{self._list_path}.{index}."

    def enter(self, batch: Batch) -> Entry:
        """Run the model up to its last block and record how every block is called."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        run = _ProbeRun(self, stop_after_last=True)
        with self._probed(run.probes), suppress(_BlocksDone):
            self.module(**inputs, use_cache=False)
        if len(run.calls) != len(self.blocks):
            raise BadInput(
                f"{self._name}: its forward called {len(run.calls)} of {len(self.blocks)} blocks; "
                f"this model cannot be streamed"
            )
        assert run.entry is not None
        return Entry(run.entry, run.calls)

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the model's own exit on any tokens: a dummy token goes in, `hidden` comes out of the last block."""
        run = _ProbeRun(self, inject=hidden)
        width = self.embedding.embedding_dim
        dummy = torch.zeros(1, 1, width, dtype=hidden.dtype, device=hidden.device)
        with self._probed(run.probes):
            output = self.module(inputs_embeds=dummy, use_cache=False)
        logits: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
        return logits.reshape(1, hidden.shape[1], -1)  # GPT-2 folds the tokens into the batch

    def returns_tuple(self, call: BlockCall, hidden: torch.Tensor) -> bool:
        """Whether the blocks return (hidden, ...) rather than hidden; found by running one on fake tensors."""
        if self._returns_tuple is None:
            self._returns_tuple = returns_tuple(self.blocks[0], hidden, call)
        return self._returns_tuple

    @contextmanager
    def _probed(self, probes: list[_Probe]) -> Iterator[None]:
        parent_path, _, attr = self._list_path.rpartition(".")
        parent = self.module.get_submodule(parent_path)
        before = getattr(parent, attr)
        setattr(parent, attr, nn.ModuleList(probes))
        try:
            yield
        finally:
            setattr(parent, attr, before)

    def _tables(self) -> tuple[nn.Embedding, nn.Linear]:
        embedding = self.module.get_input_embeddings()  # type: ignore[operator]
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(embedding, nn.Embedding):
            raise BadInput(f"{self._name}: its input embedding is a {type(embedding).__name__}, not an nn.Embedding")
        if not isinstance(head, nn.Linear):
            raise BadInput(
                f"{self._name}: its output head is a {type(head).__name__}, not an nn.Linear: not a causal LM?"
            )
        return embedding, head

    def _check_sharing(self) -> None:
        owner: dict[int, str] = {}
        for index, block in enumerate(self.blocks):
            for name, param in block.named_parameters():
                full = self.block_prefix(index) + name
                other = owner.setdefault(id(param), full)
                if not other.startswith(self.block_prefix(index)):
                    raise BadInput(
                        f"{self._name}: parameter {full} is shared with {other}; models that share "
                        f"weights across blocks "
                        "cannot be streamed block by block"
                    )


class _BlocksDone(Exception):
    """Leaves the model's forward after the last block; the exit is not wanted."""


class _ProbeRun:
    """The probes of one forward call and what they saw."""

    def __init__(self, model: HFLayeredModel, *, inject: torch.Tensor | None = None, stop_after_last: bool = False):
        self.model, self.inject, self.stop_after_last = model, inject, stop_after_last
        self.calls: list[BlockCall] = []
        self.entry: torch.Tensor | None = None
        self.expected: torch.Tensor | None = None
        self.probes = [_Probe(block, self, i) for i, block in enumerate(model.blocks)]

    def visit(self, index: int, hidden: torch.Tensor, call: BlockCall) -> Any:
        last = index == len(self.probes) - 1
        if self.inject is None:
            self._check(index, hidden, call)
            self.calls.append(call)
            if last and self.stop_after_last:
                raise _BlocksDone
        out = self.inject if last and self.inject is not None else hidden
        self.expected = out
        return (out, None, None) if self.model.returns_tuple(call, hidden) else out

    def _check(self, index: int, hidden: torch.Tensor, call: BlockCall) -> None:
        name = type(self.model.module).__name__
        if self.entry is None:
            self.entry = hidden
        elif hidden is not self.expected:
            raise BadInput(
                f"{name}: the hidden state is changed between blocks {index - 1} and {index}; it cannot be streamed"
            )
        if any(t.requires_grad for t in call.tensors()):
            raise BadInput(
                f"{name}: block {index} is handed a differentiable tensor besides the hidden state; "
                f"it cannot be streamed"
            )


class _Probe(nn.Module):
    """Stands where a block stood: records how the model calls it and hands the hidden state on."""

    def __init__(self, block: nn.Module, run: _ProbeRun, index: int):
        super().__init__()
        object.__setattr__(self, "_stands_for", block)  # not a submodule: its parameters are not this run's business
        object.__setattr__(self, "_run", run)
        self._index = index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(
                self.__dict__["_stands_for"], name
            )  # models read flags such as `attention_type` off their blocks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        return self.__dict__["_run"].visit(self._index, hidden, BlockCall(args, kwargs))


def _find_blocks(module: nn.Module) -> tuple[str, nn.ModuleList]:
    names = set(getattr(module, "_no_split_modules", None) or ())
    best: tuple[str, nn.ModuleList] | None = None
    for path, child in module.named_modules():
        named = isinstance(child, nn.ModuleList) and len(child) and {type(b).__name__ for b in child} <= names
        if named and (best is None or len(child) > len(best[1])):
            best = (path, child)
    if best is None:
        raise BadInput(
            f"{type(module).__name__}: its decoder blocks cannot be found (no ModuleList of "
            f"{sorted(names) or 'known blocks'})"
        )
    return best
