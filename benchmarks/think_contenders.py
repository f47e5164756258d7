"""The caches that benchmarks/think_cache.py compares, and the processes that measure them.

`python -m benchmarks.think_contenders NAME JSON` prints one result. The kvpress process runs on its own transformers.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULT_MARK

MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 65536,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "keep 1.0": {"key_keep": 1.0},
    "keep 0.6": {"key_keep": 0.6},
    "keep 0.5": {"key_keep": 0.5},
    "keep 0.6, values 0.6": {"key_keep": 0.6, "value_keep": 0.6},
    "keep 0.6, int8": {"key_keep": 0.6, "storage": "int8"},
    "keep 0.6, int4": {"key_keep": 0.6, "storage": "int4"},
}
STOCK = "stock DynamicCache"
REFERENCE = "reference's algorithm"
DROPPED = 2


def build(dtype: str, seed: int) -> Any:
    """The Llama of the benchmark, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**MODEL))
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    # to_empty leaves buffers without content
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


def make_cache(name: str, model: Any) -> Any:
    """A contender's empty cache."""
    from transformers import DynamicCache

    if name == STOCK:
        return DynamicCache(config=model.config)
    if name == REFERENCE:
        return _reference_cache(model)
    import memopt

    return memopt.ThinKCache(model, **SETTINGS[name])


def cache_bytes(cache: Any) -> int:
    """Bytes of all storages of a cache."""
    if hasattr(cache, "cache_bytes"):
        return int(cache.cache_bytes())
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def fill(name: str, model: Any, cache: Any, batch: int, tokens: int, seed: int) -> None:
    """Put random keys and values where a prompt of `tokens` would have put its own; no forward pass."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim = MODEL["num_attention_heads"], MODEL["num_key_value_heads"], MODEL["head_dim"]

    def draw(count: int, length: int) -> Tensor:
        return torch.randn(batch, count, length, dim, generator=generator).to(model.dtype)

    def nothing(*arguments: Any, **options: Any) -> Any:
        return None

    for index in range(MODEL["num_hidden_layers"]):
        key, value, query = draw(kv_heads, tokens), draw(kv_heads, tokens), draw(heads, 32)
        got, _ = cache.update(key, value, index)
        if name != STOCK:
            got.layer.attend(nothing, model, query, None, {"scaling": dim**-0.5})


def decode(arguments: dict[str, Any]) -> dict[str, Any]:
    """All contenders in one process, taking turns token by token: wall and CPU milliseconds of each token."""
    torch.set_num_threads(arguments["threads"])
    model = build(arguments["dtype"], arguments["seed"])
    names, batch = arguments["names"], arguments["batch"]
    caches = {}
    for name in names:
        caches[name] = make_cache(name, model)
        fill(name, model, caches[name], batch, arguments["tokens"], arguments["seed"])
    held = {name: cache_bytes(cache) for name, cache in caches.items()}
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    token = torch.zeros(batch, 1, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(arguments["rounds"] + DROPPED):
            for name in names:
                began, busy = time.perf_counter(), time.process_time()
                model(token, past_key_values=caches[name])
                wall[name].append(1e3 * (time.perf_counter() - began))
                cpu[name].append(1e3 * (time.process_time() - busy))
    return {"bytes": held, "wall_ms": wall, "cpu_ms": cpu}


def prefill(arguments: dict[str, Any]) -> dict[str, Any]:
    """One contender in a process of its own: prefill milliseconds, and the process's memory during and after it."""
    torch.set_num_threads(arguments["threads"])
    model = build(arguments["dtype"], arguments["seed"])
    ids = torch.zeros(arguments["batch"], arguments["tokens"], dtype=torch.long)
    if arguments["name"].startswith("kvpress"):
        return _kvpress(model, ids, arguments)
    cache = make_cache(arguments["name"], model)
    with torch.inference_mode():
        warm = make_cache(arguments["name"], model)
        model(ids[:, :64], past_key_values=warm, logits_to_keep=1)
        warm.reset()
        before = _resident()
        Path("/proc/self/clear_refs").write_text("5")
        began, busy = time.perf_counter(), time.process_time()
        model(ids, past_key_values=cache, logits_to_keep=1)
        wall, cpu = time.perf_counter() - began, time.process_time() - busy
    peak = _status("VmHWM")
    return {
        "bytes": cache_bytes(cache),
        "wall_ms": 1e3 * wall,
        "cpu_ms": 1e3 * cpu,
        "peak_bytes": peak - before,
        "after_bytes": _resident() - before,
    }


def _kvpress(model: Any, ids: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    from kvpress import ThinKPress  # type: ignore[import-not-found,unused-ignore]
    from transformers import DynamicCache

    press = ThinKPress(key_channel_compression_ratio=0.4)
    caches: dict[str, Any] = {"stock": DynamicCache(), "kvpress": DynamicCache()}
    wall: dict[str, list[float]] = {"stock": [], "kvpress": []}
    cpu: dict[str, list[float]] = {"stock": [], "kvpress": []}
    with torch.inference_mode():
        before = _resident()
        Path("/proc/self/clear_refs").write_text("5")
        began, busy = time.perf_counter(), time.process_time()
        with press(model):
            model(ids, past_key_values=caches["kvpress"], logits_to_keep=1)
        prefill_wall, prefill_cpu = time.perf_counter() - began, time.process_time() - busy
        peak, after = _status("VmHWM") - before, _resident() - before
        model(ids, past_key_values=caches["stock"], logits_to_keep=1)
        for _ in range(arguments["rounds"] + DROPPED):
            for name, cache in caches.items():
                began, busy = time.perf_counter(), time.process_time()
                model(ids[:, :1], past_key_values=cache)
                wall[name].append(1e3 * (time.perf_counter() - began))
                cpu[name].append(1e3 * (time.process_time() - busy))
    import transformers

    return {
        "bytes": cache_bytes(caches["kvpress"]),
        "wall_ms": 1e3 * prefill_wall,
        "cpu_ms": 1e3 * prefill_cpu,
        "peak_bytes": peak,
        "after_bytes": after,
        "decode_wall_ms": wall,
        "decode_cpu_ms": cpu,
        "transformers": transformers.__version__,
    }


def _reference_cache(model: Any) -> Any:
    """ThinK as its authors' repository does it: keys per query head, every token by `torch.cat`, two score matrices.

    The algorithm in words of our own, batch 1 to any; it has no padding, no second turn and no beams.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    from memopt.kv.channels import choose, complement, energy, take
    from memopt.patches.hf_attention import ThinKeys, attach

    groups = MODEL["num_attention_heads"] // MODEL["num_key_value_heads"]
    recent = 32

    class Layer(DynamicLayer):
        def __init__(self) -> None:
            super().__init__()
            self.pruned: Tensor | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            super().update(key_states.repeat_interleave(groups, 1), value_states.repeat_interleave(groups, 1))
            return ThinKeys(self, key_states, self.get_seq_length()), self.values

        def get_seq_length(self) -> int:
            return 0 if self.values is None or self.values.numel() == 0 else self.values.shape[2]

        def attend(self, stock: Any, module: Any, query: Tensor, mask: Any, options: dict[str, Any]) -> Any:
            if self.pruned is None:
                plain = {**options}
                held = getattr(module, "num_key_value_groups", 1)
                if hasattr(module, "num_key_value_groups"):
                    module.num_key_value_groups = 1
                out = stock(module, query, self.keys, self.values, mask, **plain)
                if hasattr(module, "num_key_value_groups"):
                    module.num_key_value_groups = held
                scores = energy(query[:, :, -32:]) * energy(self.keys)
                self.kept = choose(scores, int(query.shape[3] * 0.6) + 1)
                self.dropped = complement(self.kept, query.shape[3])
                self.pruned = take(self.keys[:, :, :-recent], self.kept)
                self.keys = self.keys[:, :, -recent:].clone()
                return out
            old = take(query, self.kept) @ self.pruned.transpose(2, 3)
            new = query @ self.keys.transpose(2, 3)
            scores = torch.cat([old, new], -1) * options["scaling"]
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
            return (weights @ self.values).transpose(1, 2).contiguous(), None

        def tensors(self) -> list[Tensor]:
            return [self.keys, self.values, self.pruned, self.kept]

    class Reference(Cache):
        def cache_bytes(self) -> int:
            held = [tensor for layer in self.layers for tensor in layer.tensors()]
            return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())

    attach(model)
    return Reference(layers=[Layer() for _ in range(MODEL["num_hidden_layers"])])


def _resident() -> int:
    """Resident bytes after what was freed has gone back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


_CHILDREN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"decode": decode, "prefill": prefill}


if __name__ == "__main__":
    print(RESULT_MARK + json.dumps(_CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
