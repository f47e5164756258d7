"""`--optimizer NAME` in whole runs: the training of the optimizer in memory, notes on what was chosen, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import memopt
from memopt.jobs.optimizer import build_optimizer
from memopt.jobs.schedule import lr_at
from memopt.patches.hf_checkpoint import decay_names
from tests.finetune_helpers import Forks, Tiny, assert_same_weights, placed, rows_of, run_line, wait_for
from tests.reference.in_memory import train_in_memory
from tests.test_finetune_result import config, steps_of

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
"""Large enough for states in 8 bits."""
CASES: dict[str, dict[str, Any]] = {
    "muon": {"momentum": 0.9},
    "galore": {"rank": 8, "update_proj_gap": 3, "proj_scale": 1.0, "proj_type": "reverse_std"},
    "galore_muon": {"rank": 8, "beta2": 0.98},
    "sgd": {"momentum": 0.5, "lr": 0.1},
    "adamw": {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6},
}


@pytest.mark.parametrize(
    ("optimizer", "where"), [*((name, "ssd") for name in CASES if name != "galore"), ("galore", "no store")]
)
def test_it_is_the_optimizer_in_memory(tiny: Tiny, tmp_path: Path, optimizer: str, where: str) -> None:
    settings = {"optimizer": optimizer, "model": tiny.model(**WIDE), "max_steps": 6, **CASES[optimizer]}
    run = config(tiny, tmp_path, **settings)
    if where == "ssd":
        with placed("ssd"):
            report = memopt.finetune(run)
    else:
        memopt.finetune(run.with_changes(max_steps=1, output=str(tmp_path / "first")))  # packs the tokens
        report = memopt.finetune(config(tiny, tmp_path, **settings, offload_dir=None))
    steps = steps_of(run)
    batches = [steps.batch(s) for s in range(6)]
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    names = {"proj_scale": "scale"}
    options = {names.get(k, k): v for k, v in CASES[optimizer].items() if k not in ("beta1", "beta2", "lr")}
    if run.beta2 is not None:
        options["betas"] = (run.beta1 or 0.9, run.beta2)
    losses = train_in_memory(
        model,
        batches,
        lr=lambda s: lr_at(s, 6, lr=run.lr, schedule=run.schedule, warmup_steps=run.warmup_steps),
        decay=decay_names(model),
        max_grad_norm=run.max_grad_norm,
        optimizer=build_optimizer(model, optimizer, weight_decay=run.weight_decay, **options),
    )
    assert report.results["losses"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "muon8bit", "galore8bit", "lion"])
def test_it_trains_and_keeps_less_state(tiny: Tiny, tmp_path: Path, optimizer: str) -> None:
    more: dict[str, Any] = {"rank": 16} if optimizer == "galore8bit" else {}
    model = tiny.model(**WIDE, vocab_size=304)
    run = config(tiny, tmp_path, model=model, optimizer=optimizer, lr=1e-3, weight_decay=0.0, **more)
    with placed("mix"):
        report = memopt.finetune(run)
    losses = report.results["losses"]
    assert sum(losses[-3:]) < 0.99 * sum(losses[:3])
    assert report.results["training_state_bytes"] < 15 * report.results["parameters"]
    (chosen,) = (note for note in report.notes if note.startswith(f"optimizer {optimizer}: "))
    assert " % (" in chosen and chosen.endswith("of the parameters")
    (state,) = (note for note in report.notes if note.startswith("optimizer state takes "))
    assert 1 < float(state.split()[3]) < 7
    assert ("blocks of 8-bit states" in " ".join(report.notes)) == (optimizer != "lion" and "8bit" in optimizer)


def line(tiny: Tiny, at: Path, *more: object) -> list[object]:
    return [
        "finetune", "--model", tiny.model(**WIDE), "--data", tiny.text, "--offload-dir", at / "run", "--output",
        at / "out", "--seq-len", 32, "--max-steps", 15, "--lr", 1e-3, "--quiet", "--save-every", 1,
        "--optimizer", "galore8bit", "--rank", 16, "--update-proj-gap", 4, *more,
    ]  # fmt: skip


def test_killed_resumed_and_exported(
    tiny: Tiny, forks: Forks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert forks.start(*line(tiny, one), where="mix").wait() == 0
    log = two / "log.jsonl"
    child = forks.start(*line(tiny, two, "--log-file", log), where="mix")
    wait_for(lambda: len(rows_of(log)) >= 6, "six steps")
    child.kill()
    assert child.wait() == -9
    code, said = run_line(capfd, *line(tiny, two, "--resume", "--optimizer", "adamw8bit", "--rank", 16))
    assert code == 2 and "rank = 16 with optimizer = 'adamw8bit'" in said and said.count("\n") == 1
    code, said = run_line(capfd, *line(tiny, two, "--resume", "--rank", 8))
    assert code == 2 and "rank was 16 and is now 8" in said and "names, shapes" not in said
    assert forks.start(*line(tiny, two, "--resume", "--log-file", log), where="ssd").wait() == 0
    assert_same_weights(one / "out", two / "out")
    code, said = run_line(capfd, "export", two / "run", "--output", two / "exported", "--quiet")
    assert code == 0
    assert_same_weights(one / "out", two / "exported")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optimizer", "adam"], "optimizer = 'adam': give adamw or adamw8bit or lion"),
        (["--rank", 4], "rank = 4 with optimizer = 'adamw': only galore, galore8bit, galore_muon use it"),
        (["--optimizer", "muon", "--proj-type", "left"], "proj_type = 'left' with optimizer = 'muon'"),
        (["--optimizer", "adamw", "--momentum", 0.9], "momentum = 0.9 with optimizer = 'adamw'"),
        (["--optimizer", "galore", "--rank", 0], "rank = 0: give a whole number of at least 1"),
        (["--optimizer", "muon", "--optim-state-dtype", "int4"], "optim_state_dtype = 'int4': give float32 or"),
    ],
)
def test_what_is_refused(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[object], words: str
) -> None:
    run = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--output", tmp_path / "out", *flags]
    code, said = run_line(capfd, *run)
    assert code == 2 and words in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_adapters_are_no_hidden_matrices(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "lora", "lora_rank": 4, "max_steps": 3, "schedule": "constant_with_warmup"}
    for optimizer in ("galore8bit", "muon"):
        run = config(tiny, tmp_path / optimizer, **settings, optimizer=optimizer, beta2=0.999)
        report = memopt.finetune(run)
        told = " ".join(report.notes)
        assert f"optimizer {optimizer} finds no matrix of a hidden layer to work on" in told
        assert "trained by adamw" in told
    plain = memopt.finetune(config(tiny, tmp_path / "plain", **settings))
    assert report.results["losses"] == plain.results["losses"]


def test_a_rank_that_is_too_large_is_told(tiny: Tiny, tmp_path: Path) -> None:
    run = config(tiny, tmp_path, optimizer="galore", dry_run=True, output=None)
    notes = memopt.finetune(run).notes
    assert "21 of 21 matrices are no larger than the rank and are trained at full rank" in notes


def test_the_plan_tells_of_whole_matrices(tiny: Tiny, tmp_path: Path) -> None:
    report = memopt.finetune(config(tiny, tmp_path, optimizer="muon", dry_run=True, output=None))
    assert any(reason.startswith("21 matrices are updated as a whole, ") for reason in report.reasons)
