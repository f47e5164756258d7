"""The update rule on chunks of flat vectors, and stochastic rounding of its state."""

from __future__ import annotations

import pytest
import torch

from memopt.errors import BadInput
from memopt.optim.adamw import AdamW
from memopt.optim.rounding import random_lanes, stochastic_round_
from memopt.optim_types import ChunkKey
from tests.offload_helpers import one_thread  # noqa: F401

N = 1000


def drawn(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def run(rule: AdamW, cuts: list[int], *, steps: int = 5, decay_numel: int = 0, tensor: int = 3) -> torch.Tensor:
    """Five steps on one vector that is cut at these elements; the weights and both moments, one after the other."""
    weights = drawn(0)
    edges = [0, *cuts, N]
    records = [torch.zeros(rule.record_bytes(b - a), dtype=torch.uint8) for a, b in zip(edges, edges[1:], strict=False)]
    for step in range(1, steps + 1):
        for a, b, record in zip(edges, edges[1:], records, strict=False):
            key = ChunkKey(step=step, tensor=tensor, position=a)
            rule.update_(weights[a:b], drawn(step)[a:b].clone(), record, decay_numel=decay_numel - a, lr=1e-2, key=key)
    moments = [record.view(rule.state_dtype).view(2, -1).float() for record in records]
    return torch.cat([weights, *(torch.cat([m[i] for m in moments]) for i in range(2))])


@pytest.mark.parametrize("decay_numel", [0, 333, N])
def test_it_is_torchs_adamw(decay_numel: int) -> None:
    rule = AdamW(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
    reference = [torch.nn.Parameter(part.clone()) for part in (drawn(0)[:decay_numel], drawn(0)[decay_numel:])]
    optimizer = torch.optim.AdamW(
        [{"params": [reference[0]], "weight_decay": 0.3}, {"params": [reference[1]], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.95),
        eps=1e-6,
        foreach=False,
    )
    for step in range(1, 6):
        reference[0].grad, reference[1].grad = drawn(step)[:decay_numel].clone(), drawn(step)[decay_numel:].clone()
        optimizer.step()
    got = run(rule, [], decay_numel=decay_numel)[:N]
    torch.testing.assert_close(got, torch.cat([p.detach() for p in reference]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [[512], [16, 48, 992], list(range(64, N, 64))])
def test_the_cut_changes_no_bit(dtype: torch.dtype, cuts: list[int]) -> None:
    rule = AdamW(weight_decay=0.1, state_dtype=dtype, seed=7)
    assert torch.equal(run(rule, cuts, decay_numel=400), run(rule, [], decay_numel=400))


def test_rounding_depends_on_seed_and_tensor_and_nothing_else() -> None:
    def result(seed: int, tensor: int = 3) -> torch.Tensor:
        return run(AdamW(state_dtype=torch.bfloat16, seed=seed), [], tensor=tensor)

    first = result(1)
    torch.rand(3)  # global random numbers are not used
    assert torch.equal(result(1), first)
    assert not torch.equal(result(2), first)
    assert not torch.equal(result(1, tensor=4), first)


def test_the_state_takes_no_more_than_it_says() -> None:
    assert AdamW().record_bytes(N) == 8 * N
    assert AdamW(state_dtype=torch.bfloat16).record_bytes(N) == 4 * N
    assert AdamW().scratch_bytes(N) == 0
    with pytest.raises(BadInput, match="optim_state_dtype.*float16"):
        AdamW(state_dtype=torch.float16)


def test_a_second_moment_in_bfloat16_does_not_stand_still() -> None:
    """beta2 = 0.999 moves it by less than half a unit in the last place a step: round-to-nearest would lose that."""
    rule = AdamW(state_dtype=torch.bfloat16)
    n, steps = 1024, 1200
    weights, record = torch.zeros(n), torch.zeros(rule.record_bytes(n), dtype=torch.uint8)
    nearest = torch.zeros(n, dtype=torch.bfloat16)
    for step in range(1, steps + 1):
        rule.update_(
            weights, torch.ones(n), record, decay_numel=0, lr=0.0, key=ChunkKey(step=step, tensor=0, position=0)
        )
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    exact = 1 - 0.999**steps
    second = record.view(torch.bfloat16).view(2, n)[1].float()
    assert float(second.mean()) == pytest.approx(exact, rel=0.01)
    assert float(nearest.float().mean()) < 0.5 * exact


def test_stochastic_rounding_is_unbiased() -> None:
    values = torch.tensor([1.0 + 2**-9, 1.0 + 2**-8, 3.3, -0.7001, 1e-20, -5e30, 0.0, 2.0])
    draws = 20_000
    spread = values.bfloat16().abs().float() * 2**-7  # one unit in the last place, at most
    total = torch.zeros(len(values), dtype=torch.float64)
    seen: list[set[float]] = [set() for _ in values]
    lanes = random_lanes(draws * 16, seed=3, step=1, tensor=0, position=0).view(draws, 16)[:, : len(values)]
    out = torch.empty(draws, len(values), dtype=torch.bfloat16)
    stochastic_round_(values.repeat(draws, 1).flatten(), lanes.flatten().contiguous(), out.view(-1))
    total = out.double().mean(0)
    for index, column in enumerate(out.float().unbind(1)):
        seen[index] = set(column.unique().tolist())
    # the standard deviation of a mean of `draws` is at most half a unit / sqrt(draws); five of them
    tolerance = (2.5 * spread.double() / draws**0.5).clamp_min(1e-300)
    assert ((total - values.double()).abs() <= tolerance).all()
    assert seen[6] == {0.0} and seen[7] == {2.0}, "what bfloat16 can hold stays"
    assert all(len(s) == 2 for s in seen[:6]), "the two neighbours, nothing else"


def test_random_lanes_are_uniform_and_cut_anywhere() -> None:
    whole = random_lanes(1 << 16, seed=5, step=9, tensor=2, position=0)
    assert (int(whole.min()), int(whole.max())) == (0, 65535) or int(whole.max()) > 65000
    assert float(whole.double().mean()) == pytest.approx(32767.5, rel=0.01)
    counts = torch.bincount(whole >> 12, minlength=16).double()
    assert ((counts - 4096).abs() < 5 * 62).all()
    for a, n in ((16, 7), (1024, 5000), (65520, 16)):
        assert torch.equal(random_lanes(n, seed=5, step=9, tensor=2, position=a), whole[a : a + n])
    for change in ({"seed": 6}, {"step": 10}, {"tensor": 3}):
        other = random_lanes(1 << 16, **{"seed": 5, "step": 9, "tensor": 2, "position": 0, **change})
        assert float((other == whole).double().mean()) < 0.001
    with pytest.raises(ValueError, match="multiple of 16"):
        random_lanes(4, seed=0, step=1, tensor=0, position=8)
