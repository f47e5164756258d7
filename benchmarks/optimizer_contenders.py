"""The optimizers of `optimizer_step`, and the process in which one of them lives.

`python -m benchmarks.optimizer_contenders JSON` builds the model and one contender, then answers lines on stdin:
`steps N` with the seconds of N steps (after one that is not counted), `memory N` with bytes, of N steps.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.harness import RESULT_MARK

LR, DECAY = 1e-4, 0.01
NEVER = 10**9
Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model: Llama's shapes, untied."""

    width: int = 512
    intermediate: int = 1376
    layers: int = 6
    vocabulary: int = 4096
    rank: int = 128


class Block(nn.Module):
    """One layer's parameters, under Llama's names."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, wide = sizes.width, sizes.intermediate
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})
        up = {name: nn.Linear(width, wide, bias=False) for name in ("gate_proj", "up_proj")}
        self.mlp = nn.ModuleDict({**up, "down_proj": nn.Linear(wide, width, bias=False)})
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)


class Model(nn.Module):
    """Parameters to be updated; it computes nothing."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        self.lm_head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def hidden(self) -> list[nn.Parameter]:
        """The matrices between two layers."""
        return [p for p in self.layers.parameters() if p.ndim == 2]

    def others(self) -> list[nn.Parameter]:
        """Embedding, head and norms."""
        hidden = {id(p) for p in self.hidden()}
        return [p for p in self.parameters() if id(p) not in hidden]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer to measure."""

    package: str
    """Module that must be there."""
    make: Callable[[Model, Sizes, int], Optimizers]
    """Of a model, its sizes, and the steps between two looks for a subspace."""
    projects: bool = False
    """Whether it looks for one."""
    cpu_only: bool = False


def _adamw(**options: Any) -> Callable[[Model, Sizes, int], Optimizers]:
    return lambda model, sizes, gap: [torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, **options)]


def _torch_muon(model: Model, sizes: Sizes, gap: int) -> Optimizers:
    muon = torch.optim.Muon(model.hidden(), lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(model.others(), lr=LR, weight_decay=DECAY, fused=True)]


def _bitsandbytes(model: Model, sizes: Sizes, gap: int) -> Optimizers:
    import bitsandbytes

    return [bitsandbytes.optim.AdamW8bit(model.parameters(), lr=LR, weight_decay=DECAY)]


def _torchao(model: Model, sizes: Sizes, gap: int) -> Optimizers:
    import torchao.optim

    torch._dynamo.config.cache_size_limit = 64  # one compilation per shape
    return [torchao.optim.AdamW8bit(model.parameters(), lr=LR, weight_decay=DECAY)]


def _galore_torch(model: Model, sizes: Sizes, gap: int) -> Optimizers:
    import galore_torch

    low = {"rank": sizes.rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": model.others()}, {"params": model.hidden(), **low}]
    return [galore_torch.GaLoreAdamW(groups, lr=LR, weight_decay=DECAY, no_deprecation_warning=True)]


def _memopt(preset: str, *, native: bool = True, **options: Any) -> Callable[[Model, Sizes, int], Optimizers]:
    def make(model: Model, sizes: Sizes, gap: int) -> Optimizers:
        from memopt.jobs.optimizer import build_optimizer
        from memopt.optim import native as kernels

        if not native:
            mock.patch.object(kernels, "available", return_value=False).start()
        low: dict[str, Any] = {"rank": sizes.rank, "update_proj_gap": gap} if "galore" in preset else {}
        return [build_optimizer(model, preset, lr=LR, weight_decay=DECAY, **low, **options)]

    return make


CONTENDERS = {
    "torch AdamW fused": Contender(package="torch", make=_adamw(fused=True)),
    "torch AdamW foreach": Contender(package="torch", make=_adamw(foreach=True)),
    "torch Muon + fused AdamW": Contender(package="torch", make=_torch_muon),
    "bitsandbytes AdamW8bit": Contender(package="bitsandbytes", make=_bitsandbytes),
    "torchao AdamW8bit": Contender(package="torchao", make=_torchao),
    "galore-torch GaLoreAdamW": Contender(package="galore_torch", make=_galore_torch, projects=True),
    "memopt adamw": Contender(package="memopt", make=_memopt("adamw")),
    "memopt adamw8bit": Contender(package="memopt", make=_memopt("adamw8bit")),
    "memopt adamw8bit, no compiler": Contender(
        package="memopt", make=_memopt("adamw8bit", native=False), cpu_only=True
    ),
    "memopt lion8bit": Contender(package="memopt", make=_memopt("lion8bit")),
    "memopt muon": Contender(package="memopt", make=_memopt("muon")),
    "memopt muon, bfloat16 products": Contender(package="memopt", make=_memopt("muon", ns_dtype="bfloat16")),
    "memopt muon8bit": Contender(package="memopt", make=_memopt("muon8bit")),
    "memopt galore": Contender(package="memopt", make=_memopt("galore"), projects=True),
    "memopt galore8bit": Contender(package="memopt", make=_memopt("galore8bit"), projects=True),
    "memopt galore_muon": Contender(package="memopt", make=_memopt("galore_muon"), projects=True),
}


def missing(name: str) -> str | None:
    """Why a contender cannot be measured here."""
    contender = CONTENDERS[name]
    if contender.cpu_only and torch.cuda.is_available():
        return "for CPUs only"
    return None if importlib.util.find_spec(contender.package) else f"{contender.package} is not installed"


class Bench:
    """One contender on one model, gradients fixed."""

    def __init__(self, name: str, sizes: Sizes, refresh: bool, seed: int) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = "cuda" if self.cuda else "cpu"
        torch.manual_seed(seed)
        self.model = Model(sizes).to(self.device)
        draw = torch.Generator().manual_seed(seed)
        for param in self.model.parameters():
            param.grad = (torch.randn(param.shape, generator=draw) * 1e-3).to(self.device)
        self.before = self._held()
        self.optimizers = CONTENDERS[name].make(self.model, sizes, 1 if refresh else NEVER)

    def step_s(self) -> float:
        """Seconds of one step."""
        self._wait()
        began = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        self._wait()
        return time.perf_counter() - began

    def memory(self, steps: int) -> dict[str, Any]:
        """Bytes of the states, and the most a step holds besides weights, gradients and states."""
        gc.collect()
        base = self._held()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        for _ in range(steps):
            self.step_s()
        peak = torch.cuda.max_memory_allocated() if self.cuda else _status_bytes("VmHWM")
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "state_bytes": sum(_state_bytes(optimizer) for optimizer in self.optimizers),
            "grown_bytes": base - self.before,
            "scratch_bytes": peak - base,
        }

    def _held(self) -> int:
        if self.cuda:
            return torch.cuda.memory_allocated()
        _trim()
        return _status_bytes("VmRSS")

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def _trim() -> None:
    """Give freed memory back, so that what is held and what was needed can be told apart."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every storage in the states, once, whatever objects they are in."""
    seen: dict[int, int] = {}
    stack: list[Any] = list(optimizer.state.values())
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor) and type(value) is torch.Tensor:
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        elif hasattr(value, "__dict__"):  # a projector, or a tensor made of tensors
            stack += vars(value).values()
    return sum(seen.values())


def main() -> None:
    """Serve one contender."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    began = time.perf_counter()
    bench = Bench(settings["name"], Sizes(**settings["sizes"]), settings["refresh"], settings["seed"])
    bench.step_s()
    bench.step_s()
    _answer({"first_s": time.perf_counter() - began})
    for line in sys.stdin:
        what, number = line.split()
        if what == "steps":
            bench.step_s()
            _answer({"step_s": [bench.step_s() for _ in range(int(number))]})
        else:
            _answer(bench.memory(int(number)))


def _answer(result: dict[str, Any]) -> None:
    print(RESULT_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
