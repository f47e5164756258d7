"""What a run shows and logs while it runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from memopt.budget import Budget
from memopt.errors import BadInput, StoreError
from memopt.jobs.progress import Progress, StepRecord
from memopt.units import GiB, MiB


def record(step: int, loss: float = 2.5) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        lr=1e-4,
        tokens=100,
        step_s=0.5,
        dram_bytes=512 * MiB,
        ssd_bytes=3 * GiB,
        ssd_read_bytes=GiB,
    )


def test_lines_where_there_is_no_terminal() -> None:
    screen = io.StringIO()
    with Progress(20, budget=Budget(dram_bytes=GiB), file=screen, terminal=False) as progress:
        progress.note("optimizer state on SSD: [2.1 GiB] does not fit")
        with progress.work("loading", 10) as work:
            work.advance(10)
        for step in range(1, 21):
            progress.update(record(step))
    lines = screen.getvalue().splitlines()
    assert lines[0] == "optimizer state on SSD: [2.1 GiB] does not fit"
    assert lines[1].startswith("loading: ") and lines[1].endswith(", 10 B")
    assert lines[2] == (
        "step 1/20 · loss 2.5000 · 200 tokens/s · dram 512.00 MiB of 1.00 GiB · ssd 3.00 GiB · ssd 2.00 GiB/s"
        " · 9.50 s left"
    )
    assert len(lines) == 2 + 3 + 1 and lines[-1].startswith("step 20/20")


def test_a_bar_on_a_terminal() -> None:
    screen = io.StringIO()
    with Progress(2, first_step=1, file=screen, terminal=True) as progress:
        with progress.work("loading") as work:
            work.advance(1)
        progress.update(record(2))
    assert "loss 2.5000" in screen.getvalue() and "training" in screen.getvalue()


def test_quiet_still_logs(tmp_path: Path) -> None:
    screen, path = io.StringIO(), tmp_path / "deep" / "log.jsonl"
    with Progress(2, quiet=True, log_file=path, file=screen, terminal=True) as progress:
        progress.update(record(1, float("nan")))
        assert json.loads(path.read_text())["loss"] is None, "each line is written at once"
        progress.note("unseen")
    path.write_text(path.read_text() + '{"cut sh')
    with Progress(2, quiet=True, log_file=path, file=screen) as progress:
        progress.update(record(2))
    assert screen.getvalue() == ""
    first, cut, second = path.read_text().splitlines()
    assert json.loads(second)["step"] == 2 and json.loads(first)["step"] == 1 and cut == '{"cut sh'


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="log_file .*cannot be written"):
        Progress(1, log_file=tmp_path)


class Gone(io.StringIO):
    """A terminal that was closed, or a pipe whose reader left."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def write(self, text: str) -> int:
        raise self._error


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError()])
@pytest.mark.parametrize("terminal", [True, False])
def test_nobody_needs_to_look(tmp_path: Path, terminal: bool, error: OSError) -> None:
    path, shown = tmp_path / "log.jsonl", io.StringIO()
    with Progress(2, log_file=path, file=Gone(error), terminal=False) as progress:
        progress.note("not shown")
        progress.update(record(1))
    assert json.loads(path.read_text())["step"] == 1
    with Progress(2, file=shown, terminal=terminal) as progress:
        progress.silence()
        progress.note("too late")
        progress.update(record(1))
    assert "too late" not in shown.getvalue() and "loss" not in shown.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_without_room_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with (
        Progress(2, quiet=True, log_file=tmp_path / "log.jsonl") as progress,
        pytest.raises(StoreError, match=r"log.jsonl: cannot be written \(No space left on device\).*--resume"),
    ):
        progress.update(record(1))
