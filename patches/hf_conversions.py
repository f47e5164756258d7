"""Transformers' own weight conversions, applied to one group of tensors at a time.

Since version 5, a model's parameters need not be the tensors of its checkpoint: renamings and converters (per-expert
matrices into one fused tensor, one fused projection into three, ...) stand between them. `from_pretrained` and
`save_pretrained` apply them to the whole state dict; here the same transform objects are asked, on meta tensors, which
sources make which targets, and are then run group by group. Follows `convert_and_load_state_dict_in_model` and
`revert_weight_conversion` of transformers.core_model_loading (5.16 to 5.19), quantisation and parallelism left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from memopt.store.safetensors_stream import TensorSpec

Fetch = Callable[[str], torch.Tensor]


@dataclass(kw_only=True)
class Group:
    """Tensors that one conversion turns into others. `converter` is None for a tensor that only changes its name."""

    first_target: str
    converter: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)  # (pattern that matched, name)
    targets: dict[str, TensorSpec] = field(default_factory=dict)

    def convert(self, model: Any, fetch: Fetch) -> dict[str, torch.Tensor]:
        """The targets by name; each source is fetched once. Holds the sources and the targets, nothing more."""
        if self.converter is None:
            return {self.first_target: fetch(self.sources[0][1])}
        converter = deepcopy(self.converter)
        for pattern, name in self.sources:
            # a callable is called by the converter only when it starts, and its result is not kept afterwards
            converter.add_tensor(self.first_target, name, pattern, partial(fetch, name))
        made = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def outline(self, model: Any, specs: Mapping[str, TensorSpec]) -> None:
        """Fill `targets` by converting meta tensors. Raises what the conversion raises."""

        def fetch(name: str) -> torch.Tensor:
            return torch.empty(specs[name].shape, dtype=specs[name].dtype, device="meta")

        made = self.convert(model, fetch)
        self.targets = {name: TensorSpec(shape=tuple(value.shape), dtype=value.dtype) for name, value in made.items()}


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """How the tensors of a checkpoint become those of the model."""

    group_of: Mapping[str, Group]  # by name in the model
    unexpected: tuple[str, ...]
    broken: Mapping[str, str]  # name in the model -> why its conversion cannot work


def plan_loading(model: Any, specs: Mapping[str, TensorSpec]) -> LoadPlan:
    """Group the checkpoint tensors `specs` by what they become in `model` (parameters may be on meta).

    As from_pretrained does, leaves on the model the conversions that were used, for the writer to reverse.
    """
    transforms = get_model_conversion_mapping(model)
    renamings, converters, by_pattern = _split(transforms)
    expected: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    drafts: dict[str, Group] = {}
    unexpected = []
    for name in sorted(specs, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if target in expected:
            _collect(drafts, target, pattern, name, by_pattern)
        else:
            unexpected.append(name)
    group_of: dict[str, Group] = {}
    broken = {}
    for target, group in drafts.items():
        try:
            group.outline(model, specs)
        except Exception as error:  # an incomplete set of sources fails in whichever operation meets it first
            broken[target] = f"{type(error).__name__}: {error}"
        group_of.update(dict.fromkeys(group.targets, group))
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]
    return LoadPlan(group_of=group_of, unexpected=tuple(unexpected), broken=broken)


def plan_saving(model: Any, specs: Mapping[str, TensorSpec]) -> list[Group]:
    """Group the model tensors `specs` by what they become in a checkpoint, in the order of their names."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        # made from a config: legacy names are not written, and whether a prefix was there cannot be known
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [transform for transform in transforms if not isinstance(transform, PrefixChange)]
    renamings, converters, by_pattern = _split([transform.reverse_transform() for transform in transforms[::-1]])
    drafts: dict[str, Group] = {}
    for name in sorted(specs, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, reverse=True)
        _collect(drafts, target, pattern, name, by_pattern)
    for group in drafts.values():
        group.outline(model, specs)
    return list(drafts.values())


def _split(transforms: Iterable[Any]) -> tuple[list[Any], list[Any], dict[str, Any]]:
    transforms = list(transforms)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    return renamings, converters, by_pattern


def _collect(
    drafts: dict[str, Group], target: str, pattern: str | None, name: str, by_pattern: Mapping[str, Any]
) -> None:
    converter = None if pattern is None else by_pattern[pattern]
    group = drafts.setdefault(target, Group(first_target=target, converter=converter))
    group.sources.append((name if pattern is None else pattern, name))
