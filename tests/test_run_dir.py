"""The directories of a run: what is claimed, held, cleaned and replaced, and what is left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.jobs.output_dir import MARKER, check_file, check_output, replace_output, require_space
from memopt.jobs.run_dir import MARKER as MARKER_OF_RUN
from memopt.jobs.run_dir import RunDirectory
from memopt.store.block_store import BlockStore
from memopt.store.errors import StoreForeign, StoreFull, StoreLocked, StoreMissing
from memopt.store.extents import KindPolicy, TensorSpec
from memopt.store.regions import Region
from memopt.store.transfer import IoPool


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    assert directory.look() == [] and not directory.path.exists()
    assert directory.claim({"lr": 1})
    return directory


def make_store(path: Path, *commits: int) -> None:
    specs, kinds = [TensorSpec("t", "weights", 4096)], {"weights": KindPolicy()}
    with IoPool(1) as pool, Region(4096) as zeros, BlockStore.create(path, specs, kinds=kinds, pool=pool) as store:
        for step in commits:
            store.write("t", zeros.view).wait()
            store.commit({"step": step, "steps": 9}).wait()


def test_a_claimed_directory_remembers_its_run(run: RunDirectory) -> None:
    assert run.about()["config"] == {"lr": 1}
    assert not run.claim({"lr": 2}) and run.about()["config"] == {"lr": 1}
    run.remember({"lr": 3})
    assert run.about()["config"] == {"lr": 3}
    assert run.look() == [] and run.saved() is None


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("a.txt", "state", ".hidden"):
        (tmp_path / name / "x").mkdir(parents=True)
    with pytest.raises(StoreForeign, match="not memopt's .*name an empty or new directory"):
        RunDirectory(tmp_path).look()
    with pytest.raises(StoreMissing, match="holds no memopt run"):
        RunDirectory(tmp_path).clean()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "a.txt", "state"]


def test_what_a_killed_claim_leaves_is_taken_over(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / ".memopt-run.json.abc123.tmp").write_text('{"form')
    (run.path / "lost+found").mkdir()
    assert run.look() == [] and run.claim({})
    assert run.clean() == ["lost+found"]


def test_one_process_at_a_time(run: RunDirectory) -> None:
    with run.hold():
        for call in (run.hold().__enter__, run.clean):
            with pytest.raises(StoreLocked, match=f"run is in use by process {os.getpid()}"):
                call()
    with run.hold():
        pass
    assert run.clean() == [] and not run.path.exists()


def test_what_was_saved(run: RunDirectory) -> None:
    make_store(run.state)
    assert run.saved() is None  # made, and nothing in it
    run.forget(run.state)
    make_store(run.state, 4)
    assert run.saved() == {"step": 4, "steps": 9}
    with IoPool(1) as pool, BlockStore.open(run.state, pool), pytest.raises(StoreLocked):
        run.saved()


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "memopt-store.json"]])
def test_a_store_that_was_never_born_is_no_store(run: RunDirectory, left: list[str]) -> None:
    run.state.mkdir()
    for name in left:
        (run.state / name).touch()
    assert run.saved() is None
    run.forget(run.state)
    assert not run.state.exists()


def test_a_half_removed_store_holds_nothing(run: RunDirectory) -> None:
    make_store(run.state)
    (run.state / "weights.bin").unlink()
    assert run.saved() is None
    (run.state / "lock").unlink()
    assert run.saved() is None
    run.forget(run.state)
    assert not run.state.exists()


def test_clean_removes_what_memopt_made_and_tells_what_it_left(run: RunDirectory) -> None:
    make_store(run.state, 1)
    make_store(run.scratch)
    ours = ["train.tokens", "eval.tokens", "train.tokens.part", ".memopt-run.json.1.tmp"]
    theirs = ["notes.txt", "my.tokens", "demo-corpus", "memopt.log"]
    for name in (*ours, *theirs[:2], theirs[3]):
        (run.path / name).write_text(name)
    (run.path / "demo-model").mkdir()
    (run.path / "demo-model" / "memopt-demo.json").write_text("{}")
    (run.path / "demo-corpus").mkdir()  # without its marker: somebody's
    (run.path / "demo-corpus" / "poem.txt").write_text("mine")
    (run.state / "also-mine.txt").write_text("mine")
    assert run.clean() == sorted([*theirs, "state"])
    assert (run.state / "also-mine.txt").read_text() == "mine" and os.listdir(run.state) == ["also-mine.txt"]
    assert (run.path / "demo-corpus" / "poem.txt").exists()
    with pytest.raises(StoreMissing):
        run.clean()


def test_clean_leaves_everything_while_the_store_is_open(run: RunDirectory) -> None:
    make_store(run.state, 1)
    (run.path / "train.tokens").write_text("")
    before = sorted(map(str, run.path.rglob("*")))
    with IoPool(1) as pool, BlockStore.open(run.state, pool, writable=False), pytest.raises(StoreLocked):
        run.clean()
    assert sorted(map(str, run.path.rglob("*"))) == before


# -- the output directory


def write(place: Path, text: str) -> None:
    place.mkdir()
    (place / "model").write_text(text)


def test_an_output_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    check_output(out, overwrite=False)
    assert not out.parent.exists()
    with replace_output(out, overwrite=False) as place:
        write(place, "one")
        assert not out.exists()
    assert (out / "model").read_text() == "one"
    with replace_output(out, overwrite=True) as place:
        write(place, "two")
        assert (out / "model").read_text() == "one"
    assert (out / "model").read_text() == "two"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_output_behind_a_link_is_written_there(tmp_path: Path) -> None:
    (tmp_path / "large" / "out").mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "large" / "out")
    for text in ("one", "two"):
        check_output(link, overwrite=True)
        with replace_output(link, overwrite=True) as place:
            assert place.is_relative_to(tmp_path / "large")
            write(place, text)
        assert link.is_symlink() and (tmp_path / "large" / "out" / "model").read_text() == text


def test_a_failed_output_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replace_output(out, overwrite=False) as place:
        write(place, "one")
    with pytest.raises(OSError, match="disk"), replace_output(out, overwrite=True) as place:
        write(place, "two")
        raise OSError("disk")
    assert (out / "model").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_came_meanwhile_are_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(BadInput, match=f"the finished result is in {tmp_path}/out-1"),
        replace_output(out, overwrite=overwrite) as place,
    ):
        write(place, "new")
        out.mkdir()
        (out / "thesis.tex").write_text("irreplaceable")
    assert (out / "thesis.tex").read_text() == "irreplaceable"
    assert (tmp_path / "out-1" / "model").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-1"]


def test_a_killed_replacement_is_tidied(tmp_path: Path) -> None:
    out, beside = tmp_path / "out", tmp_path / ".out.memopt-new"
    with replace_output(out, overwrite=False) as place:
        write(place, "one")
    # killed between the two renames: the old one is put back by the next attempt, even by one that fails
    beside.mkdir()
    (beside / MARKER).write_text("{}")
    out.rename(beside / "replaced")
    with pytest.raises(ZeroDivisionError), replace_output(out, overwrite=True):
        raise ZeroDivisionError
    assert (out / "model").read_text() == "one" and not beside.exists()


def test_a_directory_in_the_way_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.memopt-new").mkdir()
    (tmp_path / ".out.memopt-new" / "theirs").write_text("")
    with (
        pytest.raises(BadInput, match="in the way and was not made by memopt"),
        replace_output(tmp_path / "out", overwrite=False),
    ):
        pass
    assert (tmp_path / ".out.memopt-new" / "theirs").exists()


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, overwrite, words in (
        ("full", False, "--overwrite"),
        ("full", True, "was not written by memopt"),
        ("file", True, "is a file"),
        ("file/out", False, "is a file"),
        ("link", True, "a link to nothing"),
    ):
        with pytest.raises(BadInput, match=words):
            check_output(tmp_path / name, overwrite=overwrite)
    for run in ("o", "o/run", "o/../o"):
        with pytest.raises(BadInput, match="would replace --offload-dir"):
            check_output(tmp_path / "o", overwrite=True, keep={"--offload-dir": tmp_path / run})
    check_output(tmp_path / "o" / "out", overwrite=True, keep={"--offload-dir": tmp_path / "o"})
    (tmp_path / "full" / MARKER).write_text(json.dumps({}))
    check_output(tmp_path / "full", overwrite=True)


def test_what_was_added_to_a_result_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replace_output(out, overwrite=False) as place:
        write(place, "one")
    (out / "notes.md").write_text("hours of work")
    with pytest.raises(BadInput, match=r"did not write \(notes.md\), and --overwrite would remove them"):
        check_output(out, overwrite=True)
    (out / MARKER).write_text("[]")
    with pytest.raises(BadInput, match=f"{MARKER} in it cannot be read"):
        check_output(out, overwrite=True)


def test_a_file_is_known_to_be_impossible_before_the_work(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is a directory"), (tmp_path / "none" / "r.json", "there is no directory")):
        with pytest.raises(BadInput, match=words):
            check_file(path, "--report")
    check_file(tmp_path / "r.json", "--report")
    assert not list(tmp_path.iterdir())


def test_a_result_without_room_is_refused(tmp_path: Path) -> None:
    require_space(tmp_path / "deep" / "out", 1)
    with pytest.raises(StoreFull, match=r"--output .*out: the model takes 1048576.00 TiB, .* is free there"):
        require_space(tmp_path / "deep" / "out", 2**60)


@pytest.mark.parametrize("name", ["state", "state/x", "scratch", "train.tokens", "demo-model", MARKER_OF_RUN])
def test_a_runs_own_places_are_not_for_other_files(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(BadInput, match="is where the run keeps its"):
        run.refuse_own(tmp_path / "run" / "x" / ".." / name, "--output")
    run.refuse_own(tmp_path / "run" / "out", "--output")
    run.refuse_own(tmp_path / name, "--output")
