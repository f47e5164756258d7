from __future__ import annotations

import os
from pathlib import Path

import pytest

from memopt.profiler import page_cache
from memopt.units import MiB

SIZE = 32 * MiB + 5000
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    with path.open("wb") as opened:
        opened.write(os.urandom(SIZE))
        opened.flush()
        os.fsync(opened.fileno())
    return path


def test_both_ways_see_a_written_file_and_a_dropped_one(file: Path) -> None:
    whole = -(-SIZE // PAGE) * PAGE
    with file.open("rb") as opened:
        by_map = page_cache.by_mincore(opened.fileno())
        told = page_cache.by_cachestat(opened.fileno())
        assert by_map == whole
        if told is None:
            pytest.skip("this kernel has no cachestat")
        # what was just written can wait in per-CPU lists for a moment, which cachestat counts too
        assert told == whole
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        after, by_map = page_cache.by_cachestat(opened.fileno()), page_cache.by_mincore(opened.fileno())
        assert after is not None
        assert after < whole // 10 or after == whole, "dropped, or kept by a file system in memory"
        assert by_map == after


def test_directories_links_and_what_is_not_a_file(file: Path, tmp_path: Path) -> None:
    os.link(file, tmp_path / "again")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 30)
    found = page_cache.cached_bytes([tmp_path, file])
    assert found is not None
    assert SIZE <= found < SIZE + 2 * PAGE, "once per inode"
    assert page_cache.cached_bytes([tmp_path / "none"]) is None
    assert page_cache.cached_bytes_of(tmp_path / "none") is None


def test_without_cachestat_the_mapping_tells(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "by_cachestat", lambda file: None)
    assert page_cache.cached_bytes_of(file) == -(-SIZE // PAGE) * PAGE
