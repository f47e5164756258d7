"""The exit of the model with its loss, a few tokens and a tile of the vocabulary at a time.

With one tile each token's logits are computed once. With several, a first sweep over the tiles keeps a running
log-sum-exp per token (Milakov & Gimelshein 2018), a second computes the gradients; logits of more than `tokens x
tile` never exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from memopt.offload.model import LayeredModel


@dataclass
class Targets:
    """The tokens that count: hidden states are gathered, labels already shifted."""

    index: torch.Tensor
    """(N,) positions in the step's flat (tokens, D) hidden states."""
    labels: torch.Tensor
    """(N,) the token each position predicts."""

    def __len__(self) -> int:
        return self.index.numel()


@dataclass
class Tile:
    """Rows [first, last) of the head's table, bound for computing; `gradient` (rows, D) float32 receives their
    gradient."""

    first: int
    last: int
    weight: torch.Tensor
    gradient: torch.Tensor | None = None


@dataclass
class HeadLoss:
    """One step's exit. `sweep` the tiles once (and again with `backward` when there are several)."""

    model: LayeredModel
    targets: Targets
    hidden: torch.Tensor
    """(tokens, D) output of the last block."""
    hidden_grad: torch.Tensor | None
    """(tokens, D) receives the gradient; None in evaluation."""
    chunk_tokens: int
    bias: torch.Tensor | None = None
    """(V,) of the head, or None."""
    bias_grad: torch.Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        n = len(self.targets)
        self._lse = torch.full((n,), -torch.inf)
        self._target = torch.zeros(n)

    def forward(self, tile: Tile) -> None:
        """Fold one tile into the running log-sum-exp."""
        with torch.no_grad():
            for part in self._parts():
                self._fold(part, self._logits(tile, self._gather(part)).float(), tile)

    def backward(self, tile: Tile) -> None:
        """Gradients of one tile, once the log-sum-exp is complete."""
        for part in self._parts():
            self._differentiate(part, tile, fold=False)

    def forward_backward(self, tile: Tile) -> None:
        """Both at once, for a head of one tile."""
        for part in self._parts():
            self._differentiate(part, tile, fold=True)

    def loss(self) -> float:
        """Mean over all target tokens of the step, float64 sum."""
        return float((self._lse.double() - self._target.double()).sum()) / max(len(self.targets), 1)

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self.targets), self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, len(self.targets)))

    def _gather(self, part: slice) -> torch.Tensor:
        return self.hidden[self.targets.index[part]].unsqueeze(0).to(self.device)

    def _logits(self, tile: Tile, hidden: torch.Tensor) -> torch.Tensor:
        with _table(self.model.head, tile, self.bias):
            return self.model.leave(hidden)[0]

    def _fold(self, part: slice, logits: torch.Tensor, tile: Tile) -> None:
        self._lse[part] = torch.logaddexp(self._lse[part], logits.logsumexp(-1).cpu())
        token, column = self._inside(part, tile)
        self._target[part][token] = logits[token.to(logits.device), column.to(logits.device)].cpu()

    def _inside(self, part: slice, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        labels = self.targets.labels[part]
        token = ((labels >= tile.first) & (labels < tile.last)).nonzero()[:, 0]
        return token, labels[token] - tile.first

    def _differentiate(self, part: slice, tile: Tile, *, fold: bool) -> None:
        assert self.hidden_grad is not None
        hidden = self._gather(part).requires_grad_()
        with _recorded(self.model.head) as seen:
            logits = self._logits(tile, hidden)
        with torch.no_grad():
            values = logits.detach().float()
            if fold:
                self._fold(part, values, tile)
            # d loss / d logits = (softmax - one-hot) / count; a new tensor: the model's own ops may have saved the
            # logits
            grad = torch.sub(values, self._lse[part, None].to(values.device)).exp_()
            token, column = (x.to(values.device) for x in self._inside(part, tile))
            grad[token, column] -= 1
            grad.mul_(1 / len(self.targets))
            grad = grad.to(logits.dtype)
        logits.backward(grad)
        with torch.no_grad():
            assert hidden.grad is not None
            self.hidden_grad.index_add_(0, self.targets.index[part], hidden.grad[0].to(self.hidden_grad))
            if tile.gradient is not None:
                table_input, table_grad = seen["input"].flatten(0, -2), seen["grad"].flatten(0, -2)
                if table_grad.dtype == tile.gradient.dtype:
                    tile.gradient.addmm_(table_grad.T, table_input)  # no temporary the size of the table
                else:
                    tile.gradient.add_(table_grad.T @ table_input)
                if self.bias_grad is not None:
                    self.bias_grad[tile.first : tile.last] += table_grad.float().sum(0).to(self.bias_grad)


@contextmanager
def _table(head: nn.Linear, tile: Tile, bias: torch.Tensor | None) -> Iterator[None]:
    """The head as a linear layer onto one tile. Its weight gets no autograd gradient: `_recorded` sees all it takes."""
    before = dict(head._parameters)
    head._parameters["weight"] = nn.Parameter(tile.weight, requires_grad=False)
    if bias is not None:
        head._parameters["bias"] = nn.Parameter(bias[tile.first : tile.last].to(tile.weight), requires_grad=False)
    try:
        yield
    finally:
        head._parameters.update(before)


@contextmanager
def _recorded(head: nn.Linear) -> Iterator[dict[str, torch.Tensor]]:
    """What went into the head and, after backward, the gradient of what came out."""
    seen: dict[str, torch.Tensor] = {}

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["input"] = inputs[0].detach()
        if output.requires_grad:
            output.register_hook(lambda grad: seen.__setitem__("grad", grad))

    handle = head.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
