"""Streamed training equals the plain in-memory loop: losses, gradient norms and final weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memopt.optim.chunked import ChunkRule
from memopt.optim.codecs import Codec
from tests.offload_helpers import (
    IN_DRAM,
    assert_same,
    batches,
    distance,
    everywhere,
    final_weights,
    one_thread,  # noqa: F401
    opened,
    scattered,
    setup,
    subject,
    train,
    weights_of,
)
from tests.reference.in_memory import train_in_memory

LR = 1e-4
STEPS = 20
TINY_NORM = 0.05
"""Far below the gradient norms of these models: every step is clipped."""

RAGGED = ((2, 16), (1, 24), (3, 8))

# Each choice meets each family's risk at least once: clipping with tied tables, padding with each kind of position and
# mask, accumulation over micro-batches of unlike shapes, tables in tiles, activations on SSD.
CASES: dict[str, dict[str, Any]] = {
    "llama, plain": {"family": "llama"},
    "llama, everything": {
        "family": "llama",
        "accum": 4,
        "clip": TINY_NORM,
        "pad": "left",
        "shapes": RAGGED,
        "tile_rows": 50,
        "activation_layers_on_ssd": 2,
    },
    "llama tied, plain": {"family": "llama_tied", "pad": "right"},
    "llama tied, clipped": {"family": "llama_tied", "accum": 4, "clip": TINY_NORM, "pad": "left", "tile_rows": 50},
    "llama tied, in DRAM": {"family": "llama_tied", "clip": TINY_NORM, "residence": "dram", "num_hidden_layers": 2},
    "qwen3": {"family": "qwen3", "accum": 4, "pad": "right", "clip": TINY_NORM, "residence": "mixed"},
    "gemma3": {"family": "gemma3", "accum": 4, "pad": "left", "shapes": ((1, 20),)},
    "gemma3, clipped": {"family": "gemma3", "clip": TINY_NORM, "pad": "right", "shapes": ((2, 20),)},
    "gpt2": {"family": "gpt2", "residence": "mixed"},
    "gpt2, clipped": {"family": "gpt2", "accum": 4, "clip": TINY_NORM, "pad": "right", "shapes": RAGGED},
    "opt": {"family": "opt", "accum": 4, "pad": "right", "num_hidden_layers": 2},
    "opt, clipped": {"family": "opt", "clip": TINY_NORM, "pad": "left"},
    "mixtral": {"family": "mixtral", "accum": 4, "pad": "left", "num_hidden_layers": 2},
    "mixtral, clipped": {"family": "mixtral", "clip": TINY_NORM},
}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_equal_the_in_memory_loop(name: str, tmp_path: Path) -> None:
    case = dict(CASES[name])
    model = subject(case.pop("family"), **{k: case.pop(k) for k in ("num_hidden_layers",) if k in case})
    steps = batches(
        model.vocabulary,
        STEPS,
        accum=case.pop("accum", 1),
        pad=case.pop("pad", None),
        shapes=case.pop("shapes", ((2, 16),)),
    )
    clip = case.pop("clip", 0.0)
    where = {"dram": lambda layout: everywhere(layout, IN_DRAM), "mixed": lambda layout: scattered(layout, 3)}
    residence = where.get(case.pop("residence", ""))
    got = train(setup(model, tmp_path, steps, clip_norm=clip, residence=residence, **case), steps, lr=LR)

    plain = model.in_memory()
    losses = train_in_memory(plain, steps, lr=lambda step: LR, decay=model.decay, weight_decay=0.1, max_grad_norm=clip)
    worst = max(abs(a - b) / abs(b) for a, b in zip(got.losses, losses, strict=True))
    assert worst <= 1e-5
    apart = distance(got.weights, final_weights(plain))
    assert apart.relative <= 1e-6
    assert apart.largest <= 0.1 * LR
    assert got.weights.keys() == model.initial.keys()
    assert distance(got.weights, model.initial).largest > 5 * LR, "nothing was trained"
    if clip:
        assert all(norm is not None and norm > 2 * clip for norm in got.norms), "the clipping never clipped"
    else:
        assert set(got.norms) == {None}


@pytest.mark.parametrize(("state", "clip"), [(Codec.FP32, TINY_NORM), (Codec.BF16, 0.0)])
def test_units_of_several_chunks(state: Codec, clip: float, tmp_path: Path) -> None:
    """Updates walk the vectors in chunks of a million elements; every unit has two here."""
    model = subject("llama_tied", hidden_size=256, intermediate_size=1536, vocab_size=5000, num_hidden_layers=2)
    steps = batches(model.vocabulary, 3, shapes=((2, 12),))
    rule = ChunkRule(weight_decay=0.1, codec=state)
    on_ssd = setup(model, tmp_path / "ssd", steps, clip_norm=clip, rule=rule)
    assert all(len(u.spans) == 2 for u in (*on_ssd.layout.embed, *on_ssd.layout.blocks))
    got = train(on_ssd, steps, save_every=1)
    in_dram = setup(model, None, steps, clip_norm=clip, rule=rule, residence=lambda layout: everywhere(layout, IN_DRAM))
    assert_same(train(in_dram, steps).weights, got.weights)
    plain = model.in_memory()
    train_in_memory(plain, steps, lr=lambda step: LR, decay=model.decay, weight_decay=0.1, max_grad_norm=clip)
    apart = distance(got.weights, final_weights(plain))
    if state == Codec.FP32:
        assert apart.relative <= 1e-6 and apart.largest <= 0.1 * LR
    else:
        assert apart.largest <= LR


def test_the_learning_rate_of_each_step_is_used(tmp_path: Path) -> None:
    """A schedule: with clipping the update of a step is applied during the next one, with its own rate."""
    model = subject("llama_tied")
    steps = batches(model.vocabulary, 5)
    rates = [1e-4, 5e-4, 2e-4, 0.0, 3e-4]
    plain = model.in_memory()
    train_in_memory(
        plain, steps, lr=lambda step: rates[step], decay=model.decay, weight_decay=0.1, max_grad_norm=TINY_NORM
    )
    this = setup(model, tmp_path, steps, clip_norm=TINY_NORM)
    with opened(this) as at:
        for micros, rate in zip(steps, rates, strict=True):
            at.engine.step(micros, lr=rate, save=True)
        at.engine.save()
        got = weights_of(this, at)
    assert distance(got, final_weights(plain)).largest <= 1e-5


def test_the_gradient_norm_is_the_global_one(tmp_path: Path) -> None:
    """The tied table's norm has a dense part, a sparse part and their overlap."""
    for family in ("llama_tied", "gpt2", "llama"):
        model = subject(family)
        steps = batches(model.vocabulary, 1, accum=2, pad="left")
        got = train(setup(model, tmp_path / family, steps, clip_norm=1.0, tile_rows=50), steps)
        plain = model.in_memory()
        count = sum(int((m["labels"][:, 1:] != -100).sum()) for m in steps[0])
        for micro in steps[0]:
            logits = plain(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="sum"
            )
            (loss / count).backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in plain.parameters()]))
        assert got.norms == [pytest.approx(norm, rel=1e-5)]
        assert got.results[0].target_tokens == count


def test_evaluation_is_the_models_own_loss_and_changes_nothing(tmp_path: Path) -> None:
    model = subject("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
    steps = batches(model.vocabulary, 1, accum=2, pad="right")
    this = setup(model, tmp_path, steps, tile_rows=50)
    plain = model.in_memory().eval()
    with torch.no_grad():
        total = count = 0.0
        for micro in steps[0]:
            targets = int((micro["labels"][:, 1:] != -100).sum())
            total, count = total + float(plain(**micro).loss) * targets, count + targets
    with opened(this) as at:
        loss, seen = at.engine.evaluate(steps[0])
        again, _ = at.engine.evaluate(steps[0])
        assert_same(weights_of(this, at), model.initial)
        assert at.engine.saved_step == 0
    assert loss == pytest.approx(total / count, rel=1e-6)
    assert (again, seen) == (loss, count)
