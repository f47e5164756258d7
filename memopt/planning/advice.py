"""What could be done about a forecast: every knob is turned and the job planned again, so that a saving is a difference
of two plans. Pure, but for the planning it is handed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from memopt.errors import BadInput
from memopt.forecast_types import Forecast, Suggestion
from memopt.plan_types import Infeasible
from memopt.planning.forecasts import peak, shortages
from memopt.planning.inference_types import InferenceJob, thin_layer
from memopt.planning.training_types import TrainingJob
from memopt.tiers import Tier

J = TypeVar("J")

_LEAST_SHARE = 200
"""A saving below one part in 200 of the peak is no advice."""
_DEAR = 2.0
"""A flag that is enough but makes the job so much slower is not named before others were put together."""
_KEY_KEEP = 0.6
"""ThinK's published setting (lambda 0.4)."""
_LORA_RANK = 8
_CHUNK = 512


@dataclass(frozen=True, kw_only=True)  # slots: a generic class of Python 3.11 cannot be made with them
class Knob(Generic[J]):
    """A flag (or what makes it of the changed job), what it does to a job (None: it does not apply), and whether the
    job's numbers stay the same."""

    flag: str | Callable[[J], str]
    text: str
    turn: Callable[[J], J | None]
    same_result: bool | Callable[[J], bool] = True
    last_resort: bool = False
    """Turned only when nothing else makes the job fit: it makes another job of it, and costs seconds to plan."""

    def words(self, changed: J) -> str:
        """The flag as a person types it."""
        return self.flag if isinstance(self.flag, str) else self.flag(changed)

    def keeps(self, job: J) -> bool:
        """Whether the numbers of `job` stay the same."""
        return self.same_result if isinstance(self.same_result, bool) else self.same_result(job)


def advise(job: J, now: Forecast, knobs: Sequence[Knob[J]], plan: Callable[[J], Forecast]) -> Forecast:
    """The forecast with suggestions, and with the smallest sufficient budgets when it does not fit.

    `plan` may raise BadInput or Infeasible for a knob that cannot be turned; that knob is left out.
    """
    tier = binding_tier(now)
    found: list[tuple[Suggestion, Forecast]] = []
    for knob in knobs:
        changed = None if knob.last_resort else _turned(job, knob, plan)
        if changed is None:
            continue
        after = changed[1]
        saved = peak(now, tier) - peak(after, tier)
        if saved * _LEAST_SHARE < peak(now, tier):
            continue
        suggestion = Suggestion(
            flag=knob.words(changed[0]),
            text=knob.text,
            tier=tier,
            saved_bytes=saved,
            slow_down=_slow_down(now, after),
            same_result=knob.keeps(job),
            enough=now.verdict == "does not fit" and after.verdict == "fits",
        )
        found.append((suggestion, after))
    found.sort(key=lambda pair: _rank(pair[0]))
    advised = replace(now, suggestions=tuple(suggestion for suggestion, _ in found))
    if now.verdict != "does not fit":
        return advised
    if found and found[0][0].enough:
        suggestion, after = found[0]
        cost = suggestion.slow_down or 1.0
        if cost > _DEAR:
            # several knobs that keep the result may cost less together
            gentle = [knob for knob in knobs if knob.keeps(job) and not knob.last_resort]
            others = [knob for knob in gentle if knob.text != suggestion.text]
            best, used = _fewest(job, now, others, plan)
            if best.verdict == "fits" and (_slow_down(now, best) or cost) < cost:
                return _with_smallest(advised, best, used)
        return replace(advised, smallest=_needs(now, after), smallest_flags=(suggestion.flag,))
    order = sorted(knobs, key=lambda knob: (knob.last_resort, not knob.keeps(job)))
    return _with_smallest(advised, *_fewest(job, now, order, plan))


def binding_tier(forecast: Forecast) -> Tier:
    """The tier that lacks most; or the fullest one; or without budgets the one the job computes on."""
    if short := shortages(forecast):
        return max(short, key=lambda tier: short[tier])
    shares = {tier: peak(forecast, tier) / forecast.budgets[tier] for tier in Tier if forecast.budgets.get(tier)}
    if shares:
        return max(shares, key=lambda tier: shares[tier])
    return Tier.GPU if peak(forecast, Tier.GPU) else Tier.DRAM


def _rank(suggestion: Suggestion) -> tuple[bool, bool, float, int]:
    """What is enough alone first, by what it costs; then by what is saved."""
    if suggestion.enough:
        return False, not suggestion.same_result, suggestion.slow_down or 1.0, -suggestion.saved_bytes
    return True, False, 0.0, -suggestion.saved_bytes


def _turned(job: J, knob: Knob[J], plan: Callable[[J], Forecast]) -> tuple[J, Forecast] | None:
    try:
        changed = knob.turn(job)
        return None if changed is None else (changed, plan(changed))
    except (BadInput, Infeasible):
        return None


def _with_smallest(now: Forecast, best: Forecast, used: Sequence[tuple[Knob[J], str]]) -> Forecast:
    """`smallest` is what the tiers that are short need with these knobs."""
    # by the first word: --weights int4 takes the place of --weights int8
    flags = {words.split()[0]: words for _, words in used}
    return replace(now, smallest=_needs(now, best), smallest_flags=tuple(flags.values()))


def _fewest(
    job: J, now: Forecast, knobs: Sequence[Knob[J]], plan: Callable[[J], Forecast]
) -> tuple[Forecast, list[tuple[Knob[J], str]]]:
    """Turn knobs one after the other until the job fits or none is left.

    A knob stays turned when it lessens what is missing; one that turns out not to be needed is turned back.
    """
    best, used = _turn_all(job, now, knobs, plan)
    if best.verdict == "fits":
        for knob in [knob for knob, _ in used][:-1]:
            fewer = [other for other, _ in used if other is not knob]
            tried, left = _turn_all(job, now, fewer, plan)
            if tried.verdict == "fits":
                best, used = tried, left
    return best, used


def _turn_all(
    job: J, now: Forecast, knobs: Sequence[Knob[J]], plan: Callable[[J], Forecast]
) -> tuple[Forecast, list[tuple[Knob[J], str]]]:
    """The forecast with all knobs turned that lessen what is missing, until it fits; those knobs with their flags."""
    best = now
    used: list[tuple[Knob[J], str]] = []
    before = -1
    while best.verdict != "fits" and len(used) > before:
        # once more over the others: another phase may bind now
        before = len(used)
        for knob in [knob for knob in knobs if all(knob is not other for other, _ in used)]:
            changed = _turned(job, knob, plan)
            if changed is not None and _missing(changed[1]) < _missing(best):
                job, best = changed
                used.append((knob, knob.words(job)))
            if best.verdict == "fits":
                break
    return best, used


def _needs(now: Forecast, after: Forecast) -> dict[str, int]:
    """What the tiers that are short now need afterwards, and those that are then."""
    return {str(tier): peak(after, tier) for tier in Tier if tier in shortages(now) or tier in shortages(after)}


def _missing(forecast: Forecast) -> int:
    return sum(shortages(forecast).values())


def _slow_down(now: Forecast, after: Forecast) -> float | None:
    """Seconds per token over today's."""
    before, then = tokens_per_s(now), tokens_per_s(after)
    return None if not before or not then else before / then


def tokens_per_s(forecast: Forecast) -> float | None:
    """Of the whole job: where a prompt is read first, generated tokens over the seconds of both."""
    time = forecast.time
    if time is None or not time.tokens_per_s:
        return None
    prompt = sum(phase.seconds or 0.0 for phase in forecast.phases if phase.name == "prefill")
    if not prompt:
        return time.tokens_per_s
    decode = forecast.steps * time.step_s
    return time.tokens_per_s * decode / (prompt + decode)


def training_knobs() -> tuple[Knob[TrainingJob], ...]:
    """What memopt and a Trainer can do about training memory, the gentle ones first."""
    return (
        Knob(
            flag="--gradient-checkpointing",
            text="recompute activations in the backward pass",
            turn=lambda job: (
                None
                if job.gradient_checkpointing or job.engine in _STREAMING
                else replace(job, gradient_checkpointing=True)
            ),
        ),
        Knob(
            flag=lambda job: f"--batch-size 1 --grad-accum {job.grad_accum}",
            text="the same batch in micro-batches of one sequence",
            turn=lambda job: (
                replace(job, batch_size=1, grad_accum=job.grad_accum * job.batch_size) if job.batch_size > 1 else None
            ),
        ),
        Knob(
            flag="--attention sdpa",
            text="attention without matrices of scores",
            turn=lambda job: replace(job, attention="sdpa") if job.attention == "eager" else None,
        ),
        Knob(
            flag="--engine cpu-offload",
            text="memopt streams the blocks from DRAM",
            turn=lambda job: (
                replace(job, engine="cpu-offload") if job.engine == "memory" and job.device == "cuda" else None
            ),
            same_result=_float32_weights,
        ),
        Knob(
            flag="--engine ssd",
            text="memopt keeps on the SSD what does not fit in DRAM",
            turn=lambda job: replace(job, engine="ssd") if job.engine in ("memory", "cpu-offload") else None,
            same_result=_float32_weights,
        ),
        Knob(
            flag="--optimizer adamw8bit",
            text="8-bit moments",
            turn=lambda job: _optimizer(job, "adamw8bit") if job.optimizer == "adamw" else None,
            same_result=False,
        ),
        Knob(
            flag="--optimizer muon8bit",
            text="one 8-bit momentum for matrices",
            turn=lambda job: _optimizer(job, "muon8bit") if job.optimizer in ("adamw", "adamw8bit", "muon") else None,
            same_result=False,
        ),
        Knob(
            flag="--optimizer galore8bit",
            text="8-bit moments of low-rank gradients",
            turn=lambda job: _optimizer(job, "galore8bit") if job.optimizer != "galore8bit" else None,
            same_result=False,
        ),
        Knob(
            flag="--optim-state-dtype bfloat16",
            text="the optimizer's state in bfloat16, rounded stochastically",
            turn=lambda job: (
                None
                if job.optimizer.endswith("8bit") or "state_dtype" in job.optimizer_options
                else _option(job, "state_dtype", "bfloat16")
            ),
            same_result=False,
        ),
        Knob(
            flag="--dtype bfloat16",
            text="weights and gradients in bfloat16",
            turn=lambda job: (
                replace(job, weights_dtype="bfloat16", autocast=None)
                if job.weights_dtype == "float32" and job.engine not in _STREAMING
                else None
            ),
            same_result=False,
        ),
        Knob(
            flag=lambda job: f"--seq-len {job.seq_len}",
            text="half the sequence length",
            turn=lambda job: replace(job, seq_len=job.seq_len // 2) if job.seq_len >= 256 else None,
            same_result=False,
        ),
        Knob(
            flag=f"--lora-rank {_LORA_RANK}",
            text="adapters instead of all weights",
            turn=lambda job: replace(job, method="lora", lora_rank=_LORA_RANK) if job.method == "full" else None,
            same_result=False,
            last_resort=True,
        ),
    )


def inference_knobs() -> tuple[Knob[InferenceJob], ...]:
    """What memopt and transformers can do about the memory of generation, the gentle ones first."""
    return (
        Knob(
            flag=f"--prefill-chunk {_CHUNK}",
            text="read the prompt in pieces",
            turn=lambda job: (
                replace(job, prefill_chunk=_CHUNK) if job.prompt_tokens > _CHUNK and job.prefill_chunk is None else None
            ),
        ),
        Knob(
            flag="--batch-size 1",
            text="one sequence after the other",
            turn=lambda job: replace(job, batch=1) if job.batch > 1 else None,
        ),
        Knob(
            flag="--engine cpu-offload",
            text="blocks wait in DRAM and are copied to the GPU",
            turn=lambda job: (
                replace(job, engine="cpu-offload") if job.engine == "memory" and job.device == "cuda" else None
            ),
        ),
        Knob(
            flag=f"--key-keep {_KEY_KEEP}",
            text="ThinK: leave out the key channels that matter least",
            turn=lambda job: (
                replace(job, key_keep=_KEY_KEEP)
                if job.key_keep == 1 and any(thin_layer(layer) for layer in job.cache.layers)
                else None
            ),
            same_result=False,
        ),
        Knob(
            flag="--kv-dtype int8",
            text="the cache in 8 bits",
            turn=lambda job: replace(job, kv="int8") if job.kv is None else None,
            same_result=False,
        ),
        Knob(
            flag="--weights int8",
            text="the blocks' matrices in 8 bits",
            turn=lambda job: replace(job, weights="int8") if job.weights is None else None,
            same_result=False,
        ),
        Knob(
            flag="--weights int4",
            text="the blocks' matrices in 4 bits",
            turn=lambda job: replace(job, weights="int4") if job.weights != "int4" else None,
            same_result=False,
        ),
        Knob(
            flag="--flash",
            text="feed-forward weights on the SSD, the neurons in use in memory",
            turn=lambda job: replace(job, engine="flash") if job.engine == "memory" and job.weights is None else None,
            same_result=False,
        ),
        Knob(
            flag="--kv-dtype int4",
            text="the cache in 4 bits",
            turn=lambda job: replace(job, kv="int4") if job.kv != "int4" else None,
            same_result=False,
        ),
        Knob(
            flag=lambda job: f"--seq-len {job.prompt_tokens}",
            text="half the prompt",
            turn=lambda job: replace(job, prompt_tokens=job.prompt_tokens // 2) if job.prompt_tokens >= 256 else None,
            same_result=False,
        ),
    )


_STREAMING = ("cpu-offload", "ssd")


def _float32_weights(job: TrainingJob) -> bool:
    """memopt's engines keep float32 weights: another job than one in bfloat16, if a better one."""
    return job.weights_dtype == "float32" or job.engine in _STREAMING


def _optimizer(job: TrainingJob, name: str) -> TrainingJob:
    return replace(job, optimizer=name, implementation="memopt")


def _option(job: TrainingJob, name: str, value: str) -> TrainingJob:
    return replace(job, optimizer_options={**job.optimizer_options, name: value}, implementation="memopt")
