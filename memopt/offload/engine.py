"""The engine of SSD-offloaded training: owns the memory, the threads and the pending update; runs steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from memopt.errors import MemoptError
from memopt.ledger import Ledger
from memopt.offload.activations import Activations
from memopt.offload.gradients import RowGradient, held_units, squared_norm
from memopt.offload.homes import Home, Homes, as_bytes, gradient_name, moments_name, weights_name
from memopt.offload.layout import Layout, Unit, UnitKind
from memopt.offload.model import Batch, Binder, LayeredModel
from memopt.offload.rows import RowReader, row_bytes
from memopt.offload.sink import GradientSink
from memopt.offload.step import StepRun
from memopt.offload.stream import WeightStream
from memopt.offload.updater import StepTerms, Update, Updater, ring_bytes
from memopt.optim_types import UpdateRule
from memopt.plan_types import Plan
from memopt.store.block_store import BlockStore
from memopt.store.buffers import BufferPool
from memopt.store.transfer import Transfer
from memopt.tiers import Category, Tier


class NonFinite(MemoptError):
    """The loss or the gradient norm of a step is NaN or infinite. The state of the last save is intact."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the engine needs besides model, plan and store."""

    device: torch.device
    compute_dtype: torch.dtype
    clip_norm: float
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    seed: int
    width: int
    """Of the hidden state."""
    max_tokens: int
    """Tokens of the largest step, all micro-batches together."""
    skip_nonfinite: bool = False


@dataclass(frozen=True)
class StepResult:
    """One step. `grad_norm` is None where no clipping asks for it."""

    loss: float
    grad_norm: float | None
    target_tokens: int
    skipped: bool = False


@dataclass(frozen=True)
class Progress:
    """How far training has come: what a commit remembers."""

    step: int = 0
    """Batches seen."""
    updates: int = 0
    """Optimizer updates applied (skipped steps do not count)."""


class Engine:
    """Trains a layered model out of a block store. Use as a context manager, or call `close`.

    The calling thread computes; one thread fetches weights, one updates, the store's pool moves bytes.
    """

    def __init__(
        self,
        model: LayeredModel,
        layout: Layout,
        plan: Plan,
        store: BlockStore | None,
        scratch: BlockStore | None,
        ledger: Ledger,
        rule: UpdateRule,
        settings: EngineSettings,
        *,
        initial: Callable[[list[str]], Mapping[str, torch.Tensor]] | None = None,
        progress: Progress | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        """`store` is None when everything lives in DRAM and nothing is to be saved; `initial` then gives the weights.

        `about` goes into the meta of every commit, beside the progress.
        """
        self.model, self.layout, self.plan, self.store = model, layout, plan, store
        self.settings, self._rule = settings, rule
        self.progress = progress or Progress()
        self._about = dict(about or {})
        self.binder = Binder(model.module)
        _move_buffers(model.module, settings.device)
        pin = settings.device.type == "cuda"
        held = {u.name for u in held_units(layout, clips=settings.clip_norm > 0)}
        with ExitStack() as undo:
            self.homes = Homes(
                layout, plan.residence, store, scratch, ledger, rule, hold_gradients=frozenset(held), pin=pin
            )
            undo.callback(self.homes.close)
            if store is not None:
                self.homes.load()
            else:
                assert initial is not None
                self.homes.fill(initial)
            needs_ring = any(not _all_in_dram(self.homes[u], held) for u in layout.units if u.trained)
            count = plan.ring_buffers if needs_ring else 1
            ring = BufferPool(ring_bytes(rule), count, ledger, Category.BUFFERS, "update ring", pin)
            undo.callback(ring.close)
            self.updater = Updater(self.homes, rule, ring, plan.update_threads)
            undo.callback(self.updater.close)
            self.stream = WeightStream(
                self.homes, self.updater, ledger, block_slots=plan.block_slots, head_slots=plan.head_slots, pin=pin
            )
            undo.callback(self.stream.close)
            self.sinks = SinkPool(self, ledger, pin)
            undo.callback(self.sinks.close)
            self.activations = Activations(
                layers=len(layout.blocks),
                on_ssd=plan.activation_layers_on_ssd,
                capacity_tokens=settings.max_tokens,
                width=settings.width,
                dtype=settings.compute_dtype,
                scratch=scratch,
                ledger=ledger,
                pin=pin,
            )
            undo.callback(self.activations.close)
            for category, nbytes in row_bytes(layout, settings.max_tokens, settings.compute_dtype).items():
                if nbytes:
                    undo.callback(ledger.charge(Tier.DRAM, category, nbytes, "embedding rows of a step").release)
            self.rows = RowReader(self.homes, ledger)
            undo.callback(self.rows.close)
            self._close = undo.pop_all().close
        self.trained_names = frozenset(p.name for u in layout.units for p in u.trained)
        in_blocks = {name for block in model.blocks for name in self.binder.inside(block)}
        self.entry_trains = any(p.name not in in_blocks for p in layout.rest.trained)
        self.head_bias_name = self.binder.name_of(model.head.bias)
        self._pending: Pending | None = None
        self._commit = Transfer(0)
        self._unsaved = False
        self._broken: str | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and give the memory back; what was not committed is lost."""
        self._close()

    @property
    def clips(self) -> bool:
        return self.settings.clip_norm > 0

    def step(self, batch: Sequence[Batch], *, lr: float, save: bool) -> StepResult:
        """One optimizer step over the micro-batches of `batch`.

        With `save` the state after this step becomes durable (with clipping: during the next step, or in `flush`).
        Raises NonFinite, and whatever went wrong in a thread.
        """
        run = StepRun(self, batch, self.progress.step + 1, train=True)
        terms = StepTerms(step=self.progress.updates + 1, lr=lr, save=save)
        with self._whole(f"step {self.progress.step + 1}"):
            loss = run.train(None if self.clips else terms)
            norm = run.gradient_norm() if self.clips else None
        finite = math.isfinite(loss) and (norm is None or math.isfinite(norm))
        seen = self.progress.step + 1
        if not finite and not self.settings.skip_nonfinite:
            self._broken = f"step {seen} was not finite"  # its forward has applied the update before, uncommitted
            raise NonFinite(
                f"step {seen}: the loss is {loss}"
                + (f" and the gradient norm {norm}" if math.isfinite(loss) else "")
                + "; stopped, the last saved state is intact (--skip-nonfinite goes on without such steps; "
                "a lower --lr or more --warmup-steps often helps)"
            )
        updates = self.progress.updates + (1 if finite else 0)
        if self.clips and finite:
            assert norm is not None
            scale = min(1.0, self.settings.clip_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
            self._pending = Pending(replace(terms, scale=scale), run.row_gradient(), Progress(seen, updates))
        self.progress = Progress(seen, updates)
        self._unsaved = True
        if not self.clips and save:
            self._commit_now(self.progress)
        return StepResult(loss, norm, run.target_tokens, skipped=not finite)

    def evaluate(self, batch: Sequence[Batch]) -> tuple[float, int]:
        """Mean loss over the target tokens of these micro-batches, and how many there are. No state changes."""
        self.flush()
        run = StepRun(self, batch, self.progress.step, train=False)
        with self._whole(f"the evaluation after step {self.progress.step}"):
            return run.evaluate(), run.target_tokens

    def flush(self) -> None:
        """Apply a pending update now, in a sweep of its own."""
        self._require_whole()
        if self._pending is not None:
            updates = self.begin_pending(riding=False)
            for update in updates.values():
                self.updater.submit(update)
            self.end_pending()
        self.updater.drain()

    def save(self) -> None:
        """Make the present state durable and wait for it."""
        self.flush()
        self._commit.wait()
        if not self._unsaved or self.store is None:
            return
        writes = []
        for unit in self.layout.units:
            home = self.homes[unit]
            if home.weights is not None:
                writes.append(self.store.write(weights_name(unit), as_bytes(home.weights)))
            if home.moments is not None:
                writes.append(self.store.write(moments_name(unit), as_bytes(home.moments)))
        Transfer.all(writes).wait()
        self._commit_now(self.progress)
        self.updater.drain()
        self._commit.wait()
        self._unsaved = False

    @property
    def saved_step(self) -> int:
        """The step the last durable save is of."""
        return 0 if self.store is None else int(self.store.meta.get("step", 0))

    @property
    def waited_s(self) -> float:
        """Seconds the computation stood still for weights, updates or a free gradient slot."""
        return self.stream.waited_s + self.sinks.waited_s

    def parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Current values of parameters, trained ones in float32. Call `flush` first."""
        return self.homes.parameters(names)

    def begin_pending(self, *, riding: bool) -> dict[str, Update]:
        """Announce the update that waits for this forward: rest and tables first, then blocks in order, then the head.

        Units that the forward visits get their weights from the visit when `riding`; all others pass through the ring.
        """
        if self._pending is None:
            return {}
        pending, layout = self._pending, self.layout
        visited = set(layout.blocks) | (set() if layout.tied else set(layout.head)) if riding else set()
        order = (layout.rest, *layout.embed, *layout.blocks, *(() if layout.tied else layout.head))
        updates = {}
        for unit in order:
            home = self.homes[unit]
            if not unit.trained:
                continue
            updates[unit.name] = Update(
                home=home,
                terms=pending.terms,
                weights=home.weights,
                weights_in_ring=home.weights is None and unit not in visited,
                gradient=home.gradient,
                spilled=home.gradient is None and not (unit.kind == UnitKind.EMBED and not layout.tied),
                rows=pending.rows.of(unit) if pending.rows is not None and unit.kind == UnitKind.EMBED else None,
            )
        self.announce(list(updates.values()))
        return updates

    def end_pending(self) -> None:
        """Every unit of the pending update has been submitted: commit if the step was to be saved."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if pending.terms.save:
                self._commit_now(pending.progress)
                self._unsaved = self.progress.step != pending.progress.step

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """What breaks off in here leaves half a step behind, which must not be saved or built upon."""
        self._require_whole()
        try:
            yield
        except BaseException as error:
            self._broken = f"{what} was broken off ({type(error).__name__}: {error})"
            raise

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise MemoptError(f"{self._broken}; open a new engine: it starts from the last save")

    def announce(self, updates: Sequence[Update]) -> None:
        """Updates are coming in this order; nothing is modified before the last commit is durable."""
        commit = self._commit
        self.updater.run(commit.wait)
        self.updater.expect(updates)

    def _commit_now(self, progress: Progress) -> None:
        """Commit once everything submitted so far has been issued; does not wait."""
        if self.store is None:
            return
        store, ticket = self.store, Transfer()
        meta = {**self._about, "step": progress.step, "updates": progress.updates}

        def commit() -> None:
            try:
                self.updater.require_sound()  # a unit that was left out would not be missed by the store
                store.commit(meta).then(lambda done: ticket.complete(done.error))
            except BaseException as error:
                ticket.complete(error)
                raise

        self._commit = ticket
        self.updater.run(commit)
        self._unsaved = False


@dataclass(frozen=True)
class Pending:
    """An update whose gradients are held and whose clipping coefficient is known."""

    terms: StepTerms
    rows: RowGradient | None
    progress: Progress


class SinkPool:
    """Gradient memory: slots for units whose gradient is not held in DRAM, one size for blocks and one for tables."""

    def __init__(self, engine: Engine, ledger: Ledger, pin: bool):
        self._engine = engine
        plan, layout = engine.plan, engine.layout
        self._pools: dict[UnitKind, BufferPool] = {}
        self.waited_s = 0.0
        head_kind = layout.head[0].kind
        for kind, units, count in (
            (UnitKind.BLOCK, layout.blocks, plan.gradient_slots),
            (head_kind, layout.head, plan.head_gradient_slots),
        ):
            nbytes = max((u.master_bytes for u in units if engine.homes[u].gradient is None), default=0)
            if nbytes:
                self._pools[kind] = BufferPool(nbytes, count, ledger, Category.GRADIENTS, f"{kind} gradient slots", pin)

    def open(self, unit: Unit) -> GradientSink:
        """A zeroed sink for a unit's gradient; waits for a slot."""
        home = self._engine.homes[unit]
        start = time.perf_counter()
        slot = None if home.gradient is not None else self._pools[unit.kind].acquire(who=unit.name)
        self.waited_s += time.perf_counter() - start
        return GradientSink(home, slot, self._engine.settings.device)

    def spill(self, sink: GradientSink) -> list[float]:
        """Hold a complete gradient for later: its sum of squares, and its bytes on SSD if it has no home in DRAM.

        Done in the update thread: the sum is in the list after the next `Updater.drain`.
        """
        squares: list[float] = []

        def work() -> None:
            squares.append(squared_norm(sink.vector))
            if sink.home.gradient is None:
                name = gradient_name(sink.home.unit)
                write = self._engine.homes.spill.write(name, as_bytes(sink.vector))
                write.then(lambda _: sink.release())
                self._engine.updater.track(write)

        self._engine.updater.run(work)
        return squares

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Rotary tables and the like go to where the blocks are computed; parameters are meta placeholders and stay."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(device)


def _all_in_dram(home: Home, held: set[str]) -> bool:
    gradient = home.gradient is not None or home.unit.name not in held
    return home.weights is not None and home.moments is not None and gradient
