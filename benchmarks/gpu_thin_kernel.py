"""Decode attention over paged thin keys on a GPU: is the kernel right, and how near is it to the bytes it must read?

One new token for each of B requests of T cached tokens, bfloat16, 8 KV heads of 128 channels, 4 query heads each; the
kernel of memopt/kv/triton_thin.py with all channels, 80 (keep 0.6) and 64 (keep 0.5), a recent window of 32 whole,
against torch's scaled_dot_product_attention on dense contiguous caches. The floor is the bytes of the cache over the
bandwidth of a copy measured in the same run. A and B take turns; medians of CUDA events.

Without CUDA a small case goes through Triton's interpreter, to show that the program works, and nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from benchmarks.harness import Table, machine_facts, number, say  # noqa: E402
from memopt.kv import triton_thin  # noqa: E402
from memopt.units import GiB, MiB  # noqa: E402

COLUMNS = (
    "batch",
    "context",
    "kept of 128",
    "splits",
    "cache MiB",
    "ms",
    "of the floor",
    "dense SDPA ms",
    "thin/dense",
    "error",
)
_WINDOW = 32
_BLOCK = 16
_TURNS = 30


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer and its requests."""

    batch: int
    context: int
    kept: int
    heads: int = 8
    group: int = 4
    full: int = 128


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--kept", type=int, nargs="+", default=[128, 80, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if not torch.cuda.is_available():
        error = Layer(Shape(batch=2, context=70, kept=16, heads=2, full=24), torch.device("cpu"), torch.float16).error()
        say(f"no CUDA device: nothing is timed; the interpreter's largest error on a small case is {error:.1e}")
        return
    facts = machine_facts(Path.cwd(), args.seed, None)
    facts["GPU"] = torch.cuda.get_device_name()
    rate = copy_per_s()
    facts["copy"] = f"{rate / GiB:.0f} GiB/s, read and written bytes together"
    table = Table("gpu_thin_kernel", COLUMNS, facts, record=args.record)
    wrong = False
    for batch in args.batches:
        for context in args.contexts:
            for kept in args.kept:
                wrong |= row(table, Shape(batch=batch, context=context, kept=kept), rate)
    sys.exit(1 if wrong else 0)


def row(table: Table, shape: Shape, rate: float) -> bool:
    """One line; whether the result was wrong."""
    layer = Layer(shape, torch.device("cuda"), torch.bfloat16)
    error = layer.error()
    splits = max(1, min(64, shape.context // 512, 4 * torch.cuda.get_device_properties(0).multi_processor_count
                        // (shape.batch * shape.heads)))  # fmt: skip
    thin, dense = in_turns(lambda: layer.thin(splits), layer.dense)
    floor_s = layer.cache_bytes() / rate
    found = {**vars(shape), "splits": splits, "cache_bytes": layer.cache_bytes(), "thin_s": thin, "dense_s": dense}
    table.add(
        {**found, "floor_s": floor_s, "error": error},
        [
            str(shape.batch), str(shape.context), str(shape.kept), str(splits), f"{layer.cache_bytes() / MiB:.1f}",
            number(1e3 * thin, 4), number(thin / floor_s), number(1e3 * dense, 4), number(thin / dense), f"{error:.1e}",
        ],
    )  # fmt: skip
    return error > 2e-2


class Layer:
    """Random caches of one layer, in pages and dense."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = s = shape
        tokens = s.context + 1
        self.key = torch.randn(s.batch, tokens, s.heads, s.full, device=device, dtype=dtype)
        self.value = torch.randn_like(self.key)
        self.query = torch.randn(s.batch, s.heads * s.group, s.full, device=device, dtype=dtype)
        channels = torch.stack([torch.randperm(s.full) for _ in range(s.heads)]).to(device, torch.int32)
        blocks = -(-tokens // _BLOCK)
        table = (1 + torch.randperm(s.batch * blocks)).view(s.batch, blocks).to(device, torch.int32)
        held = s.kept < s.full

        def pages(width: int) -> torch.Tensor:
            return torch.zeros(1 + s.batch * blocks, s.heads, _BLOCK, width, device=device, dtype=dtype)

        self.pages = triton_thin.ThinPages(
            thin=pages(s.kept + s.full),
            channels=channels,
            kept=s.kept,
            rest=pages(s.full - s.kept) if held else None,
        )
        exact_from = torch.full((s.batch,), tokens - _WINDOW, device=device, dtype=torch.int32)
        self.tables = triton_thin.Tables(
            thin=table, rest=table if held else None, exact_from=exact_from if held else None
        )
        t = torch.arange(tokens, device=device)
        slots = (table[:, t // _BLOCK].long() * _BLOCK + t % _BLOCK).flatten()
        triton_thin.write(
            self.key.flatten(0, 1), self.value.flatten(0, 1), self.pages, slots, slots if held else None
        )  # fmt: skip
        tiles, self.queries = triton_thin.query_tiles([1] * s.batch, s.group)
        self.tiles = tiles.to(device)
        self.starts = torch.arange(s.batch + 1, device=device, dtype=torch.int32)
        self.lengths = torch.full((s.batch,), tokens, device=device, dtype=torch.int32)
        self.dense_key, self.dense_value = (x.transpose(1, 2).contiguous() for x in (self.key, self.value))

    def thin(self, splits: int) -> torch.Tensor:
        """(B, H_q, D)."""
        return triton_thin.attend(
            self.query,
            self.pages,
            self.tables,
            self.starts,
            self.lengths,
            self.tiles,
            queries=self.queries,
            scale=self.shape.full**-0.5,
            splits=splits,
        )

    def dense(self, key: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H_q, D) by torch."""
        key = self.dense_key if key is None else key
        query = self.query.unsqueeze(2)
        return functional.scaled_dot_product_attention(query, key, self.dense_value, enable_gqa=True).squeeze(2)

    def error(self) -> float:
        """Largest difference to dense attention in which the dropped channels of older tokens are zeros."""
        key = self.dense_key.clone()
        for h in range(self.shape.heads):
            dropped = self.pages.channels[h, self.shape.kept :].long()
            key[:, h, : key.shape[2] - _WINDOW, :][..., dropped] = 0
        return float((self.thin(3).float() - self.dense(key).float()).abs().max())

    def cache_bytes(self) -> int:
        """What one decode step must read."""
        s = self.shape
        return s.batch * s.heads * 2 * ((s.context + 1) * (s.kept + s.full) + _WINDOW * (s.full - s.kept))


def in_turns(*calls: Callable[[], object]) -> list[float]:
    """Median seconds of each, taken in turns; the caches of large cases do not stay in L2."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(_TURNS + 3):
        for call, own in zip(calls, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                own.append(begin.elapsed_time(end) / 1e3)
    return [statistics.median(own) for own in times]


def copy_per_s() -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.empty(GiB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (seconds,) = in_turns(lambda: target.copy_(source))
    return 2 * GiB / seconds


if __name__ == "__main__":
    main()
