"""Channel scores and choices against their definitions, and the file that keeps static choices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memopt.errors import BadInput
from memopt.kv.channel_file import ChannelSets, ModelIdentity, load_channels, save_channels
from memopt.kv.channels import (
    channel_scores,
    choose,
    complement,
    energy,
    kept_count,
    last_real,
    spread,
    take,
    take_query,
)

IDENTITY = ModelIdentity(
    model_type="llama", layers=3, heads=4, kv_heads=2, head_dim=16, hidden_size=64, vocab_size=100, rope_theta=1e4
)


def some_sets(**changes: object) -> ChannelSets:
    keys = {layer: torch.tensor([[0, 3, 5, 8], [1, 2, 14, 15]]) for layer in (0, 2)}
    return dataclasses.replace(ChannelSets(model=IDENTITY, keep=0.25, keys=keys, tokens=77), **changes)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_score_is_the_frobenius_norm_over_the_groups_queries(groups: int) -> None:
    torch.manual_seed(0)
    batch, kv_heads, queries, tokens, dim = 2, 3, 5, 11, 7
    query = torch.randn(batch, kv_heads * groups, queries, dim)
    key = torch.randn(batch, kv_heads, tokens, dim)
    expected = torch.empty(batch, kv_heads, dim)
    for b in range(batch):
        for k in range(kv_heads):
            stacked = query[b, k * groups : (k + 1) * groups].reshape(-1, dim)
            for j in range(dim):
                expected[b, k, j] = torch.outer(stacked[:, j], key[b, k, :, j]).square().sum()
    # the scores are means: by queries and by tokens
    torch.testing.assert_close(channel_scores(query, key) * queries * tokens, expected)


def test_padding_leaves_the_scores_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 9, 6), torch.randn(1, 2, 9, 6)
    alone = channel_scores(query[:, :, 3:7], key[:, :, 3:7])
    real = torch.zeros(1, 9, dtype=torch.bool)
    real[:, 3:7] = True
    torch.testing.assert_close(channel_scores(query, key, query_real=real, key_real=real), alone)


def test_energy_of_bfloat16_is_summed_in_float32() -> None:
    x = torch.full((1, 1, 5000, 1), 1.0, dtype=torch.bfloat16)
    real = torch.ones(1, 5000, dtype=torch.bool)
    assert energy(x, real).item() == 1.0  # a bfloat16 sum would stop at 256
    assert energy(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("dim", "keep", "multiple", "count"),
    [(128, 0.6, 8, 80), (128, 0.6, 16, 80), (64, 0.6, 8, 40), (64, 0.5, 16, 32), (80, 0.6, 8, 48), (64, 1.0, 8, 64)]
    + [(20, 0.9, 8, 20), (64, 0.001, 8, 8), (100, 0.5, 16, 64)],
)
def test_count_is_rounded_up(dim: int, keep: float, multiple: int, count: int) -> None:
    assert kept_count(dim, keep, multiple=multiple) == count


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_keep_outside_its_range(keep: float) -> None:
    with pytest.raises(BadInput, match=r"must lie in \(0, 1\]"):
        kept_count(64, keep)


def test_choice_is_sorted_and_ties_go_to_the_lower_index() -> None:
    assert choose(torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0], [4.0, 0.0, 3.0, 0.0, 9.0]]), 2).tolist() == [[1, 2], [0, 4]]
    with pytest.raises(BadInput, match="6 channels to keep of 5"):
        choose(torch.zeros(5), 6)


def test_take_spread_and_complement_undo_each_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8)
    kept = choose(torch.rand(2, 3, 8), 3)
    dropped = complement(kept, 8)
    assert dropped.shape == (2, 3, 5)
    torch.testing.assert_close(spread(take(x, kept), kept, 8) + spread(take(x, dropped), dropped, 8), x)
    everything = complement(choose(torch.rand(2, 3, 8), 8), 8)
    assert everything.shape == (2, 3, 0)


def test_queries_take_the_channels_of_their_own_head() -> None:
    torch.manual_seed(0)
    query, kept = torch.randn(2, 6, 4, 8), choose(torch.rand(2, 3, 8), 5)
    got = take_query(query, kept).view(2, 3, 2, 4, 5)
    for b in range(2):
        for head in range(6):
            torch.testing.assert_close(got[b, head // 2, head % 2], query[b, head][:, kept[b, head // 2]])


def test_last_real_skips_padding_on_both_sides() -> None:
    real = torch.tensor([[True, True, True, False, False, False], [False, False, False, False, True, True]])
    got = last_real(real, 3)
    assert got[0].tolist() == [0, 1, 2]
    assert got[1].tolist()[1:] == [4, 5] and not real[1, got[1, 0]]
    assert last_real(real, 9).shape == (2, 6)


def test_file_round_trip(tmp_path: Path) -> None:
    sets = some_sets()
    save_channels(tmp_path / "keys.safetensors", sets)
    got = load_channels(tmp_path / "keys.safetensors", IDENTITY)
    assert got.model == sets.model and got.keep == 0.25 and got.tokens == 77 and got.count == 4
    assert sorted(got.keys) == [0, 2]
    assert all(torch.equal(got.keys[layer], sets.keys[layer]) for layer in sets.keys)


def test_file_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"
    save_channels(path, some_sets(model=dataclasses.replace(IDENTITY, weights="aa")))
    load_channels(path, IDENTITY)  # a side that does not know its weights compares the configuration only
    with pytest.raises(BadInput, match="another model .hidden_size 64 != 96.; calibrate"):
        load_channels(path, dataclasses.replace(IDENTITY, hidden_size=96))
    with pytest.raises(BadInput, match="other weights of the same shape .aa != bb."):
        load_channels(path, dataclasses.replace(IDENTITY, weights="bb"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "without a single layer"),
        ({7: torch.tensor([[0], [1]])}, "layer 7 of a model with 3 layers"),
        ({0: torch.tensor([[0, 1]])}, r"shape \(1, 2\)"),
        ({0: torch.tensor([[1, 0], [0, 1]])}, "must rise"),
        ({0: torch.tensor([[0, 16], [0, 1]])}, r"lie in \[0, 16\)"),
        ({0: torch.tensor([[0], [1]]), 1: torch.tensor([[0, 1], [0, 1]])}, "as many in every layer"),
    ],
)
def test_sets_that_cannot_be(keys: dict[int, torch.Tensor], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        some_sets(keys=keys)


def test_files_that_are_no_channel_files(tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"
    with pytest.raises(BadInput, match="no such file; make one with: memopt calibrate-keys"):
        load_channels(path)
    path.write_text("nonsense")
    with pytest.raises(BadInput, match="not a safetensors file"):
        load_channels(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(BadInput, match="not a file of key channels"):
        load_channels(path)
    with pytest.raises(BadInput, match="cannot be written"):
        save_channels(tmp_path / "no" / "keys.safetensors", some_sets())
