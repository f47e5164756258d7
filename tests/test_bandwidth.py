from __future__ import annotations

import os
from pathlib import Path

import pytest

from memopt.errors import BadInput, StoreError
from memopt.jobs import probe as probe_job
from memopt.machine import Machine
from memopt.store import bandwidth
from memopt.store.files import DirectFile
from memopt.units import KiB, MiB


def small(directory: Path) -> bandwidth.SsdSpeed:
    return bandwidth.measure_ssd(directory, nbytes=2 * MiB, piece_bytes=128 * KiB, workers=2)


def test_measures_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    write_from = DirectFile.write_from

    def watched(file: DirectFile, view: memoryview, offset: int) -> None:
        seen.append(os.listdir(tmp_path))
        write_from(file, view, offset)

    monkeypatch.setattr(DirectFile, "write_from", watched)
    speed = small(tmp_path)
    for rate in (speed.read_per_s, speed.write_per_s, speed.mixed_per_s, speed.read_iops):
        assert rate > 0
    assert speed.direct != bool(speed.reason)
    assert (speed.mixed_reads, speed.mixed_writes) == (4, 3)
    assert seen
    assert all(names == [] for names in seen), "the file has no name while it is in use: a kill leaves nothing"
    assert os.listdir(tmp_path) == []


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: DirectFile, view: memoryview, offset: int) -> None:
        raise StoreError(f"{file.path}: broken at {offset}")

    monkeypatch.setattr(DirectFile, "read_into", fail)
    with pytest.raises(StoreError, match="broken at"):
        small(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_mix_is_the_stated_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With reads alone and writes alone removed, what is moved is 4 to 3."""
    calls = {"read": 0, "write": 0}
    read_into, write_from = DirectFile.read_into, DirectFile.write_from

    def read(file: DirectFile, view: memoryview, offset: int) -> None:
        calls["read"] += len(view) > 4096
        assert 0 <= offset < file.nbytes
        read_into(file, view, offset)

    def write(file: DirectFile, view: memoryview, offset: int) -> None:
        calls["write"] += 1
        write_from(file, view, offset)

    monkeypatch.setattr(DirectFile, "read_into", read)
    monkeypatch.setattr(DirectFile, "write_from", write)
    bandwidth.measure_ssd(tmp_path, nbytes=16 * 8 * KiB, piece_bytes=8 * KiB, workers=2)
    rounds, pieces, turns = 3, 16, 2
    assert calls["read"] == rounds * (pieces + 4 * turns)
    assert calls["write"] == rounds * (pieces + 3 * turns)


def test_tmpfs_is_told_apart(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("no writable /dev/shm")
    speed = small(shm)
    assert not speed.direct
    assert "DRAM" in speed.reason


@pytest.mark.parametrize(("nbytes", "piece_bytes"), [(MiB, 1000), (MiB, MiB), (MiB, 0), (0, 8192)])
def test_bad_sizes(tmp_path: Path, nbytes: int, piece_bytes: int) -> None:
    with pytest.raises(BadInput, match="pieces must be"):
        bandwidth.measure_ssd(tmp_path, nbytes=nbytes, piece_bytes=piece_bytes)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="none: not a directory"):
        bandwidth.measure_ssd(tmp_path / "none")


def test_probe_is_a_machine_that_can_be_loaded(tmp_path: Path) -> None:
    machine = probe_job.probe(tmp_path, nbytes=16 * MiB)
    assert not machine.assumed
    assert machine.ssd_read_per_s
    assert machine.ssd_write_per_s
    assert machine.ssd_mixed_per_s
    assert machine.ssd_read_iops
    assert machine.cpu_flops
    assert machine.dram_per_s
    assert any("16.00 MiB" in note for note in machine.notes)
    file = tmp_path / "machine.toml"
    file.write_text(machine.to_toml())
    assert Machine.load(file) == machine
    assert f"cpu_flops = {machine.cpu_flops}\n" in file.read_text()  # operations are no bytes


def test_speeds_are_those_of_the_products_that_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says each product took half a second, the rates are known."""
    monkeypatch.setattr(probe_job, "_median_s", lambda work, on_gpu: (work(), 0.5)[1])
    speed = probe_job.compute_speed("cpu", side=10, nbytes=3 * 4096 * 4 + 5)
    assert speed.flops == 2 * 10**3 / 0.5
    assert speed.memory_per_s == 3 * 4096 * 4 / 0.5


@pytest.mark.gpu
def test_copies_to_the_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pinned = probe_job.copy_speed(pin=True, nbytes=64 * MiB)
    assert pinned.h2d_per_s > 256 * MiB
    assert pinned.d2h_per_s > 256 * MiB
