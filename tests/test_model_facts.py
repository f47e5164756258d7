"""Facts of models from configurations alone, against real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import memopt
from memopt.errors import BadInput
from memopt.jobs.model_facts import prepare, read_model_facts
from memopt.optim.presets import PRESETS
from memopt.optim.roles import Role
from memopt.planning.training_memory import micro_peaks
from memopt.planning.training_optimizer import optimizer_bytes
from memopt.planning.training_types import TrainingJob
from tests.planner_models import config, model

FAMILIES = ("llama", "qwen3", "gpt2", "opt")


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_those_of_the_real_model(kind: str) -> None:
    facts, real = read_model_facts(config(kind)), model(config(kind))
    assert [(p.name, p.shape) for p in facts.parameters] == [(n, tuple(p.shape)) for n, p in real.named_parameters()]
    assert facts.numel == sum(p.numel() for p in real.parameters())
    assert facts.layers == 3
    assert {p.layer for p in facts.parameters} == {None, 0, 1, 2}
    assert facts.tied == (kind != "llama")
    roles = {p.role for p in facts.parameters}
    assert Role.EMBEDDING in roles and Role.FFN_DOWN in roles and (Role.HEAD in roles) == (kind == "llama")


def test_headers_give_stored_types_and_sizes(tmp_path: Path) -> None:
    model(config("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    facts = read_model_facts(tmp_path)
    assert {p.dtype for p in facts.parameters} == {"bfloat16"}
    assert facts.checkpoint_bytes == (tmp_path / "model.safetensors").stat().st_size == facts.largest_shard_bytes


def test_a_directory_with_a_configuration_only(tmp_path: Path) -> None:
    config("opt").save_pretrained(tmp_path)
    facts = read_model_facts(tmp_path)
    assert facts.checkpoint_bytes is None and "config.json" in facts.notes[0]
    assert facts.numel == read_model_facts(config("opt")).numel


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json"):
        read_model_facts(tmp_path)
    with pytest.raises(BadInput, match="no such directory"):
        read_model_facts(tmp_path / "nowhere")


class _Allocated(TorchDispatchMode):
    """Live bytes of storages that operations on real tensors made (each storage once), and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for t in _tensors(out):
            storage = t.untyped_storage()
            if storage._cdata not in inputs and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.peak = max(self.peak, sum(self.live.values()))
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _peaks(real: Any, batch: int, seq: int, micros: int) -> tuple[int, int]:
    """Bytes made in the forward and in the backward pass of the last of `micros` micro-batches, at their peaks."""
    tokens = torch.randint(0, 300, (batch, seq))
    for _ in range(micros):
        with _Allocated() as watch:
            loss = real(input_ids=tokens, labels=tokens, use_cache=False).loss
            forward, watch.peak = watch.peak, 0
            loss.backward()
            backward = watch.peak
            del loss
    return forward, backward


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [*((k, False) for k in FAMILIES), ("llama", True), ("opt", True), ("mixtral", False)],
)
def test_peaks_of_a_step_are_those_of_a_real_one(kind: str, checkpointing: bool) -> None:
    settings = config(kind, layers=5)
    job = TrainingJob(
        facts=read_model_facts(settings), batch_size=3, seq_len=77, gradient_checkpointing=checkpointing, grad_accum=2
    )
    job = prepare(job)
    for later in (False, True):
        real = model(settings)
        if checkpointing:
            real.gradient_checkpointing_enable()
        forward, backward = _peaks(real, 3, 77, 1 + later)
        predicted = micro_peaks(job.facts.trace(job.variant), job, later=later)
        assert predicted.forward[0] == pytest.approx(forward, rel=0.01)
        assert predicted.backward[0] == pytest.approx(backward, rel=0.01)


@pytest.mark.parametrize(("kind", "checkpointing"), [("llama", True), ("opt", False)])
def test_peaks_with_adapters(kind: str, checkpointing: bool) -> None:
    peft = pytest.importorskip("peft")
    settings = config(kind, layers=6)
    job = prepare(
        TrainingJob(
            facts=read_model_facts(settings),
            seq_len=90,
            batch_size=2,
            method="lora",
            lora_rank=4,
            lora_targets=("q_proj", "v_proj"),
            gradient_checkpointing=checkpointing,
        )
    )
    real = model(settings)
    wrapped = peft.get_peft_model(
        real, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    )
    if checkpointing:
        wrapped.enable_input_require_grads()
        wrapped.gradient_checkpointing_enable()
    trace = job.facts.trace(job.variant)
    assert sum(p.numel for p in trace.parameters if p.trainable) == sum(
        p.numel() for p in wrapped.parameters() if p.requires_grad
    )
    forward, backward = _peaks(wrapped, 2, 90, 1)
    predicted = micro_peaks(trace, job, later=False)
    assert predicted.forward[0] == pytest.approx(forward, rel=0.01)
    assert predicted.backward[0] == pytest.approx(backward, rel=0.01)


def test_saved_bytes_are_what_autograd_saves() -> None:
    settings = config("llama", layers=4)
    job = prepare(TrainingJob(facts=read_model_facts(settings), batch_size=2, seq_len=100))
    real, saved = model(settings), {}
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), storage)  # the storage, so that no address comes twice
        return t

    tokens = torch.randint(0, 300, (2, 100))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = real(input_ids=tokens, labels=tokens, use_cache=False).loss
    trace = job.facts.trace(job.variant)
    passed = [
        trace.first.entry_forward,
        *(trace.first.blocks_forward[k] for k in trace.kinds),
        trace.first.exit_forward,
    ]
    kept = sum(segment.end.total.at(2, 100) for segment in passed)
    assert loss.requires_grad
    tokens_bytes = tokens.untyped_storage().nbytes()
    assert kept == pytest.approx(sum(n for n, _ in saved.values()) - tokens_bytes, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_of_every_preset_are_those_of_the_real_optimizer(kind: str, preset: str) -> None:
    options = {"rank": 8} if "galore" in preset else {}
    settings = config(kind, layers=2)
    job = TrainingJob(facts=read_model_facts(settings), seq_len=64, optimizer=preset, optimizer_options=options)
    real = model(settings)
    optimizer = memopt.build_optimizer(real, preset, **options)
    for p in real.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer_bytes(job, job.facts.parameters).state == optimizer.state_bytes()


@pytest.mark.parametrize("implementation", ["fused", "foreach", "single"])
def test_states_of_torchs_adamw(implementation: str) -> None:
    settings = config("qwen3", layers=2)
    job = TrainingJob(facts=read_model_facts(settings), seq_len=64, implementation=implementation)  # type: ignore[arg-type]
    real = model(settings)
    optimizer = torch.optim.AdamW(
        real.parameters(), fused=implementation == "fused", foreach=implementation == "foreach"
    )
    for p in real.parameters():
        p.grad = torch.randn_like(p)
    with _Allocated() as watch:
        optimizer.step()
        watch.peak = 0
        optimizer.step()
    states = sum(t.untyped_storage().nbytes() for values in optimizer.state.values() for t in values.values())
    predicted = optimizer_bytes(job, job.facts.parameters)
    assert predicted.state == states
    assert predicted.scratch == pytest.approx(max(watch.peak - states, 0), rel=0.02, abs=20_000)


def test_an_8b_model_is_planned_without_allocating(run_python: Callable[..., Any]) -> None:
    done = run_python(
        """
from transformers import LlamaConfig
from memopt.jobs.model_facts import prepare, read_model_facts
from memopt.planning.training import training_phases
from memopt.planning.training_types import TrainingJob
from memopt.profiler.samplers import process_memory
prepare(TrainingJob(facts=read_model_facts(LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4,
    vocab_size=100, num_hidden_layers=2)), seq_len=64))
before = process_memory().hwm_bytes
facts = read_model_facts(LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192))
job = prepare(TrainingJob(facts=facts, seq_len=8192, gradient_checkpointing=True, weights_dtype="bfloat16"))
assert facts.numel == 8_030_261_248, facts.numel
assert max(p.total_bytes("dram") for p in training_phases(job)) > 64 << 30
grown = process_memory().hwm_bytes - before
assert grown < 64 << 20, grown
"""
    )
    assert done.returncode == 0, done.stderr


def test_a_variant_that_was_not_traced_is_refused() -> None:
    facts = read_model_facts(config("llama"))
    job = TrainingJob(facts=facts, seq_len=64)
    with pytest.raises(BadInput, match="prepare"):
        facts.trace(job.variant)


def test_masks_of_a_sliding_window_are_counted_beyond_it_only() -> None:
    from transformers import MistralConfig

    made = MistralConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        sliding_window=128,
    )
    facts = read_model_facts(made)
    for seq in (100, 300):
        job = prepare(TrainingJob(facts=facts, batch_size=2, seq_len=seq))
        predicted = micro_peaks(job.facts.trace(job.variant), job, later=False)
        forward, backward = _peaks(model(made), 2, seq, 1)
        assert predicted.forward[0] == pytest.approx(forward, rel=0.01)
        assert predicted.backward[0] == pytest.approx(backward, rel=0.01)
