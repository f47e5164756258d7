"""What a parameter does in a model: the word presets go by, and what the names of layers say about it."""

from __future__ import annotations

import re
from enum import StrEnum


class Role(StrEnum):
    """A parameter's part in a transformer."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741
    QKV = "qkv-fused"
    FFN_UP = "ffn-up"
    FFN_GATE = "ffn-gate"
    FFN_DOWN = "ffn-down"
    CONV = "conv"
    EXPERT = "expert"
    ROUTER = "router"
    LORA_A = "lora_A"
    LORA_B = "lora_B"
    OTHER = "other"


HIDDEN = frozenset({Role.Q, Role.K, Role.V, Role.O, Role.QKV, Role.FFN_UP, Role.FFN_GATE, Role.FFN_DOWN, Role.EXPERT})
"""Matrices (or batches of matrices) between two hidden layers: what GaLore projects and Muon orthogonalises."""

_PROJECTION = r"(?:_(?:proj|projection|lin|linear|attn|head|layer|global|[ab]_proj|[ab]))?"
_TO = r"(?:(?:linear|project|projection|to|layout)_|w)?"
_ATTENTION: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (Role.Q, re.compile(rf"{_TO}q(?:uery|ueries)?{_PROJECTION}", re.I)),
    (Role.K, re.compile(rf"{_TO}k(?:ey|eys)?{_PROJECTION}", re.I)),
    (Role.V, re.compile(rf"{_TO}v(?:alue|alues)?{_PROJECTION}", re.I)),
    (
        Role.O,
        re.compile(
            r"w?o(?:_[ab])?|o_lin|(?:o|out|c|output|post)_(?:[ab]_)?proj|out_lin|dense|to_out|out|proj|output|post|"
            r"projection(?:_layer)?|output_dense|linear_o|linear_out|(?:out|output)_projection|att(?:entio)?n_out",
            re.I,
        ),
    ),
)
_FFN: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (Role.FFN_GATE, re.compile(r"gate_proj|gate|wi_0|c_fc_0|ff_gate|linear_gate|proj_gate|mlp_gate")),
    (
        Role.FFN_UP,
        re.compile(
            r"up_proj|fc1|fc_in|c_fc|c_fc_1|wi|wi_1|Wi|w1|w3|v1|lin1|linear1|dense_h_to_4h|intermediate_dense|"
            r"pwconv1|pointwise_conv1|ffn|ff_proj|ffw_layer_1|linear_fc1|weights_in|gate_up_proj|input_linear|proj_up"
        ),
    ),
    (
        Role.FFN_DOWN,
        re.compile(
            r"down_proj|fc2|fc_out|c_proj|wo|Wo|w2|lin2|linear2|dense_4h_to_h|output_dense|pwconv2|pointwise_conv2|"
            r"ffn_output|ff_out|ffw_layer_2|linear_fc2|weights_out|output_linear|proj_down"
        ),
    ),
)
_INSIDE_FFN: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (Role.FFN_UP, re.compile(r"(?:in_proj|proj_in|linear_in|w_in|intermediate|(?:linear|dense|layer)_?1)")),
    (Role.FFN_DOWN, re.compile(r"(?:out_proj|proj_out|linear_out|w_out|output|(?:linear|dense|layer)_?2)")),
)
"""Names that mean this in a feed-forward block only."""
_HEAD = re.compile(
    r"(?:\w+_)?heads?|score|(?:pre_)?classifier|embed_out|cls|qa_outputs|output_layer|lm_loss|"
    r"vocab_projector|vocab_transform|logits_proj|seq_relationship|summary"
)
_ROUTER = re.compile(r"\w*router|wg|(?:shared_expert|router|expert)_gate")
_EXPERTS = re.compile(r"experts?|experts?_\d+|(?:local|routed)_experts")
_NORM = re.compile(r"\w*norm\w*|ln(?:_\w+|\d*)", re.I)
_BIAS = re.compile(r"(?:\w*_)?bias(?:es)?|bias_\w+|\w+_bias_\w")
_TABLE = re.compile(r"\w*(?:position|pos)_?embed\w*|\w*embedding\w*|(?:\w+_)?tokens?|wpe|wte")
_IN_ATTENTION = re.compile(r"attn|attention|encdec", re.I)
_ATTENTION_CLASS = re.compile(r"(?:Attention|Attn|DeltaNet)(?!\w*(?:Layer|Block|Model|Encoder|Decoder))")
_FFN_CLASS = re.compile(r"MLP|Mlp|FFN|FeedForward|ActDense")
_IN_FFN = re.compile(r"mlp|ffn|feed_?forward|^ff$|DenseReluDense|intermediate|^layer_?1?_?ff", re.I)


def attention_role(leaf: str) -> Role | None:
    """Role of the layer `leaf` of an attention block by its name: q, k, v or o."""
    return next((role for role, names in _ATTENTION if names.fullmatch(leaf)), None)


def ffn_role(leaf: str, *, inside: bool = True) -> Role | None:
    """Role of the layer `leaf` of a feed-forward block by its name; if not `inside` one, only names that mean nothing
    else."""
    tables = _FFN + _INSIDE_FFN if inside else _FFN
    return next((role for role, names in tables if names.fullmatch(leaf)), None)


def ffn_half(segment: str) -> Role | None:
    """Role of BERT's `intermediate.dense` and `output.dense` by the segment before `dense`."""
    if re.search(r"(?:^|_)inter(?:mediate)?(?:_|$)", segment):
        return Role.FFN_UP
    return Role.FFN_DOWN if re.search(r"(?:^|_)output(?:_|$)", segment) else None


def is_head(segment: str) -> bool:
    """Whether this is what the layer over the last hidden state, or its block, is called."""
    return _HEAD.fullmatch(segment) is not None


def is_router(segment: str) -> bool:
    """Whether this is what the layer that chooses experts is called."""
    return _ROUTER.fullmatch(segment) is not None


def is_experts(segment: str) -> bool:
    """Whether this is what a set of routed experts, or one of them, is called; shared experts are not meant."""
    return _EXPERTS.fullmatch(segment) is not None


def is_norm(segment: str) -> bool:
    """Whether this is what a normalisation is called."""
    return _NORM.fullmatch(segment) is not None


def is_bias(leaf: str) -> bool:
    """Whether a parameter of this name is added to something."""
    return _BIAS.fullmatch(leaf) is not None


def is_table(leaf: str) -> bool:
    """Whether a parameter of this name is looked up, or put in beside tokens."""
    return _TABLE.fullmatch(leaf) is not None


def block_of(segment: str, class_name: str) -> str | None:
    """Which block a module is, by its name and its class: "attention", "ffn", or neither."""
    if _IN_FFN.search(segment):
        return "ffn"
    if _IN_ATTENTION.search(segment):
        return "attention"
    if _FFN_CLASS.search(class_name):
        return "ffn"
    return "attention" if _ATTENTION_CLASS.search(class_name) else None
