"""What a run does in the situations people get into: second starts, existing outputs, losses that are NaN, dry runs."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import memopt
from memopt.errors import NonFinite
from memopt.units import GiB
from tests.finetune_helpers import (
    Forks,
    Tiny,
    assert_same_weights,
    placed,
    rows_of,
    run_line,
    wait_for,
    weights_of,
)
from tests.test_finetune_result import assert_close, config, plain_loop

pytestmark = pytest.mark.usefixtures("one_thread")


def line(tiny: Tiny, at: Path, *more: object) -> list[object]:
    return [
        "finetune", "--model", tiny.model(), "--data", tiny.text, "--offload-dir", at / "run", "--output", at / "out",
        "--seq-len", 32, "--batch-size", 2, "--max-steps", 3, "--schedule", "constant", "--lr", 1e-3, *more,
    ]  # fmt: skip


def picture(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with its size and when it was written."""
    files = [p for p in directory.rglob("*") if p.is_file()]
    return {str(p.relative_to(directory)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the `run` and the `out` of three steps."""
    at = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    with placed("ssd"):
        memopt.finetune(config(tiny, at, max_steps=3, schedule="constant", warmup_steps=0, grad_accum=1, lr=1e-3,
                               weight_decay=0.0, report=str(at / "report.json")))  # fmt: skip
    return at


# -- starting again


def test_a_second_run_says_how_to_go_on(finished: Path, tiny: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    before = picture(finished)
    code, said = run_line(capfd, *line(tiny, finished, "--output", finished / "other"))
    assert code == 2 and said.count("\n") == 1
    assert "saved at step 3 of 3" in said
    for way in ("--resume", f"memopt export {finished / 'run'} --output", f"memopt clean {finished / 'run'}"):
        assert way in said
    assert picture(finished) == before


def test_resuming_where_nothing_was_saved_starts_over(
    finished: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = run_line(capfd, *line(tiny, tmp_path, "--resume"))
    assert code == 0 and "nothing was saved yet: starting over" in said
    assert_same_weights(tmp_path / "out", finished / "out")


def test_resuming_a_finished_run_writes_it_again(
    finished: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = run_line(capfd, *line(tiny, finished, "--resume", "--output", tmp_path / "again"))
    assert code == 0 and "resuming after step 3 of 3" in said
    assert_same_weights(tmp_path / "again", finished / "out")


def test_an_interrupted_run_is_exported_as_it_stands(
    tiny: Tiny, forks: Forks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, steps = tmp_path / "log.jsonl", ["--max-steps", 400]
    child = forks.start(*line(tiny, tmp_path, "--log-file", log, "--quiet", *steps), where="ssd")
    wait_for(lambda: len(rows_of(log)) >= 3, "three steps")
    code, said = run_line(capfd, "export", tmp_path / "run", "--output", tmp_path / "early")
    assert code == 2 and f"in use by process {child.pid}" in said and not (tmp_path / "early").exists()
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    done = rows_of(log)[-1]["step"]
    child = forks.start("export", tmp_path / "run", "--output", tmp_path / "exported")
    assert child.wait() == 0 and f"the model after step {done}" in child.said
    whole = tmp_path / "whole"
    assert forks.start(*line(tiny, whole, "--quiet", "--max-steps", done)).wait() == 0
    assert_same_weights(tmp_path / "exported", whole / "out")


# -- outputs


def test_an_existing_output_is_refused_before_anything_is_done(
    finished: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = run_line(capfd, *line(tiny, tmp_path, "--output", finished / "out"))
    assert code == 2 and "--overwrite" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_only_what_memopt_wrote(
    finished: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "out"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("irreplaceable")
    code, said = run_line(capfd, *line(tiny, tmp_path, "--overwrite"))
    assert code == 2 and "was not written by memopt" in said
    assert (theirs / "thesis.tex").read_text() == "irreplaceable" and not (tmp_path / "run").exists()
    code, said = run_line(capfd, *line(tiny, tmp_path, "--max-steps", 1, "--output", tmp_path / "ours"))
    assert code == 0
    export = ["export", finished / "run", "--output", tmp_path / "ours", "--overwrite"]
    assert run_line(capfd, *export)[0] == 0
    assert_same_weights(tmp_path / "ours", finished / "out")


@pytest.mark.parametrize(
    ("output", "said"),
    [("file", "is a file"), ("file/out", "is a file"), ("run", "would replace --offload-dir"), ("", "would replace")],
)
def test_an_output_that_cannot_be(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], output: str, said: str
) -> None:
    (tmp_path / "file").write_text("")
    code, line_ = run_line(capfd, *line(tiny, tmp_path, "--output", tmp_path / output))
    assert code == 2 and said in line_ and line_.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- losses that are no number


def poisoned(tiny: Tiny, at: Path) -> str:
    """A model that gives NaN wherever token 299 is seen."""
    at.mkdir()
    for file in Path(tiny.model()).iterdir():
        (at / file.name).write_bytes(file.read_bytes())
    weights = load_file(at / "model.safetensors")
    weights["model.embed_tokens.weight"][299] = math.nan
    save_file(weights, at / "model.safetensors", metadata={"format": "pt"})
    return str(at)


def given(*bad: int) -> list[list[dict[str, torch.Tensor]]]:
    draw = torch.Generator().manual_seed(4)
    steps = []
    for step in range(5):
        ids = torch.randint(3, 299, (2, 16), generator=draw)
        if step in bad:
            ids[1, 3] = 299
        steps.append([{"input_ids": ids, "labels": ids.masked_fill(ids == 299, -100)}])
    return steps


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_nan_stops_the_run_and_what_was_saved_can_be_used(tiny: Tiny, tmp_path: Path, clip: float) -> None:
    run = config(
        tiny, tmp_path, model=poisoned(tiny, tmp_path / "model"), data=None, schedule="constant", warmup_steps=0,
        max_grad_norm=clip, weight_decay=0.0,
    )  # fmt: skip
    with placed("mix"), pytest.raises(NonFinite, match="step 4: the loss is nan.*--skip-nonfinite") as caught:
        memopt.finetune(run, batches=given(3))
    assert caught.value.exit_code == 1 and not (tmp_path / "out").exists()
    from memopt.jobs.export import export_run

    saved = export_run(tmp_path / "run", tmp_path / "kept", quiet=True)
    # with clipping the third step is only saved by the forward of the fourth, when its loss is seen to be a number
    assert saved == (3 if clip == 0 else 2)
    _, reference = plain_loop(run, given()[:saved])
    kept, expected = weights_of(tmp_path / "kept"), dict(reference.named_parameters())
    kept["model.embed_tokens.weight"][299] = expected["model.embed_tokens.weight"].data[299] = 0.0
    assert all((tensor - expected[name]).abs().max() <= 0.1 * run.lr for name, tensor in kept.items())


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_nan_steps_can_be_skipped_and_are_counted(tiny: Tiny, tmp_path: Path, clip: float) -> None:
    run = config(
        tiny, tmp_path, model=poisoned(tiny, tmp_path / "model"), data=None, schedule="constant", warmup_steps=0,
        max_grad_norm=clip, weight_decay=0.0, skip_nonfinite=True, report=str(tmp_path / "report.json"),
        log_file=str(tmp_path / "log.jsonl"),
    )  # fmt: skip
    with placed("mix"):
        report = memopt.finetune(run, batches=given(1, 2))
    assert report.results["skipped_steps"] == 2 and report.results["steps"] == 5
    good = [step for index, step in enumerate(given()) if index not in (1, 2)]
    losses, reference = plain_loop(run, good)
    assert [x for x in report.results["losses"] if math.isfinite(x)] == pytest.approx(losses, rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(run.output)
    for each in (model, reference):
        each.get_input_embeddings().weight.data[299] = 0.0
    assert_close(model, reference, run.lr)
    assert json.loads((tmp_path / "report.json").read_text())["results"]["losses"][1] is None
    assert rows_of(tmp_path / "log.jsonl")[1]["loss"] is None


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_run_that_met_nan_can_go_on_without_such_steps(tiny: Tiny, tmp_path: Path, clip: float) -> None:
    """As the message of the stop says, and as if it had been told so from the start."""
    model = poisoned(tiny, tmp_path / "model")

    def at(name: str, **changes: Any) -> memopt.FinetuneConfig:
        return config(tiny, tmp_path / name, model=model, data=None, max_grad_norm=clip, **changes)

    with placed("mix"):
        memopt.finetune(at("one", skip_nonfinite=True), batches=given(3))
        with pytest.raises(NonFinite):
            memopt.finetune(at("two"), batches=given(3))
        report = memopt.finetune(at("two", resume=True, skip_nonfinite=True), batches=given(3))
    assert report.results["skipped_steps"] == 1
    one, two = (weights_of(tmp_path / name / "out") for name in ("one", "two"))
    assert all(torch.equal(one[name].nan_to_num(), two[name].nan_to_num()) for name in one)


def test_a_diverged_step_is_not_what_is_kept(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = run_line(capfd, *line(tiny, tmp_path, "--lr", 1e38, "--quiet", "--save-every", 1))
    assert code == 1 and "step 2: the loss is" in said and said.count("\n") == 1
    code, said = run_line(capfd, "export", tmp_path / "run", "--output", tmp_path / "kept")
    assert code == 0
    assert_same_weights(tmp_path / "kept", tiny.model())


# -- other ways to run


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    finished: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = picture(finished)
    for at in (tmp_path, finished):
        more = ["--dry-run", "--log-file", tmp_path / "log.jsonl", "--output", tmp_path / "out", "--dram", "80%"]
        code, said = run_line(capfd, *line(tiny, at, *more))
        assert code == 0
        assert "training state (weights, gradients, optimizer) is" in said and "the plan needs" in said
        assert "clipping needs the global norm first" in said
    assert not list(tmp_path.iterdir()) and picture(finished) == before


def test_no_more_memory_is_planned_for_than_there_is(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget, or the profile of a larger machine, would let the kernel end the run."""
    monkeypatch.setattr("memopt.machine.dram_capacity", lambda: (4 * GiB, "a small host"))
    report = tmp_path / "report.json"
    for number, asked in enumerate((["--dram", "100GiB"], ["--machine", "rtx4090-64g"])):
        more = ["--report", report, "--output", tmp_path / f"{number}", *asked]
        code, said = run_line(capfd, *line(tiny, tmp_path / f"at{number}", "--max-steps", 1, *more))
        assert code == 0 and "of 3.80 GiB" in said
        assert re.search(r"the dram budget of .* is more than the 4.00 GiB of this machine .*: 3.80 GiB are used", said)
        assert memopt.Report.load(report).tiers.dram.budget_bytes == 4 * GiB - 4 * GiB // 20
    code, said = run_line(capfd, *line(tiny, tmp_path, "--dry-run", "--dram", "100GiB", "--report", report))
    assert code == 0 and memopt.Report.load(report).tiers.dram.budget_bytes == 100 * GiB


def test_save_every(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    run = config(tiny, tmp_path, save_every=3, max_steps=8, log_file=str(tmp_path / "log.jsonl"))
    with placed("mix"):
        memopt.finetune(run)
    # the save after step 3 becomes durable during step 4
    assert {row["saved_step"] for row in rows_of(tmp_path / "log.jsonl")} <= {0, 3, 6}
    assert rows_of(tmp_path / "log.jsonl")[-1]["saved_step"] == 6
    state = json.loads((tmp_path / "run" / "state" / "manifest.json").read_text())
    assert state["body"]["meta"]["step"] == 8


def test_batch_size_auto_takes_what_fits_and_keeps_it(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"grad_accum": 4, "max_steps": 4, "output": None}
    auto = memopt.finetune(config(tiny, tmp_path / "auto", batch_size="auto", **settings))
    fixed = memopt.finetune(config(tiny, tmp_path / "fixed", batch_size=4, **{**settings, "grad_accum": 1}))
    assert auto.results["losses"] == fixed.results["losses"]
    again = config(tiny, tmp_path / "auto", batch_size="auto", resume=True, **settings)
    assert memopt.finetune(again).results["steps"] == 4


def test_settings_from_a_file_and_a_run_repeated_from_its_report(
    finished: Path, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = finished / "report.json"
    other = ["--offload-dir", tmp_path / "run", "--output", tmp_path / "out", "--report", tmp_path / "again.json"]
    assert run_line(capfd, "finetune", "--config", report, *other)[0] == 0
    losses = json.loads(report.read_text())["results"]["losses"]
    assert json.loads((tmp_path / "again.json").read_text())["results"]["losses"] == losses
    assert_same_weights(tmp_path / "out", finished / "out")
    settings = tmp_path / "run.toml"
    settings.write_text(
        f'model = "{tiny.model()}"\ndata = "{tiny.text}"\noutput = "{tmp_path / "toml"}"\nseq_len = 32\n'
        'per_device_train_batch_size = 2\nmax-steps = 3\nschedule = "constant"\nlearning_rate = 0.5\nquiet = true\n'
    )
    assert run_line(capfd, "finetune", "--config", settings, "--lr", "1e-3")[0] == 0
    assert_same_weights(tmp_path / "toml", finished / "out")
