"""Cuts of fused tables against the models' own forward: what a row does, not where a formula says it lies."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from memopt.optim.parts import Part
from memopt.optim.roles import Role
from memopt.optim.routing import Routed, route
from tests.role_families import FAMILIES, build, build_class

# transformers compiles parts of some families with it
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch.jit.script\w*. is deprecated:DeprecationWarning")

LENGTH, AT = 5, 2


class _Seen(Exception):
    """Carries what a block has put out, and ends the forward pass."""


def _block_output(model: nn.Module, block: nn.Module, layer: nn.Module, rows: int, push: float) -> torch.Tensor:
    """Output (rows, LENGTH, D) of `block` when, in sequence r of the batch, row r of `layer` says `push` more at AT."""

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.view(rows, LENGTH, rows).clone()
        output[:, AT] += push * torch.eye(rows, dtype=output.dtype)
        return output

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Seen(output[0] if isinstance(output, tuple | list) else output)

    hooks = [layer.register_forward_hook(add), block.register_forward_hook(stop)]
    ids = torch.tensor([[3, 7, 1, 9, 4]]).expand(rows, -1)
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except _Seen as seen:
        found: torch.Tensor = seen.args[0]
        return found.view(rows, LENGTH, -1)
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError("the block was not reached")


def _labels(model: nn.Module, block: nn.Module, layer: nn.Module, rows: int) -> list[Role]:
    """What each row of `layer` does: a query changes its own position only, a value the output in proportion, a key
    neither."""
    model.double()
    none, once, twice = (_block_output(model, block, layer, rows, push) for push in (0.0, 1.0, 2.0))
    once, twice = once - none, twice - none
    elsewhere = once.clone()
    elsewhere[:, AT] = 0
    found = []
    for row in range(rows):
        assert once[row].abs().max() > 1e-9, f"row {row} does nothing"
        if elsewhere[row].abs().max() < 1e-12:
            found.append(Role.Q)
        else:
            proportional = torch.allclose(twice[row], 2 * once[row], rtol=1e-9, atol=1e-12)
            found.append(Role.V if proportional else Role.K)
    return found


def _said(item: Routed) -> list[Role]:
    """The role the router gives each row (of the transpose, if the table is stored input-first)."""
    shape = item.parameter.shape
    rows = shape[1] if item.parts[0].transposed else shape[0]
    numbers = torch.arange(rows)[:, None].expand(rows, shape.numel() // rows)
    table = numbers.T if item.parts[0].transposed else numbers
    said: list[Role | None] = [None] * rows
    for part in item.parts:
        for row in part.view(table)[..., 0].reshape(-1).tolist():
            assert said[row] is None
            said[row] = part.role
    return [role for role in said if role is not None]


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", {}, "c_attn"),
    "gpt-neox": ("gpt-neox", {}, "query_key_value"),
    "bloom": ("bloom", {}, "query_key_value"),
    "persimmon": ("persimmon", {}, "query_key_value"),
    "falcon, one key for all": ("falcon", {}, "query_key_value"),
    "falcon, one key per head": ("falcon", {"multi_query": False}, "query_key_value"),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "query_key_value"),
    "mpt": ("mpt", {}, "Wqkv"),
    "codegen": ("codegen", {"n_head": 8}, "qkv_proj"),
    "starcoder": ("starcoder", {}, "c_attn"),
    "starcoder, one key per head": ("starcoder", {"multi_query": False}, "c_attn"),
    "phi3": ("phi3", {}, "qkv_proj"),
    "dbrx": ("dbrx", {}, "Wqkv"),
    "jetmoe": ("jetmoe", {}, "kv_proj"),
    "deepseek-v3": ("deepseek-v3", {}, "kv_b_proj"),
    "modernbert": ("modernbert", {}, "Wqkv"),
    "deberta": ("deberta", {}, "in_proj"),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_do_what_the_router_says(case: str) -> None:
    family, changes, leaf = CASES[case]
    model = build(family, **changes)
    (item,) = [item for item in route(model) if item.name.endswith(f"{leaf}.weight")]
    path = item.name.split(".")[:-1]
    layer = model.get_submodule(".".join(path))
    block = model.get_submodule(".".join(path[:-1]))
    rows = item.parameter.shape[1] if item.parts[0].transposed else item.parameter.shape[0]
    assert _said(item) == _labels(model, block, layer, rows)


def test_openai_gpt() -> None:
    model = build_class("OpenAIGPTLMHeadModel", {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 64})
    (item,) = [item for item in route(model) if item.name.endswith("c_attn.weight")]
    block = model.transformer.h[0].attn
    assert _said(item) == _labels(model, block, block.c_attn, 96)


@pytest.mark.parametrize("class_name, kv", [("BlipVisionModel", 4), ("Exaone4_5_VisionModel", 2)])
def test_vision_towers_keep_queries_keys_and_values_apart(class_name: str, kv: int) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_heads": 4, "depth": 1}
    more = {"num_hidden_layers": 1, "num_key_value_heads": kv, "num_kv_heads": kv}
    items = route(build_class(class_name, {**sizes, **more}, device="meta"))
    fused = [item for item in items if item.name.endswith("qkv.weight")]
    assert fused
    for item in fused:
        assert [(part.role, part.groups, part.length) for part in item.parts] == [
            (Role.Q, 1, 32),
            (Role.K, 1, 8 * kv),
            (Role.V, 1, 8 * kv),
        ]


def test_multihead_attention_of_torch() -> None:
    (item,) = [item for item in route(nn.MultiheadAttention(8, 2)) if item.name == "in_proj_weight"]
    for part, third in zip(item.parts, item.parameter.chunk(3), strict=True):  # as torch's multi_head_attention_forward
        assert torch.equal(part.view(item.parameter)[0, 0], third)


def _stub(class_name: str, leaf: str, rows: int, **attributes: Any) -> Routed:
    """A fused layer of `rows` rows in a block of a class that transformers does not bring."""
    block = type(class_name, (nn.Module,), {})()
    block.add_module(leaf, nn.Linear(2, rows, bias=False))
    for name, value in attributes.items():
        setattr(block, name, value)
    return route(nn.ModuleDict({"attention": block}))[0]


HEADS, KV, SIZE = 4, 2, 3
Split = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def _interleaved(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.view(HEADS, 3 * SIZE).split(SIZE, dim=1))


def _grouped(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    per_head = x.view(KV, HEADS // KV + 2, SIZE)
    return per_head[:, :-2], per_head[:, -2], per_head[:, -1]


REMOTE: dict[str, tuple[str, str, int, dict[str, Any], Split]] = {
    "ChatGLM2": (
        "SelfAttention",
        "query_key_value",
        (HEADS + 2 * KV) * SIZE,
        {
            "multi_query_attention": True,
            "num_attention_heads_per_partition": HEADS,
            "num_multi_query_groups_per_partition": KV,
            "hidden_size_per_attention_head": SIZE,
        },
        lambda x: x.split([HEADS * SIZE, KV * SIZE, KV * SIZE]),
    ),
    "ChatGLM": (
        "SelfAttention",
        "query_key_value",
        3 * HEADS * SIZE,
        {"num_attention_heads_per_partition": HEADS},
        _interleaved,
    ),
    "InternLM2": (
        "InternLM2Attention",
        "wqkv",
        (HEADS + 2 * KV) * SIZE,
        {"num_heads": HEADS, "num_key_value_heads": KV, "head_dim": SIZE},
        _grouped,
    ),
    "Baichuan": ("BaichuanAttention", "W_pack", 3 * HEADS * SIZE, {}, lambda x: x.chunk(3)),
    "Qwen": ("QWenAttention", "c_attn", 3 * HEADS * SIZE, {}, lambda x: x.chunk(3)),
    "MiniMax": (
        "MiniMaxLightningAttention",
        "qkv_proj",
        3 * HEADS * SIZE,
        {"num_attention_heads": HEADS},
        _interleaved,
    ),
    "Qwen3.5": (
        "Qwen3_5GatedDeltaNet",
        "in_proj_qkv",
        40,
        {"key_dim": 8, "value_dim": 24},
        lambda x: x.split([8, 8, 24]),
    ),
}


@pytest.mark.parametrize("model", REMOTE)
def test_splits_as_the_published_code_has_them(model: str) -> None:
    class_name, leaf, rows, attributes, split = REMOTE[model]
    item = _stub(class_name, leaf, rows, **attributes)
    assert [part.role for part in item.parts] == [Role.Q, Role.K, Role.V]
    numbers = torch.arange(rows)
    for part, expected in zip(item.parts, split(numbers), strict=True):
        assert torch.equal(part.view(numbers[:, None]).reshape(-1), expected.reshape(-1))


def test_qwen3_next_by_its_own_reordering() -> None:
    model = build("qwen3-next")
    layer = model.model.layers[0].linear_attn
    (item,) = [item for item in route(model) if item.name.endswith("in_proj_qkvz.weight")]
    rows = torch.arange(item.parameter.shape[0]).view(1, 1, -1)
    split = layer.fix_query_key_value_ordering(rows, torch.zeros(1, 1, 8))[:4]
    for part, expected in zip(item.parts, split, strict=True):
        assert torch.equal(part.view(rows[0, 0][:, None]).reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize("family, leaf", [("phi3", "gate_up_proj"), ("glm4", "gate_up_proj"), ("modernbert", "Wi")])
def test_gate_and_up_of_a_feed_forward_layer(family: str, leaf: str) -> None:
    model = build(family)
    (item,) = [item for item in route(model) if item.name.endswith(f"{leaf}.weight")]
    mlp = model.get_submodule(".".join(item.name.split(".")[:-2]))
    gate, up = (part.view(item.parameter)[0, 0] for part in item.parts)
    assert [part.role for part in item.parts] == [Role.FFN_GATE, Role.FFN_UP]
    x = torch.randn(3, 32)
    act = next(m for name, m in mlp.named_children() if "act" in name)
    down = mlp.down_proj if hasattr(mlp, "down_proj") else mlp.Wo
    torch.testing.assert_close(mlp(x), down(act(x @ gate.T) * (x @ up.T)))


def test_gate_and_up_of_chatglm() -> None:
    mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(4, 12, bias=False), "dense_4h_to_h": nn.Linear(6, 4, bias=False)})
    up, down = route(nn.ModuleDict({"mlp": mlp}))
    assert [part.role for part in up.parts] == [Role.FFN_GATE, Role.FFN_UP]
    assert [part.role for part in down.parts] == [Role.FFN_DOWN]


def _experts(model: nn.Module) -> tuple[Any, dict[str, Routed]]:
    found = {item.name.split(".")[-1]: item for item in route(model) if item.role == Role.EXPERT}
    name = next(item.name for item in route(model) if item.role == Role.EXPERT)
    return model.get_submodule(name.rpartition(".")[0]), found


def _matrices(item: Routed) -> list[torch.Tensor]:
    """Each part as (experts, rows, columns)."""
    return [part.view(item.parameter).flatten(1, 2) for part in item.parts]


@pytest.mark.parametrize(
    "class_name, settings",
    [
        ("MixtralForCausalLM", FAMILIES["mixtral"][1]),
        ("Qwen2MoeForCausalLM", FAMILIES["qwen2-moe"][1]),
        ("DeepseekV3ForCausalLM", FAMILIES["deepseek-v3"][1]),
        ("GptOssForCausalLM", FAMILIES["gpt-oss"][1]),
    ],
)
def test_experts_by_their_matrices(class_name: str, settings: dict[str, Any]) -> None:
    experts, items = _experts(build_class(class_name, {**settings, "experts_implementation": "eager"}))
    (gate, up), (down,) = _matrices(items["gate_up_proj"]), _matrices(items["down_proj"])
    if hasattr(experts, "gate_up_proj_bias"):
        nn.init.zeros_(experts.gate_up_proj_bias)
        nn.init.zeros_(experts.down_proj_bias)
    x = torch.randn(4, 32)
    which = torch.tensor([[0], [1], [1], [0]])
    found = experts(x, which, torch.ones(4, 1))
    for token, expert in enumerate(which[:, 0].tolist()):
        g, u = x[token] @ gate[expert].T, x[token] @ up[expert].T
        if hasattr(experts, "_apply_gate") and items["gate_up_proj"].parts[0].transposed:
            inner = experts._apply_gate(torch.stack([g, u], dim=-1).reshape(1, -1))[0]
        else:
            inner = experts.act_fn(g) * u
        torch.testing.assert_close(found[token], inner @ down[expert].T)


def test_experts_of_llama4() -> None:
    torch.manual_seed(0)
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = SimpleNamespace(num_local_experts=2, intermediate_size=6, hidden_size=4, hidden_act="silu")
    experts = Llama4TextExperts(config)
    for param in experts.parameters():
        nn.init.normal_(param)
    up_item, down_item = route(nn.ModuleDict({"experts": experts}))
    (gate, up), (down,) = _matrices(up_item), _matrices(down_item)
    x = torch.randn(2, 3, 4)
    expected = (nn.functional.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT
    torch.testing.assert_close(experts(x.view(6, 4)), expected.view(6, 4))


def test_experts_of_dbrx_are_one_part_each() -> None:
    experts, items = _experts(build("dbrx"))
    w1, v1, w2 = (_matrices(items[name]) for name in ("w1", "v1", "w2"))
    assert len(w1) == len(v1) == len(w2) == 2
    glu = experts if hasattr(experts, "w1") else experts.mlp
    x = torch.randn(3, 32)
    for expert in range(2):
        g, v, w = (tables[expert][0] for tables in (w1, v1, w2))
        split = [getattr(glu, name).view(2, 16, 32)[expert] for name in ("w1", "v1", "w2")]
        torch.testing.assert_close(glu(x, *split), (glu.activation_fn(x @ g.T) * (x @ v.T)) @ w)


def test_a_batch_of_matrices_without_a_partner_is_one_part() -> None:
    experts = type("FooExperts", (nn.Module,), {})()
    experts.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 4))
    (item,) = route(nn.ModuleDict({"experts": experts}))
    assert item.parts == (Part(role=Role.EXPERT),)
