"""Where things live, and with how many buffers, changes no bit of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memopt.offload.layout import Layout
from memopt.plan_types import Residence
from memopt.tiers import Tier
from tests.offload_helpers import (
    IN_DRAM,
    ON_SSD,
    Steps,
    Trained,
    assert_same,
    batches,
    distance,
    everywhere,
    one_thread,  # noqa: F401
    opened,
    scattered,
    setup,
    subject,
    train,
)

RUNS = (("llama", 0.05), ("llama_tied", 0.0), ("llama_tied", 0.05))
LAYERS = 3


def data() -> Steps:
    return batches(128, 3, accum=2, pad="left", shapes=((2, 16), (1, 24)))


@pytest.fixture(scope="module", params=RUNS, ids=lambda p: f"{p[0]}-clip{p[1]}")
def reference(request: Any) -> tuple[str, float, Trained]:
    """The same three steps with everything in DRAM and no store at all."""
    family, clip = request.param
    torch.set_num_threads(1)
    this = setup(subject(family), None, data(), clip_norm=clip, residence=lambda layout: everywhere(layout, IN_DRAM))
    return family, clip, train(this, data())


CHOICES: dict[str, dict[str, Any]] = {
    "all on SSD": {},
    "all in DRAM, saved": {"residence": lambda layout: everywhere(layout, IN_DRAM)},
    "scattered 1": {"residence": lambda layout: scattered(layout, 1)},
    "scattered 2, more of everything": {
        "residence": lambda layout: scattered(layout, 2),
        "block_slots": 3,
        "head_slots": 2,
        "gradient_slots": 2,
        "head_gradient_slots": 2,
        "ring_buffers": 4,
        "activation_layers_on_ssd": 1,
    },
    "scattered 3": {"residence": lambda layout: scattered(layout, 3), "activation_layers_on_ssd": 2},
    # nothing of the blocks passes the ring, so that the read-ahead comes to the tables at once
    "tables on SSD": {
        "residence": lambda layout: everywhere(layout, IN_DRAM) | {u.name: ON_SSD for u in layout.tables}
    },
    "one ring buffer, activations on SSD": {"ring_buffers": 1, "activation_layers_on_ssd": LAYERS},
    "SSD, many slots": {"block_slots": LAYERS, "gradient_slots": LAYERS, "ring_buffers": 8, "save_every": 3},
}


@pytest.mark.parametrize("name", CHOICES)
def test_placement_changes_no_bit(name: str, reference: tuple[str, float, Trained], tmp_path: Path) -> None:
    family, clip, expected = reference
    choice = dict(CHOICES[name])
    every = choice.get("save_every", 1)
    got = train(setup(subject(family), tmp_path, data(), clip_norm=clip, **choice), data(), save_every=every)
    assert got.losses == expected.losses
    assert got.norms == expected.norms
    assert_same(got.weights, expected.weights)


@pytest.mark.parametrize("tile_rows", [127, 20])
def test_tiles_change_only_roundings(tile_rows: int, reference: tuple[str, float, Trained], tmp_path: Path) -> None:
    family, clip, expected = reference
    this = setup(subject(family), tmp_path, data(), clip_norm=clip, tile_rows=tile_rows)
    assert len(this.layout.head) == -(-128 // tile_rows)
    got = train(this, data())
    assert got.losses == pytest.approx(expected.losses, rel=1e-6)
    apart = distance(got.weights, expected.weights)
    assert apart.relative <= 1e-7
    assert apart.largest <= 1e-5


def test_tiles_placed_apart_change_no_bit_among_themselves(tmp_path: Path) -> None:
    """With tiles the slots of the head are visited twice, in opposite orders."""
    model = subject("llama_tied")
    runs = []
    for seed, slots in ((11, 1), (12, 2), (13, 4)):
        this = setup(
            model,
            tmp_path / str(seed),
            data(),
            clip_norm=0.05,
            tile_rows=30,
            head_slots=slots,
            head_gradient_slots=1 + seed % 2,
            residence=lambda layout, seed=seed: scattered(layout, seed),
        )
        runs.append(train(this, data()))
    for other in runs[1:]:
        assert other.losses == runs[0].losses
        assert_same(other.weights, runs[0].weights)


def test_tokens_of_the_loss_change_only_roundings() -> None:
    def run(tokens: int) -> Trained:
        this = setup(
            subject("llama"), None, data(), loss_tokens=tokens, residence=lambda layout: everywhere(layout, IN_DRAM)
        )
        return train(this, data())

    expected = run(61)
    for tokens in (3, 1000):
        assert distance(run(tokens).weights, expected.weights).relative <= 1e-7


def test_what_lives_in_dram_is_not_read_in_a_step(tmp_path: Path) -> None:
    """Placement is real: all weights in DRAM, so only moments move; without a save nothing else is written."""
    model = subject("llama")

    def only_moments_on_ssd(layout: Layout) -> dict[str, Residence]:
        moments_out = Residence(weights=Tier.DRAM, moments=Tier.SSD, gradient=Tier.DRAM)
        return everywhere(layout, IN_DRAM) | {"block.1": moments_out}

    this = setup(model, tmp_path, data(), residence=only_moments_on_ssd)
    record = this.layout.blocks[1].record_bytes
    with opened(this) as at:
        before = at.pool.read_bytes, at.pool.written_bytes
        at.engine.step(data()[0], lr=1e-4, save=False)
        at.engine.flush()
        assert (at.pool.read_bytes - before[0], at.pool.written_bytes - before[1]) == (record, record)
