"""Presets: which part of which parameter gets which policy; options, overrides and what is refused."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import nn

from memopt.errors import BadInput
from memopt.jobs.optimizer import build_optimizer
from memopt.optim.codecs import Codec
from memopt.optim.muon import Scale
from memopt.optim.newton_schulz import Coefficients
from memopt.optim.parts import Part
from memopt.optim.presets import PRECISE, PRESETS, Assignment, Policy, Rule, require_elementwise, resolve
from memopt.optim.roles import HIDDEN, Role
from memopt.optim.routing import Routed, route
from tests.optimizer_helpers import tiny, tokens
from tests.role_families import FAMILIES, build

# transformers compiles parts of some families with it
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch.jit.script\w*. is deprecated:DeprecationWarning")


def _llama(size: int = 256) -> list[Routed]:
    return route(
        build("llama", device="meta", hidden_size=size, intermediate_size=2 * size, head_dim=size // 4, vocab_size=512)
    )


def _labels(assignments: list[Assignment]) -> dict[str, str]:
    """What each role is done with; several in the order they come."""
    found: dict[str, str] = {}
    for assignment in assignments:
        label, seen = assignment.policy.label, found.setdefault(str(assignment.part.role), assignment.policy.label)
        assert seen == label, f"{assignment.routed.name}: {label}, others {seen}"
    return found


def _everything(label: str, **others: str) -> dict[str, str]:
    roles = ("embedding", "head", "norm", "q", "k", "v", "o", "ffn-gate", "ffn-up", "ffn-down")
    return {role: others.get(role.replace("-", "_"), label) for role in roles}


_HIDDEN = ("q", "k", "v", "o", "ffn_gate", "ffn_up", "ffn_down")


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("adamw", _everything("adamw")),
        ("adamw8bit", _everything("adamw int8", embedding="adamw", norm="adamw")),
        ("lion", _everything("lion")),
        ("lion8bit", _everything("lion int8", embedding="lion", norm="lion")),
        ("sgd", _everything("sgd")),
        ("galore", _everything("adamw", **dict.fromkeys(_HIDDEN, "galore(16) adamw"))),
        (
            "galore8bit",
            _everything("adamw", head="adamw int8", **dict.fromkeys(_HIDDEN, "galore(16) adamw int8")),
        ),
        ("galore_muon", _everything("adamw", **dict.fromkeys(_HIDDEN, "galore(16) muon"))),
        ("muon", _everything("adamw", **dict.fromkeys(_HIDDEN, "muon"))),
        ("muon_vo_ffn", _everything("adamw", **dict.fromkeys(_HIDDEN[2:], "muon"))),
        ("muon8bit", _everything("adamw", head="adamw int8", **dict.fromkeys(_HIDDEN, "muon int8_linear"))),
    ],
)
def test_what_each_preset_does_with_a_llama(preset: str, expected: dict[str, str]) -> None:
    options = {"rank": 16, "proj_type": "left"} if "galore" in preset else {}  # left: states of (16, n), not too narrow
    assert _labels(resolve(preset, _llama(), **options)) == expected


def test_every_preset_is_in_the_table_above() -> None:
    tested = test_what_each_preset_does_with_a_llama.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {preset for preset, _ in tested} == set(PRESETS)
    assert all(preset.doc and preset.source for preset in PRESETS.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_preset_takes_every_family(family: str) -> None:
    routed = route(build(family, device="meta"))
    for preset in PRESETS:
        elements = dict.fromkeys((item.name for item in routed), 0)
        for a in resolve(preset, routed):
            shape = tuple(a.routed.parameter.shape)
            elements[a.routed.name] += torch.Size(a.part.shape(shape)).numel()
            assert not a.policy.shape_aware or (a.part.role in HIDDEN and len(shape) > 1)
            assert a.policy.codec == Codec.FP32 or a.part.role not in PRECISE
        assert elements == {item.name: item.parameter.numel() for item in routed}


def test_a_fused_projection_is_cut_only_where_its_parts_differ_or_are_matrices() -> None:
    routed = [item for item in route(build("phi3", device="meta")) if item.role in (Role.QKV, Role.FFN_UP)]

    def parts(preset: str, **options: Any) -> list[list[str]]:
        found = resolve(preset, routed, **options)
        return [[f"{a.part.role}: {a.policy.label}" for a in found if a.routed is item] for item in routed]

    assert parts("adamw") == [["qkv-fused: adamw"], ["ffn-up: adamw"]]
    assert parts("muon") == [["q: muon", "k: muon", "v: muon"], ["ffn-gate: muon", "ffn-up: muon"]]
    assert parts("muon_vo_ffn")[0] == ["q: adamw", "k: adamw", "v: muon"]
    assert parts("adamw", overrides={"v": "lion"})[0] == ["q: adamw", "k: adamw", "v: lion"]
    (whole,) = [a.part for a in resolve("adamw", routed[:1])]
    assert whole == Part(role=Role.QKV)


def test_element_wise_parts_are_not_turned_round() -> None:
    routed = route(build("gpt2", device="meta"))
    assert all(a.part.whole for a in resolve("lion", routed))
    assert any(a.part.transposed for a in resolve("muon", routed))


def test_a_fused_projection_that_cannot_be_cut_goes_with_the_values_nowhere() -> None:
    routed = [item for item in route(build("deepseek-v3", device="meta")) if "kv_a_proj" in item.name]
    assert [a.policy.rule for a in resolve("muon", routed)] == ["muon"]
    assert [a.policy.rule for a in resolve("muon_vo_ffn", routed)] == ["adamw"]


def test_small_and_narrow_states_stay_float32_and_say_so() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 16, bias=False), "k_proj": nn.Linear(32, 200, bias=False)})
    small, narrow = resolve("adamw8bit", route(model))
    assert (small.policy.codec, narrow.policy.codec) == (Codec.FP32, Codec.FP32)
    assert small.why == "name q_proj; only 128 elements: states in float32"
    assert narrow.why == "name k_proj; rows of 32: states in float32"


def test_a_rank_that_is_too_large_means_full_rank_and_says_so() -> None:
    found = {a.routed.name: a for a in resolve("galore", _llama(), rank=200)}
    q = found["model.layers.0.self_attn.q_proj.weight"]
    k = found["model.layers.0.self_attn.k_proj.weight"]
    assert q.policy.label == "galore(200) adamw"
    assert k.policy == Policy()
    assert "rank 200 is not below the shorter side of 128 x 256" in k.why


def test_options_reach_the_policies() -> None:
    options: dict[str, Any] = {
        "rank": 8,
        "update_proj_gap": 50,
        "scale": 2.0,
        "proj_type": "right",
        "basis": "power",
        "rotate": False,
        "adaptive": True,
        "residual": "fira",
        "basis_dtype": "bfloat16",
        "betas": [0.8, 0.9],
        "eps": 1e-6,
    }
    q = next(a.policy for a in resolve("galore", _llama(), **options) if a.part.role == Role.Q)
    assert q.projection is not None
    assert {name: getattr(q.projection, name) for name in list(options)[:9]} == dict(list(options.items())[:9])
    assert (q.betas, q.eps) == ((0.8, 0.9), 1e-6)
    options = {
        "momentum": 0.9,
        "nesterov": False,
        "ns_steps": 3,
        "coefficients": "jordan",
        "ns_dtype": "bfloat16",
        "scale_mode": "original",
    }
    q = next(a.policy for a in resolve("muon", _llama(), **options) if a.part.role == Role.Q)
    assert (q.momentum, q.nesterov, q.ns_steps, q.ns_dtype) == (0.9, False, 3, torch.bfloat16)
    assert (q.coefficients, q.scale_mode) == (Coefficients.JORDAN, Scale.ORIGINAL)


def test_defaults_are_those_of_the_papers() -> None:
    assert PRESETS["adamw"].main.betas == (0.9, 0.999)
    assert PRESETS["lion"].main.betas == (0.9, 0.99)
    assert PRESETS["muon"].main.nesterov
    assert not PRESETS["muon_vo_ffn"].main.nesterov
    assert PRESETS["muon"].rest.betas == (0.9, 0.95)


def test_none_leaves_an_option_as_it_is() -> None:
    routed = _llama()
    assert resolve("muon", routed, betas=None, rank=None, overrides=None) == resolve("muon", routed)


@pytest.mark.parametrize(
    "preset, dtype, expected",
    [
        ("adamw", "int8", {"q": "adamw int8", "head": "adamw int8", "embedding": "adamw", "norm": "adamw"}),
        ("muon", "int8", {"q": "muon int8_linear", "head": "adamw int8", "embedding": "adamw"}),
        ("muon", torch.bfloat16, {"q": "muon bfloat16", "head": "adamw bfloat16", "norm": "adamw bfloat16"}),
        ("adamw8bit", "float32", {"q": "adamw", "head": "adamw"}),
        ("lion", "bfloat16", {"q": "lion bfloat16"}),
    ],
)
def test_state_dtype(preset: str, dtype: Any, expected: dict[str, str]) -> None:
    found = _labels(resolve(preset, _llama(), state_dtype=dtype))
    assert {role: found[role] for role in expected} == expected


def test_overrides_by_role_and_by_name() -> None:
    found = {
        a.routed.name: a
        for a in resolve(
            "muon",
            _llama(),
            overrides={
                "*.k_proj.*": "lion",
                "k": "sgd",
                "head": "adamw8bit",
                "*.v_proj.*": "lion",
                "*v_proj*": "muon8bit",
            },
        )
    }
    block = "model.layers.0.self_attn."
    assert found[block + "k_proj.weight"].policy.rule == "lion"
    assert found[block + "k_proj.weight"].why.endswith("override *.k_proj.*")
    assert found[block + "v_proj.weight"].policy.label == "muon int8_linear"
    assert found["lm_head.weight"].policy.label == "adamw int8"
    assert found[block + "q_proj.weight"].policy.label == "muon"


def test_an_override_takes_the_numbers_of_the_preset_it_stands_in() -> None:
    found = {a.part.role: a.policy for a in resolve("muon_vo_ffn", _llama(), overrides={"q": "muon", "o": "adamw"})}
    assert found[Role.Q] == found[Role.V]
    assert found[Role.O].betas == (0.9, 0.95)


def test_an_override_keeps_its_own_codec() -> None:
    found = _labels(resolve("muon", _llama(), state_dtype="int8", overrides={"q": "adamw", "embedding": "adamw8bit"}))
    assert (found["q"], found["embedding"], found["v"]) == ("adamw", "adamw int8", "muon int8_linear")


def test_an_override_of_fused_projections_by_role() -> None:
    (item,) = [item for item in route(build("gpt-neox", device="meta")) if item.role == Role.QKV]
    (whole,) = resolve("muon", [item], overrides={"qkv-fused": "adamw"})
    assert (whole.part.role, whole.policy.rule) == (Role.QKV, "adamw")
    kept = resolve("muon", [item], overrides={"qkv-fused": "adamw", "v": "muon"})
    assert [a.policy.rule for a in kept] == ["adamw", "adamw", "muon"]


def test_an_override_finds_a_tied_table_by_any_of_its_names() -> None:
    found = resolve("adamw", route(build("gpt2", device="meta")), overrides={"lm_head.*": "sgd"})
    assert [a.routed.name for a in found if a.policy.rule == "sgd"] == ["transformer.wte.weight"]


def test_convolutions_can_be_given_to_matrix_rules() -> None:
    routed = route(build("vit", device="meta"))
    assert "conv" not in {a.part.role for a in resolve("muon", routed) if a.policy.shape_aware}
    conv = next(a for a in resolve("muon", routed, overrides={"conv": "muon"}) if a.part.role == Role.CONV)
    assert conv.policy.rule == "muon"
    assert conv.part.shape(tuple(conv.routed.parameter.shape)) == (32, 48)


@pytest.mark.parametrize(
    "preset, options, message",
    [
        ("adam", {}, r"preset: 'adam' is unknown; choose from adamw, adamw8bit, lion"),
        ("adamw", {"ranks": 3}, r"option: 'ranks' is unknown; choose from betas, eps, .*overrides"),
        ("galore", {"rank": 0}, r"rank: 0 is not a whole number of 1 or more"),
        ("galore", {"rank": -4}, r"rank: -4"),
        ("galore", {"rank": 1.5}, r"rank: 1.5"),
        ("galore", {"proj_type": "both"}, r"proj_type: 'both' is unknown; choose from std, reverse_std"),
        ("galore", {"scale": 0}, r"scale: 0"),
        ("adamw", {"rank": 8}, r"option rank does nothing in preset adamw; leave it out or choose a galore preset"),
        ("galore", {"ns_steps": 3}, r"option ns_steps does nothing in preset galore; .* a muon preset"),
        ("lion", {"nesterov": True}, r"option nesterov does nothing in preset lion; .* with momentum"),
        ("adamw", {"betas": (0.9, 1.0)}, r"betas: \(0.9, 1.0\) are not two numbers"),
        ("adamw", {"betas": 0.9}, r"betas: 0.9 is not made of numbers"),
        ("adamw", {"eps": 0.0}, r"eps: 0.0 is not above 0"),
        ("adamw", {"eps": "small"}, r"eps: 'small' is not made of numbers"),
        ("sgd", {"momentum": 1.0}, r"momentum: 1.0 is not from 0 to below 1"),
        ("adamw", {"state_dtype": "int4"}, r"state_dtype: 'int4' is unknown; choose from float32, bfloat16, int8"),
        ("muon", {"coefficients": "zolo"}, r"coefficients: 'zolo' is unknown; choose from polar_express, jordan"),
        ("muon", {"scale_mode": "big"}, r"scale_mode: 'big' is unknown; choose from "),
        ("muon", {"ns_dtype": "int8"}, r"ns_dtype: 'int8' is unknown; choose from float32, bfloat16"),
        ("muon", {"ns_steps": 0}, r"steps: Newton-Schulz needs at least 1"),
        ("muon", {"overrides": "adamw"}, r"overrides: 'adamw' is no mapping"),
        ("muon", {"overrides": {"q": "adma"}}, r"overrides: the policy of 'q': 'adma' is unknown; choose from adamw"),
        (
            "muon",
            {"overrides": {"qq": "adamw"}},
            r"'qq' is no role \(embedding, .*\) and matches no name .*embed_tokens",
        ),
        (
            "adamw",
            {"overrides": {"norm": "muon"}},
            r"override norm puts Muon on .*layernorm.weight \(256,\), .* no matrix",
        ),
        ("adamw", {"overrides": {"*": "muon"}}, r"override \* puts Muon on .* no matrix; use adamw"),
    ],
)
def test_bad_input(preset: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve(preset, _llama(), **options)


def test_combinations_that_are_refused() -> None:
    with pytest.raises(BadInput, match="second moments span more decades"):
        Policy(rule="adamw", codec=Codec.INT8_LINEAR)
    with pytest.raises(BadInput, match="rule: 'adam' is unknown; choose from adamw, lion, sgd, muon"):
        Policy(rule="adam")  # type: ignore[arg-type]


def test_galore_on_a_vector_by_override_is_the_plain_rule() -> None:
    found = resolve("adamw", _llama(), overrides={"norm": "galore"})
    norms = [a for a in found if a.part.role == Role.NORM]
    assert {a.policy.label for a in norms} == {"adamw"}
    assert all(a.why.endswith("no matrix, no projection") for a in norms)


@pytest.mark.parametrize("preset", PRESETS)
def test_flattened_parameters(preset: str) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4, bias=False)})
    model["q_proj"].weight = nn.Parameter(torch.zeros(16))
    routed = route(model)
    if PRESETS[preset].shape_aware:
        with pytest.raises(BadInput, match=rf"preset {preset} works on matrices, but q_proj.weight has shape \(16,\)"):
            resolve(preset, routed)
        with pytest.raises(BadInput, match=rf"preset {preset} works on matrices, but so; choose from adamw, adamw8bit"):
            require_elementwise(preset, "so")
    else:
        assert len(resolve(preset, routed)) == 1
        require_elementwise(preset, "so")


COMBINATIONS = ["+".join(each) for each in itertools.product(get_args(Rule), ["none", "galore"], list(Codec))]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination_works_or_is_refused_with_a_reason(combination: str) -> None:
    rule, projection, codec = combination.split("+")
    name = "+".join(part for part in (rule, projection, codec) if part != "none")
    options = {"rank": 8, "update_proj_gap": 2} if projection == "galore" else {}
    model = tiny()
    if (rule, codec) == ("adamw", "int8_linear"):
        with pytest.raises(BadInput, match="second moments span more decades"):
            build_optimizer(model, name, lr=1e-3, **options)
        return
    optimizer = build_optimizer(model, name, lr=1e-3, **options)
    first = model(tokens(0)).item()
    for _ in range(6):
        model(tokens(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(tokens(0)).item() < first
    labels = " ".join(row["policy"] for row in optimizer.memory_report())
    assert rule in labels and ("galore" in labels) == (projection == "galore")


@pytest.mark.parametrize(
    "name, message",
    [
        ("lamb+int8", "preset lamb.int8: the rule: 'lamb' is unknown; choose from adamw, lion, sgd, muon"),
        ("muon+int4", "the projection or codec: 'int4' is unknown"),
        ("muon+int8+float32", "at most one projection and one codec"),
        ("muon+galore+galore", "at most one projection and one codec"),
    ],
)
def test_combinations_that_are_none(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build_optimizer(tiny(), name)
