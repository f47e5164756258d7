"""Where a unit's gradient is accumulated: a held vector in DRAM or a slot, filled by autograd parameter by
parameter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from memopt.ledger import Ledger
from memopt.offload.gradients import squared_norm
from memopt.offload.homes import Home, Homes, as_bytes, gradient_name
from memopt.offload.layout import Piece, Unit, UnitKind
from memopt.offload.updater import Updater
from memopt.plan_types import Plan
from memopt.store.buffers import Buffer, BufferPool
from memopt.tiers import Category


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


class SinkPool:
    """Gradient memory: slots for units whose gradient is not held in DRAM, one size for blocks and one for tables."""

    def __init__(self, homes: Homes, updater: Updater, plan: Plan, ledger: Ledger, device: torch.device):
        self._homes, self._updater, self._device = homes, updater, device
        layout, pin = homes.layout, device.type == "cuda"
        self._pools: dict[UnitKind, BufferPool] = {}
        self.waited_s = 0.0
        head_kind = layout.head[0].kind
        for kind, units, count in (
            (UnitKind.BLOCK, layout.blocks, plan.gradient_slots),
            (head_kind, layout.head, plan.head_gradient_slots),
        ):
            nbytes = max((u.master_bytes for u in units if homes[u].gradient is None), default=0)
            if nbytes:
                self._pools[kind] = BufferPool(nbytes, count, ledger, Category.GRADIENTS, f"{kind} gradient slots", pin)

    def open(self, unit: Unit) -> GradientSink | None:
        """A sink for a unit's gradient; waits for a slot. None for a unit that is frozen."""
        if not unit.trained:
            return None
        home = self._homes[unit]
        start = time.perf_counter()
        slot = None if home.gradient is not None else self._pools[unit.kind].acquire(who=unit.name)
        self.waited_s += time.perf_counter() - start
        return GradientSink(home, slot, self._device)

    def spill(self, sink: GradientSink) -> list[float]:
        """Hold a complete gradient for later: its sum of squares, and its bytes on SSD if it has no home in DRAM.

        Done in the update thread: the sum is in the list after the next `Updater.drain`.
        """
        squares: list[float] = []

        def work() -> None:
            squares.append(squared_norm(sink.vector))
            if sink.home.gradient is None:
                name = gradient_name(sink.home.unit)
                write = self._homes.spill.write(name, as_bytes(sink.vector))
                write.then(lambda _: sink.release())
                self._updater.track(write)

        self._updater.run(work)
        return squares

    def close(self) -> None:
        """Give the memory back."""
        for pool in self._pools.values():
            pool.close()
