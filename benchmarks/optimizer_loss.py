"""Loss of a small Llama after equal tokens: memopt's presets and torch's AdamW, with state bytes and milliseconds.

A model of about a million parameters learns bytes of the Python standard library from scratch, one process per run, one
thread each. What is swept is the learning rate of the hidden matrices, which is where the optimizers differ: as many
rates for each, a factor of 2 apart, on one seed; the best by validation loss is run on the other seeds. A best rate at
the end of its grid is marked, because a better one may lie outside. Embedding, head and norms have a rate of their own,
the same for all (Lion's, whose every element moves by the full rate, is a tenth). With one rate for everything GaLore
would seem far better than AdamW, only because its factor of 0.25 lowers the hidden rate against that of the embeddings.
The seed decides weights and batches, and all optimizers see the same batches in the same order.

The rest is GaLore's recipe (arXiv 2403.03507, section 5): warmup over a tenth, cosine to a tenth, no weight decay, no
clipping, rank a quarter of the width, scale 0.25. The gap is 50 steps, because a run is shorter than the paper's gap.
Milliseconds are of CPU time, medians over steps (a step that looks for a subspace is one in 50, so in the mean only).

At one nominal rate AdamW moves an element by the rate itself, Muon by a fifth of it (Moonlight's scale matches AdamW's
usual update, not its largest). So muon_vo_ffn, which leaves queries and keys to AdamW, moves those five times as far as
muon does; in a run this short what attention learns in time decides, and that alone put it far ahead. Therefore AdamW
and Muon also run with the rate of queries and keys apart (`attention` times the others').

What can be expected: int8 states as good as float32; GaLore near AdamW and Fira nearer or better (the papers' figures
at 60M are 34.1, 34.9 and 31.1 perplexity); Muon better than AdamW, VO+FFN nearly as good as all of it (arXiv
2509.26030). What a million parameters and some minutes show is a sanity check, not those papers' result.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Table, machine_facts, median, say
from memopt.optim import grouping, presets, routing
from memopt.optim.optimizer import Optimizer
from memopt.optim.roles import HIDDEN, Role
from memopt.units import MiB

VOCABULARY = 256
CORPUS_BYTES = 4 * MiB
HELD_OUT = 10
"""Every tenth module is held out, whole."""
EVAL_ROWS = 128
WARMUP, FLOOR = 0.1, 0.1
DROPPED_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Model and run."""

    width: int = 128
    intermediate: int = 344
    layers: int = 4
    heads: int = 4
    sequence: int = 128
    rows: int = 8
    steps: int = 240


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A preset with its options and the rates of hidden matrices. Without a preset, torch's AdamW; without rates, at
    adamw's best."""

    name: str
    preset: str = ""
    rates: tuple[float, ...] = ()
    rest_rate: float = 1e-2
    attention: float = 1.0
    """Rate of queries and keys over that of the other hidden matrices."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    contender: Contender
    sizes: Sizes
    rate: float
    """Of hidden matrices."""
    seed: int
    corpus: str


ADAM = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
FIRA = tuple(4 * rate for rate in ADAM)
"""For the factor 0.25 of GaLore's updates."""
LOW_RANK = tuple(8 * rate for rate in ADAM)
"""Besides, a quarter of the rank has half the norm."""
MUON = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
LOW_RANK_MUON = tuple(4 * rate for rate in MUON)
MUON_LOW = tuple(rate / 2 for rate in MUON)
SIGN = (6e-5, 1.2e-4, 2.4e-4, 4.8e-4, 9.6e-4)
LOW: dict[str, Any] = {"rank": 32, "update_proj_gap": 50, "scale": 0.25}
CONTENDERS = (
    Contender(name="adamw", preset="adamw", rates=ADAM),
    Contender(name="torch AdamW"),
    Contender(name="adamw qk x4", preset="adamw", rates=ADAM, attention=4.0),
    Contender(name="adamw8bit", preset="adamw8bit", rates=ADAM),
    Contender(name="galore", preset="galore", rates=LOW_RANK, options=LOW),
    Contender(name="galore fira", preset="galore", rates=FIRA, options={**LOW, "residual": "fira"}),
    Contender(name="galore8bit", preset="galore8bit", rates=LOW_RANK, options=LOW),
    Contender(name="muon", preset="muon", rates=MUON),
    Contender(name="muon qk x4", preset="muon", rates=MUON_LOW, attention=4.0),
    Contender(name="muon8bit", preset="muon8bit", rates=MUON),
    Contender(name="muon_vo_ffn", preset="muon_vo_ffn", rates=MUON_LOW),
    Contender(name="galore_muon", preset="galore_muon", rates=LOW_RANK_MUON, options=LOW),
    Contender(name="lion8bit", preset="lion8bit", rates=SIGN, rest_rate=1e-3),
)


def main() -> None:
    """Sweep, repeat the best, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, by comma; adamw is always there")
    parser.add_argument("--steps", type=int, default=Sizes.steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    sizes = Sizes(steps=args.steps)
    chosen = [c for c in CONTENDERS if args.only is None or c.name in ("adamw", *args.only.split(","))]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, _pool(args.jobs) as pool:
        facts = machine_facts(Path.cwd(), 0, None)
        corpus, facts["text"] = write_corpus(Path(directory))
        facts["model"] = f"Llama on bytes, {asdict(sizes)}"
        facts["threads"] = f"1 a run, {args.jobs} at once"
        columns = (
            "optimizer",
            "hidden lr",
            "validation loss, mean +- deviation",
            "- AdamW, paired by seed",
            "loss by hidden lr, seed 0",
        )
        table = Table(
            "optimizer_loss",
            (*columns, "state MiB", "B/param", "update CPU ms", "step CPU ms"),
            facts,
            record=args.record,
        )
        sweep = [Run(contender=c, sizes=sizes, rate=r, seed=0, corpus=corpus) for c in chosen for r in c.rates]
        swept = _all(pool, sweep)
        best = {c.name: _best([r for r in swept if r["name"] == c.name]) for c in chosen if c.rates}
        again = [
            Run(contender=c, sizes=sizes, rate=best[c.name if c.rates else "adamw"]["rate"], seed=seed, corpus=corpus)
            for seed in range(args.seeds)
            for c in chosen
            if seed > 0 or not c.rates
        ]
        repeated = _all(pool, again)
    rows = []
    for c in chosen:
        runs = ([best[c.name]] if c.rates else []) + [r for r in repeated if r["name"] == c.name]
        rows.append(summary(c, [r for r in swept if r["name"] == c.name], runs))
    base = rows[0]["losses"]
    for row in rows:
        table.add(row, cells(row, base))
    table.note(f"{(time.perf_counter() - began) / 60:.0f} minutes in all. * the best rate is at the end of its grid.")


def _pool(jobs: int) -> ProcessPoolExecutor:
    os.environ["OMP_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _all(pool: ProcessPoolExecutor, runs: Sequence[Run]) -> list[dict[str, Any]]:
    results = []
    for done, result in enumerate(pool.map(train, runs), 1):
        results.append(result)
        say(
            f"{done} of {len(runs)}: {result['name']}, lr {result['rate']:g}, seed {result['seed']}: "
            f"{result['loss']:.4f} in {result['wall_s']:.0f} s"
        )
    return results


def write_corpus(directory: Path) -> tuple[str, str]:
    """A file with the bytes to learn and the bytes held out, and what they are."""
    from memopt.jobs.demo_model import demo_corpus

    demo_corpus(directory / "text", CORPUS_BYTES)
    files = sorted((directory / "text").glob("*.txt"))
    parts: dict[bool, bytes] = {False: b"", True: b""}
    for i, file in enumerate(files):
        parts[i % HELD_OUT == 0] += file.read_bytes() + b"\0"
    tensors = {
        name: torch.frombuffer(bytearray(parts[held]), dtype=torch.uint8)
        for name, held in (("learn", False), ("held", True))
    }
    path = directory / "corpus.pt"
    torch.save(tensors, path)
    return str(path), (
        f"Python {sys.version.split()[0]}'s standard library, {len(files)} modules: {len(parts[False])} bytes "
        f"to learn, {len(parts[True])} in whole modules held out"
    )


def train(run: Run) -> dict[str, Any]:
    """One training, in a process with one thread."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    text = torch.load(run.corpus, weights_only=True)
    sizes = run.sizes
    torch.manual_seed(run.seed)
    model = _model(sizes)
    optimizer, rates = _optimizer(run, model)
    draw = torch.Generator().manual_seed(1000 + run.seed)
    losses, update_s, step_s = [], [], []
    for step in range(sizes.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, sizes.steps)
        start = time.process_time()
        tokens = _rows(text["learn"], sizes, draw)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        middle = time.process_time()
        optimizer.step()
        optimizer.zero_grad()
        end = time.process_time()
        update_s.append(end - middle)
        step_s.append(end - start)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return {
        "name": run.contender.name,
        "rate": run.rate,
        "seed": run.seed,
        "loss": validate(model, text["held"], sizes) if math.isfinite(losses[-1]) else math.inf,
        "train_losses": [round(each, 4) for each in losses[:: max(1, sizes.steps // 20)]],
        "state_bytes": _state_bytes(optimizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "update_ms": 1000 * median(update_s[DROPPED_STEPS:]),
        "update_mean_ms": 1000 * statistics.fmean(update_s[DROPPED_STEPS:]),
        "step_ms": 1000 * median(step_s[DROPPED_STEPS:]),
        "wall_s": time.perf_counter() - began,
    }


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear over the first tenth, then a cosine down to a tenth."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def validate(model: torch.nn.Module, held: torch.Tensor, sizes: Sizes) -> float:
    """Mean loss of rows spread evenly over the held-out bytes."""
    starts = torch.linspace(0, len(held) - sizes.sequence, EVAL_ROWS).long()
    rows = torch.stack([held[s : s + sizes.sequence] for s in starts]).long()
    batches = rows.split(sizes.rows)
    return sum(model(input_ids=b, labels=b, use_cache=False).loss.item() * len(b) for b in batches) / len(rows)


def _rows(text: torch.Tensor, sizes: Sizes, draw: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(text) - sizes.sequence, (sizes.rows,), generator=draw)
    return torch.stack([text[s : s + sizes.sequence] for s in starts]).long()


def _model(sizes: Sizes) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=sizes.width,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            max_position_embeddings=sizes.sequence,
            tie_word_embeddings=False,
        )
    ).train()


def _optimizer(run: Run, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, list[float]]:
    """The optimizer, and the highest rate of each of its groups."""
    routed = routing.route(model)
    rates = (run.rate * run.contender.attention, run.rate, run.contender.rest_rate)
    if not run.contender.preset:
        split = [[r.parameter for r in routed if _third(r.role) == third] for third in range(3)]
        return torch.optim.AdamW([{"params": params} for params in split], weight_decay=0.0, fused=True), list(rates)
    made = presets.resolve(run.contender.preset, routed, **run.contender.options)
    grouped = [grouping.group([a for a in made if _third(a.routed.role) == third], 0.0) for third in range(3)]
    optimizer = Optimizer([group for groups in grouped for group in groups], preset=run.contender.preset, lr=run.rate)
    return optimizer, [rate for rate, groups in zip(rates, grouped, strict=True) for _ in groups]


def _third(role: Role) -> int:
    """0 queries and keys, 1 the other hidden matrices, 2 the rest: each has a rate of its own."""
    return 2 if role not in HIDDEN else int(role not in (Role.Q, Role.K))


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def summary(contender: Contender, swept: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A contender's row: the sweep, and `runs`, the best rate on all seeds, seed 0 first."""
    losses = [r["loss"] for r in runs]
    return {
        "optimizer": contender.name,
        "options": dict(contender.options),
        "rate": runs[0]["rate"],
        "at_the_end": runs[0]["rate"] in (*contender.rates[:1], *contender.rates[-1:]),
        "losses": losses,
        "mean": statistics.fmean(losses),
        "deviation": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "by_rate": {f"{r['rate']:g}": r["loss"] for r in swept},
        "state_bytes": runs[0]["state_bytes"],
        "parameters": runs[0]["parameters"],
        "update_ms": median([r["update_ms"] for r in runs]),
        "update_mean_ms": median([r["update_mean_ms"] for r in runs]),
        "step_ms": median([r["step_ms"] for r in runs]),
        "train_losses": runs[0]["train_losses"],
    }


def cells(row: dict[str, Any], base: Sequence[float]) -> list[str]:
    """The row as text; `base` is AdamW's losses."""
    paired = [a - b for a, b in zip(row["losses"], base, strict=True)]
    spread = f" +- {statistics.stdev(paired):.4f}" if len(paired) > 1 else ""
    return [
        row["optimizer"],
        f"{row['rate']:g}{'*' if row['at_the_end'] else ''}",
        f"{row['mean']:.4f} +- {row['deviation']:.4f}",
        f"{statistics.fmean(paired):+.4f}{spread}",
        ", ".join(f"{rate} {loss:.3f}" for rate, loss in row["by_rate"].items()),
        f"{row['state_bytes'] / MiB:.2f}",
        f"{row['state_bytes'] / row['parameters']:.2f}",
        f"{row['update_ms']:.1f}",
        f"{row['step_ms']:.0f}",
    ]


def _best(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return min(runs, key=lambda run: run["loss"] if math.isfinite(run["loss"]) else math.inf)


if __name__ == "__main__":
    main()
