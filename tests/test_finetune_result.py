"""Whole runs against the plain loop in memory: the same losses, the same weights, a directory transformers loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import memopt
from memopt.jobs.data import BatchOrder, TokenDataset
from memopt.jobs.schedule import lr_at
from memopt.jobs.steps import PackedSteps
from memopt.patches.hf_checkpoint import decay_names
from tests.finetune_helpers import Tiny, assert_same_weights, placed, rows_of, weights_of
from tests.reference.in_memory import train_in_memory

pytestmark = pytest.mark.usefixtures("one_thread")

LR = 2e-3


def config(tiny: Tiny, at: Path, **changes: Any) -> memopt.FinetuneConfig:
    settings = {
        "model": tiny.model(), "data": tiny.text, "output": str(at / "out"), "offload_dir": str(at / "run"),
        "seq_len": 32, "batch_size": 2, "grad_accum": 2, "max_steps": 12, "lr": LR, "warmup_steps": 2,
        "weight_decay": 0.1, "schedule": "cosine", "quiet": True,
    }  # fmt: skip
    return memopt.FinetuneConfig.of(**{k: v for k, v in {**settings, **changes}.items() if v is not None})


def steps_of(run: memopt.FinetuneConfig) -> PackedSteps:
    """The batches of a run with an offload directory, which keeps the packed tokens."""
    assert run.offload_dir is not None and isinstance(run.batch_size, int)
    dataset = TokenDataset.open(Path(run.offload_dir) / "train.tokens")
    order = BatchOrder(
        n_sequences=len(dataset), batch_size=run.batch_size, grad_accum=run.grad_accum, seed=run.seed,
        epochs=run.epochs, max_steps=run.max_steps,
    )  # fmt: skip
    return PackedSteps(dataset, order)


def plain_loop(run: memopt.FinetuneConfig, batches: Sequence[Any]) -> tuple[list[float], torch.nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    losses = train_in_memory(
        model,
        batches,
        lr=lambda s: lr_at(s, len(batches), lr=run.lr, schedule=run.schedule, warmup_steps=run.warmup_steps),
        decay=decay_names(model),
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
    )
    return losses, model


def assert_close(model: torch.nn.Module, reference: torch.nn.Module, lr: float = LR) -> None:
    """As close as the order of additions allows: relative norm, and no element off by a tenth of a step."""
    expected = dict(reference.named_parameters())
    away = torch.tensor(0.0, dtype=torch.float64)
    norm = torch.tensor(0.0, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        off = (parameter - expected[name]).detach().double()
        assert off.abs().max() <= 0.1 * lr, name
        away += off.pow(2).sum()
        norm += expected[name].detach().double().pow(2).sum()
    assert away.sqrt() <= 1e-6 * norm.sqrt()


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[memopt.FinetuneConfig, memopt.Report]:
    """One run with everything on SSD."""
    at = tmp_path_factory.mktemp("trained")
    run = config(
        tiny, at, dram="16GiB", log_file=str(at / "log.jsonl"), report=str(at / "report.json"),
        eval_data=tiny.held_out, eval_every=5,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with placed("ssd"):
        report = memopt.finetune(run)
    torch.set_num_threads(before)
    return run, report


def test_the_run_is_that_of_the_plain_loop(trained: Any) -> None:
    run, report = trained
    steps = steps_of(run)
    batches = [steps.batch(s) for s in range(steps.total)]
    losses, reference = plain_loop(run, batches)
    assert report.results["losses"] == pytest.approx(losses, rel=1e-5)
    assert_close(AutoModelForCausalLM.from_pretrained(run.output), reference)


def test_the_report_tells_the_run(trained: Any) -> None:
    run, report = trained
    results = report.results
    losses = results["losses"]
    assert results["steps"] == len(losses) == 12 and results["final_loss"] == losses[-1]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    micros = [micro for step in range(12) for micro in steps_of(run).batch(step)]
    assert results["tokens"] == sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micros)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert results["parameters"] == model.num_parameters()
    # weights, gradient and two moments, padded a little
    assert 1.0 <= results["training_state_bytes"] / (16 * model.num_parameters()) < 1.1
    assert [step for step, _ in results["eval_losses"]] == [0, 5, 10, 12]
    assert results["eval_losses"][-1][1] < results["eval_losses"][0][1]
    assert report.verdict == "within"
    dram, ssd = report.tiers.dram, report.tiers.ssd
    assert 0 < dram.peak_bytes < dram.budget_bytes and dram.predicted_bytes > 0
    assert ssd.read_bytes > 12 * 12 * model.num_parameters() and ssd.write_bytes > 12 * 12 * model.num_parameters()
    assert {"prepare", "load", "train", "save", "export"} <= {phase.name for phase in report.phases}
    assert json.loads(Path(run.report).read_text())["results"]["losses"] == losses
    assert any("do not attend to each other" in note for note in report.notes)


def test_the_log_has_a_line_per_step(trained: Any) -> None:
    run, report = trained
    rows = rows_of(Path(run.log_file))
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == report.results["losses"]
    assert {row["step"]: row["eval_loss"] for row in rows if row["eval_loss"] is not None} == {
        int(step): loss for step, loss in report.results["eval_losses"] if step in (5, 10)
    }
    assert all(row["grad_norm"] > 0 and row["ssd_read_bytes"] > 0 and row["ssd_write_bytes"] > 0 for row in rows)
    assert rows[0]["lr"] == 0 and max(row["lr"] for row in rows) == pytest.approx(LR)


def test_the_held_out_loss_is_that_of_the_result(trained: Any) -> None:
    run, report = trained
    dataset = TokenDataset.open(Path(run.offload_dir) / "eval.tokens")
    order = BatchOrder(n_sequences=len(dataset), batch_size=1, seed=None)
    steps = PackedSteps(dataset, order)
    model = AutoModelForCausalLM.from_pretrained(run.output).eval()
    total = count = 0.0
    for step in range(steps.total):
        (micro,) = steps.batch(step)
        with torch.no_grad():
            logits = model(input_ids=micro["input_ids"], position_ids=micro["position_ids"]).logits
        labels = micro["labels"][:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum"))
        count += int((labels != -100).sum())
    assert report.results["eval_losses"][-1][1] == pytest.approx(total / count, rel=1e-5)


def test_the_output_is_a_whole_model_directory(trained: Any, tiny: Tiny) -> None:
    run, _ = trained
    output = Path(run.output)
    assert {"config.json", "model.safetensors", "tokenizer.json", "memopt.json"} <= {p.name for p in output.iterdir()}
    text = "Contributors provide an express grant of patent rights."
    assert AutoTokenizer.from_pretrained(output)(text) == AutoTokenizer.from_pretrained(tiny.model())(text)
    before, after = weights_of(tiny.model()), weights_of(output)
    assert before.keys() == after.keys()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not [p.name for p in output.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("where", ["mix", "dram with a store", "no store"])
def test_where_the_state_lives_changes_no_bit(trained: Any, tiny: Tiny, tmp_path: Path, where: str) -> None:
    run, report = trained
    if where == "mix":
        with placed("mix"):
            other = memopt.finetune(config(tiny, tmp_path))
        assert {r["weights"] for r in other.results["plan"]["residence"].values()} == {"dram", "ssd"}
    else:
        place = None if where == "no store" else str(tmp_path / "run")
        other = memopt.finetune(config(tiny, tmp_path, offload_dir=place))
        assert {r["moments"] for r in other.results["plan"]["residence"].values()} == {"dram"}
    assert other.results["losses"] == report.results["losses"]
    assert_same_weights(tmp_path / "out", run.output)


def test_without_clipping_too(tiny: Tiny, tmp_path: Path) -> None:
    run = config(tiny, tmp_path, max_grad_norm=0.0, max_steps=5)
    with placed("ssd"):
        report = memopt.finetune(run)
    steps = steps_of(run)
    losses, reference = plain_loop(run, [steps.batch(s) for s in range(steps.total)])
    assert report.results["losses"] == pytest.approx(losses, rel=1e-5)
    assert_close(AutoModelForCausalLM.from_pretrained(run.output), reference)


def test_prompts_are_read_and_completions_learnt(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}? ", "completion": f"It is {n + 1}."} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = config(tiny, tmp_path, data=str(tmp_path / "train.jsonl"), max_steps=None, epochs=2.0)
    report = memopt.finetune(run)
    steps = steps_of(run)
    batches = [steps.batch(s) for s in range(steps.total)]
    assert any((micro["position_ids"][:, 1:] == 0).any() for step in batches for micro in step)  # several in a sequence
    losses, reference = plain_loop(run, batches)
    assert len(losses) == steps.total == report.results["steps"]
    assert report.results["losses"] == pytest.approx(losses, rel=1e-5)
    assert_close(AutoModelForCausalLM.from_pretrained(run.output), reference)


def test_batches_are_used_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    """Padding on the left, micro-batches of different shapes, no data at all."""
    draw = torch.Generator().manual_seed(1)

    def micro(rows: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 300, (rows, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}

    batches = [[micro(2, 16), micro(1, 24)], [micro(2, 16)], [micro(1, 9), micro(2, 16), micro(1, 8)]]
    run = config(tiny, tmp_path, data=None, schedule="constant", warmup_steps=0)
    with placed("mix"):
        report = memopt.finetune(run, batches=(step for step in batches))
    losses, reference = plain_loop(run, batches)
    assert report.results["losses"] == pytest.approx(losses, rel=1e-5)
    assert_close(AutoModelForCausalLM.from_pretrained(run.output), reference)


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "bfloat16"), ("mixtral", "float32")])
def test_what_goes_in_comes_out(tiny: Tiny, tmp_path: Path, kind: str, dtype: str) -> None:
    run = config(tiny, tmp_path, model=tiny.model(kind, dtype), max_steps=3)
    with placed("ssd"):
        report = memopt.finetune(run)
    before, after = weights_of(run.model), weights_of(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    if kind == "mixtral":
        assert "model.layers.2.block_sparse_moe.experts.3.w2.weight" in after
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    steps = steps_of(run)
    losses, reference = plain_loop(run, [steps.batch(s) for s in range(steps.total)])
    assert report.results["losses"] == pytest.approx(losses, rel=1e-5)
    result = AutoModelForCausalLM.from_pretrained(run.output, dtype="auto")
    assert result.dtype == getattr(torch, dtype)
    if dtype == "bfloat16":  # the master weights, rounded once at the end
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(result.get_parameter(name), parameter.bfloat16(), atol=1e-6, rtol=2**-7)
    else:
        assert_close(result, reference)
