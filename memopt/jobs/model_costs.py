"""What a model costs per micro-batch, found before anything is allocated.

Its entry is run on an empty table; one block of each kind is followed on fake tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memopt.offload.layout import Layout
from memopt.offload.model import Batch, Binder, Entry, LayeredModel
from memopt.offload.rows import CompactEmbedding
from memopt.offload.trace import trace_block


@dataclass(frozen=True)
class ModelCosts:
    """Bytes and sizes of one micro-batch."""

    width: int
    """Of the hidden state."""
    forward_bytes: int
    backward_bytes: int
    calls_bytes: int
    """Masks and rotary tables that the blocks are called with."""
    estimated: bool
    """Some kind of block could not be followed and was estimated."""
    packs: bool
    """Attention keeps to the documents of a packed sequence."""


def model_costs(model: LayeredModel, layout: Layout, micro: Batch, dtype: torch.dtype) -> ModelCosts:
    """Costs for a micro-batch like `micro` (shapes, masks and positions matter, tokens do not)."""
    entry = _enter(model, layout, micro, dtype)
    unique = {id(t): t for call in entry.calls for t in call.tensors()}
    forward = backward = 0
    estimated = False
    done = set()
    for block, call in zip(model.blocks, entry.calls, strict=True):
        kind = (type(block), tuple(p.shape for p in block.parameters()), tuple(t.shape for t in call.tensors()))
        if kind in done:
            continue
        done.add(kind)
        try:
            trace = trace_block(block, entry.hidden, call, dtype)
            forward, backward = max(forward, trace.forward_bytes), max(backward, trace.backward_bytes)
        except Exception:  # data-dependent code: anything may be raised
            estimated = True
            params = sum(p.numel() for p in block.parameters())
            rows = entry.hidden.shape[0] * entry.hidden.shape[1]
            # every weight is applied to every token at most once: outputs of all of them, and one weight's gradient
            widths = sum(p.shape[0] for p in block.parameters() if p.dim() >= 2)
            guess = (2 * rows * (widths + 8 * entry.hidden.shape[-1]) + params // 2) * dtype.itemsize
            forward, backward = max(forward, guess // 2), max(backward, guess)
    masks = [t for t in unique.values() if t.dim() == 4 and t.shape[-1] == t.shape[-2] == micro["input_ids"].shape[1]]
    return ModelCosts(
        width=entry.hidden.shape[-1],
        forward_bytes=forward,
        backward_bytes=backward,
        calls_bytes=sum(t.untyped_storage().nbytes() for t in unique.values()),
        estimated=estimated,
        packs=bool(masks),
    )


def _enter(model: LayeredModel, layout: Layout, micro: Batch, dtype: torch.dtype) -> Entry:
    rest = layout.rest
    names = Binder(model.module)
    views = {p.name: torch.zeros(p.shape, dtype=dtype) for p in (*rest.trained, *rest.frozen)}
    tokens = micro["input_ids"].flatten().unique()
    table = torch.zeros(len(tokens), model.embedding.embedding_dim, dtype=dtype)
    with (
        torch.no_grad(),
        names.bound(views, requires_grad=False),
        CompactEmbedding(model.embedding, tokens).bound(table),
    ):
        return model.enter(micro)
