"""Key channels scored by a vLLM engine, against those that transformers scores on the same windows."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memopt.errors import BadInput
from memopt.kv.channel_file import load_channels
from memopt.kv.channels import channel_scores
from memopt.patches.vllm_calibrate import Recorder, check_config
from tests.vllm_helpers import ROOT, Setup, clean_environment, make_setup

pytestmark = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed; make test-vllm"
)

CODE = """
import sys
import torch
from pathlib import Path
from memopt.patches.vllm_score import score_channels
found = []
windows = torch.load(sys.argv[2])
for observation, chunk in ((None, 64), (9, 256)):
    options = {"dtype": "float32", "kv_cache_memory_bytes": 2**26, "max_num_batched_tokens": chunk}
    asked = {"seq_len": 200, "observation": observation, "options": options}
    _, scores, tokens = score_channels(Path(sys.argv[1]), windows, **asked)
    found.append((scores, tokens))
torch.save(found, sys.argv[3])
"""


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("calibrate"))


@needs_vllm
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of transformers as vLLM wants it
def test_scores_are_those_of_transformers_with_prompts_in_chunks(setup: Setup, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from memopt.patches.hf_calibrate import score_channels

    draw = torch.Generator().manual_seed(5)
    windows = [torch.randint(3, 300, (length,), generator=draw) for length in (200, 17, 133, 64, 65, 199, 31, 90, 128)]
    asked, result = tmp_path / "windows.pt", tmp_path / "scores.pt"
    torch.save(windows, asked)
    command = [sys.executable, "-c", CODE, str(setup.model), str(asked), str(result)]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32).eval()
    for observation, (scores, tokens) in zip((None, 9), torch.load(result), strict=True):
        _, expected, counted = score_channels(model, windows, observation=observation, score="think")
        assert tokens == counted == sum(map(len, windows))
        assert sorted(scores) == sorted(expected)
        for layer, mean in expected.items():
            torch.testing.assert_close(scores[layer], mean, rtol=1e-4, atol=0)


@needs_vllm
@pytest.mark.slow
def test_the_command_writes_a_file_of_this_model(setup: Setup, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "keys.safetensors"
    text.write_text("many words of a text that goes on and on. " * 60)
    program = [sys.executable, "-c", "from memopt.launchers.main import app_main; app_main()", "calibrate-keys"]
    options = ["--data", str(text), "--out", str(out), "--seq-len", "96", "--windows", "3", "--keep", "0.5"]
    environment = clean_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [*program, str(setup.model), *options, "--engine", "vllm"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "32 of 64 key channels in 2 layers of 2 KV heads, from 3 windows (288 tokens)" in done.stderr
    known = load_channels(setup.channels(0.5)).model
    made = load_channels(out, known)
    assert made.tokens == 288
    assert made.model.weights


def step(*rows: tuple[int, int, int]) -> Any:
    """Metadata of a step: (first block, new tokens, tokens in all) of each row."""
    starts = torch.tensor([0, *torch.tensor([new for _, new, _ in rows]).cumsum(0)])
    table = torch.tensor([[block] for block, _, _ in rows])
    lengths = torch.tensor([tokens for _, _, tokens in rows])
    return SimpleNamespace(query_start_loc=starts, seq_lens=lengths, block_table=table)


@pytest.mark.parametrize("observation", [None, 4])
def test_requests_are_told_apart_by_their_first_block(observation: int | None) -> None:
    draw = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randn(n, heads, 8, generator=draw) for heads in (4, 2)) for n in (7, 10, 5)]
    recorder = Recorder(observation=observation)

    def seen(metadata: Any, *parts: tuple[int, int, int]) -> None:
        query, key = (torch.cat([prompts[i][which][a:b] for i, a, b in parts]) for which in (0, 1))
        recorder.add(3, query, key, metadata)

    recorder.add(3, torch.ones(4, 4, 8), torch.ones(4, 2, 8), step((0, 4, 4)))  # a warm-up: block 0 is nobody's
    seen(step((5, 3, 3), (2, 6, 6)), (0, 0, 3), (1, 0, 6))
    seen(step((2, 4, 10), (5, 4, 7)), (1, 6, 10), (0, 3, 7))
    seen(step((5, 5, 5)), (2, 0, 5))  # the first block of the first request is another's now
    recorder.add(3, torch.ones(2, 4, 8), torch.ones(2, 2, 8), step((9, 2, 30)))  # its beginning was not seen
    recorder.finish()
    want = torch.zeros(2, 8)
    for query, key in prompts:
        observed = query if observation is None else query[-observation:]
        want += channel_scores(observed.transpose(0, 1)[None], key.transpose(0, 1)[None])[0] / 3
    torch.testing.assert_close(recorder.means()[3].float(), want, rtol=1e-5, atol=0)
    assert recorder.tokens == 22


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size above 1"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size above 1"),
        ({"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"enforce_eager": False}, "--enforce-eager"),
    ],
)
def test_engines_that_cannot_be_watched_are_refused(changed: dict[str, Any], words: str) -> None:
    def config(**given: Any) -> Any:
        values = {"enable_prefix_caching": False, "enforce_eager": True} | given
        one = SimpleNamespace(**values)
        return SimpleNamespace(parallel_config=one, cache_config=one, model_config=one)

    check_config(config())
    with pytest.raises(BadInput, match=words):
        check_config(config(**changed))
