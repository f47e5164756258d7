"""`--method lora` against peft in memory: the same training, an adapter that peft loads, a base that is only read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import memopt
from memopt.jobs.opened_model import OpenedModel, open_model
from memopt.patches.hf_checkpoint import decay_names
from tests.finetune_helpers import Forks, Tiny, assert_same_weights, placed, rows_of, run_line, wait_for, weights_of
from tests.reference.in_memory import train_in_memory
from tests.test_finetune_result import config, steps_of

pytestmark = pytest.mark.usefixtures("one_thread")

LR = 5e-3
PREFIX = "base_model.model."


def lora(tiny: Tiny, at: Path, **changes: Any) -> memopt.FinetuneConfig:
    return config(
        tiny, at, method="lora", lora_rank=4, lora_alpha=8.0, lr=LR, schedule="constant", warmup_steps=0, max_steps=6,
        **changes,
    )  # fmt: skip


def opened(run: memopt.FinetuneConfig) -> OpenedModel:
    return open_model(run, run.model, torch.float32, tokenizer=None)


def in_memory(run: memopt.FinetuneConfig, targets: list[str] | None) -> tuple[list[float], Any]:
    """peft and torch.optim.AdamW on the batches of `run`, from the adapters that it began with."""
    model = AutoModelForCausalLM.from_pretrained(run.model)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="CAUSAL_LM", r=run.lora_rank, lora_alpha=int(run.lora_alpha), target_modules=targets),
    )
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    initial = opened(run).read([name.removeprefix(PREFIX) for name in trained])
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(initial[name.removeprefix(PREFIX)])
    steps = steps_of(run)
    losses = train_in_memory(
        adapted,
        [steps.batch(s) for s in range(steps.total)],
        lr=lambda step: run.lr,
        decay=set(decay_names(adapted)),
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
    )
    return losses, adapted


@pytest.mark.parametrize(("targets", "clip"), [(None, 1.0), (["q_proj", "down_proj"], 0.0)])
def test_it_is_pefts_training(tiny: Tiny, tmp_path: Path, targets: list[str] | None, clip: float) -> None:
    run = lora(tiny, tmp_path, lora_target_modules=targets, max_grad_norm=clip)
    with placed("ssd"):
        report = memopt.finetune(run)
    losses, reference = in_memory(run, targets)
    assert report.results["losses"] == pytest.approx(losses, rel=1e-5)
    adapters, expected = weights_of(tmp_path / "out"), peft.get_peft_model_state_dict(reference)
    assert adapters.keys() == expected.keys()
    assert all((adapters[name] - tensor).abs().max() <= 0.1 * LR for name, tensor in expected.items())
    base = AutoModelForCausalLM.from_pretrained(run.model)
    base_parameters = base.num_parameters()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, reference.eval()(ids).logits, atol=1e-4, rtol=1e-4)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(ids).logits, reference(ids).logits, atol=1e-4)
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert about["r"] == 4 and about["base_model_name_or_path"] == run.model and about["inference_mode"]
    assert set(about["target_modules"]) == set(targets or ["q_proj", "v_proj"])
    assert (tmp_path / "out" / "tokenizer.json").exists()
    adapted = sum(tensor.numel() for tensor in adapters.values())
    assert report.results["parameters"] == adapted
    assert report.results["frozen_parameters"] == base_parameters


def test_the_base_is_only_read(tiny: Tiny, tmp_path: Path) -> None:
    """On SSD it has one version, which training leaves as it was loaded, in the type of the checkpoint."""
    run = lora(tiny, tmp_path, model=tiny.model("llama", "bfloat16"), log_file=str(tmp_path / "log.jsonl"))
    with placed("ssd"):
        memopt.finetune(run)
    index = json.loads((tmp_path / "run" / "state" / "index.json").read_text())["body"]
    assert index["kinds"]["frozen"]["versions"] == 1 and index["kinds"]["weights"]["versions"] == 2
    frozen = (tmp_path / "run" / "state" / "frozen.bin").read_bytes()
    base = weights_of(run.model)
    for name, tensor in base.items():
        assert tensor.view(torch.uint8).numpy().tobytes() in frozen, name
    nbytes = sum(tensor.nbytes for tensor in base.values())
    rows = rows_of(tmp_path / "log.jsonl")
    adapters = sum(tensor.nbytes for tensor in weights_of(tmp_path / "out").values())
    assert rows[2]["ssd_read_bytes"] > nbytes  # the base streams, each step
    written = (tmp_path / "run" / "state" / "frozen.bin").stat().st_mtime_ns
    assert written < (tmp_path / "run" / "state" / "weights.bin").stat().st_mtime_ns
    # what a step writes: adapters, moments and gradients (4 x), boundary activations; blocks of 4 KiB
    assert all(row["ssd_write_bytes"] < 4 * adapters + 300_000 for row in rows)


def test_where_it_lives_changes_no_bit(tiny: Tiny, tmp_path: Path) -> None:
    reports = []
    for where in ("ssd", "mix", "no store"):
        at = tmp_path / where
        if where == "no store":
            reports.append(memopt.finetune(lora(tiny, at, offload_dir=None, lora_dropout=0.2)))
        else:
            with placed(where):
                reports.append(memopt.finetune(lora(tiny, at, lora_dropout=0.2)))
    assert reports[0].results["losses"] == reports[1].results["losses"] == reports[2].results["losses"]
    assert_same_weights(tmp_path / "ssd" / "out", tmp_path / "mix" / "out")
    assert_same_weights(tmp_path / "ssd" / "out", tmp_path / "no store" / "out")


def test_killed_and_resumed(tiny: Tiny, forks: Forks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(at: Path, *more: object) -> list[object]:
        return [
            "finetune", "--model", tiny.model(), "--data", tiny.text, "--method", "lora", "--lora-dropout", 0.1,
            "--offload-dir", at / "run", "--output", at / "out", "--log-file", at / "log.jsonl", "--seq-len", 32,
            "--max-steps", 15, "--lr", 1e-3, "--quiet", "--save-every", 1, *more,
        ]  # fmt: skip

    one, two = tmp_path / "one", tmp_path / "two"
    assert forks.start(*run(one), where="mix").wait() == 0
    child = forks.start(*run(two), where="mix")
    wait_for(lambda: len(rows_of(two / "log.jsonl")) >= 4, "four steps")
    child.kill()
    assert child.wait() == -9
    done = len(rows_of(two / "log.jsonl"))
    code, said = run_line(capfd, "export", two / "run", "--output", two / "early")
    assert code == 0 and (two / "early" / "adapter_model.safetensors").exists()
    assert forks.start(*run(two, "--resume"), where="ssd").wait() == 0
    # the save after step 3 is under way when the line of step 4 is written
    assert done < 15 and rows_of(two / "log.jsonl")[done]["step"] >= 3
    assert_same_weights(one / "out", two / "out")


@pytest.mark.parametrize(
    ("kind", "targets", "placed_on"),
    [
        ("llama", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", "c_attn", {"c_attn"}),
    ],
)
def test_it_is_placed_where_peft_would(
    tiny: Tiny, tmp_path: Path, kind: str, targets: str, placed_on: set[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Every linear layer; a layer that is stored turned, of which peft would warn."""
    run = lora(tiny, tmp_path, model=tiny.model(kind), lora_target_modules=targets)
    memopt.finetune(run.with_changes(max_steps=1))
    assert not recwarn.list
    adapters = weights_of(tmp_path / "out")
    assert {name.split(".")[-3] for name in adapters} == placed_on
    base = AutoModelForCausalLM.from_pretrained(run.model)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert peft.get_peft_model_state_dict(loaded).keys() == adapters.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora-target-modules", "no_such_proj"], "LoRA cannot be placed"),
        (["--lora-target-modules", "lm_head"], r"LoRA on the output head \(lm_head\)"),
        (["--lora-target-modules", "embed_tokens"], r"LoRA on the input embedding \(model.embed_tokens\)"),
        (["--lora-target-modules", "q_proj,w_proj"], "LoRA cannot be placed: .*no module 'w_proj'"),
        (["--init", "random"], "adapters cannot save random weights"),
    ],
)
def test_adapters_that_cannot_be(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    run = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--method", "lora", "--output", tmp_path / "out"]
    code, said = run_line(capfd, *run, *flags, "--quiet")
    assert code == 2 and said.count("\n") == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said)
    assert not list(tmp_path.iterdir())


def test_an_architecture_peft_does_not_know(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import constants

    monkeypatch.delitem(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "llama")
    run = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--method", "lora", "--quiet", "--max-steps", 1]
    code, said = run_line(capfd, *run, "--output", tmp_path / "out")
    assert code == 2 and said.count("\n") == 1 and "--lora-target-modules" in said
    code, said = run_line(capfd, *run, "--output", tmp_path / "out", "--lora-target-modules", "q_proj,v_proj")
    assert code == 0
