"""Seconds of work counted by hand on a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from memopt.machine import Machine
from memopt.planning.timing import MATRIX_SHARE, Work, missing_speeds, step_time
from tests.plan_helpers import MACHINE

TFLOP, GB = 10**12, 10**9


def seconds(work: Work, machine: Machine = MACHINE, **settings: Any) -> Any:
    return step_time(work, machine, **{"device": "cuda", "dtype": "bfloat16", **settings})


def test_products_run_at_half_of_the_rate() -> None:
    time = seconds(Work(flops=100 * TFLOP, tokens=10))
    assert time.step_s == time.compute_s == pytest.approx(100 / (200 * MATRIX_SHARE))
    assert time.tokens_per_s == pytest.approx(10.0)
    assert time.bound == "compute"


def test_the_device_decides_which_speeds_count() -> None:
    work = Work(flops=TFLOP)
    assert seconds(work, device="cpu", dtype="float32").step_s == pytest.approx(1.0)
    assert seconds(work).step_s == pytest.approx(0.01)
    assert seconds(work, dtype="float32").step_s == pytest.approx(0.08)


def test_few_tokens_wait_for_the_weights() -> None:
    time = seconds(Work(flops=TFLOP, memory_bytes=500 * GB))
    assert time.step_s == pytest.approx(0.5)
    assert "reading weights from memory 500.0 ms" in time.hidden
    assert time.bound == "memory"


@pytest.mark.parametrize(
    ("work", "bound", "step_s"),
    [
        (Work(flops=300 * TFLOP, ssd_read_bytes=5 * GB, ssd_write_bytes=2 * GB), "compute", 3.0),
        (Work(flops=100 * TFLOP, ssd_read_bytes=5 * GB, ssd_write_bytes=2 * GB), "ssd", 2.0),
        (Work(flops=100 * TFLOP, to_device_bytes=20 * GB, from_device_bytes=30 * GB), "transfer", 3.0),
        (Work(flops=150 * TFLOP, to_device_bytes=20 * GB, ssd_read_bytes=5 * GB, overlap="none"), "compute", 3.5),
    ],
)
def test_the_longest_hides_the_others(work: Work, bound: str, step_s: float) -> None:
    time = seconds(work)
    assert time.step_s == pytest.approx(step_s)
    assert time.step_s == pytest.approx(max(time.compute_s, time.transfer_s, time.ssd_s)) or work.overlap == "none"
    assert time.bound == bound


def test_an_update_on_the_processor_runs_beside_the_gpu() -> None:
    work = Work(flops=100 * TFLOP, update_bytes=100 * GB, update_on_host=True)
    assert seconds(work).step_s == pytest.approx(2.0)
    # a processor that computes the products too comes to it afterwards
    both = replace(work, flops=TFLOP)
    assert seconds(both, device="cpu", dtype="float32").step_s == pytest.approx(1.0 + 2.0)
    assert seconds(replace(work, overlap="update last")).step_s == pytest.approx(1.0 + 2.0)


def test_an_update_on_the_gpu_comes_after_the_products() -> None:
    work = Work(flops=100 * TFLOP, update_bytes=1000 * GB, update_flops=50 * TFLOP)
    assert seconds(work).step_s == pytest.approx(2.0)
    assert "one after the other" in seconds(work).hidden


@pytest.mark.parametrize(
    ("work", "field"),
    [
        (Work(flops=1), "gpu_flops"),
        (Work(memory_bytes=1), "gpu_memory_per_s"),
        (Work(to_device_bytes=1), "h2d_per_s"),
        (Work(ssd_read_bytes=1), "ssd_read_per_s"),
    ],
)
def test_a_speed_that_is_not_known_is_not_made_up(work: Work, field: str) -> None:
    lacking = replace(MACHINE, **{field: None})
    assert seconds(work, lacking) is None
    assert field in missing_speeds(lacking, device="cuda")
    # what is not needed may be unknown
    assert seconds(Work(flops=1, memory_bytes=1), replace(MACHINE, ssd_read_per_s=None)) is not None


def test_unified_memory_has_no_link() -> None:
    machine = replace(MACHINE, unified=True, gpu_bytes=None, h2d_per_s=None, d2h_per_s=None)
    assert seconds(Work(to_device_bytes=100 * GB), machine).step_s == pytest.approx(2.0)
    assert missing_speeds(machine, device="cuda") == ()
