from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.journal import JournalFile, is_newest, path_beside, restore
from memopt.profiler.journal import Journal
from memopt.profiler.session import Session
from memopt.report_types import Report
from tests.report_samples import sample_report


def columns(*values: int) -> dict[str, list[object]]:
    times = [float(value) for value in values]
    return {"t_s": times, "gpu_bytes": [None] * len(values), "dram_bytes": list(values), "ssd_bytes": [7] * len(values)}  # type: ignore[dict-item]


def written(path: Path, lines: int = 3) -> Report:
    """A journal of a report whose peak grows; the last state of that report."""
    report = sample_report()
    journal = JournalFile(path)
    for line in range(lines):
        data = {**report.to_dict(), "wall_s": float(line), "phases": [{"name": str(n)} for n in range(line)]}
        for phase in data["phases"]:
            phase.update(start_s=0.0, end_s=1.0)
        journal.write(data, columns(2 * line, 2 * line + 1))
    journal.close(remove=False)
    return report


def test_a_journal_alone_is_a_report(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    report = written(path)
    found = Report.load(path)
    assert found.complete is False
    assert found.wall_s == 2.0
    assert found.tiers == report.tiers
    assert [phase.name for phase in found.phases] == ["0", "1"]
    assert found.timeline.dram_bytes == [0, 1, 2, 3, 4, 5]
    assert found.timeline.ssd_bytes == [7] * 6
    assert found.notes[:-1] == report.notes
    assert "did not finish: this is what it had seen after 5.0 s" in found.notes[-1]
    assert Report.load(path_beside(path)) == found, "the journal's own name does too"


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    written(path)
    journal = path_beside(path)
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-9])
    assert Report.load(path).timeline.dram_bytes == [0, 1, 2, 3]
    journal.write_bytes(whole[:50])
    with pytest.raises(BadInput, match="its journal 'run.json.journal' is cut short or not one this memopt reads"):
        Report.load(path)
    journal.write_text('{"schema": "other/1"}\n')
    with pytest.raises(BadInput, match="not one this memopt reads"):
        Report.load(path)


def test_a_finished_report_is_preferred_to_an_older_journal(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert not is_newest(path)
    written(path)
    sample_report().save(path)
    os.utime(path_beside(path), ns=(1, 1))
    assert Report.load(path).complete is True
    os.utime(path, ns=(0, 0))
    assert Report.load(path).complete is False


def test_unchanged_parts_are_not_repeated_and_many_samples_are_thinned(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    data = sample_report().to_dict()
    journal = JournalFile(path)
    for line in range(2000):
        journal.write(data, columns(*range(10 * line, 10 * line + 10)))
    journal.close(remove=False)
    lines = path_beside(path).read_text().splitlines()
    assert json.loads(lines[1])["report"] == {}
    line = restore(path)["timeline"]
    assert 1000 < len(line["t_s"]) <= 2001
    assert line["t_s"] == sorted(line["t_s"])
    assert (line["dram_bytes"][0], line["dram_bytes"][-1]) == (0, 19999)


def test_a_session_writes_while_it_runs_and_a_full_disk_ends_only_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    report = sample_report()
    journal = Journal(path, lambda measured: report)
    with Session(journal=journal):
        pass
    journal.close(remove=False)
    found = Report.load(path)
    assert (found.tiers, found.complete) == (report.tiers, False)
    assert (found.timeline.dram_bytes[0] or 0) > 0
    Journal(path, lambda measured: report).close(remove=True)
    assert os.listdir(tmp_path) == []

    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    path_beside(path).symlink_to(full)
    journal = Journal(path, lambda measured: report)
    with Session(journal=journal) as session:
        pass
    assert session.stop().samples > 0
    assert journal.failed is not None
    assert "No space left" in journal.failed
    journal.close(remove=True)
    with pytest.raises(BadInput, match="cannot be written"):
        JournalFile(tmp_path / "no" / "run.json")
