"""The block store against a dict: copy-on-write by chunk, commits, corruption, locks, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import BadInput, StoreError
from memopt.store import manifest as records
from memopt.store.block_store import BlockStore
from memopt.store.errors import (
    StoreClosed,
    StoreCorrupt,
    StoreExists,
    StoreForeign,
    StoreFull,
    StoreIncomplete,
    StoreIOError,
    StoreLocked,
    StoreMisaligned,
    StoreMissing,
    StoreReadOnly,
    StoreUnwritten,
    StoreVersion,
)
from memopt.store.extents import KindPolicy, TensorSpec
from memopt.store.regions import Region
from memopt.store.transfer import IoPool
from memopt.units import MiB

CHUNK = 8192
KINDS = {"weights": KindPolicy(), "base": KindPolicy(versions=1), "spill": KindPolicy(versions=0)}
# whole chunks; a short last chunk that ends inside a block; less than a block
SPECS = [
    TensorSpec("w.even", "weights", 3 * CHUNK, {"shape": [3, CHUNK]}),
    TensorSpec("w.odd", "weights", 2 * CHUNK + 5001),
    TensorSpec("w.tiny", "weights", 10),
    TensorSpec("frozen", "base", CHUNK + 4096),
    TensorSpec("grad", "spill", 2 * CHUNK + 1),
]
SIZES = {spec.name: spec.nbytes for spec in SPECS}


@pytest.fixture(scope="module")
def pool() -> Iterator[IoPool]:
    with IoPool(workers=3, piece_bytes=2 * CHUNK) as made:
        yield made


@pytest.fixture(scope="module")
def region() -> Iterator[Region]:
    with Region(MiB) as made:
        yield made


@pytest.fixture
def store(tmp_path: Path, pool: IoPool) -> Iterator[BlockStore]:
    with make(tmp_path / "store", pool) as made:
        yield made


def make(directory: Path, pool: IoPool, **changes: Any) -> BlockStore:
    settings = {"specs": SPECS, "kinds": KINDS, "chunk_bytes": CHUNK, **changes}
    return BlockStore.create(directory, pool=pool, **settings)


def pattern(seed: int, nbytes: int) -> bytes:
    return (xxhash.xxh3_128_digest(seed.to_bytes(8, "little")) * (nbytes // 16 + 1))[:nbytes]


def put(store: BlockStore, region: Region, name: str, content: bytes, offset: int = 0) -> None:
    region.view[: len(content)] = content
    store.write(name, region.view[: len(content)], offset).wait()


def get(store: BlockStore, region: Region, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
    nbytes = SIZES[name] - offset if nbytes is None else nbytes
    region.view[:nbytes] = bytes(nbytes)
    store.read(name, region.view[:nbytes], offset).wait()
    return bytes(region.view[:nbytes])


def fill(store: BlockStore, region: Region, seed: int) -> dict[str, bytes]:
    content = {name: pattern(seed + i, size) for i, (name, size) in enumerate(SIZES.items())}
    for name, data in content.items():
        put(store, region, name, data)
    return content


def test_what_is_committed_is_found_again(tmp_path: Path, pool: IoPool, region: Region) -> None:
    with make(tmp_path / "s", pool, meta={"step": 0}) as store:
        assert store.meta == {"step": 0} and store.commits == 0 and store.written_names == []
        content = fill(store, region, 1)
        store.commit({"step": 1, "rng": [1, 2.5, "x"]}).wait()
        assert set(store.written_names) == set(SIZES)
        assert store.spec("w.even").meta == {"shape": [3, CHUNK]}
        assert store.nbytes_on_disk() >= sum(spec.nbytes * max(1, KINDS[spec.kind].versions) for spec in SPECS)
        identity = store.id
    for writable in (True, False):
        with BlockStore.open(tmp_path / "s", pool, writable=writable) as store:
            assert store.id == identity and store.commits == 1 and store.meta == {"step": 1, "rng": [1, 2.5, "x"]}
            assert set(store.written_names) == {"w.even", "w.odd", "w.tiny", "frozen"}
            assert store.names == list(SIZES) and store.spec("w.odd") == SPECS[1]
            for name in store.written_names:
                assert get(store, region, name) == content[name]
            with pytest.raises(StoreUnwritten, match="'grad': chunk 0"):
                store.read("grad", region.view[: SIZES["grad"]])


def test_closing_without_a_commit_forgets(tmp_path: Path, pool: IoPool, region: Region) -> None:
    with make(tmp_path / "s", pool) as store:
        fill(store, region, 1)
        store.commit({"step": 1}).wait()
        kept = get(store, region, "w.odd")
        for _ in range(3):  # rewriting over and over never touches the committed slot
            put(store, region, "w.odd", pattern(99, SIZES["w.odd"]))
        assert get(store, region, "w.odd") == pattern(99, SIZES["w.odd"])
    with BlockStore.open(tmp_path / "s", pool) as store:
        assert get(store, region, "w.odd") == kept and store.meta == {"step": 1}


def test_chunks_are_new_one_by_one(store: BlockStore, region: Region) -> None:
    old = fill(store, region, 1)["w.even"]
    store.commit().wait()
    new = pattern(50, SIZES["w.even"])
    for chunk in (1, 0, 2):
        put(store, region, "w.even", new[chunk * CHUNK : (chunk + 1) * CHUNK], chunk * CHUNK)
        old = old[: chunk * CHUNK] + new[chunk * CHUNK : (chunk + 1) * CHUNK] + old[(chunk + 1) * CHUNK :]
        assert get(store, region, "w.even") == old
        assert get(store, region, "w.even", 4096, CHUNK + 4096) == old[4096 : CHUNK + 8192]
    store.commit().wait()
    assert get(store, region, "w.even") == new


def test_a_half_rewritten_tensor_is_not_committed(tmp_path: Path, pool: IoPool, region: Region) -> None:
    with make(tmp_path / "s", pool) as store:
        content = fill(store, region, 1)
        store.commit({"step": 1}).wait()
        new = pattern(7, SIZES["w.odd"])
        put(store, region, "w.odd", new[:CHUNK])
        with pytest.raises(StoreUnwritten, match=r"'w.odd' \(1 of 3 chunks written\)"):
            store.commit({"step": 2}).wait()
        assert store.meta == {"step": 1}
        with BlockStore.open(copy_of(tmp_path / "s"), pool) as crashed:
            assert get(crashed, region, "w.odd") == content["w.odd"]
        put(store, region, "w.odd", new[CHUNK:], CHUNK)
        store.commit({"step": 2}).wait()
    with BlockStore.open(tmp_path / "s", pool) as store:
        assert get(store, region, "w.odd") == new and get(store, region, "w.even") == content["w.even"]


def copy_of(directory: Path) -> Path:
    """What a crash at this moment would leave."""
    return Path(shutil.copytree(directory, directory.with_name(f"{directory.name}-copy"), dirs_exist_ok=True))


PLACES = st.sampled_from(list(SIZES)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.integers(0, (SIZES[name] - 1) // CHUNK), st.integers(0, (SIZES[name] - 1) // CHUNK)
    )
)
ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["write", "write", "read", "whole"]), PLACES, st.integers(0, 2**32)),
    st.tuples(st.sampled_from(["commit", "commit", "reopen", "crash"]), st.none(), st.integers(0, 2**32)),
)


class Model:
    """The obvious store: dicts of chunks."""

    def __init__(self) -> None:
        self.committed: dict[str, dict[int, bytes]] = {}
        self.fresh: dict[str, dict[int, bytes]] = {}
        self.meta: dict[str, int] = {}

    def chunks(self, name: str) -> int:
        return -(-SIZES[name] // CHUNK)

    def chunk(self, name: str, chunk: int) -> bytes | None:
        return self.fresh.get(name, {}).get(chunk, self.committed.get(name, {}).get(chunk))

    def commit(self, meta: dict[str, int]) -> bool:
        kept = {name: chunks for name, chunks in self.fresh.items() if name != "grad"}
        if any(len(chunks) != self.chunks(name) for name, chunks in kept.items()):
            return False
        self.committed |= kept
        self.fresh = {name: chunks for name, chunks in self.fresh.items() if name == "grad"}
        self.meta = meta
        return True

    def forget(self) -> None:
        self.fresh = {}


@pytest.mark.parametrize("parent", [None, "/dev/shm"])  # direct I/O where there is such, and the fallback
@settings(max_examples=80, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=40))
def test_the_store_is_a_dict(
    pool: IoPool, region: Region, parent: str | None, actions: list[tuple[str, Any, int]]
) -> None:
    model = Model()
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        directory = Path(scratch) / "s"
        store = make(directory, pool)
        try:
            for turn, (action, place, seed) in enumerate(actions):
                if action == "commit":
                    if model.commit({"turn": turn}):
                        store.commit({"turn": turn}).wait()
                    else:
                        with pytest.raises(StoreUnwritten, match="incomplete"):
                            store.commit({"turn": turn}).wait()
                elif action in ("reopen", "crash"):
                    if action == "crash":
                        crashed = copy_of(directory)
                    store.close()
                    if action == "crash":
                        shutil.rmtree(directory)
                        crashed.rename(directory)
                    model.forget()
                    store = BlockStore.open(directory, pool)
                else:
                    act(store, model, region, action, place, seed)
                assert store.meta == model.meta
        finally:
            store.close()


def act(store: BlockStore, model: Model, region: Region, action: str, place: tuple[str, int, int], seed: int) -> None:
    name, first, last = place[0], *sorted(place[1:])
    if action == "whole":
        first, last = 0, model.chunks(name) - 1
    start, stop = first * CHUNK, min((last + 1) * CHUNK, SIZES[name])
    parts = range(first, last + 1)
    if action in ("write", "whole"):
        content = pattern(seed, stop - start)
        if name == "frozen" and name in model.committed:
            with pytest.raises(StoreReadOnly, match="one version"):
                put(store, region, name, content, start)
            return
        put(store, region, name, content, start)
        for part in parts:
            model.fresh.setdefault(name, {})[part] = content[part * CHUNK - start :][:CHUNK]
    elif None in (expected := [model.chunk(name, part) for part in parts]):
        with pytest.raises(StoreUnwritten):
            get(store, region, name, start, stop - start)
    else:
        assert get(store, region, name, start, stop - start) == b"".join(filter(None, expected))


def test_requests_take_effect_in_order(store: BlockStore, region: Region) -> None:
    size = SIZES["w.odd"]
    stride = -(-size // 4096) * 4096
    views = [region.view[i * stride : i * stride + size] for i in range(12)]
    for turn in range(20):
        for i in range(0, 12, 2):
            views[i][:] = pattern(turn * 12 + i, size)
        tickets = []
        for i in range(0, 12, 2):  # nobody waits in between
            tickets += [store.write("w.odd", views[i]), store.read("w.odd", views[i + 1])]
            if i == 4:
                tickets.append(store.commit({"turn": turn}))
        for ticket in tickets:
            ticket.wait()
        for i in range(0, 12, 2):
            assert views[i + 1] == views[i]
    store.commit().wait()


def test_a_write_does_not_touch_what_a_commit_under_way_saves(tmp_path: Path, pool: IoPool, region: Region) -> None:
    with make(tmp_path / "s", pool) as store:
        fill(store, region, 1)
        for turn in range(10):
            first, second = region.view[:10], region.view[4096:4106]
            first[:], second[:] = pattern(turn, 10), pattern(turn + 100, 10)
            ticket = store.write("w.tiny", first)
            done = store.commit({"turn": turn})
            late = store.write("w.tiny", second)
            done.wait()
            with BlockStore.open(copy_of(tmp_path / "s"), pool) as crashed:
                assert crashed.meta == {"turn": turn} and get(crashed, region, "w.odd") == pattern(2, SIZES["w.odd"])
                region2 = region.view[8192:8202]
                crashed.read("w.tiny", region2).wait()
                assert region2 == pattern(turn, 10)
            ticket.wait()
            late.wait()
            assert get(store, region, "w.tiny") == pattern(turn + 100, 10)


def test_padded_views_and_rows(store: BlockStore, region: Region) -> None:
    region.view[: 3 * CHUNK] = pattern(3, 3 * CHUNK)
    padded = 2 * CHUNK + 8192
    store.write("w.odd", region.view[:padded]).wait()
    region.view[:padded] = bytes(padded)
    store.read("w.odd", region.view[:padded]).wait()
    assert region.view[: SIZES["w.odd"]] == pattern(3, 3 * CHUNK)[: SIZES["w.odd"]]
    assert get(store, region, "w.odd", 4096, 4096) == pattern(3, 3 * CHUNK)[4096:8192]


@pytest.mark.parametrize(
    ("offset", "nbytes", "write"),
    [
        (4096, CHUNK, True),
        (0, 4096, True),
        (0, CHUNK + 1, False),
        (1, CHUNK, False),
        (0, 4 * CHUNK, False),
        (0, 0, False),
    ],
)
def test_ranges_that_cannot_be_moved(store: BlockStore, region: Region, offset: int, nbytes: int, write: bool) -> None:
    with pytest.raises(StoreMisaligned, match="'w.even'"):
        (store.write if write else store.read)("w.even", region.view[:nbytes], offset)


@pytest.mark.parametrize("name", ["w.even", "w.odd", "grad"])
def test_one_flipped_byte_is_named(tmp_path: Path, pool: IoPool, region: Region, name: str) -> None:
    with make(tmp_path / "s", pool) as store:
        fill(store, region, 1)
        store.commit().wait()
        place = store._extents[name].offsets[0] + CHUNK + 77
        with open(tmp_path / "s" / f"{store.spec(name).kind}.bin", "r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
            os.fsync(file.fileno())
        with pytest.raises(StoreCorrupt, match=rf"'{name}': the \d+ bytes at {place - 77} of .*\.bin are not what was"):
            get(store, region, name)
        assert len(get(store, region, name, 0, CHUNK)) == CHUNK  # the chunk before is fine


def test_checksums_can_be_turned_off(tmp_path: Path, pool: IoPool, region: Region) -> None:
    spec = TensorSpec("a", "acts", CHUNK)
    kinds = {"acts": KindPolicy(versions=0, verify=False)}
    with BlockStore.create(tmp_path / "s", [spec], kinds=kinds, pool=pool, chunk_bytes=CHUNK) as store:
        region.view[:CHUNK] = pattern(1, CHUNK)
        store.write("a", region.view[:CHUNK]).wait()
        with open(tmp_path / "s" / "acts.bin", "r+b") as file:
            file.write(b"other")
            os.fsync(file.fileno())
        store.read("a", region.view[:CHUNK]).wait()
        assert bytes(region.view[:5]) == b"other"


def test_a_cut_or_missing_file(tmp_path: Path, pool: IoPool, region: Region) -> None:
    with make(tmp_path / "s", pool) as store:
        fill(store, region, 1)
        store.commit().wait()
        size = os.path.getsize(tmp_path / "s" / "weights.bin")
        os.truncate(tmp_path / "s" / "weights.bin", CHUNK)
        with pytest.raises(StoreIOError, match="was cut off"):
            get(store, region, "w.odd")
    with pytest.raises(StoreCorrupt, match=rf"weights.bin has {CHUNK} bytes instead of {size}"):
        BlockStore.open(tmp_path / "s", pool)
    (tmp_path / "s" / "weights.bin").unlink()
    with pytest.raises(StoreCorrupt, match=r"weights.bin is missing"):
        BlockStore.open(tmp_path / "s", pool)


@pytest.mark.parametrize("name", ["manifest.json", "index.json"])
def test_a_bad_byte_in_the_small_files(tmp_path: Path, pool: IoPool, name: str) -> None:
    make(tmp_path / "s", pool).close()
    path = tmp_path / "s" / name
    text = bytearray(path.read_bytes())
    assert json.loads(text)["body"]["id"]
    text[len(text) // 2] ^= 1
    path.write_bytes(text)
    with pytest.raises(StoreCorrupt, match=f"{name} is damaged"):
        BlockStore.open(tmp_path / "s", pool)


def test_scratch_is_made_again(tmp_path: Path, pool: IoPool, region: Region) -> None:
    make(tmp_path / "s", pool).close()
    (tmp_path / "s" / "spill.bin").unlink()
    with BlockStore.open(tmp_path / "s", pool) as store:
        put(store, region, "grad", pattern(1, SIZES["grad"]))
        assert get(store, region, "grad") == pattern(1, SIZES["grad"])
    os.truncate(tmp_path / "s" / "spill.bin", 1)
    BlockStore.open(tmp_path / "s", pool).close()


def test_another_process_is_named(tmp_path: Path, pool: IoPool) -> None:
    make(tmp_path / "s", pool).close()
    script = (
        "import sys; from memopt.store.locks import StoreLock; from pathlib import Path\n"
        "lock = StoreLock(Path(sys.argv[1]), exclusive=sys.argv[2] == 'write'); print('held', flush=True); input()"
    )
    for mode in ("write", "read"):
        command = [sys.executable, "-c", script, str(tmp_path / "s" / "lock"), mode]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(StoreLocked, match=f"in use by process {other.pid};"):
                BlockStore.open(tmp_path / "s", pool)
            with pytest.raises(StoreLocked):
                BlockStore.destroy(tmp_path / "s")
            if mode == "read":
                BlockStore.open(tmp_path / "s", pool, writable=False).close()
            else:
                with pytest.raises(StoreLocked):
                    BlockStore.open(tmp_path / "s", pool, writable=False)
            other.kill()  # the lock goes with the process
    BlockStore.open(tmp_path / "s", pool).close()


def test_readers_may_be_many_and_cannot_write(tmp_path: Path, pool: IoPool, region: Region) -> None:
    make(tmp_path / "s", pool).close()
    with BlockStore.open(tmp_path / "s", pool, writable=False) as one, BlockStore.open(tmp_path / "s", pool, False):
        with pytest.raises(StoreReadOnly, match="opened read-only"):
            one.write("w.tiny", region.view[:10])
        with pytest.raises(StoreReadOnly):
            one.commit()


def test_directories_that_are_not_ours(tmp_path: Path, pool: IoPool) -> None:
    with pytest.raises(StoreMissing, match="does not exist"):
        BlockStore.open(tmp_path / "none", pool)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="not a directory"):
        make(tmp_path / "file", pool)
    with pytest.raises(StoreError, match="cannot be made: Not a directory"):
        make(tmp_path / "file" / "below", pool)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(StoreMissing, match="is empty"):
        BlockStore.destroy(foreign)
    (foreign / "thesis.tex").write_text("mine")
    for attempt in (
        lambda: make(foreign, pool),
        lambda: BlockStore.open(foreign, pool),
        lambda: BlockStore.destroy(foreign),
    ):
        with pytest.raises(StoreForeign, match=r"thesis\.tex"):
            attempt()
    assert os.listdir(foreign) == ["thesis.tex"]


def test_stores_that_are_there_already(tmp_path: Path, pool: IoPool) -> None:
    make(tmp_path / "s", pool).close()
    with pytest.raises(StoreExists, match="resume it"):
        make(tmp_path / "s", pool)
    marker = tmp_path / "s" / records.MARKER
    text = marker.read_text()
    (tmp_path / "s" / records.MANIFEST).rename(tmp_path / "hidden")
    for attempt in (lambda: make(tmp_path / "s", pool), lambda: BlockStore.open(tmp_path / "s", pool)):
        with pytest.raises(StoreIncomplete, match="nothing was saved"):
            attempt()
    marker.write_text(json.dumps(json.loads(text) | {"format": 99, "memopt": "7.0"}))
    for attempt in (lambda: make(tmp_path / "s", pool), lambda: BlockStore.open(tmp_path / "s", pool)):
        with pytest.raises(StoreVersion, match=r"made by memopt 7\.0 in store format 99"):
            attempt()
    for damage in ("{", "[]", text.replace("weights.bin", "../weights.bin")):
        marker.write_text(damage)
        for attempt in (lambda: BlockStore.open(tmp_path / "s", pool), lambda: BlockStore.destroy(tmp_path / "s")):
            with pytest.raises(StoreCorrupt, match="is damaged"):
                attempt()
    marker.write_text(text)
    BlockStore.destroy(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_destroy_leaves_what_is_not_listed(tmp_path: Path, pool: IoPool) -> None:
    with make(tmp_path / "s", pool), pytest.raises(StoreLocked):
        BlockStore.destroy(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    BlockStore.destroy(tmp_path / "s")
    assert os.listdir(tmp_path / "s") == ["notes.txt"]


def test_a_failed_creation_leaves_nothing(tmp_path: Path, pool: IoPool) -> None:
    huge = [TensorSpec("w", "weights", 1 << 50)]
    with pytest.raises(StoreFull, match="the store wants") as caught:
        BlockStore.create(tmp_path / "s", huge, kinds=KINDS, pool=pool, chunk_bytes=1 << 40)
    assert caught.value.wanted_bytes == 2 << 50
    assert os.listdir(tmp_path) == []
    (tmp_path / "given").mkdir()
    with pytest.raises(StoreFull):
        BlockStore.create(tmp_path / "given", huge, kinds=KINDS, pool=pool, chunk_bytes=1 << 40)
    assert os.listdir(tmp_path) == ["given"] and os.listdir(tmp_path / "given") == []


@pytest.mark.parametrize("options", ["size=64k", "size=8m,ro"])
def test_file_systems_that_are_full_or_read_only(tmp_path: Path, pool: IoPool, options: str) -> None:
    path = tmp_path / "mount"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
    try:
        with pytest.raises(StoreError, match="Read-only file system" if "ro" in options else "is free on this file"):
            make(path, pool)
        assert os.listdir(path) == []
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("name", ["", "a/b", "a\x00b", "a\nb", "\x7f"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(BadInput, match="tensor name"):
        TensorSpec(name, "weights", 1)


def test_a_tensor_may_have_chunks_of_its_own(tmp_path: Path, pool: IoPool, region: Region) -> None:
    """For records that are no multiple of the store's chunks: writes start where theirs do, and so do checksums."""
    size = 2 * 4096
    specs = [TensorSpec("a", "weights", 5 * 4096, chunk_bytes=size), TensorSpec("b", "weights", CHUNK + 4096)]
    with make(tmp_path / "s", pool, specs=specs) as store:
        assert (store.chunk_bytes_of("a"), store.chunk_bytes_of("b")) == (size, CHUNK)
        content = pattern(3, 5 * 4096)
        for start in range(0, len(content), size):
            put(store, region, "a", content[start : start + size], start)
        put(store, region, "b", pattern(4, CHUNK + 4096))
        with pytest.raises(StoreMisaligned):
            store.write("a", region.view[:4096], 4096)
        store.commit().wait()
    with BlockStore.open(tmp_path / "s", pool) as store:
        assert store.chunk_bytes_of("a") == size
        region.view[: len(content)] = bytes(len(content))
        store.read("a", region.view[: len(content)]).wait()
        assert bytes(region.view[: len(content)]) == content
    raw = bytearray((tmp_path / "s" / "weights.bin").read_bytes())
    raw[raw.find(content) + 3 * 4096] ^= 1
    (tmp_path / "s" / "weights.bin").write_bytes(raw)
    with BlockStore.open(tmp_path / "s", pool) as store:
        store.read("a", region.view[:size]).wait()
        with pytest.raises(StoreCorrupt, match="'a': the 8192 bytes at "):
            store.read("a", region.view[:size], size).wait()


def test_specs_that_cannot_be(tmp_path: Path, pool: IoPool) -> None:
    with pytest.raises(BadInput, match="0 bytes"):
        TensorSpec("a", "weights", 0)
    with pytest.raises(BadInput, match="'a': chunk_bytes is 5000; make it a positive multiple of 4096"):
        TensorSpec("a", "weights", 1, chunk_bytes=5000)
    with pytest.raises(BadInput, match="versions is 3"):
        KindPolicy(versions=3)
    spec = TensorSpec("a", "weights", 1)
    with pytest.raises(BadInput, match="listed twice"):
        BlockStore.create(tmp_path / "s", [spec, spec], kinds=KINDS, pool=pool)
    with pytest.raises(BadInput, match="no policy"):
        BlockStore.create(tmp_path / "s", [TensorSpec("a", "other", 1)], kinds=KINDS, pool=pool)
    with pytest.raises(BadInput, match="lower-case"):
        BlockStore.create(tmp_path / "s", [], kinds={"../up": KindPolicy()}, pool=pool)
    with pytest.raises(BadInput, match="multiple of 4096"):
        BlockStore.create(tmp_path / "s", [spec], kinds=KINDS, pool=pool, chunk_bytes=1000)
    with pytest.raises(BadInput, match="JSON"):
        BlockStore.create(tmp_path / "s", [spec], kinds=KINDS, pool=pool, meta={"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_failed_write_is_not_committed_and_can_be_repeated(
    store: BlockStore, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = fill(store, region, 1)
    store.commit().wait()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        region.view[: SIZES["w.even"]] = pattern(9, SIZES["w.even"])
        ticket = store.write("w.even", region.view[: SIZES["w.even"]])
        with pytest.raises(StoreIOError, match="weights.bin: write of"):
            ticket.wait()
    with pytest.raises(StoreUnwritten, match="its last write failed"):
        get(store, region, "w.even")
    with pytest.raises(StoreUnwritten, match=r"'w.even' \(0 of 3 chunks written, writing 3 failed\)"):
        store.commit().wait()
    put(store, region, "w.even", content["w.even"])
    store.commit({"again": True}).wait()
    assert store.meta == {"again": True} and get(store, region, "w.even") == content["w.even"]


@pytest.mark.parametrize("call", ["fdatasync", "rename"])
def test_after_a_failed_commit_of_the_drive_nothing_is_written(
    tmp_path: Path, pool: IoPool, region: Region, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with make(tmp_path / "s", pool) as store:
        content = fill(store, region, 1)
        store.commit({"step": 1}).wait()
        put(store, region, "w.tiny", pattern(9, 10))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(StoreError, match="failed: Input/output error"):
                store.commit({"step": 2}).wait()
        with pytest.raises(StoreError, match="takes no writes after a failed commit"):
            store.write("w.tiny", region.view[:10])
        with pytest.raises(StoreError, match="takes no writes after a failed commit"):
            store.commit()
        assert get(store, region, "w.odd") == content["w.odd"]
    with BlockStore.open(tmp_path / "s", pool) as store:
        assert store.meta == {"step": 1} and get(store, region, "w.tiny") == content["w.tiny"]


def test_no_room_for_a_manifest_can_be_cured(
    store: BlockStore, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(store, region, 1)
    with monkeypatch.context() as patch:
        patch.setattr(records.os, "write", fail)
        ticket = store.commit({"step": 1})
        with pytest.raises(StoreFull, match="manifest.json.tmp"):
            ticket.wait()
    assert store.meta == {}
    store.commit({"step": 1}).wait()
    assert store.meta == {"step": 1}


def test_a_closed_store_refuses(tmp_path: Path, pool: IoPool, region: Region) -> None:
    store = make(tmp_path / "s", pool)
    region.view[:10] = pattern(1, 10)
    ticket, done = store.write("w.tiny", region.view[:10]), store.commit({"step": 1})
    store.close()
    store.close()
    assert ticket.done() and done.done() and store.meta == {"step": 1}
    for attempt in (lambda: store.read("w.tiny", region.view[:10]), store.commit):
        with pytest.raises(StoreClosed):
            attempt()
    with pytest.raises(StoreError, match="no tensor 'other'"):
        store.read("other", region.view[:10])


def test_commits_queue(store: BlockStore, region: Region) -> None:
    fill(store, region, 1)
    tickets = [store.commit({"number": number}) for number in range(5)]
    tickets[-1].wait()
    assert all(ticket.done() for ticket in tickets) and store.commits == 5 and store.meta == {"number": 4}


def test_a_manifest_of_many_chunks_keeps_every_sum() -> None:
    sums = array("Q", (xxhash.xxh3_64_intdigest(i.to_bytes(4, "little")) for i in range(20_000)))
    text = records.encode_manifest("id", 1, {}, "0", sums.tobytes())
    assert len(text) < 12 * len(sums)
