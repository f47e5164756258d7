"""The settings of a run: names, checks, files, and what may change on --resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import BadInput
from memopt.jobs.config import ALIASES, FinetuneConfig, canonical, differences, read_settings
from memopt.jobs.fields import choices

# fmt: off
FLAGS = [
    "model", "data", "output", "offload_dir", "gpu", "dram", "ssd", "machine", "method", "lora_rank",
    "lora_alpha", "lora_dropout", "lora_target_modules", "optimizer", "optim_state_dtype", "momentum", "rank",
    "update_proj_gap", "proj_scale", "proj_type", "lr", "weight_decay",
    "beta1", "beta2", "eps", "schedule", "warmup_steps", "max_grad_norm", "seq_len", "batch_size", "grad_accum",
    "epochs", "max_steps", "eval_data", "eval_every", "log_file", "save_every", "dtype", "device", "seed",
    "resume", "overwrite", "report", "quiet", "init", "skip_nonfinite", "dry_run", "ssd_endurance",
]
# fmt: on


def test_a_field_for_every_flag_and_every_field_described() -> None:
    fields = dataclasses.fields(FinetuneConfig)
    assert sorted(each.name for each in fields) == sorted(FLAGS)
    assert all(each.metadata["help"].endswith(".") and each.metadata["group"] for each in fields)


def test_defaults_are_hugging_faces() -> None:
    config = FinetuneConfig(model="m")
    assert (config.lr, config.weight_decay, config.beta1, config.beta2, config.eps) == (5e-5, 0.0, None, None, 1e-8)
    assert (config.schedule, config.warmup_steps, config.max_grad_norm) == ("linear", 0, 1.0)
    assert (config.epochs, config.seed, config.save_every) == (3.0, 42, None)


def test_hugging_face_names_are_accepted() -> None:
    config = FinetuneConfig(  # type: ignore[call-arg]
        model_name_or_path="m",
        learning_rate=1,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        num_train_epochs=2,
        max_seq_length=64,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        output_dir=Path("o"),
    )
    assert config == FinetuneConfig(
        model="m", lr=1.0, grad_accum=4, batch_size=2, epochs=2.0, seq_len=64, beta2=0.95, schedule="cosine", output="o"
    )
    assert isinstance(config.lr, float)


def test_every_alias_names_a_field() -> None:
    assert set(ALIASES.values()) <= set(FLAGS)
    assert not set(ALIASES) & set(FLAGS)


def test_unknown_and_double_names() -> None:
    with pytest.raises(BadInput, match=r"unknown setting 'learning_rat'; did you mean learning_rate"):
        FinetuneConfig(model="m", learning_rat=1)  # type: ignore[call-arg]
    with pytest.raises(BadInput, match="lr is given twice"):
        FinetuneConfig(model="m", lr=1, learning_rate=1)  # type: ignore[call-arg]
    with pytest.raises(BadInput, match="model is missing"):
        FinetuneConfig(lr=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, r"lr = -1\.0: .*at least 0"),
        ({"lr": "fast"}, r"lr = 'fast': give a number"),
        ({"lr": float("nan")}, r"lr = nan: give a number"),
        ({"lr": True}, r"lr = True: give a number"),
        ({"seq_len": 1}, r"seq_len = 1: "),
        ({"seq_len": 2.5}, r"seq_len = 2\.5: give a whole number"),
        ({"batch_size": "big"}, r"batch_size = 'big': give a whole number or auto"),
        ({"batch_size": 0}, r"batch_size = 0: "),
        ({"beta1": 1.0}, r"beta1 = 1\.0: "),
        ({"eps": 0}, r"eps = 0\.0: "),
        ({"epochs": 0}, r"epochs = 0\.0: "),
        ({"max_steps": 0}, r"max_steps = 0: "),
        ({"max_steps": -1}, r"max_steps = -1: .*leave it out"),
        ({"method": "qlora"}, r"method = 'qlora': give full or lora"),
        ({"dtype": "float16"}, r"dtype = 'float16': give auto or float32 or bfloat16"),
        ({"device": "tpu"}, r"device = 'tpu': "),
        ({"gpu": 0}, r"gpu = 0: .*--device cpu"),
        ({"gpu": "0GiB"}, r"gpu = '0GiB': .*--device cpu"),
        ({"dram": "8GB"}, r"dram: '8GB' .*GiB"),
        ({"dram": "-1GiB"}, r"dram: '-1GiB' is negative"),
        ({"dram": 0}, r"dram = 0: a budget of nothing"),
        ({"dram": "120%"}, r"dram: '120%'"),
        ({"ssd": "1TiB"}, r"ssd = '1TiB' without offload_dir"),
        ({"device": "cpu", "gpu": "8GiB"}, r"gpu = '8GiB' with device = 'cpu'"),
        ({"resume": True}, r"resume = True without offload_dir"),
        ({"resume": "yes"}, r"resume = 'yes': give true or false"),
        ({"eval_every": 5}, r"eval_every = 5 without eval_data"),
        ({"init": "random", "method": "lora"}, r"init = 'random' with method = 'lora'"),
        ({"model": "demo", "method": "lora"}, r"model = 'demo' with method = 'lora'"),
        ({"lora_rank": 16}, r"lora_rank = 16 with method = 'full': give method lora"),
        ({"target_modules": ["q"]}, r"lora_target_modules = \('q',\) with method = 'full'"),
        ({"schedule": "constant", "warmup_steps": 5}, r"warmup_steps = 5 .*give constant_with_warmup"),
        ({"save_steps": 5}, r"save_every = 5 without offload_dir"),
        ({"model": " "}, r"model = ' ': "),
        ({"ssd_endurance": "600"}, r"ssd_endurance"),
        ({"ssd_endurance": "xTB"}, r"ssd_endurance = 'xTB'"),
        ({"lora_target_modules": [1]}, r"lora_target_modules = \[1\]: give a list of names"),
        ({"seed": -1}, r"seed = -1"),
        ({"optimizer": "adam"}, r"optimizer = 'adam': give adamw or adamw8bit or "),
        (
            {"optim_state_dtype": "int4"},
            r"optim_state_dtype = 'int4': give float32 or bfloat16 or int8, or leave it out",
        ),
        (
            {"optimizer": "muon", "rank": 8},
            r"rank = 8 with optimizer = 'muon': only galore, galore8bit, galore_muon use",
        ),
        ({"proj_scale": 2}, r"proj_scale = 2\.0 with optimizer = 'adamw': only galore"),
        ({"proj_type": "left"}, r"proj_type = 'left' with optimizer = 'adamw'"),
        ({"update_proj_gap": 5, "optimizer": "lion"}, r"update_proj_gap = 5 with optimizer = 'lion'"),
        ({"momentum": 0.5}, r"momentum = 0\.5 with optimizer = 'adamw': only sgd, galore_muon, muon"),
        ({"optimizer": "galore", "rank": 0}, r"rank = 0: give a whole number of at least 1"),
        ({"optimizer": "galore", "proj_scale": 0}, r"proj_scale = 0\.0: give a positive number"),
        ({"optimizer": "sgd", "momentum": 1}, r"momentum = 1\.0: give a number from 0 to below 1"),
    ],
)
def test_bad_values_name_field_value_and_remedy(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        FinetuneConfig.of(**{"model": "m", **settings})
    assert "\n" not in str(caught.value)


def test_every_preset_is_an_optimizer() -> None:
    from memopt.optim.presets import PRESETS

    assert choices(FinetuneConfig, "optimizer") == tuple(PRESETS)


def test_synonyms_and_lists() -> None:
    modules = "q_proj, v_proj"
    config = FinetuneConfig.of(model="m", method="lora", dtype="bf16", lora_target_modules=modules, batch_size="auto")
    assert (config.dtype, config.lora_target_modules, config.batch_size) == ("bfloat16", ("q_proj", "v_proj"), "auto")
    assert FinetuneConfig.of(model="m", batch_size="4").batch_size == 4


@pytest.mark.parametrize(("text", "nbytes"), [("600TB", 600 * 10**12), ("0.5 PBW", 5 * 10**14), ("1TiB", 2**40)])
def test_endurance_is_decimal(text: str, nbytes: int) -> None:
    assert FinetuneConfig(model="m", ssd_endurance=text).ssd_endurance_bytes == nbytes


@given(
    lr=st.floats(0, 1),
    seq_len=st.integers(2, 10**6),
    modules=st.none() | st.lists(st.sampled_from(["q", "k", "v"]), min_size=1),
    dram=st.none() | st.sampled_from(["2GiB", "80%"]) | st.integers(1, 2**40),
)
def test_a_dict_and_json_bring_the_same_config_back(
    lr: float, seq_len: int, modules: list[str] | None, dram: str | int | None
) -> None:
    config = FinetuneConfig.of(model="m", method="lora", lr=lr, seq_len=seq_len, lora_target_modules=modules, dram=dram)
    assert FinetuneConfig.of(**config.to_dict()) == config
    assert FinetuneConfig.of(**json.loads(json.dumps(config.to_dict()))) == config


def test_toml_and_report_files(tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('model = "m"\nlearning-rate = 1e-4\ndram = "2GiB"\nquiet = true\n')
    assert FinetuneConfig.from_toml(toml) == FinetuneConfig(model="m", lr=1e-4, dram="2GiB", quiet=True)
    toml.write_text('\ufeff[finetune]\nmodel = "m"\n')  # as some editors begin a file
    assert FinetuneConfig.from_toml(toml).model == "m"
    config = FinetuneConfig(model="m", offload_dir="o", resume=True, lr=0.1)
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"schema": "memopt.report/1", "config": config.to_dict()}))
    assert FinetuneConfig.of(**read_settings(report)) == config.with_changes(resume=False)
    report.write_text(json.dumps({"schema": "memopt.report/1", "config": {}, "results": {}}))
    with pytest.raises(BadInput, match="a report that holds no settings of a fine-tuning"):
        read_settings(report)


def test_a_home_directory_may_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = FinetuneConfig(model="~/m", data="~/d.txt", output="~/o", offload_dir="~/run", log_file="~x")
    assert (config.model, config.data, config.output) == ("/home/ada/m", "/home/ada/d.txt", "/home/ada/o")
    assert config.offload_dir == "/home/ada/run" and config.log_file == "~x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "run.toml"),
        ("modle = 1", "unknown setting 'modle'; did you mean model"),
        ("lr=1\nlearning_rate=2", "twice"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        FinetuneConfig.from_toml(path)
    with pytest.raises(BadInput, match="cannot be read"):
        FinetuneConfig.from_toml(tmp_path / "none.toml")


def test_fingerprint_holds_what_decides_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = FinetuneConfig(model="m", offload_dir="o")
    same = old.with_changes(
        dram="2GiB", output="x", quiet=True, report="r.json", resume=True, log_file="l", save_every=3
    )
    assert differences(old.fingerprint(), same.fingerprint()) == []
    new = old.with_changes(learning_rate=1e-3, seed=1)
    assert differences(old.fingerprint(), new.fingerprint()) == [
        "lr was 5e-05 and is now 0.001",
        "seed was 42 and is now 1",
    ]
    assert json.loads(json.dumps(old.fingerprint())) == old.fingerprint()
    (tmp_path / "data.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    here, there = old.with_changes(data="data.txt"), old.with_changes(data=str(tmp_path / "data.txt"))
    assert differences(here.fingerprint(), there.fingerprint()) == []


def test_frozen_and_changes_are_checked() -> None:
    config = FinetuneConfig(model="m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]
    with pytest.raises(BadInput, match="lr = -1"):
        config.with_changes(lr=-1)
    with pytest.raises(BadInput, match="unknown setting"):
        canonical({"no-such": 1}, "here")
