"""The micro-batches of a step as flat tokens: where each lies, which tokens count, and their shared masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memopt.offload.head import Targets
from memopt.offload.model import Batch, BlockCall

IGNORED = -100
"""Label of a token without loss."""


@dataclass(frozen=True)
class Span:
    """Where a micro-batch lies in the step's flat tokens."""

    start: int
    batch: int
    sequence: int

    @property
    def stop(self) -> int:
        return self.start + self.batch * self.sequence


def spans_of(batch: Sequence[Batch]) -> list[Span]:
    spans, at = [], 0
    for micro in batch:
        rows, columns = micro["input_ids"].shape
        spans.append(Span(at, rows, columns))
        at = spans[-1].stop
    return spans


def targets_of(batch: Sequence[Batch], spans: Sequence[Span]) -> Targets:
    """Positions whose next token is to be predicted, as transformers' causal loss shifts labels."""
    index, labels = [], []
    for micro, span in zip(batch, spans, strict=True):
        shifted = micro["labels"].cpu()[:, 1:]
        row, column = (shifted != IGNORED).nonzero(as_tuple=True)
        index.append(span.start + row * span.sequence + column)
        labels.append(shifted[row, column])
    return Targets(torch.cat(index), torch.cat(labels))


def interned(calls: Sequence[BlockCall], seen: list[torch.Tensor]) -> list[BlockCall]:
    """The same calls with tensors that equal an earlier micro-batch's (rotary tables, masks) shared with it."""
    known: dict[int, torch.Tensor] = {}

    def intern(x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in known:
            twin = next((s for s in seen if s.shape == x.shape and s.dtype == x.dtype and torch.equal(s, x)), None)
            known[id(x)] = x if twin is None else twin
            if twin is None:
                seen.append(x)
        return known[id(x)]

    tree_map = torch.utils._pytree.tree_map
    return [BlockCall(*tree_map(intern, (call.args, dict(call.kwargs)))) for call in calls]
