"""The files of an offloaded training: the durable state, and the scratch of one run beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from memopt.budget import Budget
from memopt.ledger import Ledger
from memopt.offload.activations import activation_name, layer_bytes
from memopt.offload.homes import (
    Homes,
    fill_vectors,
    frozen_name,
    gradient_name,
    moments_name,
    weight_parts,
    weights_name,
)
from memopt.offload.layout import MASTER_ITEMSIZE, Layout, Segment, Unit
from memopt.plan_types import Plan, Residence
from memopt.store.block_store import BlockStore
from memopt.store.extents import CHUNK_BYTES, KindPolicy, TensorSpec
from memopt.store.regions import Region
from memopt.store.transfer import IoPool, Transfer
from memopt.tiers import Tier

WEIGHTS, FROZEN, MOMENTS = "weights", "frozen", "moments"
GRADIENTS, ACTIVATIONS = "gradients", "activations"
SCRATCH_DIR = "scratch"


def state_specs(layout: Layout) -> list[TensorSpec]:
    """Everything a resumed run needs, wherever it lives between steps."""
    specs = []
    for unit in layout.units:
        for segment in unit.segments:
            numel, span = MASTER_ITEMSIZE * segment.numel, MASTER_ITEMSIZE * segment.span_numel
            specs.append(_spec(weights_name(segment), WEIGHTS, numel, span))
            specs.append(_spec(moments_name(segment), MOMENTS, segment.record_bytes, segment.span_record_bytes))
        if unit.frozen:
            specs.append(TensorSpec(frozen_name(unit), FROZEN, unit.frozen_bytes))
    return specs


def scratch_specs(
    layout: Layout, plan: Plan, held: Iterable[Unit], *, tokens: int, width: int, dtype: torch.dtype
) -> list[TensorSpec]:
    """What one run spills: held gradients and boundary activations that live on SSD."""
    specs = [
        TensorSpec(gradient_name(u), GRADIENTS, u.master_bytes)
        for u in held
        if plan.residence[u.name].gradient == Tier.SSD
    ]
    nbytes = layer_bytes(tokens, width, dtype)
    specs += [TensorSpec(activation_name(i), ACTIVATIONS, nbytes) for i in range(plan.activation_layers_on_ssd)]
    return specs


def state_bytes(layout: Layout) -> int:
    """Bytes of the state on SSD: two versions of what is trained, one of what is frozen."""
    return sum(s.nbytes * (1 if s.kind == FROZEN else 2) for s in state_specs(layout))


def create_state(directory: Path, layout: Layout, pool: IoPool, meta: Mapping[str, Any]) -> BlockStore:
    """A new store with its space reserved and nothing in it."""
    kinds = {WEIGHTS: KindPolicy(versions=2), MOMENTS: KindPolicy(versions=2), FROZEN: KindPolicy(versions=1)}
    specs = state_specs(layout)
    used = {s.kind for s in specs}
    return BlockStore.create(
        directory, specs, kinds={k: p for k, p in kinds.items() if k in used}, pool=pool, meta=dict(meta)
    )


def create_scratch(directory: Path, specs: list[TensorSpec], pool: IoPool) -> BlockStore | None:
    """The scratch store of a run; what an earlier run left there is removed. None when nothing is to be spilled."""
    if directory.exists():
        BlockStore.destroy(directory)
    if not specs:
        return None
    # not checked: nothing of it outlives the run, and hashing it would cost as much as a tenth of the drive's bandwidth
    kinds = {s.kind: KindPolicy(versions=0, verify=False) for s in specs}
    return BlockStore.create(directory, specs, kinds=kinds, pool=pool)


def fill_state(
    store: BlockStore,
    layout: Layout,
    read: Callable[[list[str]], Mapping[str, torch.Tensor]],
    meta: Mapping[str, Any],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write the initial state: weights as `read(names)` gives them, records of zeros; then commit.

    One unit at a time: memory is its vector and what `read` returns for it.
    """
    most = max((_zeros_at_once(store, s) for u in layout.units for s in u.segments), default=0)
    zeros = Region(max(most, 1))  # never written to, so it takes no memory
    for unit in layout.units:
        with Region(max(unit.master_bytes, 1)) as trained, Region(max(unit.frozen_bytes, 1)) as frozen:
            master, raw = trained.tensor(torch.float32, unit.numel), frozen.tensor(torch.uint8, unit.frozen_bytes)
            fill_vectors(unit, master, raw, read)
            Transfer.all([store.write(*part) for part in weight_parts(unit, master)]).wait()
            if unit.frozen:
                store.write(frozen_name(unit), frozen.view).wait()
            del master, raw
        for segment in unit.segments:
            step = _zeros_at_once(store, segment)
            for a in range(0, segment.record_bytes, step):
                store.write(moments_name(segment), zeros.view[: min(step, segment.record_bytes - a)], a).wait()
        progress(unit.master_bytes + unit.frozen_bytes)
    store.commit(dict(meta)).wait()


def stored_homes(store: BlockStore, layout: Layout) -> Homes:
    """The units of a store that no engine uses, all on SSD: for `Homes.parameters`."""
    nowhere = {u.name: Residence() for u in layout.units}
    return Homes(layout, nowhere, store, None, Ledger(Budget()), hold_gradients=frozenset(), pin=False)


def read_parameters(store: BlockStore, layout: Layout, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Whole parameters out of a store that no engine uses: see `Homes.parameters`."""
    return stored_homes(store, layout).parameters(names)


def _spec(name: str, kind: str, nbytes: int, span_bytes: int) -> TensorSpec:
    """A tensor whose writes may start where spans do, which is where the store's own chunks do if that is enough."""
    enough = span_bytes >= nbytes or span_bytes % CHUNK_BYTES == 0
    return TensorSpec(name, kind, nbytes, chunk_bytes=None if enough else span_bytes)


def _zeros_at_once(store: BlockStore, segment: Segment) -> int:
    return min(store.chunk_bytes_of(moments_name(segment)), segment.record_bytes)
