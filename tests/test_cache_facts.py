"""What a model caches and works with, read from meta tensors, against the bytes of the real model running."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from memopt.errors import BadInput
from memopt.jobs.cache_facts import read_cache_facts
from memopt.offload.trace import LiveBytes
from memopt.planning.inference import cache_bytes, inference_phases
from memopt.planning.inference_types import CacheFacts, InferenceJob
from memopt.planning.training_types import ModelFacts

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 1, "head_dim": 24},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 512},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "vocab_size": 101,
        "max_position_embeddings": 512,
    },
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 7},
    "gemma3_text": {**SMALL, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 9, "num_hidden_layers": 7},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101},
    "deepseek_v3": {
        **SMALL,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
    },
}


def config_of(family: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**FAMILIES[family], pad_token_id=0, bos_token_id=1, eos_token_id=None)


def real_model(family: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32).eval()


def job_of(cache: CacheFacts, **settings: Any) -> InferenceJob:
    facts = ModelFacts(
        source="test",
        key="test",
        architecture="test",
        parameters=(),
        layers=len(cache.layers),
        hidden=64,
        vocab=101,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=96,
        tied=False,
    )
    return InferenceJob(facts=facts, cache=cache, **{"dtype": "float32", **settings})


def held_bytes(cache: Any) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cache.layers
        for t in (layer.keys, layer.values)
    }
    return sum(storages.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "prompt", "new"), [(1, 5, 2), (3, 23, 11)])
def test_the_cache_of_a_real_model_to_the_byte(family: str, batch: int, prompt: int, new: int) -> None:
    """After generate, the storages that the cache holds are what is predicted, sliding windows included."""
    model = real_model(family)
    ids = torch.randint(2, 101, (batch, prompt), generator=torch.Generator().manual_seed(1))
    out = model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    job = job_of(read_cache_facts(config_of(family), "float32"), batch=batch, prompt_tokens=prompt, new_tokens=new)
    assert out.sequences.shape[1] == job.tokens
    assert held_bytes(out.past_key_values) == cache_bytes(job, job.cached)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 96), (3, 200)])
def test_working_memory_of_a_real_forward(family: str, batch: int, tokens: int) -> None:
    """Peak of live bytes of the real model's body, at sizes that the curve was not taken at."""
    model = real_model(family)
    cache = read_cache_facts(config_of(family), "float32")
    job = job_of(cache, batch=batch, prompt_tokens=tokens, new_tokens=1)
    (prefill,) = (phase for phase in inference_phases(job) if phase.name == "prefill")
    ids = torch.randint(2, 101, (batch, tokens), generator=torch.Generator().manual_seed(1))
    gc.collect()
    with torch.no_grad(), LiveBytes() as live:
        model.base_model(input_ids=ids, use_cache=False)
    predicted = prefill.use["dram"]["activations"]
    assert live.peak / 1.05 <= predicted <= live.peak * 1.05


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_working_memory_of_a_later_chunk_of_the_prompt(family: str) -> None:
    """With a cache behind it, a chunk needs a mask and repeated heads of the whole length."""
    from transformers import DynamicCache

    model = real_model(family)
    job = job_of(
        read_cache_facts(config_of(family), "float32"), batch=2, prompt_tokens=192, new_tokens=1, prefill_chunk=64
    )
    ids = torch.randint(2, 101, (2, 192), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start, end in ((0, 64), (64, 128)):
            model.base_model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        before = held_bytes(cache)
        gc.collect()
        with LiveBytes() as live:
            model.base_model(input_ids=ids[:, 128:], past_key_values=cache, use_cache=True)
    grown = held_bytes(cache) - before
    (prefill,) = (phase for phase in inference_phases(job) if phase.name == "prefill")
    # the caches of all layers are made anew in this chunk, which the tracer counts: old ones were there before it
    activations = live.peak - before - grown
    assert prefill.use["dram"]["kv_cache"] == before + grown
    assert activations * 0.97 <= prefill.use["dram"]["activations"] <= activations * 1.3


def test_bfloat16_takes_less_than_float32() -> None:
    small, large = (
        read_cache_facts(config_of("llama"), dtype).transient.at(1, 100) for dtype in ("bfloat16", "float32")
    )
    assert small < large < 2.5 * small


def test_recurrent_layers_have_a_state_of_fixed_size() -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING["mamba"](hidden_size=64, num_hidden_layers=3, vocab_size=101)
    facts = read_cache_facts(config, "float32")
    job = job_of(facts, batch=2)
    assert cache_bytes(job, 10) == cache_bytes(job, 1000) > 0


@pytest.mark.parametrize(("family", "words"), [("t5", "'t5'.*no causal language model"), ("bert", "'bert'.*no cache")])
def test_other_architectures_are_refused(family: str, words: str) -> None:
    from transformers import CONFIG_MAPPING

    with pytest.raises(BadInput, match=words):
        read_cache_facts(CONFIG_MAPPING[family](), "float32")
