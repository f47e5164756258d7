"""Bad input: one line that says what, where and what to do, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memopt.errors import BadInput
from memopt.jobs.output_dir import check_output
from memopt.jobs.run_dir import RunDirectory
from tests.finetune_helpers import Forks, Tiny, run_line

pytestmark = pytest.mark.usefixtures("one_thread")

Say = Callable[..., str]


@pytest.fixture
def refused(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Say:
    """Run `memopt finetune` with these flags over good ones; it must fail with one line, and leave nothing new."""

    def call(*more: object, code: int = 2) -> str:
        before = {str(p) for p in tmp_path.rglob("*")}
        good = {"--model": tiny.model(), "--data": tiny.text}
        places = {"--offload-dir": tmp_path / "run", "--output": tmp_path / "out"}
        flags = {**good, **places, "--seq-len": 32, "--max-steps": 2, **dict(zip(more[::2], more[1::2], strict=True))}
        got, said = run_line(capfd, "finetune", "--quiet", *[x for pair in flags.items() for x in pair])
        assert got == code, said
        assert said.startswith("memopt: ") and said.count("\n") == 1, said
        assert {str(p) for p in tmp_path.rglob("*")} == before
        return said

    return call


def copy_of(model: str, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


# -- model


def test_models_that_are_not_there(refused: Say, tmp_path: Path) -> None:
    assert "no such directory" in refused("--model", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refused("--model", tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "is a file; give the directory" in refused("--model", tmp_path / "file")


def test_a_damaged_config_or_checkpoint(refused: Say, tiny: Tiny, tmp_path: Path) -> None:
    model = copy_of(tiny.model(), tmp_path / "model")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:2000])
    assert "is not a whole safetensors file" in refused("--model", model)
    (model / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refused("--model", model)
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    said = refused("--model", model)
    assert "pickled weights only" in said and "save_pretrained" in said
    (model / "config.json").write_text("{")
    assert "config.json" in refused("--model", model)


def test_a_model_whose_blocks_cannot_be_found(refused: Say, tiny: Tiny, tmp_path: Path) -> None:
    model = copy_of(tiny.model(), tmp_path / "model")
    settings = {"model_type": "ctrl", "n_layer": 2, "n_embd": 32, "dff": 32, "n_head": 4, "vocab_size": 304}
    (model / "config.json").write_text(json.dumps(settings))
    assert "CTRLLMHeadModel: its decoder blocks cannot be found" in refused("--model", model, "--init", "random")
    (model / "config.json").write_text(json.dumps({"model_type": "albert"}))
    assert "no causal language model" in refused("--model", model, "--init", "random")


def test_a_config_that_does_not_belong_to_its_weights(refused: Say, tiny: Tiny, tmp_path: Path) -> None:
    model = copy_of(tiny.model(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 310}))
    said = refused("--model", model)
    assert "(304, 32) in the checkpoint and (310, 32) by config.json" in said


def test_a_tokenizer_larger_than_the_model(refused: Say, tiny: Tiny) -> None:
    said = refused("--model", tiny.model(vocab_size=90))
    assert re.search(r"the tokenizer gives token \d+, but the model's vocabulary has 90", said)


def test_a_model_without_tokenizer(refused: Say, tiny: Tiny, tmp_path: Path) -> None:
    model = copy_of(tiny.model(), tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "no usable tokenizer" in refused("--model", model)


def test_tensor_names_with_path_separators(refused: Say, tiny: Tiny, tmp_path: Path) -> None:
    model = copy_of(tiny.model(), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "../../etc/passwd": torch.zeros(2)}, model / "model.safetensors", metadata={"format": "pt"})
    said = refused("--model", model)
    assert "../../etc/passwd" in said and "path separator" in said


# -- data


def test_data_that_cannot_be_used(refused: Say, tmp_path: Path) -> None:
    assert "no such file" in refused("--data", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt: holds no text" in refused("--data", tmp_path / "empty.txt")
    (tmp_path / "folder").mkdir()
    assert "holds no .txt or .jsonl file" in refused("--data", tmp_path / "folder")
    (tmp_path / "x.parquet").write_text("")
    assert "unknown kind of file '.parquet'" in refused("--data", tmp_path / "x.parquet")
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    assert "latin.txt:3: not UTF-8" in refused("--data", tmp_path / "latin.txt")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good"}\n{"text": "good"}\n{"txt": "misspelt"}\n')
    said = refused("--data", rows)
    assert "rows.jsonl:3: no `text` (the record has: txt)" in said
    rows.write_text('{"text": "good"}\n{"text": \n')
    assert "rows.jsonl:2: not JSON" in refused("--data", rows)
    assert "none.txt" in refused("--eval-data", tmp_path / "none.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_that_may_not_be_read(refused: Say, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text")
    (tmp_path / "secret.txt").chmod(0)
    assert "cannot be read" in refused("--data", tmp_path / "secret.txt")


# -- budgets


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--dram", "4GX", "dram"),
        ("--dram", "0", "a budget of nothing"),
        ("--dram", "-1GiB", "dram"),
        ("--gpu", "0", "--device cpu"),
        ("--ssd", "0GiB", "a budget of nothing"),
        ("--dram", "much", "dram"),
    ],
)
def test_budgets_that_make_no_sense(refused: Say, flag: str, value: str, words: str) -> None:
    assert words in refused(flag, value)


def test_a_budget_below_what_the_interpreter_takes(refused: Say, tiny: Tiny, forks: Forks, tmp_path: Path) -> None:
    said = refused("--dram", "32MiB", code=1)
    assert "does not fit 32.00 MiB of DRAM" in said and re.search(r"--dram \d+MiB", said)
    run = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--seq-len", 32, "--max-steps", 3, "--offload-dir"]
    child = forks.start(*run, tmp_path / "run", "--output", tmp_path / "out", "--dram", "32MiB")
    assert child.wait() == 1
    smallest = re.search(r"--dram (\d+MiB)", child.said)
    assert smallest is not None, child.said
    report = tmp_path / "report.json"
    more = ["--output", tmp_path / "out", "--dram", smallest[1], "--report", report]
    child = forks.start(*run, tmp_path / "run", *more)
    assert child.wait() == 0, child.said
    assert json.loads(report.read_text())["verdict"] == "within"


def test_too_little_ssd(refused: Say) -> None:
    said = refused("--ssd", "100KiB", "--dram", "90%", code=1)
    assert "of SSD" in said and "--ssd" in said


# -- the offload directory


def test_an_offload_directory_that_is_a_file(refused: Say, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        assert "is or lies below a file" in refused("--offload-dir", tmp_path / path)


def test_an_offload_directory_of_somebody_else(refused: Say, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "photo.jpg").write_text("")
    said = refused("--offload-dir", tmp_path / "theirs")
    assert "not memopt's (photo.jpg)" in said


def test_an_offload_directory_in_use(refused: Say, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.claim({})
    with directory.hold():
        said = refused()
    assert f"run is in use by process {os.getpid()}" in said


Mount = Callable[..., Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """A small tmpfs; skips where mounting is not allowed."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mounted{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.decode().strip()}")
        places.append(place)
        return place

    yield mount
    busy = [place for place in places if subprocess.run(["umount", place], capture_output=True, check=False).returncode]
    for place in busy:
        subprocess.run(["umount", "--lazy", place], check=True)
    assert not busy, "a run left files open"


@pytest.mark.parametrize("room", ["16k", "300k"])
def test_a_full_disk(refused: Say, mounted: Mount, room: str) -> None:
    said = refused("--offload-dir", mounted(f"size={room}") / "run")
    assert "space" in said or "needs" in said or "No space" in said


def test_a_read_only_disk(refused: Say, mounted: Mount) -> None:
    assert "Read-only file system" in refused("--offload-dir", mounted("size=1m,ro") / "run")
    assert "cannot be written to" in refused("--output", mounted("size=1m,ro") / "out")


def test_a_mount_point_is_no_output(mounted: Mount) -> None:
    with pytest.raises(BadInput, match="is a mount point"):
        check_output(mounted("size=1m"), overwrite=False)


def test_no_room_for_the_result(refused: Say, mounted: Mount) -> None:
    assert "the model takes 166.88 KiB" in refused("--output", mounted("size=100k") / "out")


@pytest.mark.parametrize(("offload", "method"), [(True, "full"), (False, "full"), (True, "lora")])
def test_a_disk_that_gets_full_while_the_result_is_written(
    tiny: Tiny, mounted: Mount, tmp_path: Path, capfd: pytest.CaptureFixture[str], offload: bool, method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    small = mounted("size=100k" if method == "full" else "size=12k")
    run = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--seq-len", 32, "--max-steps", 1, "--quiet"]
    run += ["--method", method]
    run += ["--offload-dir", tmp_path / "run"] if offload else []
    with monkeypatch.context() as patch:
        patch.setattr("memopt.jobs.finetune.require_space", lambda output, nbytes: None)
        code, said = run_line(capfd, *run, "--output", small / "out")
    assert code == 2 and f"--output {small / 'out'} could not be written" in said and said.count("\n") == 1
    assert ("is saved in" if offload else "nothing was saved") in said and not list(small.iterdir())
    if offload:
        export = ["export", tmp_path / "run", "--output", small / "out", "--quiet"]
        if method == "full":
            assert "the model takes 166.88 KiB" in run_line(capfd, *export)[1]
        with monkeypatch.context() as patch:
            patch.setattr("memopt.jobs.export.require_space", lambda output, nbytes: None)
            code, said = run_line(capfd, *export)
        assert code == 2 and said.count("\n") == 1 and not list(small.iterdir())
        assert run_line(capfd, *run, "--resume", "--output", tmp_path / "out")[0] == 0


def test_files_in_each_others_way(refused: Say, tiny: Tiny, tmp_path: Path) -> None:
    assert "is where the run keeps its state" in refused("--output", tmp_path / "run" / "state")
    assert "is where the run keeps its scratch" in refused("--log-file", tmp_path / "run" / "scratch")
    assert "there is no directory" in refused("--report", tmp_path / "none" / "r.json")
    assert "would replace --model" in refused("--output", tiny.model())
    (tmp_path / "texts").mkdir()
    data = shutil.copy(tiny.text, tmp_path / "texts")
    assert "would replace --data" in refused("--output", tmp_path / "texts", "--data", data)


def test_tmpfs_is_allowed_with_a_warning(tiny: Tiny, mounted: Mount, capfd: pytest.CaptureFixture[str]) -> None:
    place = mounted("size=64m")
    run = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--seq-len", 32, "--max-steps", 1]
    code, said = run_line(capfd, *run, "--offload-dir", place / "run", "--output", place / "out")
    assert code == 0 and "is on tmpfs, which is DRAM" in said
    assert run_line(capfd, "clean", place / "run")[0] == 0


# -- a run that is there


@pytest.fixture(scope="module")
def unfinished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offload directory that holds an unfinished run (its learning rate let it diverge in the second step)."""
    from memopt.launchers import main

    at = tmp_path_factory.mktemp("unfinished")
    run = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--seq-len", "32", "--max-steps", "2", "--quiet"]
    more = ["--lr", "1e38", "--schedule", "constant", "--save-every", "1", "--output", str(at / "out")]
    assert main.run([*run, "--offload-dir", str(at / "run"), *more]) == 1
    return at / "run"


RESUME = ("--lr", "1e38", "--schedule", "constant", "--save-every", "1")


@pytest.fixture
def held(unfinished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(unfinished, tmp_path / "run"))


def resume(capfd: pytest.CaptureFixture[str], tiny: Tiny, held: Path, *more: object) -> tuple[int, str]:
    run = ["finetune", "--model", tiny.model(), "--data", tiny.text, "--seq-len", 32, "--max-steps", 2, "--quiet"]
    return run_line(capfd, *run, "--offload-dir", held, *RESUME, "--output", held.parent / "out", "--resume", *more)


def test_the_spoilt_copies_are_good_before(tiny: Tiny, held: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = resume(capfd, tiny, held)
    assert code == 1 and "step 2: the loss is" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--lr", "1e-3"), "lr was 1e+38 and is now 0.001"),
        (("--seed", 7), "seed was 42 and is now 7"),
        (("--seq-len", 16), "seq_len was 32 and is now 16"),
        (("--max-steps", 5), "max_steps was 2 and is now 5"),
        (("--max-grad-norm", 0), "max_grad_norm was 1.0 and is now 0.0"),
        (("--method", "lora"), "method was 'full' and is now 'lora'"),
    ],
)
def test_resuming_with_other_settings_names_them(
    tiny: Tiny, unfinished: Path, capfd: pytest.CaptureFixture[str], more: Any, words: str
) -> None:
    code, said = resume(capfd, tiny, unfinished, *more)
    assert code == 2 and words in said and said.count("\n") == 1


def test_resuming_with_another_model_or_other_data(
    tiny: Tiny, held: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = resume(capfd, tiny, held, "--model", tiny.model(num_hidden_layers=2))
    assert code == 2 and "model was" in said and "num_hidden_layers-2" in said
    assert "names, shapes or types of the model's parameters changed" in said
    text = tmp_path / "same-name.txt"
    text.write_text(Path(tiny.text).read_text() + "And more.")
    code, said = resume(capfd, tiny, held, "--data", text)
    assert code == 2 and "data was" in said and "the content of the data changed" in said
    assert resume(capfd, tiny, held)[0] == 1  # nothing was spoilt: it still goes on with the old settings


@pytest.mark.parametrize("command", ["finetune", "export"])
def test_a_flipped_byte_of_a_weight(
    tiny: Tiny, held: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    weights = held / "state" / "weights.bin"
    tensor = load_file(Path(tiny.model()) / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    content = bytearray(weights.read_bytes())
    at = content.find(tensor.numpy().tobytes())
    assert at > 0 and content.find(tensor.numpy().tobytes(), at + 1) < 0
    content[at + 5] ^= 1
    weights.write_bytes(content)
    if command == "finetune":
        code, said = resume(capfd, tiny, held)
    else:
        code, said = run_line(capfd, "export", held, "--output", tmp_path / "out", "--quiet")
    assert code == 2 and said.count("\n") == 1
    assert re.search(r"'block\.1\.weights'.* bytes at \d+ of \S+weights.bin .*checksum", said), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_flipped_bytes_of_the_moments(tiny: Tiny, held: Path, capfd: pytest.CaptureFixture[str]) -> None:
    moments = held / "state" / "moments.bin"
    content = bytearray(moments.read_bytes())
    content[::4096] = b"\xff" * len(content[::4096])
    moments.write_bytes(content)
    code, said = resume(capfd, tiny, held)
    assert code == 2 and "checksum" in said and "moments" in said and said.count("\n") == 1


def test_a_truncated_or_missing_file(tiny: Tiny, held: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = held / "state" / "weights.bin"
    os.truncate(weights, weights.stat().st_size // 2)
    code, said = resume(capfd, tiny, held)
    assert code == 2 and "it was cut off or extended" in said
    weights.unlink()
    code, said = resume(capfd, tiny, held)
    assert code == 2 and "weights.bin is missing" in said


@pytest.mark.parametrize("marker", ["memopt-run.json", "state/memopt-store.json"])
def test_a_directory_of_another_memopt(tiny: Tiny, held: Path, capfd: pytest.CaptureFixture[str], marker: str) -> None:
    about = json.loads((held / marker).read_text())
    (held / marker).write_text(json.dumps({**about, "format": 99, "memopt": "7.3.1"}))
    for more in ((), ("--resume",)):
        code, said = resume(capfd, tiny, held, *more)
        assert code == 2 and "was made by memopt 7.3.1" in said and "format 99" in said and said.count("\n") == 1
    code, said = run_line(capfd, "export", held, "--output", held.parent / "out")
    assert code == 2 and "7.3.1" in said


def test_a_damaged_marker(tiny: Tiny, held: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for text in ("{", "[]", ""):
        (held / "memopt-run.json").write_text(text)
        code, said = resume(capfd, tiny, held)
        assert code == 2 and "memopt-run.json cannot be read" in said and said.count("\n") == 1
