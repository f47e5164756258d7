"""Rows of a cache that grow by whole steps, so that a new token is written in place and nothing is copied for it.

The usual `torch.cat` copies the whole cache for every token and layer, which on a CPU costs more than the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

STEP = 64
"""Rows a buffer grows by. Growing copies it once, so a token costs 1/64 of the copy that `torch.cat` makes; the spare
rows are at most 63."""


def capacity(rows: int, step: int = STEP) -> int:
    """Rows a buffer has that holds `rows`: the next multiple of `step`."""
    return -(-rows // step) * step


class Rows:
    """`length` rows (tokens) of C elements for each of B batch rows and K heads, in one buffer (B, K, capacity, C)."""

    def __init__(
        self, batch: int, heads: int, width: int, *, dtype: torch.dtype, device: torch.device, step: int = STEP
    ) -> None:
        self.length = 0
        self._step = step
        self._buffer = _empty(batch, heads, 0, width, dtype=dtype, device=device)

    @classmethod
    def like(cls, x: Tensor, width: int, *, step: int = STEP) -> Rows:
        """No rows yet, with batch, heads, type and device of `x` (B, K, N, any)."""
        return cls(x.shape[0], x.shape[1], width, dtype=x.dtype, device=x.device, step=step)

    def append(self, rows: Tensor) -> None:
        """Add rows (B, K, N, C) at the end."""
        wanted = self.length + rows.shape[2]
        if wanted > self._buffer.shape[2]:
            self._resize(wanted)
        self._buffer[:, :, self.length : wanted] = rows
        self.length = wanted

    def view(self) -> Tensor:
        """All rows, (B, K, length, C), without a copy; valid until the next change."""
        return self._buffer[:, :, : self.length]

    def segments(self) -> Iterator[Tensor]:
        """The rows in order, in one or more pieces (B, K, n, C); here one."""
        yield self.view()

    def crop(self, rows: int) -> None:
        """Forget the last `rows`; their memory stays for the next ones."""
        self.length = max(0, self.length - rows)

    def drop_front(self, rows: int) -> None:
        """Forget the first `rows` and give their memory back."""
        kept = self.view()[:, :, rows:]
        self._buffer = _copied(kept, capacity(kept.shape[2], self._step))
        self.length = kept.shape[2]

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change(buffer)` in place of the buffer: another choice, order or number of batch rows."""
        changed = change(self._buffer)
        # what was made under inference mode could never be written outside of it
        self._buffer = changed if not changed.is_inference() else _copied(changed, changed.shape[2])

    def tensors(self) -> list[Tensor]:
        """Everything that holds memory."""
        return [self._buffer]

    def _resize(self, wanted: int) -> None:
        self._buffer = _copied(self.view(), capacity(wanted, self._step))


def _copied(rows: Tensor, wanted: int) -> Tensor:
    batch, heads, length, width = rows.shape
    new = _empty(batch, heads, wanted, width, dtype=rows.dtype, device=rows.device)
    new[:, :, :length] = rows
    return new


def _empty(batch: int, heads: int, rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    # a normal tensor can be written in and out of inference mode; one made inside it only there
    with torch.inference_mode(False):
        return torch.empty(batch, heads, rows, width, dtype=dtype, device=device)
