"""Measured categories against bytes counted another way: addresses, autograd's graph, torch's own memory events."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from memopt.profiler.torch_attribution import TorchAttribution
from memopt.tiers import Category, Tier
from memopt.units import MiB
from tests.reference import torch_bytes

TINY = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MEDIUM = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
"""30 million parameters."""


def llama(settings: dict[str, int], **changes: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def tokens(settings: dict[str, int], batch: int = 2, length: int = 37) -> torch.Tensor:
    return torch.arange(batch * length).reshape(batch, length) % settings["vocab_size"]  # (B, S)


@pytest.fixture
def attribution() -> Iterator[TorchAttribution]:
    made = TorchAttribution()
    yield made
    made.close()
    assert made.notes == []
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def dram(attribution: TorchAttribution) -> dict[Category, int]:
    return dict(attribution()[Tier.DRAM])


@pytest.mark.parametrize("settings", [TINY, MEDIUM], ids=["tiny", "30M"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_training_step_byte_for_byte(settings: dict[str, int], tied: bool, attribution: TorchAttribution) -> None:
    model = llama(settings, tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    attribution.watch(model)
    attribution.watch(optimizer)
    ids = tokens(settings)
    for step in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        now = dram(attribution)
        assert now[Category.WEIGHTS] == torch_bytes.weight_bytes(model) > 0
        assert now[Category.BUFFERS] == torch_bytes.distinct_bytes(model.buffers()) > 0
        assert now[Category.GRADIENTS] == 0
        assert now[Category.OPTIMIZER] == torch_bytes.state_bytes(optimizer)
        assert (now[Category.OPTIMIZER] > 0) == (step > 0)
        assert now[Category.ACTIVATIONS] == pytest.approx(torch_bytes.saved_bytes(loss, model), rel=0.01)
        loss.backward()
        now = dram(attribution)
        assert now[Category.GRADIENTS] == torch_bytes.gradient_bytes(model) > 0
        assert now[Category.ACTIVATIONS] == 0
        optimizer.step()
        attribution.look(force=True)
        assert dram(attribution)[Category.OPTIMIZER] == torch_bytes.state_bytes(optimizer) > 0
        optimizer.zero_grad()
        assert dram(attribution)[Category.GRADIENTS] == 0


def test_activations_are_what_the_allocator_keeps_after_the_forward_pass(attribution: TorchAttribution) -> None:
    model = llama(MEDIUM)
    ids = tokens(MEDIUM, 3, 61)
    attribution.watch(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = model(input_ids=ids, labels=ids, use_cache=False)
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
    del profiler
    saved = dram(attribution)[Category.ACTIVATIONS]
    # logits and loss are the caller's and (the logits' storage but for a shifted copy) not autograd's
    assert saved + out.logits.untyped_storage().nbytes() == pytest.approx(kept, rel=0.01)


class TestActivations:
    def test_of_a_small_network_by_hand(self, attribution: TorchAttribution) -> None:
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        attribution.watch(model)
        x = torch.randn(11, 5)
        y = model(x)
        # the first layer saves its input, the second and ReLU share the 7 columns between them
        assert dram(attribution)[Category.ACTIVATIONS] == 11 * (5 + 7) * 4
        del y
        assert dram(attribution)[Category.ACTIVATIONS] == 0, "a graph that is dropped frees what it saved"

    def test_nothing_is_kept_alive(self, attribution: TorchAttribution) -> None:
        model = nn.Linear(8, 8)
        attribution.watch(model)
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                y = model(torch.randn(4, 8)).exp().exp()  # exp saves its own result
                assert dram(attribution)[Category.ACTIVATIONS] == 3 * 4 * 8 * 4
                del y
                assert dram(attribution)[Category.ACTIVATIONS] == 0
        finally:
            gc.enable()

    def test_without_gradients_nothing_is_saved(self, attribution: TorchAttribution) -> None:
        model = nn.Linear(8, 8)
        attribution.watch(model)
        with torch.no_grad():
            y = model(torch.randn(4, 8))
        assert y.shape == (4, 8)
        assert dram(attribution)[Category.ACTIVATIONS] == 0

    def test_results_and_gradients_are_the_same(self) -> None:
        ids = tokens(TINY)

        def run(watched: bool) -> list[torch.Tensor]:
            model = llama(TINY)
            attribution = TorchAttribution()
            if watched:
                attribution.watch(model)
            loss = model(input_ids=ids, labels=ids).loss
            first = torch.autograd.grad(loss, [model.lm_head.weight], create_graph=True)[0]
            (loss + first.square().sum()).backward()  # twice through the graph
            attribution.close()
            return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

        for one, other in zip(run(True), run(False), strict=True):
            assert torch.equal(one, other)

    def test_a_change_in_place_is_still_an_error(self, attribution: TorchAttribution) -> None:
        model = nn.Linear(4, 4)
        attribution.watch(model)
        y = model(torch.randn(2, 4)).exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a tensor of shape \(2, 4\)"):
            y.sum().backward()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints_keep_what_goes_in(self, reentrant: bool, attribution: TorchAttribution) -> None:
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
        attribution.watch(blocks)
        x = torch.randn(10, 16, requires_grad=True)
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=reentrant)
        kept = 3 * 10 * 16 * 4
        during: list[int] = []
        blocks[0][2].weight.register_hook(lambda _: during.append(dram(attribution)[Category.ACTIVATIONS]))
        found = dram(attribution)[Category.ACTIVATIONS]
        # beside them the state of the random number generator, where it is saved as a tensor
        assert kept <= found <= kept + 3 * 6000
        y.sum().backward()
        del y
        assert dram(attribution)[Category.ACTIVATIONS] == 0
        # in the backward pass of the first block: its input, what goes into GELU, and what came out if not yet freed
        (inside,) = during
        one = 10 * 64 * 4
        assert 10 * 16 * 4 + one <= inside <= 10 * 16 * 4 + 2 * one + 6000
        attribution.close()
        assert isinstance(torch.utils.checkpoint._recomputation_hook, type), "what was wrapped is unwrapped"

    def test_left_out_on_request(self) -> None:
        attribution = TorchAttribution(activations=False)
        model = nn.Linear(3, 3)
        attribution.watch(model)
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        assert torch.func.grad(lambda x: model(x).sum())(torch.ones(3)).shape == (3,)
        model(torch.ones(1, 3)).sum().backward()
        now = dram(attribution)
        assert (now[Category.ACTIVATIONS], now[Category.GRADIENTS]) == (0, 48)
        attribution.close()

    def test_hooks_on_top_stay(self) -> None:
        attribution = TorchAttribution()
        model = nn.Linear(3, 3)
        attribution.watch(model)
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.detach(), lambda t: t):
            attribution.close()
            model(torch.ones(2, 3)).sum().backward()
        assert packed == [(2, 3)]
        assert "put on top" in attribution.notes[0]
        y = model(torch.ones(2, 3))
        assert dram(attribution)[Category.ACTIVATIONS] == 0
        y.sum().backward()
        attribution.close()
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


class TestStorages:
    def test_views_ties_and_buckets_once(self, attribution: TorchAttribution) -> None:
        flat = torch.zeros(60)
        one, other = nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)
        one.weight = nn.Parameter(flat[:20].view(5, 4))
        other.weight = nn.Parameter(flat[20:40].view(5, 4))
        both = nn.ModuleList([one, other, one])
        both.register_buffer("again", flat[40:])
        attribution.watch(both)
        attribution.watch(one)
        bucket = torch.zeros(40)
        one.weight.grad, other.weight.grad = bucket[:20].view(5, 4), bucket[20:].view(5, 4)
        attribution.look(force=True)
        now = dram(attribution)
        assert (now[Category.WEIGHTS], now[Category.BUFFERS], now[Category.GRADIENTS]) == (240, 0, 160)

    def test_meta_is_nothing_and_empty_is_nothing(self, attribution: TorchAttribution) -> None:
        attribution.watch(nn.Linear(1000, 1000, device="meta"))
        assert all(not any(by.values()) for by in attribution().values())

    def test_what_goes_goes(self, attribution: TorchAttribution) -> None:
        model = nn.Linear(8, 8)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=1.0)
        attribution.watch(model)
        attribution.watch(optimizer)
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        attribution.look(force=True)
        assert sum(dram(attribution).values()) == 3 * (64 + 8) * 4
        model.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer.state.clear()
        attribution.look(force=True)
        assert dram(attribution)[Category.WEIGHTS] == 64 * 2 + 8 * 4
        del model, optimizer
        gc.collect()
        assert not any(dram(attribution).values())

    def test_sparse_gradients(self, attribution: TorchAttribution) -> None:
        table = nn.Embedding(100, 6, sparse=True)
        attribution.watch(table)
        table(torch.tensor([3, 5, 9])).sum().backward()
        assert dram(attribution)[Category.GRADIENTS] == 3 * 8 + 3 * 6 * 4

    def test_a_subclass_counts_what_is_inside(self, attribution: TorchAttribution) -> None:
        from torch.testing._internal.two_tensor import TwoTensor

        model = nn.Module()
        model.weight = nn.Parameter(TwoTensor(torch.zeros(6, 4), torch.zeros(6, 4)))
        attribution.watch(model)
        assert dram(attribution)[Category.WEIGHTS] == 2 * 96

    def test_four_bit_weights_with_their_tables(self, attribution: TorchAttribution) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compress_statistics=False)
        layer.to("cpu")
        state = layer.weight.quant_state
        assert state is not None
        attribution.watch(layer)
        wanted = torch_bytes.distinct_bytes([layer.weight, state.absmax, state.code])
        assert dram(attribution)[Category.WEIGHTS] == wanted
        assert 128 * 64 // 2 < wanted < 128 * 64

    def test_eight_bit_weights_and_states(self, attribution: TorchAttribution) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False).to("cpu")
        model = nn.Linear(512, 512)
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), min_8bit_size=1)
        attribution.watch(layer)
        attribution.watch(optimizer)
        model(torch.ones(2, 512)).sum().backward()
        optimizer.step()
        attribution.look(force=True)
        now = dram(attribution)
        assert now[Category.WEIGHTS] == 128 * 64 + 64 * 4 + torch_bytes.weight_bytes(model)
        assert now[Category.OPTIMIZER] == torch_bytes.state_bytes(optimizer)
        assert 2 * 512 * 512 < now[Category.OPTIMIZER] < 2.1 * 512 * 512

    def test_weights_mapped_from_a_file_count_once_written(self, attribution: TorchAttribution, tmp_path: Path) -> None:
        save_file({"w": torch.ones(256, 1024)}, tmp_path / "w.safetensors")
        model = nn.Linear(1024, 256, bias=False)
        model.weight = nn.Parameter(load_file(tmp_path / "w.safetensors")["w"])
        attribution.watch(model)
        assert model.weight.detach().sum() == MiB / 4
        page = 4096  # the first and last ones hold the file's header and the next tensor
        attribution.look(force=True)
        assert dram(attribution)[Category.WEIGHTS] <= 2 * page
        assert attribution.mapped_bytes() >= MiB - 2 * page
        with torch.no_grad():
            model.weight[:128].add_(1)
        attribution.look(force=True)
        assert dram(attribution)[Category.WEIGHTS] == pytest.approx(MiB / 2, abs=2 * page)
        with torch.no_grad():
            model.weight.add_(1)
        attribution.look(force=True)
        assert dram(attribution)[Category.WEIGHTS] == MiB
        assert attribution.mapped_bytes() == 0

    @pytest.mark.parametrize("kind", ["object", "tuple", "dict"])
    def test_a_cache_as_it_grows(self, kind: str, attribution: TorchAttribution) -> None:
        cache = DynamicCache()
        watched: Any = {"object": cache, "tuple": (cache, 1), "dict": {"cache": cache}}[kind]
        attribution.watch(watched)
        attribution.watch(watched)
        assert dram(attribution)[Category.KV_CACHE] == 0
        for length in (5, 6):
            new = length if length == 5 else 1
            for layer in range(2):
                cache.update(torch.zeros(1, 2, new, 4), torch.zeros(1, 2, new, 4), layer)
            attribution.look(force=True)
            assert dram(attribution)[Category.KV_CACHE] == 2 * 2 * 2 * length * 4 * 4


def test_a_gpus_activations_are_the_rest_during_a_pass(
    attribution: TorchAttribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the arithmetic only; with a device it is tested in test_profiler_program
    monkeypatch.setattr("memopt.profiler.torch_attribution._gpu_allocated_bytes", lambda: 1000)
    assert attribution()[Tier.GPU][Category.ACTIVATIONS] == 0
    attribution.passing(+1)
    attribution.passing(+1)
    attribution.passing(-1)
    assert attribution()[Tier.GPU][Category.ACTIVATIONS] == 1000
    attribution.passing(-1)
    assert attribution()[Tier.GPU][Category.ACTIVATIONS] == 0


def test_from_another_thread_while_a_backward_pass_runs(attribution: TorchAttribution) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(20)))
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    attribution.watch(model)
    attribution.watch(optimizer)
    end = threading.Event()
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            while not end.is_set():
                counts = attribution()[Tier.DRAM]
                assert counts[Category.GRADIENTS] <= torch_bytes.weight_bytes(model)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(50):
        model(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    end.set()
    thread.join()
    assert not failed


def test_what_cannot_be_looked_at_is_a_note() -> None:
    class Odd:
        @property
        def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
            raise OSError("nobody may look here")

    odd = Odd()
    attribution = TorchAttribution()
    attribution.watch(odd)
    attribution()
    assert attribution.notes == ["attribution: OSError: nobody may look here"]
    attribution.close()


def test_what_was_there_before_less_its_tensors(run_python) -> None:  # type: ignore[no-untyped-def]
    # in a fresh process: memory that others freed would be used again here
    code = """
import torch
from memopt.profiler.samplers import process_memory
from memopt.profiler.torch_attribution import runtime_bytes
before = runtime_bytes(process_memory().charged_bytes)
block = torch.ones(8 * 2**20)
charged = process_memory().charged_bytes
after = runtime_bytes(charged)
print(before, charged, after)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    before, charged, after = map(int, done.stdout.split())
    assert 0 < before < charged - 31 * MiB
    assert abs(after - before) < 3 * MiB


def test_only_the_local_shards_of_fsdp(run_python) -> None:  # type: ignore[no-untyped-def]
    # two processes, of which the other is made up: what it sends is garbage, where the bytes are is not
    code = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from memopt.profiler.torch_attribution import TorchAttribution
from memopt.tiers import Category, Tier

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
mesh = init_device_mesh("cpu", (2,))
model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
whole = sum(p.nbytes for p in model.parameters())
for part in model:
    fully_shard(part, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
attribution = TorchAttribution()
attribution.watch(model)
attribution.watch(optimizer)
model(torch.randn(4, 64)).sum().backward()
optimizer.step()
attribution.look(force=True)
now = attribution()[Tier.DRAM]
assert attribution.notes == [], attribution.notes
print(whole, *(now[c] for c in (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER)))
attribution.close()
dist.destroy_process_group()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    whole, *parts = map(int, done.stdout.split())
    assert parts == [whole // 2] * 3
