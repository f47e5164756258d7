"""Milliseconds and bytes of one optimizer step: memopt's presets and the packages people use, side by side.

All contenders live at once, each in a process of its own with the same weights and gradients, and take turns: a slow
minute meets all of them. A turn during which other processes had more than a tenth of a core is taken again, up to
`--patience` times; turns that stayed disturbed are counted. Ratios are made within a round, then their median is taken.
What projects (GaLore) has two
processes, one that looks for a subspace in every step and one that never does after the first;
`amortised = (plain * (gap - 1) + refresh) / gap` with gap 200.

Least possible on a CPU: AdamW in float32 moves 28 bytes an element (weights, gradient and moments read, all but the
gradient written), 8-bit AdamW 16, so neither can be faster than memory. GaLore's products, G V and d V^T, are 4 r
operations an element: 512 at rank 128, which on two CPU cores take longer than 28 bytes do.

Targets: int8 AdamW at most 1.5 times torch's fused float32 AdamW; GaLore, amortised, at most 1.5 times AdamW. The
program ends with 1 where one of them is missed, on whichever AdamW (fused or foreach) it is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness import RESULT_MARK, ROOT, ChildFailed, Table, machine_facts, median, mib, number, say
from benchmarks.optimizer_contenders import CONTENDERS, Sizes, missing

GAP = 200
LIMIT = 1.5
SHAPES = {
    "512": Sizes(),  # 60M's matrices of the GaLore paper
    "1024": Sizes(width=1024, intermediate=2736, layers=2, vocabulary=4096, rank=256),  # 350M's
    "2048": Sizes(width=2048, intermediate=5461, layers=2, vocabulary=4096, rank=512),  # 1B's: for a GPU
}
FUSED, FOREACH = "torch AdamW fused", "torch AdamW foreach"
COLUMNS = (
    "optimizer",
    "states MiB",
    "B/param",
    "step ms",
    "refresh step ms",
    f"amortised over {GAP} ms",
    "of fused",
    "of foreach",
    "scratch MiB",
    "states + scratch MiB",
)
_VERSIONED = ("torch", "bitsandbytes", "torchao", "galore-torch")
_SETTLE_S = 0.3
_DISTURBED = 0.1
"""Cores that others may have during a turn."""


@dataclass
class Lane:
    """One process and what it has answered."""

    name: str
    refresh: bool
    process: subprocess.Popen[str]
    rounds: list[float] = field(default_factory=list)
    """Median milliseconds of each round."""
    disturbed: int = 0

    def turn(self, steps: int, patience: int) -> None:
        """One round's steps, repeated while others take the CPUs."""
        child = psutil.Process(self.process.pid)
        for left in range(patience, -1, -1):
            time.sleep(_SETTLE_S)  # the threads of the one before spin a little on
            began, before = time.perf_counter(), _others_s(child)
            seconds = self.ask(f"steps {steps}")["step_s"]
            others = (_others_s(child) - before) / (time.perf_counter() - began)
            if others <= _DISTURBED:
                break
            self.disturbed += left == 0
        self.rounds.append(1000 * median(seconds))

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to a line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises ChildFailed."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(RESULT_MARK):
                answer: dict[str, Any] = json.loads(line[len(RESULT_MARK) :])
                return answer
        raise ChildFailed(f"{self.name} ended with exit code {self.process.wait()}")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="512", help="width of the model")
    parser.add_argument("--only", help="substrings of names, by comma; the two torch AdamWs are always there")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="per round, after one that is not counted")
    parser.add_argument("--refresh-rounds", type=int, default=3, help="rounds in which subspaces are looked for")
    parser.add_argument("--patience", type=int, default=20, help="times that a disturbed turn is repeated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    wanted = [
        name
        for name in CONTENDERS
        if name in (FUSED, FOREACH) or args.only is None or any(part in name for part in args.only.split(","))
    ]
    absent = {name: reason for name in wanted if (reason := missing(name)) is not None}
    facts = machine_facts(Path.cwd(), args.seed, None)
    facts["peers"] = ", ".join(f"{name} {version}" for name in _VERSIONED if (version := _version(name)))
    facts["model"] = f"Llama's shapes, {asdict(SHAPES[args.shape])}"
    facts["threads"] = str(args.threads)
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    table = Table("optimizer_step", COLUMNS, facts, record=args.record)
    with lanes([name for name in wanted if name not in absent], args) as running:
        measure(running, args.rounds, args.refresh_rounds, args.steps, args.patience)
        rows = [row(lane, running) for lane in running if not lane.refresh]
    for each in rows:
        table.add(each, cells(each))
    for name, reason in absent.items():
        table.note(f"{name}: left out, {reason}.")
    table.note(
        f"Disturbed turns: {sum(lane.disturbed for lane in running)} of {sum(len(lane.rounds) for lane in running)}."
    )
    missed = verdicts(rows)
    table.note("; ".join(missed) or "Every target is met.")
    sys.exit(1 if missed else 0)


@contextlib.contextmanager
def lanes(names: Sequence[str], args: argparse.Namespace) -> Iterator[list[Lane]]:
    """The processes, started one after the other; ended at the end."""
    running: list[Lane] = []
    try:
        for name in names:
            for refresh in (False, True) if CONTENDERS[name].projects else (False,):
                running.append(_started(name, refresh, args))
                first_s = running[-1].answer()["first_s"]
                say(f"{name}{', refreshing' if refresh else ''}: ready after {first_s:.1f} s")
        yield running
    finally:
        for lane in running:
            lane.process.kill()
            lane.process.wait()


def _started(name: str, refresh: bool, args: argparse.Namespace) -> Lane:
    settings = {
        "name": name,
        "sizes": asdict(SHAPES[args.shape]),
        "refresh": refresh,
        "seed": args.seed,
        "threads": args.threads,
    }
    command = [sys.executable, "-m", "benchmarks.optimizer_contenders", json.dumps(settings)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    return Lane(name, refresh, process)


def measure(running: Sequence[Lane], rounds: int, refresh_rounds: int, steps: int, patience: int) -> None:
    """All take turns, `rounds` times."""
    for i in range(rounds):
        for lane in running:
            if lane.refresh and i >= refresh_rounds:
                continue
            lane.turn(1 if lane.refresh else steps, patience)
        say(f"round {i + 1} of {rounds}: fused {running[0].rounds[-1]:.1f} ms")


def _others_s(child: psutil.Process) -> float:
    """CPU seconds of all but the child so far; of an idle machine they stand still."""
    every, own = psutil.cpu_times(), child.cpu_times()
    busy = sum(getattr(every, name, 0.0) for name in ("user", "system", "nice", "irq", "softirq", "steal"))
    return float(busy - own.user - own.system)


def row(lane: Lane, running: Sequence[Lane]) -> dict[str, Any]:
    """All that is known of a contender."""
    by_name = {each.name: each.rounds for each in running if not each.refresh}
    looking = next((each for each in running if each.name == lane.name and each.refresh), None)
    refresh = None if looking is None else median(looking.rounds)
    extra = 0.0 if refresh is None else (refresh - median(lane.rounds)) / GAP

    def of(base: str) -> float:
        return median([(mine + extra) / theirs for mine, theirs in zip(lane.rounds, by_name[base], strict=True)])

    return {
        "optimizer": lane.name,
        "step_ms": median(lane.rounds),
        "refresh_step_ms": refresh,
        "amortised_ms": median(lane.rounds) + extra,
        "of_fused": of(FUSED),
        "of_foreach": of(FOREACH),
        "rounds_ms": lane.rounds,
        "disturbed_rounds": lane.disturbed,
        "refresh_rounds_ms": None if looking is None else looking.rounds,
        **lane.ask("memory 3"),
        "refresh_scratch_bytes": None if looking is None else looking.ask("memory 1")["scratch_bytes"],
    }


def cells(each: dict[str, Any]) -> list[str]:
    """The row as text; scratch is that of the larger kind of step."""
    scratch = max(each["scratch_bytes"], each["refresh_scratch_bytes"] or 0)
    return [
        each["optimizer"],
        mib(each["state_bytes"]),
        number(each["state_bytes"] / each["parameters"]),
        number(each["step_ms"], 1),
        number(each["refresh_step_ms"], 0),
        number(each["amortised_ms"], 1),
        number(each["of_fused"]),
        number(each["of_foreach"]),
        mib(scratch),
        mib(each["state_bytes"] + scratch),
    ]


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that are missed."""
    missed = []
    for each in rows:
        name = each["optimizer"]
        against = {"memopt adamw8bit": ("of_fused",), "memopt galore": ("of_fused", "of_foreach")}.get(name, ())
        for key in against:
            if each[key] > LIMIT:
                missed.append(
                    f"{name} takes {each[key]:.2f} times {key.removeprefix('of_')} AdamW, the limit is {LIMIT}"
                )
    return missed


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
