"""The peak of DRAM that `memopt plan --task generate` predicts, against a process that generates.

Each case is a process of its own: the model is made, then `generate` runs greedily while a thread reads anonymous and
shared memory every 2 ms. The plan is made of the configuration, with the process's own memory before the model as its
runtime. Two more columns tell where an error comes from: the same with every block of memory given back to the kernel
at once (MALLOC_MMAP_THRESHOLD_), where nothing is left to the heap, and the cache's bytes by `untyped_storage`.

`python -m benchmarks.plan_generation --record` (about five minutes on two cores)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULT_MARK, ROOT, ChildFailed, Table, machine_facts, median, mib, say

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 16000,
        "max_position_embeddings": 8192,
    },
    "qwen3": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
    },
    "mistral": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 512,
        "vocab_size": 16000,
        "max_position_embeddings": 8192,
    },
    "gpt2": {"n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 16000, "n_positions": 4096},
    "opt": {
        "hidden_size": 512,
        "ffn_dim": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "word_embed_proj_dim": 512,
        "vocab_size": 16000,
        "max_position_embeddings": 4096,
    },
}
CASES = (  # family, sequences, prompt, new tokens, dtype
    ("llama", 1, 128, 64, "float32"),
    ("llama", 1, 2048, 16, "float32"),
    ("llama", 4, 1024, 8, "float32"),
    ("llama", 1, 6000, 8, "float32"),
    ("llama", 1, 2048, 8, "bfloat16"),
    ("qwen3", 1, 4000, 8, "float32"),
    ("qwen3", 8, 256, 32, "float32"),
    ("mistral", 1, 2000, 16, "float32"),
    ("gpt2", 2, 1500, 8, "float32"),
    ("gpt2", 8, 300, 20, "float32"),
    ("opt", 2, 2000, 8, "float32"),
    ("opt", 1, 1000, 64, "float32"),
)
MEDIAN_PERCENT, WORST_PERCENT = 8.0, 15.0
"""The claim: errors of the peak, in both directions."""
_EVERY_S = 0.002
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def generate(family: str, batch: int, prompt: int, new: int, dtype: str) -> dict[str, Any]:
    """Peak while generating and what was predicted, bytes. In the measured process."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from memopt.profiler.samplers import process_memory

    def charged() -> int:
        memory = process_memory()
        assert memory is not None
        return memory.charged_bytes

    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**MODELS[family], pad_token_id=0, bos_token_id=1, eos_token_id=None)
    torch.ones(64, 64) @ torch.ones(64, 64)
    start = charged()
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_EVERY_S):
            peak = max(peak, charged())

    thread = threading.Thread(target=watch)
    thread.start()
    ids = torch.randint(2, 1000, (batch, prompt))
    out = model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    done.set()
    thread.join()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in out.past_key_values.layers
        for t in (layer.keys, layer.values)
    }
    predicted = _predict(config, batch, prompt, new, dtype, start)
    return {"start_bytes": start, "peak_bytes": peak, "cache_bytes": sum(held.values()), **predicted}


def _predict(config: Any, batch: int, prompt: int, new: int, dtype: Any, start: int) -> dict[str, int]:
    from memopt.jobs.cache_facts import read_cache_facts
    from memopt.jobs.model_facts import read_model_facts
    from memopt.planning.inference import cache_bytes, inference_phases
    from memopt.planning.inference_types import InferenceJob
    from memopt.tiers import Tier

    job = InferenceJob(
        facts=read_model_facts(config),
        cache=read_cache_facts(config, dtype),
        dtype=dtype,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        runtime_bytes=start,
    )
    worst = max(inference_phases(job), key=lambda phase: phase.total_bytes(Tier.DRAM))
    return {
        "predicted_bytes": worst.total_bytes(Tier.DRAM),
        "predicted_slack_bytes": worst.use["dram"].get("other", 0),
        "predicted_cache_bytes": cache_bytes(job, job.cached),
    }


def measure(case: tuple[Any, ...], **environment: str) -> dict[str, Any]:
    """One case in a process of its own. Raises ChildFailed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.plan_generation", "--child", json.dumps(case)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(RESULT_MARK)), None)
    if last is None:
        raise ChildFailed("\n".join(done.stderr.strip().splitlines()[-8:]))
    result: dict[str, Any] = json.loads(last[len(RESULT_MARK) :])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(RESULT_MARK + json.dumps(generate(*json.loads(given.child))), flush=True)
        return 0
    columns = [
        "model", "sequences", "prompt", "new", "dtype", "predicted MiB", "measured MiB", "error %",
        "heap given back: MiB", "error % without slack", "cache bytes exact",
    ]  # fmt: skip
    table = Table("plan_generation", columns, machine_facts(Path.cwd(), 0, None), record=given.record)
    errors, bare_errors = [], []
    for case in CASES:
        say(f"{case}")
        found = measure(case)
        bare = measure(case, **_GIVE_BACK)
        error = 100 * (found["predicted_bytes"] / found["peak_bytes"] - 1)
        without = bare["predicted_bytes"] - bare["predicted_slack_bytes"]
        bare_error = 100 * (without / bare["peak_bytes"] - 1)
        errors.append(abs(error))
        bare_errors.append(abs(bare_error))
        exact = found["predicted_cache_bytes"] == found["cache_bytes"]
        cells = [*map(str, case), mib(found["predicted_bytes"]), mib(found["peak_bytes"]), f"{error:+.1f}"]
        cells += [mib(bare["peak_bytes"]), f"{bare_error:+.1f}", "yes" if exact else "NO"]
        table.add({"case": case, **found, "bare_peak_bytes": bare["peak_bytes"], "error": error}, cells)
    table.note(
        f"Error of the peak: median {median(errors):.1f} %, worst {max(errors):.1f} %; with the heap given back: "
        f"median {median(bare_errors):.1f} %, worst {max(bare_errors):.1f} %."
    )
    return int(median(errors) > MEDIAN_PERCENT or max(errors) > WORST_PERCENT)


if __name__ == "__main__":
    sys.exit(main())
