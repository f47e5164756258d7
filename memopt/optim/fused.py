"""Where queries, keys, values, gates and experts lie in a table that holds several of them.

A fused projection is `groups` equal groups of rows, each cut in the same way: [q | k | v] is one group, per-head
interleaving is as many as there are heads. Which one it is only the model's own forward says: each layout here follows
the code of the class named beside it (transformers 5.19, or the code a model is published with). A class that is not
known, or sizes that do not add up, give no cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from memopt.optim.parts import Part
from memopt.optim.roles import Role, ffn_role

Unit = Sequence[tuple[Role, int]]
"""How one group is cut: roles and rows, in order."""
Layout = tuple[int, Unit]
"""Groups, and how each is cut."""


def class_name(module: nn.Module) -> str:
    """Name of a module's class; of one that FSDP2's fully_shard has given a class of its own, the one it had."""
    name = type(module).__name__
    cut = any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    return name.removeprefix("FSDP") if cut else name


@dataclass(frozen=True)
class Sources:
    """Where the sizes of an attention block are looked up: the module, then the nearest configuration."""

    module: nn.Module
    config: object

    @property
    def class_name(self) -> str:
        """Class of the block."""
        return class_name(self.module)

    def number(self, *names: str) -> int | None:
        """The first of these attributes that is a positive whole number."""
        for source in (self.module, self.config, getattr(self.config, "attn_config", None)):
            for name in names:
                value = getattr(source, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def flag(self, name: str) -> bool:
        """Whether the module, or else the configuration, has this switched on."""
        return bool(getattr(self.module, name, getattr(self.config, name, False)))

    def heads(self, columns: int) -> tuple[int, int, int] | None:
        """Query heads, key-value heads and rows of one head of an attention over `columns` features."""
        q = self.number("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attention_heads_per_partition")
        if q is None:
            return None
        kv = self.number(
            "num_key_value_heads",
            "num_kv_heads",
            "kv_heads",
            "num_multi_query_groups_per_partition",
            "kv_n_heads",
            "multi_query_group_num",
        )
        size = self.number(
            "head_dim", "head_size", "attention_head_size", "hidden_size_per_attention_head", "kv_channels"
        )
        return q, kv or q, size or columns // q


def cut(rows: int, layout: Layout, *, transposed: bool = False) -> tuple[Part, ...] | None:
    """The parts of a table of `rows` rows, or None where the layout does not add up to them."""
    groups, unit = layout
    if groups < 1 or any(size < 1 for _, size in unit) or groups * sum(size for _, size in unit) != rows:
        return None
    parts, start = [], 0
    for role, size in unit:
        parts.append(Part(role=role, groups=groups, start=start, length=size, transposed=transposed))
        start += size
    return tuple(parts)


def qkv(q: int, k: int, v: int) -> Unit:
    """A group of q rows of queries, then k of keys, then v of values."""
    return ((Role.Q, q), (Role.K, k), (Role.V, v))


def _thirds(rows: int, columns: int, sources: Sources) -> Layout | None:
    return (1, qkv(rows // 3, rows // 3, rows // 3)) if rows % 3 == 0 else None


def _contiguous(rows: int, columns: int, sources: Sources) -> Layout | None:
    """[q | k | v], with fewer keys and values than queries where the heads say so."""
    heads = sources.heads(columns)
    if heads is not None:
        q, kv, size = heads
        if (q + 2 * kv) * size == rows:
            return 1, qkv(q * size, kv * size, kv * size)
    return _thirds(rows, columns, sources)


def _per_head(rows: int, columns: int, sources: Sources) -> Layout | None:
    """[q0 k0 v0 q1 k1 v1 ...], one of each per head."""
    heads = sources.heads(columns)
    if heads is None or rows % (3 * heads[0]):
        return None
    size = rows // (3 * heads[0])
    return heads[0], qkv(size, size, size)


def _per_kv_group(rows: int, columns: int, sources: Sources) -> Layout | None:
    """Per key-value head: the queries that share it, then its key, then its value."""
    heads = sources.heads(columns)
    if heads is None:
        return None
    q, kv, size = heads
    return kv, qkv(q // kv * size, size, size)


def _falcon(rows: int, columns: int, sources: Sources) -> Layout | None:
    if sources.flag("new_decoder_architecture"):
        return _per_kv_group(rows, columns, sources)
    if not sources.flag("multi_query"):
        return _per_head(rows, columns, sources)
    size = sources.number("head_dim") or 0
    return 1, qkv(rows - 2 * size, size, size)


def _bigcode(rows: int, columns: int, sources: Sources) -> Layout | None:
    if sources.flag("is_cross_attention"):
        return None
    return (_contiguous if sources.flag("multi_query") else _per_head)(rows, columns, sources)


def _chatglm(rows: int, columns: int, sources: Sources) -> Layout | None:
    return (_contiguous if sources.flag("multi_query_attention") else _per_head)(rows, columns, sources)


def _codegen(rows: int, columns: int, sources: Sources) -> Layout | None:
    # four blocks (one per TPU core it was trained on), each [q | v | k]
    third = rows // 12
    return 4, ((Role.Q, third), (Role.V, third), (Role.K, third))


def _gpt2(rows: int, columns: int, sources: Sources) -> Layout | None:
    if sources.flag("is_cross_attention"):
        return 1, ((Role.K, rows // 2), (Role.V, rows // 2))
    return _thirds(rows, columns, sources)


def _delta_net(rows: int, columns: int, sources: Sources) -> Layout | None:
    key, value = sources.number("key_dim"), sources.number("value_dim")
    return None if key is None or value is None else (1, qkv(key, key, value))


def _delta_net_gated(rows: int, columns: int, sources: Sources) -> Layout | None:
    key, value, groups = sources.number("key_dim"), sources.number("value_dim"), sources.number("num_k_heads")
    if key is None or value is None or groups is None:
        return None
    return groups, (*qkv(key // groups, key // groups, value // groups), (Role.OTHER, value // groups))


def _latent(rows: int, columns: int, sources: Sources) -> Layout | None:
    nope, value = sources.number("qk_nope_head_dim"), sources.number("v_head_dim")
    if nope is None or value is None:
        return None
    return rows // (nope + value), ((Role.K, nope), (Role.V, value))


def _halves_kv(rows: int, columns: int, sources: Sources) -> Layout | None:
    return 1, ((Role.K, rows // 2), (Role.V, rows // 2))


_QKV: tuple[tuple[str, str, Callable[[int, int, Sources], Layout | None]], ...] = (
    ("c_attn", "^GPTBigCode", _bigcode),
    ("c_attn", "^(GPT2|ImageGPT|DecisionTransformer|Attention$|CausalSelfAttention|QWen)", _gpt2),
    ("query_key_value", "^Falcon", _falcon),
    ("query_key_value", "^(GPTNeoX|Bloom|Persimmon)", _per_head),
    ("query_key_value", "^(SelfAttention|GLMAttention|ChatGLM)", _chatglm),
    ("qkv_proj", "^CodeGen", _codegen),
    ("qkv_proj", "^MiniMaxLightning", _per_head),
    ("qkv_proj", "^Phi", _contiguous),
    ("wqkv", "^InternLM2", _per_kv_group),
    ("W_pack", "", _thirds),
    ("Wqkv", "^(Mpt|Dbrx|ModernBert|MultiheadAttention|GroupedQueryAttention|NomicBert|MHA)", _contiguous),
    ("att_proj", "", _contiguous),
    ("qkv", "", _contiguous),  # the convention of timm, and of all vision towers in transformers
    ("qkv_linear", "", _contiguous),
    ("in_proj_weight", "", _thirds),  # torch.nn.MultiheadAttention
    ("in_proj", "^(DisentangledSelf|Deberta)", _per_head),
    ("in_proj_qkv", "DeltaNet", _delta_net),
    ("in_proj_qkvz", "DeltaNet", _delta_net_gated),
    ("kv_b_proj", "", _latent),
    ("kv_proj", "^JetMoe", _halves_kv),
)
"""Name of the layer, pattern of its block's class, layout."""
_FUSED_NAMES = re.compile(
    r"\w*qkv\w*|query_key_value|c_attn|W_pack|att_proj|in_proj_weight|queries_keys_values|"
    r"(?:to_)?kv|\w*kv_proj\w*|kv_[ab]_proj\w*|key_value|query_key"
)


def is_fused_qkv(leaf: str, class_name: str) -> bool:
    """Whether a layer of this name holds several of queries, keys and values."""
    return _FUSED_NAMES.fullmatch(leaf) is not None or _layout_of(leaf, class_name) is not None


def qkv_parts(leaf: str, shape: tuple[int, int], sources: Sources, *, transposed: bool) -> tuple[tuple[Part, ...], str]:
    """Parts of a fused attention projection of (rows, columns), counted as outputs and inputs, and why."""
    layout_of = _layout_of(leaf, sources.class_name)
    layout = layout_of(*shape, sources) if layout_of is not None else None
    parts = cut(shape[0], layout, transposed=transposed) if layout is not None else None
    where = f"{sources.class_name}.{leaf}"
    if parts is None or layout is None:
        return (Part(role=Role.QKV, transposed=transposed),), f"{where}: kept whole"
    order = ", ".join(role.value for role, _ in layout[1])
    return parts, f"{where}: {order}" + (f" in {layout[0]} groups" if layout[0] > 1 else "")


def gate_up_parts(leaf: str, rows: int, parent: nn.Module, *, transposed: bool) -> tuple[Part, ...] | None:
    """Gate and up of a feed-forward layer that holds both, one above the other; None where it holds one."""
    down = next(
        (
            weight
            for name, module in parent.named_children()
            if ffn_role(name) == Role.FFN_DOWN and (weight := getattr(module, "weight", None)) is not None
        ),
        None,
    )
    if down is not None and down.ndim == 2:
        inner = down.shape[0] if transposed else down.shape[1]
        twice = rows == 2 * inner
    else:
        twice = leaf in ("gate_up_proj", "input_linear") and rows % 2 == 0
    layout = 1, ((Role.FFN_GATE, rows // 2), (Role.FFN_UP, rows // 2))
    return cut(rows, layout, transposed=transposed) if twice else None


def expert_parts(leaf: str, shape: tuple[int, ...], owner: nn.Module, parent: nn.Module) -> tuple[Part, ...]:
    """Parts of the fused experts (experts, ., .): batches of matrices, turned and cut where the layout is certain.

    `owner` holds the parameter, `parent` the owner.
    """
    if len(shape) != 3:
        return _row_stacked(shape, owner)
    turned = _stored_input_first(leaf, shape, owner, parent)
    if leaf not in ("gate_up_proj", "input_linear") or turned is None:
        return (Part(role=Role.EXPERT, transposed=bool(turned)),)
    rows = shape[2] if turned else shape[1]
    partner = _partner(owner, parent, "down_proj", "output_linear")
    if partner is None or rows != 2 * (partner[1] if turned else partner[2]):
        return (Part(role=Role.EXPERT, transposed=turned),)
    side_by_side = getattr(owner, "is_concatenated", "GptOss" not in class_name(owner))
    groups, each = (1, rows // 2) if side_by_side else (rows // 2, 1)
    parts = cut(rows, (groups, ((Role.EXPERT, each), (Role.EXPERT, each))), transposed=turned)
    assert parts is not None
    return parts


def _layout_of(leaf: str, class_name: str) -> Callable[[int, int, Sources], Layout | None] | None:
    return next((f for name, classes, f in _QKV if name == leaf and re.search(classes, class_name)), None)


def _stored_input_first(leaf: str, shape: tuple[int, ...], owner: nn.Module, parent: nn.Module) -> bool | None:
    """Whether experts are (experts, in, out); by what transformers says of the class, else by the other table."""
    said = getattr(owner, "is_transposed", None)
    if isinstance(said, bool):
        return said
    is_up = leaf in ("gate_up_proj", "input_linear")
    up = shape if is_up else _partner(owner, parent, "gate_up_proj", "input_linear")
    down = _partner(owner, parent, "down_proj", "output_linear") if is_up else shape
    if up is None or down is None:
        return None
    as_linear, turned = up[1] == 2 * down[2], up[2] == 2 * down[1]
    return turned if as_linear != turned else None


def _partner(owner: nn.Module, parent: nn.Module, *names: str) -> tuple[int, ...] | None:
    for module in (owner, parent):
        for name in names:
            other = getattr(module, name, None)
            other = getattr(other, "weight", other)
            if getattr(other, "ndim", 0) == 3:
                return tuple(other.shape)  # type: ignore[union-attr]
    return None


def _row_stacked(shape: tuple[int, ...], owner: nn.Module) -> tuple[Part, ...]:
    """DBRX keeps its experts one above the other in a table of two dimensions: one part for each."""
    experts = getattr(owner, "moe_num_experts", 0)
    if len(shape) != 2 or class_name(owner) != "DbrxExpertGLU" or not experts or shape[0] % experts:
        return (Part(role=Role.EXPERT),)
    parts = cut(shape[0], (1, ((Role.EXPERT, shape[0] // experts),) * experts))
    assert parts is not None
    return parts
