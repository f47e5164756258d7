"""Each kind of memory, made on purpose, must show in the field that is meant for it and in no other."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.profiler import samplers, tree_sampler
from memopt.profiler.samplers import ProcessMemory
from memopt.profiler.tree_sampler import TreeSampler
from memopt.units import KiB, MiB

SIZE = 48 * MiB
SLACK = 4 * MiB


def now() -> ProcessMemory:
    memory = samplers.process_memory()
    assert memory is not None
    return memory


def touch(region: mmap.mmap) -> None:
    for offset in range(0, len(region), mmap.PAGESIZE):
        region[offset] = 1


def grown(before: ProcessMemory, after: ProcessMemory) -> dict[str, bool]:
    """Which fields grew by SIZE; any other growth must be small."""
    result = {}
    for field in ("anon_bytes", "shmem_bytes", "file_bytes", "locked_bytes"):
        growth = getattr(after, field) - getattr(before, field)
        assert abs(growth) < SLACK or abs(growth - SIZE) < SLACK, f"{field} grew by {growth}"
        result[field.removesuffix("_bytes")] = growth > SIZE // 2
    return result


def only(*fields: str) -> dict[str, bool]:
    return {field: field in fields for field in ("anon", "shmem", "file", "locked")}


def test_private_anonymous_memory() -> None:
    before = now()
    region = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert grown(before, now()) == only(), "reserved address space is not memory yet"
    touch(region)
    assert grown(before, now()) == only("anon")
    assert now().charged_bytes - before.charged_bytes > SIZE - SLACK
    region.close()
    assert grown(before, now()) == only()


def test_shared_memory() -> None:
    before = now()
    region = mmap.mmap(-1, SIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    touch(region)
    assert grown(before, now()) == only("shmem")
    assert now().charged_bytes - before.charged_bytes > SIZE - SLACK
    region.close()


def test_a_mapped_file_is_reported_apart(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(os.urandom(MiB) * (SIZE // MiB))
    before = now()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as region:
        sum(region[offset] for offset in range(0, SIZE, mmap.PAGESIZE))
        after = now()
    if after.shmem_bytes - before.shmem_bytes > SIZE // 2:
        pytest.skip("the temporary directory is on tmpfs, whose pages are shared memory")
    assert grown(before, after) == only("file")
    assert after.charged_bytes - before.charged_bytes < SLACK


def test_locked_memory_is_among_the_anonymous() -> None:
    before = now()
    region = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if ctypes.CDLL(None, use_errno=True).mlock(ctypes.c_void_p(address), ctypes.c_size_t(SIZE)) != 0:
        pytest.skip(f"mlock refused: {os.strerror(ctypes.get_errno())} (ulimit -l)")
    after = now()
    assert grown(before, after) == only("anon", "locked")
    assert after.charged_bytes - before.charged_bytes < SIZE + SLACK, "nothing is counted twice"
    ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(SIZE))


def test_the_high_water_mark_outlives_the_memory() -> None:
    before = now()
    room = before.hwm_bytes - (before.charged_bytes + before.file_bytes)
    region = mmap.mmap(-1, max(0, room) + SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    touch(region)
    region.close()
    after = now()
    assert after.hwm_bytes - before.hwm_bytes > SIZE - SLACK
    assert after.anon_bytes - before.anon_bytes < SLACK


def test_parses_a_status_file_and_a_kernel_thread() -> None:
    lines = ("Name:\tx", "VmLck:\t 8 kB", "VmHWM:\t 100 kB", "VmRSS:\t 90 kB", "RssAnon:\t 50 kB", "RssFile:\t 30 kB")
    text = "\n".join((*lines, "RssShmem:\t10 kB", "")).encode()
    memory = samplers.parse_status(text)
    assert memory == ProcessMemory(50 * KiB, 10 * KiB, 30 * KiB, 8 * KiB, 100 * KiB)
    assert memory.charged_bytes == 60 * KiB
    assert samplers.parse_status(b"Name:\tkthreadd\nPid:\t2\n") == ProcessMemory()


def test_a_process_that_is_gone_is_none() -> None:
    gone = 2**22 + 1  # above the largest pid_max
    assert samplers.process_memory(gone) is None
    assert samplers.process_io(gone) is None
    assert samplers.proportional_memory(gone) is None
    assert samplers.descendants(gone) == []
    sampler = TreeSampler(gone)
    assert sampler.sample(fresh=True).charged_bytes == 0
    assert sampler.io() == (0, 0)


def test_writes_are_counted_also_those_of_ended_children(tmp_path: Path) -> None:
    before = samplers.process_io()
    if before is None:
        pytest.skip("the kernel does not count I/O per process")
    sampler = TreeSampler()
    sampler.sample()
    tree_before = sampler.io()[1]
    with (tmp_path / "own").open("wb") as file:
        file.write(bytes(8 * MiB))
        file.flush()
        os.fsync(file.fileno())
    own = samplers.process_io()
    assert own is not None
    if own.write_bytes == before.write_bytes:
        pytest.skip("the temporary directory is not on a drive")
    assert 8 * MiB <= own.write_bytes - before.write_bytes < 8 * MiB + SLACK
    code = f"import os; f = open({str(tmp_path / 'child')!r}, 'wb'); f.write(bytes({16 * MiB})); f.close()"
    subprocess.run([sys.executable, "-S", "-E", "-c", code], check=True)
    # from the tree's own count: helpers that other tests started are children of this process too
    assert 24 * MiB <= sampler.io()[1] - tree_before < 24 * MiB + 2 * SLACK
    sampler.close()


def test_a_childs_memory_is_in_the_tree() -> None:
    code = f"import sys; x = bytearray(b'1') * {SIZE}; print('ready', flush=True); sys.stdin.read()"
    sampler = TreeSampler()
    try:
        before = sampler.sample(fresh=True)
        with subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            assert child.pid in samplers.descendants()
            during = sampler.sample(fresh=True)
        after = sampler.sample(fresh=True)
    finally:
        sampler.close()
        sampler.close()
    assert SIZE <= during.charged_bytes - before.charged_bytes < SIZE + 16 * MiB
    assert after.charged_bytes - before.charged_bytes < SLACK


def test_a_large_tree_keeps_few_files_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_sampler, "_KEPT_OPEN", 2)
    code = (
        "import os, sys\nx = bytearray(b'1') * (16 << 20)\n"
        "for _ in range(5):\n    if os.fork() == 0:\n        sys.stdin.read()\n        os._exit(0)\n"
        "print('ready', flush=True); sys.stdin.read()\nfor _ in range(5): os.wait()"
    )
    before = len(os.listdir("/proc/self/fd"))
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        sampler = TreeSampler(child.pid)
        during = sampler.sample(fresh=True)
        assert len(sampler.pids()) == 6
        assert len(os.listdir("/proc/self/fd")) == before + 4, "two pipes and two files"
        child.communicate(b"")
    assert 16 * MiB < during.charged_bytes < 32 * MiB, "what the forks share counts once"
    assert sampler.sample(fresh=True).charged_bytes == 0
    assert sampler.pids() == []
    sampler.close()


def test_a_child_in_its_parents_own_memory_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # vfork, and the child waits before it would exec: the parent stands still meanwhile
    code = (
        "import ctypes, mmap, sys\nx = bytearray(b'1') * (64 << 20)\nlibc = ctypes.PyDLL(None)\n"
        "print('ready', flush=True); sys.stdin.read(1)\n"
        "libc.vfork.restype = ctypes.c_int\nif libc.vfork() == 0:\n    libc.sleep(30)\n    libc._exit(0)\n"
        "import os\nos._exit(0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        sampler = TreeSampler(child.pid)
        alone = sampler.sample(fresh=True).charged_bytes
        child.stdin.write(b"x")
        child.stdin.flush()
        while not (begotten := samplers.descendants(child.pid)):
            assert child.poll() is None
        assert samplers.share_memory(begotten[0], child.pid)
        assert not samplers.share_memory(os.getpid(), child.pid)
        both = sampler.sample(fresh=True).charged_bytes
        assert len(sampler.pids()) == 2
        monkeypatch.setattr(samplers, "_KCMP", {})
        assert samplers.share_memory(begotten[0], child.pid), "by their numbers"
        assert not samplers.share_memory(os.getpid(), child.pid)
        sampler.close()
        for pid in (begotten[0], child.pid):  # neither may go on: the child has used the parent's stack
            os.kill(pid, signal.SIGKILL)
    assert alone > 64 * MiB
    assert abs(both - alone) < SLACK


def test_resident_bytes_counts_blocks_once(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "written").write_bytes(os.urandom(MiB))
    os.sync()
    base = samplers.resident_bytes([tmp_path])
    assert MiB <= base < MiB + 256 * KiB
    os.link(inner / "written", tmp_path / "again")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1024 * MiB)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert samplers.resident_bytes([tmp_path, tmp_path]) < base + 64 * KiB
    assert samplers.resident_bytes([inner / "written"]) >= MiB
    assert samplers.resident_bytes([tmp_path / "none"]) == 0


def test_no_gpu_is_none_and_never_imports_torch(run_python) -> None:  # type: ignore[no-untyped-def]
    code = (
        "import sys\n"
        "from memopt.profiler.session import Session\n"
        "with Session() as session: pass\n"
        "assert session.stop().gpu_peak_bytes is None\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
