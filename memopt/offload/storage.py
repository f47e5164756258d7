"""The files of an offloaded training: the durable state, and the scratch of one run beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from memopt.budget import Budget
from memopt.ledger import Ledger
from memopt.offload.activations import activation_name, layer_bytes
from memopt.offload.homes import Homes, fill_vectors, frozen_name, gradient_name, moments_name, weights_name
from memopt.offload.layout import CHUNK, Layout, Unit
from memopt.optim_types import UpdateRule
from memopt.plan_types import Plan, Residence
from memopt.store.block_store import BlockStore
from memopt.store.extents import KindPolicy, TensorSpec
from memopt.store.regions import Region
from memopt.store.transfer import IoPool
from memopt.tiers import Tier

WEIGHTS, FROZEN, MOMENTS = "weights", "frozen", "moments"
GRADIENTS, ACTIVATIONS = "gradients", "activations"
SCRATCH_DIR = "scratch"


def state_specs(layout: Layout, rule: UpdateRule) -> list[TensorSpec]:
    """Everything a resumed run needs, wherever it lives between steps."""
    specs = []
    for unit in layout.units:
        if unit.trained:
            specs.append(TensorSpec(weights_name(unit), WEIGHTS, unit.master_bytes))
            specs.append(TensorSpec(moments_name(unit), MOMENTS, rule.record_bytes(unit.numel)))
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


def state_bytes(layout: Layout, rule: UpdateRule) -> int:
    """Bytes of the state on SSD: two versions of what is trained, one of what is frozen."""
    return sum(s.nbytes * (1 if s.kind == FROZEN else 2) for s in state_specs(layout, rule))


def create_state(
    directory: Path, layout: Layout, rule: UpdateRule, pool: IoPool, meta: Mapping[str, Any]
) -> BlockStore:
    """A new store with its space reserved and nothing in it."""
    kinds = {WEIGHTS: KindPolicy(versions=2), MOMENTS: KindPolicy(versions=2), FROZEN: KindPolicy(versions=1)}
    specs = state_specs(layout, rule)
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
    rule: UpdateRule,
    read: Callable[[list[str]], Mapping[str, torch.Tensor]],
    meta: Mapping[str, Any],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write the initial state: weights as `read(names)` gives them, moments zero; then commit.

    One unit at a time: memory is its vector and what `read` returns for it.
    """
    zeros = Region(rule.record_bytes(CHUNK))
    for unit in layout.units:
        with Region(max(unit.master_bytes, 1)) as trained, Region(max(unit.frozen_bytes, 1)) as frozen:
            master, raw = trained.tensor(torch.float32, unit.numel), frozen.tensor(torch.uint8, unit.frozen_bytes)
            fill_vectors(unit, master, raw, read)
            if unit.trained:
                store.write(weights_name(unit), trained.view).wait()
            if unit.frozen:
                store.write(frozen_name(unit), frozen.view).wait()
            del master, raw
        for a, b in unit.chunks():
            store.write(moments_name(unit), zeros.view[: rule.record_bytes(b - a)], rule.record_bytes(a)).wait()
        progress(unit.master_bytes + unit.frozen_bytes)
    store.commit(dict(meta)).wait()


def stored_homes(store: BlockStore, layout: Layout) -> Homes:
    """The units of a store that no engine uses, all on SSD: for `Homes.parameters`."""
    nowhere = {u.name: Residence() for u in layout.units}
    return Homes(layout, nowhere, store, None, Ledger(Budget()), None, hold_gradients=frozenset(), pin=False)


def read_parameters(store: BlockStore, layout: Layout, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Whole parameters out of a store that no engine uses: see `Homes.parameters`."""
    return stored_homes(store, layout).parameters(names)
