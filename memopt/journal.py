"""What a profiler has seen so far, on disk beside the report to come: `run.json.journal`, JSON lines.

The first line holds a report without samples; each later one the samples since the line before (`t_s`, `gpu_bytes`,
`dram_bytes`, `ssd_bytes`: equally long lists), new phases, and the parts of the report that have changed. A line that
was cut short by a crash is left out. The journal goes when the report itself is there.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from memopt.errors import BadInput

SCHEMA = "memopt.journal/1"
COLUMNS = ("t_s", "gpu_bytes", "dram_bytes", "ssd_bytes")
_MOST_POINTS = 2000
_ENDING = ".journal"


def path_beside(report: Path) -> Path:
    """Where the journal of a report is."""
    return report if report.name.endswith(_ENDING) else report.with_name(report.name + _ENDING)


def is_newest(report: Path) -> bool:
    """Whether the journal says more than the report: there is none, or it is of an earlier run."""
    journal = path_beside(report)
    try:
        written = journal.stat().st_mtime_ns
        return journal == report or written >= report.stat().st_mtime_ns
    except FileNotFoundError:
        return journal.exists()
    except OSError:
        return False


class JournalFile:
    """An open journal. Each line reaches the kernel at once, so the death of this process loses none of it."""

    def __init__(self, report: Path) -> None:
        """Raises BadInput when no file can be written there."""
        self.path = path_beside(report)
        try:
            self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise BadInput(
                f"report {str(report)!r} cannot be written: {error.strerror}; choose another path"
            ) from error
        self._report: dict[str, Any] = {}
        self._phases = 0

    def write(self, report: dict[str, Any], samples: dict[str, list[Any]], *, first_phase: int = 0) -> None:
        """Take the report so far, as JSON data, and the new samples. Raises OSError (a full disk).

        `first_phase`: how many of its phases the report leaves out, because they were written before.
        """
        phases = report["phases"]
        parts = {key: value for key, value in report.items() if key not in ("timeline", "phases")}
        changed = {key: value for key, value in parts.items() if self._report.get(key) != value}
        head = {} if self._report else {"schema": SCHEMA}
        line = {**head, "report": changed, "phases": phases[self._phases - first_phase :], **samples}
        self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._report, self._phases = parts, first_phase + len(phases)

    def close(self, *, remove: bool) -> None:
        """Close it; `remove` when the report it is for is safe."""
        self._file.close()
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def restore(report: Path) -> dict[str, Any]:
    """The report that a journal amounts to, as JSON data with `complete` false. Raises BadInput when it is not ours."""
    path = path_beside(report)
    where = f"report {str(report)!r}: its journal {path.name!r}"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{where} cannot be read: {error.strerror}; check the path") from error
    lines = list(_whole_lines(text))
    if not lines or lines[0].get("schema") != SCHEMA:
        raise BadInput(f"{where} is cut short or not one this memopt reads (wanted {SCHEMA!r}); run the job again")
    restored: dict[str, Any] = {"phases": []}
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for line in lines:
        restored.update(line.get("report", {}))
        restored["phases"].extend(line.get("phases", []))
        for name in COLUMNS:
            columns[name].extend(line.get(name, []))
    seen_s = columns["t_s"][-1] if columns["t_s"] else 0.0
    note = f"the profiler did not finish: this is what it had seen after {seen_s:.1f} s"
    return {
        **restored,
        "timeline": _thinned(columns),
        "complete": False,
        "notes": [*restored.get("notes", []), note],
    }


def _whole_lines(text: bytes) -> list[dict[str, Any]]:
    lines = []
    for line in text.split(b"\n"):
        try:
            data = json.loads(line)
        except ValueError:
            break
        if not isinstance(data, dict):
            break
        lines.append(data)
    return lines


def _thinned(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """At most about `_MOST_POINTS`, the highest and lowest of DRAM and the highest of the GPU of each stretch kept."""
    count = min(len(column) for column in columns.values())
    stride = -(-count // (_MOST_POINTS // 3))
    if stride <= 3:
        return {name: column[:count] for name, column in columns.items()}
    kept: list[int] = []
    dram, gpu = columns["dram_bytes"], columns["gpu_bytes"]
    for first in range(0, count, stride):
        stretch = range(first, min(first + stride, count))
        picked = {min(stretch, key=lambda i: dram[i] or 0), max(stretch, key=lambda i: dram[i] or 0)}
        picked.add(max(stretch, key=lambda i: gpu[i] or 0))
        kept.extend(sorted(picked))
    return {name: [column[index] for index in kept] for name, column in columns.items()}
