"""ThinKCache against the stock cache and the zero-filled dense reference: families, layouts, padding, policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from memopt import ThinKCache
from memopt.kv.channel_file import ChannelSets, save_channels
from memopt.kv.channels import choose
from memopt.patches.hf_identity import identity_of, weights_digest
from tests.kv_models import FAMILIES, reference_logits, sequences, some_steps, step_logits, tiny_model

LENGTHS = (61, 75, 40)
FULL_LAYERS = {"gemma3": {1}}


def agree(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_the_stock_cache(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    prompts, steps = sequences(LENGTHS), some_steps(3, (1, 1, 4, 1))
    expected = step_logits(model, DynamicCache(config=model.config), prompts, steps, "left")
    with ThinKCache(model, key_keep=1.0) as cache:
        got = step_logits(model, cache, prompts, steps, "left")
    assert 0.3 < expected.abs().max() < 3.0
    agree(got, expected, 1e-6)


@pytest.mark.parametrize(
    # with padding on the right, transformers' own sliding layers forget tokens too early: not for gemma3
    ("family", "side"),
    [(family, side) for family in FAMILIES for side in ("left", "right") if (family, side) != ("gemma3", "right")],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pruned_is_the_zero_filled_reference(family: str, attention: str, side: str) -> None:
    # softcapping exists in gemma2's eager attention only, and there the reference has it too
    model = tiny_model(family, attention)
    prompts, steps = sequences(LENGTHS), some_steps(3, (1, 1, 5, 1))
    if family == "gemma2" and attention == "sdpa":
        model.config.attn_logit_softcapping = None
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    expected = reference_logits(
        model, prompts, steps, key_keep=0.5, observation=9, recent=11, pruned=FULL_LAYERS.get(family)
    )
    with ThinKCache(model, key_keep=0.5, observation=9, recent=11) as cache:
        got = step_logits(model, cache, prompts, steps, side)
    agree(got, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"value_keep": 0.5, "recent": 5, "observation": 4},
        {"score": "think", "recent": 5, "observation": 4},
        {"score": "think", "evict": 20, "recent": 7, "observation": 5},
        {"recent": 0, "observation": 1},
        {"evict": 20, "recent": 7, "observation": 5},
        {"evict": 45, "recent": 7, "observation": 5, "value_keep": 0.5},  # one row is shorter than that
        {"fold": "prune", "recent": 8, "observation": 6},
        {"fold": "prune", "recent": 40, "observation": 6, "evict": 50},
        {"key_keep": 0.2, "recent": 200, "observation": 200},  # more than there are
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_policies_are_the_references(settings: dict[str, Any], side: str) -> None:
    model = tiny_model("llama")
    prompts, steps = sequences(LENGTHS), some_steps(3, (1,) * 3 + (17,) + (1,) * 15 + (20,) + (1,) * 15)
    settings = {"key_keep": 0.5, **settings}
    expected = reference_logits(model, prompts, steps, **settings)
    with ThinKCache(model, **settings) as cache:
        got = step_logits(model, cache, prompts, steps, side)
    agree(got, expected)


def test_a_prompt_shorter_than_everything() -> None:
    model = tiny_model("llama")
    prompts, steps = sequences((1, 3)), some_steps(2, (1,) * 4)
    expected = reference_logits(model, prompts, steps, key_keep=0.5, recent=8)
    with ThinKCache(model, key_keep=0.5, recent=8) as cache:
        agree(step_logits(model, cache, prompts, steps, "left"), expected)


def test_pruning_changes_something() -> None:
    model = tiny_model("llama")
    prompts, steps = sequences(LENGTHS), some_steps(3, (1,))
    stock = step_logits(model, DynamicCache(config=model.config), prompts, steps, "left")
    with ThinKCache(model, key_keep=0.5, recent=4) as cache:
        assert (step_logits(model, cache, prompts, steps, "left") - stock).abs().max() > 1e-2


def static_file(path: Path, model: Any, keep: float = 0.5) -> dict[int, list[list[int]]]:
    identity = identity_of(model.config, weights=weights_digest(model.get_input_embeddings().weight))
    generator = torch.Generator().manual_seed(1)
    keys = {layer: choose(torch.rand(2, 24, generator=generator), 16) for layer in range(2)}
    save_channels(path, ChannelSets(model=identity, keep=keep, keys=keys))
    return {layer: channels.tolist() for layer, channels in keys.items()}


def test_static_channels_from_a_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prompts, steps = sequences(LENGTHS), some_steps(3, (1, 2))
    static = static_file(tmp_path / "keys.safetensors", model)
    expected = reference_logits(model, prompts, steps, recent=6, static=static)
    with ThinKCache(model, recent=6, channels=tmp_path / "keys.safetensors") as cache:
        assert cache.settings.key_keep == 16 / 24  # what the file keeps, rounded up
        agree(step_logits(model, cache, prompts, steps, "left"), expected)


@pytest.mark.parametrize(("storage", "tolerance"), [("int8", 0.03), ("int4", 0.6)])
@pytest.mark.parametrize("value_keep", [1.0, 0.5])
def test_coded_rows_stay_near(storage: Any, tolerance: float, value_keep: float) -> None:
    model = tiny_model("llama")
    prompts, steps = sequences((70, 90)), some_steps(2, (1,) * 30 + (9,))
    with ThinKCache(model, value_keep=value_keep, recent=8) as cache:
        whole = step_logits(model, cache, prompts, steps, "left")
    with ThinKCache(model, value_keep=value_keep, recent=8, storage=storage) as cache:
        coded = step_logits(model, cache, prompts, steps, "left")
    difference = (coded - whole).norm() / whole.norm()
    assert 1e-5 < difference < tolerance


def test_bfloat16_stays_near_float32() -> None:
    prompts, steps = sequences(LENGTHS), some_steps(3, (1, 3, 1))
    exact = tiny_model("llama")
    with ThinKCache(exact, key_keep=0.7, recent=6) as cache:
        expected = step_logits(exact, cache, prompts, steps, "left")
    model = tiny_model("llama", dtype=torch.bfloat16)
    with ThinKCache(model, key_keep=0.7, recent=6) as cache:
        got = step_logits(model, cache, prompts, steps, "left")
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.1


def test_weights_of_eager_attention() -> None:
    model = tiny_model("llama", "eager")
    prompt, step = sequences((30,))[0][None], some_steps(1, (2,))[0]
    with ThinKCache(model, key_keep=1.0) as cache, torch.no_grad():
        model(prompt, past_key_values=cache)
        got = model(step, past_key_values=cache, output_attentions=True).attentions
    with torch.no_grad():
        expected = model(torch.cat([prompt, step], 1), output_attentions=True).attentions
    for layer in range(2):
        agree(got[layer], expected[layer][:, :, -2:])


def test_long_steps_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from memopt.kv import attention

    model = tiny_model("llama")
    prompts, steps = sequences(LENGTHS), some_steps(3, (13, 1))
    with ThinKCache(model, recent=5) as cache:
        whole = step_logits(model, cache, prompts, steps, "left")
    monkeypatch.setattr(attention, "_SCORES_BYTES", 4 * 3 * 4 * 90 * 3)
    assert attention.queries_at_once(3, 4, 88) == 3
    with ThinKCache(model, recent=5) as cache:
        agree(step_logits(model, cache, prompts, steps, "left"), whole)
