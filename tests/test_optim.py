"""Element-wise rules on chunks of flat vectors, and stochastic rounding of their state."""

from __future__ import annotations

import pytest
import torch

from memopt.errors import BadInput
from memopt.offload.trace import LiveBytes
from memopt.optim import codecs, native, rules
from memopt.optim.chunked import ChunkRule
from memopt.optim.codecs import Codec
from memopt.optim.element import SLOTS
from memopt.optim.rounding import random_lanes, stochastic_round_
from memopt.optim_types import ChunkKey
from tests.offload_helpers import one_thread  # noqa: F401

N = 1000


def drawn(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def run(rule: ChunkRule, cuts: list[int], *, steps: int = 5, decay_numel: int = 0, tensor: int = 3) -> torch.Tensor:
    """Five steps on one vector that is cut at these elements; the weights and the states, one after the other."""
    weights = drawn(0)
    edges = [0, *cuts, N]
    records = [torch.zeros(rule.record_bytes(b - a), dtype=torch.uint8) for a, b in zip(edges, edges[1:], strict=False)]
    for step in range(1, steps + 1):
        for a, b, record in zip(edges, edges[1:], records, strict=False):
            key = ChunkKey(step=step, tensor=tensor, position=a)
            rule.update_(weights[a:b], drawn(step)[a:b].clone(), record, decay_numel=decay_numel - a, lr=1e-2, key=key)
    stored = [rule._stored(record, b - a) for a, b, record in zip(edges, edges[1:], records, strict=False)]
    states = [codecs.decode(s.codec, s.values, s.scales, signed=s.signed) for each in stored for s in each]
    count = len(SLOTS[rule.rule])
    return torch.cat([weights, *(x for i in range(count) for x in states[i::count])])


@pytest.mark.parametrize("decay_numel", [0, 333, N])
def test_it_is_torchs_adamw(decay_numel: int) -> None:
    rule = ChunkRule(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
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


RULES = [
    ChunkRule(weight_decay=0.1, codec=codec, rule=rule, seed=7)
    for rule in ("adamw", "lion", "sgd")
    for codec in (Codec.FP32, Codec.BF16, Codec.INT8)
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rule} {rule.codec}")
@pytest.mark.parametrize("cuts", [[512], [16, 48, 992], list(range(64, N, 64))])
def test_the_cut_changes_no_bit(rule: ChunkRule, cuts: list[int]) -> None:
    cuts = sorted({cut // rule.block * rule.block for cut in cuts} - {0})
    decay_numel = N if rule.codec == Codec.INT8 else 400
    assert torch.equal(run(rule, cuts, decay_numel=decay_numel), run(rule, [], decay_numel=decay_numel))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rule} {rule.codec}")
def test_it_is_the_rule_between_decoding_and_encoding(rule: ChunkRule) -> None:
    """States in float32 as the slow reference, given back their 8 bits after every step; bfloat16 is near it."""
    weights, slots = drawn(0), SLOTS[rule.rule]
    states = [torch.zeros(N) for _ in slots]
    for step in range(1, 6):
        grad = drawn(step)
        if rule.rule == "adamw":
            d = rules.adamw(grad, *states, step=step, beta1=rule.beta1, beta2=rule.beta2, eps=rule.eps)
        elif rule.rule == "lion":
            d = rules.lion(grad, *states, beta1=rule.beta1, beta2=rule.beta2)
        else:
            d = rules.sgd(grad, *states, momentum=rule.momentum, nesterov=False)
        weights[:400] *= 1 - 1e-2 * 0.1
        weights -= 1e-2 * d
        if rule.codec == Codec.INT8:
            states = [kept_in_8_bits(x, signed=slot.signed) for x, slot in zip(states, slots, strict=True)]
    got = run(rule, [], decay_numel=400)[:N]
    away = (got - weights).abs()
    # a sign or a code that turned: seldom, and by no more than the way of a step or two
    assert (away > 1e-5).float().mean() <= (0.9 if rule.codec == Codec.BF16 else 0.01)
    assert away.max() <= 0.05


def kept_in_8_bits(x: torch.Tensor, *, signed: bool) -> torch.Tensor:
    values, scales = codecs.allocate(Codec.INT8, x.shape, device="cpu")
    codecs.encode_(Codec.INT8, x, values, scales, signed=signed)
    return codecs.decode(Codec.INT8, values, scales, signed=signed)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rule} {rule.codec}")
def test_without_the_native_kernels(rule: ChunkRule, monkeypatch: pytest.MonkeyPatch) -> None:
    with_them = run(rule, [], decay_numel=N)[:N]
    monkeypatch.setattr(native, "available", lambda: False)
    assert (with_them - run(rule, [], decay_numel=N)[:N]).abs().max() <= 2e-2
    if rule.codec == Codec.INT8:
        assert 0 < rule.scratch_bytes(1 << 24) == rule.scratch_bytes(1 << 20)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rule} {rule.codec}")
def test_temporaries_are_no_more_than_it_says(rule: ChunkRule, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1 << 16
    for available in {native.available(), False}:
        monkeypatch.setattr(native, "available", lambda available=available: available)
        weights, grads = drawn(0, n), drawn(1, n)
        record = torch.zeros(rule.record_bytes(n), dtype=torch.uint8)
        with LiveBytes() as live:
            key = ChunkKey(step=1, tensor=0, position=0)
            rule.update_(weights, grads, record, decay_numel=n // 2, lr=1e-2, key=key)
        assert live.peak <= rule.scratch_bytes(n)
        # numpy makes two thirds of the random numbers, which are not seen here
        assert rule.scratch_bytes(n) <= 2 * live.peak or rule.codec == Codec.BF16


def test_rounding_depends_on_seed_and_tensor_and_nothing_else() -> None:
    def result(seed: int, tensor: int = 3) -> torch.Tensor:
        return run(ChunkRule(codec=Codec.BF16, seed=seed), [], tensor=tensor)

    first = result(1)
    torch.rand(3)  # global random numbers are not used
    assert torch.equal(result(1), first)
    assert not torch.equal(result(2), first)
    assert not torch.equal(result(1, tensor=4), first)


def test_the_state_takes_no_more_than_it_says() -> None:
    assert ChunkRule().record_bytes(N) == 8 * N
    assert ChunkRule(codec=Codec.BF16).record_bytes(N) == 4 * N
    assert ChunkRule(codec=Codec.INT8).record_bytes(1024) == 2 * (1024 + 4 * 4)
    assert ChunkRule(codec=Codec.INT8, rule="lion").record_bytes(1 << 20) == (1 << 20) + (1 << 14)
    assert ChunkRule().scratch_bytes(N) == 0


def test_what_it_refuses() -> None:
    with pytest.raises(
        BadInput, match="rule: 'muon' does not update elements one by one; choose from adamw, lion, sgd"
    ):
        ChunkRule(rule="muon")
    with pytest.raises(BadInput, match="codec: int8_linear is for Muon's momentum; use int8 with lion"):
        ChunkRule(rule="lion", codec=Codec.INT8_LINEAR)


def test_a_second_moment_in_bfloat16_does_not_stand_still() -> None:
    """beta2 = 0.999 moves it by less than half a unit in the last place a step: round-to-nearest would lose that."""
    rule = ChunkRule(codec=Codec.BF16)
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
