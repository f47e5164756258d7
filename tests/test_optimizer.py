"""The optimizer as a whole: torch's rules where torch has them, resumable to the bit, and clear when it refuses."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from memopt.budget import Budget
from memopt.errors import BadInput, NonFinite, OverBudget
from memopt.ledger import Ledger
from memopt.optim import native
from memopt.optim.layerwise import Layerwise
from memopt.optim.optimizer import Optimizer
from memopt.optim.presets import PRESETS
from memopt.tiers import Tier
from tests.offload_helpers import one_thread  # noqa: F401
from tests.optimizer_helpers import TinyLM, built, tiny, tokens, train, weights

NAMES = sorted(PRESETS)
EXACT_IN_PARTS = {"adamw", "lion", "sgd"}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What `torch.load` gives back when it trusts nothing."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", NAMES)
def test_every_preset_learns(preset: str, dtype: torch.dtype) -> None:
    model = tiny(dtype=dtype)
    optimizer = built(model, preset, lr=2e-3)
    batch = tokens(0)
    first = model(batch).item()
    for _ in range(12):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(batch).item() < first - 0.1
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_torchs_to_the_bit(weight_decay: float) -> None:
    mine, theirs = tiny(), tiny()
    optimizer = built(mine, "adamw", weight_decay=weight_decay, betas=(0.8, 0.95), eps=1e-6)
    plain = [p for n, p in theirs.named_parameters() if p.ndim < 2]
    decayed = [p for n, p in theirs.named_parameters() if p.ndim >= 2]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.95),
        eps=1e-6,
        fused=True,
    )
    for step in range(5):
        train(mine, optimizer, range(step, step + 1))
        train(theirs, reference, range(step, step + 1))
    assert torch.equal(weights(mine), weights(theirs))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mode", ["original", "match_rms_adamw"])
def test_muon_is_torchs_on_matrices(nesterov: bool, mode: str) -> None:
    mine, theirs = tiny(), tiny()
    options = {"nesterov": nesterov, "scale_mode": mode, "coefficients": "jordan", "ns_dtype": torch.bfloat16}
    optimizer = built(mine, "muon", weight_decay=0.1, **options)
    hidden = [p for n, p in theirs.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in theirs.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    groups = [
        {"params": [p for p in others if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = next(tuple(g["betas"]) for g in optimizer.param_groups if "adamw" in g["policy"])
    muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=mode)
    rest = torch.optim.AdamW(groups, lr=1e-2, betas=betas, fused=True)
    for step in range(6):
        train(mine, optimizer, range(step, step + 1))
        theirs(tokens(step)).backward()
        muon.step()
        rest.step()
        theirs.zero_grad()
    torch.testing.assert_close(weights(mine), weights(theirs), rtol=0, atol=2e-4)


@pytest.mark.parametrize("at", [2, 4, 5])
@pytest.mark.parametrize("preset", NAMES)
def test_resuming_changes_no_bit(preset: str, at: int) -> None:
    straight = tiny()
    train(straight, built(straight, preset), range(8))
    first = tiny()
    optimizer = built(first, preset)
    train(first, optimizer, range(at))
    saved, state = copy.deepcopy(first.state_dict()), through_a_file(optimizer.state_dict())
    second = tiny(seed=1)
    second.load_state_dict(saved)
    resumed = built(second, preset)
    resumed.load_state_dict(state)
    train(second, resumed, range(at, 8))
    assert torch.equal(weights(second), weights(straight))


@pytest.mark.parametrize("preset", NAMES)
def test_an_empty_state_goes_round(preset: str) -> None:
    model, untouched = tiny(), tiny()
    optimizer = built(model, preset)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))  # as accelerate's prepare does
    train(model, optimizer, range(4))
    train(untouched, built(untouched, preset), range(4))
    assert torch.equal(weights(model), weights(untouched))


@pytest.mark.parametrize("preset", NAMES)
def test_loading_keeps_dtypes(preset: str) -> None:
    model = tiny(dtype=torch.bfloat16)
    optimizer = built(model, preset)
    train(model, optimizer, range(2))
    before = [{k: v.dtype for k, v in s.items() if isinstance(v, torch.Tensor)} for s in optimizer.state.values()]
    fresh = built(tiny(dtype=torch.bfloat16), preset)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    after = [{k: v.dtype for k, v in s.items() if isinstance(v, torch.Tensor)} for s in fresh.state.values()]
    assert before == after
    assert all(dtype == torch.float32 for names in after for name, dtype in names.items() if name.endswith("_scale"))


@pytest.mark.parametrize("preset", NAMES)
def test_micro_batches_are_one_batch(preset: str) -> None:
    one, four = tiny(), tiny()
    losses = train(one, built(one, preset, lr=1e-3), range(4))
    again = train(four, built(four, preset, lr=1e-3), range(4), micro=4)
    assert losses == pytest.approx(again, rel=2e-3)
    assert (weights(one) - weights(four)).norm() < 2e-2 * (weights(one) - weights(tiny())).norm()


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("preset", NAMES)
def test_layerwise_is_the_ordinary_step(preset: str, micro: int) -> None:
    ordinary, during = tiny(), tiny()
    train(ordinary, built(ordinary, preset), range(5), micro=micro)
    optimizer = built(during, preset)
    count = 0

    def last_micro_batch() -> bool:
        return count % micro == micro - 1

    layerwise = Layerwise(optimizer, gate=last_micro_batch)
    for step in range(5):
        for part in tokens(step).chunk(micro):
            (during(part) / micro).backward()
            count += 1
        assert all(p.grad is None for p in during.parameters())
        optimizer.step()
    layerwise.close()
    torch.testing.assert_close(weights(during), weights(ordinary), rtol=0, atol=1e-5)


def test_layerwise_state_is_saved_and_resumed() -> None:
    def run(model: TinyLM, optimizer: Optimizer, steps: range) -> None:
        layerwise = Layerwise(optimizer, clipping="previous_norm", max_norm=0.5)
        for step in steps:
            model(tokens(step)).backward()
            optimizer.step()
        layerwise.close()

    straight = tiny()
    run(straight, built(straight, "galore8bit"), range(6))
    first, second = tiny(), tiny(seed=3)
    optimizer = built(first, "galore8bit")
    run(first, optimizer, range(3))
    resumed = built(second, "galore8bit")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(second, resumed, range(3, 6))
    assert torch.equal(weights(second), weights(straight))


def test_layerwise_clips_by_the_norm_it_says() -> None:
    model, reference = tiny(), tiny()
    optimizer = built(model, "adamw")
    layerwise = Layerwise(optimizer, clipping="previous_norm", max_norm=0.1)
    plain = built(reference, "adamw")
    previous = 0.0
    for step in range(4):
        model(tokens(step)).backward()
        optimizer.step()
        reference(tokens(step)).backward()
        grads = [p.grad for p in reference.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        if previous > 0.1:
            for grad in grads:
                grad.mul_(0.1 / (previous + 1e-6))
        plain.step()
        plain.zero_grad()
        previous = norm
        assert layerwise.norm == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(weights(model), weights(reference), rtol=0, atol=2e-5)


@pytest.mark.parametrize("preset", NAMES)
def test_state_bytes_are_what_was_planned(preset: str) -> None:
    model = tiny()
    ledger = Ledger(Budget())
    optimizer = built(model, preset, ledger=ledger)
    assert ledger.charged_bytes(Tier.DRAM) == 0
    train(model, optimizer, range(4))
    rows = optimizer.memory_report()
    assert sum(row["elements"] for row in rows) == weights(model).numel()
    # one scalar per matrix of a Fira norm apart, planned bytes are held bytes
    assert sum(row["planned_bytes"] for row in rows) == optimizer.state_bytes()
    assert ledger.charged_bytes(Tier.DRAM) == optimizer.state_bytes()


def test_states_are_compact() -> None:
    model = tiny()
    optimizer = built(model, "galore")
    train(model, optimizer, range(2))
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


def test_over_budget_is_known_before_anything_moves() -> None:
    model = tiny()
    before = weights(model).clone()
    optimizer = built(model, "adamw", budget="dram=64KiB")
    model(tokens(0)).backward()
    with pytest.raises(OverBudget, match="optimizer state.*64.*KiB|64.*KiB.*optimizer state"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    assert optimizer.state_bytes() == 0


class TestGradients:
    """What a gradient may not be."""

    @staticmethod
    def poisoned() -> tuple[TinyLM, torch.Tensor]:
        model = tiny()
        model(tokens(0)).backward()
        grad = model.layers[1].mlp.up_proj.weight.grad
        assert grad is not None
        grad[3, 4] = math.nan
        return model, weights(model).clone()

    @pytest.mark.parametrize("preset", NAMES)
    def test_nan_raises_with_the_name(self, preset: str) -> None:
        model, before = self.poisoned()
        optimizer = built(model, preset)
        with pytest.raises(NonFinite, match=r"layers\.1\.mlp\.up_proj\.weight"):
            optimizer.step()
        assert torch.equal(weights(model), before)
        assert not optimizer.state or all(not s for s in optimizer.state.values())

    def test_skip_leaves_the_step_out_and_counts(self) -> None:
        model, before = self.poisoned()
        optimizer = built(model, "galore8bit", nonfinite="skip")
        optimizer.step()
        assert torch.equal(weights(model), before)
        assert optimizer.skipped_steps == 1
        fresh = built(tiny(), "galore8bit", nonfinite="skip")
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
        assert fresh.skipped_steps == 1

    def test_large_is_not_infinite(self) -> None:
        model = tiny()
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e30)
        built(model, "adamw").step()
        assert weights(model).isfinite().all()

    def test_sparse_is_refused(self) -> None:
        model = nn.Sequential(nn.Embedding(10, 4, sparse=True))
        optimizer = built(model, "adamw")
        model(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(BadInput, match=r"0\.weight has a sparse gradient"):
            optimizer.step()

    @pytest.mark.parametrize("preset", NAMES)
    def test_they_are_left_as_they_were(self, preset: str) -> None:
        model = tiny()
        model(tokens(0)).backward()
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        built(model, preset).step()
        after = [p.grad for p in model.parameters() if p.grad is not None]
        for a, b in zip(after, before, strict=True):
            assert torch.equal(a, b)


class TestBadInput:
    """One clear error each."""

    def test_complex(self) -> None:
        model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))})
        with pytest.raises(BadInput, match="w is complex"):
            built(model, "adamw")

    def test_nothing_to_train(self) -> None:
        model = tiny().requires_grad_(False)
        with pytest.raises(BadInput, match="no parameter that requires a gradient"):
            built(model, "adamw")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lr": -1.0}, "lr: -1"),
            ({"lr": math.nan}, "lr: nan"),
            ({"weight_decay": -0.1}, "weight_decay: -0.1"),
            ({"nonfinite": "maybe"}, "nonfinite: 'maybe' is not one of raise, skip, ignore"),
            ({"budget": "dram=1GiB", "ledger": Ledger(Budget())}, "budget and ledger"),
        ],
    )
    def test_settings(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(BadInput, match=message):
            built(tiny(), "adamw", **options)

    @pytest.mark.parametrize("preset", ["galore", "adamw8bit", "muon"])
    def test_another_presets_state(self, preset: str) -> None:
        model, other = tiny(), tiny()
        optimizer, theirs = built(model, "adamw"), built(other, preset)
        train(other, theirs, range(2))
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(BadInput, match="belongs to another optimizer.*adamw"):
            optimizer.load_state_dict(theirs.state_dict())
        assert str(optimizer.state_dict()) == str(before)

    def test_torchs_state(self) -> None:
        model = tiny()
        theirs = torch.optim.AdamW(model.parameters())
        with pytest.raises(BadInput, match="belongs to another optimizer"):
            built(model, "adamw").load_state_dict(theirs.state_dict())

    def test_two_rules_of_a_kind_in_one_parameter(self) -> None:
        model = nn.ModuleDict({"self_attn": nn.MultiheadAttention(64, 4)})
        with pytest.raises(BadInput, match="self_attn.in_proj_weight would get adamw and lion.*share one betas"):
            built(model, "adamw", overrides={"v": "lion"})

    def test_another_group(self) -> None:
        with pytest.raises(BadInput, match="routes parameters by name"):
            built(tiny(), "adamw").add_param_group({"params": [nn.Parameter(torch.zeros(2))]})

    def test_clipping_of_the_layerwise_step(self) -> None:
        optimizer = built(tiny(), "adamw")
        with pytest.raises(BadInput, match="clipping: 'global' is not one of none, per_param, previous_norm"):
            Layerwise(optimizer, clipping="global")  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="max_norm: 0"):
            Layerwise(optimizer, clipping="per_param", max_norm=0.0)


class TestIncumbents:
    """Defects of other packages that must not be here."""

    @pytest.mark.parametrize("preset", ["galore8bit", "adamw8bit"])
    def test_small_projected_parameters_keep_training(self, preset: str) -> None:
        # GaLoreAdamW8bit with bitsandbytes 0.50: states below 4096 elements took a path that clipped them to nothing
        full, eight = tiny(), tiny()
        train(full, built(full, preset.replace("8bit", "") if preset != "adamw8bit" else "adamw"), range(5))
        train(eight, built(eight, preset), range(5))
        start = dict(tiny().named_parameters())
        for (name, a), b in zip(full.named_parameters(), eight.parameters(), strict=True):
            moved, moved8 = ((x.detach() - start[name].detach()).norm().item() for x in (a, b))
            assert moved8 == pytest.approx(moved, rel=0.2), name

    @pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
    def test_a_rank_too_high_is_full_rank(self, proj_type: str) -> None:
        mine, full = tiny(), tiny()
        train(mine, built(mine, "galore", rank=500, proj_type=proj_type), range(3))
        train(full, built(full, "adamw"), range(3))
        assert torch.equal(weights(mine), weights(full))

    def test_weight_decay_comes_before_the_step(self) -> None:
        model = tiny()
        optimizer = built(model, "galore", lr=0.1, weight_decay=0.5)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            expected = before[name] * (0.95 if p.ndim == 2 else 1.0)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("preset", ["galore", "galore8bit", "muon", "muon8bit", "galore_muon"])
    def test_convolutions(self, preset: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(2), nn.Conv1d(16, 12, 5, bias=False))
        optimizer = built(model, preset, overrides={"conv": "muon" if "muon" in preset else "galore"})
        shapes = {r.name: r.parts[0].part.shape(r.shape) for group in optimizer.routes for r in group}
        assert (shapes["0.weight"], shapes["2.weight"]) == ((16, 72), (12, 80))
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):
            model(torch.randn(2, 8, 9, 9)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_eight_bit_needs_no_gpu_and_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel, plain = tiny(), tiny()
        train(kernel, built(kernel, "adamw8bit"), range(4))
        monkeypatch.setattr(native, "available", lambda: False)
        train(plain, built(plain, "adamw8bit"), range(4))
        moved = (weights(plain) - weights(tiny())).norm()
        assert (weights(kernel) - weights(plain)).norm() < 1e-2 * moved


def test_the_learning_rate_can_be_scheduled() -> None:
    model, reference = tiny(), tiny()
    mine, theirs = built(model, "adamw"), torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0, fused=True)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4) for o in (mine, theirs)]
    for step in range(5):
        train(model, mine, range(step, step + 1))
        train(reference, theirs, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
    assert torch.equal(weights(model), weights(reference))


@pytest.mark.parametrize("preset", ["adamw8bit", "muon", "galore"])
def test_a_compiled_models_names_are_its_own(preset: str) -> None:
    model, compiled = tiny(), tiny()
    optimizer = built(model, preset)
    wrapped = built(torch.compile(compiled, backend="eager"), preset)  # type: ignore[arg-type]
    assert [[r.name for r in g] for g in optimizer.routes] == [[r.name for r in g] for g in wrapped.routes]
    assert [[r.label for r in g] for g in optimizer.routes] == [[r.label for r in g] for g in wrapped.routes]


def test_a_closure_is_called() -> None:
    model = tiny()
    optimizer = built(model, "adamw")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(tokens(0))
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
