"""ThinKCache: its bytes against the formula and the storage, and everything it refuses, with the reason."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from memopt import ThinKCache
from memopt.errors import BadInput
from memopt.kv.channel_file import ChannelSets, ModelIdentity, save_channels
from memopt.kv.costs import LayerShape, dense_bytes, thin_bytes
from memopt.kv.settings import ThinSettings
from memopt.patches import hf_attention, hf_cache
from memopt.patches.hf_cache import ThinLayer
from memopt.patches.hf_identity import identity_of, weights_digest
from tests.kv_models import padded, sequences, some_steps, step_logits, tiny_model

SETTINGS: dict[str, Any] = {"key_keep": 0.5, "observation": 6, "recent": 8}


def feed(model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache).logits
    return logits


def prompt(length: int = 50, batch: int = 1) -> Tensor:
    return torch.stack(sequences([length] * batch))


SHAPE = LayerShape(batch=2, kv_heads=2, head_dim=24, value_dim=24, element_bytes=4)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"key_keep": 1.0},
        {"value_keep": 0.5, "recent": 0},
        {"fold": "prune"},
        {"fold": "prune", "recent": 40},
        {"evict": 33},
        {"storage": "int8"},
        {"storage": "int4", "value_keep": 0.5, "evict": 70, "fold": "prune"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tokens", "new"), [(5, 0), (64, 1), (100, 40), (129, 70)])
def test_bytes_are_the_formula_to_the_byte(extra: dict[str, Any], tokens: int, new: int) -> None:
    model = tiny_model()
    with ThinKCache(model, **{**SETTINGS, **extra}) as cache:
        step_logits(model, cache, sequences((tokens, tokens)), some_steps(2, (1,) * new), "left") if new else feed(
            model, cache, prompt(tokens, 2)
        )
        assert cache.cache_bytes() == 2 * thin_bytes(SHAPE, cache.settings, prompt=tokens, new=new)


def test_layers_of_linear_attention_are_left_alone_and_counted() -> None:
    torch.manual_seed(3)
    kinds = ["linear_attention", "full_attention"]
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "vocab_size": 97, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    config = Qwen3NextConfig(
        **sizes, **heads, **experts, **linear, shared_expert_intermediate_size=16, layer_types=kinds
    )
    model = Qwen3NextForCausalLM(config).eval()
    ids, stock = prompt(60, 2), DynamicCache(config=config)
    wanted = [feed(model, stock, ids), feed(model, stock, ids[:, :1])]
    linear_layer = stock.layers[0]
    states = [*linear_layer.conv_states.values(), *linear_layer.recurrent_states.values()]
    for keep in (1.0, 0.5):
        with ThinKCache(model, key_keep=keep) as cache:
            found = [feed(model, cache, ids), feed(model, cache, ids[:, :1])]
            if keep == 1.0:
                for ours, theirs in zip(found, wanted, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
            held = thin_bytes(SHAPE, cache.settings, prompt=60, new=1)
            assert cache.cache_bytes() == held + sum(state.untyped_storage().nbytes() for state in states)


def test_bytes_with_padding_and_eviction() -> None:
    model = tiny_model()
    ids, mask = padded(sequences((40, 20)), "left")
    with ThinKCache(model, evict=30, **SETTINGS) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.cache_bytes() == 2 * thin_bytes(SHAPE, cache.settings, prompt=40, padded=True)


def test_the_saving_is_real() -> None:
    """60 % of the key channels: a fifth of all bytes at a long context and head dimension 128, spare rows included."""
    shape = LayerShape(batch=4, kv_heads=8, head_dim=128, value_dim=128, element_bytes=2)
    settings = ThinSettings(key_keep=0.6)
    share = thin_bytes(shape, settings, prompt=8000) / dense_bytes(shape, 8000)
    assert share == pytest.approx(0.8125, abs=0.005)  # 80 of 128 channels: 76.8 is rounded up to a multiple of 8
    half = thin_bytes(shape, dataclasses.replace(settings, key_keep=0.5), prompt=8000) / dense_bytes(shape, 8000)
    assert half == pytest.approx(0.75, abs=0.005)


def test_prefill_holds_one_layers_dense_keys_at_most() -> None:
    model = tiny_model()
    tokens = 200
    with ThinKCache(model, **SETTINGS) as cache:
        seen: list[int] = []
        for layer in cache.layers:
            layer.attend = watched(layer, lambda: seen.append(cache.cache_bytes()))
        feed(model, cache, prompt(tokens))
        one_dense = 2 * tokens * 24 * 4
        assert max(seen) <= cache.cache_bytes() + one_dense
        assert len(seen) == 4


def watched(layer: ThinLayer, look: Callable[[], None]) -> Any:
    inner = layer.attend

    def attend(*args: Any) -> Any:
        look()
        out = inner(*args)
        look()
        return out

    return attend


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_keep": 0.0}, r"key_keep = 0.0: the share of channels to keep must lie in \(0, 1\]"),
        ({"key_keep": 1.5}, "key_keep = 1.5"),
        ({"value_keep": -1.0}, "value_keep = -1.0"),
        ({"observation": 0}, "observation = 0"),
        ({"score": "best"}, "score = 'best': must be 'joint' or 'think'"),
        ({"recent": -1}, "recent = -1"),
        ({"fold": "drop"}, "fold = 'drop': must be 'keep' or 'prune'"),
        ({"storage": "int2"}, "storage = 'int2'"),
        ({"evict": 32}, "evict = 32: must be more than the 32 newest"),
        ({"prompt_tokens": 0}, "prompt_tokens = 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(BadInput, match=message):
        ThinKCache(model, **settings)
    assert not hf_attention.is_attached(model)


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def test_models_that_are_refused() -> None:
    latent = DeepseekV3ForCausalLM(
        DeepseekV3Config(**SIZES, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    )
    with pytest.raises(BadInput, match="deepseek_v3: multi-head latent attention"):
        ThinKCache(latent)
    shared = Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **{**SIZES, "num_hidden_layers": 4, "intermediate_size": [32] * 4, "head_dim": 16},
            num_kv_shared_layers=2,
            layer_types=["full_attention"] * 4,
            vocab_size_per_layer_input=50,
            hidden_size_per_layer_input=8,
            activation_sparsity_pattern=[0.0] * 4,
            laurel_rank=4,
        )
    )
    with pytest.raises(BadInput, match="gemma3n_text: layers that read another layer's keys"):
        ThinKCache(shared)
    with pytest.raises(BadInput, match="t5: encoder-decoder"):
        ThinKCache(T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)))
    with pytest.raises(BadInput, match="mistral: no layer attends to the whole context"):
        ThinKCache(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)))
    with pytest.raises(BadInput, match="needs a Hugging Face model, not Linear"):
        ThinKCache(torch.nn.Linear(2, 2))


def test_attention_sinks_are_refused() -> None:
    model = GptOssForCausalLM(
        GptOssConfig(
            **SIZES, head_dim=16, layer_types=["full_attention"] * 2, num_local_experts=2, num_experts_per_tok=1
        )
    ).eval()
    model.set_attn_implementation("eager")
    with ThinKCache(model) as cache, pytest.raises(BadInput, match="GptOssAttention adds s(ink|_aux)"):
        feed(model, cache, prompt() % 50)


def test_static_cache_is_refused() -> None:
    model = tiny_model()
    model.generation_config.cache_implementation = "static"
    with pytest.raises(BadInput, match="wants a 'static' cache.*cache_implementation = None"):
        ThinKCache(model)


def test_other_attention_implementations_are_refused() -> None:
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(BadInput, match=r"not 'flex_attention': model.set_attn_implementation\('sdpa'\) first"):
        ThinKCache(model)


def test_gradients_are_refused() -> None:
    model = tiny_model()
    with ThinKCache(model) as cache, pytest.raises(BadInput, match="for inference"):
        model(prompt(), past_key_values=cache)


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_cache.transformers, "__version__", "5.2.0")
    with pytest.raises(BadInput, match="needs transformers 5.16 or later, not 5.2.0"):
        ThinKCache(tiny_model())


def test_channel_files_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny_model()
    path = tmp_path / "keys.safetensors"

    def write(layers: tuple[int, ...] = (0, 1), **changes: Any) -> None:
        identity: ModelIdentity = identity_of(model.config, weights=weights_digest(model.get_input_embeddings().weight))
        keys = {layer: torch.arange(16).repeat(2, 1) for layer in layers}
        save_channels(path, ChannelSets(model=dataclasses.replace(identity, **changes), keep=0.5, keys=keys))

    write()
    ThinKCache(model, channels=path).close()
    ThinKCache(model, 0.6, channels=path).close()  # also 16 channels of 24
    with pytest.raises(BadInput, match="key_keep = 0.3 keeps 8 channels, the channel file 16"):
        ThinKCache(model, 0.3, channels=path)
    write(vocab_size=98)
    with pytest.raises(BadInput, match="another model .vocab_size 98 != 97"):
        ThinKCache(model, channels=path)
    write(weights="0" * 16)
    with pytest.raises(BadInput, match="other weights"):
        ThinKCache(model, channels=path)
    write(layers=(0,))
    with pytest.raises(BadInput, match="no channels for layer 1"):
        ThinKCache(model, channels=path)
    assert not hf_attention.is_attached(model)


def test_a_model_that_changes_its_values_behind_the_cache_is_refused() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "vocab_size": 97, "num_hidden_layers": 2}
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with ThinKCache(model, key_keep=1.0) as cache, pytest.raises(BadInput, match="changes its values behind the cache"):
        feed(model, cache, prompt())


def test_drafts_and_folding_exclude_each_other() -> None:
    model = tiny_model()
    with (
        ThinKCache(model, fold="prune", prompt_tokens=50, **SETTINGS) as cache,
        pytest.raises(BadInput, match="use fold='keep'"),
    ):
        model.generate(prompt(), past_key_values=cache, max_new_tokens=40, prompt_lookup_num_tokens=5)


@pytest.mark.parametrize(
    "options",
    [
        {"key_keep": "0.6"},
        {"value_keep": None},
        {"recent": 8.5},
        {"observation": True},
        {"evict": 40.5},
        {"prompt_tokens": "5"},
        {"channels": 5},
    ],
    ids=str,
)
def test_what_is_no_number_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        ThinKCache(tiny_model(), **options)


def test_an_implementation_changed_under_an_older_cache_is_taken_up() -> None:
    model = tiny_model()
    with ThinKCache(model, **SETTINGS):
        model.set_attn_implementation("eager")
        with ThinKCache(model, **SETTINGS) as newer:
            feed(model, newer, prompt())
            feed(model, newer, prompt(1))
    assert model.config._attn_implementation == "eager"


def test_a_copy_of_an_attached_model_can_be_served_and_gets_its_own_attention_back() -> None:
    model = tiny_model()
    with ThinKCache(model, **SETTINGS):
        copied = copy.deepcopy(model)
    with ThinKCache(copied, **SETTINGS) as cache:
        feed(copied, cache, prompt())
    assert (model.config._attn_implementation, copied.config._attn_implementation) == ("sdpa", "sdpa")
