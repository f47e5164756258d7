from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from memopt.errors import BadInput
from memopt.profiler.compare import Change, Comparison, Tolerance, compare
from memopt.profiler.render import render_comparison
from memopt.report_types import DramUse, Report, SsdUse, Tiers
from memopt.units import GiB, KiB, MiB
from tests.report_samples import full_report, sample_report

FIVE = Tolerance.parse("5%")


def report(**changes: Any) -> Report:
    """A report whose DRAM use has these fields."""
    use: dict[str, Any] = {"peak_bytes": 1000 * MiB, "at_peak": {"weights": 900 * MiB, "other": 100 * MiB}, **changes}
    return dataclasses.replace(sample_report("unbounded"), tiers=Tiers(dram=DramUse(**use)), phases=[])


def named(comparison: Comparison, what: str) -> Change:
    (found,) = [change for change in comparison.changes if change.what == what]
    return found


def test_a_report_compared_with_itself_grew_by_nothing() -> None:
    for each in (sample_report(), full_report()):
        comparison = compare(each, each, Tolerance.parse("0%"))
        assert not comparison.over and not comparison.notes
        assert all(not change.grew_bytes for change in comparison.changes)
        assert comparison.verdict() == "nothing grew by more than 0%"


@pytest.mark.parametrize(("peak", "over"), [(1050, False), (1051, True), (900, False)])
def test_a_tier_may_grow_by_the_tolerance_and_no_further(peak: int, over: bool) -> None:
    change = named(compare(report(), report(peak_bytes=peak * MiB), FIVE), "dram")
    assert change.over is over
    assert change.grew_bytes == (peak - 1000) * MiB


def test_a_category_is_allowed_the_tolerance_of_its_tier() -> None:
    def grown(extra: int) -> Change:
        use = {"weights": (900 - extra) * MiB, "other": (100 + extra) * MiB}
        return named(compare(report(), report(at_peak=use), FIVE), "dram other")

    assert not grown(50).over, "half as much again, but five percent of the tier"
    assert grown(51).over


def test_little_is_never_growth_by_share_but_by_bytes() -> None:
    small, more = report(peak_bytes=10 * KiB, at_peak={}), report(peak_bytes=500 * KiB, at_peak={})
    assert not compare(small, more, FIVE).over
    assert compare(small, more, Tolerance.parse("100KiB")).over


def test_phases_are_compared_by_name_and_new_ones_are_not_judged() -> None:
    base, now = full_report(), full_report()
    grown = [
        dataclasses.replace(phase, gpu_peak_bytes=11 * GiB) if phase.name == "backward" else phase
        for phase in now.phases
    ]
    renamed = [dataclasses.replace(phase, name="store") if phase.name == "save" else phase for phase in grown]
    comparison = compare(base, dataclasses.replace(now, phases=renamed), FIVE)
    assert [change.what for change in comparison.over] == ["backward, gpu"]
    assert named(comparison, "backward, gpu").grew_bytes == GiB
    assert (named(comparison, "store, gpu").before, named(comparison, "save, gpu").after) == (None, None)
    assert "GREW: 1 of" in comparison.verdict() and "most: backward, gpu +1.00 GiB" in comparison.verdict()


def test_writes_are_judged_and_reads_through_the_page_cache_are_not() -> None:
    base, now = (
        dataclasses.replace(report(), tiers=Tiers(dram=DramUse(), ssd=SsdUse(**dict.fromkeys(names, nbytes))))
        for names in [("read_bytes", "write_bytes", "process_read_bytes", "process_write_bytes")]
        for nbytes in (GiB, 2 * GiB)
    )
    comparison = compare(base, now, FIVE)
    assert {change.what for change in comparison.over} == {"read by memopt", "written by memopt", "written by the job"}
    assert named(comparison, "read by the job").grew_bytes == GiB


def test_a_tier_that_was_not_there_has_grown_from_nothing() -> None:
    with_gpu = dataclasses.replace(full_report(), phases=[])
    without = dataclasses.replace(with_gpu, tiers=dataclasses.replace(with_gpu.tiers, gpu=None))
    assert named(compare(without, with_gpu, FIVE), "gpu").over
    gone = named(compare(with_gpu, without, FIVE), "gpu")
    assert gone.after == 0 and not gone.over


def test_what_makes_them_hard_to_compare_is_noted() -> None:
    base = sample_report()
    now = dataclasses.replace(
        base,
        machine=dataclasses.replace(base.machine, name="other", gpu_name="A100"),
        command=["memopt", "demo"],
        config={**base.config, "lr": 2e-4, "seed": 1},
        memopt="0.2.0",
        complete=False,
        tiers=dataclasses.replace(base.tiers, dram=dataclasses.replace(base.tiers.dram, attributed_by="torch")),
    )
    comparison = compare(base, now, FIVE)
    assert comparison.notes == (
        "different machines: box, now other with A100",
        "different jobs: memopt finetune, now memopt demo",
        "different settings: lr, seed",
        "different versions of memopt: 0.1.0, now 0.2.0",
        "the new report is incomplete: its peaks may be too low",
        "dram: attributed by nobody, now torch; categories are not compared",
    )
    assert not [change for change in comparison.changes if change.what.startswith("dram ")]


def test_the_table_has_a_row_per_change_and_the_time() -> None:
    stream = io.StringIO()
    comparison = compare(report(), report(peak_bytes=1200 * MiB), FIVE)
    render_comparison(comparison, Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "GREW: 1 of 3 by more than 5%; most: dram +200.00 MiB"
    rows = [" ".join(line.split()) for line in lines]
    assert "dram 1000.00 MiB 1.17 GiB +200.00 MiB +20.0% OVER" in rows
    assert "dram weights 900.00 MiB 900.00 MiB 0 B +0.0% fine" in rows
    assert "time 12.50 s 12.50 s - +0.0% -" in rows
    assert stream.getvalue().isascii()


@pytest.mark.parametrize("text", ["5", "-5%", "five", "", "5 percent"])
def test_a_tolerance_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="tolerance"):
        Tolerance.parse(text)


@pytest.mark.parametrize(("text", "allowed"), [("5%", 50 * MiB), ("0.5%", 5 * MiB), ("0%", MiB), ("3KiB", 3 * KiB)])
def test_tolerances_in_share_and_bytes(text: str, allowed: int) -> None:
    assert Tolerance.parse(text).allowed_bytes(1000 * MiB) == allowed
