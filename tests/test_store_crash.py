"""kill -9 of a real writer at each system call: what is found again is the last acknowledged commit, or the next."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from memopt.store.block_store import BlockStore
from memopt.store.extents import KindPolicy, TensorSpec
from memopt.store.regions import Region
from memopt.store.transfer import IoPool
from memopt.units import MiB

CHUNK = 16384
SPECS = [TensorSpec(f"t{i}", "moments", nbytes) for i, nbytes in enumerate((4 * CHUNK, CHUNK + 5, 9 * CHUNK, 100))]
KILLS = range(2, 66)  # a step makes about 30 counted calls: every moment of it is met, in changing company


def pattern(step: int, name: str, nbytes: int) -> bytes:
    return (xxhash.xxh3_128_digest(f"{step} {name}".encode()) * (nbytes // 16 + 1))[:nbytes]


def write_steps(directory: str, deadline: int, acknowledge: int) -> None:
    """Train on: one commit per step, each acknowledged by a byte, until the `deadline`-th system call kills us."""
    import os
    import signal
    import threading

    left, lock = [deadline], threading.Lock()

    def mortal(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **more: object) -> object:
            with lock:
                left[0] -= 1
                dead = left[0] == 0
            if dead:
                if name == "pwritev" and deadline % 2:  # die in the middle of a write
                    fd, views, offset = args
                    real(fd, [views[0][: len(views[0]) // 2 // 4096 * 4096]], offset)  # type: ignore[index]
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(os, name, call)

    for name in ("pwritev", "fdatasync", "fsync", "write", "rename", "open"):
        mortal(name)
    send = os.writev  # not counted
    with IoPool(workers=3, piece_bytes=CHUNK) as pool, Region(MiB) as region:
        store = BlockStore.open(directory, pool)
        while True:
            step = store.meta["step"] + 1
            at, tickets = 0, []
            for spec in SPECS:
                region.view[at : at + spec.nbytes] = pattern(step, spec.name, spec.nbytes)
                for chunk in range(0, spec.nbytes, CHUNK):
                    end = min(chunk + CHUNK, spec.nbytes)
                    tickets.append(store.write(spec.name, region.view[at + chunk : at + end], chunk))
                at += -(-spec.nbytes // 4096) * 4096
            done = store.commit({"step": step})
            for ticket in tickets:
                ticket.wait()
            done.wait()
            send(acknowledge, [b"."])


def serve() -> None:
    """Fork a writer per line of input; answer with the steps that it acknowledged before it was killed."""
    import os

    directory = sys.argv[1]
    for line in sys.stdin:
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reader)
            write_steps(directory, int(line), writer)
        os.close(writer)
        with open(reader, "rb") as acknowledged:
            count = len(acknowledged.read())
        _, status = os.waitpid(pid, 0)
        print(count, os.waitstatus_to_exitcode(status), flush=True)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from tests.test_store_crash import serve; serve()", str(tmp_path / "s")]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_a_killed_writer_leaves_a_whole_commit(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    assert writer.stdin is not None and writer.stdout is not None
    seen: set[int] = set()
    with IoPool(workers=2) as pool, Region(MiB) as region:
        BlockStore.create(
            tmp_path / "s", SPECS, kinds={"moments": KindPolicy()}, chunk_bytes=CHUNK, meta={"step": 0}, pool=pool
        ).close()
        step = 0
        for deadline in KILLS:
            print(deadline, file=writer.stdin, flush=True)
            count, code = map(int, writer.stdout.readline().split())
            assert code == -9
            with BlockStore.open(tmp_path / "s", pool, writable=False) as store:
                found = store.meta["step"]
                assert found in (step + count, step + count + 1)
                assert store.written_names == ([spec.name for spec in SPECS] if found else [])
                for spec in SPECS if found else []:
                    store.read(spec.name, region.view[: spec.nbytes]).wait()
                    assert region.view[: spec.nbytes] == pattern(found, spec.name, spec.nbytes)
            seen.add(found - step - count)
            step = found
    assert step > len(KILLS) // 2 and seen == {0, 1}  # both sides of the moment of commit were hit
