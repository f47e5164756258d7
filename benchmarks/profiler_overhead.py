"""What watching costs: a PyTorch training loop with and without the profiler, and the profiler's own CPU time.

Inside one process the sides take turns on the same model: nothing; a session; a session with four phases named in every
step; `memopt.Profiler`, which finds the phases itself and counts weights, gradients, optimizer state and activations. A
round is one turn of each, in an order that reverses every round; ratios are made within a round, then
their median is taken. From outside: the same loop as a command of its own, alone and under `memopt profile`, in turn;
its seconds are those it measures itself, so that starting Python is in neither.

Least possible: 1.000. The sampler sleeps between samples, so what it takes is its CPU time (on other cores, while it
does not hold the interpreter's lock), and the caches it disturbs. On a machine that does other things too, look at the
CPU seconds: the session's thread is among them, and waiting for a core is not.

Target: at most 1.01 times the wall time, and at most 0.01 of one core; the program ends with 1 where it is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, Table, machine_facts, median, number, say
from memopt.profiler.program import Profiler
from memopt.profiler.session import Session
from memopt.report_types import Report

COLUMNS = (
    "loop",
    "step ms",
    "watched by",
    "wall, of alone",
    "lowest - highest",
    "CPU, of alone",
    "of one core",
    "samples/s",
)
LIMIT_WALL, LIMIT_CORE = 1.01, 0.01
# width, layers, tokens of a step
LOOPS = {"small steps": (128, 2, 128), "large steps": (512, 4, 512)}
Step = Callable[[Callable[[str], contextlib.AbstractContextManager[None]]], None]
INSIDE = ("nobody", "session", "session and phases", "memopt.Profiler")


def training(width: int, layers: int, tokens: int, seed: int) -> tuple[Step, torch.nn.Module, torch.optim.Optimizer]:
    """One step of training a transformer on noise, given what names a phase; its model and its optimizer."""
    torch.manual_seed(seed)
    layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randn(1, tokens, width)  # (B, S, D)

    def step(phase: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
        with phase("forward"):
            loss = model(inputs).square().mean()
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            optimizer.step()
        with phase("clear"):
            optimizer.zero_grad()

    return step, model, optimizer


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:
    """What names no phase."""
    return contextlib.nullcontext()


Turn = tuple[float, float]
"""Wall and CPU seconds (of the whole process) of one step."""


def timed(step: Step, seconds: float, phase: Callable[[str], contextlib.AbstractContextManager[None]]) -> Turn:
    """Means over about `seconds`, at least two steps."""
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while count < 2 or time.perf_counter() - began < seconds:
        step(phase)
        count += 1
    return (time.perf_counter() - began) / count, (time.process_time() - cpu) / count


def inside(loop: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sides that share a process."""
    step, *watched = training(*LOOPS[loop], args.seed)
    for _ in range(3):
        step(no_phase)
    rounds: dict[str, list[Turn]] = {name: [] for name in INSIDE}
    cost: dict[str, list[tuple[float, float]]] = {name: [] for name in rounds}
    order = list(rounds)
    for number_ in range(args.rounds):
        for name in order:
            if name == "nobody":
                rounds[name].append(timed(step, args.seconds, no_phase))
                continue
            if name == "memopt.Profiler":  # finds phases, counts gradients and activations
                with Profiler() as profiler:
                    profiler.watch(*watched)
                    rounds[name].append(timed(step, args.seconds, no_phase))
                cost[name].append(spent(profiler.report))
                continue
            session = Session().start()
            rounds[name].append(timed(step, args.seconds, session.phase if "phases" in name else no_phase))
            measured = session.stop()
            cost[name].append((measured.cost_s / measured.wall_s, measured.samples / measured.wall_s))
        order.reverse()
        say(f"{loop}, inside: round {number_ + 1} of {args.rounds}")
    return [row(loop, name, rounds[name], rounds["nobody"], cost[name]) for name in rounds if name != "nobody"]


def outside(loop: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The loop as a command, alone and under `memopt profile`."""
    command = [sys.executable, "-m", "benchmarks.profiler_overhead", "--child", loop]
    command += ["--seconds", str(args.seconds * 2), "--threads", str(args.threads), "--seed", str(args.seed)]
    alone: list[Turn] = []
    watched: list[Turn] = []
    cost: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "run.json"
        program = "from memopt.launchers.main import app_main; app_main()"
        profiled = [sys.executable, "-c", program, "profile", "--quiet", "--report", str(report), "--", *command]
        for number_ in range(args.rounds):
            turns = [(alone, command), (watched, profiled)]
            for seconds, run in turns if number_ % 2 == 0 else reversed(turns):
                done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
                seconds.append(tuple(json.loads(done.stdout)))
            cost.append(spent(Report.load(report)))
            say(f"{loop}, outside: round {number_ + 1} of {args.rounds}")
    return [row(loop, "memopt profile", watched, alone, cost)]


def spent(report: Report) -> tuple[float, float]:
    """The share of a core that the report's own sampling took, and samples per second."""
    assert report.overhead is not None
    return report.overhead.cpu_s / report.wall_s, report.overhead.samples / report.wall_s


def row(
    loop: str, name: str, watched: list[Turn], alone: list[Turn], cost: list[tuple[float, float]]
) -> dict[str, Any]:
    """One configuration as it was measured."""
    ratios = [mine[0] / other[0] for mine, other in zip(watched, alone, strict=True)]
    return {
        "loop": loop,
        "watched_by": name,
        "step_s": median([wall for wall, _ in alone]),
        "wall_ratio": median(ratios),
        "ratios": ratios,
        "cpu_ratio": median([mine[1] / other[1] for mine, other in zip(watched, alone, strict=True)]),
        "core_share": median([share for share, _ in cost]),
        "samples_per_s": median([rate for _, rate in cost]),
    }


def cells(found: dict[str, Any]) -> list[str]:
    """A row as text."""
    return [
        found["loop"],
        number(1000 * found["step_s"], 1),
        found["watched_by"],
        number(found["wall_ratio"], 4),
        f"{min(found['ratios']):.3f} - {max(found['ratios']):.3f}",
        number(found["cpu_ratio"], 4),
        f"{found['core_share']:.2%}",
        number(found["samples_per_s"], 0),
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--child", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        step, *_ = training(*LOOPS[args.child], args.seed)
        for _ in range(3):
            step(no_phase)
        print(json.dumps(timed(step, args.seconds, no_phase)))
        return
    table = Table("profiler_overhead", COLUMNS, machine_facts(Path.cwd(), args.seed, None), record=args.record)
    missed = []
    for loop, side in itertools.product(LOOPS, (inside, outside)):
        for found in side(loop, args):
            table.add(found, cells(found))
            if found["wall_ratio"] > LIMIT_WALL or found["core_share"] > LIMIT_CORE:
                missed.append(f"{loop}, {found['watched_by']}")
    table.note(f"Over the target: {'; '.join(missed)}." if missed else "The target is met.")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
