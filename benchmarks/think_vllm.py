"""Requests and tokens per second, and requests held at once, of a stock vLLM engine and one with thin keys.

Both get the same bytes of KV cache and the same load, which asks for several times what the cache holds; each round
starts both engines anew, in turn. The model is random: what is measured is memory and time, not quality. Needs the
environment of `make test-vllm` (or a vLLM with a GPU).

Least possible: with a share k of the key channels the same bytes hold 2 / (1 + k) times the blocks, so with equally
long requests as many more are held at once. On a CPU that is the target (within one request of it); on a GPU requests
per second should grow too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Table, machine_facts, median, number, say, workspace
from memopt.patches.vllm_config import ThinKeys
from memopt.units import MiB

COLUMNS = (
    "engine",
    "blocks",
    "KV tokens",
    "most at once",
    "mean at once",
    "preempted",
    "requests/s",
    "tokens/s",
    "wall s",
)
_MARK = "think-vllm-result "
_SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 0,
    "bos_token_id": None,
}
_HEAD_DIM = 64


def make_model(directory: Path, keep: float, seed: int) -> ThinKeys:
    """A random Llama, and channels that are as random (their number is what counts here)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from memopt.kv.channel_file import ChannelSets, save_channels
    from memopt.kv.channels import choose, kept_count
    from memopt.patches.hf_identity import identity_of

    torch.manual_seed(seed)
    config = LlamaConfig(**_SIZES)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "model")
    identity, count = identity_of(config), kept_count(_HEAD_DIM, keep)
    sets = {i: choose(torch.rand(identity.kv_heads, _HEAD_DIM), count) for i in range(identity.layers)}
    path = directory / "keys.safetensors"
    save_channels(path, ChannelSets(model=identity, keep=keep, keys=sets))
    return ThinKeys(key_keep=keep, channels=path)


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """One engine under the load, in this process."""
    import random

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=asked["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=asked["prompt"] + asked["new"] + 1,
        max_num_seqs=asked["requests"],
        enable_prefix_caching=False,
        kv_cache_memory_bytes=asked["kv_bytes"],
        disable_log_stats=False,
    )
    draw = random.Random(asked["seed"])
    vocabulary = _SIZES["vocab_size"]
    prompts = [
        TokensPrompt(prompt_token_ids=[draw.randrange(1, vocabulary) for _ in range(asked["prompt"])])
        for _ in range(asked["requests"])
    ]
    sampling = SamplingParams(max_tokens=asked["new"], temperature=0, ignore_eos=True, detokenize=False)
    engine.generate(prompts[:1], sampling, use_tqdm=False)
    inner, running = engine.llm_engine, []
    for i, prompt in enumerate(prompts):
        inner.add_request(f"request-{i}", prompt, sampling)
    began = time.perf_counter()
    finished = 0
    while inner.has_unfinished_requests():
        finished += sum(out.finished for out in inner.step())
        gauges = {each.name: each.value for each in inner.get_metrics() if hasattr(each, "value")}
        running.append(gauges["vllm:num_requests_running"])
    wall_s = time.perf_counter() - began
    cache = inner.vllm_config.cache_config
    assert finished == len(prompts)
    return {
        "blocks": cache.num_gpu_blocks,
        "kv_tokens": cache.kv_cache_size_tokens,
        "most": max(running),
        "mean": sum(running) / len(running),
        "preempted": gauges["vllm:num_preemptions"],
        "requests_per_s": finished / wall_s,
        "tokens_per_s": finished * asked["new"] / wall_s,
        "wall_s": wall_s,
    }


def run_engine(asked: dict[str, Any], keys: ThinKeys | None) -> dict[str, Any]:
    """`measure` in a process of its own."""
    environment = dict(os.environ) | {"VLLM_NO_USAGE_STATS": "1"} | ({} if keys is None else keys.environment())
    command = [sys.executable, "-m", "benchmarks.think_vllm", "--child", json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    if done.returncode != 0 or line is None:
        raise SystemExit("the engine failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-30:]))
    found: dict[str, Any] = json.loads(line[len(_MARK) :])
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=700, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=68, help="tokens generated for each")
    parser.add_argument("--kv-mib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(_MARK + json.dumps(measure(json.loads(args.child))), flush=True)
        return
    table = Table("think_vllm", COLUMNS, machine_facts(Path.cwd(), args.seed, None), record=args.record)
    with workspace(None) as directory:
        keys = make_model(directory, args.keep, args.seed)
        asked = {name: getattr(args, name) for name in ("requests", "prompt", "new", "seed")}
        asked["kv_bytes"] = args.kv_mib * MiB
        model = str(directory / "model")
        engines: dict[str, ThinKeys | None] = {"stock": None, f"{args.keep:g} of the key channels": keys}
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        for i in range(args.rounds):
            for name, given in engines.items():
                rounds[name].append(run_engine({**asked, "model": model}, given))
                say(f"round {i + 1}, {name}: {rounds[name][-1]['requests_per_s']:.2f} requests/s")
    for name, found in rounds.items():
        middle = {key: median([each[key] for each in found]) for key in found[0]}
        table.add(
            {"engine": name, **asked, **middle, "rounds": found},
            [
                name,
                *(number(middle[key], 0) for key in ("blocks", "kv_tokens", "most")),
                number(middle["mean"], 1),
                number(middle["preempted"], 0),
                number(middle["requests_per_s"]),
                number(middle["tokens_per_s"], 1),
                number(middle["wall_s"], 1),
            ],
        )
    stock, thin = (median([each["most"] for each in found]) for found in rounds.values())
    wanted = 2 / (1 + args.keep) * stock
    met = thin > stock and thin >= wanted - 1
    table.note(
        f"Medians of {args.rounds} rounds. {args.requests} requests of {args.prompt} + {args.new} tokens, "
        f"{args.kv_mib} MiB of KV cache. Requests held at once: {thin:.0f} against {stock:.0f}; {wanted:.1f} is what "
        f"the bytes allow. {'The target is met.' if met else 'The target is missed.'}"
    )
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
