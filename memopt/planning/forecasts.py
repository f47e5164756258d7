"""One job, one machine, one budget: the `Forecast`. Pure; `memopt.planning.advice` adds what could be done about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from memopt.budget import Budget
from memopt.forecast_types import Forecast, PhaseForecast, StepTime, Verdict
from memopt.machine import Machine
from memopt.plan_types import Infeasible
from memopt.planning.inference import cache_bytes, decode_work, inference_phases, prefill_work
from memopt.planning.inference_types import InferenceJob, thin_layer
from memopt.planning.timing import MATRIX_SHARE, Work, missing_speeds, step_time
from memopt.planning.training import training_flops, training_phases, training_traffic
from memopt.planning.training_types import TrainingFlops, TrainingJob, TrainingTraffic
from memopt.tiers import Category, Tier
from memopt.units import format_bytes

_TIERS_TRIED = 3
"""An engine that places by its budget names one short tier at a time."""


def inference_forecast(job: InferenceJob, machine: Machine, budget: Budget) -> Forecast:
    """What generation needs. `time` is of one token of every sequence; the prompt's seconds stand in its phase."""
    prefill = step_time(prefill_work(job), machine, device=job.device, dtype=job.dtype)
    decode = step_time(decode_work(job), machine, device=job.device, dtype=job.dtype)
    seconds = {"prefill": prefill, "decode": decode}
    phases = tuple(_timed(phase, seconds.get(phase.name)) for phase in inference_phases(job))
    return _forecast(
        _inference_name(job),
        machine,
        budget,
        phases,
        decode,
        assumptions=_inference_assumptions(job, machine, decode),
        reasons=_inference_reasons(job),
        steps=job.new_tokens,
        read=decode_work(job).ssd_read_bytes,
    )


def training_forecast(job: TrainingJob, machine: Machine, budget: Budget) -> Forecast:
    """What training needs. `job` is prepared (`memopt.jobs.model_facts.prepare`). Raises BadInput.

    memopt's own engine keeps to the budget where it can; where it cannot, the forecast is that of its smallest one.
    """
    placed, phases = _placed(replace(job, budget=budget, machine=machine))
    traffic, flops = training_traffic(placed), training_flops(placed)
    dtype = job.autocast or job.weights_dtype
    work = _training_work(placed, phases, traffic, flops)
    time = step_time(work, machine, device=job.device, dtype=dtype)
    passes = {"forward": flops.forward, "backward": flops.backward + flops.recomputed}
    if job.engine == "memory":
        seconds = {
            name: step_time(Work(flops=amount), machine, device=job.device, dtype=dtype)
            for name, amount in passes.items()
        }
        seconds["optimizer"] = step_time(
            Work(update_flops=work.update_flops, update_bytes=work.update_bytes),
            machine,
            device=job.device,
            dtype=dtype,
        )
        phases = tuple(_timed(phase, seconds.get(phase.name)) for phase in phases)
    return _forecast(
        _training_name(job),
        machine,
        budget,
        phases,
        time,
        assumptions=_training_assumptions(job, machine, time),
        reasons=_training_reasons(job, machine, traffic),
        steps=job.steps,
        read=traffic.ssd_read_bytes,
        written=traffic.ssd_write_bytes,
    )


def _forecast(
    name: str,
    machine: Machine,
    budget: Budget,
    phases: tuple[PhaseForecast, ...],
    time: StepTime | None,
    *,
    assumptions: tuple[str, ...],
    reasons: tuple[str, ...],
    steps: int,
    read: int = 0,
    written: int = 0,
) -> Forecast:
    if machine.unified:
        phases = tuple(_one_pool(phase) for phase in phases)
    budgets = {str(tier): n for tier in Tier if (n := budget.bytes_of(tier)) is not None}
    forecast = Forecast(
        job=name,
        verdict="fits",
        assumptions=assumptions,
        budgets=budgets,
        phases=phases,
        time=time,
        steps=steps,
        ssd_read_per_step_bytes=read,
        ssd_write_per_step_bytes=written,
        reasons=reasons,
    )
    verdict: Verdict = "fits" if budgets else "unbounded"
    return replace(forecast, verdict="does not fit" if shortages(forecast) else verdict)


def peak(forecast: Forecast, tier: Tier) -> int:
    """Bytes of a tier at its binding peak."""
    phase = forecast.binding(tier)
    return 0 if phase is None else phase.total_bytes(tier)


def shortages(forecast: Forecast) -> dict[Tier, int]:
    """Bytes that are missing, by tier."""
    need = {tier: peak(forecast, tier) - forecast.budgets[tier] for tier in Tier if str(tier) in forecast.budgets}
    return {tier: n for tier, n in need.items() if n > 0}


def _one_pool(phase: PhaseForecast) -> PhaseForecast:
    """GPU and DRAM are the same memory: one sum, and one process's runtime of each."""
    total: dict[str, int] = dict(phase.use.get(str(Tier.DRAM), {}))
    for category, nbytes in phase.use.get(str(Tier.GPU), {}).items():
        total[category] = total.get(category, 0) + nbytes
    others = {tier: use for tier, use in phase.use.items() if tier not in (Tier.GPU, Tier.DRAM)}
    return replace(phase, use={str(Tier.DRAM): total, **others})


def _timed(phase: PhaseForecast, time: StepTime | None) -> PhaseForecast:
    return phase if time is None else replace(phase, seconds=time.step_s)


def _placed(job: TrainingJob) -> tuple[TrainingJob, tuple[PhaseForecast, ...]]:
    """Phases within the budget, or within the smallest ones that memopt's engine can keep."""
    for _ in range(_TIERS_TRIED):
        try:
            return job, training_phases(job)
        except Infeasible as short:
            limits = {tier: job.budget.bytes_of(tier) for tier in Tier}
            limits[short.tier] = short.smallest_bytes
            job = replace(
                job,
                budget=Budget(gpu_bytes=limits[Tier.GPU], dram_bytes=limits[Tier.DRAM], ssd_bytes=limits[Tier.SSD]),
            )
    return job, training_phases(job)


def _training_work(
    job: TrainingJob, phases: tuple[PhaseForecast, ...], traffic: TrainingTraffic, flops: TrainingFlops
) -> Work:
    use = next((phase.use for phase in phases if phase.name == "optimizer"), {})
    streamed = traffic.ssd_read_bytes + traffic.ssd_write_bytes
    on_host = job.device == "cuda" and job.engine != "memory" and str(Category.OPTIMIZER) not in use.get("gpu", {})
    home: Mapping[str, int] = use.get(str(Tier.DRAM if on_host or job.device == "cpu" else Tier.GPU), {})
    of = {category: home.get(str(category), 0) for category in Category}
    # weights and state are read and written, gradients read; what streams from the SSD passes through memory as well
    update = 2 * of[Category.WEIGHTS] + of[Category.GRADIENTS] + 2 * of[Category.OPTIMIZER] + streamed
    device = phases[0].use.get(str(Tier.GPU if job.device == "cuda" else Tier.DRAM), {})
    weights = max(
        (p.use.get(str(Tier.GPU if job.device == "cuda" else Tier.DRAM), {}) or device).get("weights", 0)
        for p in phases
    )
    zero = job.engine in ("zero3", "zero-infinity")
    return Work(
        flops=flops.forward + flops.backward + flops.recomputed,
        memory_bytes=3 * weights * job.grad_accum,
        update_flops=flops.optimizer,
        update_bytes=update,
        update_on_host=on_host,
        to_device_bytes=traffic.to_device_bytes,
        from_device_bytes=traffic.from_device_bytes,
        ssd_read_bytes=traffic.ssd_read_bytes,
        ssd_write_bytes=traffic.ssd_write_bytes,
        tokens=job.tokens,
        overlap="update last" if zero else "all",
    )


def _training_name(job: TrainingJob) -> str:
    method = "full training" if job.method == "full" else f"LoRA rank {job.lora_rank}"
    return f"train {job.facts.source}: {method}, {job.optimizer}, engine {job.engine}"


def _training_assumptions(job: TrainingJob, machine: Machine, time: StepTime | None) -> tuple[str, ...]:
    sequences = f"{job.batch_size} x {job.seq_len} tokens"
    found = [
        sequences + (f" x {job.grad_accum} micro-batches" if job.grad_accum > 1 else ""),
        f"{job.weights_dtype} weights" + (f" computed in {job.autocast}" if job.autocast else ""),
        "gradient checkpointing" if job.gradient_checkpointing else "no gradient checkpointing",
    ]
    if job.engine in ("cpu-offload", "ssd"):
        found[2] = "activations recomputed block by block"
        found[1] = f"float32 weights computed in {job.autocast or job.weights_dtype}"
    return (*found, *_machine_assumptions(machine, job.device, time))


def _inference_assumptions(job: InferenceJob, machine: Machine, time: StepTime | None) -> tuple[str, ...]:
    found = [
        f"{job.batch} x {job.prompt_tokens} prompt + {job.new_tokens} new tokens",
        f"{job.dtype}" + (f", {job.weights} matrices" if job.weights else ""),
    ]
    cache: list[str] = [job.kv] if job.kv else []
    cache += [f"{job.key_keep:g} of the key channels"] if job.key_keep < 1 else []
    found.append(f"cache: {', '.join(cache) or job.dtype}")
    if job.engine == "flash":
        found.append(
            f"{job.flash_window:.0%} of the feed-forward neurons in memory and {job.flash_fresh:.1%} read per token "
            "(published for OPT-6.7B)"
        )
    return (*found, *_machine_assumptions(machine, job.device, time))


def _machine_assumptions(machine: Machine, device: Literal["cpu", "cuda"], time: StepTime | None) -> tuple[str, ...]:
    if time is None:
        missing = missing_speeds(machine, device=device)
        if len(missing) == len(missing_speeds(Machine(name="nothing known"), device=device)):
            return (f"{machine.name}: seconds not known",)
        return (f"{machine.name}: seconds not known without {', '.join(missing)}",)
    name = f"{machine.name}, " + ("its numbers assumed" if machine.assumed else "its numbers as measured")
    return (name, f"products at {MATRIX_SHARE:.0%} of the machine's rate")


def _training_reasons(job: TrainingJob, machine: Machine, traffic: TrainingTraffic) -> tuple[str, ...]:
    found = list(job.facts.notes)
    if job.engine in ("cpu-offload", "ssd"):
        found.append("memopt's engine keeps in DRAM what fits there: a larger budget is used, not left")
    if traffic.ssd_write_bytes:
        total = traffic.ssd_write_bytes * job.steps
        wear = machine.ssd_endurance_bytes
        share = f", {total / wear:.2%} of the drive's endurance" if wear else ""
        found.append(f"{format_bytes(total)} written to the SSD in {job.steps} steps{share}")
    if job.device == "cpu" and (job.autocast or job.weights_dtype) != "float32":
        found.append("the processor's speed is that of float32 products: bfloat16 ones may be far slower on it")
    return tuple(found)


def _inference_reasons(job: InferenceJob) -> tuple[str, ...]:
    found = list(job.facts.notes)
    grown = cache_bytes(job, job.cached) - cache_bytes(job, job.cached - 1)
    if grown > 0:
        found.append(f"the cache grows by {format_bytes(grown)} with each token of all sequences")
    windows = sorted({layer.window for layer in job.cache.layers if layer.window is not None})
    if windows:
        count = sum(layer.window is not None for layer in job.cache.layers)
        found.append(f"{count} of {len(job.cache.layers)} layers keep the last {windows[0]} tokens only")
    if job.key_keep < 1 and (rest := sum(not thin_layer(layer) for layer in job.cache.layers)):
        found.append(f"{rest} layers keep all key channels: only layers of ordinary full attention can be made thinner")
    if job.engine == "flash" and not job.cache.sparse_ffn:
        found.append(
            f"its activation is {job.cache.activation or 'not ReLU'}: few neurons are exactly zero, so flash "
            "changes its results unless the model was made sparse"
        )
    if job.device == "cpu" and job.dtype != "float32":
        found.append("the processor's speed is that of float32 products: bfloat16 ones may be far slower on it")
    return tuple(found)


def _inference_name(job: InferenceJob) -> str:
    return f"generate with {job.facts.source}: engine {job.engine}"


def with_config(forecast: Forecast, config: Mapping[str, Any]) -> Forecast:
    """The forecast with the settings it was made of."""
    return replace(forecast, config=dict(config))
