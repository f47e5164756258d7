"""`memopt.Profiler` around small programs: categories, phases found and named, and each way to hold a budget."""

from __future__ import annotations

import gc
import mmap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import memopt
from memopt.errors import BadInput, OverBudget
from memopt.profiler.over import OverWarning
from memopt.profiler.samplers import process_memory
from memopt.profiler.tree_sampler import TreeSampler
from memopt.tiers import Category, Tier
from memopt.units import MiB
from tests.reference import torch_bytes

SIZE = 48 * MiB


def used() -> int:
    memory = process_memory()
    assert memory is not None
    return memory.charged_bytes


def touched(nbytes: int = SIZE) -> mmap.mmap:
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, nbytes, mmap.PAGESIZE):
        region[offset] = 1
    return region


def tight() -> memopt.Budget:
    """A budget that `touched()` passes, and nothing else here does; servers that other tests started count too."""
    tree = TreeSampler()
    held_bytes = tree.sample(fresh=True).charged_bytes
    tree.close()
    return memopt.Budget(dram_bytes=held_bytes + SIZE // 2)


def network(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def hooks_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    found = [len(model._forward_hooks), len(model._forward_pre_hooks)]
    found += [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    return found + [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]


def names(report: memopt.Report) -> list[str]:
    return [phase.name for phase in report.phases]


class TestTraining:
    def test_categories_and_phases_of_a_loop_nobody_changed(self, tmp_path: Path) -> None:
        model = network(512)
        optimizer = torch.optim.AdamW(model.parameters())
        before = hooks_on(model, optimizer)
        file = tmp_path / "run.json"
        with memopt.Profiler(report=file, interval_s=0.005) as prof:
            prof.watch(model, optimizer)
            for _ in range(3):
                model(torch.randn(256, 512)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                prof.step()
            now = prof.sample()
        report = prof.report
        assert names(report) == ["forward", "backward", "optimizer"] * 3
        assert report.results == {"steps": 3}
        weights = torch_bytes.weight_bytes(model)
        assert now.categories[Tier.DRAM][Category.WEIGHTS] == weights
        assert now.categories[Tier.DRAM][Category.OPTIMIZER] == torch_bytes.state_bytes(optimizer)
        assert sum(now.categories[Tier.DRAM].values()) == now.dram_bytes
        peak = report.tiers.dram
        assert peak.attributed_by == "torch"
        assert peak.at_peak["weights"] == weights
        assert peak.at_peak["runtime"] > 10 * MiB
        assert sum(peak.at_peak.values()) == peak.peak_bytes
        # a backward phase begins with all activations there; its peak has gradients or activations
        backward = report.phases[4].at_peak["dram"]
        assert backward["optimizer"] == torch_bytes.state_bytes(optimizer)
        assert backward["activations"] + backward["gradients"] > 0
        assert hooks_on(model, optimizer) == before
        assert memopt.Report.load(file).to_dict() == report.to_dict()
        assert not [note for note in report.notes if "attribution" in note]

    def test_accumulation_evaluation_and_a_step_that_fails(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with memopt.Profiler() as prof:
            prof.watch(model)
            prof.watch(optimizer)
            for _ in range(2):
                model(torch.randn(2, 64)).sum().backward()
            with pytest.raises(RuntimeError, match="closure"):
                optimizer.step(closure=failing)
            prof.step()
            with torch.no_grad(), prof.phase("evaluate"):
                model(torch.randn(2, 64))
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model(torch.randn(2, 65))
            model(torch.randn(2, 64)).sum()  # never goes backward
        wanted = [*["forward", "backward"] * 2, "optimizer", "forward", "evaluate", "forward", "forward"]
        assert names(prof.report) == wanted

    def test_a_phase_named_by_hand_replaces_the_one_found(self) -> None:
        model = network()
        with memopt.Profiler() as prof:
            prof.watch(model)
            with prof.phase("forward"):
                loss = model(torch.randn(2, 64)).sum()
            with prof.phase("backward"):
                loss.backward()
            with prof.phase("outer"):
                model(torch.randn(2, 64))
        assert names(prof.report) == ["forward", "backward", "forward", "outer"]

    def test_phases_only_by_hand(self) -> None:
        model = network()
        with memopt.Profiler(auto_phases=False) as prof:
            prof.watch(model)
            model(torch.randn(2, 64)).sum().backward()
            assert prof.sample().categories[Tier.DRAM][Category.GRADIENTS] == torch_bytes.weight_bytes(model)
        assert names(prof.report) == []

    def test_the_same_losses_with_and_without(self) -> None:
        def losses(watched: bool) -> list[float]:
            torch.manual_seed(0)
            model = network()
            optimizer = torch.optim.Adam(model.parameters())
            found = []
            prof = memopt.Profiler()
            with prof:
                if watched:
                    prof.watch(model, optimizer)
                for _ in range(4):
                    loss = model(torch.randn(8, 64)).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    found.append(float(loss.detach()))
            return found

        with torch.random.fork_rng(devices=[]):
            assert losses(True) == losses(False)

    @pytest.mark.parametrize("inner", [False, True])
    def test_compiled_modules_still_run(self, inner: bool) -> None:
        model = network()
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 64)
        expected = model(x).detach()
        with memopt.Profiler() as prof:
            prof.watch(model if inner else compiled)
            y = compiled(x)
            torch.testing.assert_close(y.detach(), expected)
            y.sum().backward()
            gradients = prof.sample().categories[Tier.DRAM][Category.GRADIENTS]
        assert gradients == torch_bytes.weight_bytes(model)
        assert names(prof.report) == ([] if inner else ["forward", "backward"])
        torch._dynamo.reset()


def failing() -> float:
    raise RuntimeError("closure")


def test_generation_fills_and_extends_a_cache() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    caches: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            caches.append(prof.sample().categories[Tier.DRAM][Category.KV_CACHE])

        def end(self) -> None:
            pass

    with memopt.Profiler() as prof:
        prof.watch(model)
        ids = torch.ones(1, 7, dtype=torch.long)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, streamer=Streamer())
        gc.collect()
        after = prof.sample().categories[Tier.DRAM][Category.KV_CACHE]
    assert names(prof.report) == ["prefill", "decode", "decode"]
    a_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, size of a head, bytes
    assert caches == [0, 7 * a_token, 8 * a_token, 9 * a_token]
    assert after == 0


class TestBudget:
    def test_warns_once(self) -> None:
        wanted = "dram budget of .* in use, .* too much"
        with pytest.warns(OverWarning, match=wanted) as caught, memopt.Profiler(budget=tight()) as prof:
            for _ in range(2):
                region = touched()
                prof.sample()
                region.close()
                prof.sample()
        assert len(caught) == 1
        assert prof.report.verdict == "over"
        assert any("too much" in note for note in prof.report.notes)
        assert not prof.stopped

    def test_the_thread_finds_it_too(self) -> None:
        heard = threading.Event()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda *_, **__: heard.set()
            with memopt.Profiler(budget=tight(), interval_s=0.005):
                region = touched()
                assert heard.wait(20)
                region.close()

    def test_warnings_that_are_errors_come_in_the_programs_thread(self) -> None:
        with pytest.raises(OverWarning), memopt.Profiler(budget=tight()) as prof:
            region = touched()
            prof.sample()
            prof.step()
            raise AssertionError("not reached")
        region.close()
        assert prof.report.verdict == "over"

    @pytest.mark.parametrize("where", ["step", "phase", "forward", "exit"])
    def test_raises_at_a_boundary(self, where: str, tmp_path: Path) -> None:
        model = network()
        reached = []
        file = tmp_path / "r.json"
        prof = memopt.Profiler(budget=tight(), on_over="raise", report=file)
        with pytest.raises(OverBudget, match="raise the dram budget") as caught, prof:
            prof.watch(model)
            region = touched()
            prof.sample()
            reached.append(1)
            if where == "step":
                prof.step()
            elif where == "phase":
                with prof.phase("more"):
                    pass
            elif where == "forward":
                model(torch.zeros(1, 64))
            reached.append(2)
        region.close()
        assert reached == ([1, 2] if where == "exit" else [1])
        error = caught.value
        assert error.tier is Tier.DRAM and error.free_bytes < 0 and error.budget_bytes == prof.budget.dram_bytes
        assert ("runtime", prof.report.tiers.dram.at_peak["runtime"]) in error.holders
        assert memopt.Report.load(file).verdict == "over"
        assert hooks_on(model, torch.optim.SGD(model.parameters(), lr=1.0)) == [0] * 4 + [0] * 4

    def test_stops_without_an_error(self) -> None:
        steps = 0
        with memopt.Profiler(budget=tight(), on_over="stop") as prof:
            region = touched()
            prof.sample()
            for steps in range(1, 10):  # noqa: B007 - how far it came
                prof.step()
        region.close()
        assert steps == 1
        assert prof.stopped
        assert prof.report.verdict == "over"

    def test_a_peak_that_only_the_end_knows(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        budget = memopt.Budget(ssd_bytes=MiB)
        prof = memopt.Profiler(budget=budget, watch_dirs=[tmp_path / "data"], on_over="raise")
        with pytest.raises(OverBudget, match="ssd budget of 1.00 MiB"), prof:
            (tmp_path / "data" / "file").write_bytes(bytes(range(256)) * (MiB // 64))

    def test_within(self) -> None:
        budget = f"dram={(used() + 4096 * MiB) // MiB}MiB,gpu=1GiB"
        with memopt.Profiler(budget=budget, on_over="raise") as prof:
            prof.step()
        assert prof.report.verdict == "within"
        assert any("used no CUDA device" in note for note in prof.report.notes) or torch.cuda.is_available()

    def test_an_error_of_the_program_passes_through(self, tmp_path: Path) -> None:
        file = tmp_path / "r.json"
        prof = memopt.Profiler(report=file, budget=tight(), on_over="raise")
        with pytest.raises(KeyError), prof, prof.phase("a"):
            region = touched()
            prof.sample()
            raise KeyError("mine")
        region.close()
        report = memopt.Report.load(file)
        assert "the program ended with KeyError" in report.notes
        assert names(report) == ["a"]


class TestEnforce:
    def test_needs_a_budget_and_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(BadInput, match="no gpu budget is given"):
            memopt.Profiler(enforce=True, budget="dram=1TiB")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(BadInput, match="needs a CUDA device"), memopt.Profiler(enforce=True, budget="gpu=1GiB"):
            raise AssertionError("not reached")

    def test_sets_and_restores_the_fraction(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[float, int]] = []
        properties = type("Properties", (), {"total_memory": 8 * 1024 * MiB})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, d: calls.append((f, d)))
        with memopt.Profiler(enforce=True, budget="gpu=2GiB"):
            assert calls == [(0.25, 1)]
        assert calls == [(0.25, 1), (1.0, 1)]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_torch_refuses(self) -> None:
        with memopt.Profiler(enforce=True, budget="gpu=1GiB"), pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * 1024 * MiB, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_categories_of_a_gpu() -> None:
    model = network(1024).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    with memopt.Profiler() as prof:
        prof.watch(model, optimizer)
        for _ in range(2):
            loss = model(torch.randn(4096, 1024, device="cuda")).square().mean()
            with prof.phase("forward"):
                inside = prof.sample().categories[Tier.GPU]
                allocated = torch.cuda.memory_allocated()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = torch_bytes.weight_bytes(model)
        assert inside[Category.WEIGHTS] == weights
        known = sum(inside[c] for c in Category if c is not Category.OTHER)
        assert known == allocated
        assert inside[Category.ACTIVATIONS] > 3 * 4096 * 1024 * 4


class TestUse:
    @pytest.mark.parametrize("thing", [None, "model", 3, nn.Linear])
    def test_what_cannot_be_watched(self, thing: Any) -> None:
        with pytest.raises(BadInput, match="give a module, an optimizer, or a cache"):
            memopt.Profiler().watch(thing)

    def test_bad_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="on_over 'panic' is not one of warn, raise, stop"):
            memopt.Profiler(on_over="panic")  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="there is no directory"):
            memopt.Profiler(report=tmp_path / "none" / "r.json")
        with pytest.raises(BadInput, match="none are given; name the directories"):
            memopt.Profiler(budget="ssd=1GiB")
        with pytest.raises(BadInput, match="dram=8GiB"):
            memopt.Profiler(budget="8GiB")

    @pytest.mark.parametrize(
        "use",
        [lambda p: p.step(), lambda p: p.sample(), lambda p: p.phase("x").__enter__()],
        ids=["step", "sample", "phase"],
    )
    def test_outside_of_its_block(self, use: Callable[[memopt.Profiler], Any]) -> None:
        prof = memopt.Profiler()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="not running; use it inside"):
                use(prof)
            if _ == 0:
                with pytest.raises(RuntimeError, match="after the `with` block"):
                    _ = prof.report
                with prof:
                    pass
        with pytest.raises(RuntimeError, match="used once"):
            prof.__enter__()
        with pytest.raises(RuntimeError, match="has ended"):
            prof.watch(network())

    def test_watched_before_it_begins(self) -> None:
        model = network()
        prof = memopt.Profiler()
        prof.watch(model)
        with prof:
            assert prof.sample().categories[Tier.DRAM][Category.WEIGHTS] == torch_bytes.weight_bytes(model)

    def test_a_program_without_torch(self, run_python) -> None:  # type: ignore[no-untyped-def]
        done = run_python(
            "import sys, memopt\n"
            "with memopt.Profiler(budget='dram=1TiB') as prof:\n"
            "    with prof.phase('load'): block = bytearray(b'x') * 2**25\n"
            "    prof.sample(); assert 'torch' not in sys.modules\n"
            "assert prof.report.tiers.dram.attributed_by is None, prof.report.tiers.dram\n"
            "assert 'torch' not in sys.modules and prof.report.machine.dram_bytes\n"
            "print(prof.report.verdict)\n"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "within\n"


def test_a_kill_leaves_what_was_seen(run_python, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "run.json"
    code = """
import os, sys, memopt
with memopt.Profiler(report=sys.argv[1], interval_s=0.005) as prof:
    block = bytearray(b"x") * 2**25
    prof.sample()
    while b'"load"' not in open(sys.argv[1] + ".journal", "rb").read():
        with prof.phase("load"):
            pass
    os.kill(os.getpid(), 9)
"""
    done = run_python(code, str(file))
    assert done.returncode == -9
    report = memopt.Report.load(file)
    assert not report.complete
    assert (report.tiers.dram.peak_bytes or 0) > 2**25
    assert {phase.name for phase in report.phases} == {"load"}


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "dir"
    directory.mkdir()
    prof = memopt.Profiler(report=directory)
    with pytest.raises(BadInput, match="cannot be written"), prof:
        pass
    assert prof.report.wall_s > 0
    with pytest.raises(KeyError) as caught, memopt.Profiler(report=directory):
        raise KeyError("mine")
    assert "no report of this run: BadInput" in caught.value.__notes__[0]
