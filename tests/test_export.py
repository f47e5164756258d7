"""`memopt export`: the model of the last save, from the offload directory alone and the model it began with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import memopt
from memopt.errors import BadInput
from memopt.jobs.export import export_run
from memopt.jobs.run_dir import RunDirectory
from memopt.store.errors import StoreLocked, StoreMissing
from tests.finetune_helpers import Tiny, assert_same_weights, placed, run_line, weights_of
from tests.test_finetune_result import config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def began_here(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that was started with relative paths, in a directory of its own."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(tiny.model("mixtral", "bfloat16"), home / "model")
    monkeypatch.chdir(home)
    run = config(tiny, Path("."), model="model", max_steps=2, offload_dir="run", output="out")
    with placed("mix"):
        memopt.finetune(run)
    return home


def test_from_anywhere(began_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_run(Path("home/run"), Path("exported"), quiet=True) == 2
    assert_same_weights(tmp_path / "exported", began_here / "out")
    assert {p.name for p in (tmp_path / "exported").iterdir()} == {p.name for p in (began_here / "out").iterdir()}
    assert all(t.dtype == torch.bfloat16 for t in weights_of("exported").values())
    AutoModelForCausalLM.from_pretrained("exported")


def test_the_command_says_which_step(began_here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from memopt.launchers import main

    assert main.run(["export", "run", "--output", "again"]) == 0
    assert "again: the model after step 2" in capfd.readouterr().out.replace("\n", " ")
    code, said = run_line(capfd, "export", "run", "--output", "again")
    assert code == 2 and "--overwrite" in said
    assert run_line(capfd, "export", "run", "--output", "again", "--overwrite", "--quiet") == (0, "")


def test_what_cannot_be_exported(began_here: Path, tiny: Tiny) -> None:
    with pytest.raises(StoreMissing, match="holds no memopt run"):
        export_run(began_here / "none", began_here / "x")
    with pytest.raises(BadInput, match="would replace --offload-dir"):
        export_run(began_here / "run", began_here / "run", overwrite=True)
    new = RunDirectory(began_here / "new")
    new.claim(config(tiny, began_here).to_dict())
    with pytest.raises(BadInput, match="nothing was saved yet.*--resume"):
        export_run(new.path, began_here / "x")
    shutil.move(began_here / "model", began_here / "moved")
    with pytest.raises(BadInput, match="no such directory"):
        export_run(began_here / "run", began_here / "x")
    shutil.copytree(tiny.model(), began_here / "model")
    with pytest.raises(BadInput, match="is not the model that this run began with"):
        export_run(began_here / "run", began_here / "x")
    assert not (began_here / "x").exists()


def test_not_while_somebody_trains(began_here: Path) -> None:
    from memopt.store.block_store import BlockStore
    from memopt.store.transfer import IoPool

    with IoPool(1) as pool, BlockStore.open(began_here / "run" / "state", pool), pytest.raises(StoreLocked):
        export_run(began_here / "run", began_here / "x")
    assert not (began_here / "x").exists()
