"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.finetune_helpers import forks, one_thread, tiny  # noqa: F401 - fixtures of whole runs

ROOT = Path(__file__).resolve().parent.parent

# The last bits of MKL's products depend on where the operands happen to lie in memory, unless it is told before its
# first one to keep to one path; tests that compare to the bit, and the processes they start, need that
os.environ.setdefault("MKL_CBWR", "AVX2")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whomever

# under nohup or behind a shell's & the tests, and the processes they start, would inherit that these are ignored
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python() -> RunPython:
    """Run a piece of Python in a fresh interpreter that sees this checkout; its output and exit code."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )

    return run


@pytest.fixture
def fake_host(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """A directory that looks like `/`: file name -> text, under a new root."""

    def build(files: dict[str, str]) -> Path:
        root = tmp_path / "host"
        for name, text in files.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return root

    return build
