"""The training planner's arithmetic: phases, traffic, work, and how they grow."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.jobs.model_facts import prepare, read_model_facts
from memopt.plan_types import Infeasible
from memopt.planning import allocators
from memopt.planning.training import training_flops, training_phases, training_state, training_traffic
from memopt.planning.training_types import TrainingJob, ZeroSettings
from memopt.tiers import Category, Tier
from memopt.units import MiB
from tests.planner_models import config

quick = settings(max_examples=30, deadline=None)


@cache
def job() -> TrainingJob:
    return prepare(TrainingJob(facts=read_model_facts(config("llama", layers=4)), seq_len=64, batch_size=2))


def deep(layers: int) -> TrainingJob:
    """The job on a model of more blocks of the same kind."""
    facts = job().facts
    (trace,) = facts.traces
    first, second, middle, last = trace.kinds
    kinds = (first, second, *([middle] * (layers - 3)), last)
    return replace(job(), facts=replace(facts, traces=(replace(trace, kinds=kinds),)))


def peak(planned: TrainingJob, tier: Tier = Tier.DRAM) -> int:
    return max(phase.total_bytes(tier) for phase in training_phases(planned))


@quick
@given(st.integers(2, 64), st.integers(1, 500), st.integers(3, 40))
def test_more_sequences_tokens_and_layers_never_need_less(batch: int, seq: int, layers: int) -> None:
    now = replace(deep(layers), batch_size=batch, seq_len=seq)
    before = peak(now)
    assert peak(replace(now, batch_size=batch + 1)) >= before
    assert peak(replace(now, seq_len=seq + 1)) >= before
    assert peak(replace(deep(layers + 1), batch_size=batch, seq_len=seq)) >= before
    assert peak(replace(now, grad_accum=2)) >= before
    assert training_flops(replace(now, seq_len=seq + 1)).total > training_flops(now).total


def test_phases_and_their_categories() -> None:
    found = {phase.name: phase.use["dram"] for phase in training_phases(replace(job(), fixed_heap=True))}
    assert list(found) == ["load", "forward", "backward", "optimizer", "save"]
    state = training_state(job())
    assert found["optimizer"]["gradients"] == state[Category.GRADIENTS]
    assert found["optimizer"]["optimizer"] == found["save"]["optimizer"] == state[Category.OPTIMIZER]
    assert "optimizer" not in found["load"] and "activations" not in found["optimizer"]
    assert found["backward"]["runtime"] == job().runtime_bytes + allocators.WORK_BYTES
    assert [p.name for p in training_phases(replace(job(), save=False))][-1] == "optimizer"


def test_the_default_heap_keeps_holes_and_a_fixed_one_does_not() -> None:
    assert peak(job()) > peak(replace(job(), fixed_heap=True))


def test_weights_mapped_from_their_files_are_no_anonymous_memory() -> None:
    facts = job().facts
    mapped = replace(job(), facts=replace(facts, checkpoint_bytes=1))
    loads = [next(p for p in training_phases(each) if p.name == "load") for each in (job(), mapped)]
    weights = [load.use["dram"].get("weights", 0) for load in loads]
    assert weights[0] - weights[1] == 4 * facts.numel
    assert peak(mapped) == peak(job())  # trained weights are written to


def test_a_gpu_holds_the_tensors_and_the_host_the_process() -> None:
    planned = replace(job(), device="cuda")
    backward = next(p for p in training_phases(planned) if p.name == "backward")
    assert backward.use["gpu"]["runtime"] == planned.gpu_runtime_bytes
    assert set(backward.use["dram"]) == {"runtime"}
    assert backward.total_bytes(Tier.GPU) % (2 * MiB) == planned.gpu_runtime_bytes % (2 * MiB)


def test_segments_of_the_cuda_allocator() -> None:
    assert allocators.cuda_segment_bytes([1]) == 2 * MiB
    assert allocators.cuda_segment_bytes([512] * 4096) == 2 * MiB
    assert allocators.cuda_segment_bytes([2 * MiB, 3 * MiB]) == 20 * MiB
    assert allocators.cuda_segment_bytes([11 * MiB + 1]) == 12 * MiB


@given(st.integers(1, 2**40))
def test_pinned_blocks_round_up_to_a_power_of_two(nbytes: int) -> None:
    rounded = allocators.pinned_bytes(nbytes, power_of_two=True)
    assert nbytes <= rounded < 2 * nbytes and rounded & (rounded - 1) == 0
    assert allocators.pinned_bytes(nbytes, power_of_two=False) == nbytes


def test_memopts_own_engine_plans_within_its_budget() -> None:
    planned = prepare(replace(job(), engine="ssd", budget=Budget.parse("dram=460MiB"), seq_len=32))
    assert peak(planned) <= 460 * MiB
    assert peak(planned, Tier.SSD) > 0
    moved = training_traffic(planned)
    assert moved.ssd_space_bytes == peak(planned, Tier.SSD)
    with pytest.raises(Infeasible, match="smallest sufficient budget"):
        training_phases(replace(planned, budget=Budget.parse("dram=64MiB")))
    with pytest.raises(BadInput, match="prepare"):
        training_phases(replace(planned, offload=None))


def test_zero_infinity_moves_what_deepspeed_was_measured_to_move() -> None:
    """20 bytes read and 18 written per parameter and step (DeepSpeed 0.19.8, both on NVMe)."""
    planned = replace(job(), engine="zero-infinity", device="cuda")
    count = job().facts.numel
    moved = training_traffic(planned)
    assert (moved.ssd_read_bytes, moved.ssd_write_bytes) == (20 * count, 18 * count)
    assert training_traffic(replace(planned, grad_accum=3)).ssd_read_bytes == 28 * count


def test_zero_3_shares_states_among_gpus() -> None:
    one = replace(job(), engine="zero3", device="cuda")
    four = replace(one, zero=ZeroSettings(gpus=4))
    states = [training_phases(each)[0].use["gpu"]["optimizer"] for each in (one, four)]
    assert states[0] == 12 * job().facts.numel
    assert states[1] == pytest.approx(states[0] / 4, abs=64)
    on_cpu = replace(one, zero=ZeroSettings(offload_optimizer="cpu"))
    assert training_phases(on_cpu)[0].use["dram"]["optimizer"] == states[0]


def test_power_of_two_pinning_costs() -> None:
    plain = replace(job(), engine="zero-infinity", device="cuda")
    rounded = replace(plain, zero=ZeroSettings(power_of_two=True))
    assert peak(rounded) > peak(plain)


def test_work_of_a_step() -> None:
    planned = replace(job(), seq_len=1)
    matrices = sum(p.numel for p in planned.facts.parameters if len(p.shape) == 2 and p.layer is not None)
    head = planned.facts.hidden * planned.facts.vocab
    work = training_flops(planned)
    assert work.forward == pytest.approx(2 * 2 * (matrices + head), rel=0.02)
    assert work.backward == pytest.approx(2 * work.forward, rel=0.02)
    assert work.recomputed == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seq_len": 513}, "512 positions"),
        ({"batch_size": 0}, "batch_size"),
        ({"implementation": "fused", "optimizer": "muon"}, "adamw"),
        ({"engine": "zero3"}, "--device cuda"),
    ],
)
def test_jobs_that_cannot_be(changes: dict[str, object], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        replace(job(), **changes)  # type: ignore[arg-type]
