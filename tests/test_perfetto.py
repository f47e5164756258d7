from __future__ import annotations

import dataclasses
import gzip
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from memopt.errors import BadInput
from memopt.profiler.perfetto import load_trace, merged_trace, save_trace, trace_of
from memopt.profiler.session import Session
from memopt.report_types import DramUse, Phase, Report, Tiers
from memopt.units import GiB, MiB
from tests.report_samples import full_report, sample_report


def events(trace: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == kind]


def counter(trace: dict[str, Any], name: str) -> list[tuple[float, int]]:
    return [(event["ts"], event["args"]["bytes"]) for event in events(trace, "C") if event["name"] == name]


def test_counters_are_the_time_line_and_budgets_span_it() -> None:
    report = full_report()
    trace = trace_of(report)
    measured = counter(trace, "gpu measured")
    assert [nbytes for _, nbytes in measured] == report.timeline.gpu_bytes
    assert [ts for ts, _ in measured] == [t * 1e6 for t in report.timeline.t_s]
    assert len(counter(trace, "ssd measured")) == 40, "where nothing was sampled there is no event"
    assert counter(trace, "gpu budget") == [(0.0, 10 * GiB), (20e6, 10 * GiB)]
    assert counter(trace, "gpu other")[0] == (0.0, 700 * MiB)
    assert not counter(trace, "ssd other")


def test_it_says_when_zero_was() -> None:
    # 2026-01-02 03:04:05.678901 UTC, by `date -u -d ... +%s`
    assert trace_of(full_report())["baseTimeNanoseconds"] == 1767323045_678901000


def test_slices_of_a_thread_nest() -> None:
    phases = [
        Phase(name="step", start_s=0.0, end_s=3.0, dram_peak_bytes=7),
        Phase(name="forward", start_s=0.0, end_s=1.0),
        Phase(name="prefetch", start_s=0.5, end_s=2.0),
        Phase(name="backward", start_s=1.0, end_s=3.0),
    ]
    slices = events(trace_of(dataclasses.replace(full_report(), phases=phases)), "X")
    assert {each["name"]: each["tid"] for each in slices} == {"step": 1, "forward": 1, "prefetch": 2, "backward": 1}
    assert slices[0]["args"] == {"dram_peak_bytes": 7}
    for one in slices:
        for two in slices:
            if one["tid"] == two["tid"] and one["ts"] < two["ts"] < one["ts"] + one["dur"]:
                assert two["ts"] + two["dur"] <= one["ts"] + one["dur"]


def test_with_a_real_trace_of_torch_profiler_both_are_on_one_clock(tmp_path: Path) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    began = datetime.now(UTC)
    with Session() as session:
        watched = profile(activities=[ProfilerActivity.CPU])
        with watched as profiler, session.phase("forward"), record_function("forward"):
            inside = time.time_ns()
            torch.randn(300, 300) @ torch.randn(300, 300)
        measured = session.stop()
    profiler.export_chrome_trace(str(tmp_path / "torch.json"))
    # the report's clock begins within the first line of the session
    report = dataclasses.replace(
        sample_report(),
        started=began.isoformat(),
        wall_s=measured.wall_s,
        phases=measured.phases,
        timeline=measured.timeline,
        tiers=Tiers(dram=DramUse(budget_bytes=GiB, peak_bytes=measured.dram_peak_bytes)),
    )

    notes = save_trace(report, tmp_path / "both.json", merge=tmp_path / "torch.json")

    alone = json.loads((tmp_path / "torch.json").read_text())
    both = json.loads((tmp_path / "both.json").read_text())
    assert notes == ()
    theirs = len(alone["traceEvents"])
    assert both["traceEvents"][:theirs] == alone["traceEvents"], "their events stay as they are"
    assert both["baseTimeNanoseconds"] == alone["baseTimeNanoseconds"]
    ours = {**both, "traceEvents": both["traceEvents"][theirs:]}
    assert not {event["pid"] for event in ours["traceEvents"]} & {event.get("pid") for event in alone["traceEvents"]}
    (slice_,) = events(ours, "X")
    (theirs_,) = [event for event in events(alone, "X") if event["name"] == "forward"]
    now_us = (inside - both["baseTimeNanoseconds"]) / 1000
    for each in (slice_, theirs_):
        assert each["ts"] < now_us < each["ts"] + each["dur"]
    stamps = [ts for ts, _ in counter(ours, "dram measured")]
    assert min(stamps) < theirs_["ts"] < max(stamps)


def torch_trace(**changes: Any) -> dict[str, Any]:
    event = {"ph": "X", "name": "aten::mm", "pid": 7, "tid": 7, "ts": 100.0, "dur": 5.0}
    return {"baseTimeNanoseconds": 1767323045_000000000, "traceEvents": [event], **changes}


def test_the_shift_is_the_difference_of_the_two_beginnings() -> None:
    trace, _ = merged_trace(full_report(), torch_trace())
    assert counter(trace, "gpu budget")[0][0] == 678901.0


def test_what_is_weak_about_the_alignment_is_said() -> None:
    _, notes = merged_trace(dataclasses.replace(full_report(), started="2026-01-02T03:04:05+00:00"), torch_trace())
    assert notes == (
        "the report's start 2026-01-02T03:04:05+00:00 has whole seconds only: the traces meet to within a second",
    )
    _, notes = merged_trace(full_report(), torch_trace(baseTimeNanoseconds=1767323100_000000000))
    assert len(notes) == 1 and notes[0].startswith("the two do not overlap: the other trace begins +54.321 s")


def test_gzipped_traces_are_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps(torch_trace()).encode()))
    assert load_trace(file) == torch_trace()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"traceEvents": [', "cut short or not JSON"),
        (gzip.compress(b'{"traceEvents": []}')[:-6], "cut short or not JSON"),
        (b"\xff\xfe", "cut short or not JSON"),
        (b"[1]", "has no traceEvents"),
        (b'{"traceEvents": {}}', "has no traceEvents"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "trace.json"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        load_trace(file)


def test_traces_without_a_clock_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no baseTimeNanoseconds"):
        merged_trace(full_report(), {"traceEvents": []})
    timeless: Report = dataclasses.replace(full_report(), started="2026-01-02T03:04:05")
    with pytest.raises(BadInput, match="no time with a zone"):
        merged_trace(timeless, torch_trace())
    with pytest.raises(BadInput, match="cannot be read"):
        load_trace(tmp_path / "nothing.json")
    with pytest.raises(BadInput, match="cannot be written"):
        save_trace(full_report(), tmp_path / "none" / "out.json")
