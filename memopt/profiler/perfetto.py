"""A report as a Chrome trace: counters per tier and phases as slices, alone or beside a trace of torch.profiler.

The format: "Trace Event Format" of the Chromium project (JSON); read by ui.perfetto.dev and chrome://tracing. Times are
microseconds after `baseTimeNanoseconds`, nanoseconds since 1970: torch.profiler's own convention. A report says when it
started on the same clock (the wall clock), so that both meet when our times are shifted by the difference.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from memopt import atomic
from memopt.errors import BadInput
from memopt.profiler.render_grids import in_order
from memopt.profiler.render_series import panels_of
from memopt.report_types import Phase, Report

_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_PROCESS = "memopt: budgets and memory"


def save_trace(report: Report, path: str | Path, merge: str | Path | None = None) -> tuple[str, ...]:
    """Write the trace in one atomic step, with the events of the torch.profiler trace `merge` where one is given.

    Returns notes on how well the clocks meet. Raises BadInput when a file cannot be read, is no such trace, or cannot
    be written.
    """
    notes: tuple[str, ...] = ()
    if merge is None:
        trace = trace_of(report)
    else:
        trace, notes = merged_trace(report, load_trace(merge), where=f"trace {str(merge)!r}")
    atomic.save_text("trace", path, json.dumps(trace, separators=(",", ":")) + "\n")
    return notes


def trace_of(report: Report) -> dict[str, Any]:
    """The report alone; zero is its start."""
    return {
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": _started_ns(report) or 0,
        "traceEvents": list(_events(report, process=1, shift_us=0.0)),
        "memopt": {"schema": report.schema, "verdict": report.verdict, "command": report.command},
    }


def merged_trace(
    report: Report, other: dict[str, Any], *, where: str = "the other trace"
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`other` with the report's counters and slices added, on the clock of `other`; and notes on the alignment.

    Raises BadInput where one of the two does not say when it started.
    """
    base_ns, started_ns = other.get("baseTimeNanoseconds"), _started_ns(report)
    if not isinstance(base_ns, int) or isinstance(base_ns, bool):
        raise BadInput(f"{where} has no baseTimeNanoseconds; save it with torch.profiler's export_chrome_trace")
    if started_ns is None:
        raise BadInput(f"the report's start {report.started!r} is no time with a zone; the traces cannot be aligned")
    theirs = other["traceEvents"]
    taken = {event.get("pid") for event in theirs if isinstance(event, dict)}
    process = max((pid for pid in taken if isinstance(pid, int)), default=0) + 1
    shift_us = (started_ns - base_ns) / 1000
    ours = list(_events(report, process=process, shift_us=shift_us))
    return {**other, "traceEvents": [*theirs, *ours]}, tuple(_notes(report, theirs, shift_us))


def load_trace(path: str | Path) -> dict[str, Any]:
    """A trace of torch.profiler, gzipped or not. Raises BadInput when it is missing, cut short or something else."""
    where = f"trace {str(path)!r}"
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        trace = json.loads(raw)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise BadInput(f"{where} is cut short or not JSON ({error}); export it again") from error
    except OSError as error:
        raise BadInput(f"{where} cannot be read: {error.strerror}; check the path") from error
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise BadInput(f"{where} has no traceEvents; give what torch.profiler's export_chrome_trace wrote")
    return trace


def _events(report: Report, *, process: int, shift_us: float) -> Iterator[dict[str, Any]]:
    def at(seconds: float) -> int:
        # whole microseconds stay exact in a reader's doubles, so that slices that nest here nest there
        return round(seconds * 1e6 + shift_us)

    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": _PROCESS}}
    # above the threads of torch.profiler
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": -1}}
    yield from _slices(report.phases, process, at)
    for panel in panels_of(report):
        counters = {f"{panel.tier} measured": panel.measured}
        counters.update({f"{panel.tier} {name}": values for name, values in panel.categories.items()})
        for name, values in counters.items():
            for seconds, nbytes in zip(report.timeline.t_s, values, strict=True):
                if nbytes is not None:
                    yield _counter(name, process, at(seconds), nbytes)
        for name, level in (("budget", panel.budget_bytes), ("predicted peak", panel.predicted_bytes)):
            if level is not None:
                yield _counter(f"{panel.tier} {name}", process, at(0.0), level)
                yield _counter(f"{panel.tier} {name}", process, at(report.wall_s), level)


def _counter(name: str, process: int, ts: int, nbytes: int) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": process, "ts": ts, "args": {"bytes": nbytes}}


def _slices(phases: list[Phase], process: int, at: Callable[[float], int]) -> Iterator[dict[str, Any]]:
    """Slices of one thread have to nest; a phase that only overlaps another one goes to the next thread."""
    lanes: list[list[Phase]] = []
    for phase in in_order(phases):
        lane = next((k for k, open_ in enumerate(lanes) if _nests(open_, phase)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
            name = "phases" if lane == 0 else f"phases {lane + 1}"
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": lane + 1, "args": {"name": name}}
        lanes[lane].append(phase)
        start = at(phase.start_s)
        yield {
            "ph": "X",
            "cat": "memopt",
            "name": phase.name,
            "pid": process,
            "tid": lane + 1,
            "ts": start,
            "dur": at(phase.end_s) - start,
            "args": _numbers(phase),
        }


def _nests(open_: list[Phase], phase: Phase) -> bool:
    """Drop what has ended by the start of `phase`; whether the rest holds all of it."""
    while open_ and open_[-1].end_s <= phase.start_s:
        open_.pop()
    return not open_ or phase.end_s <= open_[-1].end_s


def _numbers(phase: Phase) -> dict[str, Any]:
    told: dict[str, Any] = {
        "dram_peak_bytes": phase.dram_peak_bytes,
        "gpu_peak_bytes": phase.gpu_peak_bytes,
        "read_bytes": phase.read_bytes,
        "write_bytes": phase.write_bytes,
    }
    for tier, categories in phase.at_peak.items():
        told.update({f"{tier} {name}": nbytes for name, nbytes in categories.items()})
    return {name: value for name, value in told.items() if value is not None}


def _started_ns(report: Report) -> int | None:
    """Nanoseconds since 1970; None where the report does not say it, or without a zone."""
    try:
        started = datetime.fromisoformat(report.started)
    except ValueError:
        return None
    if started.tzinfo is None:
        return None
    return (started - _EPOCH) // timedelta(microseconds=1) * 1000


def _notes(report: Report, theirs: list[Any], shift_us: float) -> Iterator[str]:
    if datetime.fromisoformat(report.started).microsecond == 0:
        yield f"the report's start {report.started} has whole seconds only: the traces meet to within a second"
    stamps = [
        event["ts"]
        for event in theirs
        if isinstance(event, dict) and event.get("ph") in ("X", "i") and isinstance(event.get("ts"), int | float)
    ]
    if stamps and (max(stamps) < shift_us or min(stamps) > shift_us + report.wall_s * 1e6):
        away = (min(stamps) - shift_us) / 1e6
        yield f"the two do not overlap: the other trace begins {away:+.3f} s after the report; are they of one run?"
