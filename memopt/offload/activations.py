"""Boundary activations: the input of every block for all micro-batches, in DRAM or (the first layers) on SSD.

One buffer holds one layer: the hidden states of all tokens of the step, (tokens, D), micro-batches one after the other.
"""

from __future__ import annotations

import torch

from memopt.ledger import Ledger
from memopt.store.block_store import BlockStore
from memopt.store.buffers import Buffer, BufferPool
from memopt.store.extents import CHUNK_BYTES
from memopt.store.transfer import Transfer
from memopt.tiers import Category

WORKING_BUFFERS = 2
"""On SSD: the layer in use, and the one being written (forward) or read ahead (backward)."""


def activation_name(layer: int) -> str:
    return f"hidden.{layer}"


class Activations:
    """Inputs of blocks 0 ... layers - 1, and the output of the last (index `layers`)."""

    def __init__(
        self,
        *,
        layers: int,
        on_ssd: int,
        capacity_tokens: int,
        width: int,
        dtype: torch.dtype,
        scratch: BlockStore | None,
        ledger: Ledger,
        pin: bool,
    ):
        self._on_ssd, self._width, self._dtype, self._scratch = on_ssd, width, dtype, scratch
        self._capacity = capacity_tokens
        self._tokens = capacity_tokens
        count = buffer_count(layers, on_ssd) + 1  # and the gradient of the layer at hand
        nbytes = layer_bytes(capacity_tokens, width, dtype)
        self._pool = BufferPool(nbytes, count, ledger, Category.ACTIVATIONS, "boundary activations", pin)
        self._gradient = self._pool.acquire(who="hidden gradient")
        self._held: dict[int, Buffer] = {}
        self._moving: dict[int, Transfer] = {}

    def begin(self, tokens: int) -> None:
        """A new step with this many tokens; whatever is left of the last one is dropped."""
        assert tokens <= self._capacity
        for layer in list(self._held):
            self.drop(layer)
        self._tokens = tokens

    def new(self, layer: int) -> torch.Tensor:
        """(tokens, D) to be filled with the input of block `layer`."""
        self._held[layer] = self._pool.acquire(who=activation_name(layer))
        return self._tensor(layer)

    def current(self, layer: int) -> torch.Tensor:
        """(tokens, D) of a layer that `new` made and that has not passed."""
        return self._tensor(layer)

    @property
    def gradient(self) -> torch.Tensor:
        """(tokens, D): the gradient of the hidden state at hand, overwritten from layer to layer."""
        return self._gradient.tensor(self._dtype, self._tokens * self._width).view(self._tokens, self._width)

    def written(self, layer: int) -> None:
        """The buffer of `layer` is complete: start writing it out if it lives on SSD."""
        if layer < self._on_ssd:
            self._moving[layer] = self._spill().write(activation_name(layer), self._bytes(layer))

    def passed(self, layer: int) -> None:
        """The forward no longer needs `layer`: its buffer may go if it lives on SSD."""
        if layer < self._on_ssd:
            self.drop(layer)

    def fetch(self, layer: int) -> None:
        """Start bringing `layer` back for the backward."""
        if layer >= 0 and layer not in self._held:
            self._held[layer] = self._pool.acquire(who=activation_name(layer))
            self._moving[layer] = self._spill().read(activation_name(layer), self._bytes(layer))

    def get(self, layer: int) -> torch.Tensor:
        """(tokens, D), in memory."""
        self.fetch(layer)
        if layer in self._moving:
            self._moving.pop(layer).wait()
        return self._tensor(layer)

    def drop(self, layer: int) -> None:
        """`layer` is not needed again, or is safe on SSD."""
        if layer in self._moving:
            self._moving.pop(layer).wait()
        self._held.pop(layer).release()

    def close(self) -> None:
        """Give the buffers back."""
        for layer in list(self._held):
            self.drop(layer)
        self._gradient.release()
        self._pool.close()

    def _spill(self) -> BlockStore:
        assert self._scratch is not None
        return self._scratch

    def _tensor(self, layer: int) -> torch.Tensor:
        flat = self._held[layer].tensor(self._dtype, self._tokens * self._width)
        return flat.view(self._tokens, self._width)

    def _bytes(self, layer: int) -> memoryview:
        # whole chunks, so that a step with fewer tokens than the plan's is checked the same way
        used = -(-self._tokens * self._width * self._dtype.itemsize // CHUNK_BYTES) * CHUNK_BYTES
        return self._held[layer].view[:used]


def buffer_count(layers: int, on_ssd: int) -> int:
    """Layer buffers in memory for `layers` blocks of which the first `on_ssd` inputs live on SSD."""
    kept = layers + 1 - on_ssd
    return kept + min(on_ssd, WORKING_BUFFERS)


def layer_bytes(tokens: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of one layer's boundary activations, padded to a page for direct I/O."""
    return -(-tokens * width * dtype.itemsize // 4096) * 4096
