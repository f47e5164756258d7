"""Presets of every kind, streamed: the same bits wherever things live, and after an abandoned run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.offload_helpers import (
    IN_DRAM,
    Setup,
    Trained,
    assert_same,
    everywhere,
    one_thread,  # noqa: F401
    opened,
    rules_of,
    run_steps,
    scattered,
    setup,
    subject,
    train,
)
from tests.test_offload_presets import TINY_NORM, data, lr_of, options_of

PLACES: dict[str, dict[str, Any]] = {
    "ssd": {"ring_buffers": 1, "activation_layers_on_ssd": 2},
    "mixed": {"residence": lambda layout: scattered(layout, 4), "ring_buffers": 3, "gradient_slots": 2},
    "other mix": {"residence": lambda layout: scattered(layout, 9)},
    "dram": {"residence": lambda layout: everywhere(layout, IN_DRAM)},
}
EACH_KIND = (("llama", "adamw8bit", 0.0), ("gpt2", "muon_vo_ffn", TINY_NORM), ("mixtral", "galore8bit", TINY_NORM),
             ("llama_tied", "galore_muon", 0.0))  # fmt: skip


@pytest.mark.parametrize(("family", "preset", "clip"), EACH_KIND)
def test_placement_changes_no_bit(family: str, preset: str, clip: float, tmp_path: Path) -> None:
    model = subject(family)
    steps = data(model, 4)
    runs: list[Trained] = []
    for name, choice in PLACES.items():
        this = setup(
            model,
            tmp_path / name,
            steps,
            clip_norm=clip,
            rule=rules_of(model, preset, **options_of(model, preset)),
            **choice,
        )
        runs.append(train(this, steps, lr=lr_of(preset), save_every=1))
    for other in runs[1:]:
        assert other.losses == runs[0].losses
        assert_same(other.weights, runs[0].weights)


@pytest.mark.parametrize(("family", "preset", "clip"), EACH_KIND)
def test_an_abandoned_run_goes_on_to_the_same_bits(family: str, preset: str, clip: float, tmp_path: Path) -> None:
    """In the middle of a cycle of GaLore: the subspace, and when to look for it, are part of the state."""
    model = subject(family)
    steps = data(model, 6)

    def at(name: str, place: str) -> Setup:
        choice = PLACES[place]
        return setup(
            model,
            tmp_path / name,
            steps,
            clip_norm=clip,
            rule=rules_of(model, preset, **options_of(model, preset)),
            **choice,
        )

    whole = train(at("whole", "mixed"), steps, lr=lr_of(preset), save_every=1)
    for place in ("ssd", "dram"):
        this = at(f"cut {place}", place)
        with opened(this) as open_:
            run_steps(open_.engine, steps[:3], lr=lr_of(preset), save_every=1)
        rest = train(at(f"cut {place}", "other mix"), steps, lr=lr_of(preset))
        assert 3 <= len(rest.losses) <= 4
        assert rest.losses == whole.losses[-len(rest.losses) :]
        assert_same(rest.weights, whole.weights)
