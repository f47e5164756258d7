"""The processes that are measured: `python -m benchmarks.children NAME JSON` prints one result. Used by the harness."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULT_MARK

_SHARD = "256MB"
_ASK_SLACK_BYTES = 8 << 20
_WINDOW_TOKENS = 512
_STEP_FIELDS = ("step_s", "waited_s", "io_busy_s", "ssd_read_bytes", "ssd_write_bytes", "grad_norm")


def make_model(directory: str, config: dict[str, Any], seed: int, weights: bool, dtype: str) -> dict[str, Any]:
    """A Llama with random weights as a checkpoint that both sides load; `weights` False: its configuration only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaConfig(**config, architectures=["LlamaForCausalLM"], dtype=dtype)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(made).parameters())
    made.save_pretrained(directory)
    if weights:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(made).to(getattr(torch, dtype))
        model.save_pretrained(directory, max_shard_size=_SHARD)
    return {"parameters": parameters}


def smallest(settings: dict[str, Any], batches: dict[str, int] | None) -> dict[str, Any]:
    """The smallest sufficient DRAM budget, as memopt states it when it refuses a smaller one."""
    import transformers  # noqa: F401 - the question is asked in a process that holds what a run holds

    import memopt
    from memopt.plan_types import Infeasible
    from memopt.profiler.samplers import process_memory

    memory = process_memory()
    assert memory is not None
    asked = memory.charged_bytes + _ASK_SLACK_BYTES
    config = memopt.FinetuneConfig.of(**{**settings, "dram": asked, "dry_run": True, "quiet": True})
    try:
        memopt.finetune(config, batches=_steps(batches))
    except Infeasible as refusal:
        return {"smallest_bytes": refusal.smallest_bytes, "asked_bytes": asked}
    raise RuntimeError(f"a budget of {asked} bytes was not refused")


def plan(settings: dict[str, Any], batches: dict[str, int] | None) -> dict[str, Any]:
    """What a run would do, without doing it."""
    import memopt

    config = memopt.FinetuneConfig.of(**{**settings, "dry_run": True, "quiet": True})
    return {"plan": memopt.finetune(config, batches=_steps(batches)).results["plan"]}


def train_memopt(settings: dict[str, Any], batches: dict[str, int] | None) -> dict[str, Any]:
    """A memopt run; per-step numbers from its log, the rest from its report. The offload directory is removed."""
    import memopt

    offload_dir = settings.get("offload_dir")
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "steps.jsonl"
        config = memopt.FinetuneConfig.of(**{**settings, "log_file": str(log), "quiet": True})
        began = time.perf_counter()
        try:
            report = memopt.finetune(config, batches=_steps(batches))
        finally:
            if offload_dir is not None:
                shutil.rmtree(offload_dir, ignore_errors=True)
        wall_s = time.perf_counter() - began
        rows = [row for line in log.read_text().splitlines() if "step_s" in (row := json.loads(line))]
    dram, gpu = report.tiers.dram, report.tiers.gpu
    results = report.results
    return {
        "losses": results["losses"],
        "eval_losses": results["eval_losses"],
        "parameters": results["parameters"],
        "training_state_bytes": results["training_state_bytes"],
        "tokens": results["tokens"],
        **{name: [row.get(name) for row in rows] for name in _STEP_FIELDS},
        "dram_budget_bytes": dram.budget_bytes,
        "peak_bytes": dram.peak_bytes,
        "hwm_bytes": dram.upper_bound_bytes,
        "predicted_bytes": dram.predicted_bytes,
        "charged_peak_bytes": dram.charged_peak_bytes,
        "gpu_budget_bytes": gpu.budget_bytes if gpu else None,
        "gpu_peak_bytes": gpu.peak_bytes if gpu else None,
        "gpu_predicted_bytes": gpu.predicted_bytes if gpu else None,
        "verdict": report.verdict,
        "plan": {k: v for k, v in results["plan"].items() if k not in ("residence", "reasons")},
        "reasons": report.reasons,
        "wall_s": wall_s,
        **_torch_gpu_peak(),
    }


def train_plain(
    model: str, batches: dict[str, int], lr: float, max_grad_norm: float, device: str, compute: str
) -> dict[str, Any]:
    """The whole model in memory, torch's fused AdamW; the same sampler watches it that watches a memopt run.

    `compute`: `float32`; `autocast` (float32 weights and moments, bfloat16 products); `bfloat16` (all of it).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from memopt.profiler.session import Session

    steps = _steps(batches)
    assert steps is not None
    with Session() as session:
        dtype = torch.bfloat16 if compute == "bfloat16" else torch.float32
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0, fused=True)
        losses, seconds, norms = [], [], []
        for micro_batches in steps:
            began = time.perf_counter()
            total = 0.0
            for micro in micro_batches:
                with torch.autocast(device, torch.bfloat16, enabled=compute == "autocast"):
                    moved = {name: tensor.to(device) for name, tensor in micro.items()}
                    loss = network(**moved, use_cache=False).loss / len(micro_batches)
                loss.backward()
                total += float(loss.detach())
            if max_grad_norm:
                norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)))
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            losses.append(total)
        measured = session.stop()
    return {
        "losses": losses,
        "step_s": seconds,
        "grad_norm": norms,
        "parameters": sum(p.numel() for p in network.parameters()),
        "peak_bytes": measured.dram_peak_bytes,
        "hwm_bytes": measured.dram_upper_bound_bytes,
        "gpu_peak_bytes": measured.gpu_peak_bytes,
        **_torch_gpu_peak(),
    }


def score(model: str, texts: dict[str, str], prompts: list[str], seed: int, max_windows: int) -> dict[str, Any]:
    """Mean loss per token of each text file in windows of 512 tokens, and continuations: plain transformers only."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses, windows = {}, {}
    with torch.inference_mode():
        for name, path in texts.items():
            tokens = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
            cut = tokens[: len(tokens) // _WINDOW_TOKENS * _WINDOW_TOKENS].view(-1, _WINDOW_TOKENS)
            if len(cut) > max_windows:  # spread over the whole text
                cut = cut[torch.linspace(0, len(cut) - 1, max_windows).long()]
            losses[name] = sum(float(network(input_ids=w[None], labels=w[None]).loss) for w in cut) / len(cut)
            windows[name] = len(cut)
        samples = []
        for prompt in prompts:
            given = tokenizer(prompt, return_tensors="pt").input_ids
            torch.manual_seed(seed)
            out = network.generate(given, max_new_tokens=48, do_sample=True, top_k=20, temperature=0.7, pad_token_id=1)
            samples.append(tokenizer.decode(out[0]))
    return {"losses": losses, "windows": windows, "samples": samples}


def pinned(nbytes: int) -> dict[str, Any]:
    """Whether memopt's regions are pinned, and what copies to the device reach from them and from pageable memory."""
    import torch

    from memopt.store.regions import Region

    def per_s(host: torch.Tensor) -> float:
        device = torch.empty_like(host, device="cuda")
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            device.copy_(host, non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return nbytes / sorted(seconds)[2]

    with Region(nbytes, pin=True) as region:
        tensor = region.tensor(torch.uint8, nbytes)
        tensor.fill_(1)
        result = {"registered": region.pinned, "is_pinned": tensor.is_pinned(), "pinned_per_s": per_s(tensor)}
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    return {**result, "pageable_per_s": per_s(pageable), "device": torch.cuda.get_device_name()}


def _steps(batches: dict[str, int] | None) -> list[list[dict[str, Any]]] | None:
    """Random tokens: `steps` lists of `accum` micro-batches of shape (1, seq)."""
    if batches is None:
        return None
    import torch

    draw = torch.Generator().manual_seed(batches["seed"])

    def micro() -> dict[str, Any]:
        tokens = torch.randint(0, batches["vocab"], (batches.get("rows", 1), batches["seq"]), generator=draw)
        return {"input_ids": tokens, "labels": tokens}

    return [[micro() for _ in range(batches["accum"])] for _ in range(batches["steps"])]


def _torch_gpu_peak() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {"torch_allocated_peak_bytes": None, "torch_reserved_peak_bytes": None}
    return {
        "torch_allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        "torch_reserved_peak_bytes": torch.cuda.max_memory_reserved(),
    }


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (make_model, smallest, plan, train_memopt, train_plain, score, pinned)
}


def main() -> None:
    """Run one child."""
    name, arguments = sys.argv[1:]
    result = CHILDREN[name](**json.loads(arguments))
    print(RESULT_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
