"""Attention over thin pages against attention over dense keys with zeros, at odd shapes."""

from __future__ import annotations

import pytest
import torch

from memopt.kv import paged
from memopt.kv.channels import choose, complement
from memopt.kv.paged import Suffix, dense_attention, gather_rows, pick, thin_attention, write_rows
from tests.reference.paged import causal


def sets(heads: int, width: int, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    kept = choose(torch.rand(heads, width), keep)
    return kept, complement(kept, width)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "keep", "tokens", "queries", "recent"),
    [(4, 2, 16, 8, 13, 1, 0), (6, 2, 24, 16, 11, 5, 3), (3, 3, 8, 8, 7, 7, 0), (5, 1, 12, 5, 9, 2, 9)],
)
@pytest.mark.parametrize("tile_bytes", [1, 2**20])
def test_pages_give_what_dense_keys_with_zeros_give(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    groups: int,
    width: int,
    keep: int,
    tokens: int,
    queries: int,
    recent: int,
    tile_bytes: int,
) -> None:
    monkeypatch.setattr(paged, "_SCORE_BYTES", tile_bytes)
    torch.manual_seed(heads + tokens)
    query, keys, values = (torch.randn(n, h, width) for n, h in ((queries, heads), (tokens, groups), (tokens, groups)))
    kept, dropped = sets(groups, width, keep)
    page = 4
    cache = torch.full((9, groups, page, keep + width), float("nan"))
    blocks = torch.tensor([7, 2, 5, 1], dtype=torch.int32)
    places = torch.arange(tokens)
    slots = torch.cat((blocks[places // page] * page + places % page, torch.tensor([-1])))
    rows = torch.cat((torch.cat((pick(keys, kept), values), -1), torch.zeros(1, groups, keep + width)))
    write_rows(cache, rows, slots)
    whole = torch.zeros(tokens, dtype=torch.bool)
    suffix = None
    if recent:
        whole[tokens - recent :] = True
        whole[tokens - recent] = False  # its page was given away
        last = pick(keys[tokens - recent :], dropped)
        suffix = Suffix(keys=last, present=whole[tokens - recent :])
    found = thin_attention(query, gather_rows(cache, blocks, tokens), kept, dropped, scale=0.3, suffix=suffix)
    torch.testing.assert_close(found, causal(query, keys, values, kept, whole, 0.3), atol=1e-6, rtol=1e-5)


def test_a_whole_prompt_is_attended_densely() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    kept, _ = sets(2, 8, 8)
    wanted = causal(query, keys, values, kept, torch.ones(6), 0.2)
    torch.testing.assert_close(dense_attention(query, keys, values, scale=0.2), wanted, atol=1e-6, rtol=1e-5)


def test_padding_writes_nothing() -> None:
    cache = torch.zeros(2, 1, 3, 4)
    write_rows(cache, torch.ones(2, 1, 4), torch.tensor([-1, 4]))
    assert cache.sum() == 4
    assert cache[1, 0, 1].tolist() == [1.0] * 4
