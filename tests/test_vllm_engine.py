"""vLLM itself with memopt's plugin: the stock server's tokens at keep 1, the masked reference's below, more blocks."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memopt.kv.channel_file import load_channels
from memopt.patches.vllm_config import ThinKeys
from tests.vllm_helpers import Setup, farthest, make_setup, write_channels

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed; make test-vllm"),
    pytest.mark.filterwarnings("ignore"),  # those of transformers as vLLM wants it
]
ATOL = 1e-5


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("vllm"))


def keys_of(setup: Setup, keep: float, **options: Any) -> ThinKeys:
    return ThinKeys(key_keep=keep, channels=setup.channels(keep), **options)


def stock(setup: Setup) -> dict[str, Any]:
    return setup.run(passes=2, enable_prefix_caching=True)


@pytest.mark.parametrize("kernel", ["auto", "own"])
def test_all_channels_give_the_stock_tokens_cold_and_from_the_prefix_cache(setup: Setup, kernel: Any) -> None:
    plain = stock(setup)
    found = setup.run(ThinKeys(key_keep=1.0, kernel=kernel), passes=2, enable_prefix_caching=True)
    assert max(plain["passes"][1]["cached"]) >= 256, "the second pass was to hit the prefix cache"
    for i in range(2):
        assert found["passes"][i]["cached"] == plain["passes"][i]["cached"]
        assert found["passes"][i]["tokens"] == plain["passes"][i]["tokens"]
    assert farthest(found, plain["passes"][0]["logprobs"]) <= (0.0 if kernel == "auto" else ATOL)
    assert (found["blocks"], found["kv_tokens"]) == (plain["blocks"], plain["kv_tokens"])


# 32 of 64 channels go through vLLM's C++ kernel twice; 40 through memopt's own path
@pytest.mark.parametrize("keep", [0.5, 0.625])
def test_logprobs_are_the_masked_references_and_there_are_more_blocks(setup: Setup, keep: float) -> None:
    keys = keys_of(setup, keep)
    # whole prompts, but only 512 tokens a step: some prompts come beside steps of requests that are under way
    beside = {"max_model_len": 512, "max_num_batched_tokens": 512, "enable_chunked_prefill": False}
    found, plain = setup.run(keys, **beside), stock(setup)
    tokens, logprobs = setup.reference(keys)
    assert found["passes"][0]["tokens"] == tokens
    assert farthest(found, logprobs) <= ATOL
    assert farthest(plain, logprobs) > 1e-2, "pruning was to be seen in the numbers"
    wanted = 2 / (1 + keep)
    assert found["blocks"] / plain["blocks"] == pytest.approx(wanted, rel=0.01)
    assert found["kv_tokens"] / plain["kv_tokens"] == pytest.approx(wanted, rel=0.01)


def test_recent_window_and_prompts_in_chunks_are_exact(setup: Setup) -> None:
    keys = keys_of(setup, 0.5, recent=16, exact_prefill=True)
    found, plain = setup.run(keys, max_num_batched_tokens=128), stock(setup)
    tokens, logprobs = setup.reference(keys)
    assert found["passes"][0]["tokens"] == tokens
    assert farthest(found, logprobs) <= ATOL
    # chunks without the exact mode, and no window, are both far from that
    assert farthest(found, setup.reference(keys, chunk=128)[1]) > 1e-4
    assert farthest(found, setup.reference(keys_of(setup, 0.5))[1]) > 1e-4
    assert found["blocks"] / plain["blocks"] == pytest.approx(2 / 1.5, rel=0.01)


def test_each_rank_takes_the_channels_of_its_own_heads(setup: Setup) -> None:
    keys = keys_of(setup, 0.625, recent=16)
    found = setup.run(keys, tensor_parallel_size=2)
    tokens, logprobs = setup.reference(keys)
    assert found["passes"][0]["tokens"] == tokens
    assert farthest(found, logprobs) <= ATOL
    # pages of one head on each: 128 tokens of 40 + 64 channels of 4 bytes, in two layers
    assert found["blocks"] == 64 * 2**20 // (2 * 128 * 104 * 4)


# every request fits in one block (and one of its window's), and all need another one at once
@pytest.mark.parametrize(("options", "blocks"), [({}, 5), ({"recent": 16, "exact_prefill": True}, 9)])
def test_a_preempted_request_is_computed_anew_as_one_prompt(setup: Setup, options: dict[str, Any], blocks: int) -> None:
    short = replace(setup, lengths=(118, 122, 126, 127), done={})
    keys = keys_of(setup, 0.5, **options)
    given = {"num_gpu_blocks_override": blocks, "max_model_len": 256, "max_num_batched_tokens": 1024}
    found = short.run(keys, disable_log_stats=False, **given)
    assert found["preemptions"] >= 1
    # a request is the reference's until it was preempted; what it had generated then belongs to its prompt
    restarts, begun = 0, dict.fromkeys(range(len(short.prompts())), 0)
    while begun:
        prompts = [short.prompts()[i] + found["passes"][0]["tokens"][i][:n] for i, n in begun.items()]
        tokens, logprobs = setup.reference(keys, prompts)
        left = {}
        for (i, n), ours, sure in zip(begun.items(), tokens, logprobs, strict=True):
            one = found["passes"][0]
            theirs = list(zip(one["tokens"][i][n:], one["logprobs"][i][n:], strict=True))
            same = [a == c and abs(b - d) < ATOL for a, b, (c, d) in zip(ours, sure, theirs, strict=False)]
            if not all(same):
                assert same[0], "wrong from its first token on"
                left[i] = n + same.index(False)
        restarts, begun = restarts + len(left), left
    assert 1 <= restarts <= found["preemptions"]


def test_channels_of_another_model_stop_the_engine(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_channels(path, 0.5, replace(load_channels(setup.channels(0.5)).model, vocab_size=999))
    said = setup.fail(ThinKeys(key_keep=0.5, channels=path))
    assert "belongs to another model (vocab_size 999 != 300)" in said
