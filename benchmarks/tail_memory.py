"""Rare facts in a small transformer: Adam, Muon, Muon for values, outputs and FFN, Muon for queries and keys.

After the heavy-tailed questions of "Muon Outperforms Adam in Tail-End Associative Memory Learning" (arXiv 2509.26030),
at a size for one CPU core. Each of 2^m people, named by two tokens, has an answer to each of six
questions. Group 0 is one person, group g is 2^(g-1) people, each asked about 2^-g times as often as group 0: half of
the people are the tail, group m. Embeddings, head and norms are fixed, so every fact must be stored in attention and
FFN. Two pre-norm layers of width 64, four heads, queries and keys normalised, constant learning rates, no decay of
weights, no Nesterov, Adam's betas (0.8, 0.95) and Muon's momentum 0.95, as in the paper.

Learning rates are swept for both sides over the same grid (Muon's updates have the size of Adam's), on seeds of their
own; the mixed rules keep the best of Adam's for their Adam part. What is reported is then run on fresh seeds, the same
for every rule. A seed is another set of facts, embeddings, first weights and questions.

The claim, on the fresh seeds' means: Muon and VO+FFN answer the tail better than the best Adam; VO+FFN has more than
half of Muon's gain, QK less than half; and Muon's W_out is more isotropic.

To be compared with one optimum: accuracy 1; guessing is 1/32.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from benchmarks.harness import Table, machine_facts, number, say
from memopt.optim.muon import MuonSettings, direction
from memopt.optim.spectrum import spectrum

WIDTH, HEADS, LAYERS, BATCH = 64, 4, 2, 256
QUESTIONS, ANSWERS = 6, 32
ALL = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"})
RULES: dict[str, frozenset[str]] = {
    "Adam": frozenset(),
    "Muon": ALL,
    "Muon VO+FFN": ALL - {"q_proj", "k_proj"},
    "Muon QK": frozenset({"q_proj", "k_proj"}),
}
"""Which matrices Muon updates; Adam has the others."""
W_OUT, VO = ("down_proj",), ("v_proj", "o_proj")
GRID = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SWEEP_SEEDS = (1, 2)
FRESH_SEEDS = (11, 12, 13, 14, 15)
COLUMNS = (
    "rule",
    "Muon lr",
    "Adam lr",
    "seeds",
    *(f"accuracy of group m{which}" for which in ("-2", "-1", " (tail)")),
    "tail at half the steps",
    "loss",
    "W_out entropy at first",
    "at the end",
    "effective rank",
    "top 10 energy",
    "Q75/25",
    "V and O entropy at first",
    "at the end",
    "CPU s/run",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    rule: str
    adam_lr: float | None
    muon_lr: float | None
    seed: int = 0
    groups: int = 8
    steps: int = 400


class Steps(Protocol):
    """What training needs of an optimizer."""

    def step(self) -> object:
        """Update the parameters from their gradients."""

    def zero_grad(self) -> None:
        """Forget the gradients."""


def make_optimizer(model: nn.Module, config: Config) -> Steps:
    """The optimizer of a run: Muon for the matrices that its rule names, Adam for the others."""
    chosen = RULES[config.rule]
    named = [(name.split(".")[-2], parameter) for name, parameter in model.named_parameters()]
    adam = [parameter for name, parameter in named if name not in chosen]
    muon = [parameter for name, parameter in named if name in chosen]
    return _AdamAndMuon(adam, muon, config)


class _AdamAndMuon:
    def __init__(self, adam: list[nn.Parameter], muon: list[nn.Parameter], config: Config) -> None:
        self._adam = None
        if adam:
            assert config.adam_lr is not None
            self._adam = torch.optim.AdamW(adam, lr=config.adam_lr, betas=(0.8, 0.95), weight_decay=0.0, fused=True)
        self._muon = muon
        self._buffers = [torch.zeros_like(each) for each in muon]
        self._settings = MuonSettings(nesterov=False)
        self._lr = config.muon_lr or 0.0

    @torch.no_grad()
    def step(self) -> None:
        if self._adam is not None:
            self._adam.step()
        for each, buffer in zip(self._muon, self._buffers, strict=True):
            if each.grad is not None:
                each.sub_(direction(each.grad, buffer, self._settings), alpha=self._lr)

    def zero_grad(self) -> None:
        for each in self._muon:
            each.grad = None
        if self._adam is not None:
            self._adam.zero_grad()


class Block(nn.Module):
    """Attention and FFN, each after a norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.up_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, *, last: bool) -> torch.Tensor:
        """(B, S, D) to (B, S, D), or to (B, 1, D) of the last token alone."""
        normed = _norm(x)
        x, asking = (x[:, -1:], normed[:, -1:]) if last else (x, normed)
        q, k, v = (
            self.get_submodule(name)(each).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name, each in (("q_proj", asking), ("k_proj", normed), ("v_proj", normed))
        )
        scores = _norm(q) @ _norm(k).mT / math.sqrt(WIDTH / HEADS)
        if not last:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        x = x + self.get_submodule("o_proj")((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        return x + self.down_proj(functional.gelu(self.up_proj(_norm(x))))


class Memory(nn.Module):
    """Answers to (first name, last name, question); tokens tell their place, so there are no positions."""

    embedding: torch.Tensor
    head: torch.Tensor

    def __init__(self, names: int, generator: torch.Generator) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.register_buffer("embedding", torch.randn(2 * names + QUESTIONS, WIDTH, generator=generator))
        head = torch.randn(QUESTIONS * ANSWERS, WIDTH, generator=generator) / math.sqrt(WIDTH)
        self.register_buffer("head", head)
        for name, weight in self.named_parameters():
            residual = 1 / math.sqrt(2 * LAYERS) if name.split(".")[-2] in ("o_proj", "down_proj") else 1.0
            nn.init.normal_(weight, std=residual / math.sqrt(weight.shape[1]), generator=generator)

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """(B, 3) token numbers to (B, QUESTIONS * ANSWERS) logits."""
        x = self.embedding[prompts]
        for block in self.blocks:
            x = block(x, last=block is self.blocks[-1])
        return functional.linear(_norm(x[:, -1]), self.head)


@dataclass(frozen=True)
class Facts:
    """All that is to be learned: one row for each person and question."""

    prompts: torch.Tensor  # (P * QUESTIONS, 3) token numbers
    answers: torch.Tensor  # (P * QUESTIONS)
    groups: torch.Tensor  # (P * QUESTIONS)
    frequency: torch.Tensor  # (P * QUESTIONS), not normalised

    @classmethod
    def draw(cls, groups: int, names: int, generator: torch.Generator) -> Facts:
        """People in a random order of their names, answers uniform among the 32 of their question."""
        sizes = [1, *(2 ** (g - 1) for g in range(1, groups + 1))]
        group = torch.arange(groups + 1).repeat_interleave(torch.tensor(sizes)).repeat_interleave(QUESTIONS)
        person = torch.randperm(names * names, generator=generator)[: sum(sizes)].repeat_interleave(QUESTIONS)
        question = torch.arange(QUESTIONS).repeat(sum(sizes))
        prompts = torch.stack([person // names, names + person % names, 2 * names + question], dim=1)
        answers = ANSWERS * question + torch.randint(ANSWERS, question.shape, generator=generator)
        return cls(prompts, answers, group, 0.5**group)


def run(config: Config) -> dict[str, Any]:
    """Train once; what was learned by group at half and all of the steps, and what the weights look like."""
    began = time.process_time()
    generator = torch.Generator().manual_seed(config.seed)
    names = math.ceil(math.sqrt(2**config.groups))
    facts = Facts.draw(config.groups, names, generator)
    model = Memory(names, generator)
    optimizer = make_optimizer(model, config)
    first = {"W_out_at_first": _metrics(model, W_OUT), "VO_at_first": _metrics(model, VO)}
    accuracy = {}
    losses: list[float] = []
    for step in range(1, config.steps + 1):
        picked = torch.multinomial(facts.frequency, BATCH, replacement=True, generator=generator)
        loss = functional.cross_entropy(model(facts.prompts[picked]), facts.answers[picked])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step in (config.steps // 2, config.steps):
            accuracy[str(step)] = _accuracy(model, facts)
    return {
        **asdict(config),
        "accuracy": accuracy,
        "loss": statistics.fmean(losses[-20:]),
        **first,
        "W_out": _metrics(model, W_OUT),
        "VO": _metrics(model, VO),
        "cpu_s": time.process_time() - began,
    }


def _norm(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],))


@torch.no_grad()
def _accuracy(model: nn.Module, facts: Facts) -> list[float]:
    right = (model(facts.prompts).argmax(-1) == facts.answers).float()
    return [right[facts.groups == g].mean().item() for g in range(int(facts.groups.max()) + 1)]


def _metrics(model: nn.Module, kinds: Sequence[str]) -> dict[str, Any]:
    """Means over the matrices of these kinds in all layers."""
    stack = [weight.detach() for name, weight in model.named_parameters() if name.split(".")[-2] in kinds]
    return spectrum(torch.stack(stack)).to_dict()


def main() -> int:
    """Sweep, then measure on fresh seeds; 0 when the claim holds."""
    args = _arguments()
    torch.set_num_threads(1)
    facts = machine_facts(Path.cwd(), 0, None)
    facts["seed"] = f"sweep {_listed(SWEEP_SEEDS)}, report {_listed(FRESH_SEEDS[: args.seeds])}"
    facts["task"] = (
        f"m = {args.groups}: {2**args.groups} people, {QUESTIONS} questions, {ANSWERS} answers to each; {LAYERS} "
        f"layers of {WIDTH}, {HEADS} heads; {args.steps} steps of {BATCH} prompts; learning rates {_listed(GRID)}"
    )
    table = Table("tail_memory", COLUMNS, facts, record=args.record)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        best = _sweep(
            pool, Config(rule="Adam", adam_lr=None, muon_lr=None, groups=args.groups, steps=args.steps), table
        )
        table.note(
            f"The best of each sweep, on fresh seeds (mean ± standard deviation over seeds). At an edge of its grid: "
            f"{', '.join(_at_edge(best)) or 'none'}."
        )
        fresh = [replace(config, seed=seed) for config in best.values() for seed in FRESH_SEEDS[: args.seeds]]
        say(f"{len(fresh)} runs on fresh seeds")
        runs = list(pool.map(run, fresh))
    by_rule = {rule: [each for each in runs if each["rule"] == rule] for rule in best}
    for rows in by_rule.values():
        table.add(_summary("tail_memory", rows), _cells(rows))
    verdict, text = _verdict(by_rule)
    table.note(text)
    return 0 if verdict else 1


def _sweep(pool: ProcessPoolExecutor, base: Config, table: Table) -> dict[str, Config]:
    best: dict[str, Config] = {}
    for rule, chosen in RULES.items():
        adam = best["Adam"].adam_lr if best else None
        tried = [
            replace(base, rule=rule, adam_lr=None if chosen == ALL else adam, muon_lr=lr)
            if chosen
            else replace(base, rule=rule, adam_lr=lr)
            for lr in GRID
        ]
        say(f"{rule}: sweeping {len(tried)} learning rates")
        runs = list(pool.map(run, [replace(config, seed=seed) for config in tried for seed in SWEEP_SEEDS]))
        count = len(SWEEP_SEEDS)
        rows = [runs[start : start + count] for start in range(0, len(runs), count)]
        for each in rows:
            table.add(_summary("tail_memory sweep", each), _cells(each))
        tails = [statistics.fmean(_tail(one) for one in each) for each in rows]
        best[rule] = tried[tails.index(max(tails))]
    return best


def _at_edge(best: dict[str, Config]) -> list[str]:
    swept = {rule: each.muon_lr if RULES[rule] else each.adam_lr for rule, each in best.items()}
    return [rule for rule, lr in swept.items() if lr in (GRID[0], GRID[-1])]


def _tail(one: dict[str, Any]) -> float:
    return float(one["accuracy"][str(one["steps"])][-1])


def _verdict(by_rule: dict[str, list[dict[str, Any]]]) -> tuple[bool, str]:
    gains = {
        rule: [_tail(a) - _tail(b) for a, b in zip(rows, by_rule["Adam"], strict=True)]
        for rule, rows in by_rule.items()
        if rule != "Adam"
    }
    gain = {rule: statistics.fmean(each) for rule, each in gains.items()}
    entropy = {rule: statistics.fmean(one["W_out"]["entropy"] for one in rows) for rule, rows in by_rule.items()}
    holds = (
        gain["Muon"] > 0
        and gain["Muon VO+FFN"] > gain["Muon"] / 2 > gain["Muon QK"]
        and entropy["Muon"] > entropy["Adam"]
    )
    shown = "; ".join(f"{rule} {_spread(each, 3, sign='+')}" for rule, each in gains.items())
    return (
        holds,
        f"Tail accuracy above Adam's, seed by seed: {shown}. The claim {'holds' if holds else 'does NOT hold'}.",
    )


def _summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    shared = {key: rows[0][key] for key in ("rule", "adam_lr", "muon_lr", "groups", "steps")}
    each = ("seed", "accuracy", "loss", "W_out_at_first", "W_out", "VO_at_first", "VO", "cpu_s")
    return {"benchmark": name, **shared, "runs": [{key: one[key] for key in each} for one in rows]}


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    last, half = str(first["steps"]), str(first["steps"] // 2)
    return [
        first["rule"],
        *("-" if first[key] is None else f"{first[key]:g}" for key in ("muon_lr", "adam_lr")),
        str(len(rows)),
        *(_spread([one["accuracy"][last][g] for one in rows], 3) for g in (-3, -2, -1)),
        _spread([one["accuracy"][half][-1] for one in rows], 3),
        _spread([one["loss"] for one in rows], 3),
        *(_spread([one[which]["entropy"] for one in rows], 3) for which in ("W_out_at_first", "W_out")),
        *(
            _spread([one["W_out"][key] for one in rows], digits)
            for key, digits in (("effective_rank", 1), ("top_k_energy", 3), ("quantile_ratio", 2))
        ),
        *(_spread([one[which]["entropy"] for one in rows], 3) for which in ("VO_at_first", "VO")),
        number(statistics.fmean(one["cpu_s"] for one in rows), 1),
    ]


def _spread(values: Sequence[float | None], digits: int, *, sign: str = "") -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return "-"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.fmean(known):{sign}.{digits}f} ± {deviation:.{digits}f}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=8, help="m, the tail's group (default: 8)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (default: 400)")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6), help="fresh ones (default: 5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each (default: 1)")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
