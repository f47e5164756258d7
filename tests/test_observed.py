"""Which steps are looked at closely, in a made-up time, and in a real loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memopt
from memopt.profiler.observed import Observed
from memopt.profiler.pace import Allowance
from memopt.tiers import Category, Tier
from tests.reference import torch_bytes


def run(
    steps: int, *, step_s: float, cost_s: float, phase_cost_s: float, grows_at: int = -1
) -> tuple[Observed, list[int]]:
    """Which of `steps` were observed, when observing one costs `cost_s`."""
    observed, now_s, spent_s, phases_s, seen = Observed(), 0.0, 0.0, 0.0, []
    observe = phases = True
    for step in range(steps):
        if observe:
            seen.append(step)
        spent_s += cost_s * observe
        phases_s += phase_cost_s * phases
        now_s += step_s
        following = observed.ended(
            now_s, spent_s=spent_s, phases_spent_s=phases_s, grown=lambda step=step: step == grows_at
        )
        observe, phases = following.observe, following.phases
    return observed, seen


def test_the_first_then_as_often_as_is_cheap() -> None:
    observed, seen = run(3000, step_s=0.1, cost_s=0.01, phase_cost_s=0.0)
    assert seen[:3] == [0, 1, 2]
    gaps = {after - before for before, after in zip(seen[2:], seen[3:], strict=False)}
    assert gaps <= {30, 31}, "3 s of other steps for one hundredth of a second"
    assert (observed.steps, observed.observed, observed.with_phases) == (3000, len(seen), 3000)
    (note,) = observed.notes()
    assert f"counted in {len(seen)} of 3000 steps" in note


def test_all_where_looking_costs_nothing() -> None:
    observed, seen = run(50, step_s=1.0, cost_s=0.001, phase_cost_s=0.001)
    assert seen == list(range(50))
    assert observed.notes() == []


def test_a_peak_nobody_saw_is_looked_at_soon() -> None:
    _, seen = run(60, step_s=0.1, cost_s=0.02, phase_cost_s=0.0, grows_at=20)
    assert seen == [0, 1, 2, 21]


def test_phases_of_short_steps_cost_little() -> None:
    observed, seen = run(20_000, step_s=0.008, cost_s=0.002, phase_cost_s=0.0003)
    assert len(seen) < observed.with_phases < 400
    assert "phases were found in" in observed.notes()[1]


def test_an_allowance_is_saved_up_but_not_without_end() -> None:
    allowance = Allowance(1 / 100, 0.5)
    assert allowance.left_s(0.0) == 0.5
    allowance.spend(1.5, 0.0)
    assert allowance.wait_s(0.0) == pytest.approx(100.0)
    assert allowance.left_s(50.0) == pytest.approx(-0.5)
    assert allowance.left_s(100.5) == pytest.approx(0.005)
    assert (allowance.wait_s(100.5), allowance.left_s(1e6)) == (0.0, 0.5)
    assert allowance.left_s(5.0) == 0.5, "a clock that goes back changes nothing"


class Loop:
    """A model, its optimizer, and what of them is hooked."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self) -> float:
        loss = self.model(torch.ones(4, 32)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def is_counted(self) -> bool:
        on_gradients = any(p._post_accumulate_grad_hooks for p in self.model.parameters())
        assert on_gradients == (torch._C._autograd._top_saved_tensors_default_hooks(False) is not None)
        return on_gradients


def test_a_loop_of_short_steps_runs_free_of_hooks_most_of_the_time() -> None:
    plain, watched = Loop(), Loop()
    prof = memopt.Profiler()
    prof.watch(watched.model, watched.optimizer)
    with prof:
        counted, losses = [], []
        for _ in range(300):
            counted.append(watched.is_counted())
            losses.append(watched.step())
        now = prof.sample().categories[Tier.DRAM]
        assert now[Category.WEIGHTS] == torch_bytes.weight_bytes(watched.model)
        assert now[Category.OPTIMIZER] == torch_bytes.state_bytes(watched.optimizer)
    assert counted[:3] == [True] * 3
    assert 3 <= sum(counted) < 100
    assert losses == [plain.step() for _ in range(300)]
    report = prof.report
    (note,) = [note for note in report.notes if "gradients and activations were counted" in note]
    assert f"in {sum(counted)} of 300 steps" in note
    assert not watched.is_counted()
    assert report.tiers.dram.at_peak["weights"] == torch_bytes.weight_bytes(watched.model)


@pytest.mark.parametrize("optimizer", [True, False])
def test_steps_end_where_somebody_says_so_else_after_the_backward_pass(optimizer: bool) -> None:
    loop = Loop()
    with memopt.Profiler() as prof:
        prof.watch(loop.model, *([loop.optimizer] if optimizer else []))
        for _ in range(2):  # two passes to a step
            loop.model(torch.ones(4, 32)).sum().backward()
            loop.step()
        watch = prof._torch
        assert watch is not None
        assert watch._observed.steps == (2 if optimizer else 3), "the last is not over where nobody says so"


def test_hooks_of_others_are_never_taken_off() -> None:
    loop = Loop()
    packed: list[int] = []
    with memopt.Profiler() as prof:
        prof.watch(loop.model, loop.optimizer)
        watch = prof._torch
        assert watch is not None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t.detach(), lambda t: t):
            for _ in range(200):
                loop.step()
            assert watch.attribution.observing, "these lie below, idle"
        seen = len(packed)
        for _ in range(50):
            loop.step()
        assert not loop.is_counted()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            watch.attribution.observe(True)  # must not lie on top of what will be taken off
        loop.step()
        assert len(packed) == seen
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
