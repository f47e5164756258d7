"""The router: what every trainable parameter of a model does, and how its table is cut into matrices.

It goes by names, shapes, the names of module classes and sizes found on modules and configurations; no model library is
imported. What it does not know is `other`, and listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from memopt.errors import BadInput
from memopt.optim import fused
from memopt.optim.parts import Part
from memopt.optim.roles import (
    HIDDEN,
    Role,
    attention_role,
    block_of,
    ffn_half,
    ffn_role,
    is_bias,
    is_experts,
    is_head,
    is_norm,
    is_router,
    is_table,
)

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARALLEL = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
_FLAT = "FlatParameter"
_CONVOLUTION = re.compile(r"(?:Causal)?Conv(?:Transpose)?\dd\w*")
_STATE_SPACE = re.compile(r"Mamba\w*Mixer|^BambaMixer|Rwkv|RWKV|Rglru|RecurrentBlock|ShortConv")


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A trainable parameter: its name without wrappers, what it does, and the matrices it is made of."""

    name: str
    parameter: nn.Parameter
    role: Role
    """Of the parameter as a whole; the parts of a fused one have their own."""
    parts: tuple[Part, ...]
    """Every element belongs to exactly one."""
    why: str
    """Which name or module decided."""
    tied: tuple[str, ...] = ()
    """Other names of the same parameter."""


@dataclass(frozen=True)
class _Place:
    """One name of a parameter: the path to match, without wrappers, and the module that holds each segment."""

    name: str
    path: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    parameter: nn.Parameter

    @property
    def leaf(self) -> str:
        """The parameter's own name; of a layer's `weight`, the layer's."""
        return self.path[-2] if self.is_layer else self.path[-1]

    @property
    def is_layer(self) -> bool:
        """Whether this is the `weight` of a layer that has a name."""
        return self.path[-1] == "weight" and len(self.path) > 1

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.modules[-1]

    @property
    def block(self) -> nn.Module:
        """The module the leaf is a name in."""
        return self.modules[-2] if self.is_layer else self.modules[-1]

    @property
    def transposed(self) -> bool:
        """Whether a matrix is stored as (inputs, outputs): the linear layer of GPT-2 in transformers."""
        return fused.class_name(self.owner) == "Conv1D" and hasattr(self.owner, "nf")

    @property
    def config(self) -> object:
        """The nearest configuration."""
        found = (getattr(module, "config", None) for module in reversed(self.modules))
        return next((config for config in found if config is not None), None)


def route(model: nn.Module) -> list[Routed]:
    """Every parameter of `model` with `requires_grad`, once, in the order of `model.named_parameters()`."""
    by_id: dict[int, list[_Place]] = {}
    for place in _walk(model, "", (), (), ()):
        if place.parameter.requires_grad:
            by_id.setdefault(id(place.parameter), []).append(place)
    heads = _output_weights(model)
    return [_routed(places, heads) for places in by_id.values()]


def require_shapes(routed: Sequence[Routed], preset: str) -> None:
    """Refuse matrices that arrive as flat vectors, for a `preset` that needs their shapes.

    Raises BadInput for parameters flattened by FSDP1 or DeepSpeed ZeRO.
    """
    for item in routed:
        layer = item.role in (Role.EMBEDDING, Role.HEAD) and item.name.endswith(".weight")
        matrix = item.role in HIDDEN or layer
        flat = type(item.parameter).__name__ == _FLAT or item.name.endswith("_flat_param")
        if flat or hasattr(item.parameter, "ds_id") or (matrix and item.parameter.ndim < 2):
            shape = tuple(item.parameter.shape)
            raise BadInput(
                f"preset {preset} works on matrices, but {item.name} has shape {shape}: FSDP1 or DeepSpeed ZeRO has "
                "flattened it; use FSDP2 (fully_shard) or DDP, or an element-wise preset such as adamw8bit"
            )


def _walk(
    module: nn.Module,
    name: str,
    path: tuple[str, ...],
    modules: tuple[nn.Module, ...],
    chain: tuple[nn.Module, ...],
) -> Iterator[_Place]:
    """All names of all parameters, depth first; wrappers vanish from names, those of adapters only from paths.

    `modules` are the holders of the segments of `path`, `chain` all modules above.
    """
    if any(module is above for above in chain):
        return
    chain = (*chain, module)
    held = (*modules, module)
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield _Place(name + leaf, (*path, leaf), held, parameter)
    for segment, child in module._modules.items():
        if child is None:
            continue
        parallel = segment == "module" and fused.class_name(module) in _PARALLEL
        if segment in _WRAPPERS or parallel:
            yield from _walk(child, name, path, modules, chain)
        elif segment in ("base_layer", "original_module") or _is_shell(segment, module):
            yield from _walk(child, f"{name}{segment}.", path, modules, chain)
        elif segment == "modules_to_save":
            for adapter, copy in child._modules.items():
                if copy is not None:
                    yield from _walk(copy, f"{name}{segment}.{adapter}.", path, modules, chain)
        else:
            yield from _walk(child, f"{name}{segment}.", (*path, segment), held, chain)


def _is_shell(segment: str, module: nn.Module) -> bool:
    """A linear layer inside one that only adds something to it (Moshi, Gemma 4)."""
    return segment == "linear" and fused.class_name(module).endswith("Linear")


def _output_weights(model: nn.Module) -> set[int]:
    """Ids of the weights of output embeddings, where modules tell them (transformers' get_output_embeddings)."""
    found = set()
    for module in model.modules():
        tell = getattr(type(module), "get_output_embeddings", None)
        if tell is None:
            continue
        try:
            head = tell(module)
        except (NotImplementedError, AttributeError):
            continue
        for layer in head if isinstance(head, Sequence | nn.ModuleList) else (head,):
            weight = getattr(layer, "weight", None)
            if isinstance(weight, nn.Parameter):
                found.add(id(weight))
    return found


def _routed(places: list[_Place], heads: set[int]) -> Routed:
    judged = [_judge(place, heads) for place in places]
    first = judged[0]
    for found in judged[1:]:
        if found[0] == Role.EMBEDDING or (first[0] == Role.OTHER and found[0] != Role.OTHER):
            first = found if first[0] != Role.EMBEDDING else first
    role, parts, why = first
    if role == Role.EMBEDDING and any(other == Role.HEAD for other, _, _ in judged):
        why += ", tied to the head"
    tied = tuple(place.name for place in places[1:])
    return Routed(name=places[0].name, parameter=places[0].parameter, role=role, parts=parts, why=why, tied=tied)


def _judge(place: _Place, heads: set[int]) -> tuple[Role, tuple[Part, ...], str]:
    simple = _simple_role(place, heads)
    if simple is not None:
        role, why = simple
        return role, (Part(role=role),), why
    return _matrix(place)


def _simple_role(place: _Place, heads: set[int]) -> tuple[Role, str] | None:
    """Role of what is not a hidden matrix, with the reason; None for what may be one."""
    owner, leaf = fused.class_name(place.owner), place.path[-1]
    for role in (Role.LORA_A, Role.LORA_B):
        if any(segment in (role.value, role.value.replace("_", "_embedding_")) for segment in place.path):
            return role, f"name {role.value}"
    if is_bias(leaf):
        return Role.BIAS, f"name {leaf}"
    if isinstance(place.owner, nn.modules.conv._ConvNd) or _CONVOLUTION.fullmatch(owner):
        return Role.CONV, f"module {owner}"
    if place.parameter.ndim < 2 and ("norm" in owner.lower() or any(is_norm(s) for s in place.path[-2:])):
        return Role.NORM, f"module {owner}" if "norm" in owner.lower() else f"name {'.'.join(place.path[-2:])}"
    vector = place.parameter.ndim < 2 and not (place.is_layer and _takes_matrix(place.owner))
    embedding = "Embedding" in owner and "Rotary" not in owner
    if isinstance(place.owner, nn.Embedding) or embedding or (leaf != "weight" and is_table(leaf)):
        return Role.EMBEDDING, f"module {owner}" if embedding else f"name {leaf}"
    if vector:
        return Role.OTHER, f"vector {leaf} of {owner}"
    router = next((s for s in place.path[:-1] if is_router(s)), None)
    if router is not None or _is_expert_gate(place):
        return Role.ROUTER, f"name {router or place.leaf}"
    if id(place.parameter) in heads:
        return Role.HEAD, "output embedding"
    head = next((s for s in place.path[:-1] if is_head(s)), None)
    if head is not None and _block(place)[0] is None:
        return Role.HEAD, f"name {head}"
    return None


def _takes_matrix(owner: nn.Module) -> bool:
    """Whether the weight of a layer has two dimensions, even if it arrives flattened."""
    return any(hasattr(owner, size) for size in ("in_features", "num_embeddings", "nf"))


def _is_expert_gate(place: _Place) -> bool:
    """A layer `gate` beside experts chooses among them; without any it multiplies a feed-forward layer."""
    if place.leaf != "gate" or not place.is_layer:
        return False
    names = [name for name, _ in place.block.named_children()]
    return (
        any(is_experts(name) for name in names)
        or re.search(r"moe|sparse", fused.class_name(place.block), re.I) is not None
    )


def _matrix(place: _Place) -> tuple[Role, tuple[Part, ...], str]:
    """Role and parts of what may be a matrix between hidden layers."""
    leaf, transposed, shape = place.leaf, place.transposed, tuple(place.parameter.shape)
    block, where = _block(place)
    if _of_experts(place):
        return _expert(place, shape)
    if block != "attention" and any(_STATE_SPACE.search(fused.class_name(m)) for m in place.modules[-2:]):
        return Role.OTHER, (Part(role=Role.OTHER),), f"state-space layer {fused.class_name(place.block)}"
    class_name = fused.class_name(place.block)
    if block != "ffn" and fused.is_fused_qkv(leaf, class_name) and (block == "attention" or leaf != "in_proj"):
        return _fused_qkv(place, shape)
    role = _layer_role(place, block)
    if role is None or len(shape) > 2:
        return Role.OTHER, (Part(role=Role.OTHER),), f"unknown: {leaf} in {class_name}"
    why = f"name {leaf}" + (f" in {where}" if where else "")
    if role in (Role.FFN_UP, Role.FFN_GATE) and len(shape) == 2:
        rows = shape[1] if transposed else shape[0]
        halves = fused.gate_up_parts(leaf, rows, place.block, transposed=transposed)
        if halves is not None:
            return Role.FFN_UP, halves, f"{why}: gate, up"
    return role, (Part(role=role, transposed=transposed),), why


def _block(place: _Place) -> tuple[str | None, str]:
    """The innermost of the three modules above the leaf that is an attention or feed-forward block, and its name."""
    last = len(place.path) - (2 if place.is_layer else 1)
    for depth in range(last, max(last - 3, -1), -1):
        segment = place.path[depth - 1] if depth else ""
        block = block_of(segment, fused.class_name(place.modules[depth]))
        if block is not None:
            return block, segment
    return None, ""


def _layer_role(place: _Place, block: str | None) -> Role | None:
    leaf = place.leaf
    if leaf.isdigit() and len(place.path) > 2:  # nn.Sequential(linear, dropout), as in to_out.0
        leaf = place.path[-3]
    if block == "attention":
        named = place.is_layer or leaf.endswith("_weight")  # torch.nn.MultiheadAttention's q_proj_weight
        return attention_role(leaf.removesuffix("_weight")) if named else None
    role = ffn_role(leaf, inside=block == "ffn")
    if role is None and leaf == "dense" and len(place.path) > 2:
        role = ffn_half(place.path[-3])
    if role is None and block is None:
        narrow = attention_role(leaf)
        role = narrow if leaf.startswith(("q_", "k_", "v_", "o_")) else None
    if leaf == "w1" and any(hasattr(place.block, other) for other in ("w3", "v1")):
        role = Role.FFN_GATE
    return role


def _of_experts(place: _Place) -> bool:
    if any("shared" in segment for segment in place.path):
        return place.parameter.ndim > 2
    owners = (fused.class_name(place.owner), fused.class_name(place.block))
    return any(is_experts(s) for s in place.path[:-1]) or any("Expert" in name for name in owners)


def _expert(place: _Place, shape: tuple[int, ...]) -> tuple[Role, tuple[Part, ...], str]:
    parent = place.modules[-2] if len(place.modules) > 1 else place.owner
    why = f"experts: {place.leaf} in {fused.class_name(place.block)}"
    if len(shape) == 2 and place.is_layer:
        return Role.EXPERT, (Part(role=Role.EXPERT, transposed=place.transposed),), why
    parts = fused.expert_parts(place.leaf, shape, place.owner, parent)
    return Role.EXPERT, parts, why + (f", {len(parts)} parts" if len(parts) > 1 else "")


def _fused_qkv(place: _Place, shape: tuple[int, ...]) -> tuple[Role, tuple[Part, ...], str]:
    if len(shape) != 2:
        return Role.QKV, (Part(role=Role.QKV),), f"name {place.leaf}"
    rows, columns = (shape[1], shape[0]) if place.transposed else shape
    sources = fused.Sources(place.block, place.config)
    parts, why = fused.qkv_parts(place.leaf, (rows, columns), sources, transposed=place.transposed)
    return Role.QKV, parts, why
