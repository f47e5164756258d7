"""Bytes, decode time and prefill time of ThinKCache on a CPU, beside the stock cache and other ThinKs.

Decode: all contenders live in one process and take turns token by token, so that a slow moment meets all of them;
ratios to the stock cache are made within a round, then their median is taken. Their caches are filled with random keys
and values of the model's shape (what a channel or a row costs does not depend on what it holds); the forward passes
are whole ones, weights included. "keep 1.0" is the control that prunes nothing: what growing in place saves alone.
"reference's algorithm" is the authors' repository's decode (keys per query head, a cat per token) in our words.

Prefill: every contender in a process of its own on a real forward pass; the process's memory is the kernel's high-water
mark, reset before the pass, less what was resident before. kvpress (`--kvpress DIR`, made by `pip install --no-deps
--target DIR kvpress` with the transformers it asks for) zeroes channels and keeps them; it runs there only, with its
own stock cache beside it.

Targets: at keep 0.6 the cache is 18.75 % smaller (80 of 128 channels, as 76.8 is rounded up to a multiple of 8) and at
0.5 25 %, and a token takes no longer than with the stock cache from 8192 tokens of context on. Exits 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    RESULT_MARK,
    ROOT,
    ChildFailed,
    Table,
    machine_facts,
    median,
    mib,
    number,
    say,
)
from benchmarks.think_contenders import DROPPED, MODEL, REFERENCE, SETTINGS, STOCK

DECODE_COLUMNS = ("type", "context", "batch", "cache", "KV MiB", "of stock", "ms/token", "CPU ms/token", "of stock's")
PREFILL_COLUMNS = (
    "type",
    "context",
    "batch",
    "cache",
    "prefill ms",
    "CPU ms",
    "KV MiB",
    "process peak MiB",
    "after MiB",
)
_BYTES = {"keep 0.6": 0.8125, "keep 0.5": 0.75}
_SLACK = 0.01
"""Of all bytes: the newest tokens, which stay whole, and spare rows, at 8192 tokens of context."""


def main() -> int:
    """Measure; 1 where a target is missed."""
    args = _arguments()
    facts = machine_facts(Path.cwd(), args.seed, None)
    facts["model"] = ", ".join(f"{key} {value}" for key, value in MODEL.items()) + f"; {args.threads} thread(s)"
    held = [_decode(args, facts)]
    held.append(_prefill(args, facts))
    return 0 if all(held) else 1


def _decode(args: argparse.Namespace, facts: dict[str, str]) -> bool:
    table = Table("think_cache", DECODE_COLUMNS, facts, record=args.record)
    good = True
    for dtype in args.types:
        for tokens in args.contexts:
            for batch in args.batches:
                element = 2 if dtype == "bfloat16" else 4
                stock = 2 * element * batch * tokens * MODEL["num_hidden_layers"] * MODEL["num_key_value_heads"]
                if stock * MODEL["head_dim"] > args.most_mib * 2**20:
                    table.note(
                        f"{dtype}, {tokens} x {batch}: left out, the stock cache alone would pass {args.most_mib} MiB"
                    )
                    continue
                names = [STOCK, *SETTINGS, *([REFERENCE] if tokens * batch <= args.reference_tokens else [])]
                say(f"decode: {dtype}, {tokens} tokens of context, batch {batch}")
                got = _child("decode", _common(args, dtype, tokens, batch) | {"names": names})
                for name in names:
                    row = _row(got, name) | {"dtype": dtype, "context": tokens, "batch": batch, "cache": name}
                    good &= _meets(row)
                    table.add(
                        row,
                        (dtype, str(tokens), str(batch), name, number(row["bytes"] / 2**20, 1))
                        + (number(row["bytes_of_stock"], 3), number(row["ms"], 1), number(row["cpu_ms"], 1))
                        + (number(row["time_of_stock"], 2),),
                    )
    return good


def _row(got: dict[str, Any], name: str) -> dict[str, Any]:
    wall, cpu = got["wall_ms"][name][DROPPED:], got["cpu_ms"][name][DROPPED:]
    stock = got["cpu_ms"][STOCK][DROPPED:]
    return {
        "bytes": got["bytes"][name],
        "bytes_of_stock": got["bytes"][name] / got["bytes"][STOCK],
        "ms": median(wall),
        "cpu_ms": median(cpu),
        # of CPU times: other processes on the machine lengthen the wall's, not these
        "time_of_stock": median([mine / theirs for mine, theirs in zip(cpu, stock, strict=True)]),
        "rounds": len(wall),
    }


def _meets(row: dict[str, Any]) -> bool:
    if row["context"] < 8192 or row["cache"] not in _BYTES:
        return True
    fine = row["bytes_of_stock"] <= _BYTES[row["cache"]] + _SLACK and row["time_of_stock"] <= 1.0
    if not fine:
        say(f"missed: {row}")
    return fine


def _prefill(args: argparse.Namespace, facts: dict[str, str]) -> bool:
    table = Table("think_cache", PREFILL_COLUMNS, facts, record=args.record)
    names = [STOCK, *SETTINGS, *(["kvpress ThinKPress 0.4"] if args.kvpress else [])]
    for dtype in args.types:
        for tokens in args.prefill_contexts:
            for name in names:
                say(f"prefill: {dtype}, {tokens} tokens, {name}")
                kvpress = args.kvpress if name.startswith("kvpress") else None
                got = _child("prefill", _common(args, dtype, tokens, 1) | {"name": name}, path=kvpress)
                table.add(
                    got | {"dtype": dtype, "context": tokens, "batch": 1, "cache": name},
                    (dtype, str(tokens), "1", name, number(got["wall_ms"], 0), number(got["cpu_ms"], 0))
                    + (number(got["bytes"] / 2**20, 1), mib(got["peak_bytes"]), mib(got["after_bytes"])),
                )
                if kvpress:
                    pairs = zip(got["decode_cpu_ms"]["kvpress"], got["decode_cpu_ms"]["stock"], strict=True)
                    ratio = median([mine / theirs for mine, theirs in list(pairs)[DROPPED:]])
                    spent = median(got["decode_cpu_ms"]["kvpress"][DROPPED:])
                    table.note(
                        f"kvpress, transformers {got['transformers']}: a token takes {spent:.1f} CPU ms, {ratio:.2f} of"
                        " its own stock cache's."
                    )
    return True


def _common(args: argparse.Namespace, dtype: str, tokens: int, batch: int) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "tokens": tokens,
        "batch": batch,
        "seed": args.seed,
        "threads": args.threads,
        "rounds": args.rounds,
    }


def _child(name: str, arguments: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path.resolve()), str(ROOT)])
    command = [sys.executable, "-m", "benchmarks.think_contenders", name, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(RESULT_MARK)), None)
    if done.returncode or last is None:
        raise ChildFailed(f"{name} ended with {done.returncode}: " + "\n".join(done.stderr.splitlines()[-8:]))
    result: dict[str, Any] = json.loads(last[len(RESULT_MARK) :])
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--contexts", type=numbers, default=[1024, 8192, 32768])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--prefill-contexts", type=numbers, default=[1024, 4096])
    parser.add_argument("--types", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most-mib", type=int, default=600, help="leave out where the stock cache is larger")
    parser.add_argument("--reference-tokens", type=int, default=32768, help="the reference's algorithm up to so many")
    parser.add_argument("--kvpress", type=Path, help="a directory that pip installed kvpress and its needs to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
