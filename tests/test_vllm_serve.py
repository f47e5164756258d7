"""memopt serve with vLLM itself: one server, and everything that must not start one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memopt.kv.channel_file import load_channels, save_channels
from memopt.kv.joint import ASKED
from memopt.patches.hf_identity import identity_of
from tests.vllm_helpers import ROOT, Setup, clean_environment, make_setup, write_channels

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed; make test-vllm"),
]
PROGRAM = [sys.executable, "-c", "from memopt.launchers.main import app_main; app_main()"]
DEADLINE_S = 240


@dataclass
class Running:
    """A server that answers, and what memopt said until then."""

    process: subprocess.Popen[str]
    port: int
    said: list[str]

    def gauges(self) -> str:
        line = next(line for line in self.said if "gauges" in line)
        return get(line.split()[-1])


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("serve"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(address: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def options(port: int) -> list[str]:
    common = ["--max-model-len", "512", "--kv-cache-memory-bytes=64M", "--dtype", "float32", "--enforce-eager"]
    return ["--port", str(port), *common]


def command(setup: Setup, *given: str, port: int, keep: str = "0.5") -> list[str]:
    channels = ["--key-channels", str(setup.channels(0.5)), "--key-keep", keep]
    return [*PROGRAM, "serve", str(setup.model), *channels, *given, "--", *options(port)]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    given = clean_environment() | environment
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, env=given)


@contextlib.contextmanager
def serving(arguments: list[str], port: int, log: Path) -> Iterator[Running]:
    """A server, from when memopt says that it serves; ended as a person ends one."""
    with log.open("w") as out:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment() | {"VLLM_PLUGINS": "nothing-else"},
        )
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            if line.startswith("memopt:"):
                said.append(line.strip())
            if "serving" in line and line.startswith("memopt:"):
                break
        assert process.poll() is None, said + log.read_text().splitlines()[-40:]
        try:
            yield Running(process, port, said)
        finally:
            process.send_signal(signal.SIGTERM)
            # what vLLM's processes leave behind may lack its end of line
            said += ["memopt:" + line.split("memopt:")[-1].strip() for line in process.stderr if "memopt:" in line]
            process.stderr.close()
            process.wait(60)


@pytest.fixture(scope="module")
def server(setup: Setup) -> Iterator[Running]:
    port = free_port()
    with serving(command(setup, "--metrics-port", "0", port=port), port, setup.directory / "vllm.log") as running:
        yield running


@pytest.mark.slow
def test_the_server_answers_with_thin_keys_and_as_many_blocks_as_planned(server: Running) -> None:
    base = f"http://127.0.0.1:{server.port}"
    answer = json.loads(get(f"{base}/v1/completions", {"model": _name(server), "prompt": "def f", "max_tokens": 5}))
    assert answer["usage"]["completion_tokens"] == 5
    metrics = get(f"{base}/metrics")
    # 64 MiB / (2 layers x 2 heads x (32 + 64) channels x 4 bytes x 128 tokens)
    assert 'num_gpu_blocks="341"' in metrics
    assert any("341 blocks" in line for line in server.said)
    assert server.said[-1].endswith("serving 32 of 64 key channels in 2 layers")


@pytest.mark.slow
def test_gauges_stand_beside_vllms_metrics(server: Running) -> None:
    text = server.gauges()
    assert "memopt_kv_token_bytes 1536" in text.replace(".0", "")
    assert "memopt_kv_token_stock_bytes 2048" in text.replace(".0", "")
    dram = next(line for line in text.splitlines() if line.startswith("memopt_dram_bytes "))
    assert float(dram.split()[1]) > 200 * 2**20, "the engine's processes are counted"


@pytest.mark.slow
def test_a_second_server_on_the_port_is_refused_at_once(server: Running, setup: Setup) -> None:
    done = run(command(setup, port=server.port))
    assert done.returncode == 2
    assert f"--port {server.port}" in done.stderr
    assert "choose another port" in done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of transformers as vLLM wants it
def test_a_server_calibrates_by_its_own_traffic(setup: Setup, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from memopt.kv.channels import choose
    from memopt.patches.hf_calibrate import score_channels

    port, out = free_port(), tmp_path / "keys.safetensors"
    arguments = [*PROGRAM, "serve", str(setup.model), "--calibrate-keys", str(out), "--key-keep", "0.5", "--"]
    prompts = [ids for ids in setup.prompts() if 16 <= len(ids) <= ASKED]  # every query of these is asked
    assert len(prompts) == 2
    with serving([*arguments, *options(port)], port, tmp_path / "vllm.log") as running:
        assert "serving whole keys" in running.said[-1]
        name = _name(running)
        for ids in [*prompts, [7, 8, 9]]:  # the last is too short to say anything
            get(f"http://127.0.0.1:{port}/v1/completions", {"model": name, "prompt": ids, "max_tokens": 3})
        tokens, deadline = sum(map(len, prompts)), time.monotonic() + 30
        while not (out.exists() and load_channels(out).tokens == tokens):
            assert time.monotonic() < deadline, "the file is written while the server serves"
            time.sleep(0.1)
    assert running.said[-1].endswith(f"32 of 64 key channels, by {tokens} tokens of prompts")
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32).eval()
    sets = load_channels(out, identity_of(model.config))
    assert (sets.tokens, sets.keep, sorted(sets.keys)) == (tokens, 0.5, [0, 1])
    _, scores, _ = score_channels(model, [torch.tensor(ids) for ids in prompts])
    assert all(torch.equal(kept, choose(scores[layer], 32)) for layer, kept in sets.keys.items())


@pytest.mark.parametrize(
    ("given", "keep", "words"),
    [
        (["--calibrate-keys", "out"], "0.5", "leave out --key-channels"),
        ([], "1.5", "not in (0, 1]"),
        ([], "0.6", "calibrated for a share of 0.5"),
        (["--exact-prefill"], "0.5", "recent window"),
        (["--kernel", "fast"], "0.5", "'fast' is not one of"),
    ],
)
def test_bad_settings_are_one_line(setup: Setup, given: list[str], keep: str, words: str) -> None:
    done = run(command(setup, *given, port=free_port(), keep=keep))
    assert done.returncode == 2
    assert words in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("memopt:")]) == 1


def test_channels_of_other_weights_or_another_model_are_refused(setup: Setup, tmp_path: Path) -> None:
    sets = load_channels(setup.channels(0.5))
    other, weights = tmp_path / "other.safetensors", tmp_path / "weights.safetensors"
    write_channels(other, 0.5, replace(sets.model, hidden_size=128))
    save_channels(weights, replace(sets, model=replace(sets.model, weights="0123456789abcdef")))
    for path, words in ((other, "another model (hidden_size 128 != 256)"), (weights, "other weights")):
        base = [*PROGRAM, "serve", str(setup.model), "--key-keep", "0.5", "--key-channels", str(path)]
        done = run([*base, "--plan-only"])
        assert done.returncode == 2
        assert words in done.stderr


def test_without_channels_nothing_is_served(setup: Setup) -> None:
    done = run([*PROGRAM, "serve", str(setup.model)])
    assert done.returncode == 2
    assert "memopt calibrate-keys" in done.stderr


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--kv-transfer-config={}", "KV connector"),
        ("--attention-backend=FLASH_ATTN", "own backend"),
        ("--kv_cache_dtype=fp8", "leave it at auto"),
    ],
)
def test_options_that_exclude_thin_keys_are_refused(setup: Setup, option: str, words: str) -> None:
    done = run([*command(setup, "--plan-only", port=free_port()), option])
    assert done.returncode == 2
    assert words in done.stderr


def test_a_model_with_sliding_windows_is_refused(setup: Setup, tmp_path: Path) -> None:
    from transformers import MistralConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    MistralConfig(**sizes, vocab_size=300, sliding_window=32).save_pretrained(tmp_path)
    os.link(setup.model / "model.safetensors", tmp_path / "model.safetensors")
    from transformers import AutoConfig

    path = tmp_path / "keys.safetensors"
    write_channels(path, 0.5, replace(identity_of(AutoConfig.from_pretrained(tmp_path)), head_dim=16), count=8)
    base = [*PROGRAM, "serve", str(tmp_path), "--key-keep", "0.5", "--key-channels", str(path), "--plan-only"]
    done = run(base)
    assert done.returncode == 2
    assert "sliding window" in done.stderr


def test_the_plan_is_written_and_vllm_is_not_started(setup: Setup, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = run(command(setup, "--plan-only", "--report", str(out), port=free_port()))
    assert done.returncode == 0, done.stderr
    plan = json.loads(out.read_text())
    assert plan["job"] == "serve"
    assert plan["phases"][0]["use"]["dram"]["kv_cache"] == 64 * 2**20


def _name(server: Running) -> str:
    models = json.loads(get(f"http://127.0.0.1:{server.port}/v1/models"))
    return str(models["data"][0]["id"])
