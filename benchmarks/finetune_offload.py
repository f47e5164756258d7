"""Full fine-tuning in fp32 inside a DRAM budget, against the plain loop with everything in memory.

Both sides train the same Llama from the same checkpoint on the same random tokens with AdamW; their children alternate
(memopt, plain, memopt, plain, ...), so that a slow minute of the machine meets both. The memopt child lives in a memory
cgroup of 5/4 of its budget: the kernel itself refuses it more.

The least SSD traffic of a step when all state lives on SSD, fp32, P parameters, in bytes per parameter:

- Without clipping each block is updated as soon as its gradient is complete, during the backward pass.
  Reads: the weights for the forward 4, the weights for the backward and the update 4, two moments 8: 16.
  Writes: the weights 4, two moments 8: 12. The gradient never leaves memory.
- Exact global-norm clipping knows its factor only after the whole backward pass, so each gradient waits on SSD and the
  update rides on the next step's forward pass, which needs the weights anyway.
  Reads: weights for the backward 4; then weights, two moments and gradient for update and forward 16: 20.
  Writes: the gradient 4; weights and moments 12: 16.

What the budget leaves is spent on keeping some of it in DRAM, so a measured step may stay below these numbers; what
crosses twice is cut where the schedule turns (the last block is still there when the backward begins). Neither number
depends on accumulation: every micro-batch passes through a block while it is there.

Bandwidth is given per second of the step and per second in which any transfer was under way, next to the raw ceiling:
`memopt.store.bandwidth.measure_ssd` at the plan's own ratio of reads to writes, right before and right after the run.
A step that computes longer than its transfers take cannot reach the ceiling, and need not: then `waited` is small.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil

from benchmarks import synthetic
from benchmarks.harness import (
    ChildFailed,
    Table,
    ceiling,
    gib,
    kept,
    machine_facts,
    median,
    mib,
    number,
    run_child,
    say,
    workspace,
)
from memopt.units import format_bytes, parse_bytes

LEAST = {False: (16, 12), True: (20, 16)}
"""Bytes read and written per parameter, by whether gradients are clipped (module docstring)."""
_LOSS_TOLERANCE = 1e-5
_PLAIN_BYTES_PER_PARAMETER = 18  # 16 of state and what was measured around it
_LR = 1e-4
COLUMNS = (
    "seq x accum",
    "clip",
    "memopt s/step",
    "plain s/step",
    "memopt / plain",
    "clip / no clip",
    "waited s",
    "memopt peak MiB (VmHWM)",
    "plain peak MiB (VmHWM)",
    "read B/param (least)",
    "written B/param (least)",
    "GiB/s of step",
    "GiB/s while busy",
    "raw GiB/s before, after",
    "busy / raw",
    "kernel's peak of limit MiB",
    "loss difference",
)


@dataclass
class Runs:
    """What was measured of one (seq, accum, clip): one entry per round."""

    memopt: list[dict[str, Any]] = field(default_factory=list)
    plain: list[dict[str, Any]] = field(default_factory=list)
    raw_per_s: list[tuple[int, int]] = field(default_factory=list)
    mix: tuple[int, int] = (4, 3)
    dram_bytes: int = 0


def main() -> int:
    """Measure; 0 when every loss agreed and every limit held."""
    args = _arguments()
    failures: list[str] = []
    with workspace(args.dir) as work:
        say(f"writing the {args.shape} checkpoint")
        parameters = synthetic.make(work / "model", args.shape, args.seed)
        facts = machine_facts(work, args.seed, ceiling(work, 4, 3, args.probe))
        facts["model"] = (
            f"Llama {args.shape}, {parameters / 1e6:.1f}M parameters, float32, {synthetic.llama(args.shape)}"
        )
        facts["method"] = f"{args.rounds} rounds, {args.steps} steps a child, the first 2 dropped, medians"
        table = Table("finetune_offload", COLUMNS, facts, record=args.record)
        for seq, accum in args.configs:
            runs = _measure(args, work, parameters, seq, accum, failures)
            for clip, each in runs.items():
                if each.memopt:
                    row = _row(seq, accum, clip, parameters, each, runs.get(False))
                    failures += _broken(row)
                    table.add(row, _cells(row))
    for failure in failures:
        say(f"FAILED: {failure}")
    return 1 if failures else 0


def _measure(
    args: argparse.Namespace, work: Path, parameters: int, seq: int, accum: int, failures: list[str]
) -> dict[bool, Runs]:
    """All children of one (seq, accum), alternating."""
    tokens = synthetic.batches(args.shape, seq=seq, accum=accum, steps=args.steps, seed=args.seed + 1)
    runs = {clip: Runs() for clip in args.clips}
    plain_reason = _no_plain(args, parameters)
    for round_number in range(args.rounds):
        for clip, each in runs.items():
            name = f"seq {seq} x {accum}, clip {'on' if clip else 'off'}, round {round_number + 1} of {args.rounds}"
            try:
                say(f"memopt: {name}")
                _run_memopt(args, work, tokens, clip, each)
                if plain_reason:
                    say(f"plain loop left out: {plain_reason}")
                    continue
                say(f"plain: {name}")
                each.plain.append(run_child("train_plain", _plain_arguments(work, tokens, clip)))
            except ChildFailed as error:
                failures.append(f"{name}: {error}")
                say(failures[-1])
    return runs


def _run_memopt(args: argparse.Namespace, work: Path, tokens: dict[str, int], clip: bool, runs: Runs) -> None:
    settings = synthetic.settings(work / "model", work / "run", clip=clip, lr=_LR, seed=args.seed, device="cpu")
    runs.dram_bytes = runs.dram_bytes or synthetic.dram_budget(args.dram, settings, tokens)
    settings["dram"] = runs.dram_bytes
    if not runs.memopt:
        planned = run_child("plan", {"settings": settings, "batches": tokens})["plan"]
        runs.mix = _mix(planned["ssd_read_per_step_bytes"], planned["ssd_write_per_step_bytes"], LEAST[clip])
    limit = None if args.cgroup == "none" else _limit(args.cgroup, settings["dram"])
    before = ceiling(work, *runs.mix, args.probe).mixed_per_s
    result = run_child("train_memopt", {"settings": settings, "batches": tokens}, limit_bytes=limit)
    after = ceiling(work, *runs.mix, args.probe).mixed_per_s
    runs.memopt.append(result)
    runs.raw_per_s.append((before, after))
    for line in result["reasons"][:1]:
        say(f"  {line}; {_kernel_text(result)}")


def _plain_arguments(work: Path, tokens: dict[str, int], clip: bool) -> dict[str, Any]:
    return {
        "model": str(work / "model"),
        "batches": tokens,
        "lr": _LR,
        "max_grad_norm": 1.0 if clip else 0.0,
        "device": "cpu",
        "compute": "float32",
    }


def _row(seq: int, accum: int, clip: bool, parameters: int, runs: Runs, unclipped: Runs | None) -> dict[str, Any]:
    """Medians over the steps that count of all rounds; ratios are made within a round, then their median."""
    read, written = (
        median([b for run in runs.memopt for b in kept(run[name])]) for name in ("ssd_read_bytes", "ssd_write_bytes")
    )
    step_s, waited_s, busy_s = (
        median([s for run in runs.memopt for s in kept(run[name])]) for name in ("step_s", "waited_s", "io_busy_s")
    )
    raw = median([speed for pair in runs.raw_per_s for speed in pair])
    kernel = next((run["kernel"] for run in runs.memopt if run.get("kernel")), None)
    return {
        "benchmark": "finetune_offload",
        "seq": seq,
        "accum": accum,
        "clip": clip,
        "parameters": parameters,
        "memopt_step_s": step_s,
        "plain_step_s": _none_if_nan(median([s for run in runs.plain for s in kept(run["step_s"])])),
        "memopt_over_plain": _ratio(runs.memopt, runs.plain),
        "clip_over_no_clip": _ratio(runs.memopt, unclipped.memopt) if clip and unclipped else None,
        "waited_s": waited_s,
        "busy_s": busy_s,
        "dram_budget_bytes": runs.memopt[0]["dram_budget_bytes"],
        "memopt_peak_bytes": max(run["peak_bytes"] for run in runs.memopt),
        "memopt_predicted_bytes": max(run["predicted_bytes"] for run in runs.memopt),
        "memopt_hwm_bytes": max(run["hwm_bytes"] for run in runs.memopt),
        "plain_peak_bytes": max((run["peak_bytes"] for run in runs.plain), default=None),
        "plain_hwm_bytes": max((run["hwm_bytes"] for run in runs.plain), default=None),
        "read_per_parameter": read / parameters,
        "written_per_parameter": written / parameters,
        "least_per_parameter": LEAST[clip],
        "step_per_s": (read + written) / step_s,
        "busy_per_s": (read + written) / busy_s if busy_s else None,
        "raw_per_s": runs.raw_per_s,
        "raw_mix": runs.mix,
        "busy_over_raw": (read + written) / busy_s / raw if busy_s else None,
        "kernel": kernel,
        "kernel_peaks": [run["kernel"]["peak_bytes"] for run in runs.memopt if run.get("kernel")],
        "oom_kills": sum(run["kernel"]["oom_kills"] or 0 for run in runs.memopt if run.get("kernel")),
        "verdicts": [run["verdict"] for run in runs.memopt],
        "losses": runs.memopt[-1]["losses"],
        "last_loss_difference": _loss_difference(runs, last_only=True),
        "worst_loss_difference": _loss_difference(runs, last_only=False),
        "steps_s": {"memopt": [r["step_s"] for r in runs.memopt], "plain": [r["step_s"] for r in runs.plain]},
        "plan": runs.memopt[-1]["plan"],
    }


def _cells(row: dict[str, Any]) -> list[str]:
    least_read, least_written = row["least_per_parameter"]
    before, after = (gib(median([pair[side] for pair in row["raw_per_s"]])) for side in (0, 1))
    kernel = row["kernel"]
    peaks = [peak for peak in row["kernel_peaks"] if peak is not None]
    return [
        f"{row['seq']} x {row['accum']}",
        "on" if row["clip"] else "off",
        number(row["memopt_step_s"]),
        number(row["plain_step_s"]),
        number(row["memopt_over_plain"]),
        number(row["clip_over_no_clip"]),
        number(row["waited_s"]),
        f"{mib(row['memopt_peak_bytes'])} ({mib(row['memopt_hwm_bytes'])}) of {mib(row['dram_budget_bytes'])}",
        f"{mib(row['plain_peak_bytes'])} ({mib(row['plain_hwm_bytes'])})",
        f"{row['read_per_parameter']:.1f} ({least_read})",
        f"{row['written_per_parameter']:.1f} ({least_written})",
        gib(row["step_per_s"]),
        gib(row["busy_per_s"]),
        f"{before}, {after} ({row['raw_mix'][0]}:{row['raw_mix'][1]})",
        f"{row['busy_over_raw']:.0%}" if row["busy_over_raw"] else "-",
        f"{mib(max(peaks, default=None))} of {mib(kernel['limit_bytes'])}" if kernel else "-",
        "-" if row["worst_loss_difference"] is None else f"{row['worst_loss_difference']:.1e}",
    ]


def _broken(row: dict[str, Any]) -> list[str]:
    """The claims this row does not keep."""
    where = f"seq {row['seq']} x {row['accum']}, clip {'on' if row['clip'] else 'off'}"
    broken = []
    difference = row["last_loss_difference"]
    if difference is not None and not difference <= _LOSS_TOLERANCE:
        broken.append(f"{where}: the last loss differs by {difference:.1e} from the plain loop's")
    if row["oom_kills"]:
        broken.append(f"{where}: the kernel killed for memory")
    if "over" in row["verdicts"]:
        broken.append(f"{where}: over the budget")
    return broken


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float | None:
    pairs = [median(kept(a["step_s"])) / median(kept(b["step_s"])) for a, b in zip(ours, theirs, strict=False)]
    return median(pairs) if pairs else None


def _loss_difference(runs: Runs, *, last_only: bool) -> float | None:
    """The largest relative difference to the plain loop's losses."""
    pairs = [
        pair
        for ours, theirs in zip(runs.memopt, runs.plain, strict=False)
        for pair in list(zip(ours["losses"], theirs["losses"], strict=True))[-1 if last_only else 0 :]
    ]
    return max((abs(a - b) / abs(b) for a, b in pairs), default=None)


def _mix(reads: int, writes: int, least: tuple[int, int]) -> tuple[int, int]:
    """Small whole numbers in the ratio of the plan's reads to its writes; the least traffic's when nothing moves."""
    if not reads or not writes:
        reads, writes = least
    ratio = Fraction(reads, writes).limit_denominator(8)
    return max(1, ratio.numerator), max(1, ratio.denominator)


def _limit(asked: str, dram_bytes: int) -> int:
    return dram_bytes * 5 // 4 if asked == "auto" else parse_bytes(asked, field="--cgroup")


def _kernel_text(result: dict[str, Any]) -> str:
    kernel = result.get("kernel")
    if kernel is None:
        return f"no cgroup ({result.get('kernel_skipped') or 'not asked for'})"
    peak = "unknown" if kernel["peak_bytes"] is None else format_bytes(kernel["peak_bytes"])
    return (
        f"the kernel's peak {peak} of {format_bytes(kernel['limit_bytes'])}, page cache included; "
        f"{kernel['oom_kills']} kills"
    )


def _no_plain(args: argparse.Namespace, parameters: int) -> str | None:
    if args.no_plain:
        return "--no-plain"
    need, there = parameters * _PLAIN_BYTES_PER_PARAMETER, psutil.virtual_memory().available
    return None if need < there else f"it needs {format_bytes(need)}, {format_bytes(there)} is available"


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune_offload", description="See the module's text.")
    parser.add_argument("--shape", choices=[name for name in synthetic.SHAPES], default="350m")
    parser.add_argument("--small", action="store_true", help="a tiny model at its smallest budget: tries the program")
    parser.add_argument("--configs", type=_configs, help="seq x accum, default 32x1,32x8,256x1; 256x8 is long")
    parser.add_argument("--clips", type=_clips, default="off,on", help="off, on, or both: off,on")
    parser.add_argument("--steps", type=int, default=6, help="steps of each child, the first two dropped")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dram", help="memopt's budget (1GiB), or `smallest`")
    parser.add_argument("--cgroup", default="auto", help="limit of the kernel: a size, auto (5/4 of --dram), none")
    parser.add_argument("--probe-bytes", help="file size of the raw measurement, default 512MiB")
    parser.add_argument("--dir", help="where to work, on the SSD to measure; default: here. Needs 32 B/parameter")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    if args.small:
        args.shape = "small"
    args.configs = args.configs or _configs("32x1,16x2" if args.small else "32x1,32x8,256x1")
    args.dram = args.dram or ("smallest" if args.small else "1GiB")
    args.probe = parse_bytes(args.probe_bytes or ("64MiB" if args.small else "512MiB"), field="--probe-bytes")
    if args.steps < 3:
        parser.error("--steps: the first two are dropped; give at least 3")
    return args


def _configs(text: str) -> list[tuple[int, int]]:
    pairs = [each.split("x") for each in text.split(",")]
    return [(int(seq), int(accum)) for seq, accum in pairs]


def _clips(text: str) -> list[bool]:
    known = {"off": False, "on": True}
    return [known[each] for each in text.split(",")]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
