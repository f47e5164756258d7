"""`memopt plan` as a person calls it: exit codes, messages, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memopt
from memopt.errors import BadInput
from memopt.forecast_types import Forecast
from memopt.jobs.plan_config import PlanConfig
from memopt.launchers import main
from memopt.profiler.forecast_render import render_text
from tests.plan_helpers import config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds a config.json and nothing else."""
    directory = tmp_path_factory.mktemp("plan") / "little-llama"
    config().save_pretrained(directory)
    return directory


def plan(*arguments: object) -> int:
    return main.run(["plan", *map(str, arguments)])


GENERATE = ("--task", "generate", "--seq-len", 2000, "--new-tokens", 100)


@pytest.mark.parametrize("what", ["directory", "file"])
def test_a_job_that_fits(model: Path, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = model if what == "directory" else model / "config.json"
    report, summary = tmp_path / "plan.json", tmp_path / "plan.md"
    code = plan("--model", source, *GENERATE, "--machine", "laptop-16g", "--report", report, "--markdown", summary)
    assert code == 0
    out = capsys.readouterr().out
    forecast = Forecast.load(report)
    assert out.startswith("FITS") and "1 x 2000 prompt + 100 new tokens" in " ".join(out.split())
    assert forecast.verdict == "fits"
    assert forecast.budgets["dram"] == 10 * 2**30
    assert forecast.time is not None
    assert summary.read_text().startswith("### Fits")
    assert "little-llama" in forecast.job


def test_a_job_that_does_not_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", model, *GENERATE, "--dram", "100MiB", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "does not fit"
    assert told["smallest"]["dram"] > 100 * 2**20
    assert told["config"]["dram"] == "100MiB"


def test_quiet_says_it_with_the_exit_code(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", model, *GENERATE, "--dram", "100MiB", "--quiet") == 1
    assert plan("--model", model, *GENERATE, "--dram", "10GiB", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_a_saved_plan_can_be_planned_again(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "plan.json"
    assert plan("--model", model, *GENERATE, "--dram", "8GiB", "--quiet", "--report", report) == 0
    assert plan("--config", report) == 0
    assert capsys.readouterr().out == render_text(Forecast.load(report), 80)


def test_settings_from_a_toml_file(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(f'[plan]\nmodel = "{model}"\ntask = "generate"\nkey_keep = 0.5\ndram = "8GiB"\nquiet = true\n')
    assert plan("--config", file) == 0
    file.write_text("model = 3 3")
    assert plan("--config", file) == 2


def test_the_public_function(model: Path) -> None:
    forecast = memopt.plan(memopt.PlanConfig(model=str(model), task="generate", dram="8GiB", max_new_tokens=7))
    assert isinstance(forecast, memopt.Forecast)
    assert forecast.steps == 7


def test_without_budget_or_machine_this_machine_is_meant(model: Path) -> None:
    forecast = memopt.plan(PlanConfig(model=str(model), task="generate", device="cpu"))
    assert forecast.budgets["dram"] > 0
    assert forecast.verdict == "fits"


def test_one_pool_of_memory_is_counted_once(model: Path) -> None:
    forecast = memopt.plan(PlanConfig(model=str(model), task="generate", machine="gb10"))
    assert {tier for phase in forecast.phases for tier in phase.use} == {"dram"}
    assert forecast.time is not None
    with pytest.raises(BadInput, match="one pool"):
        memopt.plan(PlanConfig(model=str(model), task="generate", machine="gb10", gpu="20GiB"))


BAD: list[tuple[list[object], str]] = [
    (["--key-keep", "0"], "key_keep = 0.0: give a share above 0 and at most 1"),
    (["--key-keep", "1.2"], "key_keep = 1.2: give a share above 0"),
    (["--machine", "toaster"], "'toaster': neither a preset (a100-80g, "),
    (["--seq-len", "0"], "seq_len = 0: give a whole number from 1 on"),
    (["--seq-len", "9000"], "has 4096 positions; use --seq-len"),
    (["--dram", "0"], "a budget of nothing"),
    (["--dram", "8GB"], "write GiB"),
    (["--optimizer", "muon"], "optimizer with task = 'generate': it belongs to --task train"),
    (["--engine", "zero3"], "engine = 'zero3' with task = 'generate'"),
    (["--flash", "--weights", "int8"], "flash with int8 weights"),
    (["--device", "cpu", "--gpu", "8GiB"], "a CPU job uses no GPU memory"),
    (["--quiet", "--json"], "quiet with json"),
    (["--report", "/nonexistent/plan.json"], "cannot be written"),
    (["--markdown", "/nonexistent/plan.md"], "cannot be written"),
    (["--config", "/nonexistent/plan.toml"], "cannot be read"),
    (["--engine", "cpu-offload", "--device", "cpu"], "the weights are in DRAM already"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_bad_input_is_one_line(
    model: Path, arguments: list[object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--model", model, "--task", "generate", *arguments) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"key_keep": 0.5}, "key_keep with task = 'train': it belongs to --task generate"),
        ({"gpus": 2}, "only zero3 and zero-infinity"),
        ({"implementation": "fused", "optimizer": "muon"}, "torch implements"),
        ({"engine": "flash"}, "that engine does not do this"),
        ({"flash": True}, "flash with task = 'train'"),
        ({"optimizer": "adam9"}, "optimizer = 'adam9'"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"nonsense": 1}, "unknown setting 'nonsense'"),
        ({"model": " "}, "name a directory"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        PlanConfig.of(**{"model": "m", **settings})


def test_models_that_are_not_there_or_not_language_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "config.json"
    broken.write_text("{")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps({"model_type": "nobody-knows-it"}))
    speech = tmp_path / "speech"
    speech.mkdir()
    (speech / "config.json").write_text(json.dumps({"model_type": "t5"}))
    for source, words in (
        (tmp_path / "none", "no such directory"),
        (empty, "holds no config.json"),
        (broken, "not a configuration that transformers knows"),
        (strange, "cannot be used"),
        (speech, ""),
        ("nobody/has-this-model", "could not be fetched from the hub"),
    ):
        assert plan("--model", source, "--task", "generate", "--dram", "8GiB") == 2
        err = capsys.readouterr().err
        assert words in err, err
        assert err.count("\n") == 1
    assert plan("--task", "generate") == 2
    assert "no model: name" in capsys.readouterr().err


def test_the_help_costs_no_framework(run_python: Any) -> None:
    code = (
        "import sys\nfrom memopt.launchers.main import run\nassert run(['plan', '--help']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "--key-keep" in done.stdout
