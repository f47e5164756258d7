"""`memopt report` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memopt.launchers import main
from memopt.profiler.forecast_render import markdown as forecast_markdown
from memopt.report_types import Report
from memopt.units import MiB
from tests.report_samples import full_report, sample_report
from tests.test_forecast_types import sample as sample_forecast


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    full_report().save(tmp_path / "run.json")
    return tmp_path / "run.json"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main.run(["report", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_alone_it_prints_the_table(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, saved)
    assert (code, err) == (0, "")
    assert out.startswith("OVER BUDGET: gpu peaked at 10.18 GiB")


def test_all_outputs_in_one_call(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("out.html", "out.trace.json", "out.md")]
    flags = ["--html", files[0], "--perfetto", files[1], "--markdown", files[2]]
    code, out, err = said(capsys, saved, *flags, "--json", "--compare", saved)
    assert (code, err) == (0, "")
    assert Report.from_dict(json.loads(out)) == full_report()
    assert files[0].read_text().startswith("<!doctype html>")
    assert json.loads(files[1].read_text())["traceEvents"]
    markdown = files[2].read_text()
    assert markdown.startswith("### ✅ memopt: nothing grew") and "### ❌ memopt: OVER BUDGET" in markdown


def test_files_only_print_nothing(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, saved, "--html", tmp_path / "out.html") == (0, "", "")


def test_markdown_to_stdout(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, saved, "--markdown", "-")
    assert code == 0
    assert out.startswith("### ❌ memopt: OVER BUDGET")


@pytest.mark.parametrize(("tolerance", "code"), [([], 1), (["--tolerance", "5%"], 1), (["--tolerance", "300MiB"], 0)])
def test_growth_decides_the_exit_code(
    tolerance: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, now = tmp_path / "base.json", tmp_path / "now.json"
    sample_report().save(base)
    sample_report("over", 1160 * MiB).save(now)
    left, out, _ = said(capsys, now, "--compare", base, *tolerance)
    assert left == code
    assert "+200.00 MiB" in out
    assert out.startswith("GREW" if code else "nothing grew by more than 300.00 MiB")
    assert said(capsys, base, "--compare", now, *tolerance)[0] == 0, "to shrink is no fault"


def test_merge_writes_both_and_warns_of_a_weak_alignment(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "torch.json"
    event = {"ph": "X", "name": "mm", "pid": 1, "tid": 1, "ts": 5, "dur": 1}
    trace.write_text(json.dumps({"baseTimeNanoseconds": 1, "traceEvents": [event]}))
    code, out, err = said(capsys, saved, "--perfetto", tmp_path / "both.json", "--merge", trace)
    assert (code, out) == (0, "")
    assert err.startswith("memopt: note: the two do not overlap") and err.count("\n") == 1
    assert event in json.loads((tmp_path / "both.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merge", "x.json"], "give --perfetto OUT.json too"),
        (["--tolerance", "5%"], "give --compare BASE.json too"),
        (["--json", "--markdown", "-"], "both want stdout"),
        (["--html", "run.json"], "'run.json' would be read and overwritten"),
        (["--html", "x", "--markdown", "./x"], "or written twice"),
        (["--compare", "run.json", "--tolerance", "5"], "tolerance: '5' has no unit"),
        (["--compare", "absent.json"], "report 'absent.json' cannot be read"),
        (["--compare", "plan.json"], "report 'plan.json' is not a memopt report (schema 'memopt.plan/1'"),
        (["--perfetto", "x", "--merge", "run.json"], "trace 'run.json' has no traceEvents"),
        (["--html", "none/x.html"], "page 'none/x.html' cannot be written: No such file or directory"),
    ],
)
def test_bad_use_is_one_clear_line(
    arguments: list[str],
    message: str,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(saved.parent)
    Path("plan.json").write_text('{"schema": "memopt.plan/1"}')
    before = saved.read_bytes()
    code, out, err = said(capsys, "run.json", *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert saved.read_bytes() == before


def test_truncated_foreign_and_newer_files_are_one_clear_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = saved.read_text()
    for content, message in (
        (text[: len(text) // 2], "is cut short or not JSON"),
        ('{"a": 1}', "is not a memopt report (schema None"),
        (text.replace("memopt.report/1", "memopt.report/2", 1), "was written by a newer memopt"),
    ):
        file = tmp_path / "bad.json"
        file.write_text(content)
        code, out, err = said(capsys, file, "--html", tmp_path / "bad.html")
        assert (code, out) == (2, "")
        assert message in err and err.count("\n") == 1
        assert not (tmp_path / "bad.html").exists()


def test_a_plan_is_shown_as_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    forecast = sample_forecast()
    forecast.save(file)
    code, out, _ = said(capsys, file)
    assert code == 0 and "backward" in out and "weights" in out
    assert said(capsys, file, "--json")[1] == forecast.to_json()
    assert said(capsys, file, "--markdown", "-")[1] == forecast_markdown(forecast)
    assert said(capsys, file, "--markdown", tmp_path / "plan.md")[0] == 0
    assert (tmp_path / "plan.md").read_text() == forecast_markdown(forecast)
    code, out, err = said(capsys, file, "--html", tmp_path / "plan.html")
    assert (code, out) == (2, "") and "is a plan, not a report" in err
