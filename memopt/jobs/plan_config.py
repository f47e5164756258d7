"""What is to be planned: one frozen record, from which the flags of `memopt plan` are made."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memopt.errors import BadInput
from memopt.jobs.config import ALIASES as FINETUNE_ALIASES
from memopt.jobs.fields import accepts_aliases, coerce, require, setting
from memopt.units import parse_bytes

ALIASES: Mapping[str, str] = {
    **{
        alias: name
        for alias, name in FINETUNE_ALIASES.items()
        if name in ("batch_size", "grad_accum", "model", "seq_len")
    },
    "optim": "optimizer",
    "torch_dtype": "dtype",
    "r": "lora_rank",
    "max_new_tokens": "new_tokens",
}
_TRAIN_ONLY = (
    "optimizer", "optim_state_dtype", "implementation", "grad_accum", "gradient_checkpointing", "lora_rank",
    "max_grad_norm", "steps", "autocast", "attention", "gpus",
)  # fmt: skip
_GENERATE_ONLY = ("new_tokens", "prefill_chunk", "weights", "kv_dtype", "key_keep", "flash")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@accepts_aliases(ALIASES)
@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Settings of `memopt.plan`; each field is a flag of `memopt plan`.

    Everything that can be checked without reading a file is checked on construction; BadInput names the field, the
    value and the remedy. None of a field that only one task has: it was not given.
    """

    model: str = setting("A causal language model: directory, config.json or hub id. No weights are read.", "Job")
    task: Literal["train", "generate"] = setting("What is to be planned.", "Job", "train")
    engine: Literal["memory", "cpu-offload", "ssd", "zero3", "zero-infinity", "flash"] = setting(
        "Who holds what: memory: everything on the computing device; cpu-offload, ssd: memopt streams blocks from DRAM "
        "or the SSD; zero3, zero-infinity: DeepSpeed; flash: feed-forward weights on the SSD.",
        "Job",
        "memory",
    )
    seq_len: int = setting("Tokens of a sequence; to generate: of the prompt.", "Job", 1024)
    batch_size: int = setting("Sequences at once.", "Job", 1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "Type of the weights (also fp32, bf16, fp16); of memopt's streaming engines: of the computation. auto: "
        "bfloat16 on a GPU, float32 on a CPU.",
        "Job",
        "auto",
        synonyms=_DTYPES,
    )

    optimizer: Literal[
        "adamw", "adamw8bit", "lion", "lion8bit", "sgd", "galore", "galore8bit", "galore_muon", "muon", "muon_vo_ffn",
        "muon8bit",
    ] | None = setting("The preset.", "Training", None, shown="adamw")  # fmt: skip
    optim_state_dtype: Literal["float32", "bfloat16", "int8"] | None = setting(
        "Type of the optimizer's state.",
        "Training",
        None,
        shown="the preset's",
        synonyms={"fp32": "float32", "bf16": "bfloat16"},
    )
    implementation: Literal["memopt", "fused", "foreach", "single"] | None = setting(
        "Whose optimizer: memopt's, or torch's AdamW in one of its implementations.", "Training", None, shown="memopt"
    )
    grad_accum: int | None = setting("Micro-batches per optimizer step.", "Training", None, shown="1")
    gradient_checkpointing: bool | None = setting(
        "Recompute activations in the backward pass.", "Training", None, shown="no"
    )
    lora_rank: int | None = setting("Train LoRA adapters of this rank only.", "Training", None, shown="all weights")
    autocast: Literal["bfloat16", "float16"] | None = setting(
        "Compute products in this type beside weights of --dtype (a Trainer's bf16=True).",
        "Training",
        None,
        shown="off",
        synonyms=_DTYPES,
    )
    attention: Literal["sdpa", "eager"] | None = setting("Attention of the model.", "Training", None, shown="sdpa")
    max_grad_norm: float | None = setting("Clip the global norm to this; 0: off.", "Training", None, shown="1")
    steps: int | None = setting("Optimizer steps, for what is written in all.", "Training", None, shown="100")
    gpus: int | None = setting("GPUs that DeepSpeed shares the model between.", "Training", None, shown="1")

    new_tokens: int | None = setting("Tokens to generate for each sequence.", "Generation", None, shown="256")
    prefill_chunk: int | None = setting(
        "Prompt tokens computed at once (generate's prefill_chunk_size).", "Generation", None, shown="all"
    )
    weights: Literal["int8", "int4"] | None = setting(
        "Type of the blocks' matrices.", "Generation", None, shown="that of --dtype"
    )
    kv_dtype: Literal["int8", "int4"] | None = setting(
        "Type of the key-value cache.", "Generation", None, shown="that of --dtype"
    )
    key_keep: float | None = setting("Share of the key channels that ThinK keeps.", "Generation", None, shown="1")
    flash: bool | None = setting("The same as --engine flash.", "Generation", None, shown="no")

    gpu: str | int | None = setting("GPU memory the job may use: 24GiB.", "Budget", None, metavar="SIZE")
    dram: str | int | None = setting(
        "Host memory it may use, libraries included: 32GiB, 80%.", "Budget", None, metavar="SIZE"
    )
    ssd: str | int | None = setting("Space it may use on the SSD.", "Budget", None, metavar="SIZE")
    machine: str | None = setting(
        "A profile (rtx4090-64g, laptop-16g, ...) or a file of `memopt probe`: budgets and speeds.",
        "Budget",
        None,
        shown="this machine, unless a budget is given",
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "What computes; auto: a GPU where the machine or the budgets have one.", "Budget", "auto"
    )

    advice: bool = setting(
        "Plan the job again with every knob turned, for suggestions and the smallest budget: seconds more.",
        "Output",
        True,
    )
    report: str | None = setting("Write the plan (JSON) to this file.", "Output", None, metavar="FILE", shown="none")
    markdown: str | None = setting("Write it as Markdown to this file.", "Output", None, metavar="FILE", shown="none")
    json: bool = setting("Print the JSON instead of tables.", "Output", False)
    quiet: bool = setting("Print nothing; the exit code says whether it fits.", "Output", False)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, coerce(type(self), each, getattr(self, each.name)))
        _check_numbers(self)
        _check_together(self)

    @classmethod
    def of(cls, **settings: Any) -> PlanConfig:
        """The same as the constructor, typed for settings whose names are not known in advance."""
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON data."""
        return dict(vars(self))


def read_plan_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings in a `--config` file: a TOML table (top level or `[plan]`), or a saved plan (JSON).

    Names and values are checked by the constructor. Raises BadInput for what cannot be read.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
        loaded = json.loads(content) if path.suffix == ".json" else tomllib.loads(content)
    except (OSError, ValueError) as error:  # a file that is not text, JSON or TOML raises kinds of ValueError
        raise BadInput(f"--config {path}: cannot be read ({error}); give a TOML file or a saved plan") from None
    if isinstance(loaded, dict):
        loaded = loaded.get("config") if path.suffix == ".json" else loaded.get("plan", loaded)
    if not isinstance(loaded, dict):
        raise BadInput(f"--config {path}: holds no settings of a plan")
    # a saved plan is planned again: where it was written does not come with it
    return {k: v for k, v in loaded.items() if v is not None and k not in ("report", "markdown", "json", "quiet")}


def _check_numbers(config: PlanConfig) -> None:
    for name in ("seq_len", "batch_size", "grad_accum", "lora_rank", "steps", "gpus", "new_tokens", "prefill_chunk"):
        value = getattr(config, name)
        require(value is None or value >= 1, name, value, "give a whole number from 1 on")
    keep = config.key_keep
    require(keep is None or 0 < keep <= 1, "key_keep", keep, "give a share above 0 and at most 1, such as 0.6")
    norm = config.max_grad_norm
    require(norm is None or norm >= 0, "max_grad_norm", norm, "give a number of at least 0")
    for name in ("gpu", "dram", "ssd"):
        value = getattr(config, name)
        # the capacity stands in for a machine not looked at yet: only the syntax and the sign are checked here
        if value is not None and (str(value).strip() == "0" or parse_bytes(value, 2**60, field=name) == 0):
            raise BadInput(f"{name} = {value!r}: a budget of nothing; leave --{name} out for no limit")


def _check_together(config: PlanConfig) -> None:
    require(bool(config.model.strip()), "model", config.model, "name a directory, a config.json or a hub id")
    other, names = ("train", _GENERATE_ONLY) if config.task == "train" else ("generate", _TRAIN_ONLY)
    given = next((name for name in names if getattr(config, name) is not None), None)
    if given is not None:
        wanted = "generate" if other == "train" else "train"
        raise BadInput(f"{given} with task = {other!r}: it belongs to --task {wanted}; leave one of them out")
    if config.flash and config.engine not in ("memory", "flash"):
        raise BadInput(f"flash with engine = {config.engine!r}: keep one of them")
    for task, engines in (("train", ("flash",)), ("generate", ("ssd", "zero3", "zero-infinity"))):
        if config.task == task and config.engine in engines:
            raise BadInput(f"engine = {config.engine!r} with task = {task!r}: that engine does not do this")
    if config.device == "cpu" and config.gpu is not None:
        raise BadInput(f"gpu = {config.gpu!r} with device = 'cpu': a CPU job uses no GPU memory; leave one of them out")
    if config.gpus is not None and config.engine not in ("zero3", "zero-infinity"):
        raise BadInput(
            f"gpus = {config.gpus} with engine = {config.engine!r}: only zero3 and zero-infinity share a model"
        )
    if config.implementation not in (None, "memopt") and config.optimizer not in (None, "adamw"):
        raise BadInput(
            f"implementation = {config.implementation!r} with optimizer = {config.optimizer!r}: torch implements "
            "adamw; leave one of them out"
        )
    if config.quiet and config.json:
        raise BadInput("quiet with json: one prints nothing, the other prints JSON; keep one of them")
