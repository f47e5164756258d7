"""Attention over paged thin keys on a GPU, in one pass: ThinK's kept channels of every token, dropped ones where held.

    score(i, t) = scale * (q_i[kept] . k_t[kept] + [t is exact] q_i[dropped] . k_t[dropped]),   causal softmax, times V

A page holds, per KV head and token, `kept` key channels and then the value; the dropped channels of the newest tokens
(the recent window, or the whole prompt while it is prefilled) lie in pages of their own, with a table of their own.
Queries are gathered inside the kernel, so nothing dense is ever made. One request's tokens can be cut into splits
(flash decoding), which a second small kernel joins. Needs triton; runs on CPU tensors with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from memopt.errors import BadInput

_ROWS = 16
"""Rows of a tile at least: what the matrix units take."""
_TILE_BYTES = 40 * 2**10
"""Keys and values a tile of 16 rows multiplies at once: with what Triton adds, all of it fits in the 99 KiB of shared
memory that a block has on the smallest cards (compute capability 8.6 and 8.9)."""
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, kw_only=True)
class ThinPages:
    """The caches of one layer. Strides are free, but the last dimension is contiguous."""

    thin: torch.Tensor  # (blocks, H_kv, block_size, kept + D_v)
    channels: torch.Tensor  # (H_kv, D) int32 or int64: the kept ones, then the dropped ones
    kept: int
    rest: torch.Tensor | None = None  # (blocks, H_kv, block_size', D - kept)

    def __post_init__(self) -> None:
        heads, full = self.channels.shape
        if not 0 < self.kept <= full:
            raise BadInput(f"kept = {self.kept}: must be from 1 to the {full} channels of a head")
        if self.thin.shape[1] != heads or self.thin.shape[3] <= self.kept:
            raise BadInput(
                f"thin pages {tuple(self.thin.shape)} do not fit {heads} KV heads with {self.kept} kept channels and a "
                "value: (blocks, heads, block size, kept + value channels) is wanted"
            )
        if self.rest is not None and self.rest.shape[1:4:2] != (heads, full - self.kept):
            raise BadInput(
                f"rest pages {tuple(self.rest.shape)} do not hold {full - self.kept} channels of {heads} heads"
            )
        if any(each is not None and each.stride(-1) != 1 for each in (self.thin, self.rest)):
            raise BadInput("the channels of a page must be contiguous")


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Where the pages of R requests are.

    `exact_from`: the first position of each request whose dropped channels are in the rest pages; needed with those, as
    is `rest`. Block 0 of the rest pages is nobody's (vLLM's null block): tokens whose table says 0 have only their kept
    channels.
    """

    thin: torch.Tensor  # (R, n) int32
    rest: torch.Tensor | None = None  # (R, n') int32
    exact_from: torch.Tensor | None = None  # (R,) int32


def write(
    key: torch.Tensor,  # (T, H_kv, D)
    value: torch.Tensor,  # (T, H_kv, D_v)
    pages: ThinPages,
    slots: torch.Tensor,  # (T,) int64: block * block_size + offset; below zero: not written
    rest_slots: torch.Tensor | None = None,  # (T,) int64, into `rest`
) -> None:
    """Put new keys and values into the pages: channels are gathered on the way. `rest_slots` is needed with `rest`."""
    tokens, heads, full = key.shape
    if tokens == 0:
        return
    if (pages.rest is None) != (rest_slots is None):
        raise BadInput("rest_slots say where the dropped channels go: give them exactly when the pages have a rest")
    dropped = full - pages.kept
    rest = pages.rest if pages.rest is not None else pages.thin
    _write[(tokens, heads)](
        key,
        value,
        pages.thin,
        rest,
        pages.channels,
        slots,
        rest_slots if rest_slots is not None else slots,
        *key.stride()[:2],
        *value.stride()[:2],
        *pages.thin.stride()[:3],
        *rest.stride()[:3],
        pages.channels.stride(0),
        pages.thin.shape[2],
        rest.shape[2],
        KEPT=pages.kept,
        DROPPED=dropped if pages.rest is not None else 0,
        VALUE=value.shape[2],
        BLOCK_KEPT=_power(pages.kept),
        BLOCK_DROPPED=_power(max(dropped, 1)),
        BLOCK_VALUE=_power(value.shape[2]),
    )


def query_tiles(query_lens: list[int], group: int, rows: int = _ROWS) -> tuple[torch.Tensor, int]:
    """Which queries each program works on: ((tiles, 2) int32 of request and first query, queries of a tile).

    `group` query heads share a KV head; the rows of a tile are queries times group. 32 rows read the pages of a long
    prompt half as often as 16, which are enough for a few new tokens.
    """
    queries = max(1, rows // group)
    pairs = [(r, first) for r, length in enumerate(query_lens) for first in range(0, length, queries)]
    return torch.tensor(pairs, dtype=torch.int32).view(-1, 2), queries


def attend(
    query: torch.Tensor,  # (T, H_q, D), the requests one after the other
    pages: ThinPages,
    tables: Tables,
    query_starts: torch.Tensor,  # (R + 1,) int32
    lengths: torch.Tensor,  # (R,) int32: tokens in the pages, the new ones included
    tiles: torch.Tensor,  # (tiles, 2) int32, of query_tiles
    *,
    queries: int,
    scale: float,
    splits: int = 1,
    soft_cap: float = 0.0,
    out: torch.Tensor | None = None,  # (T, H_q, D_v)
) -> torch.Tensor:
    """(T, H_q, D_v): causal attention of the newest tokens of every request over its pages, which hold them already.

    Only the requests of `tiles` are computed; the others' rows of `out` stay as they are.
    `queries` is of `query_tiles`. `splits`: programs that share the tokens of one tile, for few requests with long
    contexts. `soft_cap`: c tanh(s / c) on the scores, 0 for none. Sums are float32.
    """
    heads = pages.channels.shape[0]
    if any((each is None) != (pages.rest is None) for each in (tables.rest, tables.exact_from)):
        raise BadInput("a table of the rest pages and exact_from belong to rest pages: give all three or none")
    if query.shape[1] % heads:
        raise BadInput(f"{query.shape[1]} query heads cannot share {heads} KV heads evenly")
    group = query.shape[1] // heads
    values = pages.thin.shape[3] - pages.kept
    out = query.new_empty(*query.shape[:2], values) if out is None else out
    if query.shape[0] == 0:
        return out
    full = query.shape[2]
    held = pages.rest is not None
    rest = pages.rest if pages.rest is not None else pages.thin
    rest_table = tables.rest if tables.rest is not None else tables.thin
    exact_from = tables.exact_from if tables.exact_from is not None else lengths
    kept_block, dropped_block, wide = (_power(size) for size in (pages.kept, max(full - pages.kept, 1), values))
    rows = max(_ROWS, _power(queries * group))
    tile_bytes = (kept_block + dropped_block + wide) * pages.thin.element_size() * rows // _ROWS
    shape = (splits if splits > 1 else 0, *query.shape[:2])
    partial = torch.empty(*shape, wide, dtype=torch.float32, device=query.device)
    tops, sums = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    _attend[(tiles.shape[0], heads, splits)](
        query,
        pages.thin,
        rest,
        pages.channels,
        tables.thin,
        rest_table,
        exact_from,
        query_starts,
        lengths,
        tiles,
        out,
        partial,
        tops,
        sums,
        scale,
        soft_cap,
        *query.stride()[:2],
        *pages.thin.stride()[:3],
        *rest.stride()[:3],
        pages.channels.stride(0),
        tables.thin.stride(0),
        rest_table.stride(0),
        *out.stride()[:2],
        query.shape[0],
        query.shape[1],
        GROUP=group,
        QUERIES=queries,
        ROWS=rows,
        TOKENS=max(16, min(64, 1 << (_TILE_BYTES // tile_bytes).bit_length() - 1)),  # a power of two
        BLOCK=pages.thin.shape[2],
        REST_BLOCK=rest.shape[2],
        KEPT=pages.kept,
        DROPPED=full - pages.kept if held else 0,
        VALUE=values,
        BLOCK_KEPT=kept_block,
        BLOCK_DROPPED=dropped_block,
        BLOCK_VALUE=wide,
        SPLITS=splits,
        CAPPED=soft_cap > 0,
    )
    if splits > 1:
        _join[(tiles.shape[0], queries, query.shape[1])](
            partial,
            tops,
            sums,
            query_starts,
            tiles,
            out,
            *out.stride()[:2],
            *query.shape[:2],
            VALUE=values,
            BLOCK_VALUE=wide,
            SPLITS=splits,
        )
    return out


def _power(size: int) -> int:
    """The next power of two, of at least what a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    key, value, thin, rest, channels, slots, rest_slots,
    key_t, key_h, value_t, value_h, thin_b, thin_h, thin_n, rest_b, rest_h, rest_n, channels_h, block_size, rest_size,
    KEPT: tl.constexpr, DROPPED: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_KEPT: tl.constexpr, BLOCK_DROPPED: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + t)
    if slot >= 0:
        page = thin + slot // block_size * thin_b + h * thin_h + slot % block_size * thin_n
        i = tl.arange(0, BLOCK_KEPT)
        channel = tl.load(channels + h * channels_h + i, mask=i < KEPT, other=0)
        tl.store(page + i, tl.load(key + t * key_t + h * key_h + channel, mask=i < KEPT, other=0.0), mask=i < KEPT)
        j = tl.arange(0, BLOCK_VALUE)
        found = tl.load(value + t * value_t + h * value_h + j, mask=j < VALUE, other=0.0)
        tl.store(page + KEPT + j, found, mask=j < VALUE)
    if DROPPED > 0:
        rest_slot = tl.load(rest_slots + t)
        if rest_slot >= 0:
            page = rest + rest_slot // rest_size * rest_b + h * rest_h + rest_slot % rest_size * rest_n
            i = tl.arange(0, BLOCK_DROPPED)
            channel = tl.load(channels + h * channels_h + KEPT + i, mask=i < DROPPED, other=0)
            found = tl.load(key + t * key_t + h * key_h + channel, mask=i < DROPPED, other=0.0)
            tl.store(page + i, found, mask=i < DROPPED)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, thin, rest, channels, table, rest_table, exact_from, query_starts, lengths, tiles,
    out, partial, tops, sums, scale, soft_cap,
    query_t, query_h, thin_b, thin_h, thin_n, rest_b, rest_h, rest_n, channels_h, table_r, rest_table_r, out_t, out_h,
    total, query_heads,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    KEPT: tl.constexpr, DROPPED: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_KEPT: tl.constexpr, BLOCK_DROPPED: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    SPLITS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    tile, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = tl.load(tiles + 2 * tile).to(tl.int64)
    first = tl.load(tiles + 2 * tile + 1)
    start, end = tl.load(query_starts + r), tl.load(query_starts + r + 1)
    length = tl.load(lengths + r)
    exact = tl.load(exact_from + r)

    row = tl.arange(0, ROWS)
    mine = first + row // GROUP  # which of the request's queries
    inside = (row < QUERIES * GROUP) & (mine < end - start)
    token = (start + mine).to(tl.int64)
    head = h * GROUP + row % GROUP
    position = length - (end - start) + mine

    i = tl.arange(0, BLOCK_KEPT)
    channel = tl.load(channels + h * channels_h + i, mask=i < KEPT, other=0)
    at = token[:, None] * query_t + head[:, None] * query_h
    q = tl.load(query + at + channel[None, :], mask=inside[:, None] & (i < KEPT)[None, :], other=0.0)
    j = tl.arange(0, BLOCK_DROPPED)
    rest_channel = tl.load(channels + h * channels_h + KEPT + j, mask=j < DROPPED, other=0)
    q_rest = tl.load(query + at + rest_channel[None, :], mask=inside[:, None] & (j < DROPPED)[None, :], other=0.0)

    # the tokens before the last query of the tile, shared out among the splits in whole tiles
    last = tl.minimum(length, length - (end - start) + first + QUERIES)
    share = tl.cdiv(tl.cdiv(last, TOKENS), SPLITS) * TOKENS
    low = split * share
    high = tl.minimum(last, low + share)

    d = tl.arange(0, BLOCK_VALUE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total_p = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    for base in range(low, high, TOKENS):
        t = base + tl.arange(0, TOKENS)
        there = t < high
        block = tl.load(table + r * table_r + t // BLOCK, mask=there, other=0).to(tl.int64)
        page = thin + block * thin_b + h * thin_h + t % BLOCK * thin_n
        k = tl.load(page[None, :] + i[:, None], mask=there[None, :] & (i < KEPT)[:, None], other=0.0)
        score = tl.dot(q, k, input_precision="ieee")
        if DROPPED > 0:  # noqa: SIM102 - known when the kernel is compiled; the other condition is not
            if base + TOKENS > exact:
                held = there & (t >= exact)
                more = tl.load(rest_table + r * rest_table_r + t // REST_BLOCK, mask=held, other=0).to(tl.int64)
                held = held & (more > 0)
                rest_page = rest + more * rest_b + h * rest_h + t % REST_BLOCK * rest_n
                k_rest = tl.load(
                    rest_page[None, :] + j[:, None], mask=held[None, :] & (j < DROPPED)[:, None], other=0.0
                )
                score += tl.dot(q_rest, k_rest, input_precision="ieee")
        score = score * scale
        if CAPPED:
            twice = tl.exp2(score * (2.0 * _LOG2E / soft_cap))
            score = soft_cap * (1.0 - 2.0 / (twice + 1.0))
        seen = there[None, :] & (t[None, :] <= position[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        # a row that has seen nothing yet must not subtract infinity from infinity
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2((score - safe[:, None]) * _LOG2E)
        shrink = tl.exp2((top - safe) * _LOG2E)
        total_p = total_p * shrink + tl.sum(p, 1)
        v = tl.load(page[:, None] + KEPT + d[None, :], mask=there[:, None] & (d < VALUE)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new

    if SPLITS == 1:
        place = out + token[:, None] * out_t + head[:, None] * out_h + d[None, :]
        result = acc / tl.maximum(total_p, 1e-30)[:, None]
        tl.store(place, result.to(out.dtype.element_ty), mask=inside[:, None] & (d < VALUE)[None, :])
    else:
        at = (split * total + token) * query_heads + head
        tl.store(partial + at[:, None] * BLOCK_VALUE + d[None, :], acc, mask=inside[:, None])
        tl.store(tops + at, top, mask=inside)
        tl.store(sums + at, total_p, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    partial, tops, sums, query_starts, tiles, out, out_t, out_h, total, query_heads,
    VALUE: tl.constexpr, BLOCK_VALUE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(2)
    r = tl.load(tiles + 2 * tile).to(tl.int64)
    token = (tl.load(query_starts + r) + tl.load(tiles + 2 * tile + 1) + tl.program_id(1)).to(tl.int64)
    if token < tl.load(query_starts + r + 1):
        d = tl.arange(0, BLOCK_VALUE)
        highest = float("-inf")
        for split in range(SPLITS):
            highest = tl.maximum(highest, tl.load(tops + (split * total + token) * query_heads + head))
        acc = tl.zeros([BLOCK_VALUE], tl.float32)
        weight = 0.0
        for split in range(SPLITS):
            at = (split * total + token) * query_heads + head
            factor = tl.exp2((tl.load(tops + at) - highest) * _LOG2E)
            weight += factor * tl.load(sums + at)
            acc += factor * tl.load(partial + at * BLOCK_VALUE + d)
        result = acc / tl.maximum(weight, 1e-30)
        tl.store(out + token * out_t + head * out_h + d, result.to(out.dtype.element_ty), mask=d < VALUE)
