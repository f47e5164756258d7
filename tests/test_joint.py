"""Channels chosen together, against the definition of their error one candidate at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memopt.kv.channels import channel_scores, choose
from memopt.kv.joint import drop_order, far_attention, observe_spread, set_errors
from memopt.kv.window import Window
from tests.reference.think import jointly_kept


def prompt(
    groups: int = 2, tokens: int = 23, dim: int = 10, batch: int = 2, kv_heads: int = 3
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(groups * tokens)
    query = torch.randn(batch, kv_heads * groups, tokens, dim, generator=generator)
    return query, torch.randn(batch, kv_heads, tokens, dim, generator=generator)


def errors_of(
    query: Tensor, key: Tensor, recent: int, real: Tensor | None = None, count: int = 99, **survivors: Tensor
) -> Tensor:
    asked = observe_spread(query, real, 0, count)
    return set_errors(asked, key, real, scaling=0.4, recent=recent, **survivors)


@pytest.mark.parametrize("recent", [0, 1, 9, 23, 50])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_choice_is_the_references(groups: int, recent: int) -> None:
    query, key = prompt(groups)
    got = choose(drop_order(errors_of(query, key, recent), 6), 4)
    for b in range(2):
        for head in range(3):
            asking = list(query[b, head * groups : (head + 1) * groups])
            assert got[b, head].tolist() == jointly_kept(asking, key[b, head], key[b, head], 0.4, recent, 4)


def test_the_keys_that_lose_channels_can_be_fewer_than_those_looked_at() -> None:
    query, key = prompt()
    rows = torch.tensor([2, 3, 11, 19])
    real = torch.tensor([False, True, True, True]).expand(2, 3, -1)
    got = choose(drop_order(errors_of(query, key, 5, pruned=key[:, :, rows], pruned_real=real), 6), 4)
    for b in range(2):
        for head in range(3):
            asking = list(query[b, 2 * head : 2 * head + 2])
            assert got[b, head].tolist() == jointly_kept(asking, key[b, head], key[b, head, rows[1:]], 0.4, 5, 4)


def test_the_diagonal_is_the_published_score_where_all_queries_count_the_same() -> None:
    query, key = prompt()
    errors = errors_of(query, key, recent=23)  # nobody looks farther back than the prompt is long
    torch.testing.assert_close(errors.diagonal(dim1=2, dim2=3), channel_scores(query, key))


def test_channels_that_cancel_go_together_and_twins_do_not() -> None:
    cancel = torch.diag(torch.tensor([3.0, 3.4, 3.1, 3.2]))
    cancel[0, 1] = cancel[1, 0] = -3.0  # both gone lose 0.4
    assert choose(drop_order(cancel, 2), 2).tolist() == [2, 3]
    assert choose(cancel.diagonal(), 2).tolist() == [1, 3]
    twins = torch.diag(torch.tensor([1.0, 1.0, 1.5, 1.6]))
    twins[0, 1] = twins[1, 0] = 1.0  # both gone lose 4
    assert choose(drop_order(twins, 2), 2).tolist() == [0, 3]
    assert choose(twins.diagonal(), 2).tolist() == [2, 3]


def test_equal_channels_stay_from_the_lowest() -> None:
    assert choose(drop_order(torch.zeros(2, 3, 5, 5), 3), 2).tolist() == [[[0, 1]] * 3] * 2
    assert choose(drop_order(torch.eye(5), 2), 3).tolist() == [0, 1, 2]
    assert drop_order(torch.eye(4), 0).isinf().all()


@pytest.mark.parametrize("left", [True, False])
def test_padding_and_company_change_nothing(left: bool) -> None:
    query, key = prompt(tokens=20, batch=1)
    pad = (0, 0, 7, 0) if left else (0, 0, 0, 7)
    other_query, other_key = prompt(groups=2, tokens=27, batch=1)
    queries = torch.cat([torch.nn.functional.pad(query, pad, value=9.0), other_query])
    keys = torch.cat([torch.nn.functional.pad(key, pad, value=9.0), other_key])
    real = torch.ones(2, 27, dtype=torch.bool)
    real[0, slice(0, 7) if left else slice(20, None)] = False
    for count in (8, 99):
        together = errors_of(queries, keys, 6, real, count)
        torch.testing.assert_close(together[:1], errors_of(query, key, 6, None, count))
        torch.testing.assert_close(together[1:], errors_of(other_query, other_key, 6, None, count))


def test_a_query_counts_by_what_it_sees_far_away() -> None:
    query, key = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)  # equal attention to all that is seen
    asked = observe_spread(query, None, 0, 9)
    assert far_attention(asked, key, None, 1.0, 1, 0)[0, 0].tolist() == pytest.approx([0.0, 1 / 2, 2 / 3])
    assert far_attention(asked, key, None, 1.0, 2, 0)[0, 0].tolist() == pytest.approx([0.0, 0.0, 1 / 3])
    assert far_attention(asked, key, None, 1.0, 3, 0)[0, 0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("pieces", [(50,), (1, 49), (17, 16, 17), (7,) * 7 + (1,)])
def test_spread_queries_are_the_same_in_pieces(pieces: tuple[int, ...]) -> None:
    query = torch.randn(2, 4, 50, 3)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[0, :21] = False
    asked: Window | None = None
    start = 0
    for piece in pieces:
        part = slice(start, start + piece)
        asked = observe_spread(query[:, :, part], real[:, part], start, 16, asked)
        start += piece
    assert asked is not None
    # 29 real tokens: every second; 50: every fourth
    for row, expected in enumerate([range(21, 50, 2), range(0, 50, 4)]):
        there = asked.real[row]
        assert asked.position[row, there].tolist() == list(expected)
        assert torch.equal(asked.query[row][:, there], query[row][:, list(expected)])
