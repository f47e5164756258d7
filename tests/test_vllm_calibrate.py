"""Key channels scored by a vLLM engine and by a server's traffic, against those of transformers on the same tokens."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from memopt.errors import BadInput
from memopt.kv.channel_file import ModelIdentity, load_channels
from memopt.kv.joint import drop_order, observe_spread, set_errors
from memopt.kv.window import observe
from memopt.patches.vllm_calibrate import Recorder, check_config
from memopt.patches.vllm_config import Calibration
from memopt.patches.vllm_live import LiveFile
from tests.vllm_helpers import ROOT, Setup, clean_environment, make_setup

pytestmark = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed; make test-vllm"
)

MODEL = ModelIdentity(
    model_type="llama", layers=4, heads=4, kv_heads=2, head_dim=32, hidden_size=128, vocab_size=9, rope_theta=1e4
)
CODE = """
import sys
import torch
from pathlib import Path
from memopt.patches.vllm_score import score_channels
found = []
windows = torch.load(sys.argv[2])
for observation in (None, 9):
    options = {"dtype": "float32", "kv_cache_memory_bytes": 2**26}
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
def test_scores_are_those_of_transformers(setup: Setup, tmp_path: Path) -> None:
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
        _, expected, counted = score_channels(model, windows, observation=observation)
        assert tokens == counted == sum(map(len, windows))
        assert sorted(scores) == sorted(expected)
        for layer, turns in expected.items():
            assert torch.equal(scores[layer], turns), "each channel is dropped in the same turn"


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


def step(*rows: tuple[int, int]) -> Any:
    """Metadata of a step: (new tokens, tokens in all) of each row."""
    starts = torch.tensor([0, *torch.tensor([new for new, _ in rows]).cumsum(0)])
    return SimpleNamespace(query_start_loc=starts, seq_lens=torch.tensor([tokens for _, tokens in rows]))


@pytest.mark.parametrize(("observation", "asked"), [(None, None), (4, None), (None, 8)])
def test_the_first_steps_of_prompts_are_scored_and_nothing_else(observation: int | None, asked: int | None) -> None:
    draw = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randn(n, heads, 8, generator=draw) for heads in (4, 2)) for n in (40, 57, 70)]
    noise = tuple(torch.randn(30, heads, 8, generator=draw) for heads in (4, 2))
    recorder = Recorder(observation=observation, asked=asked)

    def seen(metadata: Any, *parts: tuple[Tensor, ...]) -> None:
        query, key = (torch.cat([part[which] for part in parts]) for which in (0, 1))
        recorder.add(3, query, key, 8**-0.5, metadata)

    seen(step((40, 40)), prompts[0])  # a warm-up: nobody listens yet
    recorder.start()
    with pytest.raises(BadInput, match="no text to calibrate on"):
        recorder.scores()
    shortest = tuple(each[:15] for each in noise)
    seen(step((40, 40), (30, 31), (57, 57)), prompts[0], noise, prompts[1])  # beside a chunk that has context
    seen(step((15, 15), (70, 70)), shortest, prompts[2])  # beside a prompt that is too short to say anything
    assert recorder.prompts == 3
    errors = torch.zeros(2, 8, 8)
    for query, key in prompts:
        asking, looked_at = (states.transpose(0, 1)[None] for states in (query, key))
        window = (
            observe(asking, None, 0, observation or len(key))
            if asked is None
            else observe_spread(asking, None, 0, asked)
        )
        errors += set_errors(window, looked_at, None, scaling=8**-0.5, recent=32)[0] / 3
    scores, tokens = recorder.scores()
    assert tokens == 167
    assert torch.equal(scores[3].float(), drop_order(errors, 8))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size above 1"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size above 1"),
        ({"enforce_eager": False}, "--enforce-eager"),
    ],
)
def test_engines_that_cannot_be_watched_are_refused(changed: dict[str, Any], words: str) -> None:
    def config(**given: Any) -> Any:
        one = SimpleNamespace(**{"enforce_eager": True} | given)
        return SimpleNamespace(parallel_config=one, model_config=one)

    check_config(config())
    with pytest.raises(BadInput, match=words):
        check_config(config(**changed))


def test_the_file_grows_with_what_was_heard(tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "keys.safetensors"
    recorder.layers |= {1, 3}
    recorder.start()
    file = LiveFile(recorder, Calibration(path=path, keep=0.5), MODEL)
    file.save()
    assert not path.exists(), "nothing was heard"

    def hear(tokens: int, *layers: int) -> None:
        for layer in layers:
            recorder.add(layer, torch.randn(tokens, 4, 32), torch.randn(tokens, 2, 32), 0.2, step((tokens, tokens)))

    hear(20, 1)
    file.save()
    assert not path.exists(), "the step is not through all layers yet"
    hear(20, 3)
    file.save()
    assert load_channels(path, MODEL).tokens == 20
    hear(30, 1, 3)
    hear(16, 1, 3)
    file.close()
    sets = load_channels(path, MODEL)
    assert (sets.tokens, sets.count, sets.keep, sorted(sets.keys)) == (66, 16, 0.5, [1, 3])


def test_a_place_that_cannot_be_written_does_not_stop_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    recorder.start()
    recorder.add(3, torch.randn(20, 4, 32), torch.randn(20, 2, 32), 0.2, step((20, 20)))
    file = LiveFile(recorder, Calibration(path=tmp_path / "gone" / "keys", keep=0.5), MODEL)
    with caplog.at_level(logging.WARNING, logger="vllm.memopt"):
        file.close()
    assert "cannot be written" in caplog.text
