"""The Triton kernels of thin keys against plain sums over dense keys, by Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from memopt.errors import BadInput  # noqa: E402
from memopt.kv import triton_thin  # noqa: E402

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""The interpreter multiplies the bits of bfloat16 as if they were whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Requests with (context, new) tokens each, and the shape of a layer."""

    requests: tuple[tuple[int, int], ...]
    heads: int = 2
    group: int = 2
    full: int = 24
    kept: int = 16
    values: int = 24
    block: int = 16
    rest_block: int = 48
    window: int | None = 5
    dtype: torch.dtype = torch.float32
    rows: int = 16


CASES = [
    Case(requests=((37, 1), (0, 1), (200, 1))),
    Case(requests=((37, 1), (64, 1)), window=None),
    Case(requests=((0, 37), (20, 13), (3, 1)), full=40, kept=24, values=33),
    Case(requests=((0, 70),), heads=1, group=8, full=64, kept=32, values=64, window=32),
    Case(requests=((5, 3), (129, 2)), heads=3, group=1, full=17, kept=16, values=8, block=8, rest_block=8, window=100),
    Case(requests=((33, 1), (90, 4)), group=3, window=0),
    Case(requests=((33, 1), (90, 40)), kept=24, window=None),
    Case(requests=((0, 45), (70, 21)), rows=32, group=3),
    Case(requests=((150, 1), (61, 5)), dtype=HALF, full=64, kept=40, values=64),
]


@dataclass(frozen=True, kw_only=True)
class Made:
    """Random keys and values of all requests, dense, and the same in pages."""

    case: Case
    keys: list[torch.Tensor]  # (T, H_kv, D)
    values: list[torch.Tensor]  # (T, H_kv, D_v)
    query: torch.Tensor  # (new tokens, H_q, D)
    pages: triton_thin.ThinPages
    tables: triton_thin.Tables
    exact_from: list[int]

    def attend(self, splits: int = 1, soft_cap: float = 0.0) -> torch.Tensor:
        new = [n for _, n in self.case.requests]
        tiles, queries = triton_thin.query_tiles(new, self.case.group, self.case.rows)
        return self._run(tiles, queries, splits=splits, soft_cap=soft_cap)

    def _run(self, tiles: torch.Tensor, queries: int, **options: Any) -> torch.Tensor:
        new = [n for _, n in self.case.requests]
        return triton_thin.attend(
            self.query,
            self.pages,
            self.tables,
            torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32, device=DEVICE),
            torch.tensor([c + n for c, n in self.case.requests], dtype=torch.int32, device=DEVICE),
            tiles.to(DEVICE),
            queries=queries,
            scale=self.case.full**-0.5,
            **options,
        )

    def some(self, number: int, splits: int, out: torch.Tensor) -> None:
        """The attention of one request alone, into `out` of all."""
        new = [n if r == number else 0 for r, (_, n) in enumerate(self.case.requests)]
        tiles, queries = triton_thin.query_tiles(new, self.case.group, self.case.rows)
        self._run(tiles, queries, splits=splits, out=out)

    def expected(self, soft_cap: float = 0.0) -> torch.Tensor:
        """Dense attention in which dropped channels of older tokens are zeros."""
        out, done = [], 0
        for r, (context, new) in enumerate(self.case.requests):
            key = self.keys[r].float().clone()
            for h in range(self.case.heads):
                dropped = self.pages.channels[h, self.case.kept :].cpu().long()
                rows = torch.arange(self.exact_from[r])
                key[rows[:, None], h, dropped[None, :]] = 0
            for i in range(new):
                q = self.query[done + i].float().cpu()
                for head in range(self.case.heads * self.case.group):
                    h = head // self.case.group
                    upto = context + i + 1
                    score = key[:upto, h] @ q[head] * self.case.full**-0.5
                    score = soft_cap * torch.tanh(score / soft_cap) if soft_cap else score
                    out.append(score.softmax(0) @ self.values[r][:upto, h].float())
            done += new
        return torch.stack(out).view(done, self.case.heads * self.case.group, self.case.values)


def made(case: Case, *, null_from: int | None = None) -> Made:
    """`null_from`: the rest table of request 0 is empty from this block on backwards, as after a prefix hit."""
    draw = torch.Generator().manual_seed(len(case.requests) * case.full)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(case.dtype)

    lengths = [c + n for c, n in case.requests]
    keys = [random(n, case.heads, case.full) for n in lengths]
    values = [random(n, case.heads, case.values) for n in lengths]
    channels = torch.stack([torch.randperm(case.full, generator=draw) for _ in range(case.heads)]).to(torch.int32)
    blocks = [-(-n // case.block) for n in lengths]
    order = torch.randperm(sum(blocks), generator=draw)
    thin = torch.full((sum(blocks), case.heads, case.block, case.kept + case.values), float("nan"), dtype=case.dtype)
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    rest_blocks = [-(-n // case.rest_block) for n in lengths]
    rest = torch.full(
        (1 + sum(rest_blocks), case.heads, case.rest_block, case.full - case.kept), float("nan"), dtype=case.dtype
    )
    rest_table = torch.zeros(len(lengths), max(rest_blocks), dtype=torch.int32)
    slots, rest_slots, taken, rest_taken = [], [], 0, 1
    for r, n in enumerate(lengths):
        table[r, : blocks[r]] = order[taken : taken + blocks[r]]
        rest_table[r, : rest_blocks[r]] = torch.arange(rest_taken, rest_taken + rest_blocks[r])
        taken, rest_taken = taken + blocks[r], rest_taken + rest_blocks[r]
        t = torch.arange(n)
        slots.append(table[r, t // case.block].long() * case.block + t % case.block)
        rest_slots.append(rest_table[r, t // case.rest_block].long() * case.rest_block + t % case.rest_block)
    window = 0 if case.window is None else case.window
    exact = [n if case.window is None else max(0, c - window) for (c, _), n in zip(case.requests, lengths, strict=True)]
    if null_from is not None:
        rest_table[0, :null_from] = 0
        exact[0] = max(exact[0], null_from * case.rest_block)
    pages = triton_thin.ThinPages(thin=thin.to(DEVICE), channels=channels.to(DEVICE), kept=case.kept)
    tables = triton_thin.Tables(thin=table.to(DEVICE))
    if case.window is not None and case.full > case.kept:
        given = exact if null_from is None else [max(0, c - window) for c, _ in case.requests]
        pages = replace(pages, rest=rest.to(DEVICE))
        tables = replace(
            tables,
            rest=rest_table.to(DEVICE),
            exact_from=torch.tensor(given, dtype=torch.int32, device=DEVICE),
        )
    triton_thin.write(
        torch.cat(keys).to(DEVICE),
        torch.cat(values).to(DEVICE),
        pages,
        torch.cat(slots).to(DEVICE),
        None if pages.rest is None else torch.cat(rest_slots).to(DEVICE),
    )
    query = random(sum(n for _, n in case.requests), case.heads * case.group, case.full).to(DEVICE)
    return Made(case=case, keys=keys, values=values, query=query, pages=pages, tables=tables, exact_from=exact)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("case", "splits"),
    [(case, 1) for case in CASES] + [(CASES[0], 3), (CASES[2], 2), (CASES[5], 7)],
    ids=lambda each: (
        f"{each.requests}-{each.kept}of{each.full}-w{each.window}" if isinstance(each, Case) else str(each)
    ),
)
def test_thin_attention_is_dense_attention_with_zeros(case: Case, splits: int) -> None:
    this = made(case)
    close(this.attend(splits), this.expected(), case.dtype)


@pytest.mark.parametrize("splits", [1, 3])
def test_requests_without_tiles_are_left_alone(splits: int) -> None:
    this = made(Case(requests=((37, 1), (150, 9), (20, 3))))
    whole, out = this.attend(splits), torch.full_like(this.query[..., : this.case.values], 7.0)
    this.some(1, splits, out)
    assert torch.equal(out[1:10], whole[1:10])
    assert bool((out[:1] == 7.0).all())
    assert bool((out[10:] == 7.0).all())


def test_a_soft_cap_is_applied_to_whole_scores() -> None:
    this = made(CASES[0])
    this = replace(this, query=this.query * 8)
    assert not torch.allclose(this.expected(2.0), this.expected(), atol=1e-2)
    close(this.attend(soft_cap=2.0), this.expected(2.0), torch.float32)


def test_tokens_whose_dropped_channels_are_nowhere_have_only_the_kept_ones() -> None:
    # block 0 in the table of dropped channels: a prefix found in the cache, whose window is long gone
    this = made(Case(requests=((90, 2),), window=80), null_from=1)
    assert 0 < this.exact_from[0] < 90
    close(this.attend(), this.expected(), torch.float32)


def test_slots_below_zero_are_not_written() -> None:
    case = Case(requests=((0, 4),), window=None)
    this = made(case)
    before = this.pages.thin.clone()
    slots = torch.full((4,), -1, dtype=torch.int64, device=DEVICE)
    triton_thin.write(this.keys[0].to(DEVICE) + 1, this.values[0].to(DEVICE), this.pages, slots)
    assert torch.equal(before.nan_to_num(), this.pages.thin.nan_to_num())


def test_bad_shapes_are_refused() -> None:
    this = made(CASES[0])
    pages = this.pages
    with pytest.raises(BadInput, match="kept = 0"):
        replace(pages, kept=0)
    with pytest.raises(BadInput, match="do not fit 2 KV heads"):
        replace(pages, thin=pages.thin[:, :1])
    with pytest.raises(BadInput, match="give all three or none"):
        replace(this, tables=replace(this.tables, exact_from=None)).attend()
    with pytest.raises(BadInput, match="do not hold 8 channels"):
        assert pages.rest is not None
        replace(pages, rest=pages.rest[..., :3])
    with pytest.raises(BadInput, match="contiguous"):
        replace(pages, thin=pages.thin.transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(BadInput, match="give them exactly when"):
        triton_thin.write(torch.zeros(1, 2, 24), torch.zeros(1, 2, 24), pages, torch.zeros(1, dtype=torch.int64))
