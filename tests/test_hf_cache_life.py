"""What happens to a ThinKCache besides decoding: beams, crops, turns, chunks, drafts; undo; bytes; refusals."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
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


def agree(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0.0)


def feed(model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache).logits
    return logits


def prompt(length: int = 50, batch: int = 1) -> Tensor:
    return torch.stack(sequences([length] * batch))


def generate(model: PreTrainedModel, cache: Any, **options: Any) -> Tensor:
    ids, mask = padded(sequences((40, 31)), "left")
    done: Tensor = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False, **options
    )
    return done


def test_generate_with_everything_kept() -> None:
    model = tiny_model()
    expected = generate(model, DynamicCache(config=model.config))
    with ThinKCache(model, key_keep=1.0) as cache:
        assert torch.equal(generate(model, cache), expected)


def test_beam_search_with_everything_kept() -> None:
    model = tiny_model()
    expected = generate(model, DynamicCache(config=model.config), num_beams=4)
    with ThinKCache(model, key_keep=1.0) as cache:
        assert torch.equal(generate(model, cache, num_beams=4), expected)
    with ThinKCache(model, fold="prune", evict=20, value_keep=0.5, **SETTINGS) as cache:
        assert generate(model, cache, num_beams=3).shape == (2, 52)


@pytest.mark.parametrize(
    "extra", [{}, {"evict": 20, "value_keep": 0.5}, {"storage": "int8"}, {"prompt_tokens": 51}], ids=str
)
def test_batch_rows_go_where_they_are_sent(extra: dict[str, Any]) -> None:
    model = tiny_model()
    ids, mask = padded(sequences((44, 50)), "left")
    step = some_steps(2, (1,))[0]
    lengthened = torch.cat([mask, mask.new_ones(2, 1)], 1)
    changes: list[tuple[list[int], Callable[[Any], None]]] = [
        ([1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
        ([0, 0, 1, 1], lambda cache: cache.batch_repeat_interleave(2)),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    ]
    for rows, change in changes:
        with ThinKCache(model, **SETTINGS, **extra) as cache, torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            expected = model(step, attention_mask=lengthened, past_key_values=cache).logits[rows]
        with ThinKCache(model, **SETTINGS, **extra) as cache, torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            change(cache)
            got = model(step[rows], attention_mask=lengthened[rows], past_key_values=cache).logits
            agree(got, expected)


@pytest.mark.parametrize("extra", [{}, {"evict": 20}, {"value_keep": 0.5}], ids=str)
def test_cropped_tokens_leave_no_trace(extra: dict[str, Any]) -> None:
    model = tiny_model()
    more, step = some_steps(1, (5,))[0], some_steps(1, (2,))[0]
    with ThinKCache(model, **SETTINGS, **extra) as cache:
        feed(model, cache, prompt())
        expected = feed(model, cache, step)
    with ThinKCache(model, **SETTINGS, **extra) as cache:
        feed(model, cache, prompt())
        feed(model, cache, more)
        cache.crop(-5)
        assert cache.get_seq_length() == 50
        agree(feed(model, cache, step), expected)
        cache.crop(-10_000)
        assert cache.get_seq_length() == 0
        agree(feed(model, cache, prompt()), feed(model, DynamicCache(config=model.config), prompt()))


def test_crop_into_the_pruned_part() -> None:
    """Cropping goes through the whole suffix into what was pruned; what is left attends as if it were all there."""
    model = tiny_model()
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        cache.crop(-20)
        assert cache.get_seq_length() == 30 and cache.layers[0].state.whole_rows == 0
        assert torch.isfinite(feed(model, cache, some_steps(1, (3,))[0])).all()
        assert cache.layers[0].state.whole_rows == 3


def test_crop_that_cannot_be() -> None:
    model = tiny_model()
    with ThinKCache(model, evict=20, **SETTINGS) as cache:
        feed(model, cache, prompt())
        feed(model, cache, some_steps(1, (2,))[0])
        with pytest.raises(BadInput, match="cannot remove 3 tokens: eviction chose.*only the 2 after it"):
            cache.crop(-3)
    with ThinKCache(model, storage="int8", **SETTINGS) as cache:
        feed(model, cache, prompt(64))
        with pytest.raises(BadInput, match="cannot remove 40 tokens from a quantised cache.*last 32"):
            cache.crop(-40)
        assert cache.get_seq_length() == 64


def test_crop_before_pruning() -> None:
    model = tiny_model()
    with ThinKCache(model, prompt_tokens=50, **SETTINGS) as cache:
        feed(model, cache, prompt()[:, :45])
        cache.crop(-5)
        feed(model, cache, prompt()[:, 40:])
        got = feed(model, cache, some_steps(1, (1,))[0])
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        agree(got, feed(model, cache, some_steps(1, (1,))[0]))


@pytest.mark.parametrize("extra", [{}, {"evict": 30, "value_keep": 0.5}], ids=str)
@pytest.mark.parametrize("chunk", [7, 16, 49])
def test_chunks_of_the_prompt_make_no_difference(chunk: int, extra: dict[str, Any]) -> None:
    model = tiny_model()
    step = some_steps(1, (1,))[0]
    with ThinKCache(model, **SETTINGS, **extra) as cache:
        feed(model, cache, prompt())
        expected = feed(model, cache, step)
    with ThinKCache(model, prompt_tokens=50, **SETTINGS, **extra) as cache:
        for piece in prompt().split(chunk, 1):
            feed(model, cache, piece)
        agree(feed(model, cache, step), expected)
    # by hand
    with ThinKCache(model, prompt_tokens=10_000, **SETTINGS, **extra) as cache:
        for piece in prompt().split(chunk, 1):
            feed(model, cache, piece)
        assert cache.layers[0].state is None
        cache.prune()
        agree(feed(model, cache, step), expected)


def test_chunked_prefill_of_generate() -> None:
    model = tiny_model()
    with ThinKCache(model, **SETTINGS) as cache:
        expected = generate(model, cache)
    with ThinKCache(model, prompt_tokens=40, **SETTINGS) as cache:
        assert torch.equal(generate(model, cache, prefill_chunk_size=9), expected)


def test_turns() -> None:
    """A second prompt on a pruned cache goes through the same path, whatever its pieces."""
    model = tiny_model()
    second = some_steps(1, (19,))[0]
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        whole = feed(model, cache, second)
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        agree(torch.cat([feed(model, cache, piece) for piece in second.split(4, 1)], 1), whole)


def test_modes_can_alternate() -> None:
    model = tiny_model()
    with ThinKCache(model, **SETTINGS) as cache:
        with torch.inference_mode():
            model(prompt(), past_key_values=cache)
            cache.reorder_cache(torch.tensor([0]))
        feed(model, cache, some_steps(1, (3,))[0])
        with torch.inference_mode():
            model(some_steps(1, (1,))[0], past_key_values=cache)
        assert cache.get_seq_length() == 54


def test_assisted_generation() -> None:
    model, assistant = tiny_model(), tiny_model("mqa")
    ids = prompt(40)
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with ThinKCache(model, **SETTINGS) as cache:
        expected = model.generate(ids, past_key_values=cache, **options)
    with ThinKCache(model, prompt_tokens=40, **SETTINGS) as cache:
        got = model.generate(ids, past_key_values=cache, assistant_model=assistant, **options)
        assert torch.equal(got, expected)
    with ThinKCache(model, **SETTINGS) as cache, pytest.raises(BadInput, match="drafts.*prompt_tokens=input_ids"):
        model.generate(ids, past_key_values=cache, assistant_model=assistant, **options)


def test_two_caches_of_one_model_interleaved() -> None:
    model = tiny_model()
    steps = some_steps(1, (1, 1, 2))
    alone = []
    for length in (50, 33):
        with ThinKCache(model, **SETTINGS) as cache:
            alone.append(step_logits(model, cache, sequences((length,)), steps, "left"))
    with ThinKCache(model, **SETTINGS) as one, ThinKCache(model, **SETTINGS) as two:
        feed(model, one, sequences((50,))[0][None])
        feed(model, two, sequences((33,))[0][None])
        mixed = [(feed(model, one, step), feed(model, two, step)) for step in steps]
    for which in (0, 1):
        agree(torch.cat([pair[which] for pair in mixed], 1), alone[which])


def test_reset_makes_it_new() -> None:
    model = tiny_model()
    step = some_steps(1, (1,))[0]
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        expected = feed(model, cache, step)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.cache_bytes() == 0
        feed(model, cache, prompt())
        agree(feed(model, cache, step), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_leaving_restores_the_model(attention: str) -> None:
    model = tiny_model("llama", attention)
    expected = feed(model, DynamicCache(config=model.config), prompt())
    one = ThinKCache(model)
    two = ThinKCache(model)
    assert hf_attention.is_attached(model)
    # another cache, or none, is served as ever
    assert torch.equal(feed(model, DynamicCache(config=model.config), prompt()), expected)
    assert torch.equal(feed(model, None, prompt()), expected)
    one.close()
    one.close()
    assert hf_attention.is_attached(model)
    two.close()
    assert model.config._attn_implementation == attention
    assert torch.equal(feed(model, DynamicCache(config=model.config), prompt()), expected)


def test_a_forgotten_cache_restores_the_model() -> None:
    model = tiny_model()
    ThinKCache(model)
    gc.collect()
    assert model.config._attn_implementation == "sdpa"


def test_an_implementation_chosen_meanwhile_stands() -> None:
    model = tiny_model()
    with ThinKCache(model):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_a_closed_cache_says_so() -> None:
    model = tiny_model()
    cache = ThinKCache(model)
    cache.close()
    with pytest.raises(BadInput, match="reached code that does not know it.*the cache was closed"):
        feed(model, cache, prompt())
    with pytest.raises(BadInput, match="ran without ThinKCache"):
        feed(model, cache, prompt())


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
