"""`memopt.ProfilerCallback` in real Trainers: what it logs, reports, and leaves behind."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import memopt
from memopt.errors import BadInput, OverBudget
from memopt.profiler.over import OverWarning
from memopt.profiler.samplers import process_memory
from tests.reference import torch_bytes

SEQ, VOCAB, STEPS = 24, 256, 3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    """The Trainer seeds everything; leave the tests beside these as they were."""
    with torch.random.fork_rng(devices=[]):
        yield


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def rows(count: int = 32) -> list[dict[str, list[int]]]:
    text = Path(json.__file__).with_name("decoder.py").read_bytes()
    pieces = [list(text[i * SEQ : (i + 1) * SEQ]) for i in range(count)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def trainer_for(directory: Path, callbacks: list[TrainerCallback] | None = None, **changes: Any) -> Trainer:
    given: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Trainer(
        model=llama(),
        args=TrainingArguments(**{**given, **changes}),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=callbacks,
    )


def logged(trainer: Trainer, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def hooks(trainer: Trainer) -> int:
    model = trainer.model
    count = len(model._forward_hooks) + len(model._forward_pre_hooks)
    count += sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return count + (top is not None)


def tight() -> str:
    memory = process_memory()
    assert memory is not None
    return f"dram={memory.charged_bytes // 2}B"


class Broken(TrainerCallback):
    """Fails in the second step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            raise ConnectionError("the disk is gone")


def test_a_run_with_accumulation(tmp_path: Path) -> None:
    plain = trainer_for(tmp_path)
    plain.train()
    trainer = trainer_for(tmp_path)
    callback = memopt.ProfilerCallback(budget="dram=1TiB", report=tmp_path / "run.json", interval_s=0.005)
    trainer.add_callback(callback)
    trainer.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert logged(trainer, "memopt/dram_budget_bytes") == [2**40] * STEPS
    weights = torch_bytes.weight_bytes(trainer.model)
    assert logged(trainer, "memopt/dram/weights_bytes") == [weights] * STEPS
    state = torch_bytes.state_bytes(trainer.optimizer.optimizer)
    assert logged(trainer, "memopt/dram/optimizer_bytes") == [state] * STEPS
    for now, peak in zip(logged(trainer, "memopt/dram_bytes"), logged(trainer, "memopt/dram_peak_bytes"), strict=True):
        assert weights < now <= peak
    report = memopt.Report.load(tmp_path / "run.json")
    assert report.to_dict() == callback.report.to_dict()
    assert [p.name for p in report.phases] == [*["forward", "backward"] * 2, "optimizer"] * STEPS
    assert (report.results, report.verdict) == ({"steps": STEPS}, "within")
    assert report.tiers.dram.at_peak["weights"] == weights
    assert not [note for note in report.notes if "attribution" in note]
    assert hooks(trainer) == 0
    assert callback.profiler is None
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("attached", [False, True])
def test_evaluating_and_saving_are_phases(attached: bool, tmp_path: Path) -> None:
    callback = memopt.ProfilerCallback()
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, gradient_accumulation_steps=1, **steps)
    undo = callback.attach(trainer) if attached else trainer.add_callback(callback)
    trainer.train()
    names = [phase.name for phase in callback.report.phases]
    step = ["forward", "backward", "optimizer"]
    # a phase is listed when it ends: the forward pass of the evaluation before it
    assert names[: 2 * 3] == step * 2
    assert names[6:9] == ["forward", "evaluate", "save"]
    assert names[9:12] == step
    assert names[12:] == ["forward", "evaluate", "save"]
    save = callback.report.phases[8]
    assert save.end_s > save.start_s
    if undo is not None:
        undo()
        undo()
        assert callback not in trainer.callback_handler.callbacks


def test_attached_reporters_get_the_numbers_too(tmp_path: Path) -> None:
    seen: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}

    def reporter(name: str) -> TrainerCallback:
        class Reporter(TrainerCallback):
            def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
                seen[name].append(dict(logs))

        return Reporter()

    trainer = trainer_for(tmp_path, [reporter("before")], max_steps=1)
    memopt.ProfilerCallback().attach(trainer)
    trainer.add_callback(reporter("after"))
    trainer.train()
    for entries in seen.values():
        assert "memopt/dram_bytes" in entries[0]
        assert not any(name.startswith("memopt/") for name in entries[-1]), "the summary is not a training step"


def test_checkpointing_and_two_runs(tmp_path: Path) -> None:
    callback = memopt.ProfilerCallback(report=tmp_path / "run.json")
    trainer = trainer_for(tmp_path, [callback], gradient_checkpointing=True, max_steps=1)
    trainer.train()
    first = callback.report
    trainer.train()
    assert callback.report is not first
    assert len(callback.report.phases) == len(first.phases) > 0


class TestBudget:
    def test_warns(self, tmp_path: Path) -> None:
        callback = memopt.ProfilerCallback(budget=tight())
        trainer = trainer_for(tmp_path, [callback])
        with pytest.warns(OverWarning, match="dram budget of") as caught:
            trainer.train()
        assert len([warning for warning in caught if warning.category is OverWarning]) == 1
        assert trainer.state.global_step == STEPS
        assert callback.report.verdict == "over"

    def test_raises_at_the_end_of_the_step(self, tmp_path: Path) -> None:
        callback = memopt.ProfilerCallback(budget=tight(), on_over="raise", report=tmp_path / "run.json")
        trainer = trainer_for(tmp_path, [callback])
        with pytest.raises(OverBudget, match="largest: .*runtime"):
            trainer.train()
        assert trainer.state.global_step == 1
        report = memopt.Report.load(tmp_path / "run.json")
        assert (report.verdict, report.results) == ("over", {"steps": 1})
        assert hooks(trainer) == 0

    def test_stops_as_if_done(self, tmp_path: Path) -> None:
        callback = memopt.ProfilerCallback(budget=tight(), on_over="stop")
        trainer = trainer_for(tmp_path, [callback])
        assert trainer.train().global_step == 1
        assert callback.report.verdict == "over"
        assert hooks(trainer) == 0

    def test_bad_input_is_told_when_it_is_made(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="on_over 'panic'"):
            memopt.ProfilerCallback(on_over="panic")  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="budget '8GiB'"):
            memopt.ProfilerCallback(budget="8GiB")
        with pytest.raises(BadInput, match="there is no directory"):
            memopt.ProfilerCallback(report=tmp_path / "none" / "run.json")


class TestExceptions:
    @pytest.mark.parametrize("end", ["close", "with", "next run", "garbage"])
    def test_what_was_measured_is_reported(self, end: str, tmp_path: Path) -> None:
        file = tmp_path / "run.json"
        callback = memopt.ProfilerCallback(report=file)
        with pytest.raises(RuntimeError, match="no run has ended"):
            _ = callback.report
        trainer = trainer_for(tmp_path, [callback, Broken()])
        if end == "with":
            with pytest.raises(ConnectionError), callback:
                trainer.train()
        else:
            with pytest.raises(ConnectionError):
                trainer.train()
            assert not file.exists()
            if end == "close":
                callback.close()
                callback.close()
            elif end == "next run":
                trainer.remove_callback(Broken)
                trainer.train()
                assert callback.report.results == {"steps": STEPS}
            else:
                trainer.remove_callback(callback)
                del callback
                gc.collect()
        report = memopt.Report.load(file)
        if end != "next run":
            assert any("without the Trainer saying so" in note for note in report.notes)
            assert report.results == {"steps": 1}
            assert [p.name for p in report.phases][:5] == ["forward", "backward", "forward", "backward", "optimizer"]
        assert hooks(trainer) == 0

    def test_at_the_end_of_the_program(self, run_python, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        code = """
import sys
from pathlib import Path
import memopt
from tests.test_hf_profiler import Broken, trainer_for
directory = Path(sys.argv[1])
trainer_for(directory, [memopt.ProfilerCallback(report=directory / "run.json"), Broken()]).train()
"""
        done = run_python(code, str(tmp_path))
        assert done.returncode == 1
        assert "ConnectionError: the disk is gone" in done.stderr.splitlines()[-1]
        report = memopt.Report.load(tmp_path / "run.json")
        assert report.complete
        assert report.results == {"steps": 1}


def test_the_first_process_has_the_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = memopt.ProfilerCallback(report=tmp_path / "run.json")
    trainer = trainer_for(tmp_path, [callback], max_steps=1)
    monkeypatch.setattr(TrainingArguments, "process_index", 2)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("run*")) == ["run-rank2.json"]
