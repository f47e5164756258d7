"""Killed, interrupted and resumed: the end is bit for bit that of a run which nothing happened to."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memopt.jobs.schedule import lr_at
from memopt.offload.engine import Engine
from tests.finetune_helpers import Child, Forks, Tiny, assert_same_weights, rows_of, run_line, wait_for, weights_of

KILLS = 20
STEPS = 70


def arguments(tiny: Tiny, at: Path, steps: int, *more: object, kind: str = "llama") -> list[object]:
    return [
        "finetune", "--model", tiny.model(kind), "--data", tiny.text, "--offload-dir", at / "run",
        "--output", at / "out", "--log-file", at / "log.jsonl", "--seq-len", 32, "--max-steps", steps, "--lr", 1e-3,
        "--quiet", "--save-every", 1, *more,
    ]  # fmt: skip


def finish(child: Child) -> None:
    assert child.wait() == 0, child.said


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_killed_at_twenty_random_moments(tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    """Gradient clipping, a mix of tiers, a save every step; half of the deaths are in the middle of a system call."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(forks.start(*arguments(tiny, undisturbed, STEPS), where="mix"))
    losses = {row["step"]: row["loss"] for row in rows_of(undisturbed / "log.jsonl")}
    draw = random.Random(20)
    log, last = killed / "log.jsonl", None
    died_in = set()
    for life in range(KILLS):
        before = lines(log)
        more = ["--resume"] if life else []
        if life % 2:
            child = forks.start(*arguments(tiny, killed, STEPS, *more), where="mix", die_at_call=draw.randrange(1, 160))
        else:
            child = forks.start(*arguments(tiny, killed, STEPS, *more), where="mix")
            enough = before + draw.randrange(1, 6)
            wait_for(lambda enough=enough: lines(log) >= enough, f"{enough} steps")
            for _ in range(draw.randrange(4000)):  # some way into the next step
                pass
            child.kill()
        assert child.wait() == -signal.SIGKILL, child.said
        died_in.add(child.said.partition("died in ")[2])
        new = rows_of(log)[before:]
        if new and last is not None:
            # nothing that was saved is done again, and nothing is left out
            assert last["saved_step"] < new[0]["step"] <= last["step"] + 1
        assert all(row["loss"] == losses[row["step"]] for row in new)
        last = new[-1] if new else last
    assert {"pwritev", "fdatasync"} < died_in
    assert last is not None and 10 < last["step"] < STEPS
    finish(forks.start(*arguments(tiny, killed, STEPS, "--resume"), where="mix"))
    assert rows_of(log)[-1]["step"] == STEPS
    assert_same_weights(killed / "out", undisturbed / "out")
    assert sorted(p.name for p in (killed / "run").iterdir()) == ["memopt-run.json", "state", "train.tokens"]


def test_killed_while_the_model_is_loaded(tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    """Each life dies a little later, on what the one before left; none of them has saved anything."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(forks.start(*arguments(tiny, undisturbed, 3), where="ssd"))
    for call in (1, 2, 3, 4, 5, 7, 8, 10, 13, 16, 20, 24, 28, 33):
        child = forks.start(*arguments(tiny, killed, 3, "--resume"), where="ssd", die_at_call=call)
        assert child.wait() == -signal.SIGKILL, child.said
        assert not rows_of(killed / "log.jsonl")
    child = forks.start(*[a for a in arguments(tiny, killed, 3, "--resume") if a != "--quiet"], where="ssd")
    finish(child)
    assert "nothing was saved yet: starting over" in child.said
    assert_same_weights(killed / "out", undisturbed / "out")


def test_killed_while_the_model_is_exported_and_while_all_is_removed(tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    finish(forks.start(*arguments(tiny, tmp_path, 2), where="mix"))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    reached = set()
    for call in range(1, 40):
        child = forks.start("export", tmp_path / "run", "--output", tmp_path / "out", "--overwrite", die_at_call=call)
        if child.wait() == 0:
            break
        reached.add(call)
        if (tmp_path / "out").exists():  # the old one or the new one, never half of one
            assert_same_weights(tmp_path / "out", tmp_path / "copy")
    assert len(reached) >= 6
    assert_same_weights(tmp_path / "out", tmp_path / "copy")
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    reached.clear()
    for call in range(1, 40):
        child = forks.start("clean", tmp_path / "run", die_at_call=call)
        if child.wait() != -signal.SIGKILL:
            break
        reached.add(call)
    assert len(reached) >= 6
    # one life died when all was gone but the empty directory, which nothing marks as ours any more
    assert child.wait() == 2 and not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(tiny: Tiny, forks: Forks, tmp_path: Path, number: int) -> None:
    """With dropout and moments rounded stochastically: both go on as if nothing had happened."""
    steps, more = 25, ["--optim-state-dtype", "bfloat16", "--grad-accum", 2]
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    finish(forks.start(*arguments(tiny, undisturbed, steps, *more, kind="gpt2"), where="mix"))
    child = forks.start(*arguments(tiny, stopped, steps, *more, kind="gpt2"), where="mix")
    wait_for(lambda: lines(stopped / "log.jsonl") >= 4, "four steps")
    child.kill(number)
    assert child.wait() == 130, child.said
    done = rows_of(stopped / "log.jsonl")[-1]["step"]
    assert 4 <= done < steps and not (stopped / "out").exists()
    assert f"interrupted; the state after step {done} is saved in {stopped / 'run'}; go on with --resume" in child.said
    finish(forks.start(*arguments(tiny, stopped, steps, *more, "--resume", kind="gpt2"), where="ssd"))
    assert [row["step"] for row in rows_of(stopped / "log.jsonl")] == list(range(1, steps + 1))
    assert_same_weights(stopped / "out", undisturbed / "out")
    assert weights_of(stopped / "out")


# -- signals at a chosen moment, in this process


@pytest.fixture
def handlers_stay() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def sending(*numbers: int, at: int = 1, then: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function that sends these signals to this process when it is called for the `at`th time."""
    calls = itertools.count(1)

    def send(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return then(*args, **kwargs) if then is not None else None

    return send


@pytest.mark.usefixtures("handlers_stay", "one_thread")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", ["prepare_job", "fill_state"])
def test_before_the_first_step_it_stops_at_once_and_leaves_nothing(
    tiny: Tiny,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    where: str,
) -> None:
    monkeypatch.setattr(f"memopt.jobs.finetune.{where}", sending(number))
    code, said = run_line(capfd, *arguments(tiny, tmp_path, 2))
    assert code == 130 and said == "memopt: interrupted; nothing was saved yet\n"
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.usefixtures("handlers_stay", "one_thread")
def test_asked_twice_it_stops_at_once_and_says_what_is_saved(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("memopt.jobs.finetune.lr_at", sending(signal.SIGINT, signal.SIGINT, at=3, then=lr_at))
        code, said = run_line(capfd, *arguments(tiny, tmp_path, 4))
    assert code == 130 and len(rows_of(tmp_path / "log.jsonl")) == 2
    # the update of step 2 had not been taken along by the forward of step 3
    assert f"interrupted; the last save in {tmp_path / 'run'} is of step 1; go on with --resume" in said
    assert run_line(capfd, *arguments(tiny, tmp_path, 4, "--resume"))[0] == 0
    assert [row["step"] for row in rows_of(tmp_path / "log.jsonl")] == [1, 2, 2, 3, 4]


@pytest.mark.usefixtures("handlers_stay", "one_thread")
def test_a_closed_terminal_ends_the_run_like_a_stop(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = [a for a in arguments(tiny, tmp_path, 4) if a != "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr("memopt.jobs.finetune.lr_at", sending(signal.SIGHUP, at=2, then=lr_at))
        code, said = run_line(capfd, *loud)
    assert code == 130 and "step 1/4" in said and "step 2/4" not in said and "stopping" not in said
    assert f"the state after step 2 is saved in {tmp_path / 'run'}" in said
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # under nohup it goes on
    try:
        with monkeypatch.context() as patch:
            patch.setattr("memopt.jobs.finetune.lr_at", sending(signal.SIGHUP, then=lr_at))
            assert run_line(capfd, *loud, "--resume")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("handlers_stay", "one_thread")
def test_a_long_evaluation_is_broken_off(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)

    def evaluate(self: Engine, batch: Any) -> tuple[float, int]:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0, 1

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    code, said = run_line(capfd, *arguments(tiny, tmp_path, 2, "--eval-data", tiny.text))
    assert code == 130 and next(calls) == 3 and not rows_of(tmp_path / "log.jsonl")
    assert "the state after step 0 is saved" in said


@pytest.mark.usefixtures("handlers_stay", "one_thread")
def test_interrupted_while_the_result_is_written(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("memopt.jobs.finetune.write_model", sending(signal.SIGTERM))
        code, said = run_line(capfd, *arguments(tiny, tmp_path, 2))
    assert code == 130 and f"the last save in {tmp_path / 'run'} is of step 2; go on with --resume" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "run"]
    assert run_line(capfd, *arguments(tiny, tmp_path, 2, "--resume"))[0] == 0
    assert weights_of(tmp_path / "out")
