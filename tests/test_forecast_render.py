"""Plans as tables and Markdown: at 80 columns nothing is cut, and what matters stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from memopt.budget import Budget
from memopt.forecast_types import Forecast
from memopt.machine import Machine
from memopt.planning.advice import advise, inference_knobs
from memopt.planning.forecasts import inference_forecast, peak
from memopt.profiler.forecast_render import markdown, render, render_text
from memopt.tiers import Tier
from memopt.units import MiB, format_bytes
from tests.plan_helpers import MACHINE, generation

BUDGET = Budget(gpu_bytes=540 * MiB, dram_bytes=4000 * MiB)


@pytest.fixture(scope="module")
def forecast() -> Forecast:
    job = generation(device="cuda", batch=16, prompt_tokens=3000, new_tokens=500)
    now = inference_forecast(job, MACHINE, BUDGET)
    return advise(job, now, inference_knobs(), lambda each: inference_forecast(each, MACHINE, BUDGET))


@pytest.mark.parametrize("width", [80, 120])
def test_every_number_is_there_and_nothing_is_cut(forecast: Forecast, width: int) -> None:
    text = render_text(forecast, width)
    assert text.startswith("DOES NOT FIT")
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    phase = forecast.binding(next(iter(forecast.predicted())))
    assert phase is not None
    for nbytes in phase.use["gpu"].values():
        assert format_bytes(nbytes) in text
    for suggestion in forecast.suggestions:
        line = next(line for line in text.splitlines() if line.startswith(suggestion.flag + " "))
        assert format_bytes(suggestion.saved_bytes) in line
        assert ("same" in line) == suggestion.same_result
    assert re.search(r"gpu .*540.00 MiB.*%", text)
    assert "sets the pace" in text
    assert f"--gpu {-(-forecast.smallest['gpu'] // MiB)}MiB" in text
    for assumption in forecast.assumptions:
        assert assumption in " ".join(text.split())


def test_colours_and_bars_on_a_terminal_only(forecast: Forecast) -> None:
    terminal = Console(width=100, force_terminal=True, color_system="standard")
    with terminal.capture() as capture:
        render(forecast, terminal)
    assert "█" in capture.get() and "\x1b[" in capture.get()
    assert "█" not in render_text(forecast) and "\x1b[" not in render_text(forecast)


def test_markdown_tables_are_well_formed(forecast: Forecast) -> None:
    text = markdown(forecast)
    tables = [block for block in text.split("\n\n") if block.lstrip().startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines() if line.startswith("|")}) == 1
    assert "### Does not fit" in text
    assert forecast.suggestions[0].flag in text


def test_a_plan_without_budgets_or_seconds() -> None:
    job = generation()
    bare = inference_forecast(job, Machine(name="bare"), Budget())
    assert bare.verdict == "unbounded"
    text = render_text(bare, 80)
    assert text.startswith("NO BUDGET")
    assert "no limit" in text
    assert "sets the pace" not in text
    assert "seconds not known" in " ".join(text.split())


def test_the_json_is_read_back(forecast: Forecast, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    forecast.save(file)
    assert render_text(Forecast.load(file)) == render_text(forecast)


def test_a_share_above_all_of_it_is_never_called_100_percent() -> None:
    job = generation(device="cuda")
    need = peak(inference_forecast(job, MACHINE, Budget()), Tier.GPU)
    tight = inference_forecast(job, MACHINE, Budget(gpu_bytes=need - 1))
    assert ">100%" in render_text(tight)
