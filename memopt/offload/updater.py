"""The optimizer's own thread: walks a unit's vectors span by span, reading ahead what lives on SSD, writing behind.

While the main thread computes the next block, this thread updates the last one. Reads run ahead of it by as many
spans as the ring has buffers, across the border of one unit and the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from memopt.offload.gradients import RowGradient, held_units
from memopt.offload.homes import Home, Homes, as_bytes, gradient_name, moments_name, weights_name
from memopt.offload.layout import CHUNK, MASTER_ITEMSIZE, PAGE, Layout, Span, UnitKind
from memopt.optim_types import ChunkKey
from memopt.plan_types import Residence
from memopt.store.buffers import Buffer, BufferPool
from memopt.store.transfer import SerialThread, Transfer
from memopt.tiers import Tier


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


def ring_bytes(layout: Layout, residence: Mapping[str, Residence], *, clips: bool) -> int:
    """Bytes of one ring buffer: of all spans, the most that has to pass through it; 0 when nothing does.

    Held gradients and records come from where they live. Weights do when no slot brings them: in the sweep of a clipped
    run, and always for tables that only rows are looked up in.
    """
    held = {u.name for u in held_units(layout, clips=clips)}
    most = 0
    for unit in layout.units:
        where = residence[unit.name]
        late = clips or unit.kind in (UnitKind.EMBED, UnitKind.REST)
        vectors = (unit.name in held and where.gradient == Tier.SSD) + (late and where.weights == Tier.SSD)
        for segment in unit.segments:
            record = segment.span_record_bytes if where.moments == Tier.SSD else 0
            most = max(most, vectors * MASTER_ITEMSIZE * segment.span_numel + record)
    return most


def update_scratch_bytes(layout: Layout) -> int:
    """Bytes of temporaries that the update of the most demanding span takes."""
    return max((s.scratch_bytes for u in layout.units for s in u.segments), default=0)


class Updater:
    """Runs updates in the order they were announced by `expect`. Belongs to one engine; `close` ends the thread."""

    def __init__(self, homes: Homes, ring: BufferPool | None, threads: int):
        """`ring` is None when everything lives in DRAM."""
        self._homes, self._ring = homes, ring
        self._thread = SerialThread("memopt-update")
        self._thread.run(lambda: torch.set_num_threads(threads)).wait()
        self._ahead: deque[_Ahead] = deque()
        self._expected: deque[tuple[Update, Span]] = deque()
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
                    self._expected.extend((update, span) for span in update.home.unit.spans)
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
                for span in update.home.unit.spans:
                    writes += self._span(update, span)
            update.home.writes = writes
            self._writes += writes
            self._writes = [w for w in self._writes if not w.done() or w.error is not None]
        except BaseException as caught:
            error = self._failed = caught
        written = Transfer.all(writes)
        written.then(lambda _: update.on_written())
        update.done.complete(error)

    def _span(self, update: Update, span: Span) -> list[Transfer]:
        home, segment = update.home, span.segment
        ahead = self._next_ahead(update, span) if update.through_ring else None
        record = _need(ahead).record() if home.moments is None else _slice_record(home.moments, span)
        weights = _need(ahead).weights() if update.weights_in_ring else _slice(update.weights, span)
        grads = self._gradient(update, ahead, span)
        if update.terms.scale != 1.0:
            grads.mul_(update.terms.scale)
        segment.rule.update_(
            weights,
            grads,
            record,
            decay_numel=span.decay_numel,
            lr=update.terms.lr,
            key=ChunkKey(step=update.terms.step, tensor=home.index, position=span.start),
        )
        writes = []
        homes = self._homes  # without a store nothing lives there and nothing is saved
        if home.moments is None or update.terms.save:
            writes.append(homes.store.write(moments_name(segment), as_bytes(record), span.record_offset))
        if home.weights is None or update.terms.save:
            writes.append(homes.store.write(weights_name(segment), as_bytes(weights), MASTER_ITEMSIZE * span.offset))
        if ahead is not None:
            Transfer.all(writes).then(lambda _: self._give_back(ahead.buffer))
        return writes

    def _gradient(self, update: Update, ahead: _Ahead | None, span: Span) -> torch.Tensor:
        if update.gradient is not None:
            grads = _slice(update.gradient, span)
        elif update.spilled:
            grads = _need(ahead).gradient()
        else:
            if self._zeros.numel() < span.numel:
                self._zeros = torch.zeros(max(CHUNK, span.numel))
            grads = self._zeros[: span.numel].zero_()
        if update.rows is not None:
            update.rows.add_to_(grads, update.home.unit, span.start)
        return grads

    def _give_back(self, buffer: Buffer) -> None:
        buffer.release()
        if self._expected and not self._closing:
            self._thread.run(self._read_ahead)  # keeps the disk busy while this thread has nothing to update

    def _next_ahead(self, update: Update, span: Span) -> _Ahead:
        self._read_ahead()
        if not self._ahead:  # every buffer is still being written from: wait for one
            assert self._ring is not None
            self._start_read(self._ring.acquire(who="update"))
        ahead = self._ahead.popleft()
        assert ahead.update is update and ahead.span == span, "updates must be submitted in the announced order"
        try:
            ahead.ready.wait()
        except BaseException:
            ahead.buffer.release()
            raise
        return ahead

    def _read_ahead(self) -> None:
        while self._expected and self._ring is not None and self._ring.free_count():
            self._start_read(self._ring.acquire(who="read ahead"))

    def _start_read(self, buffer: Buffer) -> None:
        update, span = self._expected.popleft()
        ahead = _Ahead(update, span, buffer)
        home, store, start = update.home, self._homes.store, MASTER_ITEMSIZE * span.start
        reads = []
        if home.moments is None:
            reads.append(store.read(moments_name(span.segment), as_bytes(ahead.record()), span.record_offset))
        if update.spilled:
            reads.append(self._homes.spill.read(gradient_name(home.unit), as_bytes(ahead.gradient()), start))
        if update.weights_in_ring:
            offset = MASTER_ITEMSIZE * span.offset
            reads.append(store.read(weights_name(span.segment), as_bytes(ahead.weights()), offset))
        ahead.ready = Transfer.all(reads)
        self._ahead.append(ahead)


class _Ahead:
    """One ring buffer: of [gradient | weights | record] of a span what passes through it."""

    def __init__(self, update: Update, span: Span, buffer: Buffer):
        self.update, self.span, self.buffer = update, span, buffer
        self.ready = Transfer(0)
        vector = MASTER_ITEMSIZE * span.numel
        assert vector % PAGE == 0, "direct I/O needs each of them on a page"
        self._weights_start = vector if update.spilled else 0
        self._record_start = self._weights_start + (vector if update.weights_in_ring else 0)

    def gradient(self) -> torch.Tensor:
        return self.buffer.tensor(torch.float32, self.span.numel)

    def weights(self) -> torch.Tensor:
        return self.buffer.tensor(torch.float32, self.span.numel, self._weights_start)

    def record(self) -> torch.Tensor:
        return self.buffer.tensor(torch.uint8, self.span.record_bytes, self._record_start)


def _slice_record(moments: torch.Tensor, span: Span) -> torch.Tensor:
    start = span.segment.record_start + span.record_offset
    return moments[start : start + span.record_bytes]


def _slice(vector: torch.Tensor | None, span: Span) -> torch.Tensor:
    assert vector is not None
    return vector[span.start : span.stop]


def _need(ahead: _Ahead | None) -> _Ahead:
    assert ahead is not None
    return ahead
