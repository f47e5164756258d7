"""Plan a job before it runs: will it fit, what takes the bytes, how long is a step, and what could be done about it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.forecast_types import Forecast
from memopt.jobs.cache_facts import read_cache_facts
from memopt.jobs.model_facts import config_of, prepare, read_model_facts
from memopt.jobs.plan_config import PlanConfig
from memopt.machine import Machine
from memopt.planning.advice import advise, inference_knobs, training_knobs
from memopt.planning.forecasts import inference_forecast, training_forecast, with_config
from memopt.planning.inference_types import InferenceJob
from memopt.planning.training_types import DType, ModelFacts, TrainingJob, ZeroSettings
from memopt.tiers import Tier


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """The machine a job is planned for, what it may use of it, and what computes."""

    machine: Machine
    budget: Budget
    device: Literal["cpu", "cuda"]


def plan(config: PlanConfig) -> Forecast:
    """What the job will need, from the model's configuration and headers alone: nothing is loaded or allocated.

    With no machine and no budget it is planned for this one. Raises BadInput: no such model or machine, a model that
    is no causal language model, settings that do not go together.
    """
    where = find_setting(config)
    facts, hf_config = _facts(config.model)
    if config.task == "generate":
        return _plan_generation(config, where, facts, hf_config)
    return _plan_training(config, where, facts)


def find_setting(config: PlanConfig) -> _Setting:
    """Machine, budget and device. Raises BadInput."""
    asked = {name: getattr(config, name) for name in ("gpu", "dram", "ssd")}
    given = any(value is not None for value in asked.values())
    if config.machine is not None:
        machine, whole = Machine.load(config.machine), Budget.load(config.machine)
    elif given:
        machine, whole = Machine(name="no machine named"), Budget()
    else:
        machine = Machine.capacities()
        whole = Budget.from_machine(machine)
    budget = Budget.of(machine=machine, **asked)
    device = config.device
    if device == "auto":
        has_gpu = machine.gpu_name is not None or machine.gpu_bytes is not None or budget.gpu_bytes is not None
        device = "cuda" if has_gpu or config.engine in ("zero3", "zero-infinity") else "cpu"
    if budget.gpu_bytes is not None and machine.unified:
        raise BadInput(
            f"gpu = {config.gpu!r}: machine {machine.name!r} has one pool of memory for GPU and CPU; give --dram only"
        )
    merged = {tier: budget.bytes_of(tier) or whole.bytes_of(tier) for tier in Tier}
    return _Setting(
        machine=machine,
        budget=Budget(
            gpu_bytes=merged[Tier.GPU] if device == "cuda" else None,
            dram_bytes=merged[Tier.DRAM],
            ssd_bytes=merged[Tier.SSD],
        ),
        device=device,
    )


def _plan_training(config: PlanConfig, where: _Setting, facts: ModelFacts) -> Forecast:
    options = {} if config.optim_state_dtype is None else {"state_dtype": config.optim_state_dtype}
    job = TrainingJob(
        facts=facts,
        engine=_training_engine(config),
        device=where.device,
        method="full" if config.lora_rank is None else "lora",
        lora_rank=config.lora_rank or 8,
        optimizer=config.optimizer or "adamw",
        optimizer_options=options,
        implementation=config.implementation or "memopt",
        weights_dtype=_dtype(config, where),
        autocast=config.autocast,
        attention=config.attention or "sdpa",
        gradient_checkpointing=bool(config.gradient_checkpointing),
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        grad_accum=config.grad_accum or 1,
        max_grad_norm=1.0 if config.max_grad_norm is None else config.max_grad_norm,
        steps=config.steps or 100,
        budget=where.budget,
        machine=where.machine,
        zero=ZeroSettings(gpus=config.gpus or 1),
    )
    forecast_of = _TrainingPlanner(where)
    now = with_config(forecast_of(job), config.to_dict())
    return advise(job, now, training_knobs(), forecast_of) if config.advice else now


class _TrainingPlanner:
    """Plans one job after another, each of the model's variants traced once."""

    def __init__(self, where: _Setting):
        self._where = where
        self._facts: ModelFacts | None = None

    def __call__(self, job: TrainingJob) -> Forecast:
        prepared = prepare(job if self._facts is None else replace(job, facts=self._facts))
        self._facts = prepared.facts
        return training_forecast(prepared, self._where.machine, self._where.budget)


def _plan_generation(config: PlanConfig, where: _Setting, facts: ModelFacts, hf_config: Any) -> Forecast:
    dtype = _dtype(config, where)
    job = InferenceJob(
        facts=facts,
        cache=read_cache_facts(hf_config, dtype),
        engine=_generation_engine(config),
        device=where.device,
        dtype=dtype,
        weights=config.weights,
        kv=config.kv_dtype,
        key_keep=1.0 if config.key_keep is None else config.key_keep,
        batch=config.batch_size,
        prompt_tokens=config.seq_len,
        new_tokens=config.new_tokens or 256,
        prefill_chunk=config.prefill_chunk,
    )
    forecast_of: Callable[[InferenceJob], Forecast] = lambda job: inference_forecast(job, where.machine, where.budget)  # noqa: E731
    now = with_config(forecast_of(job), config.to_dict())
    return advise(job, now, inference_knobs(), forecast_of) if config.advice else now


def _training_engine(config: PlanConfig) -> Literal["memory", "cpu-offload", "ssd", "zero3", "zero-infinity"]:
    assert config.engine != "flash"
    return config.engine


def _generation_engine(config: PlanConfig) -> Literal["memory", "cpu-offload", "flash"]:
    if config.flash:
        return "flash"
    assert config.engine in ("memory", "cpu-offload", "flash")
    return config.engine


def _dtype(config: PlanConfig, where: _Setting) -> DType:
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if where.device == "cuda" else "float32"


def _facts(model: str) -> tuple[ModelFacts, Any]:
    """Facts and configuration of a directory, a config.json or a hub id."""
    path = Path(model).expanduser()
    if path.is_file():
        config = _config_file(path)
        return replace(read_model_facts(config), source=_name(path)), config
    facts = read_model_facts(model)
    return facts, config_of(facts)


def _config_file(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(os.fspath(path), trust_remote_code=False)
    except Exception as error:  # transformers lets KeyError, TypeError and its validator's errors out as well
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"{path} is not a configuration that transformers knows ({lines[0]}); give the config.json of a model"
        ) from error


def _name(path: Path) -> str:
    """What a configuration's file is called: config.json says nothing, its directory does."""
    return path.absolute().parent.name if path.name == "config.json" else path.stem
