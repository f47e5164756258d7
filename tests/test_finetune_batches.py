"""`memopt.finetune(config, batches)`: what is handed over is used as it is, or refused before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import memopt
from memopt.errors import BadInput
from tests.finetune_helpers import VOCABULARY, Tiny
from tests.test_finetune_result import config

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 19).reshape(2, 8)


def micro(**changes: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "labels": IDS, **changes}


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no step"),
        ([[micro()], []], "step 1 has no micro-batches"),
        ([micro()], r"step 0 is a micro-batch.*give \[\[batch\], ...\]"),
        ([[{"input_ids": IDS}]], "without input_ids or labels"),
        ([[micro(labels=IDS.numpy())]], "labels is no tensor but ndarray"),
        ([[micro(position_ids=None)]], "position_ids is no tensor but NoneType"),
        ([[micro(input_ids=IDS[0], labels=IDS[0])]], r"\(8,\) and \(8,\); give both as \(batch, sequence\)"),
        ([[micro(labels=IDS[:, 1:])]], r"\(2, 8\) and \(2, 7\)"),
        ([[micro(attention_mask=torch.ones(2, 7))]], r"attention_mask is \(2, 7\)"),
        ([[micro()], [micro(input_ids=IDS + VOCABULARY)]], f"step 1: input_ids reach from .*has {VOCABULARY} tokens"),
        ([[micro(input_ids=IDS - 4)]], "input_ids reach from -1"),
        ([[micro(labels=IDS + VOCABULARY - 18)]], f"labels reach from .* to {VOCABULARY}, the model"),
        ([[micro(labels=IDS - 4)]], "labels reach from -1 to 14.* -100 stands for no loss"),
    ],
)
def test_batches_that_cannot_be_used(tiny: Tiny, tmp_path: Path, batches: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        memopt.finetune(config(tiny, tmp_path, data=None), batches=batches)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_batches_that_the_model_refuses(tiny: Tiny, tmp_path: Path) -> None:
    """A sequence longer than its table of positions."""
    longer = torch.full((1, 130), 5)
    run = config(tiny, tmp_path, model=tiny.model("gpt2"), data=None)
    with pytest.raises(BadInput, match=r"\(128 positions\) takes no micro-batch of input_ids \(1, 130\), labels"):
        memopt.finetune(run, batches=[[{"input_ids": longer, "labels": longer}]])
    assert not (tmp_path / "run").exists()


def test_auto_is_for_data(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="batch_size = 'auto' with batches"):
        memopt.finetune(config(tiny, tmp_path, data=None, batch_size="auto"), batches=[[micro()]])


def test_held_out_data_may_be_longer_than_the_batches(tiny: Tiny, tmp_path: Path) -> None:
    run = config(tiny, tmp_path, data=None, seq_len=128, eval_data=tiny.held_out, max_steps=None)
    report = memopt.finetune(run, batches=[[micro()], [micro()]])
    assert [step for step, _ in report.results["eval_losses"]] == [0, 2]


def test_held_out_data_may_be_larger_than_the_data(tiny: Tiny, tmp_path: Path) -> None:
    """An evaluation takes no more tokens at once than a step, which here is all of the data."""
    short = tmp_path / "short.txt"
    short.write_text("A few words and no more than that.")
    runs = {
        at: config(tiny, tmp_path / at, data=str(short), seq_len=64, grad_accum=accum, eval_data=tiny.text, max_steps=2)
        for at, accum in (("one", 1), ("eight", 8))
    }
    reports = {at: memopt.finetune(run) for at, run in runs.items()}
    one, eight = (reports[at].results["eval_losses"] for at in ("one", "eight"))
    assert [step for step, _ in eight] == [0, 2]
    assert [loss for _, loss in eight] == pytest.approx([loss for _, loss in one], rel=1e-6)
