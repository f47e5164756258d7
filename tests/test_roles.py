"""The router: roles and parts of model families, names through wrappers, ties, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from memopt.errors import BadInput
from memopt.optim.parts import Part
from memopt.optim.presets import decays
from memopt.optim.roles import HIDDEN, Role
from memopt.optim.routing import Routed, require_shapes, route
from tests.role_families import FAMILIES, build

# transformers compiles parts of some families with it, torch.compile imports it
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch.jit.script\w*. is deprecated:DeprecationWarning")


def _roles(item: Routed) -> str:
    return "+".join(part.role for part in item.parts)


def _by_name(model: nn.Module) -> dict[str, Routed]:
    return {item.name: item for item in route(model)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_table_of_a_family_has_its_role(family: str) -> None:
    expected = dict(pair.split("=") for pair in FAMILIES[family][2].split())
    used = set()
    for item in route(build(family, device="meta")):
        if item.parameter.ndim < 2:
            assert item.role in (Role.NORM, Role.BIAS, Role.OTHER), item.name
            continue
        name = "." + item.name.removesuffix(".weight")
        key = max((key for key in expected if name.endswith("." + key)), key=len, default=None)
        assert key is not None, f"{item.name} is {_roles(item)}, and not written down"
        assert _roles(item) == expected[key], f"{item.name}: {item.why}"
        used.add(key)
    assert used == set(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_hold_every_element_once_and_have_the_shape_they_say(family: str) -> None:
    for item in route(build(family, device="meta")):
        shape = tuple(item.parameter.shape)
        numbers = torch.arange(math.prod(shape)).view(shape)
        parts = [part.view(numbers) for part in item.parts]
        assert torch.equal(torch.cat([part.reshape(-1) for part in parts]).sort().values, numbers.reshape(-1))
        if len(shape) > 1:
            for part, view in zip(item.parts, parts, strict=True):
                batch, groups, rows, columns = view.shape
                assert part.shape(shape) in {(batch, groups * rows, columns), (groups * rows, columns)}
                assert math.prod(part.shape(shape)) == math.prod(view.shape)


def test_each_trainable_parameter_comes_once_in_the_order_of_the_model() -> None:
    model = build("t5", device="meta")
    frozen = dict(model.named_parameters())["encoder.block.0.layer.0.SelfAttention.q.weight"]
    frozen.requires_grad_(False)
    assert [item.name for item in route(model)] == [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(item.parameter is not frozen for item in route(model))


@pytest.mark.parametrize("family, names", [("gpt2", 1), ("t5", 3), ("bert", 1)])
def test_a_table_that_is_also_the_head_is_an_embedding(family: str, names: int) -> None:
    (tied,) = [item for item in route(build(family)) if item.tied and item.parameter.ndim > 1]
    assert tied.role == Role.EMBEDDING
    assert len(tied.tied) == names
    assert tied.why.endswith("tied to the head")


def test_a_head_that_is_not_tied_is_a_head() -> None:
    found = _by_name(build("gpt2", tie_word_embeddings=False, device="meta"))
    assert found["lm_head.weight"].role == Role.HEAD
    assert found["transformer.wte.weight"].tied == ()


def test_biases_norms_and_vectors_do_not_decay() -> None:
    for item in route(build("bert classifier", device="meta")):
        is_plain = item.name.endswith("bias") or "LayerNorm" in item.name
        assert decays(item) == (not is_plain), item.name
        assert (item.role in (Role.BIAS, Role.NORM)) == is_plain


def test_expert_biases_of_two_dimensions_do_not_decay() -> None:
    bias = _by_name(build("gpt-oss", device="meta"))["model.layers.0.mlp.experts.gate_up_proj_bias"]
    assert bias.parameter.ndim == 2
    assert not decays(bias)


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twist = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.rotary_emb = nn.Linear(4, 4, bias=False)


def test_what_is_not_known_is_other_and_says_so() -> None:
    found = _by_name(_Odd())
    assert {name: item.role for name, item in found.items()} == {
        "scale": Role.OTHER,
        "twist.weight": Role.OTHER,
        "twist.bias": Role.BIAS,
        "rotary_emb.weight": Role.OTHER,
    }
    assert found["twist.weight"].why == "unknown: twist in _Odd"


def test_torch_layers_are_known_too() -> None:
    found = _by_name(nn.TransformerEncoderLayer(8, 2, 16))
    assert {name: _roles(item) for name, item in found.items() if item.parameter.ndim > 1} == {
        "self_attn.in_proj_weight": "q+k+v",
        "self_attn.out_proj.weight": "o",
        "linear1.weight": "ffn-up",
        "linear2.weight": "ffn-down",
    }
    apart = _by_name(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    assert [_roles(apart[f"{name}_proj_weight"]) for name in "qkv"] == ["q", "k", "v"]


def test_names_of_llama_as_its_authors_published_it() -> None:
    layer = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("wq", "wk", "wv", "wo")}),
            "feed_forward": nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("w1", "w2", "w3")}),
        }
    )
    assert [_roles(item) for item in route(layer)] == ["q", "k", "v", "o", "ffn-gate", "ffn-down", "ffn-up"]


def test_names_through_torch_compile() -> None:
    model = build("llama")
    plain = [(item.name, item.role) for item in route(model)]
    assert [(item.name, item.role) for item in route(torch.compile(model))] == plain
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert [(item.name, item.role) for item in route(model)] == plain


def test_names_through_data_parallel_wrappers() -> None:
    model = build("llama")
    plain = [(item.name, _roles(item)) for item in route(model)]

    class DistributedDataParallel(nn.Module):  # the router goes by the name of the class
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = DistributedDataParallel(torch.compile(model))
    assert [(item.name, _roles(item)) for item in route(wrapped)] == plain


def test_a_child_that_is_called_module_keeps_its_name() -> None:
    assert [item.name for item in route(nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)}))] == ["module.weight"]


def test_peft_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    found = _by_name(peft.get_peft_model(build("llama"), config))
    roles = {name.removeprefix("base_model.model."): item.role for name, item in found.items()}
    assert roles == {
        "model.embed_tokens.lora_embedding_A.default": Role.LORA_A,
        "model.embed_tokens.lora_embedding_B.default": Role.LORA_B,
        "model.layers.0.self_attn.q_proj.lora_A.default.weight": Role.LORA_A,
        "model.layers.0.self_attn.q_proj.lora_B.default.weight": Role.LORA_B,
        "lm_head.modules_to_save.default.weight": Role.HEAD,
    }


def test_the_base_of_an_adapter_keeps_its_role() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("gpt2"), config)
    for param in model.parameters():
        param.requires_grad_(True)
    base = _by_name(model)["base_model.model.transformer.h.0.attn.c_attn.base_layer.weight"]
    assert _roles(base) == "q+k+v"
    assert base.parts[0].transposed


class _Wide(nn.Module):
    """A block of a class nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv_proj": nn.Linear(8, 24, bias=False)})


def test_a_fused_projection_of_an_unknown_class_is_not_cut() -> None:
    (found,) = route(_Wide())
    assert found.role == Role.QKV
    assert found.parts == (Part(role=Role.QKV),)


def test_sizes_that_do_not_add_up_are_not_cut() -> None:
    model = build("gpt-neox", device="meta")
    block = model.gpt_neox.layers[0].attention
    block.query_key_value = nn.Linear(32, 97, bias=False)
    found = _by_name(model)["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert found.parts == (Part(role=Role.QKV),)


def _flattened(model: nn.Module, suffix: str, kind: type = nn.Parameter) -> list[Routed]:
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if any(param is p for n, p in model.named_parameters() if n.endswith(suffix)):
                setattr(module, name, kind(param.detach().reshape(-1)))
    return route(model)


@pytest.mark.parametrize("suffix", ["q_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight"])
def test_matrices_that_were_flattened_are_refused_with_guidance(suffix: str) -> None:
    with pytest.raises(BadInput, match=r"galore works on matrices, but .* has shape \(\d+,\): .*use FSDP2"):
        require_shapes(_flattened(build("llama"), suffix), "galore")


def test_a_flat_parameter_of_fsdp1_is_refused() -> None:
    class FlatParameter(nn.Parameter):
        pass

    model = nn.Module()
    model.register_parameter("_flat_param", FlatParameter(torch.zeros(8)))
    with pytest.raises(BadInput, match="FSDP1 or DeepSpeed ZeRO has flattened it"):
        require_shapes(route(model), "muon")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_looks_flattened(family: str) -> None:
    require_shapes(route(build(family, device="meta")), "muon")


def test_hidden_matrices_leave_out_the_ends() -> None:
    assert not HIDDEN & {Role.EMBEDDING, Role.HEAD, Role.NORM, Role.BIAS, Role.ROUTER, Role.OTHER, Role.CONV}
