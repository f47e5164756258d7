"""Drives, containers and GPUs that are made up, so that what they say is known."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memopt import cgroups
from memopt.budget import Budget
from memopt.jobs.profile_limits import this_machine
from memopt.ledger import Ledger
from memopt.machine import Machine
from memopt.profiler.assemble import Story, assemble
from memopt.profiler.container import ContainerSampler
from memopt.profiler.disks import disk_counts, disk_use
from memopt.profiler.gpu_sampler import GpuSampler
from memopt.profiler.session import Session
from memopt.units import GiB, MiB

FakeHost = Callable[[dict[str, str]], Path]


def diskstats(reads: int, sectors: int, read_ms: int, queue_ms: int) -> str:
    line = f"8 0 sda {reads} 0 {sectors} {read_ms} 10 0 80 5 0 0 {queue_ms} 0 0 0 0"
    others = [line.replace("sda", name) for name in ("sda1", "loop0", "zram0", "dm-0")]
    return "\n".join((line, *others, "8 16 sdb 1 0 8 1 1 0 8 1 0 0 1")) + "\n"


def test_drives_are_counted_once_and_by_what_they_did(fake_host: FakeHost) -> None:
    layout = {f"sys/block/{name}/size": "1" for name in ("sda", "sdb", "loop0", "zram0")}
    layout["sys/block/dm-0/slaves/sda/size"] = "1"
    root = fake_host({**layout, "proc/diskstats": diskstats(100, 1000, 50, 70)})
    before = disk_counts(root)
    assert set(before) == {"sda", "sdb"}
    (root / "proc/diskstats").write_text(diskstats(150, 3000, 250, 1070))
    (used,) = disk_use(before, disk_counts(root), 2.0)
    assert (used.name, used.read_bytes, used.write_bytes) == ("sda", 2000 * 512, 0)
    assert used.read_wait_s == pytest.approx(0.2 / 50)
    assert used.write_wait_s is None
    assert used.queue == pytest.approx(0.5)
    assert disk_counts(root / "nowhere") == {}
    assert disk_use({}, before, 1.0) == []
    assert disk_use(disk_counts(root), before, 1.0) == [], "counters that fell say nothing"


V1_MOUNT = "36 25 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2_MOUNT = "36 25 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def test_a_container_of_version_1(fake_host: FakeHost) -> None:
    inside = "sys/fs/cgroup/memory/job"
    root = fake_host(
        {
            "proc/self/mountinfo": V1_MOUNT,
            "proc/self/cgroup": "4:memory:/job\n",
            f"{inside}/memory.limit_in_bytes": "1000\n",
            f"{inside}/memory.usage_in_bytes": "900\n",
            f"{inside}/memory.max_usage_in_bytes": "950\n",
            f"{inside}/memory.stat": "active_file 1\ntotal_active_file 200\ntotal_inactive_file 300\n",
            f"{inside}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        }
    )
    sampler = ContainerSampler(root=root)
    sampler.sample()
    quiet = sampler.use()
    assert (quiet.limit_bytes, quiet.working_set_bytes, quiet.oom_kills) == (1000, 400, 0)
    assert quiet.limit_file == str(root / inside / "memory.limit_in_bytes")
    assert quiet.peak_bytes is None, "the mark is older than the session"
    (root / inside / "memory.max_usage_in_bytes").write_text("1000\n")
    (root / inside / "memory.oom_control").write_text("oom_kill 3\n")
    (root / inside / "memory.usage_in_bytes").write_text("600\n")
    sampler.sample()
    after = sampler.use()
    assert (after.peak_bytes, after.oom_kills, after.working_set_bytes) == (1000, 1, 400)
    assert after.oom_kills_file == str(root / inside / "memory.oom_control")


def test_a_container_of_version_2_and_a_group_of_its_own(fake_host: FakeHost) -> None:
    inside = "sys/fs/cgroup/job/memopt-1"
    root = fake_host(
        {
            "proc/self/mountinfo": V2_MOUNT,
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": "5000\n",
            f"{inside}/memory.max": "1000\n",
            f"{inside}/memory.current": "900\n",
            f"{inside}/memory.peak": "950\n",
            f"{inside}/memory.stat": "active_file 200\ninactive_file 300\n",
            f"{inside}/memory.events": "low 0\noom 1\noom_kill 0\n",
        }
    )
    own = ContainerSampler(root=root).use()
    assert (own.limit_bytes, own.oom_kills, own.working_set_bytes) == (5000, None, None)
    sampler = ContainerSampler(cgroups.Group(root / inside, 2), root)
    sampler.sample()
    use = sampler.use()
    assert (use.limit_bytes, use.working_set_bytes, use.peak_bytes, use.oom_kills) == (1000, 400, 950, 0)
    assert ContainerSampler(root=root / "nowhere").use().limit_bytes is None


class FakeNvml(types.ModuleType):
    """Devices as the driver tells them: name, total, used (None: not supported), {pid: bytes}."""

    def __init__(self, *devices: tuple[str, int, int | None, dict[int, int | None]]) -> None:
        super().__init__("pynvml")
        self.told = list(devices)
        self.users = 0

    def nvmlInit(self) -> None:
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.told)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-uuid-{handle}".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.told[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        _, total, used, _ = self.told[handle]
        if used is None:
            raise RuntimeError("Not Supported")
        return types.SimpleNamespace(total=total, used=used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.told[handle][3].items()]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeNvml]]:
    made: list[FakeNvml] = []

    def install(*devices: tuple[str, int, int | None, dict[int, int | None]]) -> FakeNvml:
        made.append(FakeNvml(*devices))
        monkeypatch.setitem(sys.modules, "pynvml", made[-1])
        return made[-1]

    yield install
    assert all(each.users == 0 for each in made), "NVML is left again"


def test_several_gpus_of_another_process_and_strangers_beside_it(nvml: Callable[..., FakeNvml]) -> None:
    own, ours, parent = os.getpid(), 2**22 + 5, os.getppid()
    driver = nvml(("A", 80 * GiB, 10 * MiB, {}), ("B", 80 * GiB, 3 * GiB, {parent: 3 * GiB}), ("C", GiB, 0, {}))
    sampler = GpuSampler(own=False)
    assert sampler.sample([ours]) is None
    driver.told[0] = ("A", 80 * GiB, 6 * GiB, {ours: 5 * GiB})
    driver.told[1] = ("B", 80 * GiB, 5 * GiB, {parent: 3 * GiB, ours: 2 * GiB})
    now = sampler.sample([own, ours])
    assert now is not None
    assert now.charged_bytes == 7 * GiB
    assert now.kinds() == {}
    driver.told[1] = ("B", 80 * GiB, 3 * GiB, {parent: 3 * GiB})
    sampler.sample([ours])
    first, second = sampler.devices()
    assert (first.name, first.used_bytes, first.process_bytes, first.others_bytes) == ("A", 6 * GiB, 5 * GiB, GiB)
    assert (second.index, second.process_bytes, second.others_bytes) == (1, 2 * GiB, 3 * GiB)
    assert not sampler.guessed()
    sampler.close()


def test_in_a_container_the_growth_of_the_device_stands_in(nvml: Callable[..., FakeNvml]) -> None:
    elsewhere = 2**22 + 6
    driver = nvml(("A", 80 * GiB, GiB, {}))
    sampler = GpuSampler(own=False)
    driver.told[0] = ("A", 80 * GiB, 4 * GiB, {elsewhere: 3 * GiB})
    now = sampler.sample([os.getpid()])
    assert now is not None
    assert now.charged_bytes == 3 * GiB
    assert sampler.guessed()
    sampler.close()
    # a process that does not use CUDA itself is not charged with what the device gains
    quiet = GpuSampler(own=True)
    driver.told[0] = ("A", 80 * GiB, 9 * GiB, {})
    assert quiet.sample() is None
    quiet.close()


def fake_torch(stats: dict[int, dict[str, int]]) -> types.ModuleType:
    def properties(index: int) -> Any:
        return types.SimpleNamespace(name=f"torch-{index}", uuid=f"uuid-{1 - index}")

    def info(index: int) -> tuple[int, int]:
        raise AssertionError("would set up a context")

    def value(name: str, index: int) -> int:
        return stats[index].get(name, 0)

    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True,
        device_count=lambda: 2,
        memory_stats=lambda index: stats[index],
        max_memory_reserved=lambda index: value("max_reserved", index),
        max_memory_allocated=lambda index: value("max_allocated", index),
        reset_peak_memory_stats=lambda index: None,
        get_device_properties=properties,
        mem_get_info=info,
        host_memory_stats=lambda: {"allocated_bytes.current": 64 * MiB},
    )
    return torch


def test_torch_and_the_driver_number_devices_differently(
    nvml: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = nvml(("A", 80 * GiB, 0, {}), ("B", 80 * GiB, 0, {}))
    empty = {"reserved_bytes.all.current": 0, "num_alloc_retries": 3}
    stats = {0: dict(empty), 1: dict(empty)}
    monkeypatch.setitem(sys.modules, "torch", fake_torch(stats))
    sampler = GpuSampler()
    assert sampler.sample() is None
    stats[0] = {
        "reserved_bytes.all.current": 4 * GiB,
        "allocated_bytes.all.current": 3 * GiB,
        "max_reserved": 5 * GiB,
        "max_allocated": 4 * GiB,
        "num_alloc_retries": 5,
    }
    driver.told[1] = ("B", 80 * GiB, 7 * GiB, {os.getpid(): 5 * GiB})
    now = sampler.sample()
    assert now is not None
    assert now.charged_bytes == 5 * GiB
    assert now.kinds() == {"allocated": 3 * GiB, "cached": GiB, "non_torch": GiB}
    assert sampler.pinned_bytes() == 64 * MiB
    assert sampler.alloc_retries() == 2
    (device,) = sampler.devices()
    assert (device.index, device.name, device.used_bytes) == (1, "B", 7 * GiB)
    assert (device.allocated_bytes, device.reserved_bytes, device.others_bytes) == (4 * GiB, 5 * GiB, 2 * GiB)
    sampler.close()


def test_unified_memory_is_one_pool_and_added_once(nvml: Callable[..., FakeNvml]) -> None:
    command = [sys.executable, "-S", "-E", "-c", "import sys; print(flush=True); sys.stdin.read()"]
    driver = nvml(("GB10", 0, None, {}))
    machine = this_machine(Path.cwd())
    assert machine.unified
    assert machine.gpu_bytes is None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        driver.told[0] = ("GB10", 0, None, {child.pid: 2 * GiB})
        with Session(root_pid=child.pid, unified=True) as session:
            session.sample()
        child.communicate()
    measured = session.stop()
    budget = Budget(dram_bytes=GiB, gpu_bytes=GiB)
    report = assemble(measured, Ledger(budget), Machine(name="box", unified=True), Story())
    dram, gpu = report.tiers.dram, report.tiers.gpu
    assert gpu is not None
    assert (gpu.peak_bytes, gpu.within, gpu.budget_bytes) == (2 * GiB, None, None)
    assert dram.peak_bytes is not None
    assert 2 * GiB < dram.peak_bytes < 2 * GiB + 64 * MiB
    assert dram.kinds_at_peak["device"] == 2 * GiB
    assert report.verdict == "over"
    assert any("one pool" in note for note in report.notes)


def test_wear_is_told_per_day() -> None:
    from tests.test_assemble import MACHINE, MEASURED

    def notes(written: int, machine: Machine) -> list[str]:
        import dataclasses

        measured = dataclasses.replace(MEASURED, process_write_bytes=written, wall_s=86400.0)
        return assemble(measured, Ledger(Budget()), machine, Story()).notes

    drive = Machine(name="box", ssd_endurance_bytes=600 * 1024 * GiB)
    assert "would last 600 days" in notes(1024 * GiB, drive)[-1]
    assert "endurance is not known" in notes(2 * GiB, Machine(name="box"))[-1]
    assert "endurance" not in notes(1000, MACHINE)[-1]
