"""Everything that needs a CUDA device: is it right, does it stay in its GPU budget, what does a step cost.

Parts, each in child processes, chosen with `--parts`:

- `pinned`: are memopt's buffers registered with CUDA, and what do copies reach from them and from pageable memory;
- `correct`: a small model in float32 on the CPU, on the GPU with all state in DRAM, on the GPU with the state on SSD,
  and the plain loop on the GPU: their losses agree; the same in bfloat16 against autocast, where they only come close;
- `speed`: a 1.1B-parameter Llama, bfloat16 compute, float32 master weights and moments: all state in DRAM, state on
  SSD, and two plain loops with everything on the GPU where it fits (float32 state with autocast; bfloat16 throughout).

The GPU peak is given three ways: memopt's report (NVML's number for the process where the driver gives it), the growth
of the whole device as nvidia-smi sees it from outside (context and libraries included), and torch's allocator.

Needs torch, transformers, psutil, xxhash, typer and rich. Without CUDA the arguments and settings are checked and
printed, and nothing is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

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
from memopt.units import MiB, parse_bytes

PARTS = ("pinned", "correct", "speed")
COLUMNS = (
    "part",
    "what",
    "compute",
    "s/step",
    "tokens/s",
    "to autocast",
    "GPU peak MiB of budget: report",
    "nvidia-smi",
    "torch reserved",
    "DRAM peak MiB of budget",
    "read, written B/param",
    "waited s",
    "first, last loss",
    "loss difference",
)
_LR = 1e-4
_SAMPLE_MS = 100
_PINNED_BYTES = 256 * MiB
_PLAIN_BYTES_PER_PARAMETER = {"autocast": 20, "bfloat16": 12, "float32": 18}
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "autocast": 2e-2}
"""Relative difference of a loss to the reference's: other kernels sum in another order; bfloat16 keeps 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One child. `settings` for memopt, `plain` for the plain loop; its losses are held against `reference`'s."""

    part: str
    name: str
    compute: str
    settings: dict[str, Any] | None = None
    plain: dict[str, Any] | None = None
    batches: dict[str, int]
    reference: str | None = None
    smallest_dram: bool = False


@dataclass
class DeviceWatch:
    """The device's memory in use, in bytes, as nvidia-smi reports it; None where there is no such program."""

    before_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def growth_bytes(self) -> int | None:
        return None if self.peak_bytes is None or self.before_bytes is None else self.peak_bytes - self.before_bytes


@dataclass
class Outcome:
    """What was measured so far."""

    table: Table
    rows: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    step_s: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def main() -> int:
    """Measure what can be measured; 0 when nothing failed."""
    import torch

    args = _arguments()
    if args.dry_run or not torch.cuda.is_available():
        _check(args)
        why = "--dry-run" if args.dry_run else "this PyTorch sees no CUDA device"
        print(f"{why}: arguments and settings are fine, nothing was measured")
        return 0
    with workspace(args.dir) as work:
        facts = machine_facts(work, args.seed, ceiling(work, 4, 3, args.probe))
        free, total = torch.cuda.mem_get_info()
        facts["GPU"] = (
            f"{torch.cuda.get_device_name()}, {gib(free)} of {gib(total)} GiB free; CUDA {torch.version.cuda}"
        )
        outcome = Outcome(Table("gpu_finetune", COLUMNS, facts, record=args.record))
        for part in args.parts:
            if part == "pinned":
                _guard(outcome, "pinned", partial(_pinned, outcome))
                continue
            say(f"writing the {_shape(args, part)} checkpoint")
            parameters = synthetic.make(work / part, _shape(args, part), args.seed, dtype=_stored(part))
            for case in _cases(args, work, part):
                reason = _does_not_fit(case, parameters, free)
                if reason:
                    outcome.table.note(f"{case.name}: left out, {reason}")
                    continue
                _guard(outcome, case.name, partial(_run, case, parameters, outcome))
            shutil.rmtree(work / part, ignore_errors=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"facts": facts, "rows": outcome.rows, "failures": outcome.failures}))
    for failure in outcome.failures:
        say(f"FAILED: {failure}")
    return 1 if outcome.failures else 0


def _cases(args: argparse.Namespace, work: Path, part: str) -> Iterator[Case]:
    model, run = work / part, work / "run"
    if part == "correct":
        tokens = synthetic.batches(args.small_shape, seq=64, accum=2, steps=args.steps, seed=args.seed)
        for compute, reference in (("float32", "plain float32"), ("bfloat16", "plain autocast")):
            plain_compute = reference.removeprefix("plain ")
            common = {"clip": True, "lr": _LR, "seed": args.seed, "dtype": compute}
            yield Case(
                part=part, name=reference, compute=plain_compute, plain=_plain(model, plain_compute), batches=tokens
            )
            on_ssd = synthetic.settings(model, run, device="cuda", **common)
            in_dram = synthetic.settings(model, None, device="cuda", **common)
            # bfloat16 products are slow on most CPUs and prove nothing there
            cpu = [("cpu", synthetic.settings(model, None, device="cpu", **common))] if compute == "float32" else []
            for where, settings in (*cpu, ("cuda, DRAM", in_dram), ("cuda, SSD", on_ssd)):
                yield Case(
                    part=part,
                    name=f"{where}, {compute}",
                    compute=compute,
                    settings=settings,
                    batches=tokens,
                    reference=reference,
                    smallest_dram=where.endswith("SSD"),
                )
        return
    tokens = synthetic.batches(
        args.shape, seq=args.seq, accum=args.accum, steps=args.steps, seed=args.seed, rows=args.batch
    )
    common = {"clip": not args.no_clip, "lr": _LR, "seed": args.seed, "dtype": "bfloat16", "device": "cuda"}
    in_dram = synthetic.settings(model, None, gpu=args.gpu, **common)
    on_ssd = synthetic.settings(model, run, gpu=args.gpu, dram=args.dram, **common)
    for compute in ("autocast", "bfloat16"):
        plain = _plain(model, compute, clip=not args.no_clip)
        yield Case(part=part, name=f"all on the GPU, {compute}", compute=compute, plain=plain, batches=tokens)
    for where, settings in (("state in DRAM", in_dram), (f"state on SSD, --dram {args.dram}", on_ssd)):
        yield Case(
            part=part,
            name=where,
            compute="bfloat16",
            settings=settings,
            batches=tokens,
            reference="all on the GPU, autocast",
        )


def _plain(model: Path, compute: str, *, clip: bool = True) -> dict[str, Any]:
    return {
        "model": str(model),
        "lr": _LR,
        "max_grad_norm": 1.0 if clip else 0.0,
        "device": "cuda",
        "compute": compute,
    }


def _run(case: Case, parameters: int, outcome: Outcome) -> None:
    say(f"{case.part}: {case.name}")
    settings = dict(case.settings or {})
    if case.smallest_dram:
        settings["dram"] = synthetic.dram_budget("smallest", settings, case.batches)
    with _watching() as device:
        if case.plain is not None:
            result = run_child("train_plain", {**case.plain, "batches": case.batches})
        else:
            result = run_child("train_memopt", {"settings": settings, "batches": case.batches})
    outcome.losses[case.name] = result["losses"]
    outcome.step_s[case.name] = median(kept(result["step_s"]))
    row = _row(case, parameters, result, device, outcome)
    outcome.rows.append(row)
    outcome.table.add(row, _cells(row))
    outcome.failures += _broken(row)


def _row(case: Case, parameters: int, result: dict[str, Any], device: DeviceWatch, outcome: Outcome) -> dict[str, Any]:
    tokens = case.batches["rows"] * case.batches["seq"] * case.batches["accum"]
    step_s = outcome.step_s[case.name]
    theirs = outcome.losses.get(case.reference or "")
    baseline = outcome.step_s.get("all on the GPU, autocast") if case.part == "speed" else None
    moved = {name: kept(result.get(name) or []) for name in ("ssd_read_bytes", "ssd_write_bytes")}
    return {
        "benchmark": "gpu_finetune",
        "part": case.part,
        "name": case.name,
        "compute": case.compute,
        "is_memopt": case.plain is None,
        "parameters": parameters,
        "batches": case.batches,
        "step_s": step_s,
        "steps_s": result["step_s"],
        "tokens_per_s": tokens / step_s,
        "over_autocast": step_s / baseline if baseline else None,
        "nvidia_smi_growth_bytes": device.growth_bytes,
        "read_per_parameter": median(moved["ssd_read_bytes"]) / parameters if moved["ssd_read_bytes"] else None,
        "written_per_parameter": median(moved["ssd_write_bytes"]) / parameters if moved["ssd_write_bytes"] else None,
        "waited_s": median(kept(result["waited_s"])) if result.get("waited_s") else None,
        "loss_difference": _difference(result["losses"], theirs) if theirs else None,
        "tolerance": _TOLERANCE[case.compute],
        **{name: result.get(name) for name in _COPIED},
    }


_COPIED = (
    "losses",
    "verdict",
    "peak_bytes",
    "hwm_bytes",
    "dram_budget_bytes",
    "predicted_bytes",
    "gpu_budget_bytes",
    "gpu_peak_bytes",
    "gpu_predicted_bytes",
    "torch_allocated_peak_bytes",
    "torch_reserved_peak_bytes",
    "io_busy_s",
    "plan",
    "reasons",
)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["part"],
        row["name"],
        row["compute"],
        number(row["step_s"], 3),
        number(row["tokens_per_s"], 0),
        number(row["over_autocast"]),
        f"{mib(row['gpu_peak_bytes'])} of {mib(row['gpu_budget_bytes'])}",
        mib(row["nvidia_smi_growth_bytes"]),
        mib(row["torch_reserved_peak_bytes"]),
        f"{mib(row['peak_bytes'])} of {mib(row['dram_budget_bytes'])}",
        f"{number(row['read_per_parameter'], 1)}, {number(row['written_per_parameter'], 1)}",
        number(row["waited_s"], 3),
        f"{row['losses'][0]:.5f}, {row['losses'][-1]:.5f}",
        "-" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}",
    ]


def _broken(row: dict[str, Any]) -> list[str]:
    """The claims this row does not keep."""
    broken = []
    difference = row["loss_difference"]
    if difference is not None and not difference <= row["tolerance"]:
        broken.append(f"{row['part']}, {row['name']}: losses differ by {difference:.1e}")
    if row["verdict"] == "over":
        broken.append(f"{row['part']}, {row['name']}: over a budget")
    growth, budget = row["nvidia_smi_growth_bytes"], row["gpu_budget_bytes"]
    if row["part"] == "speed" and growth is not None and budget is not None and growth > budget:
        broken.append(f"{row['name']}: the device grew by {mib(growth)} MiB, the GPU budget is {mib(budget)} MiB")
    return broken


def _difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _pinned(outcome: Outcome) -> None:
    result = run_child("pinned", {"nbytes": _PINNED_BYTES})
    outcome.rows.append({"benchmark": "gpu_finetune", "part": "pinned", **result})
    print(json.dumps(outcome.rows[-1]))
    outcome.table.note(
        f"Region of {mib(_PINNED_BYTES)} MiB: registered {result['registered']}, torch sees it pinned "
        f"{result['is_pinned']}; to the device {gib(result['pinned_per_s'])} GiB/s, from pageable memory "
        f"{gib(result['pageable_per_s'])} GiB/s."
    )
    if not (result["registered"] and result["is_pinned"]):
        outcome.failures.append("memopt's region is not pinned")


def _guard(outcome: Outcome, name: str, work: Callable[[], None]) -> None:
    """A child that fails is reported; the others still run."""
    try:
        work()
    except ChildFailed as error:
        outcome.failures.append(f"{name}: {error}")
        say(outcome.failures[-1])


@contextlib.contextmanager
def _watching() -> Iterator[DeviceWatch]:
    """Follow the first device's memory from outside while the block runs."""
    watch = DeviceWatch()
    if shutil.which("nvidia-smi") is None:
        yield watch
        return
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    watch.before_bytes = watch.peak_bytes = _mib_of(subprocess.run(query, capture_output=True, text=True).stdout)
    process = subprocess.Popen([*query, "-lms", str(_SAMPLE_MS)], stdout=subprocess.PIPE, text=True)

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            used = _mib_of(line)
            if used is not None:
                watch.peak_bytes = max(watch.peak_bytes or 0, used)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        process.terminate()
        process.wait()
        thread.join()


def _mib_of(line: str) -> int | None:
    text = line.strip()
    return int(text) * MiB if text.isdigit() else None


def _does_not_fit(case: Case, parameters: int, free_bytes: int) -> str | None:
    if case.plain is None:
        return None
    need = parameters * _PLAIN_BYTES_PER_PARAMETER[case.compute]
    return None if need < free_bytes else f"it needs {gib(need)} GiB of GPU memory, {gib(free_bytes)} are free"


def _shape(args: argparse.Namespace, part: str) -> str:
    return str(args.small_shape if part == "correct" else args.shape)


def _stored(part: str) -> str:
    """Both sides load the same numbers from either; bfloat16 halves the file of the large one."""
    return "float32" if part == "correct" else "bfloat16"


def _check(args: argparse.Namespace) -> None:
    """Build every child's settings and print them."""
    import memopt

    for part in args.parts:
        for case in _cases(args, Path("WORK"), part) if part != "pinned" else ():
            if case.settings is not None:
                memopt.FinetuneConfig.of(**case.settings)
            print(json.dumps({"part": part, "name": case.name, "settings": case.settings or case.plain}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_finetune", description="See the module's text.")
    parser.add_argument("--parts", type=_parts, default=",".join(PARTS), help="pinned, correct, speed")
    parser.add_argument("--shape", choices=list(synthetic.SHAPES), default="1b", help="of the speed part")
    parser.add_argument("--small-shape", choices=list(synthetic.SHAPES), default="small", help="of the correct part")
    parser.add_argument("--gpu", default="6GiB", help="GPU budget of the speed part, CUDA context included")
    parser.add_argument("--dram", default="8GiB", help="DRAM budget of the run with its state on SSD")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1, help="sequences per micro-batch")
    parser.add_argument("--accum", type=int, default=4)
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--steps", type=int, default=6, help="steps of each child, the first two dropped")
    parser.add_argument("--probe-bytes", default="512MiB", help="file size of the raw disk measurement")
    parser.add_argument("--dir", help="where to work, on an SSD; default: here. Needs 32 B/parameter")
    parser.add_argument("--out", type=Path, help="write all rows to this JSON file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="check and print the settings, measure nothing")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    args.probe = parse_bytes(args.probe_bytes, field="--probe-bytes")
    if args.steps < 3:
        parser.error("--steps: the first two are dropped; give at least 3")
    return args


def _parts(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
