"""Every preset, streamed: the optimizer in memory, wherever things live, and the same bits after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from memopt.jobs.optimizer import build_optimizer
from memopt.optim.presets import PRESETS
from tests.offload_helpers import (
    Steps,
    Subject,
    batches,
    distance,
    final_weights,
    one_thread,  # noqa: F401
    rules_of,
    setup,
    subject,
    train,
)
from tests.reference.in_memory import train_in_memory

NAMES = list(PRESETS)
STEPS = 4
TINY_NORM = 0.05
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
"""Rows of whole blocks of 256: the blocks of 8-bit states are then the same along rows and along flat vectors."""


def options_of(model: Subject, preset: str) -> dict[str, Any]:
    """A rank that the gradients of few tokens have: directions of nothing but rounding go anywhere."""
    return {"rank": 24 if model.width > 64 else 8, "update_proj_gap": 3} if "galore" in preset else {}


def lr_of(preset: str) -> float:
    return 1e-4 if "lion" in preset else 1e-3


def data(model: Subject, steps: int = STEPS) -> Steps:
    return batches(model.vocabulary, steps, accum=2, pad="left", shapes=((2, 16), (1, 24)))


def in_memory(model: Subject, preset: str, steps: Steps, clip: float) -> tuple[list[float], nn.Module]:
    plain, lr = model.in_memory(), lr_of(preset)
    optimizer = build_optimizer(plain, preset, lr=lr, weight_decay=0.1, **options_of(model, preset))
    losses = train_in_memory(
        plain, steps, lr=lambda step: lr, decay=model.decay, max_grad_norm=clip, optimizer=optimizer
    )
    return losses, plain


@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_the_optimizer_in_memory(preset: str, tmp_path: Path) -> None:
    """Signs of what is nearly zero and codes of 8 bits turn on rounding: the weights may differ there, by a share of
    the way they went. The losses hardly may."""
    model, clip = subject("llama", **SIZES), TINY_NORM * (NAMES.index(preset) % 2)
    steps = data(model)
    this = setup(model, tmp_path, steps, clip_norm=clip, rule=rules_of(model, preset, **options_of(model, preset)))
    got = train(this, steps, lr=lr_of(preset))
    losses, plain = in_memory(model, preset, steps, clip)
    assert max(abs(a - b) / abs(b) for a, b in zip(got.losses, losses, strict=True)) <= 1e-5
    share = 0.1 if "lion" in preset else 0.05 if "8bit" in preset else 0.005
    apart = distance(got.weights, final_weights(plain)).relative
    assert apart <= share * distance(got.weights, model.initial).relative


FUSED = {
    "gpt2": "muon_vo_ffn",  # [q k v] in columns, two of them not Muon's
    "gpt_neox": "galore_muon",  # q, k, v of each head in turn
    "phi3": "muon",  # [q k v] and [gate up] in rows
    "mixtral": "muon",  # matrices of experts in a batch
    "llama_tied": "galore",
    "qwen3_moe": "muon_vo_ffn",
    "opt": "galore_muon",
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_and_turned_matrices(family: str, tmp_path: Path) -> None:
    model, preset = subject(family), FUSED[family]
    steps = data(model)
    this = setup(
        model,
        tmp_path,
        steps,
        clip_norm=TINY_NORM,
        tile_rows=50,
        rule=rules_of(model, preset, **options_of(model, preset)),
    )
    wholes = [s for u in this.layout.blocks for s in u.segments if s.rule.whole]
    assert wholes and all(s.rule.whole == 0 for u in this.layout.tables for s in u.segments)
    got = train(this, steps, lr=lr_of(preset))
    losses, plain = in_memory(model, preset, steps, TINY_NORM)
    assert max(abs(a - b) / abs(b) for a, b in zip(got.losses, losses, strict=True)) <= 1e-5
    apart = distance(got.weights, final_weights(plain)).relative
    assert apart <= 0.005 * distance(got.weights, model.initial).relative
