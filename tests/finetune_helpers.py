"""Tiny models, corpora and processes for the tests of whole fine-tuning runs."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.data_helpers import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 304
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": None,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Tiny:
    """Where the models and the text of the session are."""

    directory: Path

    @property
    def text(self) -> str:
        """About 7000 tokens of prose, in one file."""
        return str(self.directory / "train.txt")

    @property
    def held_out(self) -> str:
        """About 500 tokens of it that `text` does not have."""
        return str(self.directory / "held-out.jsonl")

    def model(self, kind: str = "llama", dtype: str = "float32", **changes: Any) -> str:
        """A model directory with random weights and the tokenizer; made once per session."""
        return str(_make_model(self.directory, kind, dtype, tuple(sorted(changes.items()))))


@functools.cache
def _make_model(directory: Path, kind: str, dtype: str, changes: tuple[tuple[str, Any], ...]) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = directory / "-".join([kind, dtype, *(f"{k}-{v}" for k, v in changes)])
    settings = GPT2 if kind == "gpt2" else {**LLAMA, **({"num_local_experts": 4} if kind == "mixtral" else {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**settings, **dict(changes)}))
        model.to(getattr(torch, dtype)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made = Tiny(tmp_path_factory.mktemp("tiny"))
    prose = (ROOT / "LICENSE").read_text()
    Path(made.text).write_text(prose[1000:])
    Path(made.held_out).write_text(json.dumps({"text": prose[:1000]}) + "\n")
    return made


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring in matrices of this size."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Have the plan place units on `ssd` (all that can be), or a `mix` of both tiers, as a small budget would.

    A model of these sizes is smaller than one staging buffer, and lost in what the interpreter takes: no `dram` could
    make the planner tell the tiers apart.
    """
    from memopt.jobs import preparation
    from memopt.plan_types import Residence
    from memopt.planning.finetune import plan_finetune
    from memopt.tiers import Tier

    def moved(job: Any, budget: Any, machine: Any) -> Any:
        plan = plan_finetune(job, budget, machine)
        draw = random.Random(3)
        residence = {}
        for name in plan.residence:
            tiers = [Tier.SSD if where == "ssd" else draw.choice([Tier.DRAM, Tier.SSD]) for _ in range(3)]
            if name == "rest":
                tiers = [Tier.DRAM] * 3
            residence[name] = Residence(weights=tiers[0], moments=tiers[1], gradient=tiers[2])
        layers = 2 if where == "ssd" else 1
        return replace(
            plan, residence=residence, save_every=job.save_every or 1, activation_layers_on_ssd=layers, gradient_slots=1
        )

    preparation.plan_finetune = moved  # type: ignore[attr-defined]
    try:
        yield
    finally:
        preparation.plan_finetune = plan_finetune  # type: ignore[attr-defined]


def weights_of(output: str | Path) -> dict[str, Any]:
    """All tensors of a model or adapter directory."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(Path(output).glob("*.safetensors")):
        found.update(load_file(file))
    assert found
    return found


def assert_same_weights(one: str | Path, other: str | Path) -> None:
    """Bit for bit."""
    import torch

    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def run_line(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """A command line in this process: exit code, and what it said on stderr."""
    from memopt.launchers import main

    capfd.readouterr()
    code = main.run([str(each) for each in arguments])
    return code, capfd.readouterr().err


class Child:
    """One command line running in a process of its own."""

    def __init__(self, pid: int, output: Path, ended: Callable[[], int]) -> None:
        self.pid, self._output, self._ended = pid, output, ended
        self._code: int | None = None

    @property
    def said(self) -> str:
        """Both of its streams."""
        return self._output.read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for the signal that ended it."""
        if self._code is None:
            self._code = self._ended()
        return self._code


class Forks:
    """Starts command lines as forks of a process that has imported everything and has one thread only."""

    def __init__(self, directory: Path, warm_up: list[str]) -> None:
        """`warm_up`: arguments of a dry run."""
        self._directory = directory
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.finetune_helpers import serve; serve()", *warm_up],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def start(self, *arguments: object, where: str = "", die_at_call: int = 0) -> Child:
        """`memopt` with these arguments; `where` as in `placed`, `die_at_call` as in `mortal`."""
        self._count += 1
        output = self._directory / f"child-{self._count}.txt"
        order = {
            "arguments": [str(each) for each in arguments],
            "output": str(output),
            "where": where,
            "die_at_call": die_at_call,
        }
        return Child(int(self._ask(order)), output, lambda: int(self._ask("wait")))

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _ask(self, order: object) -> str:
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return self._server.stdout.readline()


def serve() -> None:
    """Fork a child per order; a child must be waited for before the next one is ordered."""
    import gc

    import peft  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import memopt.patches.hf_lora
    import memopt.profiler.render  # noqa: F401
    from memopt.launchers import main

    # following a model on fake tensors for the first time takes longer than all else
    assert main.run(sys.argv[1:]) == 0
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of this process would lack its other threads"
    gc.collect()
    gc.freeze()
    pid = 0
    for line in sys.stdin:
        order = json.loads(line)
        if order == "wait":
            _, status = os.waitpid(pid, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        else:
            pid = os.fork()
            if pid == 0:
                _obey(order)
            print(pid, flush=True)


def _obey(order: dict[str, Any]) -> None:
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from memopt.launchers import main

        if order["die_at_call"]:
            mortal(order["die_at_call"])
        if not order["where"]:
            code = main.run(order["arguments"])
        else:
            with placed(order["where"]):
                code = main.run(order["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def mortal(call: int) -> None:
    """Have this process killed at its `call`-th system call that changes a file, in the middle of it if it writes."""
    import threading

    left, lock = [call], threading.Lock()

    def counted(name: str) -> None:
        real = getattr(os, name)

        def wrapper(*args: Any, **more: Any) -> Any:
            with lock:
                left[0] -= 1
                dead = left[0] == 0
            if dead:
                os.write(2, f"died in {name}".encode())
                if name == "pwritev":
                    fd, views, offset = args
                    real(fd, [views[0][: len(views[0]) // 2 // 4096 * 4096]], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(os, name, wrapper)

    for name in ("pwritev", "fdatasync", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "posix_fallocate"):
        counted(name)


@pytest.fixture(scope="session")
def forks(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    warm_up = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--dry-run", "--quiet"]
    started = Forks(tmp_path_factory.mktemp("forks"), warm_up)
    yield started
    started.close()


def wait_for(reached: Callable[[], bool], what: str) -> None:
    """Poll until it is so; fails after DEADLINE_S."""
    end = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.002)


def rows_of(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a log file; none where there is no file yet."""
    if not log.exists():
        return []
    text = log.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
