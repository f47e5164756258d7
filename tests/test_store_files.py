"""Direct files: whole transfers, alignment, the fallback, and each way a drive can say no."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memopt.errors import StoreError
from memopt.store import files
from memopt.store.errors import StoreFull, StoreIOError, StoreMisaligned
from memopt.store.files import DirectFile, is_tmpfs
from memopt.store.regions import Region
from memopt.units import KiB, MiB


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[Path]:
    path = Path("/dev/shm") / f"memopt-test-{os.getpid()}"
    if not is_tmpfs("/dev/shm"):
        pytest.skip("/dev/shm is no tmpfs here")
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def region() -> Iterator[Region]:
    with Region(256 * KiB) as made:
        made.tensor(torch.uint8, made.nbytes).random_(generator=torch.Generator().manual_seed(1))
        yield made


def test_what_is_written_is_read(tmp_path: Path, region: Region) -> None:
    half = region.nbytes // 2
    content = bytes(region.view[:half])
    with DirectFile.create(tmp_path / "f", MiB) as file:
        assert file.disk_bytes() >= MiB
        file.write_from(region.view[:half], 64 * KiB)
        file.sync()
        file.read_into(region.view[half:], 64 * KiB)
        assert bytes(region.view[half:]) == content
        file.read_into(region.view[:4096], 0)
        assert not any(region.view[:4096])
        assert file.direct == (not file.reason)
    with DirectFile.open(tmp_path / "f") as again:
        again.read_into(region.view[:half], 64 * KiB)
        assert bytes(region.view[:half]) == content
        with pytest.raises(StoreIOError, match="write of"):
            again.write_from(region.view[:half], 0)


def test_direct_io_wants_alignment_and_says_what(tmp_path: Path, region: Region) -> None:
    with DirectFile.create(tmp_path / "f", MiB) as file:
        if not file.direct:
            pytest.skip(f"no direct I/O here: {file.reason}")
        assert file.align_bytes in (512, 1024, 2048, 4096)
        with pytest.raises(StoreMisaligned, match="address"):
            file.read_into(region.view[1 : 4096 + 1], 0)
        with pytest.raises(StoreMisaligned, match="offset 100"):
            file.read_into(region.view[:4096], 100)
        with pytest.raises(StoreMisaligned, match="length 100"):
            file.write_from(region.view[:100], 0)


def test_the_fallback_on_tmpfs_says_why(shm: Path, region: Region) -> None:
    content = bytes(region.view)
    assert is_tmpfs(shm) and is_tmpfs(shm / "not" / "yet")
    with DirectFile.create(shm / "f", MiB) as file:
        assert not file.direct and "tmpfs" in file.reason
        file.write_from(region.view, 4096)
        file.sync()
        region.tensor(torch.uint8, region.nbytes).zero_()
        file.read_into(region.view, 4096)
    assert bytes(region.view) == content


def test_the_fallback_where_the_flag_is_refused(
    tmp_path: Path, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        file = DirectFile.create(tmp_path / "f", MiB)
    with file:
        assert not file.direct and "refuses direct I/O" in file.reason and file.align_bytes == 1
        file.write_from(region.view[1:1001], 3)
        file.sync()
        file.read_into(region.view[2001:3001], 3)
        assert region.view[1:1001] == region.view[2001:3001]


def _cached_pages(path: Path) -> int:
    """How many pages of a file the kernel keeps in memory (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        pages = ctypes.create_string_buffer(-(-len(mapping) // mmap.PAGESIZE))
        first = ctypes.c_char.from_buffer(mapping)
        address = ctypes.c_void_p(ctypes.addressof(first))
        assert libc.mincore(address, ctypes.c_size_t(len(mapping)), pages) == 0
        del first
        return sum(byte & 1 for byte in pages.raw)


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_stays_in_the_page_cache(
    tmp_path: Path, region: Region, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    if is_tmpfs(tmp_path):
        pytest.skip("the temporary directory is on tmpfs, which is the page cache")
    if not direct:
        monkeypatch.setattr(files, "_reported_alignment", lambda fd: 0)
    with DirectFile.create(tmp_path / "f", MiB) as file:
        if direct and not file.direct:
            pytest.skip(f"no direct I/O here: {file.reason}")
        file.write_from(region.view, 0)
        file.sync()
        assert _cached_pages(file.path) == 0
        file.read_into(region.view[: 64 * KiB], 64 * KiB)
        assert _cached_pages(file.path) == 0


@pytest.mark.parametrize("aligned", [4096, 8192, 65536])
def test_alignments_beyond_a_block_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aligned: int) -> None:
    monkeypatch.setattr(files, "_reported_alignment", lambda fd: aligned)
    with DirectFile.create(tmp_path / "f", MiB) as file:
        assert file.direct == (aligned == 4096) or "refuses" in file.reason


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 100_001])
def test_padded_files_take_any_length(tmp_path: Path, region: Region, nbytes: int) -> None:
    with DirectFile.create(tmp_path / "f", MiB, padded=True) as file:
        file.write_from(region.view[:nbytes], 8192)
        content, guard = bytes(region.view[:nbytes]), region.view[nbytes]
        region.tensor(torch.uint8, nbytes).zero_()
        file.read_into(region.view[:nbytes], 8192)
        assert bytes(region.view[:nbytes]) == content and region.view[nbytes] == guard


def test_short_and_interrupted_transfers_are_continued(
    tmp_path: Path, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(region.view)
    sizes = iter([512, 4096, 700, 8192] * 200)

    def short(real: object) -> object:
        return lambda fd, views, offset: real(fd, [views[0][: next(sizes) // 512 * 512 or 512]], offset)  # type: ignore[operator]

    with DirectFile.create(tmp_path / "f", MiB) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", short(os.pwritev))
            file.write_from(region.view, 0)
        region.tensor(torch.uint8, region.nbytes).zero_()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", short(os.preadv))
            file.read_into(region.view, 0)
    assert bytes(region.view) == content


def test_a_transfer_that_stops_inside_a_block_takes_the_block_again(
    tmp_path: Path, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DirectFile.create(tmp_path / "f", MiB) as file:
        if not file.direct:
            pytest.skip(f"no direct I/O here: {file.reason}")
        file.write_from(region.view, 0)
        content = bytes(region.view)
        real = os.preadv
        odd = iter([file.align_bytes + 1])
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: min(real(fd, views, at), next(odd, MiB)))
        region.tensor(torch.uint8, region.nbytes).zero_()
        file.read_into(region.view, 0)
        assert bytes(region.view) == content


def test_the_end_of_the_file_is_an_error(tmp_path: Path, region: Region) -> None:
    with DirectFile.create(tmp_path / "f", 64 * KiB) as file:
        with pytest.raises(StoreIOError, match="stopped after") as caught:
            file.read_into(region.view[: 32 * KiB], 48 * KiB)
        assert caught.value.offset == 64 * KiB and caught.value.errno == 0
        os.truncate(file.path, 8 * KiB)
        with pytest.raises(StoreIOError, match=r"has 8192 of the expected 65536 bytes"):
            file.read_into(region.view[: 32 * KiB], 0)


@pytest.mark.parametrize(("call", "verb"), [("preadv", "read"), ("pwritev", "write"), ("fdatasync", "sync")])
def test_a_failing_drive_is_named(
    tmp_path: Path, region: Region, monkeypatch: pytest.MonkeyPatch, call: str, verb: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with DirectFile.create(tmp_path / "f", MiB) as file:
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(StoreIOError, match=rf"/f: {verb} of \d+ bytes at \d+ failed: Input/output error") as caught:
            match verb:
                case "read":
                    file.read_into(region.view, 8192)
                case "write":
                    file.write_from(region.view, 8192)
                case _:
                    file.sync()
        assert caught.value.errno == errno.EIO
        assert caught.value.offset == (0 if verb == "sync" else 8192)


def test_a_drive_that_gets_full_later(tmp_path: Path, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with DirectFile.create(tmp_path / "f", MiB) as file:
        monkeypatch.setattr(os, "pwritev", fail)
        with pytest.raises(StoreFull, match=r"write at 0 wants 256.00 KiB, .* is free") as caught:
            file.write_from(region.view, 0)
        assert caught.value.wanted_bytes == 256 * KiB and caught.value.free_bytes > 0


def test_a_full_disk_shows_at_creation(small_tmpfs: Path) -> None:
    with pytest.raises(StoreFull, match="--offload-dir") as caught:
        DirectFile.create(small_tmpfs / "f", 4 * MiB)
    assert caught.value.wanted_bytes == 4 * MiB and caught.value.free_bytes <= MiB
    assert os.listdir(small_tmpfs) == []


def test_file_systems_without_reservation(small_tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def fallocate(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(files, "_libc", Libc())
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: errno.EOPNOTSUPP)
    monkeypatch.setattr(files, "_direct_support", lambda path, fd: (1, "not of interest"))
    with pytest.raises(StoreFull):
        DirectFile.create(small_tmpfs / "f", 4 * MiB)
    assert os.listdir(small_tmpfs) == []
    with DirectFile.create(small_tmpfs / "g", 64 * KiB) as file:
        assert file.nbytes == 64 * KiB


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        DirectFile.open(tmp_path / "missing")
    DirectFile.create(tmp_path / "f", 4096).close()
    with pytest.raises(StoreError, match="File exists"):
        DirectFile.create(tmp_path / "f", 4096)
