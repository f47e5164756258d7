"""Depth costs no memory: the smallest sufficient budgets of 24 and 48 layers of one width are within 5 %.

With weights, state and boundary activations on SSD, what is in memory at once is the runtime, a few blocks, a tile of
the vocabulary and the activations around one block; none of them knows how many blocks there are. The smallest budget
is the one memopt states when it refuses a smaller; then the job is run at that budget, in a memory cgroup that leaves
the kernel's file pages and page tables a margin above it, and has to finish within it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from benchmarks.harness import ChildFailed, Table, machine_facts, median, mib, number, run_child, say, workspace
from memopt.units import MiB, parse_bytes

COLUMNS = (
    "layers",
    "parameters M",
    "training state MiB",
    "smallest budget MiB",
    "run at MiB",
    "measured peak MiB (VmHWM)",
    "verdict",
    "kernel's peak of limit MiB",
    "layers' activations on SSD",
    "s/step",
)
_TOLERANCE = 0.05
_TRIES = 4


def main() -> int:
    """Measure; 0 when the budgets are within 5 % of each other and every run stayed within its own."""
    args = _arguments()
    rows = []
    with workspace(args.dir) as work:
        facts = machine_facts(work, args.seed, None)
        facts["model"] = (
            f"Llama {args.shape} with {args.layers} layers, float32, {args.seq} x {args.accum} tokens a step"
        )
        table = Table("smallest_budget", COLUMNS, facts, record=args.record)
        for layers in args.layers:
            try:
                rows.append(_measure(args, work, layers))
            except ChildFailed as error:
                say(f"FAILED: {layers} layers: {error}")
                return 1
            table.add(rows[-1], _cells(rows[-1]))
        spread = _spread([row["smallest_bytes"] for row in rows])
        peaks = _spread([row["peak_bytes"] for row in rows])
        table.note(
            f"The largest smallest budget is {spread:.1%} above the smallest one (asked: at most {_TOLERANCE:.0%}); "
            f"the measured peaks differ by {peaks:.1%}."
        )
    broken = [row for row in rows if row["verdict"] != "within" or (row["kernel"] or {}).get("oom_kills")]
    return 1 if broken or spread > _TOLERANCE else 0


def _measure(args: argparse.Namespace, work: Path, layers: int) -> dict[str, Any]:
    """Ask for the smallest budget of `layers` layers and run at it.

    The stated budget counts what libraries hold in the asking process; in another process that differs by a MiB or
    two, so a refused run says what it needs, and is tried at that.
    """
    model = work / f"model-{layers}"
    parameters = synthetic.make(model, args.shape, args.seed, weights=False, num_hidden_layers=layers)
    tokens = synthetic.batches(args.shape, seq=args.seq, accum=args.accum, steps=args.steps, seed=args.seed)
    settings = synthetic.settings(
        model, work / "run", clip=not args.no_clip, lr=1e-4, seed=args.seed, init="random", device="cpu"
    )
    stated = 0
    tried: list[int] = []
    for _ in range(_TRIES):
        say(f"{layers} layers: asking for the smallest budget")
        stated = max(stated, run_child("smallest", {"settings": settings, "batches": tokens})["smallest_bytes"])
        budget = math.ceil(stated / MiB) * MiB + len(tried) * MiB
        tried.append(budget)
        say(f"{layers} layers: running at {mib(budget)} MiB")
        try:
            run = run_child(
                "train_memopt",
                {"settings": {**settings, "dram": budget}, "batches": tokens},
                limit_bytes=budget + args.margin,
            )
            break
        except ChildFailed as error:
            if "does not fit" not in str(error) or len(tried) == _TRIES:
                raise
    return {
        "benchmark": "smallest_budget",
        "layers": layers,
        "parameters": parameters,
        "smallest_bytes": stated,
        "tried_bytes": tried,
        "budget_bytes": budget,
        **{name: run[name] for name in ("training_state_bytes", "peak_bytes", "hwm_bytes", "predicted_bytes")},
        **{name: run[name] for name in ("charged_peak_bytes", "verdict", "kernel", "losses", "step_s", "plan")},
    }


def _cells(row: dict[str, Any]) -> list[str]:
    kernel = row["kernel"]
    return [
        str(row["layers"]),
        f"{row['parameters'] / 1e6:.1f}",
        mib(row["training_state_bytes"]),
        mib(row["smallest_bytes"]),
        mib(row["budget_bytes"]),
        f"{mib(row['peak_bytes'])} ({mib(row['hwm_bytes'])})",
        row["verdict"],
        f"{mib(kernel['peak_bytes'])} of {mib(kernel['limit_bytes'])}, {kernel['oom_kills']} kills" if kernel else "-",
        f"{row['plan']['activation_layers_on_ssd']} of {row['layers']}",
        number(median(row["step_s"][1:])),
    ]


def _spread(values: list[int]) -> float:
    return max(values) / min(values) - 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smallest_budget", description="See the module's text.")
    parser.add_argument("--shape", choices=list(synthetic.SHAPES), default="350m")
    parser.add_argument("--small", action="store_true", help="a tiny model: tries the program")
    parser.add_argument("--layers", type=_numbers, default="24,48")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--accum", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--margin", type=lambda text: parse_bytes(text, field="--margin"), default="128MiB")
    parser.add_argument("--dir", help="where to work, on an SSD; default: here. Needs 32 B/parameter")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    if args.small:
        args.shape = "small"
    return args


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
