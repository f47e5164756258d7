"""One step, layer by layer: every unit is in memory once per direction and sees all micro-batches (DESIGN 6).

    entry      embeddings, masks, rotary tables of every micro-batch; the calls of the blocks are recorded
    forward    block 0 ... L-1, without gradients; only the inputs of the blocks are kept
    exit       final norm, head and loss, in pieces; the gradient of the last hidden state
    backward   block L-1 ... 0: recompute, differentiate; the unit's gradient is complete here
    entry      once more, with gradients into the embedding and whatever else the entry has

Without clipping a unit is updated as soon as its gradient is complete. With global-norm clipping the norm must be known
first: gradients are held (DRAM or SSD) and the update rides on the next step's forward, which reads the weights anyway.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from memopt.errors import BadInput
from memopt.offload.batches import Span, interned, spans_of, targets_of
from memopt.offload.gradients import RowGradient, squared_norm
from memopt.offload.head import HeadLoss, Tile
from memopt.offload.layout import UnitKind
from memopt.offload.model import Batch, BlockCall, first
from memopt.offload.parts import Parts
from memopt.offload.pending import Updates
from memopt.offload.rows import CompactEmbedding
from memopt.offload.sink import GradientSink
from memopt.offload.stream import Held, Stay
from memopt.offload.updater import StepTerms, Update

_ENTRY, _EXIT = 1 << 20, 1 << 21  # "block numbers" of the random streams of entry and exit


class StepRun:
    """The passes of one step (or of one evaluation) over its micro-batches."""

    def __init__(self, parts: Parts, updates: Updates, batch: Sequence[Batch], number: int, *, train: bool):
        self._parts, self._updates, self._number, self._train = parts, updates, number, train
        device = parts.settings.device
        self._batch = [{k: v.to(device) for k, v in micro.items() if k != "labels"} for micro in batch]
        self._spans = spans_of(batch)
        tokens = self._spans[-1].stop
        if tokens > parts.settings.max_tokens:
            raise BadInput(
                f"step {number}: {tokens} tokens, but the plan was made for at most {parts.settings.max_tokens} a step"
            )
        self._tokens = tokens
        self._targets = targets_of(batch, self._spans)
        if not len(self._targets):
            raise BadInput(f"step {number}: no token of the batch has a label; there is nothing to learn from")
        self._rows = torch.cat([m["input_ids"].flatten() for m in batch]).cpu().unique()
        self._table = torch.zeros(0)
        self._calls: list[Sequence[BlockCall]] = []
        self._rest: GradientSink | None = None
        self._loss: HeadLoss | None = None
        self._row_gradient: RowGradient | None = None
        self._squares: list[list[float]] = []
        self._backward_updates: dict[str, Update] = {}
        self._late_updates: list[Update] = []

    @property
    def target_tokens(self) -> int:
        """Tokens the loss is the mean over."""
        return len(self._targets)

    def row_gradient(self) -> RowGradient | None:
        """The gradient of the embedding's rows, once `train` is through."""
        return self._row_gradient

    def train(self, terms: StepTerms | None) -> float:
        """All passes; returns the loss. With `terms` every unit is updated at once, else gradients are held.

        Nothing is updated or held when the loss is not finite.
        """
        parts, layout = self._parts, self._parts.layout
        riding = self._first_updates()
        heads = self._head_stays()
        last = len(layout.blocks) - 1
        stays = [Stay(u, riding.pop(u.name, None), keep=u.index == last) for u in layout.blocks]
        stays += [replace(stay, update=riding.pop(stay.unit.name, None)) for stay in heads]
        stays += [Stay(u, again=u.index == last) for u in reversed(layout.blocks)]
        parts.stream.start(stays)
        for unit in (layout.rest, *layout.embed):
            parts.homes[unit].wait_updated()
        with self._scope():
            self._entry()
            self._forward()
            loss, tile = self._exit_forward()
            if math.isfinite(loss) or parts.settings.skip_nonfinite:
                self._updates.end()  # otherwise what stays saved is the last state whose loss was seen to be finite
            if math.isfinite(loss):
                if terms is not None:
                    self._announce(terms)
                self._exit_backward(tile, terms)
                if terms is not None:
                    # only now: a tied table's gradient is spilled by the exit, and must not be read ahead of that
                    parts.updater.expect(self._late_updates)
                self._backward(terms)
                self._entry_backward()
                self._finish(terms)
            else:
                self._abandon(tile, len(layout.blocks) + (len(heads) // 2 if len(heads) > 1 else 0))
        return loss

    def evaluate(self) -> float:
        """Entry, forward and exit; returns the loss."""
        parts, layout = self._parts, self._parts.layout
        for unit in (layout.rest, *layout.embed):
            parts.homes[unit].wait_updated()
        parts.stream.start([Stay(u) for u in (*layout.blocks, *layout.head)])
        with self._scope():
            self._entry()
            self._forward()
            loss = self._head_loss()
            for _ in layout.head:
                with self._held() as held:
                    loss.forward(self._tile(held, None))
        return loss.loss()

    def gradient_norm(self) -> float:
        """Global norm of the held gradients. Waits until they are where the next step will read them."""
        self._parts.updater.drain()
        return math.sqrt(sum(sum(squares) for squares in self._squares))

    # -- passes

    def _first_updates(self) -> dict[str, Update]:
        """Have what the entry needs up to date: the rest and the embedding table; returns what rides on the forward."""
        parts, layout = self._parts, self._parts.layout
        updates = self._updates.begin(riding=True)
        for unit in (layout.rest, *layout.embed):
            if unit.name in updates:
                parts.updater.submit(updates.pop(unit.name))
        return updates

    def _entry(self) -> None:
        parts = self._parts
        settings = parts.settings
        self._table = parts.rows.gather(parts.layout.embed, self._rows, settings.compute_dtype).to(settings.device)
        parts.activations.begin(self._tokens)
        hidden = parts.activations.new(0)
        seen: list[torch.Tensor] = []
        with torch.no_grad(), CompactEmbedding(parts.model.embedding, self._rows).bound(self._table):
            for index, (micro, span) in enumerate(zip(self._batch, self._spans, strict=True)):
                self._seed(_ENTRY, index)
                entry = parts.model.enter(micro)
                hidden[span.start : span.stop] = entry.hidden.flatten(0, 1).to(hidden.device)
                self._calls.append(interned(entry.calls, seen))
        parts.activations.written(0)

    def _forward(self) -> None:
        acts = self._parts.activations
        for index, block in enumerate(self._parts.model.blocks):
            with self._held() as held, self._bound(held, None), torch.no_grad():
                into = acts.new(index + 1)
                for micro, span in enumerate(self._spans):
                    out = self._run(block, index, micro, self._micro(acts.current(index), span))
                    into[span.start : span.stop] = out.flatten(0, 1).to(into.device)
            acts.written(index + 1)
            acts.passed(index)

    def _exit_forward(self) -> tuple[float, tuple[Held, GradientSink | None] | None]:
        """The loss; with a head of one tile also its gradients, and the tile that is still in memory."""
        parts = self._parts
        self._loss = loss = self._head_loss()
        self._seed(_EXIT, 0)
        if len(parts.layout.head) == 1:
            held = parts.stream.next()
            sink = parts.sinks.open(held.home.unit)
            loss.forward_backward(self._tile(held, sink))
            return loss.loss(), (held, sink)
        for _ in parts.layout.head:
            with self._held() as held:
                loss.forward(self._tile(held, None))
        return loss.loss(), None

    def _exit_backward(self, tile: tuple[Held, GradientSink | None] | None, terms: StepTerms | None) -> None:
        parts = self._parts
        assert self._loss is not None
        if tile is not None:
            self._complete(*tile, terms)
        else:
            self._seed(_EXIT, 0)
            for _ in parts.layout.head:
                held = parts.stream.next()
                sink = parts.sinks.open(held.home.unit)
                self._loss.backward(self._tile(held, sink))
                self._complete(held, sink, terms)
        self._loss = None
        parts.activations.drop(len(parts.layout.blocks))

    def _backward(self, terms: StepTerms | None) -> None:
        parts, acts = self._parts, self._parts.activations
        acts.fetch(len(parts.layout.blocks) - 1)
        for index in reversed(range(len(parts.layout.blocks))):
            held = parts.stream.next()
            hidden = acts.get(index)
            acts.fetch(index - 1)
            sink = parts.sinks.open(held.home.unit)
            with self._bound(held, sink):
                for micro, span in enumerate(self._spans):
                    leaf = self._micro(hidden, span).detach().requires_grad_()
                    out = self._run(parts.model.blocks[index], index, micro, leaf)
                    grad = self._micro(acts.gradient, span)
                    out.backward(grad)
                    assert leaf.grad is not None
                    acts.gradient[span.start : span.stop] = leaf.grad.flatten(0, 1).to(acts.gradient.device)
                    del leaf, out, grad
            acts.drop(index)
            self._complete(held, sink, terms)

    def _entry_backward(self) -> None:
        parts = self._parts
        trained = bool(parts.layout.embed[0].trained)
        if not trained and not parts.entry_trains:
            return
        values = torch.zeros(self._table.shape, dtype=torch.float32, device=self._table.device)
        param = nn.Parameter(self._table, requires_grad=trained)

        def add(table: torch.Tensor) -> None:
            assert table.grad is not None
            values.add_(table.grad)
            table.grad = None

        if trained:
            param.register_post_accumulate_grad_hook(add)
        with CompactEmbedding(parts.model.embedding, self._rows).bound(param):
            for index, (micro, span) in enumerate(zip(self._batch, self._spans, strict=True)):
                self._seed(_ENTRY, index)
                hidden = parts.model.enter(micro).hidden
                hidden.backward(self._micro(parts.activations.gradient, span))
        if trained:
            self._row_gradient = RowGradient(self._rows, values.cpu())

    def _finish(self, terms: StepTerms | None) -> None:
        """What is complete only now: the rest, and the tables the entry looks rows up in."""
        parts = self._parts
        if self._rest is not None:
            self._rest.finish()
        if terms is None:
            self._squares.append(self._late_squares())
            return
        for update in self._late_updates:
            if self._row_gradient is not None and update.home.unit.kind == UnitKind.EMBED:
                update.rows = self._row_gradient.of(update.home.unit)
            parts.updater.submit(update)

    # -- gradients

    def _complete(self, held: Held, sink: GradientSink | None, terms: StepTerms | None) -> None:
        """A unit has seen every micro-batch: update it now, or hold its gradient."""
        parts, unit = self._parts, held.home.unit
        if sink is None:
            held.release()
            return
        sink.finish()
        if terms is None or (parts.layout.tied and unit.kind == UnitKind.EMBED):
            self._squares.append(parts.sinks.spill(sink))
            held.release()
            return
        update = self._backward_updates[unit.name]
        update.weights, update.gradient = held.master, sink.vector

        def over() -> None:
            sink.release()
            held.release()

        update.on_written = over
        parts.updater.submit(update)

    def _announce(self, terms: StepTerms) -> None:
        """Tell the update thread what comes, in the order it will be submitted."""
        parts, layout = self._parts, self._parts.layout
        heads = () if layout.tied else (layout.head if len(layout.head) == 1 else tuple(reversed(layout.head)))
        now = [Update(home=parts.homes[u], terms=terms) for u in (*heads, *reversed(layout.blocks)) if u.trained]
        self._backward_updates = {u.home.unit.name: u for u in now}
        late = [parts.homes[u] for u in (*layout.embed, layout.rest) if u.trained]
        self._late_updates = [self._updates.of_held(home, terms) for home in late]
        self._updates.announce(now)

    def _late_squares(self) -> list[float]:
        """Squares of the gradients that `_complete` has not seen: rest, embedding rows, and their overlap when tied."""
        parts, layout = self._parts, self._parts.layout
        squares = []
        if self._rest is not None:
            squares.append(squared_norm(self._rest.vector))
        if self._row_gradient is not None:
            squares.append(squared_norm(self._row_gradient.values.flatten()))
            if layout.tied:  # |G + E|^2 = |G|^2 + |E|^2 + 2 G.E, and E has few rows
                parts.updater.drain()
                for unit in layout.embed:
                    part = self._row_gradient.of(unit)
                    dense = parts.rows.gather_gradient(unit, part.rows)
                    squares.append(2 * float((dense.double() * part.values.double()).sum()))
        return squares

    def _abandon(self, tile: tuple[Held, GradientSink | None] | None, visits: int) -> None:
        """The loss is not finite: let go of what was fetched for the backward."""
        parts = self._parts
        if tile is not None:
            held, sink = tile
            held.release()
            if sink is not None:
                sink.release()
        for _ in range(visits):
            parts.stream.next().release()

    # -- parts of a pass

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """Random numbers of our own, train or eval mode, and the rest of the parameters in place; all undone after."""
        parts = self._parts
        module = parts.model.module
        was_training = module.training
        rest = parts.homes[parts.layout.rest]
        views = rest.unit.views(rest.weights, rest.frozen)
        params = self._parameters(views, parts.trained_names)
        devices = [] if parts.settings.device.type == "cpu" else [parts.settings.device]
        with torch.random.fork_rng(devices=devices), parts.binder.bound_params(params):
            if self._train and rest.unit.trained:
                self._rest = GradientSink(rest, None, parts.settings.device)
                self._rest.collect(params)
            module.train(self._train)
            try:
                yield
            finally:
                module.train(was_training)

    @contextmanager
    def _held(self) -> Iterator[Held]:
        held = self._parts.stream.next()
        yield held
        held.release()

    @contextmanager
    def _bound(self, held: Held, sink: GradientSink | None) -> Iterator[None]:
        """The unit's parameters in their modules, on the computing device; gradients go to `sink`."""
        names = frozenset() if sink is None else self._parts.trained_names
        params = self._parameters(held.tensors(), names)
        if sink is not None:
            sink.collect(params)
        with self._parts.binder.bound_params(params):
            yield

    def _parameters(self, views: Mapping[str, torch.Tensor], trained: frozenset[str]) -> dict[str, nn.Parameter]:
        settings = self._parts.settings
        return {
            name: nn.Parameter(
                view.to(device=settings.device, dtype=settings.compute_dtype, non_blocking=True), name in trained
            )
            for name, view in views.items()
        }

    def _run(self, block: nn.Module, index: int, micro: int, hidden: torch.Tensor) -> torch.Tensor:
        call = self._calls[micro][index]
        self._seed(index, micro)
        return first(block(hidden, *call.args, **call.kwargs))

    def _micro(self, flat: torch.Tensor, span: Span) -> torch.Tensor:
        """(B, S, D) of one micro-batch, on the computing device."""
        part = flat[span.start : span.stop].view(span.batch, span.sequence, -1)
        return part.to(self._parts.settings.device, non_blocking=True)

    def _tile(self, held: Held, sink: GradientSink | None) -> Tile:
        unit = held.home.unit
        piece = (unit.trained or unit.frozen)[0]
        settings = self._parts.settings
        weight = held.tensors()[piece.name].to(device=settings.device, dtype=settings.compute_dtype)
        return Tile(*unit.rows, weight, None if sink is None else sink.view(piece))

    def _head_loss(self) -> HeadLoss:
        parts, acts = self._parts, self._parts.activations
        layers = len(parts.layout.blocks)
        bias = parts.model.head.bias
        bias_grad = None
        if bias is not None and self._rest is not None:
            name = parts.head_bias_name
            bias_grad = next((self._rest.view(p) for p in self._rest.home.unit.trained if p.name == name), None)
        if self._train:
            acts.gradient.zero_()
        return HeadLoss(
            model=parts.model,
            targets=self._targets,
            hidden=acts.current(layers),
            hidden_grad=acts.gradient if self._train else None,
            chunk_tokens=parts.plan.loss_tokens,
            bias=None if bias is None else bias.detach(),
            bias_grad=bias_grad,
            device=parts.settings.device,
        )

    def _head_stays(self) -> list[Stay]:
        tiles = self._parts.layout.head
        if len(tiles) == 1:
            return [Stay(tiles[0])]
        up = [Stay(u, keep=u.index == len(tiles) - 1) for u in tiles]
        return up + [Stay(u, again=u.index == len(tiles) - 1) for u in reversed(tiles)]

    def _seed(self, index: int, micro: int) -> None:
        """Random numbers depend on where we are, not on what ran before: the recomputation sees what the forward
        saw."""
        key = (self._parts.settings.seed, self._number, index, micro)
        torch.manual_seed(int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little"))
