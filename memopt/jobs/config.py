"""What a fine-tuning run is asked to do: one frozen record, from which the command line and TOML keys are made."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memopt.errors import BadInput
from memopt.jobs.fields import accepts_aliases, coerce, require, setting, unknown_name
from memopt.units import parse_bytes

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
OPTIMIZER_OPTIONS = ("momentum", "rank", "update_proj_gap", "proj_scale", "proj_type")
"""Settings that only some optimizers have a use for."""
_PATHS = ("model", "data", "eval_data", "output", "offload_dir", "machine", "log_file", "report")
_DECIMAL = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15}

# Hugging Face's (Trainer, peft, trl) names for the same things.
ALIASES: Mapping[str, str] = {
    "model_name_or_path": "model",
    "train_file": "data",
    "validation_file": "eval_data",
    "output_dir": "output",
    "overwrite_output_dir": "overwrite",
    "learning_rate": "lr",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "optim": "optimizer",
    "lr_scheduler_type": "schedule",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "block_size": "seq_len",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "num_train_epochs": "epochs",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "logging_file": "log_file",
    "resume_from_checkpoint": "resume",
    "torch_dtype": "dtype",
    "r": "lora_rank",
    "target_modules": "lora_target_modules",
}


@accepts_aliases(ALIASES)
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of `memopt.finetune`; each field is a flag of `memopt finetune` and a key of its TOML file.

    Hugging Face's names (`learning_rate`, `gradient_accumulation_steps`, ...: see `ALIASES`) are accepted too.
    Everything that can be checked without touching a file is checked on construction; BadInput names the field,
    the value and the remedy.
    """

    model: str = setting(
        "A causal language model: directory, hub id, or `demo` (built on the spot).", "Model", fixed=True
    )
    init: Literal["pretrained", "random"] = setting(
        "Start from the checkpoint's weights, or from random ones drawn with --seed.", "Model", "pretrained", fixed=True
    )
    method: Literal["full", "lora"] = setting("Train every weight, or LoRA adapters only.", "Model", "full", fixed=True)
    lora_rank: int = setting("Rank of the adapters.", "LoRA", 8, fixed=True)
    lora_alpha: float = setting("Scale of the adapters: alpha / rank.", "LoRA", 16.0, fixed=True)
    lora_dropout: float = setting("Dropout on the adapters' input.", "LoRA", 0.0, fixed=True)
    lora_target_modules: tuple[str, ...] | None = setting(
        "Names of the modules to adapt, separated by commas.", "LoRA", None, shown="peft's choice", fixed=True
    )

    data: str | None = setting(
        "A .txt or .jsonl file, a directory of them, or a data set: name, name:split, name:config:split.",
        "Data",
        None,
        shown="none; needed unless --model demo",
        fixed=True,
    )
    seq_len: int = setting("Tokens per packed sequence; capped by the model's own limit.", "Data", 1024, fixed=True)
    batch_size: int | Literal["auto"] = setting(
        "Sequences per micro-batch; `auto` lets the plan cut the --grad-accum sequences of a step.",
        "Data",
        1,
        metavar="N|auto",
        fixed=True,
    )
    grad_accum: int = setting("Micro-batches per optimizer step.", "Data", 1, fixed=True)
    epochs: float = setting("Passes over the data.", "Data", 3.0, fixed=True)
    max_steps: int | None = setting(
        "Stop after this many optimizer steps, whatever --epochs says.", "Data", None, shown="by epochs", fixed=True
    )
    eval_data: str | None = setting("Held-out data, in any form --data takes.", "Data", None)
    eval_every: int | None = setting("Evaluate every N steps.", "Data", None, shown="start and end, with --eval-data")

    dram: str | int | None = setting(
        "Host memory the run may use, libraries included: 2GiB, 80%.",
        "Memory",
        None,
        metavar="SIZE",
        shown="what the machine or container has, less a reserve",
    )
    gpu: str | int | None = setting(
        "GPU memory the run may use.", "Memory", None, metavar="SIZE", shown="what the GPU has"
    )
    ssd: str | int | None = setting(
        "Space the run may use in --offload-dir.", "Memory", None, metavar="SIZE", shown="no limit"
    )
    machine: str | None = setting(
        "A profile (rtx4090-64g, laptop-16g, ...) or TOML file to plan for.", "Memory", None, shown="this machine"
    )
    offload_dir: str | None = setting(
        "Directory on an SSD for what does not fit; also the checkpoint.", "Memory", None, shown="no offload"
    )
    ssd_endurance: str | None = setting(
        "What the drive is rated to take in its life: 600TB.", "Memory", None, metavar="SIZE", shown="unknown"
    )

    optimizer: Literal[
        "adamw", "adamw8bit", "lion", "lion8bit", "sgd", "galore", "galore8bit", "galore_muon", "muon", "muon_vo_ffn",
        "muon8bit",
    ] = setting(
        "The preset: which update rule, projection and state type which parameters get.",
        "Optimizer",
        "adamw",
        fixed=True,
        synonyms={
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "adamw_8bit": "adamw8bit",
            "adamw_bnb_8bit": "adamw8bit",
            "lion_32bit": "lion",
            "lion_8bit": "lion8bit",
            "galore_adamw": "galore",
            "galore_adamw_8bit": "galore8bit",
        },
    )  # fmt: skip
    optim_state_dtype: Literal["float32", "bfloat16", "int8"] | None = setting(
        "Type of the optimizer's state, except for embeddings, norms and biases (float32); bfloat16 is rounded "
        "stochastically.",
        "Optimizer",
        None,
        shown="the preset's",
        fixed=True,
        synonyms={"fp32": "float32", "bf16": "bfloat16"},
    )
    momentum: float | None = setting(
        "Of Muon and SGD.", "Optimizer", None, shown="0.95 of Muon, 0.9 of SGD", fixed=True
    )
    rank: int | None = setting(
        "Directions that GaLore keeps of a gradient matrix.", "Optimizer", None, shown="128", fixed=True
    )
    update_proj_gap: int | None = setting(
        "Steps between two looks of GaLore for the subspace.", "Optimizer", None, shown="200", fixed=True
    )
    proj_scale: float | None = setting(
        "Factor of GaLore's updates (alpha).", "Optimizer", None, shown="0.25", fixed=True
    )
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] | None = setting(
        "Which side of a matrix GaLore projects.", "Optimizer", None, shown="std: the shorter one", fixed=True
    )
    lr: float = setting("Learning rate.", "Optimizer", 5e-5, fixed=True)
    weight_decay: float = setting("Decoupled weight decay; biases and norms have none.", "Optimizer", 0.0, fixed=True)
    beta1: float | None = setting("Decay of the first moment.", "Optimizer", None, shown="0.9", fixed=True)
    beta2: float | None = setting(
        "Decay of the second moment.",
        "Optimizer",
        None,
        shown="0.999; 0.95 beside Muon, 0.99 of Lion",
        fixed=True,
    )
    eps: float = setting("Term that keeps the division finite.", "Optimizer", 1e-8, fixed=True)
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = setting(
        "Learning rate: constant, constant_with_warmup, linear or cosine.",
        "Optimizer",
        "linear",
        metavar="NAME",
        fixed=True,
    )
    warmup_steps: int = setting("Steps over which the rate rises from 0.", "Optimizer", 0, fixed=True)
    max_grad_norm: float = setting("Clip the global gradient norm to this; 0: off.", "Optimizer", 1.0, fixed=True)
    skip_nonfinite: bool = setting(
        "Skip and count a step whose loss is NaN or Inf instead of stopping.", "Optimizer", False
    )

    output: str | None = setting(
        "Directory for the trained model.", "Output", None, shown="none; needed unless --dry-run"
    )
    overwrite: bool = setting("Replace an output directory that memopt made.", "Output", False)
    save_every: int | None = setting("Save every N steps.", "Output", None, shown="chosen by the plan")
    resume: bool = setting("Continue from what --offload-dir holds.", "Output", False)
    log_file: str | None = setting("Append one JSON line per step to this file.", "Output", None, shown="none")
    report: str | None = setting("Write the report (JSON) to this file.", "Output", None, shown="none")
    quiet: bool = setting("No progress display.", "Output", False)
    dry_run: bool = setting("Print the plan and stop.", "Output", False)

    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "Type to compute in (also fp32, bf16); auto: bfloat16 on a GPU, float32 on a CPU.",
        "Run",
        "auto",
        fixed=True,
        synonyms={"fp32": "float32", "bf16": "bfloat16"},
    )
    device: str = setting("auto, cpu, cuda or cuda:N.", "Run", "auto", metavar="DEVICE")
    seed: int = setting("Seed of data order, dropout, initial weights and stochastic rounding.", "Run", 42, fixed=True)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = coerce(type(self), each, getattr(self, each.name))
            if each.name in _PATHS and value is not None:
                value = os.path.expanduser(value)  # a shell does it for flags, nobody for a TOML file
            object.__setattr__(self, each.name, value)
        _check_numbers(self)
        _check_budgets(self)
        _check_together(self)

    @classmethod
    def of(cls, **settings: Any) -> FinetuneConfig:
        """The same as the constructor, typed for settings whose names are not known in advance."""
        return cls(**settings)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> FinetuneConfig:
        """From a TOML file; see `read_settings`."""
        return cls(**read_settings(path))

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON data; `FinetuneConfig.of(**config.to_dict()) == config`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def with_changes(self, **changes: Any) -> FinetuneConfig:
        """A copy with some settings changed (and checked again)."""
        return type(self)(**{**vars(self), **canonical(changes, "changes")})

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the numbers a run produces: they must not change on --resume."""
        fixed = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.metadata["fixed"]}
        for name in ("model", "data"):
            # the same files named from another directory are the same files; the demo's model is none
            if fixed[name] not in (None, "demo") and os.path.exists(fixed[name]):
                fixed[name] = os.path.realpath(fixed[name])
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fixed.items()}

    @property
    def ssd_endurance_bytes(self) -> int | None:
        """Bytes the drive is rated to take over its life, or None."""
        return None if self.ssd_endurance is None else _endurance_bytes(self.ssd_endurance)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two fingerprints, in words; empty when nothing did."""
    return [
        f"{name} was {old[name]!r} and is now {new[name]!r}"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ] + [f"{name} is known on one side only" for name in sorted(old.keys() ^ new.keys())]


def canonical(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`settings` under memopt's names (dashes and Hugging Face's names translated). BadInput on an unknown name."""
    known = {each.name for each in dataclasses.fields(FinetuneConfig)}
    out: dict[str, Any] = {}
    for given, value in settings.items():
        name = given.replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in known:
            raise BadInput(f"{where}: {unknown_name(given, [*known, *ALIASES])}")
        if name in out:
            raise BadInput(f"{where}: {name} is given twice (once as {given}); keep one")
        out[name] = value
    return out


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings in a `--config` file: a TOML table (top level or `[finetune]`), or a report of an earlier run (JSON).

    Returns memopt's names; values are checked by the constructor.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path}: cannot be read ({error}); give a TOML file or a memopt report") from None
    try:
        loaded = json.loads(content) if path.suffix == ".json" else tomllib.loads(content)
    except ValueError as error:
        raise BadInput(f"--config {path}: {error}; give a TOML file of settings like `lr = 5e-5`") from None
    if not isinstance(loaded, dict):
        raise BadInput(f"--config {path}: holds no table of settings")
    if path.suffix == ".json":
        results = loaded.get("results")
        told = loaded.get("config") or (results or {}).get("config")
        if not told and "schema" in loaded:
            raise BadInput(f"--config {path}: a report that holds no settings of a fine-tuning; give one of a finetune")
        loaded = told or loaded
        # a report repeats a run: what only made sense the first time is left behind
        loaded = {name: value for name, value in loaded.items() if name != "resume" and value is not None}
    elif isinstance(loaded.get("finetune"), dict):
        loaded = {**{k: v for k, v in loaded.items() if not isinstance(v, dict)}, **loaded["finetune"]}
    return canonical(loaded, f"--config {path}")


def _check_numbers(config: FinetuneConfig) -> None:
    for name in ("seq_len", "grad_accum", "lora_rank"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "give a whole number of at least 1")
    for name in ("max_steps", "eval_every", "save_every", "rank", "update_proj_gap"):
        value = getattr(config, name)
        require(value is None or value >= 1, name, value, "give a whole number of at least 1, or leave it out")
    if config.batch_size != "auto":
        require(config.batch_size >= 1, "batch_size", config.batch_size, "give at least 1, or auto")
    for name in ("lr", "weight_decay", "max_grad_norm", "lora_alpha", "warmup_steps"):
        require(getattr(config, name) >= 0, name, getattr(config, name), "give a number of at least 0")
    for name in ("beta1", "beta2", "momentum", "lora_dropout"):
        value = getattr(config, name)
        require(value is None or 0 <= value < 1, name, value, "give a number from 0 to below 1")
    scale = config.proj_scale
    require(scale is None or scale > 0, "proj_scale", scale, "give a positive number; 1 to 4 is usual to fine-tune")
    require(config.eps > 0, "eps", config.eps, "give a small positive number such as 1e-8")
    require(config.epochs > 0, "epochs", config.epochs, "give a positive number")
    require(0 <= config.seed < 2**63, "seed", config.seed, "give a whole number from 0 to 2**63 - 1")
    require(config.seq_len >= 2, "seq_len", config.seq_len, "a sequence needs a token and its successor: at least 2")


def _check_budgets(config: FinetuneConfig) -> None:
    remedies = {
        "dram": "give what the whole process may use, interpreter included: 4GiB",
        "gpu": "to train without a GPU say --device cpu and leave --gpu out",
        "ssd": "to keep everything in memory leave --ssd and --offload-dir out",
    }
    for name, remedy in remedies.items():
        value = getattr(config, name)
        # the capacity stands in for a machine not looked at yet: only the syntax and the sign are checked here
        if value is not None and (str(value).strip() == "0" or parse_bytes(value, 2**60, field=name) == 0):
            raise BadInput(f"{name} = {value!r}: a budget of nothing; {remedy}")
    if config.ssd_endurance is not None:
        _endurance_bytes(config.ssd_endurance)


def _check_together(config: FinetuneConfig) -> None:
    require(bool(config.model.strip()), "model", config.model, "name a directory, a hub id or demo")
    is_device = config.device in ("auto", "cpu", "cuda") or (
        config.device.startswith("cuda:") and config.device[5:].isdigit()
    )
    require(is_device, "device", config.device, "give auto, cpu, cuda or cuda:N")
    if config.device == "cpu" and config.gpu is not None:
        raise BadInput(f"gpu = {config.gpu!r} with device = 'cpu': a CPU run uses no GPU memory; leave one of them out")
    if config.resume and config.offload_dir is None:
        raise BadInput("resume = True without offload_dir: name the directory that holds the interrupted run")
    if config.eval_every is not None and config.eval_data is None:
        raise BadInput(f"eval_every = {config.eval_every} without eval_data: name the held-out data, or leave it out")
    if config.save_every is not None and config.offload_dir is None:
        raise BadInput(f"save_every = {config.save_every} without offload_dir: that is where saves go; name one")
    if config.ssd is not None and config.offload_dir is None:
        raise BadInput(f"ssd = {config.ssd!r} without offload_dir: name a directory on the SSD")
    options = {name: getattr(config, name) for name in OPTIMIZER_OPTIONS}
    if any(value is not None for value in options.values()):
        from memopt.jobs.optimizer_options import require_effect  # imports torch

        require_effect(config.optimizer, options)
    if config.warmup_steps and config.schedule == "constant":
        raise BadInput(
            f"warmup_steps = {config.warmup_steps} with schedule = 'constant': that has none; give constant_with_warmup"
        )
    if config.method != "lora":
        for each in dataclasses.fields(config):
            value = getattr(config, each.name)
            if each.metadata["group"] == "LoRA" and value != each.default:
                raise BadInput(
                    f"{each.name} = {value!r} with method = {config.method!r}: give method lora, or leave it out"
                )
    if config.model == "demo" and config.method == "lora":
        raise BadInput("model = 'demo' with method = 'lora': the demo has random weights, which adapters cannot save")
    if config.init == "random" and config.method == "lora":
        raise BadInput("init = 'random' with method = 'lora': adapters cannot save random weights; use one")


def _endurance_bytes(text: str) -> int:
    """Drives are rated in decimal terabytes: `600TB` (or TBW) is 600e12 bytes; binary units are accepted too."""
    plain = text.strip().lower().removesuffix("w").replace(" ", "")
    if plain[-2:] in _DECIMAL:
        try:
            value = float(plain[:-2])
        except ValueError:
            value = math.nan
        nbytes = int(value * _DECIMAL[plain[-2:]]) if 0 < value < math.inf else 0
    else:
        nbytes = parse_bytes(text, field="ssd_endurance")
    if nbytes <= 0:
        raise BadInput(f"ssd_endurance = {text!r}: give the drive's rating, such as 600TB")
    return nbytes
