from __future__ import annotations

import dataclasses

import pytest

from memopt.budget import Budget
from memopt.ledger import Ledger
from memopt.machine import Machine
from memopt.plan_types import Prediction
from memopt.profiler.assemble import IoTotals, Story, assemble
from memopt.profiler.measured import Measured
from memopt.report_types import Report
from memopt.tiers import Category, Tier

MACHINE = Machine(name="box", ssd_endurance_bytes=10_000, notes=("a machine's note",))
MEASURED = Measured(
    started="2026-01-02T03:04:05+00:00",
    wall_s=10.0,
    dram_peak_bytes=900,
    dram_start_bytes=100,
    dram_upper_bound_bytes=1100,
    file_peak_bytes=200,
    gpu_peak_bytes=None,
    ssd_peak_bytes=None,
    process_read_bytes=5,
    process_write_bytes=6,
    oom_kills=0,
    samples=50,
    cost_s=0.1,
)


def charged(budget: Budget) -> Ledger:
    ledger = Ledger(budget)
    ledger.charge(Tier.DRAM, Category.WEIGHTS, 400, "w")
    with ledger.charge(Tier.DRAM, Category.BUFFERS, 300, "b"):
        pass
    return ledger


def test_measured_charged_and_predicted_stand_side_by_side() -> None:
    story = Story(
        command=["memopt"],
        predicted={Tier.DRAM: Prediction(by_category={Category.WEIGHTS: 500, Category.RUNTIME: 350})},
        results={"steps": 3},
        config={"lr": 1.0},
        reasons=["because"],
        notes=["noted"],
    )
    report = assemble(MEASURED, charged(Budget(dram_bytes=1000)), MACHINE, story)
    dram = report.tiers.dram
    assert (dram.budget_bytes, dram.peak_bytes, dram.predicted_bytes, dram.charged_peak_bytes) == (1000, 900, 850, 700)
    assert (dram.upper_bound_bytes, dram.file_bytes) == (1100, 200)
    assert dram.within is True
    assert report.verdict == "within"
    assert dram.at_peak["weights"] == 400
    assert dram.at_peak["other"] == 200, "measured - charged"
    assert sum(dram.at_peak.values()) == dram.peak_bytes
    assert dram.predicted_at_peak == {"weights": 500, "runtime": 350}
    assert report.tiers.gpu is None
    assert report.tiers.ssd is None
    assert report.results == {"steps": 3}
    assert report.config == {"lr": 1.0}
    assert report.reasons == ["because"]
    assert report.notes == ["a machine's note", "noted"]
    assert report.overhead is not None and report.overhead.samples == 50
    assert Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize(("budget", "verdict"), [(900, "within"), (899, "over"), (None, "unbounded")])
def test_the_verdict_is_about_the_measured_peak(budget: int | None, verdict: str) -> None:
    ledger = Ledger(Budget(dram_bytes=budget))
    assert assemble(MEASURED, ledger, MACHINE, Story()).verdict == verdict


def test_a_kill_by_the_kernel_is_never_within() -> None:
    killed = dataclasses.replace(MEASURED, oom_kills=1)
    report = assemble(killed, Ledger(Budget(dram_bytes=1000)), MACHINE, Story())
    assert report.verdict == "over"
    assert "killed 1 process" in report.notes[-1]


def test_gpu_and_ssd_appear_when_used() -> None:
    measured = dataclasses.replace(MEASURED, gpu_peak_bytes=70, ssd_peak_bytes=50)
    ledger = Ledger(Budget(gpu_bytes=60))
    io = IoTotals(read_bytes=400, write_bytes=100, busy_s=2.0, waited_s=0.5)
    report = assemble(measured, ledger, MACHINE, Story(predicted_write_bytes=120), io)
    assert report.verdict == "over"
    assert report.tiers.gpu is not None
    assert report.tiers.gpu.within is False
    ssd = report.tiers.ssd
    assert ssd is not None
    assert (ssd.peak_bytes, ssd.read_bytes, ssd.write_bytes, ssd.predicted_write_bytes) == (50, 400, 100, 120)
    assert (ssd.process_read_bytes, ssd.process_write_bytes, ssd.endurance_bytes) == (5, 6, 10_000)
    assert (report.io.read_per_s, report.io.write_per_s, report.io.achieved_per_s) == (200, 50, 250)
    assert (report.io.waited_s, report.io.busy_s) == (0.5, 2.0)


def test_a_budgeted_tier_nothing_was_put_on_is_shown() -> None:
    report = assemble(MEASURED, Ledger(Budget(gpu_bytes=60)), MACHINE, Story())
    assert report.tiers.gpu is not None
    assert report.tiers.gpu.within is None
    assert report.verdict == "unbounded", "nothing was measured against a budget"
