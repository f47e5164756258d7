"""`memopt calibrate-keys`: the scores it averages, the file it writes, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from memopt import ThinKCache
from memopt.errors import BadInput
from memopt.jobs.calibrate_keys import calibrate_keys
from memopt.kv.channel_file import load_channels
from memopt.launchers.main import run
from memopt.patches.hf_calibrate import score_channels
from tests.finetune_helpers import Tiny
from tests.kv_models import sequences, tiny_model


def caught_attention(model: Any, windows: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys of layer 1 on their way into a dense attention, one pair for every window."""
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []

    def catch(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if module.layer_idx == 1:
            caught.append((query, key))
        return sdpa_attention_forward(module, query, key, *rest, **options)

    AttentionInterface.register("catching", catch)
    AttentionMaskInterface.register("catching", sdpa_mask)
    model.set_attn_implementation("catching")
    with torch.no_grad():
        for window in windows:
            model(window[None])
    return caught


def test_scores_are_the_mean_over_windows() -> None:
    """One outer product per channel."""
    model = tiny_model("gemma3")  # one layer of two is scored
    windows = sequences((20, 31))
    _, got, tokens = score_channels(model, windows, observation=5, score="think")
    assert tokens == 51 and sorted(got) == [1]
    assert model.config._attn_implementation == "sdpa"
    caught = caught_attention(model, windows)
    expected = torch.zeros(2, 24, dtype=torch.float64)
    for query, key in caught:
        for head in range(2):
            stacked = query[0, 2 * head : 2 * head + 2, -5:].reshape(-1, 24)
            for j in range(24):
                norm = torch.outer(stacked[:, j], key[0, head, :, j]).square().sum()
                expected[head, j] += norm / 5 / key.shape[2] / 2  # means over queries, tokens and windows
    torch.testing.assert_close(got[1], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("recent", [6, 100])  # beyond the second no query looks, and all count the same
def test_joint_scores_are_the_turns_of_a_greedy_choice_over_all_windows(recent: int) -> None:
    """Every set is tried whole: weighted errors of scores, query by query and window by window."""
    model = tiny_model("gemma3")
    windows = sequences((20, 31))
    _, got, _ = score_channels(model, windows, recent=recent)
    caught, dim = caught_attention(model, windows), 24
    scaling = model.model.layers[1].self_attn.scaling
    for head in range(2):
        pairs = torch.zeros(dim, dim, dtype=torch.float64)
        for query, key in caught:
            keys, tokens = key[0, head].double(), key.shape[2]
            asked = [(query[0, h, i].double(), i) for h in (2 * head, 2 * head + 1) for i in range(tokens)]
            shares = [torch.softmax(keys[: i + 1] @ q * scaling, 0)[: max(0, i - recent + 1)].sum() for q, i in asked]
            if sum(shares) == 0:
                shares = [torch.ones(())] * len(asked)
            for (q, _), share in zip(asked, shares, strict=True):
                parts = keys * q  # what each channel adds to the score of each key
                pairs += share * parts.T @ parts / tokens**2
        dropped: list[int] = []
        for turn in range(dim):
            left = [j for j in range(dim) if j not in dropped]
            costs = [pairs[[*dropped, j]][:, [*dropped, j]].sum().item() for j in left]
            dropped.append(left[costs.index(min(costs))])
            assert got[1][head, dropped[-1]] == turn


def test_the_file_serves_its_model(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys.safetensors"
    source = tiny.model(head_dim=32)
    command = ["calibrate-keys", source, "--data", tiny.text, "--out", str(out), "--seq-len", "64", "--windows", "5"]
    assert run([*command, "--keep", "0.4"]) == 0
    said = capfd.readouterr().err
    assert "window 1 of at most 5, 64 tokens" in said
    assert "16 of 32 key channels in 3 layers of 2 KV heads, from 5 windows (320 tokens)" in said
    sets = load_channels(out)
    assert sets.keep == 0.4 and sets.tokens == 320 and sorted(sets.keys) == [0, 1, 2]
    model = AutoModelForCausalLM.from_pretrained(source)
    ids = AutoTokenizer.from_pretrained(source)("some words to begin with", return_tensors="pt").input_ids
    with ThinKCache(model, channels=out) as cache:
        done = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert done.shape[1] == ids.shape[1] + 4
        assert torch.equal(cache.layers[2].state.kept_keys()[0], sets.keys[2])


def test_data_without_text(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "keys.safetensors"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": "one"}) + "\n" for _ in range(9)))
    for data in (empty, short):
        with pytest.raises(BadInput, match=rf"data {data}: no text to calibrate on .at least 16 tokens"):
            calibrate_keys(tiny.model(), data, out)
    with pytest.raises(BadInput, match="no such file or directory"):
        calibrate_keys(tiny.model(), tmp_path / "none.txt", out)
    assert not out.exists()


def test_settings_that_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "keys.safetensors"
    with pytest.raises(BadInput, match="keep = 1.2"):
        calibrate_keys(tiny.model(), tiny.text, out, keep=1.2)
    with pytest.raises(BadInput, match="windows >= 1"):
        calibrate_keys(tiny.model(), tiny.text, out, windows=0)
    with pytest.raises(BadInput, match="seq_len >= 16"):
        calibrate_keys(tiny.model(), tiny.text, out, seq_len=8)
    with pytest.raises(BadInput, match="observation = 0"):
        calibrate_keys(tiny.model(), tiny.text, out, observation=0)
    with pytest.raises(BadInput, match="no such directory"):
        calibrate_keys(tiny.model(), tiny.text, tmp_path / "no" / "keys.safetensors")
    with pytest.raises(BadInput, match="no such directory"):
        calibrate_keys(str(tmp_path / "nothing"), tiny.text, out)
    (tmp_path / "broken").mkdir()
    with pytest.raises(BadInput, match="no usable tokenizer|cannot be loaded"):
        calibrate_keys(str(tmp_path / "broken"), tiny.text, out)
