from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from memopt.profiler.render import render, render_text
from memopt.report_types import ChildUse, DramUse, Tiers
from memopt.units import MiB
from tests.report_samples import full_report, sample_report


def row(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return " ".join(found.split())


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_verdict_and_its_reason_stand_first() -> None:
    assert render_text(sample_report()).startswith("within budget: dram 960.00 MiB of 1.00 GiB\n")
    over = render_text(sample_report("over", 1536 * MiB))
    assert over.startswith("OVER BUDGET: dram peaked at 1.50 GiB, 512.00 MiB over its 1.00 GiB\n")
    bare = dataclasses.replace(sample_report("unbounded"), tiers=Tiers(dram=DramUse(peak_bytes=MiB)))
    assert render_text(bare).startswith("no budget was given: dram peaked at 1.00 MiB\n")


def test_a_kill_by_the_kernel_is_the_verdict() -> None:
    child = ChildUse(exit_code=137, signal="SIGKILL", killed_for_memory=True, evidence="/sys/fs/cgroup/memory.events")
    text = render_text(dataclasses.replace(sample_report("over"), child=child))
    assert text.startswith("OVER BUDGET: the kernel killed the job for memory (/sys/fs/cgroup/memory.events)")
    assert "left with exit code 137, ended by SIGKILL" in text
    counted = dataclasses.replace(sample_report("over"), tiers=Tiers(dram=DramUse(peak_bytes=1, oom_kills=2)))
    assert "the kernel killed 2 process(es)" in render_text(counted).splitlines()[0]


def test_a_job_that_failed_within_its_budget_is_told_apart() -> None:
    failed = dataclasses.replace(sample_report(), child=ChildUse(exit_code=3))
    first = render_text(failed).splitlines()[0]
    assert first == "within budget: dram 960.00 MiB of 1.00 GiB; the job itself failed (exit code 3)"
    done = dataclasses.replace(sample_report(), child=ChildUse(exit_code=0))
    assert "failed" not in render_text(done)


def test_a_tier_shows_budget_prediction_peak_error_and_verdict() -> None:
    text = render_text(sample_report())
    assert row(text, "dram  ") == "dram 1.00 GiB 900.00 MiB 960.00 MiB -6.2% #########. 94% within"
    assert row(text, "ssd  ") == "ssd - - 5.00 GiB - - -"
    assert "gpu" not in text, "a tier that was not used takes no row"
    assert row(render_text(sample_report("over", 1536 * MiB)), "dram  ").endswith("########## 150% OVER")


def test_categories_are_predicted_and_measured_with_other_always_and_empty_ones_never() -> None:
    text = render_text(sample_report())
    assert row(text, "weights") == "weights 900.00 MiB 500.00 MiB +80.0% 52%"
    assert [words(line) for line in text.splitlines() if line.startswith("other")] == [
        "other - 160.00 MiB - 17%",
        "other 5.00 GiB 100%",
    ]
    assert "kv_cache" not in text
    tiers = Tiers(dram=DramUse(peak_bytes=0, at_peak={"weights": 0, "other": 0}))
    assert row(render_text(dataclasses.replace(sample_report(), tiers=tiers)), "other") == "other 0 B"


def test_more_charged_than_touched_shows_below_zero() -> None:
    use = DramUse(peak_bytes=MiB, at_peak={"weights": 3 * MiB, "other": -2 * MiB}, predicted_at_peak={"other": MiB})
    text = render_text(dataclasses.replace(sample_report(), tiers=Tiers(dram=use)))
    assert row(text, "other") == "other 1.00 MiB -2.00 MiB -200%"


def test_phases_of_one_name_are_one_row() -> None:
    text = render_text(full_report())
    assert row(text, "backward") == "backward 4 8.00 s 10.00 GiB 7.00 GiB 2.00 GiB 1.00 GiB"


def test_container_devices_disks_child_and_watching_are_told() -> None:
    text = words(render_text(full_report()))
    for fact in (
        "container: limit 32.00 GiB (/sys/fs/cgroup/job/memory.max); working set 8.00 GiB at the most; kernel's mark "
        "12.00 GiB, page cache included; 0 killed for memory",
        "0 NVIDIA GeForce RTX 4090 11.00 GiB 10.00 GiB 10.00 GiB 9.00 GiB 1.00 GiB",
        "nvme0n1 5.00 GiB 6.00 GiB 200 us 1.0 ms 3.5",
        "job: left with exit code 137, ended by SIGKILL",
        "watching: 1000 samples, 0.120 s of CPU time (0.60% of the run), 3.00 MiB resident",
        "try again 2 time(s)",
        "50% of the 4.00 GiB that may be written",
        "at the peak: 9.50 GiB allocated, 300.00 MiB cached, 400.00 MiB non torch",
    ):
        assert fact in text
    assert "incomplete" not in text
    assert "the profiler itself was killed" in render_text(dataclasses.replace(full_report(), complete=False))


def test_eighty_columns_are_enough_and_no_cell_is_cut() -> None:
    text = render_text(full_report(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert words(text) == words(render_text(full_report(), width=200))


def test_facts_results_reasons_and_notes() -> None:
    text = words(render_text(sample_report()))
    assert "upper bound is 1.17 GiB" in text
    assert "800.00 MiB charged" in text
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
