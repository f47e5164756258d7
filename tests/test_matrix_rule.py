"""Rules on whole parameters of flat vectors: the optimizer in memory to the bit, its states in one byte record."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memopt.offload.trace import LiveBytes
from memopt.optim.codecs import Codec
from memopt.optim.items import Route, RoutedPart
from memopt.optim.matrix_rule import MatrixRule
from memopt.optim.optimizer import Optimizer, ParamGroup
from memopt.optim.parts import Part
from memopt.optim.presets import Policy
from memopt.optim.projection import GaLore
from memopt.optim.roles import Role
from memopt.optim_types import ChunkKey

LR = 1e-2
LOW = GaLore(rank=6, update_proj_gap=3)
MUON, ADAMW = Policy(rule="muon", nesterov=True), Policy()
WHOLE = Part(role=Role.OTHER)
PARTS = {
    "one": (WHOLE,),
    "transposed": (Part(role=Role.O, transposed=True),),
    "rows": tuple(Part(role=r, start=a, length=n) for r, a, n in ((Role.Q, 0, 24), (Role.K, 24, 8), (Role.V, 32, 8))),
    "heads": tuple(Part(role=r, groups=4, start=a, length=n) for r, a, n in ((Role.Q, 0, 6), (Role.K, 6, 4))),
}


def route_of(shape: tuple[int, ...], parts: str, *policies: Policy) -> Route:
    """Part i of the parameter gets policy i (the last again and again)."""
    routed = [
        RoutedPart(part, policies[min(i, len(policies) - 1)], "" if len(PARTS[parts]) == 1 else f"{part.role}.")
        for i, part in enumerate(PARTS[parts])
    ]
    return Route("some.weight", tuple(routed), shape)


CASES: dict[str, Route] = {
    "muon": route_of((40, 24), "one", MUON),
    "muon, transposed, 8 bits": route_of((72, 96), "transposed", replace(MUON, codec=Codec.INT8_LINEAR)),
    "muon, bfloat16": route_of((24, 40), "one", replace(MUON, codec=Codec.BF16, nesterov=False)),
    "muon on heads": route_of((40, 24), "heads", MUON),
    "muon on values only": route_of((40, 24), "rows", ADAMW, ADAMW, MUON),
    "muon on experts": route_of((3, 40, 24), "one", MUON),
    "galore": route_of((40, 24), "one", Policy(projection=LOW)),
    "galore, wide": route_of((24, 40), "one", Policy(projection=LOW)),
    "galore, 8 bits": route_of((700, 80), "one", Policy(projection=replace(LOW, rank=64), codec=Codec.INT8)),
    "galore, both sides, int8 bases": route_of(
        (300, 80), "one", Policy(projection=replace(LOW, proj_type="full", rank=70, basis_dtype="int8"))
    ),
    "galore, adaptive, fira": route_of(
        (40, 24), "one", Policy(projection=replace(LOW, adaptive=True, residual="fira", basis_dtype="bfloat16"))
    ),
    "galore with muon": route_of((40, 24), "one", replace(MUON, projection=LOW)),
    "galore on experts": route_of((3, 24, 40), "one", Policy(projection=LOW)),
    "galore on heads": route_of((40, 24), "heads", Policy(projection=replace(LOW, rank=4))),
    "galore, drawn bases": route_of((40, 24), "one", Policy(projection=replace(LOW, basis="random"))),
}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_memory(route: Route, steps: int, weight_decay: float) -> torch.Tensor:
    param = torch.nn.Parameter(drawn(0, *route.shape))
    group = ParamGroup(routes=(route,), params=(param,), weight_decay=weight_decay)
    optimizer = Optimizer([group], preset="galore", lr=LR, seed=5)
    optimizer.param_groups[0]["nesterov"] = any(p.policy.nesterov for p in route.parts)
    for step in range(1, steps + 1):
        param.grad = drawn(step, *route.shape)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_optimizer_in_memory(case: str, decay: float) -> None:
    route = CASES[case]
    rule = MatrixRule(route=route, weight_decay=0.1, seed=5)
    numel = drawn(0, *route.shape).numel()
    padded = -(-numel // 1024) * 1024
    weights = torch.full((padded,), 7.0)
    weights[:numel] = drawn(0, *route.shape).flatten()
    record = torch.zeros(rule.record_bytes(padded), dtype=torch.uint8)
    for step in range(1, 9):
        grads = torch.full((padded,), 9.0)
        grads[:numel] = drawn(step, *route.shape).flatten()
        before = record.clone()
        record = before.clone()  # nothing but the bytes goes from one step to the next
        key = ChunkKey(step=step, tensor=3, position=0)
        rule.update_(weights, grads, record, decay_numel=numel if decay else 0, lr=LR, key=key)
    assert torch.equal(weights[:numel].view(route.shape), in_memory(route, 8, decay))
    assert (weights[numel:] == 7.0).all(), "what is behind the matrix is nobody's"
    assert len(record) % 4096 == 0


def test_experts_that_fill_pages_are_updated_one_by_one() -> None:
    for policy in (MUON, Policy(projection=replace(LOW, rank=16)), Policy(projection=LOW, codec=Codec.INT8)):
        route = route_of((3, 64, 128), "one", policy)
        rule = MatrixRule(route=route, seed=5)
        n = 64 * 128
        assert rule.whole == n
        weights = drawn(0, *route.shape).flatten()
        records = torch.zeros(3, rule.record_bytes(n), dtype=torch.uint8)
        for step in range(1, 5):
            grads = drawn(step, *route.shape).flatten()
            for i in range(3):
                key = ChunkKey(step=step, tensor=0, position=i * n)
                part = slice(i * n, (i + 1) * n)
                rule.update_(weights[part], grads[part], records[i], decay_numel=0, lr=LR, key=key)
        torch.testing.assert_close(weights.view(route.shape), in_memory(route, 4, 0.0), rtol=0, atol=1e-6)
    assert MatrixRule(route=route_of((3, 40, 24), "one", MUON)).whole == 3 * 40 * 24
    assert MatrixRule(route=route_of((40, 24), "one", MUON)).whole == 40 * 24


LARGE: dict[str, Route] = {
    "muon": route_of((256, 512), "one", MUON),
    "muon, 8 bits": route_of((256, 512), "one", replace(MUON, codec=Codec.INT8_LINEAR)),
    "muon, transposed": route_of((256, 512), "transposed", MUON),
    "muon, bfloat16": route_of((256, 512), "one", replace(MUON, codec=Codec.BF16, nesterov=False)),
    "muon on heads": route_of((400, 256), "heads", MUON),
    "galore": route_of((256, 768), "one", Policy(projection=replace(LOW, rank=64))),
    "galore, square": route_of((512, 512), "one", Policy(projection=replace(LOW, rank=200))),
    "galore, 8 bits": route_of((768, 256), "one", Policy(projection=replace(LOW, rank=64), codec=Codec.INT8)),
    "galore, both sides": route_of((512, 512), "one", Policy(projection=replace(LOW, rank=128, proj_type="full"))),
    "galore with muon": route_of((256, 768), "one", replace(MUON, projection=replace(LOW, rank=64))),
}


@pytest.mark.parametrize("case", LARGE)
def test_temporaries_are_no_more_than_it_says(case: str) -> None:
    """A refresh, steps without one, and a refresh that turns the moments."""
    route = LARGE[case]
    rule = MatrixRule(route=route)
    numel = drawn(0, *route.shape).numel()
    weights, record = drawn(0, numel), torch.zeros(rule.record_bytes(numel), dtype=torch.uint8)
    peak = 0
    for step in range(1, 5):
        grads = drawn(step, numel)
        with LiveBytes() as live:
            key = ChunkKey(step=step, tensor=0, position=0)
            rule.update_(weights, grads, record, decay_numel=0, lr=LR, key=key)
        peak = max(peak, live.peak)
    assert peak <= rule.scratch_bytes(numel)
    assert rule.scratch_bytes(numel) <= 2.5 * (peak + 4 * min(route.shape) ** 2), "LAPACK's workspace is not seen here"
