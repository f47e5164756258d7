"""`memopt.plan` of training jobs: what the flags it advises really save, engines and budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memopt
from memopt.forecast_types import Forecast
from memopt.jobs.plan_config import PlanConfig
from memopt.launchers import main
from memopt.planning.forecasts import peak
from memopt.tiers import Tier
from memopt.units import GiB, MiB
from tests.plan_helpers import config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block: a plan of it costs a third of a deep model's."""
    directory = tmp_path_factory.mktemp("plan") / "one-block"
    config(hidden_size=256, intermediate_size=688, num_hidden_layers=1, vocab_size=5000).save_pretrained(directory)
    return directory


JOB = ("--seq-len", 512, "--batch-size", 4, "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def base(model: Path) -> Forecast:
    return planned(model)


def planned(model: Path, *arguments: object, advice: bool = True) -> Forecast:
    """Through the command line, read back from its file."""
    file = model / "plan.json"
    settings = ["--model", model, *JOB, "--machine", "laptop-16g", *arguments, "--report", file, "--quiet"]
    code = main.run(["plan", *map(str, settings), *([] if advice else ["--no-advice"])])
    forecast = Forecast.load(file)
    assert code == (1 if forecast.verdict == "does not fit" else 0)
    return forecast


def test_phases_seconds_and_bytes(base: Forecast) -> None:
    assert base.verdict == "fits"
    assert {phase.name for phase in base.phases} >= {"load", "forward", "backward", "optimizer"}
    weights = (2 * 5000 * 256 + 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 688 + 3 * 256) * 4
    backward = next(phase for phase in base.phases if phase.name == "backward")
    assert backward.use["dram"]["weights"] == pytest.approx(weights, rel=0.01)
    assert backward.use["dram"]["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert base.time is not None
    # 6 operations per weight and token (the embedding has none), at half of 300 GFLOP/s
    flops = 6 * (weights / 4 - 5000 * 256) * 2048
    assert base.time.compute_s == pytest.approx(flops / 150e9, rel=0.35)
    assert base.time.tokens_per_s == pytest.approx(2048 / base.time.step_s)


def test_a_flag_that_is_advised_saves_what_was_said(model: Path, base: Forecast) -> None:
    """The job planned anew with the flag as it was printed."""
    advised = {suggestion.flag: suggestion for suggestion in base.suggestions}
    wanted = ["--gradient-checkpointing", "--batch-size 1 --grad-accum 4", "--optimizer adamw8bit", "--seq-len 256"]
    for flag in (flag for flag in wanted if flag in advised):
        after = planned(model, *flag.split(), advice=False)
        assert advised[flag].saved_bytes == peak(base, Tier.DRAM) - peak(after, Tier.DRAM), flag
        assert after.time is not None and after.time.tokens_per_s and base.time is not None and base.time.tokens_per_s
        assert advised[flag].slow_down == pytest.approx(base.time.tokens_per_s / after.time.tokens_per_s), flag
    assert {"--batch-size 1 --grad-accum 4", "--seq-len 256"} <= set(advised)
    assert advised["--batch-size 1 --grad-accum 4"].same_result
    assert not advised["--seq-len 256"].same_result


def test_a_tight_budget_gets_flags_that_fit(model: Path, base: Forecast) -> None:
    budget = f"{(peak(base, Tier.DRAM) - 30 * MiB) // MiB}MiB"
    short = planned(model, "--dram", budget)
    assert short.verdict == "does not fit"
    flags = [word for flag in short.smallest_flags for word in flag.split()]
    after = planned(model, "--dram", budget, *flags, advice=False)
    assert after.verdict == "fits"
    assert peak(after, Tier.DRAM) == short.smallest["dram"]


def test_memopts_engine_keeps_to_its_budget_or_names_the_smallest(model: Path) -> None:
    fits = planned(model, "--engine", "ssd", "--dram", "2GiB", advice=False)
    assert fits.verdict == "fits"
    least = planned(model, "--engine", "ssd", "--dram", "100MiB", advice=False)
    assert least.verdict == "does not fit"
    need = peak(least, Tier.DRAM)
    assert 100 * MiB < need < 2 * GiB
    assert planned(model, "--engine", "ssd", "--dram", f"{-(-need // MiB)}MiB", advice=False).verdict == "fits"


def test_deepspeed_is_planned_for_gpus(model: Path) -> None:
    settings: dict[str, Any] = {"model": str(model), "machine": "a100-80g", "advice": False, "seq_len": 256}
    forecast = memopt.plan(PlanConfig.of(engine="zero3", **settings))
    assert forecast.verdict == "fits"
    assert peak(forecast, Tier.GPU) > 0
    assert forecast.time is not None
    with pytest.raises(memopt.errors.BadInput, match="zero3"):
        memopt.plan(PlanConfig.of(engine="zero3", **{**settings, "machine": "laptop-16g", "device": "cpu"}))


def test_the_settings_are_in_the_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.run(["plan", "--model", str(model), "--seq-len", "128", "--device", "cpu", "--json", "--no-advice"])
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["seq_len"] == 128
    assert told["schema"] == "memopt.plan/1"
    assert told["suggestions"] == []
