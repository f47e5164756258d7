"""Killed, interrupted and resumed: the end is bit for bit that of a run which nothing happened to."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.finetune_helpers import Child, Forks, Tiny, assert_same_weights, rows_of, wait_for, weights_of

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
