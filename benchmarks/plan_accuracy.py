"""How right the training planner is: predicted and measured bytes of small real runs, errors in both directions.

    python -m benchmarks.plan_accuracy [--record] [--only NAME ...]

Each case is trained in a process of its own. Three numbers are compared: bytes of tensors at the peak of a step
(torch's allocator events), anonymous + shared memory of the process at its peak (sampled every 2 ms), and, for memopt's
own engine, bytes read from and written to the SSD in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import DROPPED_STEPS, ROOT, Table, machine_facts, median, mib, run_child, say, workspace
from benchmarks.plan_children import RESULT
from memopt.budget import Budget
from memopt.jobs.model_facts import measure_runtime, prepare, read_model_facts
from memopt.planning.training import training_phases, training_traffic
from memopt.planning.training_memory import tensor_phases
from memopt.planning.training_types import TrainingJob
from memopt.tiers import Tier

_FIXED_HEAP = {"MALLOC_MMAP_THRESHOLD_": "524288", "MALLOC_TRIM_THRESHOLD_": "524288"}
_STEPS = 3
_SSD_STEPS = 5
_JOB_FIELDS = (
    "weights_dtype", "autocast", "method", "lora_rank", "gradient_checkpointing", "batch_size", "seq_len", "grad_accum",
    "implementation", "optimizer", "optimizer_options",
)  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-5M": ("llama", dict(hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
                               num_key_value_heads=3, vocab_size=8192, max_position_embeddings=4096)),
    "llama-40M": ("llama", dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                                num_key_value_heads=4, vocab_size=16000, max_position_embeddings=4096)),
    "llama-150M": ("llama", dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12,
                                 num_key_value_heads=4, vocab_size=32000, max_position_embeddings=4096)),
    "qwen3-30M": ("qwen3", dict(hidden_size=448, intermediate_size=1216, num_hidden_layers=8, num_attention_heads=7,
                                num_key_value_heads=7, head_dim=64, vocab_size=20000, tie_word_embeddings=True)),
    "qwen3-500M": ("qwen3", dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=24, num_attention_heads=16,
                                 num_key_value_heads=8, head_dim=64, vocab_size=96000, tie_word_embeddings=True)),
    "gpt2-124M": ("gpt2", dict()),
    "gpt2-16M": ("gpt2", dict(n_embd=320, n_layer=6, n_head=5, vocab_size=24000)),
    "opt-30M": ("opt", dict(hidden_size=384, ffn_dim=1536, num_hidden_layers=8, num_attention_heads=6,
                            vocab_size=32000, word_embed_proj_dim=384)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run. `dram`: budget of memopt's own engine, which then trains from the SSD."""

    name: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    dram: str | None = None


CASES = (
    Case(name="full", model="llama-40M", settings=dict(seq_len=512, implementation="fused")),
    Case(name="long", model="llama-5M",
         settings=dict(seq_len=4096, gradient_checkpointing=True, implementation="fused", fixed_heap=True)),
    Case(name="checkpointed", model="llama-40M",
         settings=dict(seq_len=2048, gradient_checkpointing=True, implementation="fused")),
    Case(name="accumulated, 8-bit", model="llama-40M",
         settings=dict(seq_len=256, grad_accum=4, optimizer="adamw8bit", fixed_heap=True)),
    Case(name="Muon", model="qwen3-30M", settings=dict(seq_len=512, optimizer="muon")),
    Case(name="GaLore", model="qwen3-30M", settings=dict(seq_len=256, batch_size=2, optimizer="galore")),
    Case(name="GaLore 8-bit", model="opt-30M",
         settings=dict(seq_len=512, optimizer="galore8bit", fixed_heap=True)),
    Case(name="full, foreach", model="gpt2-124M", settings=dict(seq_len=128, implementation="foreach")),
    Case(name="full, accumulated", model="gpt2-16M",
         settings=dict(seq_len=1024, grad_accum=2, implementation="single", fixed_heap=True)),
    Case(name="full", model="opt-30M", settings=dict(seq_len=512, batch_size=2)),
    Case(name="LoRA", model="opt-30M", settings=dict(seq_len=1024, method="lora")),
    Case(name="LoRA, checkpointed", model="llama-150M",
         settings=dict(seq_len=1024, method="lora", gradient_checkpointing=True, fixed_heap=True)),
    Case(name="LoRA", model="qwen3-500M", settings=dict(seq_len=128, method="lora", fixed_heap=True)),
    Case(name="SSD", model="llama-40M", settings=dict(seq_len=256, engine="ssd"), dram="500MiB"),
    Case(name="SSD, 8-bit", model="qwen3-30M",
         settings=dict(seq_len=512, engine="ssd", optimizer="adamw8bit", grad_accum=2), dram="520MiB"),
    Case(name="SSD, Muon", model="llama-150M",
         settings=dict(seq_len=128, engine="ssd", optimizer="muon"), dram="900MiB"),
)  # fmt: skip

_COLUMNS = (
    "model", "case", "optimizer", "batch x seq", "heap", "tensors predicted MiB", "measured", "error %",
    "process predicted MiB", "measured", "error %", "SSD read+write MiB/step predicted", "measured", "error %",
)  # fmt: skip


def main() -> None:
    """Run all cases, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/")
    parser.add_argument("--only", nargs="*", help="parts of 'model case' texts")
    parser.add_argument("--dir", help="where models and offloaded state are written")
    options = parser.parse_args()
    with workspace(options.dir) as directory:
        table = Table("plan_accuracy", _COLUMNS, machine_facts(directory, 0, None), record=options.record)
        runtime = {engine: measure_runtime(engine) for engine in ("memory", "ssd")}  # type: ignore[arg-type]
        say("empty processes: " + ", ".join(f"{name} {mib(n)} MiB" for name, n in runtime.items()))
        rows = []
        for case in CASES:
            label = f"{case.model} {case.name}"
            if options.only and not any(text in label for text in options.only):
                continue
            say(label)
            row = _run(case, directory, runtime)
            rows.append(row)
            table.add(row, _cells(row))
        table.note(_summary(rows))


def _run(case: Case, directory: Path, runtime: dict[str, int]) -> dict[str, Any]:
    source = _model(case.model, directory)
    engine = case.settings.get("engine", "memory")
    job = prepare(
        TrainingJob(
            facts=read_model_facts(source),
            runtime_bytes=runtime[engine],
            budget=Budget.parse(f"dram={case.dram}") if case.dram else Budget(),
            steps=_SSD_STEPS if engine == "ssd" else _STEPS,
            **case.settings,
        )
    )
    phases = training_phases(job)
    row: dict[str, Any] = {
        "model": case.model,
        "case": case.name,
        "optimizer": job.optimizer if job.implementation == "memopt" else f"torch AdamW {job.implementation}",
        "shape": f"{job.batch_size} x {job.seq_len}" + (f" x {job.grad_accum}" if job.grad_accum > 1 else ""),
        "heap": "fixed" if job.fixed_heap or engine == "ssd" else "default",
        "predicted_bytes": max(phase.total_bytes(Tier.DRAM) for phase in phases),
    }
    return {**row, **(_ssd(case, job, source, directory) if engine == "ssd" else _memory(job, source))}


def _memory(job: TrainingJob, source: str) -> dict[str, Any]:
    case = {name: getattr(job, name) for name in _JOB_FIELDS}
    measured = _child(dict(case=case, model=source, steps=_STEPS, save=True), _FIXED_HEAP if job.fixed_heap else {})
    predicted = {name: sum(use.values()) for name, use in tensor_phases(job).items() if name in measured["tensors"]}
    return {
        "predicted_tensor_bytes": max(predicted.values()),
        "tensor_bytes": max(measured["tensors"].values()),
        "peak_bytes": max(measured["phases"].values()),
        "phases": measured["phases"],
        "tensors": measured["tensors"],
        "predicted_tensors": predicted,
        "started_bytes": measured["started_bytes"],
    }


def _ssd(case: Case, job: TrainingJob, source: str, directory: Path) -> dict[str, Any]:
    settings = {
        "model": source, "method": job.method, "optimizer": job.optimizer, "dram": case.dram,
        "offload_dir": str(directory / "offload"), "max_steps": _SSD_STEPS,
    }  # fmt: skip
    batches = {
        "seed": 0, "vocab": job.facts.vocab, "seq": job.seq_len, "rows": job.batch_size, "accum": job.grad_accum,
        "steps": _SSD_STEPS,
    }  # fmt: skip
    measured = run_child("train_memopt", {"settings": settings, "batches": batches})
    moved = training_traffic(job)
    reads, writes = (measured[name][DROPPED_STEPS:] for name in ("ssd_read_bytes", "ssd_write_bytes"))
    return {
        "peak_bytes": measured["peak_bytes"],
        "own_predicted_bytes": measured["predicted_bytes"],
        "predicted_ssd_bytes": moved.ssd_read_bytes + moved.ssd_write_bytes,
        "ssd_bytes": int(median(reads) + median(writes)),
        "predicted_read_write": [moved.ssd_read_bytes, moved.ssd_write_bytes],
        "read_write": [median(reads), median(writes)],
    }


def _model(name: str, directory: Path) -> str:
    """A checkpoint with random weights, made once."""
    path = directory / name
    if not path.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, values = MODELS[name]
        special = {key: 0 for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, **special)).save_pretrained(path)
    return str(path)


def _child(arguments: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_children", json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(RESULT)), None)
    if done.returncode != 0 or last is None:
        raise RuntimeError(f"a case ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(last[len(RESULT) :])
    return result


def _error(row: dict[str, Any], predicted: str, measured: str) -> float | None:
    """Percent; above zero: more was predicted than there was."""
    return 100 * (row[predicted] / row[measured] - 1) if row.get(measured) else None


_PAIRS = (
    ("predicted_tensor_bytes", "tensor_bytes"),
    ("predicted_bytes", "peak_bytes"),
    ("predicted_ssd_bytes", "ssd_bytes"),
)


def _cells(row: dict[str, Any]) -> Sequence[str]:
    cells = [row["model"], row["case"], row["optimizer"], row["shape"], row["heap"]]
    for predicted, measured in _PAIRS:
        error = _error(row, predicted, measured)
        cells += [mib(row.get(predicted)), mib(row.get(measured)), "-" if error is None else f"{error:+.2f}"]
    return cells


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    parts = []
    for (predicted, measured), name in zip(_PAIRS, ("tensor bytes", "process memory", "SSD bytes"), strict=True):
        errors = [e for row in rows if (e := _error(row, predicted, measured)) is not None]
        if errors:
            sizes = [abs(e) for e in errors]
            parts.append(
                f"{name}: {len(errors)} cases, median error {median(sizes):.2f} %, from {min(errors):+.2f} to "
                f"{max(errors):+.2f} %"
            )
    return "Errors above zero: more was predicted than measured. " + "; ".join(parts) + "."


if __name__ == "__main__":
    main()
