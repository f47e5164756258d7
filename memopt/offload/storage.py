"""The files of an offloaded training: the durable state, and the scratch of one run beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from memopt.offload.activations import activation_name, layer_bytes
from memopt.offload.homes import frozen_name, gradient_name, moments_name, weights_name
from memopt.offload.layout import CHUNK, Layout, Piece, Unit
from memopt.optim_types import UpdateRule
from memopt.plan_types import Plan
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
    kinds = {s.kind: KindPolicy(versions=0) for s in specs}
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
        tensors = read([p.name for p in (*unit.trained, *unit.frozen)])
        for name, nbytes, pieces in (
            (weights_name(unit), unit.master_bytes, unit.trained),
            (frozen_name(unit), unit.frozen_bytes, unit.frozen),
        ):
            if pieces:
                _write_pieces(store, name, nbytes, pieces, tensors)
        for a, b in unit.chunks():
            store.write(moments_name(unit), zeros.view[: rule.record_bytes(b - a)], rule.record_bytes(a)).wait()
        progress(unit.master_bytes + unit.frozen_bytes)
    store.commit(dict(meta)).wait()


def _write_pieces(
    store: BlockStore, name: str, nbytes: int, pieces: Iterable[Piece], tensors: Mapping[str, torch.Tensor]
) -> None:
    with Region(nbytes) as region:
        raw = region.tensor(torch.uint8, nbytes)
        for piece in pieces:
            source = tensors[piece.name]
            _part(raw, piece).copy_(source[piece.row : piece.row + piece.shape[0]] if piece.shape else source)
        store.write(name, region.view).wait()


def _part(raw: torch.Tensor, piece: Piece) -> torch.Tensor:
    return raw[piece.offset_bytes : piece.offset_bytes + piece.nbytes].view(piece.dtype).view(piece.shape)


def read_parameters(store: BlockStore, layout: Layout, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Whole parameters out of the store, float32 masters or frozen ones in their own dtype (copies)."""
    wanted = set(names)
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for unit in layout.units:
        for name, nbytes, pieces in (
            (weights_name(unit), unit.master_bytes, unit.trained),
            (frozen_name(unit), unit.frozen_bytes, unit.frozen),
        ):
            if not any(p.name in wanted for p in pieces):
                continue
            region = Region(nbytes)
            store.read(name, region.view).wait()
            raw = region.tensor(torch.uint8, nbytes)
            for p in pieces:
                if p.name in wanted:
                    parts.setdefault(p.name, []).append((p.row, _part(raw, p)))
    return {
        name: found[0][1] if len(found) == 1 else torch.cat([t for _, t in sorted(found, key=lambda x: x[0])])
        for name, found in parts.items()
    }
