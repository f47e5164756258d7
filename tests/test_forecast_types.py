"""The forecast: binding peaks, the round trip through JSON, and what is said of foreign files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.forecast_types import Forecast, PhaseForecast, StepTime, Suggestion
from memopt.tiers import Category, Tier
from memopt.units import GiB, MiB


def sample() -> Forecast:
    return Forecast(
        job="Llama 1B, full, adamw",
        verdict="does not fit",
        assumptions=("batch 1", "4096 tokens"),
        budgets={"gpu": 8 * GiB},
        phases=(
            PhaseForecast(name="load", use={"gpu": {"weights": 2 * GiB}, "dram": {"weights": 3 * GiB}}),
            PhaseForecast(name="backward", use={"gpu": {"weights": 2 * GiB, "gradients": 7 * GiB}, "dram": {}}),
        ),
        time=StepTime(step_s=1.5, compute_s=1.5, hidden="nothing"),
        suggestions=(
            Suggestion(flag="--method lora", text="adapters", tier=Tier.GPU, saved_bytes=6 * GiB, slow_down=0.8),
        ),
        smallest={"gpu": 900 * MiB},
    )


def test_the_binding_peak_is_the_largest_phase_of_each_tier() -> None:
    forecast = sample()
    assert forecast.binding(Tier.GPU).name == "backward"  # type: ignore[union-attr]
    assert forecast.binding(Tier.DRAM).name == "load"  # type: ignore[union-attr]
    assert forecast.binding(Tier.SSD) is None
    predicted = forecast.predicted()
    assert predicted[Tier.GPU].by_category == {Category.WEIGHTS: 2 * GiB, Category.GRADIENTS: 7 * GiB}
    assert Tier.SSD not in predicted


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    sample().save(file)
    assert Forecast.load(file) == sample()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cut short or not JSON"),
        ("[]", "not a plan"),
        (json.dumps({"schema": "memopt.plan/2"}), "memopt.plan/2"),
        (json.dumps({"schema": "memopt.plan/1"}), "the field 'job' is missing"),
        (json.dumps({**sample().to_dict(), "suggestions": [{"tier": "tape"}]}), "suggestions"),
    ],
)
def test_a_foreign_file_is_refused_with_the_reason(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(BadInput, match=says):
        Forecast.load(file)


def test_a_missing_file_and_a_bad_path(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        Forecast.load(tmp_path / "none.json")
    with pytest.raises(BadInput, match="cannot be written"):
        sample().save(tmp_path / "no" / "such" / "directory.json")
