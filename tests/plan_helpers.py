"""Configurations, machines and facts for the tests of plans."""

from __future__ import annotations

import functools
from typing import Any

from memopt.jobs.cache_facts import read_cache_facts
from memopt.jobs.model_facts import read_model_facts
from memopt.machine import Machine
from memopt.planning.inference_types import InferenceJob
from memopt.planning.training_types import DType
from memopt.units import GiB

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
MACHINE = Machine(
    name="test",
    gpu_name="test",
    gpu_bytes=24 * GiB,
    dram_bytes=64 * GiB,
    ssd_bytes=1000 * GiB,
    cpu_flops=2 * 10**12,
    gpu_flops=200 * 10**12,
    dram_per_s=50 * 10**9,
    gpu_memory_per_s=1000 * 10**9,
    h2d_per_s=20 * 10**9,
    d2h_per_s=10 * 10**9,
    ssd_read_per_s=5 * 10**9,
    ssd_write_per_s=2 * 10**9,
)
"""Round numbers: seconds can be counted by hand."""


def config(family: str = "llama", **settings: Any) -> Any:
    from transformers import CONFIG_MAPPING

    known = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CONFIG_MAPPING[family](**{**(LLAMA if family == "llama" else {}), **known, **settings})


@functools.cache
def _facts(family: str, dtype: DType, settings: tuple[tuple[str, Any], ...]) -> Any:
    made = config(family, **dict(settings))
    return read_model_facts(made), read_cache_facts(made, dtype)


def generation(
    family: str = "llama", dtype: DType = "bfloat16", model: dict[str, Any] | None = None, **settings: Any
) -> InferenceJob:
    """A generation job of a small model."""
    facts, cache = _facts(family, dtype, tuple(sorted((model or {}).items())))
    return InferenceJob(facts=facts, cache=cache, dtype=dtype, **settings)
