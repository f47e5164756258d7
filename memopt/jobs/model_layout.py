"""The layout of a model as a patch hands it over: which parameter goes to which unit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

from memopt.errors import BadInput
from memopt.offload.layout import Layout, ParameterSpec, build_layout
from memopt.offload.model import Binder, LayeredModel
from memopt.optim_types import UpdateRule


def model_layout(
    model: LayeredModel,
    *,
    decay: set[str],
    dtypes: Mapping[str, torch.dtype],
    rules: Mapping[str, UpdateRule],
    tile_rows: int,
) -> Layout:
    """Units of a model whose parameters are meta placeholders.

    `dtypes` has the stored dtype of frozen parameters, `rules` the rule of trained ones; whatever has no gradient
    (`requires_grad` False) is frozen.
    """
    binder = Binder(model.module)
    params = dict(model.module.named_parameters())

    def spec(name: str) -> ParameterSpec:
        p = params[name]
        rule = rules[name] if p.requires_grad else None
        return ParameterSpec(name, tuple(p.shape), dtypes.get(name, p.dtype), rule, name in decay)

    embed = binder.name_of(model.embedding.weight)
    head = binder.name_of(model.head.weight)
    assert embed is not None and head is not None
    seen = {embed, head}
    blocks = []
    for block in model.blocks:
        names = sorted(binder.inside(block) - seen, key=binder.names.index)
        if not names:
            raise BadInput(f"{type(model.module).__name__}: a {type(block).__name__} has no parameters of its own")
        seen.update(names)
        blocks.append([spec(n) for n in names])
    return build_layout(
        embed=spec(embed),
        head=None if head == embed else spec(head),
        blocks=blocks,
        rest=[spec(n) for n in binder.names if n not in seen],
        tile_rows=tile_rows,
    )


def layout_digest(layout: Layout) -> str:
    """Equal for equal names, shapes, stored types and decay groups of all parameters, and equal units."""
    pieces = [sorted((p.name, p.shape, str(p.dtype), p.decay) for p in (*u.trained, *u.frozen)) for u in layout.units]
    return hashlib.blake2b(json.dumps(pieces).encode(), digest_size=12).hexdigest()
