"""Llama models with random weights for the benchmarks, and the settings under which both sides train them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.harness import run_child
from memopt.units import MiB, parse_bytes

# 373.9M parameters; the shape of the streaming prototype's tables, so that its numbers can be compared.
SHAPES: dict[str, dict[str, Any]] = {
    "350m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    # 1.10B parameters: TinyLlama's shape
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    # large enough that a plan has something to stream, small enough to try the program in a minute
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12, "num_attention_heads": 4},
}
_VOCABULARY = {"350m": 32000, "1b": 32000, "small": 8000}
_POSITIONS = 4096
SMALLEST_SLACK_BYTES = 16 * MiB
"""What is added to a smallest budget that another process has stated: resident libraries differ by a few MiB."""


def llama(shape: str, **changes: Any) -> dict[str, Any]:
    """Arguments of LlamaConfig: untied embeddings, as many key-value heads as query heads unless the shape says so."""
    config = {**SHAPES[shape], "vocab_size": _VOCABULARY[shape], **changes}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    return {**config, "max_position_embeddings": _POSITIONS, "tie_word_embeddings": False}


def make(
    directory: Path, shape: str, seed: int, *, weights: bool = True, dtype: str = "float32", **changes: Any
) -> int:
    """Write the model (or its configuration alone) to `directory`; its parameters."""
    made = run_child(
        "make_model",
        {
            "directory": str(directory),
            "config": llama(shape, **changes),
            "seed": seed,
            "weights": weights,
            "dtype": dtype,
        },
    )
    return int(made["parameters"])


def batches(shape: str, *, seq: int, accum: int, steps: int, seed: int, rows: int = 1) -> dict[str, int]:
    """Random tokens for `steps` optimizer steps, drawn alike in every child."""
    return {
        "vocab": _VOCABULARY[shape],
        "seq": seq,
        "accum": accum,
        "steps": steps,
        "seed": seed,
        "rows": rows,
    }


def settings(model: Path, offload_dir: Path | None, *, clip: bool, lr: float, seed: int, **more: Any) -> dict[str, Any]:
    """Settings of FinetuneConfig that match the plain loop: AdamW's defaults, no decay, a constant rate."""
    return {
        "model": str(model),
        "offload_dir": None if offload_dir is None else str(offload_dir),
        "max_grad_norm": 1.0 if clip else 0.0,
        "lr": lr,
        "schedule": "constant",
        "weight_decay": 0.0,
        "seed": seed,
        **more,
    }


def dram_budget(asked: str, run: dict[str, Any], steps: dict[str, int] | None) -> int:
    """Bytes of a `--dram` flag; `smallest` is what memopt says it needs for `run`, and a little."""
    if asked != "smallest":
        return parse_bytes(asked, field="--dram")
    stated = int(run_child("smallest", {"settings": run, "batches": steps})["smallest_bytes"])
    return math.ceil((stated + SMALLEST_SLACK_BYTES) / MiB) * MiB
