"""The optimizer steps of a run as the loop takes them: lists of micro-batches by step number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from memopt.errors import BadInput
from memopt.jobs.data import BatchOrder, TokenDataset
from memopt.offload.batches import IGNORED
from memopt.offload.model import Batch


class Steps(Protocol):
    """Steps by number, 0 is the first: a resumed run goes on from its number alone."""

    @property
    def total(self) -> int:
        """How many there are."""

    @property
    def max_tokens(self) -> int:
        """Of the largest step, all micro-batches together."""

    def batch(self, step: int) -> list[Batch]:
        """The micro-batches of one step."""

    def largest(self) -> Batch:
        """A micro-batch of the largest shape, for measuring."""

    def identity(self) -> str:
        """Equal for equal data."""


@dataclass
class PackedSteps:
    """Steps out of a packed data set."""

    dataset: TokenDataset
    order: BatchOrder
    packed_positions: bool = True
    """The model takes `position_ids`."""

    @property
    def total(self) -> int:
        return self.order.total_steps

    @property
    def max_tokens(self) -> int:
        return min(self.order.batch_size * self.order.grad_accum, len(self.dataset)) * self.dataset.seq_len

    def batch(self, step: int) -> list[Batch]:
        return [self._micro(indices) for indices in self.order.indices(step)]

    def largest(self) -> Batch:
        count = min(self.order.batch_size, len(self.dataset))
        micro = dict(self._micro(range(count)))
        if self.packed_positions:  # two documents: the mask that packing needs is there
            half = self.dataset.seq_len // 2
            positions = torch.arange(self.dataset.seq_len)
            positions[half:] -= half
            micro["position_ids"] = positions.expand(count, -1)
        return micro

    def identity(self) -> str:
        return self.dataset.content_hash

    def _micro(self, indices: Sequence[int]) -> Batch:
        micro = self.dataset.micro_batch(list(indices))
        if not self.packed_positions:
            micro.pop("position_ids")
        return micro


class GivenSteps:
    """Steps a caller hands over, used as they are. Raises BadInput for what no model with these tables can take."""

    def __init__(self, batches: Iterable[Sequence[Batch]], max_steps: int | None, *, tokens: int, targets: int):
        """`tokens` and `targets`: rows of the model's embedding and head."""
        self._batches = list(batches)
        if not self._batches:
            raise BadInput("batches: there is no step")
        for number, step in enumerate(self._batches):
            if isinstance(step, Mapping):
                raise BadInput(
                    f"batches: step {number} is a micro-batch; a step is a list of them: give [[batch], ...]"
                )
            if not step:
                raise BadInput(f"batches: step {number} has no micro-batches")
            for micro in step:
                _check_micro_batch(micro, f"batches: step {number}", tokens, targets)
        self.total = min(len(self._batches), max_steps) if max_steps is not None else len(self._batches)
        self.max_tokens = max(sum(m["input_ids"].numel() for m in step) for step in self._batches)

    def batch(self, step: int) -> list[Batch]:
        return list(self._batches[step])

    def largest(self) -> Batch:
        return max((m for step in self._batches for m in step), key=lambda m: m["input_ids"].numel())

    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for step in self._batches:
            for micro in step:
                for name in sorted(micro):
                    digest.update(f"{name} {tuple(micro[name].shape)} {micro[name].dtype} ".encode())
                    digest.update(micro[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _check_micro_batch(micro: Batch, where: str, tokens: int, targets: int) -> None:
    """Names and shapes, and numbers that a streamed table would read past its end with."""
    if "input_ids" not in micro or "labels" not in micro:
        raise BadInput(f"{where} has a micro-batch without input_ids or labels")
    for name, value in micro.items():
        if not isinstance(value, torch.Tensor):
            raise BadInput(f"{where}: {name} is no tensor but {type(value).__name__}; give tensors, or leave it out")
    ids, labels = micro["input_ids"], micro["labels"]
    if ids.dim() != 2 or not ids.numel() or ids.shape != labels.shape:
        shapes = f"{tuple(ids.shape)} and {tuple(labels.shape)}"
        raise BadInput(f"{where}: input_ids and labels are {shapes}; give both as (batch, sequence)")
    mask = micro.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
        raise BadInput(f"{where}: attention_mask is {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; give both alike")
    if not 0 <= int(ids.min()) <= int(ids.max()) < tokens:
        raise BadInput(
            f"{where}: input_ids reach from {int(ids.min())} to {int(ids.max())}, the model has {tokens} tokens"
        )
    wanted = labels[labels != IGNORED]
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < targets:
        raise BadInput(
            f"{where}: labels reach from {int(wanted.min())} to {int(wanted.max())}, the model has {targets} tokens; "
            f"{IGNORED} stands for no loss"
        )
