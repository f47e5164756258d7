"""What the formulas of memopt.offload.costs say is what moves through the pool and what the ledger is charged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memopt.offload.costs import Choice, JobSizes, Traffic, memory, scratch_bytes, traffic
from memopt.offload.engine import Engine
from memopt.offload.layout import Layout
from memopt.offload.storage import state_bytes
from memopt.offload.updater import update_scratch_bytes
from memopt.optim.chunked import ChunkRule
from memopt.optim.codecs import Codec
from memopt.plan_types import Residence
from memopt.tiers import Category, Tier
from memopt.units import MiB
from tests.offload_helpers import (
    IN_DRAM,
    Setup,
    Steps,
    Subject,
    batches,
    config_of,
    everywhere,
    one_thread,  # noqa: F401
    opened,
    rules_of,
    setup,
)

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "vocab_size": 1000,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
}
UNCHARGED = 12 * MiB
"""Working memory that is predicted but has no lease: the bounce buffer of row reads and a chunk of zeros."""


@pytest.fixture(scope="module")
def untied() -> Subject:
    return Subject(config_of("llama", **WIDE))


@pytest.fixture(scope="module")
def tied() -> Subject:
    return Subject(config_of("llama_tied", **WIDE))


def sizes(this: Setup) -> JobSizes:
    return JobSizes(
        clips=this.clip_norm > 0,
        tokens=this.max_tokens,
        width=this.subject.width,
        compute_dtype=this.compute_dtype,
        on_gpu=False,
        forward_bytes=0,
        backward_bytes=0,
        calls_bytes=0,
        runtime_bytes=0,
    )


def choice(this: Setup) -> Choice:
    return Choice.of(this.plan)


def measured(this: Setup, steps: Steps, *, save_every: int = 1) -> Traffic:
    """Bytes per step in the steady state. A clipped step ends when its gradients are held and the update of the step
    before is written; an unclipped one is followed by a flush, which waits for its own."""

    def settle(engine: Engine) -> None:
        if not engine.clips:
            engine.flush()

    with opened(this) as at:
        engine = at.engine
        engine.step(steps[0], lr=1e-4, save=save_every == 1)
        settle(engine)
        read, written = at.pool.read_bytes, at.pool.written_bytes
        for index, micros in enumerate(steps[1:], start=2):
            engine.step(micros, lr=1e-4, save=index % save_every == 0)
        settle(engine)
        count = len(steps) - 1
        return Traffic((at.pool.read_bytes - read) // count, (at.pool.written_bytes - written) // count)


def whole_vocabulary(vocabulary: int, steps: int) -> Steps:
    """Every token once a step: all rows of the input table are read (how well few rows merge depends on chance)."""
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1)).view(4, -1)
    return [[{"input_ids": ids, "labels": ids}] for _ in range(steps)]


def half(layout: Layout) -> dict[str, Residence]:
    """Weights of one block, moments of another, gradients of a third and the head in DRAM."""
    return everywhere(layout, Residence()) | {
        "block.0": Residence(weights=Tier.DRAM),
        "block.1": Residence(moments=Tier.DRAM),
        "block.2": Residence(gradient=Tier.DRAM),
        layout.head[0].name: Residence(weights=Tier.DRAM),
    }


def with_rules(model: Subject, case: dict[str, Any]) -> dict[str, Any]:
    """The case with the rules of its `preset`, if it has one, at a rank of half the width."""
    case = dict(case)
    preset = case.pop("preset", None)
    return case if preset is None else {**case, "rule": rules_of(model, preset, rank=128)}


CASES: dict[str, dict[str, Any]] = {
    "fused update": {},
    "clipped": {"clip_norm": 0.1},
    "clipped, bfloat16 state": {"clip_norm": 0.1, "rule": ChunkRule(codec=Codec.BF16)},
    "tiles and activations on SSD": {"tile_rows": 350, "activation_layers_on_ssd": 2, "clip_norm": 0.1},
    "half in DRAM": {"residence": half, "clip_norm": 0.1},
    "8-bit state": {"preset": "adamw8bit"},
    "matrices": {"preset": "muon_vo_ffn"},
    "matrices, clipped": {"preset": "galore8bit", "clip_norm": 0.1, "residence": half},
}


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_traffic_is_what_was_predicted(name: str, kind: str, tmp_path: Path, request: Any) -> None:
    model = request.getfixturevalue(kind)
    steps = whole_vocabulary(model.vocabulary, 2)
    this = setup(model, tmp_path, steps, loss_tokens=256, **with_rules(model, CASES[name]))
    predicted = traffic(sizes(this), this.layout, choice(this), 1)
    got = measured(this, steps)
    assert got.read_bytes == pytest.approx(predicted.read_bytes, rel=0.01)
    assert got.write_bytes == pytest.approx(predicted.write_bytes, rel=0.01)


def test_everything_in_dram_writes_only_saves(untied: Subject, tmp_path: Path) -> None:
    steps = batches(untied.vocabulary, 5, shapes=((1, 32),))
    this = setup(untied, tmp_path, steps, residence=lambda layout: everywhere(layout, IN_DRAM), save_every=2)
    predicted = traffic(sizes(this), this.layout, choice(this), 2)
    got = measured(this, steps, save_every=2)
    assert got.read_bytes == predicted.read_bytes == 0
    assert got.write_bytes == pytest.approx(predicted.write_bytes, rel=0.01)


def test_bytes_per_parameter_are_those_of_the_textbook(untied: Subject, tmp_path: Path) -> None:
    """Fused: 16 read and 12 written; exact clipping: 20 and 16. The last block and the head are read once, not twice,
    and the input table (few rows, then once through the ring) is read less too."""
    steps = batches(untied.vocabulary, 1)
    for clip, read, write in ((0.0, 16, 12), (1.0, 20, 16)):
        this = setup(untied, tmp_path / str(clip), steps, clip_norm=clip)
        embed, *rest = (sum(u.params for u in units) for units in (this.layout.embed, this.layout.blocks))
        moved = traffic(sizes(this), this.layout, choice(this), 1)
        blocks, head = rest[0], embed
        once = 4 * (blocks // 3 + head)
        # the input table: no dense gradient is ever stored
        tables = (8 + 4) * embed
        assert moved.read_bytes == pytest.approx(read * (blocks + head) - once + tables, rel=0.01)
        assert moved.write_bytes == pytest.approx(write * (blocks + head) + 12 * embed, rel=0.01)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_traffic_does_not_grow_with_accumulation(clip: float, untied: Subject, tmp_path: Path) -> None:
    def bytes_at(accum: int) -> int:
        steps = batches(untied.vocabulary, 2, accum=accum, shapes=((1, 32),))
        got = measured(setup(untied, tmp_path / str(accum), steps, clip_norm=clip), steps)
        return got.read_bytes + got.write_bytes

    assert bytes_at(8) <= 1.1 * bytes_at(1)


MEMORY: dict[str, dict[str, Any]] = {
    "frugal": {"activation_layers_on_ssd": 3},
    "clipped, slots": {"clip_norm": 0.1, "block_slots": 3, "gradient_slots": 2, "ring_buffers": 3},
    "half in DRAM": {"residence": half, "clip_norm": 0.1, "activation_layers_on_ssd": 1},
    "everything in DRAM": {"residence": lambda layout: everywhere(layout, IN_DRAM), "clip_norm": 0.1},
    "tiles": {"tile_rows": 300, "rule": ChunkRule(codec=Codec.BF16)},
    "bfloat16 compute": {"compute_dtype": torch.bfloat16, "clip_norm": 0.1},
    "8-bit state": {"preset": "lion8bit", "clip_norm": 0.1},
    "matrices": {"preset": "muon"},
    "matrices, clipped": {"preset": "galore", "clip_norm": 0.1, "ring_buffers": 3},
    "matrices, half in DRAM": {"preset": "muon8bit", "clip_norm": 0.1, "residence": half},
}


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("name", MEMORY)
def test_the_ledger_is_charged_what_was_predicted(name: str, kind: str, tmp_path: Path, request: Any) -> None:
    model = request.getfixturevalue(kind)
    steps = batches(model.vocabulary, 2, accum=2, shapes=((1, 48),))
    this = setup(model, tmp_path, steps, **with_rules(model, MEMORY[name]))
    predicted = memory(sizes(this), this.layout, choice(this))[Tier.DRAM]
    with opened(this) as at:
        for micros in steps:
            at.engine.step(micros, lr=1e-4, save=True)
        at.engine.save()
        charged, total = at.ledger.at_peak(Tier.DRAM), at.ledger.peak_bytes(Tier.DRAM)
    for category in Category:
        assert charged[category] <= predicted.get(category, 0), category
    # what has no lease: the rows of the input table, the logits and the compute copies of bfloat16
    rows = min(this.max_tokens, model.vocabulary) * model.width * 4 * 3
    logits = this.plan.loss_tokens * (3 * model.vocabulary + 4 * model.width) * 4
    copies = 0 if this.compute_dtype == torch.float32 else 2 * max(u.numel for u in this.layout.units)
    assert sum(predicted.values()) <= 1.03 * total + UNCHARGED + rows + logits + copies + update_scratch_bytes(
        this.layout
    )
    assert predicted[Category.OPTIMIZER] == charged[Category.OPTIMIZER]


@pytest.mark.parametrize("name", ["frugal", "half in DRAM", "matrices", "8-bit state"])
def test_files_take_what_was_predicted(name: str, untied: Subject, tmp_path: Path) -> None:
    steps = batches(untied.vocabulary, 1)
    this = setup(untied, tmp_path, steps, **with_rules(untied, MEMORY[name]))
    with opened(this) as at:
        at.engine.step(steps[0], lr=1e-4, save=True)
        files = [f for f in tmp_path.rglob("*") if f.is_file()]
        on_disk = sum(f.stat().st_blocks * 512 for f in files)
    predicted = state_bytes(this.layout) + scratch_bytes(sizes(this), this.layout, choice(this))
    assert on_disk == pytest.approx(predicted, rel=0.02)


def test_closing_gives_everything_back(untied: Subject, tmp_path: Path) -> None:
    steps = batches(untied.vocabulary, 1)
    this = setup(untied, tmp_path, steps, clip_norm=0.1, activation_layers_on_ssd=2)
    with opened(this) as at:
        at.engine.step(steps[0], lr=1e-4, save=True)
        assert at.ledger.charged_bytes(Tier.DRAM) > 0
        at.engine.close()
        assert at.ledger.charged_bytes(Tier.DRAM) == 0
