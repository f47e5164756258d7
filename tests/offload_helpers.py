"""Tiny models, plans and engines for the tests of memopt.offload: made on the spot, trained in a few seconds."""

from __future__ import annotations

import functools
import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from memopt.budget import Budget
from memopt.jobs.config import FinetuneConfig
from memopt.jobs.model_layout import model_layout
from memopt.jobs.rules import update_rules
from memopt.ledger import Ledger
from memopt.offload.engine import Engine, EngineSettings, Progress, StepResult
from memopt.offload.gradients import held_units
from memopt.offload.layout import Layout, Unit
from memopt.offload.storage import create_scratch, create_state, fill_state, read_parameters, scratch_specs
from memopt.optim.chunked import ChunkRule
from memopt.optim_types import UpdateRule
from memopt.patches.hf_checkpoint import build_skeleton, decay_names
from memopt.patches.hf_model import HFLayeredModel
from memopt.plan_types import Plan, Residence
from memopt.store.block_store import BlockStore
from memopt.store.transfer import IoPool
from memopt.tiers import Tier

WHOLE = 10**9
"""`tile_rows` that leaves every table in one piece."""
IN_DRAM = Residence(weights=Tier.DRAM, moments=Tier.DRAM, gradient=Tier.DRAM)
ON_SSD = Residence()

Rules = UpdateRule | Mapping[str, UpdateRule]
ADAMW = ChunkRule(weight_decay=0.1)
Micro = dict[str, torch.Tensor]
Steps = list[list[Micro]]

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_ROUTED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_QWEN_MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON),
    "llama_tied": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 16}),
    "mistral": ("mistral", {**_COMMON, "sliding_window": 8}),
    "gemma2": ("gemma2", {**_COMMON, "head_dim": 16, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {
            **_COMMON,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi": ("phi", _COMMON),
    "phi3": ("phi3", {**_COMMON, "pad_token_id": 0}),
    "gpt2": ("gpt2", _GPT2),
    "opt": (
        "opt",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
            "dropout": 0.0,
        },
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
    "falcon": (
        "falcon",
        {k: _COMMON[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128}),
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4}),
    "olmo2": ("olmo2", _COMMON),
    "granite": ("granite", {**_COMMON, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "smollm3": ("smollm3", {**_COMMON, "pad_token_id": 0}),
    "glm4": ("glm4", {**_COMMON, "head_dim": 16, "pad_token_id": 0}),
    "qwen3_moe": ("qwen3_moe", {**_COMMON, **_QWEN_MOE}),
    "deepseek_v3": (
        "deepseek_v3",
        {**_COMMON, "num_key_value_heads": 4, **_MLA, **_ROUTED, "moe_intermediate_size": 32},
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Import it into a test module and its tests compute with one thread.

    Tensors this small gain nothing from more, and on a busy machine OpenMP's spinning threads cost a factor of six.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(family: str, **changes: Any) -> Any:
    """A tiny transformers config of one of FAMILIES."""
    kind, values = FAMILIES[family]
    return AutoConfig.for_model(kind, **{**values, **changes})


def in_memory_model(config: Any, seed: int = 0) -> Any:
    """The plain transformers model, biases and norms drawn too (as constants they would hide mistakes)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() < 2:
                    param.add_(torch.randn_like(param), alpha=0.02)
    return model.train()


class Subject:
    """One tiny model as the engine takes it, and its initial weights."""

    def __init__(self, config: Any, seed: int = 0):
        self._config, self._seed = config, seed
        self.initial = {n: p.detach().clone() for n, p in in_memory_model(config, seed).named_parameters()}
        skeleton = build_skeleton(config)
        self.decay = decay_names(skeleton)
        self.layered = HFLayeredModel(skeleton)
        self.vocabulary = int(config.vocab_size)
        self.width = int(config.hidden_size)

    def in_memory(self) -> Any:
        """A fresh copy of the plain model."""
        return in_memory_model(self._config, self._seed)

    def layout(self, tile_rows: int = WHOLE, rules: Rules | None = None) -> Layout:
        """With one rule for all parameters, or one for each."""
        rules = rules or ADAMW
        of = rules if isinstance(rules, Mapping) else dict.fromkeys(self.initial, rules)
        return model_layout(self.layered, decay=self.decay, dtypes={}, rules=of, tile_rows=tile_rows)

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {n: self.initial[n] for n in names}


def rules_of(model: Subject, preset: str, **options: Any) -> Mapping[str, UpdateRule]:
    """What a run with this preset does with each parameter; `rank` and the like count where the preset has them."""
    options = options if "galore" in preset else {}
    config = FinetuneConfig.of(model="m", optimizer=preset, weight_decay=0.1, seed=0, **options)
    return update_rules(config, model.layered.module).of


@functools.cache
def subject(family: str, **changes: Any) -> Subject:
    """One of FAMILIES; the same object for the same arguments."""
    return Subject(config_of(family, **changes))


def batches(
    vocabulary: int,
    steps: int,
    *,
    accum: int = 1,
    pad: str | None = None,
    shapes: Sequence[tuple[int, int]] = ((2, 16),),
    seed: int = 5,
) -> Steps:
    """Random tokens. `pad` is None, "left" or "right"; micro-batch i of the run has shape `shapes[i % len]`."""
    generator = torch.Generator().manual_seed(seed)
    out: Steps = []
    for step in range(steps):
        micros = []
        for index in range(accum):
            rows, columns = shapes[(step * accum + index) % len(shapes)]
            ids = torch.randint(3, vocabulary, (rows, columns), generator=generator)
            if pad is None:
                micros.append({"input_ids": ids, "labels": ids.clone()})
                continue
            mask = torch.ones_like(ids)
            for row in range(rows):
                empty = (row + index) % 3 * columns // 4
                if empty:
                    mask[row, slice(0, empty) if pad == "left" else slice(columns - empty, None)] = 0
            micros.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
        out.append(micros)
    return out


def tokens_of(steps: Sequence[Sequence[Micro]]) -> int:
    """Tokens of the largest step."""
    return max(sum(m["input_ids"].numel() for m in step) for step in steps)


def everywhere(layout: Layout, where: Residence) -> dict[str, Residence]:
    """All units in one place (the small remainder always stays in DRAM)."""
    return {u.name: where for u in layout.units} | {"rest": IN_DRAM}


def scattered(layout: Layout, seed: int) -> dict[str, Residence]:
    """Every vector in a tier drawn at random."""
    draw = random.Random(seed)

    def tier() -> Tier:
        return draw.choice((Tier.DRAM, Tier.SSD))

    return {u.name: Residence(weights=tier(), moments=tier(), gradient=tier()) for u in layout.units} | {
        "rest": IN_DRAM
    }


def plan_for(layout: Layout, residence: dict[str, Residence] | None = None, **changes: Any) -> Plan:
    """A plan for a tiny model; everything on SSD where nothing else is said."""
    plan = Plan(
        residence=residence or everywhere(layout, ON_SSD),
        block_slots=2,
        head_slots=1 if len(layout.head) == 1 else 2,
        gradient_slots=1,
        head_gradient_slots=1,
        ring_buffers=2,
        tile_rows=WHOLE,
        loss_tokens=61,
        activation_layers_on_ssd=0,
        io_workers=2,
        save_every=1,
        compute_threads=torch.get_num_threads(),
        update_threads=1,
    )
    return replace(plan, **changes)


@dataclass(kw_only=True)
class Setup:
    """Everything an engine is opened with. `directory` None: all in DRAM, no store."""

    subject: Subject
    directory: Path | None
    max_tokens: int
    layout: Layout
    plan: Plan
    clip_norm: float = 0.0
    seed: int = 0
    compute_dtype: torch.dtype = torch.float32
    skip_nonfinite: bool = False
    pool_of: Callable[[], IoPool] = lambda: IoPool(2)

    def settings(self) -> EngineSettings:
        return EngineSettings(
            device=torch.device("cpu"),
            compute_dtype=self.compute_dtype,
            clip_norm=self.clip_norm,
            seed=self.seed,
            width=self.subject.width,
            max_tokens=self.max_tokens,
            skip_nonfinite=self.skip_nonfinite,
        )

    def held(self) -> list[Unit]:
        return held_units(self.layout, clips=self.clip_norm > 0)


@dataclass
class Opened:
    """An engine with what it stands on."""

    engine: Engine
    store: BlockStore | None
    pool: IoPool
    ledger: Ledger


def setup(model: Subject, directory: Path | None, steps: Steps, **changes: Any) -> Setup:
    """A Setup with sensible values; `rule`, `tile_rows`, `residence` and fields of Plan or Setup can be given."""
    tile_rows = changes.pop("tile_rows", WHOLE)
    layout = model.layout(tile_rows, changes.pop("rule", None))
    own = {k: changes.pop(k) for k in list(changes) if k in Setup.__dataclass_fields__}
    residence = changes.pop("residence", None)
    if callable(residence):
        residence = residence(layout)
    plan = plan_for(layout, residence, tile_rows=tile_rows, **changes)
    values = {"max_tokens": tokens_of(steps), **own}
    return Setup(subject=model, directory=directory, layout=layout, plan=plan, **values)


@contextmanager
def opened(this: Setup) -> Iterator[Opened]:
    """The engine, at the start or (when the directory holds a state) after the last saved step."""
    pool = this.pool_of()
    ledger = Ledger(Budget())
    with ExitStack() as stack:
        stack.callback(pool.close)
        store = scratch = None
        progress = Progress()
        if this.directory is not None:
            state = this.directory / "state"
            if state.exists():
                store = BlockStore.open(state, pool)
                progress = Progress(int(store.meta["step"]), int(store.meta["updates"]))
            else:
                store = create_state(state, this.layout, pool, {})
                fill_state(store, this.layout, this.subject.read, {"step": 0, "updates": 0})
            stack.callback(store.close)
            specs = scratch_specs(
                this.layout,
                this.plan,
                this.held(),
                tokens=this.max_tokens,
                width=this.subject.width,
                dtype=this.compute_dtype,
            )
            scratch = create_scratch(this.directory / "scratch", specs, pool)
            if scratch is not None:
                stack.callback(scratch.close)
        engine = Engine(
            this.subject.layered,
            this.layout,
            this.plan,
            store,
            scratch,
            ledger,
            this.settings(),
            initial=this.subject.read,
            progress=progress,
        )
        stack.callback(engine.close)
        yield Opened(engine, store, pool, ledger)


@dataclass(frozen=True)
class Trained:
    """What a run came to."""

    losses: list[float]
    norms: list[float | None]
    weights: dict[str, torch.Tensor]
    results: list[StepResult]


def train(this: Setup, steps: Steps, *, lr: float = 1e-4, save_every: int = 0) -> Trained:
    """Run all steps that are not saved yet, then save; weights are read back from the store where there is one."""
    with opened(this) as at:
        results = run_steps(at.engine, steps, lr=lr, save_every=save_every)
        at.engine.save()
        weights = weights_of(this, at)
    return Trained([r.loss for r in results], [r.grad_norm for r in results], weights, results)


def run_steps(engine: Engine, steps: Steps, *, lr: float = 1e-4, save_every: int = 0) -> list[StepResult]:
    """The steps from where the engine is to the end; `save_every` 0 saves none of them."""
    start = engine.progress.step
    return [
        engine.step(micros, lr=lr, save=bool(save_every) and (start + index + 1) % save_every == 0)
        for index, micros in enumerate(steps[start:])
    ]


def weights_of(this: Setup, at: Opened) -> dict[str, torch.Tensor]:
    """All parameters, from the store if there is one (its committed or newest content), else from memory."""
    names = list(this.subject.initial)
    found = at.engine.parameters(names) if at.store is None else read_parameters(at.store, this.layout, names)
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} parameters differ, {different[0]} first"


@dataclass(frozen=True)
class Distance:
    """How far two sets of weights are apart."""

    relative: float
    """Norm of the difference over the norm of the second."""
    largest: float


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> Distance:
    assert a.keys() == b.keys()
    difference = {n: (a[n].double() - b[n].double()) for n in a}
    norm = sum(float(d.square().sum()) for d in difference.values()) ** 0.5
    whole = sum(float(t.double().square().sum()) for t in b.values()) ** 0.5
    return Distance(norm / whole, max(float(d.abs().max()) for d in difference.values()))


def final_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def within(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """Run `work` in a thread and return what it raised; fails the test when it does not come to an end."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not finished after {seconds} s"
    return caught[0] if caught else None


def place_seed(seed: int, step: int, index: int, micro: int) -> int:
    """The seed of the random numbers of block `index` (entry: 2**20) for one micro-batch of a step, counted from 1."""
    key = repr((seed, step, index, micro)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
