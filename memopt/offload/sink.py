"""Where a unit's gradient is accumulated: a held vector in DRAM or a slot, filled by autograd parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from memopt.offload.homes import Home
from memopt.offload.layout import Piece
from memopt.store.buffers import Buffer


class GradientSink:
    """The float32 gradient vector of one unit, zero at the start. Accumulates on the computing device."""

    def __init__(self, home: Home, slot: Buffer | None, device: torch.device):
        self.home, self._slot = home, slot
        if slot is not None:
            self.vector = slot.tensor(torch.float32, home.unit.numel)
        else:
            assert home.gradient is not None
            self.vector = home.gradient
        self._device_vector = self.vector if device.type == "cpu" else torch.empty_like(self.vector, device=device)
        self._device_vector.zero_()

    def collect(self, params: Mapping[str, nn.Parameter]) -> None:
        """Have autograd add the gradients of these parameters here, each as soon as it is complete, and free it."""
        pieces = {piece.name: piece for piece in self.home.unit.trained}
        for name, param in params.items():
            if name in pieces and param.requires_grad:
                param.register_post_accumulate_grad_hook(adder(self.view(pieces[name])))

    def view(self, piece: Piece) -> torch.Tensor:
        """The part of one parameter, on the computing device."""
        start = piece.offset_bytes // 4
        return self._device_vector[start : start + piece.numel].view(piece.shape)

    def finish(self) -> None:
        """All micro-batches are in: bring the vector to the host."""
        if self._device_vector is not self.vector:
            self.vector.copy_(self._device_vector)

    def release(self) -> None:
        """Give the slot back (a held vector stays)."""
        if self._slot is not None:
            self._slot.release()


def adder(into: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's gradient to `into` and frees it: one is alive at a time, not a block's worth."""

    def add(param: torch.Tensor) -> None:
        assert param.grad is not None
        into.add_(param.grad)
        param.grad = None

    return add
