"""The optimizer's own thread: walks a unit's vectors chunk by chunk, reading ahead what lives on SSD, writing behind.

While the main thread computes the next block, this thread updates the last one. Reads run ahead of it by as many
chunks as the ring has buffers, across the border of one unit and the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from memopt.offload.gradients import RowGradient
from memopt.offload.homes import Home, Homes, as_bytes, gradient_name, moments_name, weights_name
from memopt.offload.layout import CHUNK
from memopt.optim_types import ChunkKey, UpdateRule
from memopt.store.buffers import Buffer, BufferPool
from memopt.store.transfer import SerialThread, Transfer
from memopt.units import MiB

_CHUNK_BYTES = 4 * CHUNK
assert 4 * MiB == _CHUNK_BYTES


@dataclass(frozen=True, kw_only=True)
class StepTerms:
    """What one optimizer step applies to every gradient."""

    step: int
    lr: float
    scale: float = 1.0
    """Clipping coefficient."""
    save: bool = False
    """Also write what lives in DRAM: the next commit is to be a complete snapshot."""


@dataclass(kw_only=True)
class Update:
    """One unit to update. Vectors that live on SSD pass through the ring, unless `weights` or `gradient` bring them."""

    home: Home
    terms: StepTerms
    weights_in_ring: bool = False
    """No slot holds the weights: they pass through the ring too (tables, and sweeps without computation)."""
    spilled: bool = False
    """The dense gradient is on SSD."""
    rows: RowGradient | None = None
    weights: torch.Tensor | None = None
    """(numel,) of the slot, set before `submit`."""
    gradient: torch.Tensor | None = None
    """(numel,) dense gradient in memory, set before `submit`."""
    after: Transfer = field(default_factory=lambda: Transfer(0))
    """Wait for this first: the slot is being filled."""
    on_written: Callable[[], None] = lambda: None
    """Called when every write of this unit is done (also after an error): slots are given back here."""
    done: Transfer = field(default_factory=Transfer)
    """The new weights are in memory and all writes are issued."""

    @property
    def through_ring(self) -> bool:
        return self.home.moments is None or self.spilled or self.weights_in_ring


def ring_bytes(rule: UpdateRule) -> int:
    """Bytes of one ring buffer: the record, the gradient and the weights of a chunk."""
    return rule.record_bytes(CHUNK) + 2 * _CHUNK_BYTES


class Updater:
    """Runs updates in the order they were announced by `expect`. Belongs to one engine; `close` ends the thread."""

    def __init__(self, homes: Homes, rule: UpdateRule, ring: BufferPool, threads: int):
        self._homes, self._rule, self._ring = homes, rule, ring
        self._thread = SerialThread("memopt-update")
        self._thread.run(lambda: torch.set_num_threads(threads)).wait()
        self._ahead: deque[_Ahead] = deque()
        self._expected: deque[tuple[Update, int, int]] = deque()
        self._zeros = torch.zeros(0)
        self._failed: BaseException | None = None
        self._closing = False
        self._writes: list[Transfer] = []

    def expect(self, updates: Sequence[Update]) -> None:
        """Announce the next updates, so that their vectors can be read ahead; `submit` each when its gradient is
        there."""

        def announce() -> None:
            for update in updates:
                if update.through_ring:
                    self._expected.extend((update, a, b) for a, b in update.home.unit.chunks())
            self._read_ahead()

        self.run(announce)

    def submit(self, update: Update) -> None:
        """The gradient of an announced update is complete: run it when its turn comes."""
        update.home.updating = update.done
        self._thread.run(lambda: self._run(update))

    def run(self, work: Callable[[], None]) -> Transfer:
        """Run something else in this thread, in turn (norms of gradients, for one)."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._failed = self._failed or error
                raise

        return self._thread.run(guarded)

    def track(self, write: Transfer) -> None:
        """Have `drain` wait for this write too. To be called in this thread."""
        self._writes.append(write)

    def drain(self) -> None:
        """Wait until all submitted updates are done and everything they wrote has reached the file."""
        written: list[Transfer] = []

        def collect() -> None:
            written.extend(self._writes)
            self._writes.clear()

        self._thread.run(collect).wait()
        for write in written:
            write.wait()
        self.require_sound()

    def require_sound(self) -> None:
        """Raise what went wrong in any update or write so far: units are then of different steps."""
        failed = [w.error for w in list(self._writes) if w.done() and w.error is not None]
        if self._failed is not None or failed:
            raise self._failed or failed[0]

    def close(self) -> None:
        """End the thread and give back what was read ahead."""

        self._closing = True

        def forget() -> None:
            self._expected.clear()
            while self._ahead:
                ahead = self._ahead.popleft()
                try:
                    ahead.ready.wait()
                finally:
                    ahead.buffer.release()

        self._thread.run(forget)
        self._thread.close()

    def _run(self, update: Update) -> None:
        writes: list[Transfer] = []
        error: BaseException | None = None
        try:
            if self._failed is not None:
                raise self._failed
            update.after.wait()
            with torch.no_grad():
                for a, b in update.home.unit.chunks():
                    writes += self._chunk(update, a, b)
            update.home.writes = writes
            self._writes += writes
            self._writes = [w for w in self._writes if not w.done() or w.error is not None]
        except BaseException as caught:
            error = self._failed = caught
        written = Transfer.all(writes)
        written.then(lambda _: update.on_written())
        update.done.complete(error)

    def _chunk(self, update: Update, a: int, b: int) -> list[Transfer]:
        home, unit = update.home, update.home.unit
        ahead = self._next_ahead(update, a) if update.through_ring else None
        n = b - a
        record = (
            _slice_record(home.moments, self._rule, a, b)
            if home.moments is not None
            else _need(ahead).record(self._rule, n)
        )
        weights = _need(ahead).weights(n) if update.weights_in_ring else _slice(update.weights, a, b)
        grads = self._gradient(update, ahead, a, b)
        if update.terms.scale != 1.0:
            grads.mul_(update.terms.scale)
        self._rule.update_(
            weights,
            grads,
            record,
            decay_numel=unit.decay_numel - a,
            lr=update.terms.lr,
            key=ChunkKey(step=update.terms.step, tensor=home.index, position=a),
        )
        writes = []
        homes = self._homes  # without a store nothing lives there and nothing is saved
        if home.moments is None or update.terms.save:
            writes.append(homes.store.write(moments_name(unit), as_bytes(record), self._rule.record_bytes(a)))
        if home.weights is None or update.terms.save:
            writes.append(homes.store.write(weights_name(unit), as_bytes(weights), 4 * a))
        if ahead is not None:
            Transfer.all(writes).then(lambda _: self._give_back(ahead.buffer))
        return writes

    def _gradient(self, update: Update, ahead: _Ahead | None, a: int, b: int) -> torch.Tensor:
        if update.gradient is not None:
            grads = update.gradient[a:b]
        elif update.spilled:
            grads = _need(ahead).gradient(b - a)
        else:
            if self._zeros.numel() < CHUNK:
                self._zeros = torch.zeros(CHUNK)
            grads = self._zeros[: b - a].zero_()
        if update.rows is not None:
            update.rows.add_to_(grads, update.home.unit, a)
        return grads

    def _give_back(self, buffer: Buffer) -> None:
        buffer.release()
        if self._expected and not self._closing:
            self._thread.run(self._read_ahead)  # keeps the disk busy while this thread has nothing to update

    def _next_ahead(self, update: Update, a: int) -> _Ahead:
        self._read_ahead()
        if not self._ahead:  # every buffer is still being written from: wait for one
            self._start_read(self._ring.acquire(who="update"))
        ahead = self._ahead.popleft()
        assert ahead.update is update and ahead.start == a, "updates must be submitted in the announced order"
        try:
            ahead.ready.wait()
        except BaseException:
            ahead.buffer.release()
            raise
        return ahead

    def _read_ahead(self) -> None:
        while self._expected and self._ring.free_count():
            self._start_read(self._ring.acquire(who="read ahead"))

    def _start_read(self, buffer: Buffer) -> None:
        update, a, b = self._expected.popleft()
        ahead = _Ahead(update, a, buffer)
        home, store, n = update.home, self._homes.store, b - a
        reads = []
        if home.moments is None:
            reads.append(
                store.read(moments_name(home.unit), as_bytes(ahead.record(self._rule, n)), self._rule.record_bytes(a))
            )
        if update.spilled:
            reads.append(self._homes.spill.read(gradient_name(home.unit), as_bytes(ahead.gradient(n)), 4 * a))
        if update.weights_in_ring:
            reads.append(store.read(weights_name(home.unit), as_bytes(ahead.weights(n)), 4 * a))
        ahead.ready = Transfer.all(reads)
        self._ahead.append(ahead)


class _Ahead:
    """One ring buffer: [gradient | weights | record] of a chunk."""

    def __init__(self, update: Update, start: int, buffer: Buffer):
        self.update, self.start, self.buffer = update, start, buffer
        self.ready = Transfer(0)

    def gradient(self, n: int) -> torch.Tensor:
        return self.buffer.tensor(torch.float32, n)

    def weights(self, n: int) -> torch.Tensor:
        return self.buffer.tensor(torch.float32, n, _CHUNK_BYTES)

    def record(self, rule: UpdateRule, n: int) -> torch.Tensor:
        return self.buffer.tensor(torch.uint8, rule.record_bytes(n), 2 * _CHUNK_BYTES)


def _slice_record(moments: torch.Tensor, rule: UpdateRule, a: int, b: int) -> torch.Tensor:
    return moments[rule.record_bytes(a) : rule.record_bytes(b)]


def _slice(vector: torch.Tensor | None, a: int, b: int) -> torch.Tensor:
    assert vector is not None
    return vector[a:b]


def _need(ahead: _Ahead | None) -> _Ahead:
    assert ahead is not None
    return ahead
