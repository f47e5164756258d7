"""Where a unit's gradient is accumulated: a held vector in DRAM or a slot, filled by autograd parameter by
parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from memopt.offload.homes import Home
from memopt.offload.layout import Piece
from memopt.store.buffers import Buffer


class GradientSink:
    """The float32 gradient vector of one unit. Accumulates on the computing device.

    Nothing is cleared beforehand: the first gradient of a parameter overwrites, later ones add (clearing and adding
    would move 12 bytes more per parameter). `finish` clears what no gradient reached, padding included.
    """

    def __init__(self, home: Home, slot: Buffer | None, device: torch.device):
        self.home, self._slot = home, slot
        if slot is not None:
            self.vector = slot.tensor(torch.float32, home.unit.numel)
        else:
            assert home.gradient is not None
            self.vector = home.gradient
        self._device_vector = self.vector if device.type == "cpu" else torch.empty_like(self.vector, device=device)
        self._reached: set[str] = set()

    def collect(self, params: Mapping[str, nn.Parameter]) -> None:
        """Have autograd bring the gradients of these parameters here, each as soon as it is complete, and free it."""
        pieces = {piece.name: piece for piece in self.home.unit.trained}
        for name, param in params.items():
            if name in pieces and param.requires_grad:
                param.register_post_accumulate_grad_hook(self._hook(pieces[name]))

    def view(self, piece: Piece) -> torch.Tensor:
        """The part of one parameter, on the computing device, zero if nothing was added yet: for adding by hand."""
        if piece.name not in self._reached:
            self._reached.add(piece.name)
            piece.of(self._device_vector).zero_()
        return piece.of(self._device_vector)

    def finish(self) -> None:
        """All micro-batches are in: clear what was not reached and bring the vector to the host."""
        end = 0
        for piece in self.home.unit.trained:
            start = piece.offset_bytes // 4
            self._device_vector[end:start].zero_()
            end = start + piece.numel
            if piece.name not in self._reached:
                self._device_vector[start:end].zero_()
        self._device_vector[end:].zero_()
        if self._device_vector is not self.vector:
            self.vector.copy_(self._device_vector)

    def release(self) -> None:
        """Give the slot back (a held vector stays)."""
        if self._slot is not None:
            self._slot.release()

    def _hook(self, piece: Piece) -> Callable[[torch.Tensor], None]:
        into = piece.of(self._device_vector)

        def take(param: torch.Tensor) -> None:
            assert param.grad is not None
            if piece.name in self._reached:
                into.add_(param.grad)
            else:
                self._reached.add(piece.name)
                into.copy_(param.grad)
            param.grad = None  # one parameter's gradient is alive at a time, not a unit's

        return take
