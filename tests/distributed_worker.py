"""What tests/test_optimizer_distributed.py has two processes do: `python -m tests.distributed_worker DIRECTORY`.

Both go through all scenarios and leave what came out, by name, in DIRECTORY/RANK.pt: one start for all tests.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memopt.jobs.optimizer import build_optimizer
from memopt.optim import element
from memopt.optim.layerwise import Clipping, Layerwise
from memopt.optim.optimizer import Optimizer
from memopt.optim.presets import PRESETS

WORLD = 2
VOCAB, WIDTH, HEADS, FFN, SEQ = 101, 69, 3, 137, 7
"""All odd: no table can be cut into two equal halves."""
STEPS, HALF = 4, 2
NAMES = sorted(PRESETS)


class Conv1D(nn.Module):
    """A linear layer stored input-first, by the name of GPT-2's."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class PhiAttention(nn.Module):
    """Queries, keys and values in one table."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv_proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = Conv1D(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (y.view(b, s, HEADS, -1).transpose(1, 2) for y in self.qkv_proj(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, s, WIDTH))


class Mlp(nn.Module):
    """Gate and up in one table."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 2 * FFN, bias=False)
        self.down_proj = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(functional.silu(gate) * up)


class Experts(nn.Module):
    """Three matrices in one parameter, all of them asked."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsi,eoi->bso", x, self.down_proj)


class Layer(nn.Module):
    """One block; the last has experts."""

    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.self_attn, self.mlp = PhiAttention(), Mlp()
        self.experts = Experts() if experts else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        y = self.post_attention_layernorm(x)
        return x + self.mlp(y) + (self.experts(y) if self.experts is not None else 0)


class OddLM(nn.Module):
    """Two blocks with fused, input-first and stacked tables, a convolution, and parameters shorter than WORLD."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.thin = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(Layer(experts=last) for last in (False, True))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean loss of predicting each token from those before it; tokens (B, S) int64."""
        x = self.embed_tokens(tokens[:, :-1])
        x = x + self.conv(x.unsqueeze(1)).mean(1) + self.thin(x.unsqueeze(1)).squeeze(1)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x)) * self.temperature
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def odd(seed: int = 0) -> OddLM:
    """The same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OddLM()


def tokens(step: int) -> torch.Tensor:
    """The batch of a step, (4, SEQ)."""
    return torch.randint(VOCAB, (4, SEQ), generator=torch.Generator().manual_seed(2000 + step))


def built(model: nn.Module, preset: str, **options: Any) -> Optimizer:
    """`build_optimizer` with a rank that fits, and a gap that ends within a run; convolutions get what matrices get."""
    given: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1}
    if "galore" in preset:
        given |= {"rank": 5, "update_proj_gap": 3}
    if PRESETS[preset].shape_aware:
        given["overrides"] = {"conv": preset}
    return build_optimizer(model, preset, **{**given, **options})


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], *, share: tuple[int, int] = (0, 1)
) -> None:
    """These steps on part `share[0]` of `share[1]` of each batch."""
    for step in steps:
        model(tokens(step).chunk(share[1])[share[0]]).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> torch.Tensor:
    """All parameters, whole, one after the other. A collective under FSDP2."""
    return torch.cat([_whole(p.detach()).flatten() for p in model.parameters()])


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def without_torchs_kernel() -> Iterator[None]:
    """float32 AdamW by the rule as it is written."""
    takes, element._torch_takes = element._torch_takes, lambda *_: False
    try:
        yield
    finally:
        element._torch_takes = takes


def sharded(seed: int = 0, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """The model cut by FSDP2, layer by layer, as its users do."""
    from torch.distributed.fsdp import fully_shard

    model = model or odd(seed)
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def load_weights(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Whole tensors into a model that may be cut."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(values), options=StateDictOptions(full_state_dict=True))


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, on every rank."""
    return {name: _whole(p.detach()).clone() for name, p in model.named_parameters()}


class Scenarios:
    """Each method is one; parameters come with its name in the results, as in `ddp/adamw`."""

    def __init__(self, rank: int, directory: Path) -> None:
        self.rank, self.directory = rank, directory
        self.share = (rank, WORLD)

    def ddp(self, preset: str) -> dict[str, Any]:
        """Half of the batch on each rank, and the same batch on both."""
        from torch.nn.parallel import DistributedDataParallel

        found = {}
        for name, share in (("halves", self.share), ("same", (0, 1))):
            model = DistributedDataParallel(odd())
            optimizer = built(model, preset)
            train(model, optimizer, range(HALF), share=share)
            found[name] = weights(model)
        return found

    def fsdp(self, preset: str) -> dict[str, Any]:
        """The same twice: half of the batch on each rank, and the same batch on both; bytes; saved half-way."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        model = sharded()
        train(model, built(model, preset), range(HALF), share=self.share)
        found: dict[str, Any] = {"halves": weights(model)}
        model = sharded()
        optimizer = built(model, preset)
        train(model, optimizer, range(HALF))
        full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        found |= {
            "bytes": optimizer.state_bytes(),
            "planned": sum(row["planned_bytes"] for row in optimizer.memory_report()),
            "charged": sum(lease.nbytes for lease in optimizer._leases),
            "saved": copy.deepcopy(full),
            "weights": whole_weights(model),
        }
        train(model, optimizer, range(HALF, STEPS))
        found["same"] = weights(model)
        return found

    def plain(self, preset: str) -> dict[str, Any]:
        """Without torch's fused kernel, which rounds the last few elements of a tensor differently from the others."""
        with without_torchs_kernel():
            model = sharded()
            train(model, built(model, preset), range(STEPS))
            return {"same": weights(model)}

    def bfloat16(self, preset: str) -> dict[str, Any]:
        """Weights in bfloat16."""
        with without_torchs_kernel():
            model = sharded(model=odd().to(torch.bfloat16))
            train(model, built(model, preset), range(STEPS))
            return {"same": weights(model)}

    def two_dimensions(self, preset: str) -> dict[str, Any]:
        """Copies along one dimension of a mesh and cuts along the other, either way round."""
        from torch.distributed.device_mesh import init_device_mesh

        found = {}
        for shape in ((1, WORLD), (WORLD, 1)):
            with without_torchs_kernel():
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "cuts"))
                model = sharded(mesh=mesh)
                train(model, built(model, preset), range(HALF))
                found[str(shape)] = weights(model)
        return found

    def torchs(self, preset: str) -> dict[str, Any]:
        """torch's own AdamW on the same rows."""
        model = sharded()
        decayed = [p for n, p in model.named_parameters() if p.ndim > 1]
        others = [p for n, p in model.named_parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        train(model, torch.optim.AdamW(groups, lr=3e-3, fused=True), range(STEPS))
        return {"same": weights(model)}

    def layerwise(self, preset: str) -> dict[str, Any]:
        """During the backward pass, with what it says of norms."""
        return self._layerwise(preset, "none")

    def clipped(self, preset: str) -> dict[str, Any]:
        """By the norm of the step before."""
        return self._layerwise(preset, "previous_norm")

    def _layerwise(self, preset: str, clipping: Clipping) -> dict[str, Any]:
        model = sharded()
        optimizer = built(model, preset)
        layerwise = Layerwise(optimizer, clipping=clipping, max_norm=0.3)
        norms = []
        for step in range(HALF):
            model(tokens(step)).backward()
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            norms.append(layerwise.norm)
        layerwise.close()
        return {"same": weights(model), "norms": norms}

    def from_one_process(self, preset: str) -> dict[str, Any]:
        """State and weights of a process on its own go on under FSDP2."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        saved = torch.load(self.directory / f"single-{preset}.pt", weights_only=True)
        model = sharded(seed=1)
        load_weights(model, saved["weights"])
        optimizer = built(model, preset)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
        train(model, optimizer, range(HALF, STEPS))
        return {"same": weights(model), "bytes": optimizer.state_bytes()}

    def from_rank_0(self, preset: str) -> dict[str, Any]:
        """The same, with a state that rank 0 alone has."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        saved = torch.load(self.directory / f"single-{preset}.pt", weights_only=True)
        model = sharded(seed=1)
        load_weights(model, saved["weights"])
        optimizer = built(model, preset)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"] if self.rank == 0 else {}, options=options)
        train(model, optimizer, range(HALF, STEPS))
        return {"same": weights(model)}

    def raw(self, preset: str) -> dict[str, Any]:
        """The same by the optimizer's own method, which knows names from a state but not how it was cut."""
        saved = torch.load(self.directory / f"single-{preset}.pt", weights_only=True)
        model = sharded(seed=1)
        load_weights(model, saved["weights"])
        optimizer = built(model, preset)
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, range(HALF, STEPS))
        return {"same": weights(model), "bytes": optimizer.state_bytes()}

    def through_files(self, preset: str) -> dict[str, Any]:
        """A distributed checkpoint, and a file per rank, as accelerate writes them; read by new models."""
        import torch.distributed.checkpoint as dist_cp
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        model = sharded()
        optimizer = built(model, preset)
        train(model, optimizer, range(HALF))
        state, values = get_optimizer_state_dict(model, optimizer), whole_weights(model)
        folder, file = self.directory / f"dcp-{preset}", self.directory / f"{preset}-{self.rank}.pt"
        dist_cp.save({"optimizer": state}, checkpoint_id=folder)
        torch.save(state, file)
        found = {}
        for name in ("checkpoint", "per_rank"):
            again = sharded(seed=1)
            load_weights(again, values)
            resumed = built(again, preset)
            if name == "checkpoint":
                loaded = {"optimizer": get_optimizer_state_dict(again, resumed)}
                dist_cp.load(loaded, checkpoint_id=folder)
                set_optimizer_state_dict(again, resumed, loaded["optimizer"])
            else:
                set_optimizer_state_dict(again, resumed, torch.load(file, weights_only=True))
            train(again, resumed, range(HALF, STEPS))
            found[name] = weights(again)
        return found

    def accelerate(self, preset: str) -> dict[str, Any]:
        """accelerate's own FSDP2 path: the optimizer exists before its parameters are swapped for cut ones."""
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedType

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Layer"]
        )
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True)
        # accelerate takes FSDP for accelerators only, and says so nowhere but where it chooses; the rest runs on a CPU
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        model = odd()
        optimizer = built(model, preset)
        before = [id(p) for group in optimizer.param_groups for p in group["params"]]
        model, wrapped = accelerator.prepare(model, optimizer)
        after = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert not set(before) & set(after)
        found: dict[str, Any] = {}
        for step in range(HALF):
            accelerator.backward(model(tokens(step)))
            if step == 0:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1e6)
                found["norm"] = float(_whole(norm))
            wrapped.step()
            wrapped.zero_grad()
        found |= {"same": weights(model), "bytes": optimizer.state_bytes()}
        return found

    def trainer(self, preset: str) -> dict[str, Any]:
        """Hugging Face's Trainer under FSDP2, saved half-way and gone on with by another; Muon layer-wise."""
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils import DistributedType
        from transformers import Trainer

        from tests.test_hf_trainer import attach, llama, logged, trainer_for

        def made(seed: int, folder: str) -> Trainer:
            trainer = trainer_for(llama(seed), self.directory / folder, **TRAINER, save_steps=HALF)
            trainer.accelerator.state.distributed_type = DistributedType.FSDP  # as in `accelerate`
            trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            )
            trainer.is_fsdp_enabled = True
            attach(trainer, preset, layerwise=preset == "muon")
            return trainer

        straight = made(0, f"straight-{preset}")
        straight.train()
        resumed = made(1, f"resumed-{preset}")  # not sooner: all Trainers of a process share accelerate's state
        resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-{HALF}")
        return {
            "same": weights(straight.model),
            "resumed": weights(resumed.model),
            "norms": logged(straight, "grad_norm"),
            "mib": logged(straight, "optimizer_state_mib"),
        }

    def trainer_ddp(self, preset: str) -> dict[str, Any]:
        """Hugging Face's Trainer under DDP, and the refusal of what would use gradients before they are averaged."""
        from memopt.errors import BadInput
        from tests.test_hf_trainer import attach, llama, logged, trainer_for

        given = {**TRAINER, "save_strategy": "no"}
        trainer = trainer_for(llama(), self.directory / "ddp", **given)
        attach(trainer, preset)
        trainer.train()
        found: dict[str, Any] = {"same": weights(trainer.model), "norms": logged(trainer, "grad_norm")}
        refused = trainer_for(llama(), self.directory / "ddp", **given)
        try:
            attach(refused, preset, layerwise=True)
        except BadInput as error:
            found["at_once"] = str(error)
        refused.is_fsdp_enabled = True  # the wrapper is looked at again when there is one
        attach(refused, preset, layerwise=True)
        refused.is_fsdp_enabled = False
        try:
            refused.train()
        except BadInput as error:
            found["later"] = str(error)
        return found

    def skipped(self, preset: str) -> dict[str, Any]:
        """A gradient that is bad in the rows of one rank only."""
        model = sharded()
        optimizer = built(model, preset, nonfinite="skip")
        train(model, optimizer, range(1))
        before = weights(model)
        model(tokens(1)).backward()
        if self.rank == 1:
            dict(model.named_parameters())["layers.1.mlp.down_proj.weight"].grad.to_local()[0, 0] = torch.nan  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        untouched = bool(torch.equal(before, weights(model)))
        train(model, optimizer, range(1, 2))
        return {"untouched": untouched, "skipped": optimizer.skipped_steps, "same": weights(model)}

    def raised(self, preset: str) -> dict[str, Any]:
        """The same, as an error on both ranks."""
        from memopt.errors import NonFinite

        model = sharded()
        optimizer = built(model, preset)
        model(tokens(0)).backward()
        if self.rank == 1:
            dict(model.named_parameters())["layers.1.mlp.down_proj.weight"].grad.to_local()[0, 0] = torch.nan  # type: ignore[union-attr]
        before = weights(model)
        try:
            optimizer.step()
        except NonFinite as error:
            return {"error_text": str(error), "untouched": bool(torch.equal(before, weights(model)))}
        return {"error_text": ""}

    def columns(self, preset: str) -> dict[str, Any]:
        """A cut along the second dimension is refused."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        from memopt.errors import BadInput

        linear = nn.Linear(8, 8, bias=False)
        mesh = init_device_mesh("cpu", (WORLD,))
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(1)]))
        optimizer = build_optimizer(linear, preset)
        linear.weight.grad = torch.zeros_like(linear.weight)
        try:
            optimizer.step()
        except BadInput as error:
            return {"error_text": str(error)}
        return {"error_text": ""}

    def routes(self, preset: str) -> dict[str, Any]:
        """What parameters get when a model is cut, down to its attention, before the optimizer is built."""
        from torch.distributed.fsdp import fully_shard

        plain, cut = odd(), odd()
        for layer in cut.layers:
            fully_shard(layer.self_attn)  # type: ignore[arg-type]
        sharded(model=cut)
        return {
            name: [[(r.name, r.label, [str(p.part.role) for p in r.parts]) for r in g] for g in built(m, preset).routes]
            for name, m in (("plain", plain), ("cut", cut))
        }


TRAINER = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
}
SOME = ["adamw", "adamw8bit", "galore8bit", "galore_muon", "muon8bit"]
PLAN: dict[str, list[str]] = {
    "ddp": NAMES,
    "fsdp": NAMES,
    "plain": SOME,
    "torchs": ["adamw"],
    "bfloat16": ["adamw8bit", "galore_muon"],
    "two_dimensions": ["galore8bit", "muon"],
    "layerwise": NAMES,
    "clipped": ["galore_muon"],
    "from_one_process": SOME,
    "from_rank_0": ["adamw8bit", "galore8bit"],
    "raw": SOME,
    "through_files": SOME,
    "accelerate": SOME,
    "trainer": ["galore8bit", "muon"],
    "trainer_ddp": ["muon8bit"],
    "skipped": ["galore8bit"],
    "raised": ["muon"],
    "columns": ["adamw"],
    "routes": ["muon"],
}
"""Scenarios, and the presets each is for."""


def main(directory: Path) -> int:
    """Fork the ranks off a process that has imported everything; the largest exit code."""
    import accelerate  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    import tests.test_hf_trainer  # noqa: F401

    pids = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = run(rank, directory)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids)


def run(rank: int, directory: Path) -> int:
    """Go through the plan, as one of the ranks."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}  # for accelerate
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meet",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    warnings.simplefilter("error")
    scenarios = Scenarios(rank, directory)
    found: dict[str, Any] = {}
    for name, presets in PLAN.items():
        for preset in presets:
            found[f"{name}/{preset}"] = _attempt(getattr(scenarios, name), preset)
    torch.save(found, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    return 0


def _attempt(scenario: Callable[[str], dict[str, Any]], preset: str) -> dict[str, Any]:
    try:
        return scenario(preset)
    except BaseException:  # a CheckpointException is no Exception
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
