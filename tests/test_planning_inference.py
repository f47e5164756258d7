"""Bytes and work of generation against formulas counted by hand, real modules, and what must hold for any job."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from memopt.errors import BadInput
from memopt.forecast_types import PhaseForecast
from memopt.patches.hf_cache import ThinKCache
from memopt.planning.inference import (
    cache_bytes,
    decode_work,
    inference_phases,
    prefill_work,
    quantised_bytes,
    weight_bytes,
)
from memopt.planning.inference_types import CacheLayer, InferenceJob
from memopt.tiers import Tier
from tests.plan_helpers import config, generation

LAYERS, HEADS, DIM = 4, 2, 16


def phase(job: InferenceJob, name: str) -> PhaseForecast:
    return next(each for each in inference_phases(job) if each.name == name)


def test_a_dense_cache_by_hand() -> None:
    assert cache_bytes(generation(batch=3), 100) == 3 * LAYERS * HEADS * 100 * (DIM + DIM) * 2


def test_a_thin_cache_by_hand() -> None:
    """Half of 16 channels: 8 for every token, the other 8 for the last 32 of the prompt and what was generated."""
    job = generation(batch=3, key_keep=0.5)
    tokens, new = 200, 30
    rows, whole = 256, 64  # 200 and 32 + 30, grown by 64 at a time
    per_row = rows * (8 + DIM) * 2 + whole * 8 * 2 + DIM * 2  # the channels' numbers are int16
    assert cache_bytes(job, tokens, new_tokens=new) == 3 * LAYERS * HEADS * per_row
    # long contexts: a quarter of all keys and values
    assert cache_bytes(job, 10**6) / cache_bytes(replace(job, key_keep=1.0), 10**6) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("storage", [None, "int8", "int4"])
def test_the_thin_cache_of_a_real_model_to_the_byte(storage: Any) -> None:
    model = LlamaForCausalLM(config("llama")).eval()
    job = generation(dtype="float32", key_keep=0.5, kv=storage, batch=2, prompt_tokens=150, new_tokens=20)
    tokens = torch.randint(3, 100, (2, 150), generator=torch.Generator().manual_seed(0))
    with ThinKCache(model, key_keep=0.5, storage=storage) as cache, torch.no_grad():
        model.generate(tokens, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        held = cache.cache_bytes()
    assert held == cache_bytes(job, 169, new_tokens=19)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_a_quantised_cache_by_hand(kind: Any, bits: int) -> None:
    job = generation(kv=kind)
    elements = LAYERS * HEADS * 256 * 2 * DIM
    # a scale and a zero point of 2 bytes for each group of 64
    assert cache_bytes(job, 256) == elements * bits // 8 + elements // 64 * 4
    # of the generated ones up to 128 stay whole
    newest = LAYERS * HEADS * 10 * 2 * DIM
    assert cache_bytes(job, 256, new_tokens=10) == (
        (elements - newest) * bits // 8 + LAYERS * -(-(elements - newest) // LAYERS // 64) * 4 + newest * 2
    )


def test_a_window_bounds_the_cache() -> None:
    job = generation("mistral", model={**_small(), "sliding_window": 50})
    assert cache_bytes(job, 50) == cache_bytes(job, 10**5) > cache_bytes(job, 49)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_of_a_real_model_to_the_byte(family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = {} if family == "llama" else {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 101}
    job = generation(family, dtype="float32", model=model, prompt_tokens=100)
    real = AutoModelForCausalLM.from_config(config(family, **model), dtype=torch.float32)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real.parameters()}
    assert weight_bytes(job).resident - job.facts.buffer_bytes == sum(storages.values())


def test_quantised_matrices_are_those_of_bitsandbytes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")
        weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
        four = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4").to("cpu")
        layer = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer.to("cpu")(torch.zeros(1, 64))
    assert quantised_bytes((96, 64), "int4") == four.untyped_storage().nbytes() + four.quant_state.absmax.nbytes
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    assert quantised_bytes((96, 64), "int8") == layer.weight.untyped_storage().nbytes() + scales.nbytes


def test_only_the_matrices_of_blocks_are_quantised() -> None:
    dense, quantised = weight_bytes(generation()).resident, weight_bytes(generation(weights="int8")).resident
    blocks = LAYERS * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    rows = LAYERS * (64 + 32 + 32 + 64 + 160 + 160 + 64)
    assert dense - quantised == blocks - 4 * rows


def test_blocks_wait_in_dram_with_cpu_offload() -> None:
    everything = weight_bytes(generation(device="cuda")).resident
    weights = weight_bytes(generation(device="cuda", engine="cpu-offload"))
    assert weights.resident + weights.host == everything
    assert weights.slot == 2 * weights.host // LAYERS
    job = generation(device="cuda", engine="cpu-offload")
    assert phase(job, "decode").use["dram"]["weights"] == weights.host
    assert decode_work(job).to_device_bytes == weights.host
    assert prefill_work(replace(job, prefill_chunk=256)).to_device_bytes == 4 * weights.host


def test_flash_keeps_a_window_of_the_neurons() -> None:
    """OPT-6.7B as published: 3.0 % tables, 32.3 % attention, 15.5 % window, 1.25 % predictors = 52.1 % of the model."""
    model = {
        "hidden_size": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 4096,
        "vocab_size": 50272,
    }
    job = generation("opt", model=model, engine="flash")
    whole = weight_bytes(replace(job, engine="memory"))
    flash = weight_bytes(job)
    assert flash.resident / whole.resident == pytest.approx(0.521, abs=0.025)
    # records of [up | down], 16 KiB each in 16 bits
    assert flash.ssd == 32 * 16384 * 16384
    assert decode_work(job).ssd_read_bytes == round(0.024 * flash.ssd)
    assert prefill_work(job).ssd_read_bytes == flash.ssd
    assert phase(job, "decode").use["ssd"] == {"weights": flash.ssd}


def test_work_of_a_token_by_hand() -> None:
    job = generation(batch=5, prompt_tokens=100, new_tokens=21)
    matrices = LAYERS * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) + 64 * 1000
    attention = LAYERS * 2 * 110 * 4 * (DIM + DIM)
    assert decode_work(job).flops == 5 * (2 * matrices + attention)
    assert decode_work(job).tokens == 5


def test_work_of_experts_is_that_of_the_chosen_ones() -> None:
    model = {**_small(), "num_local_experts": 8, "num_experts_per_tok": 2}
    job = generation("mixtral", model=model)
    one = replace(job, cache=replace(job.cache, active_share=1 / 8))
    experts = LAYERS * 8 * 3 * 64 * 160
    assert decode_work(job).flops - decode_work(one).flops == 2 * experts // 8
    assert decode_work(job).memory_bytes - decode_work(one).memory_bytes == 2 * experts // 8  # of 2 bytes each
    many = replace(job, batch=100)
    assert weight_bytes(many).resident <= decode_work(many).memory_bytes  # all of them are wanted by somebody


jobs = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 5),
        "prompt_tokens": st.integers(1, 700),
        "new_tokens": st.integers(1, 300),
        "key_keep": st.sampled_from([1.0, 0.8, 0.5]),
        "kv": st.sampled_from([None, "int8", "int4"]),
        "weights": st.sampled_from([None, "int8", "int4"]),
        "prefill_chunk": st.sampled_from([None, 1, 64, 512]),
    }
)


@settings(max_examples=60, deadline=None)
@given(job=jobs, grown=st.sampled_from(["batch", "prompt_tokens", "new_tokens"]), by=st.integers(1, 100))
def test_more_of_anything_takes_no_fewer_bytes(job: dict[str, Any], grown: str, by: int) -> None:
    small, large = generation(**job), generation(**{**job, grown: job[grown] + by})
    for before, after in zip(inference_phases(small), inference_phases(large), strict=True):
        assert after.total_bytes(Tier.DRAM) >= before.total_bytes(Tier.DRAM), before.name


@settings(max_examples=60, deadline=None)
@given(job=jobs)
def test_a_cache_that_keeps_less_is_no_larger(job: dict[str, Any]) -> None:
    half, most = (
        cache_bytes(each, each.cached, new_tokens=each.new_tokens - 1)
        for each in (generation(**{**job, "key_keep": keep, "kv": None}) for keep in (0.5, 0.8))
    )
    assert half <= most


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"key_keep": 0.0}, "key_keep = 0.0.*above 0"),
        ({"key_keep": 1.5}, "key_keep = 1.5.*at most 1"),
        ({"batch": 0}, "batch = 0"),
        ({"prompt_tokens": 4090, "new_tokens": 10}, "4096 positions; use --seq-len 4086"),
        ({"engine": "cpu-offload"}, "on the CPU"),
        ({"engine": "flash", "weights": "int8"}, "flash with int8"),
        ({"flash_window": 0.0}, "flash_window"),
    ],
)
def test_jobs_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        generation(**settings)


def test_thin_keys_need_a_layer_of_ordinary_attention() -> None:
    job = generation()
    sliding = tuple(replace(layer, window=16) for layer in job.cache.layers)
    latent = (CacheLayer(kv_heads=1, key_dim=16, value_dim=8, latent=True),)
    for layers in (sliding, latent):
        with pytest.raises(BadInput, match="could be made thinner"):
            replace(job, cache=replace(job.cache, layers=layers), key_keep=0.5)


def _small() -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "vocab_size": 1000,
        "max_position_embeddings": 10**6,
    }
