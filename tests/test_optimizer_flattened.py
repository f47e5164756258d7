"""Wrappers that put vectors in the place of parameters: DeepSpeed ZeRO one per group, FSDP1 one per parameter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.ledger import Ledger
from memopt.optim.optimizer import Optimizer
from memopt.optim.presets import PRESETS
from memopt.tiers import Tier
from tests.conftest import RunPython
from tests.distributed_worker import without_torchs_kernel
from tests.optimizer_helpers import TinyLM, built, tiny, tokens, train, weights

ELEMENTWISE = sorted(name for name, preset in PRESETS.items() if not preset.shape_aware)
SHAPE_AWARE = sorted(name for name, preset in PRESETS.items() if preset.shape_aware)
STEPS = 4


class Flattened:
    """A model whose parameters are views of one float32 vector per group of the optimizer, or of `pieces`."""

    def __init__(self, model: TinyLM, optimizer: Optimizer, pieces: int = 1) -> None:
        self.model, self.optimizer = model, optimizer
        self.params = [list(group["params"]) for group in optimizer.param_groups]
        self.flat: list[list[nn.Parameter]] = []
        for group, params in zip(optimizer.param_groups, self.params, strict=True):
            whole = torch.cat([p.detach().flatten() for p in params])
            start = 0
            for p in params:
                p.data = whole[start : start + p.numel()].view(p.shape)
                start += p.numel()
            self.flat.append([nn.Parameter(piece) for piece in whole.chunk(pieces)])
            group["params"] = list(self.flat[-1])

    def step(self) -> None:
        """As ZeRO-1 and -2 do it: one group at a time is all the optimizer sees."""
        groups = self.optimizer.param_groups
        for group, params, flat in zip(groups, self.params, self.flat, strict=True):
            self._gradients(params, flat)
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups

    def step_piece_by_piece(self) -> None:
        """As ZeRO-3 does it: each of the vectors of a group is the only parameter there is for a while."""
        groups = self.optimizer.param_groups
        for number, (params, flat) in enumerate(zip(self.params, self.flat, strict=True)):
            self._gradients(params, flat)
            for piece in flat:
                for group in groups:
                    group["params"] = []
                groups[number]["params"] = [piece]
                self.optimizer.step()

    def _gradients(self, params: list[nn.Parameter], flat: list[nn.Parameter]) -> None:
        grads = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        for piece, grad in zip(flat, grads.chunk(len(flat)), strict=True):
            piece.grad = grad.clone()

    def backward(self, step: int) -> None:
        """Fresh gradients in the model's own parameters."""
        self.model.zero_grad()
        self.model(tokens(step)).backward()


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("preset", ELEMENTWISE)
def test_a_vector_per_group(preset: str, three: bool) -> None:
    ordinary, model = tiny(), tiny()
    with without_torchs_kernel():
        train(ordinary, built(ordinary, preset, weight_decay=0.1), range(STEPS))
        zero = Flattened(model, built(model, preset, weight_decay=0.1), pieces=3 if three else 1)
        for step in range(STEPS):
            zero.backward(step)
            (zero.step_piece_by_piece if three else zero.step)()
    if "8bit" in preset:  # blocks of the vector are not blocks of rows
        off = (weights(model) - weights(ordinary)).norm() / (weights(ordinary) - weights(tiny())).norm()
        assert off < 0.1
    else:
        assert torch.equal(weights(model), weights(ordinary))


@pytest.mark.parametrize("preset", SHAPE_AWARE)
def test_rules_on_matrices_are_refused(preset: str) -> None:
    model = tiny()
    optimizer = built(model, preset)
    zero = Flattened(model, optimizer)
    before = weights(model).clone()
    zero.backward(0)
    for params, flat in zip(zero.params, zero.flat, strict=True):
        zero._gradients(params, flat)
    with pytest.raises(BadInput, match=r'as DeepSpeed ZeRO and FSDP1 make them.*use FSDP2.*"type": "Muon".*adamw8bit'):
        optimizer.step()
    assert torch.equal(weights(model), before)
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("preset", ELEMENTWISE)
def test_a_vector_per_parameter(preset: str) -> None:
    # a rank of FSDP1 holds some elements of some parameters
    ordinary, model = tiny(), tiny()
    optimizer = built(model, preset)
    names = {id(p): name for name, p in model.named_parameters()}
    held: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            name = names[id(p)]
            rows = p.detach().flatten()
            held[name] = nn.Parameter(rows[:0] if name == "norm.weight" else rows[: p.numel() // 2].clone())
            group["params"][i] = held[name]
    with without_torchs_kernel():
        reference = built(ordinary, preset)
        ordinary(tokens(0)).backward()
        for name, p in ordinary.named_parameters():
            assert p.grad is not None
            held[name].grad = p.grad.flatten()[: held[name].numel()].clone()
        optimizer.step()
        reference.step()
    for name, p in ordinary.named_parameters():
        expected = p.detach().flatten()[: held[name].numel()]
        torch.testing.assert_close(held[name].detach(), expected, rtol=0, atol=2e-3 if "8bit" in preset else 0.0)


def test_a_matrix_in_the_place_of_another_is_refused() -> None:
    model = tiny()
    optimizer = built(model, "adamw")
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(BadInput, match=r"embed_tokens.weight \(100, 72\) has become a tensor of shape \(3, 3\)"):
        optimizer.step()


@pytest.mark.parametrize("three", [False, True])
def test_every_vector_is_charged_once(three: bool) -> None:
    model, ledger = tiny(), Ledger(Budget())
    optimizer = built(model, "adamw", ledger=ledger)
    zero = Flattened(model, optimizer, pieces=3 if three else 1)
    for step in range(2):
        zero.backward(step)
        (zero.step_piece_by_piece if three else zero.step)()
    assert ledger.charged_bytes(Tier.DRAM) == 8 * weights(model).numel()
    held = sum(v.nbytes for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor))
    assert ledger.charged_bytes(Tier.DRAM) == held


def test_the_state_of_vectors_is_saved_and_resumed() -> None:
    def run(zero: Flattened, steps: range) -> torch.Tensor:
        for step in steps:
            zero.backward(step)
            zero.step()
        return weights(zero.model)

    first, second = tiny(), tiny(seed=1)
    straight = Flattened(first, built(first, "lion8bit"))
    run(straight, range(2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = Flattened(second, built(second, "lion8bit"))
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    assert torch.equal(run(straight, range(2, STEPS)), run(resumed, range(2, STEPS)))


REAL = """
import os, sys
os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
import torch, deepspeed
from memopt.errors import BadInput
from tests.optimizer_helpers import built, tiny, tokens, train, weights
torch.set_num_threads(1)
stage, preset, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
deepspeed.init_distributed("gloo")
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}

def engine(seed):
    model = tiny(seed)
    optimizer = built(model, preset)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer

def go_on(engine, steps):
    losses = []
    for step in steps:
        loss = engine(tokens(step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses

first, optimizer = engine(0)
try:
    losses = go_on(first, range(3))
except BadInput as error:
    print("refused:", error)
    sys.exit()
reference = tiny()
expected = train(reference, built(reference, preset), range(3))
assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-2, (losses, expected)
assert optimizer.ledger.charged_bytes("dram") > 0
first.save_checkpoint(folder)
second, _ = engine(1)
second.load_checkpoint(folder)
straight, resumed = go_on(first, range(3, 6)), go_on(second, range(3, 6))
assert straight == resumed, (straight, resumed)
print("equal")
"""


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("preset", ["adamw", "lion8bit", "muon"])
def test_deepspeed_itself(preset: str, stage: int, run_python: RunPython, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    done = run_python(REAL, str(stage), preset, str(tmp_path), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    if preset == "muon":
        assert "refused: parameter layers.0.self_attn.q_proj.weight (72, 72) has become" in done.stdout
    else:
        assert "equal" in done.stdout
