"""Two processes (gloo) train as one does: DDP, FSDP2 with rows that do not divide, layer-wise, saved on one layout and
loaded on another.

With the same batch on both ranks the averaged gradient is the gradient, so that results are compared bit for bit. With
half of the batch on each, its sum is rounded in another order, and low-rank bases and 8-bit codes follow it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from memopt.optim.presets import PRESETS
from tests.distributed_worker import (
    HALF,
    NAMES,
    PLAN,
    STEPS,
    TRAINER,
    WORLD,
    OddLM,
    built,
    odd,
    tokens,
    train,
    weights,
    whole_weights,
    without_torchs_kernel,
)

ROOT = Path(__file__).resolve().parent.parent
WHOLE = StateDictOptions(full_state_dict=True)
DEADLINE_S = 300
FUSED = {"adamw", "galore", "galore_muon", "muon", "muon_vo_ffn"}
"""Presets with float32 AdamW: torch's fused kernel rounds the last elements of a tensor, which do not fill a vector,
differently from the others; cut elsewhere, others are the last."""
LOOSE = {"adamw8bit": 0.1, "galore8bit": 0.1, "lion": 0.1, "lion8bit": 0.1, "muon8bit": 0.1}
"""Share of the way a model went that a gradient rounded otherwise may change: one sign, one code at a time."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo"),
]


class Single:
    """One process on its own: the weights after HALF and after STEPS steps, and what is saved in between."""

    def __init__(self, preset: str) -> None:
        model = odd()
        optimizer = built(model, preset)
        train(model, optimizer, range(HALF))
        self.half = weights(model)
        self.bytes = optimizer.state_bytes()
        self.saved = {
            "weights": whole_weights(model),
            "optimizer": copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=WHOLE)),
        }
        train(model, optimizer, range(HALF, STEPS))
        self.end = weights(model)


@pytest.fixture(scope="module", autouse=True)
def threads_of_a_rank() -> Iterator[None]:
    """As the two have it: a product cut among threads is rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def singles(threads_of_a_rank: None) -> dict[str, Single]:
    return {preset: Single(preset) for preset in NAMES}


Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(singles: dict[str, Single], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks found, by scenario and preset."""
    directory = tmp_path_factory.mktemp("ranks")
    for preset, single in singles.items():
        torch.save(single.saved, directory / f"single-{preset}.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = subprocess.run(
        [sys.executable, "-m", "tests.distributed_worker", str(directory)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=ROOT,
        env=environment,
    )
    assert ranks.returncode == 0, ranks.stdout + ranks.stderr
    found = [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]

    def of(name: str) -> list[dict[str, Any]]:
        for each in found:
            assert "error" not in each[name], each[name]["error"]
        return [each[name] for each in found]

    return of


def presets_of(scenario: str) -> pytest.MarkDecorator:
    """All presets the scenario was run with."""
    return pytest.mark.parametrize("preset", PLAN[scenario])


def assert_same(preset: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit where no kernel prevents it."""
    if preset in FUSED:
        assert off(found, expected) < 5e-3
    else:
        assert torch.equal(found, expected)


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance, as a share of the way from the start."""
    start = weights(odd())
    return float((one - other).norm() / (other - start).norm())


@presets_of("ddp")
def test_ddp(preset: str, results: Results, singles: dict[str, Single]) -> None:
    for found in results(f"ddp/{preset}"):
        assert torch.equal(found["same"], singles[preset].half)
        assert off(found["halves"], singles[preset].half) < LOOSE.get(preset, 2e-3)
    first, second = results(f"ddp/{preset}")
    assert torch.equal(first["halves"], second["halves"])


@presets_of("fsdp")
def test_fsdp2(preset: str, results: Results, singles: dict[str, Single]) -> None:
    for found in results(f"fsdp/{preset}"):
        assert_same(preset, found["same"], singles[preset].end)
        assert off(found["halves"], singles[preset].half) < LOOSE.get(preset, 2e-3)


@presets_of("plain")
def test_fsdp2_to_the_bit(preset: str, results: Results) -> None:
    model = odd()
    with without_torchs_kernel():
        train(model, built(model, preset), range(STEPS))
    for found in results(f"plain/{preset}"):
        assert torch.equal(found["same"], weights(model))


@presets_of("bfloat16")
def test_fsdp2_in_bfloat16(preset: str, results: Results) -> None:
    model = odd().to(torch.bfloat16)
    with without_torchs_kernel():
        train(model, built(model, preset), range(STEPS))
    for found in results(f"bfloat16/{preset}"):
        assert torch.equal(found["same"], weights(model))


@presets_of("two_dimensions")
def test_fsdp2_with_copies(preset: str, results: Results) -> None:
    model = odd()
    with without_torchs_kernel():
        train(model, built(model, preset), range(HALF))
    for found in results(f"two_dimensions/{preset}"):
        for shape in ("(1, 2)", "(2, 1)"):
            assert torch.equal(found[shape], weights(model)), shape


def test_fsdp2_adamw_is_torchs_to_the_bit(results: Results) -> None:
    for found, torchs in zip(results("fsdp/adamw"), results("torchs/adamw"), strict=True):
        assert torch.equal(found["same"], torchs["same"])


@presets_of("fsdp")
def test_fsdp2_bytes(preset: str, results: Results, singles: dict[str, Single]) -> None:
    each = results(f"fsdp/{preset}")
    for found in each:
        assert found["bytes"] == found["planned"] == found["charged"]
    total = sum(found["bytes"] for found in each)
    if PRESETS[preset].shape_aware:
        # parts of fused tables, tables stored input-first and low-rank states are whole on every rank
        assert singles[preset].bytes < total < 2 * singles[preset].bytes
    else:
        assert total == singles[preset].bytes
        assert all(0.45 < found["bytes"] / total < 0.55 for found in each)


@presets_of("layerwise")
def test_layerwise_under_fsdp2(preset: str, results: Results, singles: dict[str, Single]) -> None:
    for found in results(f"layerwise/{preset}"):
        assert_same(preset, found["same"], singles[preset].half)


@presets_of("clipped")
def test_layerwise_norms_are_those_of_whole_gradients(preset: str, results: Results) -> None:
    model, norms = odd(), []
    optimizer = built(model, preset)
    for step in range(HALF):
        model(tokens(step)).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        if step and norms[step - 1] > 0.3:
            for grad in grads:
                grad.mul_(0.3 / (norms[step - 1] + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
    for found in results(f"clipped/{preset}"):
        assert found["norms"] == pytest.approx(norms, rel=1e-4)
        torch.testing.assert_close(found["same"], weights(model), rtol=0, atol=2e-5)


@presets_of("fsdp")
def test_saved_by_two_loaded_by_one(preset: str, results: Results, singles: dict[str, Single]) -> None:
    found = results(f"fsdp/{preset}")[0]
    expected = singles[preset].saved["optimizer"]
    assert found["saved"]["param_groups"] == expected["param_groups"]
    assert found["saved"]["state"].keys() == expected["state"].keys()
    for name, values in found["saved"]["state"].items():
        assert values.keys() == expected["state"][name].keys(), name
    for load in (_by_torch, _directly):
        model = odd(seed=1)
        model.load_state_dict(found["weights"])
        optimizer = built(model, preset)
        load(model, optimizer, found["saved"])
        train(model, optimizer, range(HALF, STEPS))
        assert_same(preset, weights(model), singles[preset].end)


def _by_torch(model: OddLM, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    set_optimizer_state_dict(model, optimizer, saved, options=WHOLE)


def _directly(model: OddLM, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved)


@presets_of("from_one_process")
def test_saved_by_one_loaded_by_two(preset: str, results: Results, singles: dict[str, Single]) -> None:
    for found, fresh in zip(results(f"from_one_process/{preset}"), results(f"fsdp/{preset}"), strict=True):
        assert_same(preset, found["same"], singles[preset].end)
        assert found["bytes"] == fresh["bytes"]


@presets_of("from_rank_0")
def test_saved_by_one_sent_by_rank_0(preset: str, results: Results, singles: dict[str, Single]) -> None:
    for found in results(f"from_rank_0/{preset}"):
        assert_same(preset, found["same"], singles[preset].end)


@presets_of("raw")
def test_a_plain_state_is_cut_when_it_is_loaded(preset: str, results: Results, singles: dict[str, Single]) -> None:
    for found, fresh in zip(results(f"raw/{preset}"), results(f"fsdp/{preset}"), strict=True):
        assert_same(preset, found["same"], singles[preset].end)
        assert found["bytes"] == fresh["bytes"]


@presets_of("through_files")
def test_saved_by_two_loaded_by_two(preset: str, results: Results, singles: dict[str, Single]) -> None:
    for found in results(f"through_files/{preset}"):
        assert_same(preset, found["checkpoint"], singles[preset].end)
        assert_same(preset, found["per_rank"], singles[preset].end)


@presets_of("accelerate")
def test_accelerate_swaps_the_parameters(preset: str, results: Results, singles: dict[str, Single]) -> None:
    for found, fresh in zip(results(f"accelerate/{preset}"), results(f"fsdp/{preset}"), strict=True):
        assert_same(preset, found["same"], singles[preset].half)
        assert found["bytes"] == fresh["bytes"]


def trained(preset: str, folder: Path, layerwise: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, list[float]]]:
    """Weights before and after, and the log, of a Trainer on its own with the batch of all ranks."""
    pytest.importorskip("transformers")
    from tests.test_hf_trainer import attach, llama, logged, trainer_for

    batch = WORLD * TRAINER["per_device_train_batch_size"]
    with torch.random.fork_rng(devices=[]):
        given = {**TRAINER, "per_device_train_batch_size": batch, "save_strategy": "no"}
        trainer = trainer_for(llama(), folder, **given)
        attach(trainer, preset, layerwise=layerwise)
        trainer.train()
    log = {name: logged(trainer, name) for name in ("grad_norm", "optimizer_state_mib")}
    return weights(llama()), weights(trainer.model), log


@presets_of("trainer")
def test_a_trainer_under_fsdp2(preset: str, results: Results, tmp_path: Path, one_thread: None) -> None:
    start, expected, log = trained(preset, tmp_path, layerwise=preset == "muon")
    for found in results(f"trainer/{preset}"):
        assert torch.equal(found["resumed"], found["same"])
        assert (found["same"] - expected).norm() < 1e-3 * (expected - start).norm()
        assert found["norms"] == pytest.approx(log["grad_norm"], rel=1e-4)
        # low-rank states are whole on both ranks, all others are in halves
        share = found["mib"][0] / log["optimizer_state_mib"][0]
        assert 0.49 < share < 0.51 if preset == "muon" else 0.5 < share < 0.75


@presets_of("trainer_ddp")
def test_a_trainer_under_ddp(preset: str, results: Results, tmp_path: Path, one_thread: None) -> None:
    start, expected, log = trained(preset, tmp_path, layerwise=False)
    for found in results(f"trainer_ddp/{preset}"):
        assert (found["same"] - expected).norm() < LOOSE[preset] * (expected - start).norm()
        assert found["norms"] == pytest.approx(log["grad_norm"], rel=1e-2)
        assert "DistributedDataParallel averages gradients" in found["at_once"]
        assert "DistributedDataParallel averages gradients" in found["later"]


def test_a_step_is_left_out_on_both_ranks(results: Results) -> None:
    for found in results("skipped/galore8bit"):
        assert found["untouched"]
        assert found["skipped"] == 1
    model = odd()
    train(model, built(model, "galore8bit", nonfinite="skip"), range(2))
    assert torch.equal(found["same"], weights(model))


def test_an_error_is_raised_on_both_ranks(results: Results) -> None:
    first, second = results("raised/muon")
    assert first["untouched"] and second["untouched"]
    assert "gradient of a parameter on another rank" in first["error_text"]
    assert "gradient of layers.1.mlp.down_proj.weight" in second["error_text"]


def test_a_cut_along_columns_is_refused(results: Results) -> None:
    for found in results("columns/adamw"):
        assert "parameter weight is laid out as (Shard(dim=1),)" in found["error_text"]
        assert "fully_shard" in found["error_text"]


def test_what_is_cut_is_routed_as_what_is_whole(results: Results) -> None:
    for found in results("routes/muon"):
        assert found["cut"] == found["plain"]
