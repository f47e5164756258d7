"""bfloat16 compute, bfloat16 optimizer state, dropout: what is not plain float32, against the obvious loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from memopt.optim.chunked import ChunkRule
from memopt.optim.codecs import Codec
from tests.offload_helpers import (
    IN_DRAM,
    Steps,
    Trained,
    assert_same,
    batches,
    distance,
    everywhere,
    final_weights,
    one_thread,  # noqa: F401
    opened,
    place_seed,
    scattered,
    setup,
    subject,
    train,
)
from tests.reference.in_memory import train_in_memory
from tests.reference.mixed_precision import train_in_bfloat16

LR = 1e-3
ENTRY = 1 << 20


def repeated(vocabulary: int, steps: int, *, accum: int = 1) -> Steps:
    """The same batch again and again, so that the loss must fall."""
    return batches(vocabulary, 1, accum=accum, pad="right") * steps


@pytest.mark.parametrize(("family", "clip"), [("llama_tied", 0.0), ("gpt2", 1.0), ("qwen3", 0.0)])
def test_bfloat16_compute_follows_the_mixed_precision_loop(family: str, clip: float, tmp_path: Path) -> None:
    model = subject(family)
    steps = repeated(model.vocabulary, 12, accum=2)
    this = setup(model, tmp_path, steps, clip_norm=clip, compute_dtype=torch.bfloat16, activation_layers_on_ssd=1)
    got = train(this, steps, lr=LR)
    losses, masters = train_in_bfloat16(
        model.in_memory(), steps, lr=LR, decay=model.decay, weight_decay=0.1, max_grad_norm=clip
    )
    assert got.losses == pytest.approx(losses, rel=5e-3)
    assert got.losses[-1] < got.losses[0] - 0.3
    moved = distance(masters, model.initial).relative
    assert distance(got.weights, masters).relative < 0.15 * moved
    assert all(w.dtype == torch.float32 for w in got.weights.values())
    assert any(not torch.equal(w, w.bfloat16().float()) for w in got.weights.values()), "masters keep their bits"


def test_bfloat16_state_trains_like_float32_state(tmp_path: Path) -> None:
    model = subject("llama")
    steps = repeated(model.vocabulary, 12)
    runs = {}
    for codec in (Codec.FP32, Codec.BF16):
        rule = ChunkRule(weight_decay=0.1, codec=codec)
        this = setup(model, tmp_path / codec, steps, clip_norm=0.5, rule=rule)
        runs[codec] = train(this, steps, lr=LR)
    exact, rounded = runs[Codec.FP32], runs[Codec.BF16]
    assert rounded.losses == pytest.approx(exact.losses, rel=0.01)
    assert rounded.losses[-1] < rounded.losses[0] - 0.3
    apart = distance(rounded.weights, exact.weights).relative
    assert 0 < apart < 0.1 * distance(exact.weights, model.initial).relative


def test_bfloat16_state_does_not_depend_on_where_it_lives(tmp_path: Path) -> None:
    model = subject("llama_tied")
    steps = batches(model.vocabulary, 4)
    rule = ChunkRule(weight_decay=0.1, codec=Codec.BF16, seed=3)
    runs = [
        train(setup(model, tmp_path / "ssd", steps, rule=rule), steps),
        train(setup(model, tmp_path / "mix", steps, rule=rule, residence=lambda x: scattered(x, 5)), steps),
        train(setup(model, None, steps, rule=rule, residence=lambda x: everywhere(x, IN_DRAM)), steps),
    ]
    for other in runs[1:]:
        assert_same(other.weights, runs[0].weights)
    another = ChunkRule(weight_decay=0.1, codec=Codec.BF16, seed=4)
    other = train(setup(model, tmp_path / "seed", steps, rule=another), steps)
    assert distance(other.weights, runs[0].weights).largest > 0


# -- dropout

DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.15}


def dropped(where: Path | None, steps: Steps, *, seed: int = 0, **choice: object) -> Trained:
    return train(setup(subject("gpt2", **DROPOUT), where, steps, seed=seed, **choice), steps, lr=1e-4)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_dropout_equals_a_run_that_drops_the_same(clip: float, tmp_path: Path) -> None:
    """The reference keeps its graph and never recomputes: other masks in the recomputation would change gradients."""
    model = subject("gpt2", **DROPOUT)
    steps = batches(model.vocabulary, 6, accum=2, pad="right")
    got = dropped(tmp_path, steps, seed=9, clip_norm=clip, tile_rows=50)

    plain = model.in_memory()
    at = [0, 0]

    def before_forward(step: int, micro: int) -> None:
        at[:] = step + 1, micro
        torch.manual_seed(place_seed(9, *at[:1], ENTRY, micro))

    def before_block(index: int) -> None:
        torch.manual_seed(place_seed(9, at[0], index, at[1]))

    for index, block in enumerate(plain.transformer.h):
        block.register_forward_pre_hook(lambda *_, index=index: before_block(index))
    with torch.random.fork_rng(devices=[]):
        losses = train_in_memory(
            plain,
            steps,
            lr=lambda step: 1e-4,
            decay=model.decay,
            weight_decay=0.1,
            max_grad_norm=clip,
            before_forward=before_forward,
        )
    assert got.losses == pytest.approx(losses, rel=1e-5)
    apart = distance(got.weights, final_weights(plain))
    assert apart.relative <= 1e-6
    assert apart.largest <= 1e-5


def test_dropout_is_reproducible_and_seeded(tmp_path: Path) -> None:
    steps = batches(128, 3, accum=2)
    first = dropped(tmp_path / "a", steps, seed=1)
    torch.rand(5)
    again = dropped(tmp_path / "b", steps, seed=1, activation_layers_on_ssd=3, residence=lambda x: scattered(x, 2))
    other = dropped(tmp_path / "c", steps, seed=2)
    without = train(setup(subject("gpt2"), tmp_path / "d", steps), steps)
    assert first.losses == again.losses
    assert_same(first.weights, again.weights)
    assert first.losses[0] != other.losses[0]
    assert first.losses[0] != without.losses[0]


def test_each_micro_batch_and_step_drops_differently(tmp_path: Path) -> None:
    micro = batches(128, 1)[0][0]
    alone = dropped(tmp_path / "a", [[micro]])
    twice = dropped(tmp_path / "b", [[micro, micro]])
    assert twice.losses[0] != pytest.approx(alone.losses[0], rel=1e-7)
    with opened(setup(subject("gpt2", **DROPOUT), tmp_path / "c", [[micro]])) as at:
        losses = [at.engine.step([micro], lr=0.0, save=False).loss for _ in range(2)]
    assert losses[0] != losses[1]


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    steps = batches(128, 2)
    this = setup(subject("gpt2", **DROPOUT), tmp_path, steps, clip_norm=1.0)
    torch.manual_seed(1234)
    expected = torch.rand(4)
    torch.manual_seed(1234)
    with opened(this) as at:
        at.engine.step(steps[0], lr=LR, save=True)
        at.engine.evaluate(steps[1])
        at.engine.step(steps[1], lr=LR, save=True)
        at.engine.save()
    assert torch.equal(torch.rand(4), expected)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    """No parameter stays bound, no block stays replaced, the training flag comes back."""
    model = subject("gpt2", **DROPOUT)
    module: nn.Module = model.layered.module
    steps = batches(128, 1)
    module.eval()
    try:
        with opened(setup(model, tmp_path, steps)) as at:
            at.engine.step(steps[0], lr=LR, save=False)
        assert not module.training
        assert all(p.is_meta for p in module.parameters())
        assert list(module.get_submodule(model.layered.blocks_path)) == model.layered.blocks  # type: ignore[arg-type]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    finally:
        module.train()
