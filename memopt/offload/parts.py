"""What an engine is made of: its memory and its threads, opened together and closed in the reverse order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from memopt.ledger import Ledger
from memopt.offload.activations import Activations
from memopt.offload.gradients import held_units
from memopt.offload.homes import Homes
from memopt.offload.layout import Layout
from memopt.offload.model import Binder, LayeredModel
from memopt.offload.rows import RowReader, row_bytes
from memopt.offload.sink import SinkPool
from memopt.offload.stream import WeightStream
from memopt.offload.updater import Updater, ring_bytes
from memopt.plan_types import Plan
from memopt.store.block_store import BlockStore
from memopt.store.buffers import BufferPool
from memopt.tiers import Category, Tier

Initial = Callable[[list[str]], Mapping[str, torch.Tensor]]
"""Parameter names -> initial values."""


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


class Parts:
    """The memory and the threads of one engine, and what it must know of the model's names."""

    def __init__(
        self,
        model: LayeredModel,
        layout: Layout,
        plan: Plan,
        store: BlockStore | None,
        scratch: BlockStore | None,
        ledger: Ledger,
        settings: EngineSettings,
        initial: Initial | None,
    ):
        self.model, self.layout, self.plan, self.settings = model, layout, plan, settings
        self.binder = Binder(model.module)
        _move_buffers(model.module, settings.device)
        pin = settings.device.type == "cuda"
        held = {u.name for u in held_units(layout, clips=settings.clip_norm > 0)}
        with ExitStack() as undo:
            self.homes = Homes(layout, plan.residence, store, scratch, ledger, hold_gradients=frozenset(held), pin=pin)
            undo.callback(self.homes.close)
            if store is not None:
                self.homes.load()
            else:
                assert initial is not None
                self.homes.fill(initial)
            ring: BufferPool | None = None
            if nbytes := ring_bytes(layout, plan.residence, clips=settings.clip_norm > 0):
                ring = BufferPool(nbytes, plan.ring_buffers, ledger, Category.BUFFERS, "update ring", pin)
                undo.callback(ring.close)
            self.updater = Updater(self.homes, ring, plan.update_threads)
            undo.callback(self.updater.close)
            self.stream = WeightStream(
                self.homes, self.updater, ledger, block_slots=plan.block_slots, head_slots=plan.head_slots, pin=pin
            )
            undo.callback(self.stream.close)
            self.sinks = SinkPool(self.homes, self.updater, plan, ledger, settings.device)
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
            self.close = undo.pop_all().close
        self.trained_names = frozenset(p.name for u in layout.units for p in u.trained)
        in_blocks = {name for block in model.blocks for name in self.binder.inside(block)}
        self.entry_trains = any(p.name not in in_blocks for p in layout.rest.trained)
        self.head_bias_name = self.binder.name_of(model.head.bias)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Rotary tables and the like go to where the blocks are computed; parameters are meta placeholders and stay."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(device)
