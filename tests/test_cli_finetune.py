"""`memopt finetune`: flags from the settings, the file under them, exit codes, and a help that is quick."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from memopt.errors import BadInput
from memopt.jobs.config import FinetuneConfig
from memopt.launchers import finetune as launcher
from memopt.machine import Machine
from memopt.report_types import Report, Tiers

NEEDED = ["--model", "m", "--data", "d.txt", "--output", "o"]


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    launcher.register(app)
    app.command("other")(lambda: None)  # with a single command typer leaves its name out
    return app


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneConfig]:
    """Configurations the job was called with; a stand-in for the job itself."""
    seen: list[FinetuneConfig] = []

    def finetune(config: FinetuneConfig) -> Report:
        seen.append(config)
        verdict: Any = {"tight": "over", "none": "unbounded"}.get(config.model, "within")
        return Report(
            memopt="0", command=[], started="", wall_s=1.0, machine=Machine(name="m"), verdict=verdict, tiers=Tiers()
        )

    monkeypatch.setitem(sys.modules, "memopt.jobs.finetune", types.SimpleNamespace(finetune=finetune))
    return seen


def invoke(app: typer.Typer, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["finetune", *arguments])


def test_flags_become_the_settings(app: typer.Typer, ran: list[FinetuneConfig]) -> None:
    result = invoke(
        app, *NEEDED, "--dram", "2GiB", "--lr", "1e-4", "--batch-size", "auto", "--dtype", "bf16", "--quiet"
    )
    assert result.exit_code == 0, result.output
    assert ran == [
        FinetuneConfig(
            model="m", data="d.txt", output="o", dram="2GiB", lr=1e-4, batch_size="auto", dtype="bfloat16", quiet=True
        )
    ]
    assert result.stdout == ""


def test_a_flag_wins_over_the_file(app: typer.Typer, ran: list[FinetuneConfig], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "x"\noutput = "o"\ndata = "d"\nlearning_rate = 1e-3\nseed = 7\nquiet = true\noverwrite = true\n'
    )
    # --seed 42 is the default too, yet given: it wins
    result = invoke(app, "--config", str(path), "--model", "m", "--seed", "42", "--no-overwrite")
    assert result.exit_code == 0, result.output
    assert ran == [FinetuneConfig(model="m", data="d", output="o", lr=1e-3, seed=42, quiet=True)]


def test_every_setting_can_be_given_as_a_flag(app: typer.Typer, ran: list[FinetuneConfig], tmp_path: Path) -> None:
    wanted = FinetuneConfig(
        model="m", init="pretrained", method="lora", lora_rank=4, lora_alpha=8, lora_dropout=0.1,
        lora_target_modules=("q", "v"), data="d", seq_len=64, batch_size=2, grad_accum=3, epochs=1.5, max_steps=9,
        eval_data="e", eval_every=2, dram="80%", gpu="1GiB", ssd="2GiB", machine="x", offload_dir="dir",
        ssd_endurance="1TB", optimizer="galore_muon", optim_state_dtype="bfloat16", momentum=0.9, rank=8,
        update_proj_gap=7, proj_scale=2.0, proj_type="left", lr=0.1, weight_decay=0.2, beta1=0.3, beta2=0.4, eps=0.5,
        schedule="cosine", warmup_steps=3, max_grad_norm=0.0, skip_nonfinite=True, output="o", overwrite=True,
        save_every=5, resume=True, log_file="l", report="r", quiet=True, dry_run=True, dtype="float32",
        device="cuda:1", seed=3,
    )  # fmt: skip
    arguments: list[str] = []
    for each in dataclasses.fields(FinetuneConfig):
        value = getattr(wanted, each.name)
        flag = "--" + each.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag)
        else:
            arguments += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    result = invoke(app, *arguments)
    assert result.exit_code == 0, result.output
    assert ran == [wanted]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"config": wanted.to_dict()}))
    assert invoke(app, "--config", str(report), "--resume").exit_code == 0
    assert ran[1] == wanted


@pytest.mark.parametrize(("model", "code"), [("m", 0), ("none", 0), ("tight", 1)])
def test_the_exit_code_is_the_verdict(app: typer.Typer, ran: list[FinetuneConfig], model: str, code: int) -> None:
    result = invoke(app, "--model", model, "--data", "d", "--output", "o")
    assert result.exit_code == code
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model: .*--model"),
        (["--model", "m", "--output", "o"], "no data: .*--data"),
        (["--model", "m", "--data", "d"], "no output: .*--output"),
        ([*NEEDED, "--gpu", "0GiB"], "--device cpu"),
        ([*NEEDED, "--method", "qlora"], "method = 'qlora': give full or lora"),
        ([*NEEDED, "--config", "none.toml"], "--config none.toml: cannot be read"),
    ],
)
def test_bad_usage_is_one_clear_line(app: typer.Typer, ran: list[Any], arguments: list[str], message: str) -> None:
    result = invoke(app, *arguments)
    assert isinstance(result.exception, BadInput) and result.exception.exit_code == 2
    with pytest.raises(BadInput, match=message) as caught:
        raise result.exception
    assert "\n" not in str(caught.value) and ran == []


def test_usage_errors_of_the_parser(app: typer.Typer, ran: list[Any]) -> None:
    assert invoke(app, *NEEDED, "--seq-len", "many").exit_code == 2
    assert invoke(app, *NEEDED, "--no-such-flag").exit_code == 2
    assert ran == []


def test_what_may_be_left_out(app: typer.Typer, ran: list[FinetuneConfig]) -> None:
    assert invoke(app, "--model", "demo", "--output", "o").exit_code == 0
    assert invoke(app, "--model", "m", "--data", "d", "--dry-run").exit_code == 0


def test_help_is_grouped_shows_defaults_and_loads_no_framework() -> None:
    program = (
        "import sys, typer\nfrom memopt.launchers import finetune\n"
        "app = typer.Typer(); finetune.register(app); app.command('other')(lambda: None)\n"
        "try: app(['finetune', '--help'])\n"
        "finally: print('loaded:', sorted({'torch', 'transformers', 'datasets', 'numpy', 'peft'} & set(sys.modules)))\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = {"PYTHONPATH": str(root), "COLUMNS": "200", "PATH": "/usr/bin"}
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "loaded: []" in shown.stdout
    for each in dataclasses.fields(FinetuneConfig):
        assert f"--{each.name.replace('_', '-')} " in shown.stdout
        assert f" {each.metadata['group']} " in shown.stdout
    assert "Default: 5e-05." in shown.stdout and "Required." in shown.stdout
