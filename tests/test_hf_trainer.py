"""Real runs of Hugging Face's Trainer, and trl's, with memopt's optimizer: tiny Llama on Python's own sources."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import memopt
from memopt.errors import BadInput, NonFinite, OverBudget
from memopt.optim.optimizer import Optimizer
from memopt.optim.presets import PRESETS
from memopt.patches.hf_trainer import ours

SEQ, VOCAB, STEPS, SAVED = 24, 256, 5, 2
NAMES = sorted(PRESETS)
SOME = ["adamw8bit", "galore_muon", "muon8bit"]
RATES = {"sgd": 3e-2, "lion": 1e-3, "lion8bit": 1e-3}
SETTINGS = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ,
    "tie_word_embeddings": False,
}
"""Queries, outputs and feed-forward layers have 4096 elements or more in rows of 64 or more: 8-bit states apply."""

pytestmark = pytest.mark.usefixtures("one_thread")


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """The same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**SETTINGS, **changes}))


def rows(count: int = 64) -> list[dict[str, list[int]]]:
    """Pieces of a source file of the standard library, a byte a token."""
    text = Path(json.__file__).with_name("decoder.py").read_bytes()
    pieces = [list(text[i * SEQ : (i + 1) * SEQ]) for i in range(count)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    """Five steps of two micro-batches, clipped, saved after the second."""
    given: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **changes})


def trainer_for(model: Any, directory: Path, cls: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    """A Trainer as anyone makes it."""
    return cls(model=model, args=arguments(directory, **changes), train_dataset=rows())


def options_of(preset: str) -> dict[str, Any]:
    """A rank that fits, and a gap that ends within the run and not where it is saved."""
    return {"rank": 6, "update_proj_gap": 3} if "galore" in preset else {}


def attach(trainer: Trainer, preset: str, **options: Any) -> Any:
    """Without the table."""
    return memopt.attach_optimizer(trainer, preset, quiet=True, **{**options_of(preset), **options})


def weights(model: nn.Module) -> torch.Tensor:
    """All parameters, one after the other."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loss_of(model: nn.Module) -> float:
    """Of the first rows."""
    tokens = torch.tensor([row["input_ids"] for row in rows(8)])
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


def logged(trainer: Trainer, name: str) -> list[Any]:
    """What the training steps logged under a name."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """accelerate collects garbage at the start of every run; all modules that are loaded need not be gone through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    """The Trainer seeds everything; leave the tests beside these as they were."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


class TestResume:
    """Accumulation, clipping, a checkpoint, a fresh Trainer that goes on from it."""

    @pytest.mark.parametrize("preset", NAMES)
    def test_every_preset(self, preset: str, tmp_path: Path) -> None:
        changes = {"save_strategy": "steps", "save_steps": SAVED, "learning_rate": RATES.get(preset, 5e-3)}
        straight = trainer_for(llama(), tmp_path, **changes)
        attach(straight, preset)
        straight.train()
        assert loss_of(straight.model) < loss_of(llama()) - 0.05
        sizes = logged(straight, "optimizer_state_mib")
        optimizer = ours(straight.optimizer)
        assert optimizer is not None
        assert sizes == [optimizer.state_bytes() / 2**20] * STEPS
        assert all(math.isfinite(norm) and norm > 0 for norm in logged(straight, "grad_norm"))

        resumed = trainer_for(llama(seed=1), tmp_path, **changes)
        attach(resumed, preset)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
        assert torch.equal(weights(resumed.model), weights(straight.model))
        assert logged(resumed, "loss") == logged(straight, "loss")

    @pytest.mark.parametrize("preset", SOME)
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_layerwise(self, preset: str, accumulate: int, tmp_path: Path) -> None:
        changes = {"save_strategy": "steps", "save_steps": SAVED, "gradient_accumulation_steps": accumulate}

        def run(model: LlamaForCausalLM, **more: Any) -> Trainer:
            trainer = trainer_for(model, tmp_path, **changes)
            if accumulate > 1:
                with pytest.warns(UserWarning, match="held until the last micro-batch"):
                    attach(trainer, preset, layerwise=True)
            else:
                attach(trainer, preset, layerwise=True)
            trainer.train(**more)
            return trainer

        straight = run(llama())
        norms = logged(straight, "grad_norm")
        assert len(norms) == STEPS and min(norms) > 0
        state = torch.load(tmp_path / f"checkpoint-{SAVED}" / "optimizer.pt", weights_only=True)
        assert state["param_groups"][0]["previous_norm"] == norms[SAVED - 1]
        resumed = run(llama(seed=1), resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
        assert torch.equal(weights(resumed.model), weights(straight.model))
        assert logged(resumed, "grad_norm") == norms

    def test_a_checkpoint_of_another_preset(self, tmp_path: Path) -> None:
        first = trainer_for(llama(), tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
        attach(first, "lion")
        first.train()
        second = trainer_for(llama(), tmp_path)
        attach(second, "muon")
        with pytest.raises(BadInput, match="belongs to another optimizer"):
            second.train(resume_from_checkpoint=True)

    def test_twice_on_one_trainer(self, tmp_path: Path) -> None:
        trainer = trainer_for(llama(), tmp_path, max_steps=2)
        attach(trainer, "adamw8bit")
        trainer.train()
        before = weights(trainer.model).clone()
        trainer.train()
        assert not torch.equal(weights(trainer.model), before)
        assert ours(trainer.optimizer) is not None


class TestLayerwise:
    """Updates during the backward pass."""

    @pytest.mark.parametrize("preset", SOME)
    def test_as_the_ordinary_step(self, preset: str, tmp_path: Path) -> None:
        ordinary, during = (trainer_for(llama(), tmp_path, max_grad_norm=0.0) for _ in range(2))
        attach(ordinary, preset)
        with pytest.warns(UserWarning, match="held until the last micro-batch"):
            attach(during, preset, layerwise=True)
        ordinary.train()
        during.train()
        torch.testing.assert_close(weights(during.model), weights(ordinary.model), rtol=0, atol=1e-5)
        assert logged(during, "grad_norm") == pytest.approx(logged(ordinary, "grad_norm"), rel=1e-3)

    def test_gradients_are_freed(self, tmp_path: Path) -> None:
        held: list[int] = []

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
                held.append(sum(p.grad is not None for p in model.parameters()))

        trainer = trainer_for(llama(), tmp_path, gradient_accumulation_steps=1, gradient_checkpointing=True)
        attach(trainer, "muon", layerwise="per_param")
        trainer.add_callback(Watch())
        trainer.train()
        assert held == [0] * STEPS

    def test_undo_gives_the_clipping_back(self, tmp_path: Path) -> None:
        trainer = trainer_for(llama(), tmp_path, gradient_accumulation_steps=1, max_steps=2)
        undo = attach(trainer, "adamw", layerwise=True)
        assert trainer.args.max_grad_norm == 0.0
        trainer.train()
        undo()
        assert trainer.args.max_grad_norm == 0.5
        assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())

    def test_no_clipping_is_said(self, tmp_path: Path) -> None:
        trainer = trainer_for(llama(), tmp_path, gradient_accumulation_steps=1)
        with pytest.warns(UserWarning, match=r"gradients are not clipped \(max_grad_norm=0.5"):
            attach(trainer, "adamw", layerwise="none")


class TestArguments:
    """What the Trainer's arguments say, the optimizer does."""

    @staticmethod
    def groups(model: Any, directory: Path, preset: str, **changes: Any) -> tuple[Optimizer, Trainer]:
        trainer = trainer_for(model, directory, max_steps=1, **changes)
        attach(trainer, preset)
        trainer.train()
        optimizer = ours(trainer.optimizer)
        assert optimizer is not None
        return optimizer, trainer

    @pytest.mark.parametrize("preset", ["galore", "muon", "adamw"])
    def test_they_reach_every_group(self, preset: str, folder: Path) -> None:
        # transformers' own GaLore drops all three
        said = {"weight_decay": 0.07, "adam_beta1": 0.8, "adam_beta2": 0.97, "adam_epsilon": 1e-5}
        optimizer, _ = self.groups(llama(), folder, preset, learning_rate=0.3, **said)
        for group in optimizer.param_groups:
            assert group["betas"] == (0.8, 0.97)
            assert group["eps"] == 1e-5
            assert group["initial_lr"] == 0.3
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.07}

    def test_defaults_leave_the_presets(self, folder: Path) -> None:
        optimizer, _ = self.groups(llama(), folder, "muon")
        assert {group["betas"] for group in optimizer.param_groups if "adamw" in group["policy"]} == {(0.9, 0.95)}

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_what_decays_is_as_before(self, kind: str, folder: Path) -> None:
        small = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=SEQ)
        model = llama() if kind == "llama" else GPT2LMHeadModel(small)
        optimizer, trainer = self.groups(model, folder, "galore")
        names = {id(p): name for name, p in model.named_parameters()}
        decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        assert decayed == set(trainer.get_decay_parameter_names(model)) & set(names.values())

    def test_what_is_set_after_attaching_counts(self, folder: Path) -> None:
        trainer = trainer_for(llama(), folder, max_steps=1)
        attach(trainer, "adamw")
        trainer.args.learning_rate = 0.25
        trainer.train()
        assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.25

    def test_options_go_before_them(self, folder: Path) -> None:
        trainer = trainer_for(llama(), folder, max_steps=1)
        attach(trainer, "adamw", lr=0.125, weight_decay=0.0, betas=(0.5, 0.6))
        trainer.train()
        for group in trainer.optimizer.param_groups:
            assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (0.125, 0.0, (0.5, 0.6))

    def test_adamw_is_the_trainers_own(self, folder: Path) -> None:
        theirs, mine = (trainer_for(llama(), folder, optim="adamw_torch_fused") for _ in range(2))
        attach(mine, "adamw")
        theirs.train()
        mine.train()
        assert torch.equal(weights(mine.model), weights(theirs.model))
        assert logged(mine, "grad_norm") == logged(theirs, "grad_norm")


class TestLog:
    """What a run prints, logs and reports."""

    def test_the_table(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        memopt.attach_optimizer(trainer_for(llama(), folder), "galore8bit", rank=6)
        out, table = capsys.readouterr()
        assert out == ""
        lines = table.splitlines()
        assert lines[0].startswith("memopt optimizer galore8bit: ")
        assert any(line.startswith("ffn-down") and "galore(6) adamw" in line for line in lines)
        assert any("model.norm.weight" in line or "input_layernorm.weight" in line for line in lines)
        memopt.attach_optimizer(trainer_for(llama(), folder), "adamw", quiet=True)
        assert capsys.readouterr().err == ""

    def test_reporters_get_it_too(self, folder: Path) -> None:
        seen: list[dict[str, Any]] = []

        class Reporter(TrainerCallback):
            def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
                seen.append(dict(logs))

        trainer = Trainer(
            model=llama(),
            args=arguments(folder, max_steps=2),
            train_dataset=rows(),
            callbacks=[Reporter()],
        )
        attach(trainer, "muon", budget="dram=8MiB", nonfinite="skip", spectra=True)
        trainer.train()
        entry = seen[0]
        assert entry == {k: v for k, v in trainer.state.log_history[0].items() if k != "step"}
        assert entry["dram_budget_mib"] == 8.0
        assert entry["dram_charged_mib"] == pytest.approx(entry["optimizer_state_mib"])
        assert entry["skipped_steps"] == 0
        names = {name for name in entry if name.startswith("spectrum/")}
        assert {"spectrum/v/entropy", "spectrum/ffn-down/effective_rank"} <= names
        json.dumps(seen)

    def test_over_budget(self, folder: Path) -> None:
        trainer = trainer_for(llama(), folder)
        before = weights(trainer.model).clone()
        attach(trainer, "adamw", budget="dram=64KiB")
        with pytest.raises(OverBudget):
            trainer.train()
        assert torch.equal(weights(trainer.model), before)

    def test_a_gradient_that_is_not_finite(self, folder: Path) -> None:
        def poison(trainer: Trainer) -> None:
            weight = trainer.model.model.layers[1].mlp.up_proj.weight
            weight.register_hook(lambda grad: grad * math.nan if trainer.state.global_step == 1 else grad)

        trainer = trainer_for(llama(), folder, max_steps=3)
        poison(trainer)
        attach(trainer, "galore8bit", nonfinite="skip")
        trainer.train()
        assert logged(trainer, "skipped_steps") == [0, 1, 1]
        assert weights(trainer.model).isfinite().all()
        trainer = trainer_for(llama(), folder, max_steps=3)
        poison(trainer)
        attach(trainer, "galore8bit")
        with pytest.raises(NonFinite, match=r"gradient of all \d+ parameters \(clipping spreads"):
            trainer.train()

    def test_a_gradient_that_is_not_finite_layerwise(self, folder: Path) -> None:
        def poisoned(nonfinite: str) -> Trainer:
            trainer = trainer_for(llama(), folder, max_steps=3, gradient_accumulation_steps=1)
            weight, steps = trainer.model.model.layers[1].mlp.up_proj.weight, iter(range(STEPS * 2))
            weight.register_hook(lambda grad: grad * math.nan if next(steps) == 1 else grad)
            attach(trainer, "galore8bit", nonfinite=nonfinite, layerwise=True)
            return trainer

        trainer = poisoned("skip")
        trainer.train()
        assert logged(trainer, "skipped_steps") == [0, 1, 1]
        assert weights(trainer.model).isfinite().all()
        assert logged(trainer, "grad_norm")[1] == logged(trainer, "grad_norm")[0]
        trainer = poisoned("raise")
        with pytest.raises(
            NonFinite, match=r"gradient of model\.layers\.1\.mlp\.up_proj\.weight has.*; it was not updated"
        ):
            trainer.train()
        # the hooks of the run that ended like this are gone when the next begins
        trainer.train()
        assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())


class OwnOptimizer(Trainer):
    """A subclass that makes its optimizer itself."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


class TestRefusals:
    """One clear error each, and the Trainer as it was."""

    def test_a_trainer_with_an_optimizer(self, folder: Path) -> None:
        model = llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model=model, args=arguments(folder), train_dataset=rows(), optimizers=(optimizer, None))
        with pytest.raises(BadInput, match=r"already has an optimizer \(SGD\)"):
            attach(trainer, "adamw")
        assert trainer.optimizer is optimizer

    def test_a_second_time(self, folder: Path) -> None:
        trainer = trainer_for(llama(), folder)
        attach(trainer, "adamw")
        with pytest.raises(BadInput, match="attach_optimizer was called before"):
            attach(trainer, "muon")

    def test_a_trainer_that_makes_its_own(self, folder: Path) -> None:
        trainer = trainer_for(llama(), folder, OwnOptimizer)
        before = weights(trainer.model).clone()
        attach(trainer, "adamw")
        with pytest.raises(BadInput, match=r"OwnOptimizer made its own optimizer \(SGD\)"):
            trainer.train()
        assert torch.equal(weights(trainer.model), before)

    def test_fsdp_1(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = trainer_for(llama(), folder)
        plugin = SimpleNamespace(fsdp_version=1)
        monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)
        with pytest.raises(BadInput, match="FSDP version 1 flattens.*fsdp_version: 2"):
            attach(trainer, "adamw")
        plugin.fsdp_version = 2
        attach(trainer, "adamw")

    def test_deepspeed(self, folder: Path) -> None:
        trainer = trainer_for(llama(), folder)
        trainer.is_deepspeed_enabled = True
        for preset in ("muon", "galore8bit", "galore_muon"):
            with pytest.raises(BadInput, match=r"works on matrices.*\"type\": \"Muon\".*adamw8bit"):
                attach(trainer, preset)
        with pytest.raises(BadInput, match="layerwise: DeepSpeed"):
            attach(trainer, "adamw8bit", layerwise=True)
        attach(trainer, "adamw8bit")

    def test_layerwise_with_loss_scaling(self, folder: Path) -> None:
        trainer = trainer_for(llama(), folder)
        trainer.accelerator.scaler = object()
        with pytest.raises(BadInput, match="layerwise: fp16 loss scaling"):
            attach(trainer, "adamw", layerwise=True)

    def test_layerwise_with_ddp(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = trainer_for(llama(), folder)
        monkeypatch.setattr(TrainingArguments, "parallel_mode", SimpleNamespace(value="distributed"))
        with pytest.raises(BadInput, match="layerwise: DistributedDataParallel"):
            attach(trainer, "adamw", layerwise=True)
        assert trainer.args.max_grad_norm == 0.5

    @pytest.mark.parametrize(
        ("preset", "options", "message"),
        [
            ("galor", {}, "preset: 'galor' is unknown; choose from adamw, adamw8bit"),
            ("galore", {"rank": 0}, "rank: 0"),
            ("galore", {"rnk": 4}, "option: 'rnk' is unknown"),
            ("adamw", {"layerwise": "global"}, "layerwise: 'global' is not True, False or one of none, per_param"),
            ("adamw", {"lr": -1.0}, "lr: -1"),
            ("adamw", {"nonfinite": "maybe"}, "nonfinite: 'maybe'"),
            ("muon", {"overrides": {"model.norm.weight": "muon"}}, "no matrix"),
        ],
    )
    def test_bad_input(self, preset: str, options: dict[str, Any], message: str, folder: Path) -> None:
        trainer = trainer_for(llama(), folder)
        callbacks = list(trainer.callback_handler.callbacks)
        with pytest.raises(BadInput, match=message):
            memopt.attach_optimizer(trainer, preset, **options)
        assert trainer.optimizer_cls_and_kwargs is None
        assert trainer.callback_handler.callbacks == callbacks
        assert trainer.args.max_grad_norm == 0.5

    def test_undo(self, folder: Path) -> None:
        trainer, untouched = trainer_for(llama(), folder), trainer_for(llama(), folder)
        callbacks = list(trainer.callback_handler.callbacks)
        undo = attach(trainer, "galore")
        undo()
        undo()
        assert trainer.optimizer_cls_and_kwargs is None
        assert trainer.callback_handler.callbacks == callbacks
        trainer.train()
        untouched.train()
        assert torch.equal(weights(trainer.model), weights(untouched.model))
        assert "optimizer_state_mib" not in trainer.state.log_history[0]


class TestModels:
    """Models that are not plain."""

    @pytest.mark.parametrize("preset", ["adamw8bit", "muon", "galore"])
    def test_lora(self, preset: str, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        saving = {"save_strategy": "steps", "save_steps": SAVED, "learning_rate": 2e-2}
        config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")

        def adapted() -> Any:
            torch.manual_seed(5)
            return peft.get_peft_model(llama(), config)

        straight = trainer_for(adapted(), tmp_path, **saving)
        before = loss_of(straight.model)
        frozen = straight.model.base_model.model.lm_head.weight.clone()
        attach(straight, preset)
        straight.train()
        assert loss_of(straight.model) < before
        assert torch.equal(straight.model.base_model.model.lm_head.weight, frozen)
        resumed = trainer_for(adapted(), tmp_path, **saving)
        attach(resumed, preset)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
        assert torch.equal(weights(resumed.model), weights(straight.model))

    @pytest.mark.parametrize("layerwise", [False, "per_param"])
    def test_compiled(self, layerwise: Any, folder: Path) -> None:
        changes = {"max_steps": 3, "gradient_accumulation_steps": 1}
        compiled = trainer_for(llama(), folder, torch_compile=True, torch_compile_backend="eager", **changes)
        plain = trainer_for(llama(), folder, **changes)
        for trainer in (compiled, plain):
            attach(trainer, "muon8bit", layerwise=layerwise)
            trainer.train()
        torch.testing.assert_close(weights(compiled.model), weights(plain.model), rtol=0, atol=1e-5)

    def test_bfloat16(self, tmp_path: Path) -> None:
        saving = {"save_strategy": "steps", "save_steps": SAVED}
        straight = trainer_for(llama().to(torch.bfloat16), tmp_path, **saving)
        attach(straight, "muon8bit")
        straight.train()
        resumed = trainer_for(llama(seed=1).to(torch.bfloat16), tmp_path, **saving)
        attach(resumed, "muon8bit")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
        assert torch.equal(weights(resumed.model), weights(straight.model))

    def test_autocast(self, folder: Path) -> None:
        trainer = trainer_for(llama(), folder, bf16=True)
        attach(trainer, "galore8bit")
        trainer.train()
        assert loss_of(trainer.model) < loss_of(llama())

    def test_tied(self, folder: Path) -> None:
        trainer = trainer_for(llama(tie_word_embeddings=True), folder)
        attach(trainer, "muon", layerwise=False)
        trainer.train()
        assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
        assert loss_of(trainer.model) < loss_of(llama(tie_word_embeddings=True))

    def test_model_init(self, folder: Path) -> None:
        trainer = Trainer(model_init=lambda: llama(), args=arguments(folder), train_dataset=rows())
        attach(trainer, "galore")
        trainer.train()
        again = trainer_for(llama(), folder)
        attach(again, "galore")
        again.train()
        assert torch.equal(weights(trainer.model), weights(again.model))

    def test_experts(self, folder: Path) -> None:
        config = AutoConfig.for_model("mixtral", **SETTINGS, num_local_experts=3)
        torch.manual_seed(0)
        trainer = trainer_for(AutoModelForCausalLM.from_config(config), folder, max_steps=2)
        before = weights(trainer.model).clone()
        attach(trainer, "galore_muon")
        trainer.train()
        moved = (weights(trainer.model) - before).abs()
        assert moved.isfinite().all() and (moved > 0).float().mean() > 0.5


class TestTrl:
    """trl's trainers are Trainers."""

    @pytest.mark.parametrize(("preset", "layerwise"), [("galore8bit", False), ("muon", "per_param")])
    def test_sft(self, preset: str, layerwise: Any, folder: Path) -> None:
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        from tests.data_helpers import tiny_tokenizer

        args = trl.SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_checkpointing=False,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            max_length=SEQ,
            tf32=False,  # trl asks for it, and torch then rounds the CPU's products too, for the whole process
        )
        lines = Path(json.__file__).read_text().splitlines()
        texts = [line for line in lines if len(line) > 30][:32]
        trainer = trl.SFTTrainer(
            model=llama(vocab_size=304),
            args=args,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tiny_tokenizer(pad_token="<pad>"),
        )
        attach(trainer, preset, layerwise=layerwise)
        trainer.train()
        losses = logged(trainer, "loss")
        assert losses[-1] < losses[0]
        assert logged(trainer, "optimizer_state_mib")[0] > 0
