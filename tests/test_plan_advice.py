"""Suggestions: each one's saving is that of the job planned with it, the smallest budgets are sufficient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.forecast_types import Forecast, PhaseForecast, StepTime
from memopt.planning.advice import Knob, advise, binding_tier, inference_knobs
from memopt.planning.forecasts import inference_forecast, peak, shortages
from memopt.planning.inference_types import InferenceJob
from memopt.tiers import Tier
from memopt.units import MiB
from tests.plan_helpers import MACHINE, generation


def plan(job: InferenceJob, budget: Budget = Budget()) -> Forecast:  # noqa: B008 (frozen)
    return inference_forecast(job, MACHINE, budget)


def advised(job: InferenceJob, budget: Budget = Budget()) -> Forecast:  # noqa: B008 (frozen)
    return advise(job, plan(job, budget), inference_knobs(), lambda each: plan(each, budget))


MODEL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
JOB = {
    "model": MODEL,
    "device": "cuda",
    "batch": 4,
    "prompt_tokens": 4000,
    "new_tokens": 10,
    "gpu_runtime_bytes": MiB,
}


def test_every_saving_is_the_difference_of_two_plans() -> None:
    job = generation(**JOB)
    now = advised(job)
    knobs = {knob.text: knob for knob in inference_knobs()}
    assert len(now.suggestions) >= 5
    for suggestion in now.suggestions:
        knob = knobs[suggestion.text]
        changed = knob.turn(job)
        assert changed is not None
        assert suggestion.flag == knob.words(changed)
        after = plan(changed)
        assert suggestion.saved_bytes == peak(now, Tier.GPU) - peak(after, Tier.GPU) > 0
        assert suggestion.slow_down == pytest.approx(seconds_per_token(after) / seconds_per_token(now))


def seconds_per_token(forecast: Forecast) -> float:
    """Of the whole job, prompt included."""
    assert forecast.time is not None and forecast.time.tokens_per_s is not None
    sequences = forecast.time.tokens_per_s * forecast.time.step_s
    (prompt,) = (phase.seconds for phase in forecast.phases if phase.name == "prefill")
    return ((prompt or 0.0) + forecast.steps * forecast.time.step_s) / (sequences * forecast.steps)


def test_what_changes_results_says_so() -> None:
    same = {suggestion.flag: suggestion.same_result for suggestion in advised(generation(**JOB)).suggestions}
    assert same["--batch-size 1"]
    assert same["--engine cpu-offload"]
    assert not same["--kv-dtype int8"]
    assert not same["--weights int4"]
    assert not same["--seq-len 2000"]


def test_what_is_enough_comes_first_and_the_rest_by_bytes() -> None:
    job = generation(**JOB)
    need = peak(plan(job), Tier.GPU)
    least = min(peak(plan(replace(job, batch=1)), Tier.GPU), need - 1)
    now = advised(job, Budget(gpu_bytes=least + MiB))
    assert now.verdict == "does not fit"
    enough = [suggestion.enough for suggestion in now.suggestions]
    assert enough == sorted(enough, reverse=True)
    assert any(enough)
    rest = [suggestion.saved_bytes for suggestion in now.suggestions if not suggestion.enough]
    assert rest == sorted(rest, reverse=True)
    assert now.smallest_flags == (now.suggestions[0].flag,)
    assert now.smallest["gpu"] <= least + MiB


def test_several_knobs_together_and_none_too_many() -> None:
    """A budget that no knob reaches alone: with the flags named it fits, with one of them fewer it does not."""
    job = generation(**JOB)
    alone = min(peak(plan(job), Tier.GPU) - s.saved_bytes for s in advised(job).suggestions)
    budget = Budget(gpu_bytes=alone - MiB)
    now = advised(job, budget)
    assert len(now.smallest_flags) >= 2
    assert not any(suggestion.enough for suggestion in now.suggestions)
    assert now.smallest["gpu"] <= alone - MiB
    chosen = [
        knob
        for knob in inference_knobs()
        if (changed := knob.turn(job)) is not None and knob.words(changed) in now.smallest_flags
    ]
    for left_out in (None, *chosen):
        turned = job
        for knob in chosen:
            if knob is not left_out:
                turned = knob.turn(turned) or turned
        assert (plan(turned, budget).verdict == "fits") == (left_out is None)


def test_a_budget_nobody_can_keep_names_the_least() -> None:
    now = advised(generation(**JOB), Budget(gpu_bytes=MiB))
    assert now.verdict == "does not fit"
    assert now.smallest["gpu"] > MiB
    assert plan(generation(**JOB), Budget(gpu_bytes=MiB)).smallest == {}  # what plans does not advise


def test_a_job_that_fits_is_told_no_smallest_budget() -> None:
    now = advised(generation(**JOB), Budget(gpu_bytes=10**11))
    assert (now.verdict, now.smallest, now.smallest_flags) == ("fits", {}, ())
    assert not any(suggestion.enough for suggestion in now.suggestions)


@dataclass(frozen=True)
class Toy:
    """A job of two numbers."""

    load: int = 50
    step: int = 100
    odd: bool = False
    slow: float = 1.0


def toy_plan(job: Toy) -> Forecast:
    if job.odd:
        raise BadInput("odd")
    phases = tuple(
        PhaseForecast(name=name, use={"dram": {"weights": n}}) for name, n in (("load", job.load), ("step", job.step))
    )
    seconds = job.step * job.slow
    time = StepTime(step_s=seconds, compute_s=seconds, tokens_per_s=1 / seconds)
    forecast = Forecast(job="toy", verdict="fits", budgets={"dram": 40}, phases=phases, time=time)
    return replace(forecast, verdict="does not fit" if shortages(forecast) else "fits")


KNOBS = (
    Knob[Toy](flag="--load 10", text="", turn=lambda job: replace(job, load=10)),
    Knob[Toy](flag="--step 60", text="", turn=lambda job: replace(job, step=60)),
    Knob[Toy](flag="--odd", text="", turn=lambda job: replace(job, odd=True)),
    Knob[Toy](flag="--step 30", text="", turn=lambda job: replace(job, step=30), same_result=False),
)


def test_only_the_binding_peak_counts() -> None:
    """A saving of the load is none while the step binds; a knob that cannot be turned is left out."""
    now = advise(Toy(), toy_plan(Toy()), KNOBS, toy_plan)
    assert [(s.flag, s.saved_bytes) for s in now.suggestions] == [("--step 30", 50), ("--step 60", 40)]
    assert now.suggestions[0].slow_down == pytest.approx(0.3)
    # the load binds once the step is small, so that it has to shrink as well
    assert set(now.smallest_flags) == {"--step 30", "--load 10"}
    assert now.smallest == {"dram": 30}


def test_a_dear_flag_is_not_named_where_cheaper_ones_do_together() -> None:
    """Ten times slower alone, or two that cost nothing: both fit and keep the result."""
    dear = Knob[Toy](flag="--slow", text="slow", turn=lambda job: replace(job, load=20, step=20, slow=50.0))
    gentle = (
        Knob[Toy](flag="--load 10", text="load", turn=lambda job: replace(job, load=10)),
        Knob[Toy](flag="--step 35", text="step", turn=lambda job: replace(job, step=35)),
    )
    now = advise(Toy(), toy_plan(Toy()), (dear, *gentle), toy_plan)
    assert [s.flag for s in now.suggestions if s.enough] == ["--slow"]
    assert set(now.smallest_flags) == {"--load 10", "--step 35"}
    assert now.smallest == {"dram": 35}
    # without the others the dear one is what there is
    alone = advise(Toy(), toy_plan(Toy()), (dear, gentle[0]), toy_plan)
    assert alone.smallest_flags == ("--slow",)


def test_the_binding_tier() -> None:
    def forecast(**budgets: int) -> Forecast:
        use = {"gpu": {"weights": 10}, "dram": {"weights": 100}}
        return Forecast(job="", verdict="fits", budgets=budgets, phases=(PhaseForecast(name="step", use=use),))

    assert binding_tier(forecast()) is Tier.GPU
    assert binding_tier(forecast(gpu=100, dram=120)) is Tier.DRAM
    assert binding_tier(forecast(gpu=5, dram=99)) is Tier.GPU
