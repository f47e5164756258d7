"""Brings units into memory in the order of a step, ahead of the computation, as far as there are slots."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memopt.ledger import Ledger
from memopt.offload.homes import Home, Homes, as_bytes, frozen_name, weight_parts
from memopt.offload.layout import Unit, UnitKind
from memopt.offload.updater import Update, Updater
from memopt.store.buffers import Buffer, BufferPool
from memopt.store.transfer import SerialThread, Transfer
from memopt.tiers import Category


@dataclass(frozen=True)
class Stay:
    """One planned stay of a unit in memory."""

    unit: Unit
    update: Update | None = None
    """Apply this pending update as soon as the weights have arrived."""
    keep: bool = False
    """The computation comes by a second time soon: do not give the slot back in between (the last unit of a
    forward)."""
    again: bool = False
    """The second visit of a unit that was kept."""


class Held:
    """A unit in memory. The slot goes back when every holder has let go: one per visit, one per update under way."""

    def __init__(self, home: Home, holds: int):
        self.home = home
        self.master, self.frozen = home.weights, home.frozen
        self.ready = Transfer(0)
        self.updated = Transfer(0)
        self.slot: Buffer | None = None
        self._holds = holds
        self._lock = threading.Lock()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameter name -> view; not to be used after the last `release`."""
        return self.home.unit.views(self.master, self.frozen)

    def hold(self) -> None:
        with self._lock:
            self._holds += 1

    def release(self) -> None:
        with self._lock:
            self._holds -= 1
            last = self._holds == 0
        if last:
            if not self.home.resident:
                self.master = self.frozen = None
            if self.slot is not None:
                self.slot.release()


class WeightStream:
    """The fetching thread. `start` a sequence of stays, then take them one by one with `next`."""

    def __init__(self, homes: Homes, updater: Updater, ledger: Ledger, *, block_slots: int, head_slots: int, pin: bool):
        self._homes, self._updater = homes, updater
        self._pools: dict[UnitKind, BufferPool] = {}
        self._thread = SerialThread("memopt-fetch")
        self._arrived: queue.SimpleQueue[Held | BaseException] = queue.SimpleQueue()
        self._kept: dict[str, Held] = {}
        self.waited_s = 0.0
        layout = homes.layout
        for kind, units, count in (
            (UnitKind.BLOCK, layout.blocks, block_slots),
            (layout.head[0].kind, layout.head, head_slots),
        ):
            nbytes = max((slot_bytes(u, not homes[u].resident) for u in units), default=0)
            if nbytes:
                self._pools[kind] = BufferPool(nbytes, count, ledger, Category.WEIGHTS, f"{kind} slots", pin)

    def start(self, stays: Sequence[Stay]) -> None:
        """Begin fetching these units in this order."""
        for stay in stays:
            self._thread.run(lambda stay=stay: self._fetch(stay))  # type: ignore[misc]

    def next(self) -> Held:
        """The next unit of the sequence, in memory and updated. Raises what went wrong on the way."""
        start = time.perf_counter()
        held = self._arrived.get()
        if isinstance(held, BaseException):
            raise held
        held.ready.wait()
        held.updated.wait()
        self.waited_s += time.perf_counter() - start
        return held

    def close(self) -> None:
        """End the thread (waking it if it waits for a slot) and free the slots."""
        for pool in self._pools.values():
            pool.close()
        self._thread.close()

    def _fetch(self, stay: Stay) -> None:
        try:
            self._arrived.put(self._hold(stay))
        except BaseException as error:
            self._arrived.put(error)
            raise

    def _hold(self, stay: Stay) -> Held:
        if stay.again:
            return self._kept.pop(stay.unit.name)
        home = self._homes[stay.unit]
        held = Held(home, holds=2 if stay.keep else 1)
        if stay.keep:
            self._kept[stay.unit.name] = held
        if not home.resident:
            home.settle()
            held.slot = self._pools[stay.unit.kind].acquire(who=stay.unit.name)
            held.ready = self._read(held, held.slot)
        if home.updating is not None:
            held.updated = home.updating
        if stay.update is not None:
            held.hold()
            held.updated = stay.update.done
            stay.update.weights, stay.update.after = held.master, held.ready
            stay.update.on_written = held.release
            self._updater.submit(stay.update)
        return held

    def _read(self, held: Held, slot: Buffer) -> Transfer:
        unit, store = held.home.unit, self._homes.store
        reads = []
        at = 0
        if unit.trained and held.home.weights is None:
            held.master = slot.tensor(torch.float32, unit.numel)
            at = unit.master_bytes
            reads += [store.read(name, part) for name, part in weight_parts(unit, held.master)]
        if unit.frozen and held.home.frozen is None:
            held.frozen = slot.tensor(torch.uint8, unit.frozen_bytes, at)
            reads.append(store.read(frozen_name(unit), as_bytes(held.frozen)))
        return Transfer.all(reads)


def slot_bytes(unit: Unit, weights_on_ssd: bool) -> int:
    """Bytes of a slot that a unit needs for a stay."""
    return unit.master_bytes + unit.frozen_bytes if weights_on_ssd else 0
