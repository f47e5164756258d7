from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.report_types import SCHEMA, Report, Tiers, TierUse
from tests.report_samples import sample_report


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    report = sample_report()
    report.save(tmp_path / "out.json")
    assert Report.load(tmp_path / "out.json") == report
    assert os.listdir(tmp_path) == ["out.json"], "no temporary file stays"


def test_the_json_has_the_agreed_shape() -> None:
    data = json.loads(sample_report().to_json())
    assert list(data)[0] == "schema"
    assert data["schema"] == SCHEMA == "memopt.report/1"
    agreed = {"schema", "memopt", "command", "started", "wall_s", "machine", "verdict", "tiers", "phases"}
    assert agreed | {"timeline", "results", "notes"} <= set(data)
    assert data["tiers"]["gpu"] is None
    tier = {"budget_bytes", "peak_bytes", "predicted_bytes", "charged_peak_bytes", "within", "at_peak"}
    assert tier | {"upper_bound_bytes", "file_bytes"} <= set(data["tiers"]["dram"])
    assert {"read_bytes", "write_bytes"} <= set(data["tiers"]["ssd"])
    assert set(data["phases"][0]) >= {"name", "start_s", "end_s", "dram_peak_bytes"}
    assert set(data["timeline"]) == {"t_s", "gpu_bytes", "dram_bytes", "ssd_bytes", "categories"}


def test_a_diverged_loss_is_still_valid_json() -> None:
    report = dataclasses.replace(sample_report(), results={"final_loss": math.nan, "losses": [1.0, math.inf]})
    data = json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert data["results"] == {"final_loss": None, "losses": [1.0, None]}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    text = sample_report().to_json().rstrip()
    file = tmp_path / "cut.json"
    file.write_text(text[: int(len(text) * share)])
    with pytest.raises(BadInput, match=r"cut\.json.*cut short"):
        Report.load(file)


@pytest.mark.parametrize("field", ["machine", "tiers", "wall_s", "verdict"])
def test_a_missing_field_is_named(field: str) -> None:
    data = sample_report().to_dict()
    del data[field]
    with pytest.raises(BadInput, match=f"'{field}' is missing"):
        Report.from_dict(data)


@pytest.mark.parametrize(
    "foreign", [[], 3, None, {}, {"schema": 1}, {"schema": "other.report/1"}, {"schema": "memopt.report/x"}]
)
def test_a_foreign_file_is_refused(foreign: object) -> None:
    with pytest.raises(BadInput, match="not a memopt report"):
        Report.from_dict(foreign)


def test_a_newer_schema_is_refused_and_a_newer_field_is_not() -> None:
    data = sample_report().to_dict()
    with pytest.raises(BadInput, match="newer memopt"):
        Report.from_dict({**data, "schema": "memopt.report/2"})
    assert Report.from_dict({**data, "added_later": 1}) == sample_report()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("wall_s",), "1", "wall_s: '1' should be float"),
        (("verdict",), "maybe", "verdict: 'maybe' is none of within, over, unbounded"),
        (("tiers", "dram", "peak_bytes"), 1.5, "peak_bytes: 1.5 should be int"),
        (("tiers", "dram", "within"), 1, "within: 1 should be bool"),
        (("tiers", "dram", "at_peak"), {"weights": "x"}, "weights: 'x' should be int"),
        (("phases",), {}, "phases: {} should be"),
        (("phases",), [3], "should be an object"),
        (("timeline", "dram_bytes"), [1, "2"], r"dram_bytes[1]: '2' should be int"),
    ],
)
def test_a_wrong_value_is_named(path: tuple[str, ...], value: object, says: str) -> None:
    data = sample_report().to_dict()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(BadInput) as caught:
        Report.from_dict(data)
    assert says in str(caught.value)


def test_a_time_line_with_lists_of_different_lengths_is_refused() -> None:
    data = sample_report().to_dict()
    data["timeline"]["dram_bytes"].pop()
    with pytest.raises(BadInput, match="timeline: lists of different lengths"):
        Report.from_dict(data)


def test_whole_numbers_are_read_as_seconds() -> None:
    report = Report.from_dict({**sample_report().to_dict(), "wall_s": 3})
    assert report.wall_s == 3.0
    assert isinstance(report.wall_s, float)


def test_a_failed_save_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    sample_report().save(file)
    before = file.read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(BadInput, match="No space left"):
        sample_report("over").save(file)
    assert file.read_text() == before
    assert os.listdir(tmp_path) == ["out.json"]


def test_saving_nowhere_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none/out\.json"):
        sample_report().save(tmp_path / "none" / "out.json")


def test_a_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    sample_report().save(tmp_path / "out.json")
    assert (tmp_path / "out.json").stat().st_mode == plain.stat().st_mode


def test_reports_are_frozen_and_independent() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample_report().wall_s = 1.0  # type: ignore[misc]
    assert TierUse().at_peak is not Tiers().dram.at_peak
