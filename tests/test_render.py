from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from memopt.profiler.render import render, render_text
from memopt.report_types import DramUse
from memopt.units import MiB
from tests.report_samples import sample_report


def row(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return " ".join(found.split())


def test_a_tier_shows_budget_prediction_charge_peak_and_verdict() -> None:
    text = render_text(sample_report())
    assert row(text, "dram ") == "dram 1.00 GiB 900.00 MiB 800.00 MiB 960.00 MiB ###############. 94% within"
    assert row(text, "ssd ") == "ssd - - 5.00 GiB 5.00 GiB - -"
    assert "gpu" not in text, "a tier that was not used takes no row"


def test_categories_show_other_always_and_empty_ones_never() -> None:
    text = render_text(sample_report())
    assert row(text, "weights") == "weights 500.00 MiB 0 B"
    assert row(text, "other") == "other 160.00 MiB 0 B"
    assert "kv_cache" not in text
    report = sample_report()
    bare = dataclasses.replace(report, tiers=dataclasses.replace(report.tiers, dram=DramUse(), ssd=None))
    assert row(render_text(bare), "other") == "other 0 B"


def test_over_budget_cannot_be_overlooked() -> None:
    text = render_text(sample_report("over", 1536 * MiB))
    assert text.startswith("OVER BUDGET")
    assert row(text, "dram ").endswith("################ 150% OVER")


def test_facts_results_reasons_and_notes() -> None:
    text = render_text(sample_report())
    assert "upper bound is 1.17 GiB" in text
    assert "io: 1.25 GiB/s (768.00 MiB/s read, 512.00 MiB/s written)" in text
    assert "compute waited 1.50 s" in text
    assert "0.1953% of the drive's endurance" in text
    assert "losses: 5, 4, 3.5, ..., 2.8, 2.6, 2.5 (8 values)" in text
    assert "reason: state on SSD" in text
    assert "note: seed 0" in text


def test_not_a_terminal_is_plain_text_and_a_terminal_is_not() -> None:
    plain, pretty = io.StringIO(), io.StringIO()
    render(sample_report(), Console(file=plain, width=120))
    render(sample_report(), Console(file=pretty, width=120, force_terminal=True, color_system="standard"))
    assert plain.getvalue().isascii()
    assert "\x1b" not in plain.getvalue()
    assert "█" in pretty.getvalue()
    assert "\x1b" in pretty.getvalue()


def test_square_brackets_in_text_are_not_markup() -> None:
    report = dataclasses.replace(sample_report(), reasons=["keeps [red]this[/red]"])
    assert "keeps [red]this[/red]" in render_text(report)
