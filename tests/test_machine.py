from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from memopt import cgroups
from memopt.errors import BadInput
from memopt.machine import Machine, dram_capacity, profile_names, read_profile
from memopt.tiers import Tier
from memopt.units import GiB, MiB

FakeHost = Callable[[dict[str, str]], Path]

MEMINFO = {"proc/meminfo": f"MemTotal:       {16 * GiB // 1024} kB\nMemFree: 1 kB\n"}
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = (
    "30 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:12 - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
NO_LIMIT_V1 = "9223372036854771712\n"


def v2(files: dict[str, str], inside: str = "/user/job") -> dict[str, str]:
    tree = {"proc/self/cgroup": f"0::{inside}\n", "proc/self/mountinfo": V2_MOUNT}
    return MEMINFO | tree | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}


def v1(files: dict[str, str]) -> dict[str, str]:
    lines = "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n"
    tree = {"proc/self/cgroup": lines, "proc/self/mountinfo": V1_MOUNT}
    return MEMINFO | tree | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}


def test_v2_takes_the_tightest_limit_up_the_hierarchy(fake_host: FakeHost) -> None:
    root = fake_host(
        v2({"user/job/memory.max": "max\n", "user/memory.max": f"{2 * GiB}\n", "memory.max": "8589934592\n"})
    )
    limit = cgroups.memory_limit(root)
    assert limit is not None
    assert limit.limit_bytes == 2 * GiB
    assert limit.file == root / "sys/fs/cgroup/user/memory.max"


def test_v2_high_counts(fake_host: FakeHost) -> None:
    root = fake_host(v2({"user/job/memory.max": f"{4 * GiB}", "user/job/memory.high": f"{3 * GiB}"}))
    capacity, note = dram_capacity(root)
    assert capacity == 3 * GiB
    assert "memory.high" in note


def test_v1_takes_the_tightest_limit_up_the_hierarchy(fake_host: FakeHost) -> None:
    files = {
        "memory/docker/abc/memory.limit_in_bytes": NO_LIMIT_V1,
        "memory/docker/memory.limit_in_bytes": f"{GiB}\n",
        "memory/memory.limit_in_bytes": NO_LIMIT_V1,
    }
    capacity, note = dram_capacity(fake_host(v1(files)))
    assert capacity == GiB
    assert "docker/memory.limit_in_bytes" in note


def test_no_limit_is_the_hosts_memory(fake_host: FakeHost) -> None:
    root = fake_host(v1({"memory/docker/abc/memory.limit_in_bytes": NO_LIMIT_V1}))
    assert cgroups.memory_limit(root) is None
    assert dram_capacity(root)[0] == 16 * GiB


def test_a_limit_above_the_host_is_the_hosts_memory(fake_host: FakeHost) -> None:
    assert dram_capacity(fake_host(v2({"user/job/memory.max": f"{64 * GiB}"})))[0] == 16 * GiB


def test_a_container_that_sees_only_its_own_group(fake_host: FakeHost) -> None:
    """Without a cgroup namespace the path is the host's while the mount shows the container's group as its root."""
    tree = {
        "proc/self/cgroup": "4:memory:/docker/abc/inner\n",
        "proc/self/mountinfo": "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GiB}\n",
        "sys/fs/cgroup/memory/inner/memory.limit_in_bytes": f"{2 * GiB}\n",
    }
    assert dram_capacity(fake_host(MEMINFO | tree))[0] == 2 * GiB


@pytest.mark.parametrize("inside", ["/elsewhere", "/docker/abcdef", "/../other"])
def test_a_path_outside_of_the_mount_falls_back_to_the_mount(fake_host: FakeHost, inside: str) -> None:
    tree = {
        "proc/self/cgroup": f"4:memory:{inside}\n",
        "proc/self/mountinfo": "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GiB}\n",
    }
    assert dram_capacity(fake_host(MEMINFO | tree))[0] == 3 * GiB


def test_blanks_in_mount_points(fake_host: FakeHost) -> None:
    tree = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "31 23 0:28 / /my\\040cgroup rw - cgroup2 cgroup2 rw\n",
        "my cgroup/memory.max": f"{GiB}",
    }
    assert dram_capacity(fake_host(MEMINFO | tree))[0] == GiB


def test_cpu_quotas(fake_host: FakeHost) -> None:
    assert (
        cgroups.cpu_limit(fake_host(v2({"user/job/cpu.max": "150000 100000\n", "user/cpu.max": "max 100000\n"}))) == 1.5
    )


def test_cpu_quotas_v1(fake_host: FakeHost) -> None:
    files = {
        "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/docker/cpu.cfs_quota_us": "250000\n",
        "cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
    }
    assert cgroups.cpu_limit(fake_host(v1(files))) == 2.5


@pytest.mark.parametrize(
    ("available", "quota", "cpus"), [(8, None, 8), (8, 2.5, 3), (2, 16.0, 2), (8, 0.2, 1), (1, None, 1)]
)
def test_whole_cpus(available: int, quota: float | None, cpus: int) -> None:
    assert cgroups.whole_cpus(available, quota) == cpus


def test_oom_kills(fake_host: FakeHost) -> None:
    root = fake_host(v2({"user/job/memory.events": "low 0\noom 3\noom_kill 2\n", "user/memory.events": "oom_kill 7\n"}))
    assert cgroups.oom_kills(root) == 2


def test_oom_kills_v1(fake_host: FakeHost) -> None:
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"
    assert cgroups.oom_kills(fake_host(v1({"memory/docker/abc/memory.oom_control": control}))) == 4


def test_nothing_to_read_is_no_limit(fake_host: FakeHost) -> None:
    root = fake_host(MEMINFO)
    assert cgroups.memory_limit(root) is None
    assert cgroups.cpu_limit(root) is None
    assert cgroups.oom_kills(root) is None


def test_this_host(tmp_path: Path) -> None:
    machine = Machine.capacities(tmp_path / "not" / "yet" / "there")
    assert not machine.assumed
    assert 1 <= machine.cpu_count <= len(os.sched_getaffinity(0))
    assert machine.dram_bytes is not None
    assert 64 * MiB < machine.dram_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    space = os.statvfs(tmp_path)
    assert machine.ssd_bytes is not None
    assert 0 < machine.ssd_bytes <= space.f_blocks * space.f_frsize
    assert machine.notes


@pytest.mark.parametrize("name", profile_names())
def test_presets(name: str) -> None:
    machine = Machine.load(name)
    assert machine.name == name
    assert machine.assumed, "a preset never claims to be measured"
    assert machine.dram_bytes is not None
    assert machine.ssd_read_per_s is not None
    assert machine.ssd_write_per_s is not None
    assert machine.ssd_mixed_per_s is not None
    assert machine.cpu_flops
    assert machine.dram_per_s
    assert bool(machine.gpu_flops) == bool(machine.gpu_memory_per_s) == bool(machine.gpu_name)
    if machine.gpu_name and not machine.unified:
        assert machine.gpu_bytes
        assert machine.h2d_per_s
    assert machine.capacity_bytes(Tier.GPU) == (machine.dram_bytes if machine.unified else machine.gpu_bytes)


def test_the_presets_that_were_asked_for_are_there() -> None:
    wanted = {"rtx4090-64g", "laptop-16g", "a100-80g", "h100-80g", "gb10", "jetson-orin", "ci-2g"}
    assert wanted <= set(profile_names())


def test_toml_is_read_back(tmp_path: Path) -> None:
    machine = Machine(
        name='odd "name"\\ \n\x7f é',
        cpu_count=3,
        gpu_name="G",
        gpu_bytes=12345,
        dram_bytes=3 * GiB,
        ssd_read_iops=9,
        h2d_per_s=GiB + 1,
        notes=("a, b", 'say "hi"'),
    )
    file = tmp_path / "m.toml"
    file.write_text(machine.to_toml())
    assert Machine.load(file) == machine
    assert Machine.from_dict(machine.to_dict()) == machine
    assert "ssd_bytes" not in tomllib.loads(machine.to_toml()), "what is not known is left out"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dram_bytes = 1", "'name' is missing"),
        ('name = "m"\ndram = "1GiB"', "unknown field 'dram'"),
        ('name = "m"\ndram_bytes = "1GB"', "dram_bytes: '1GB'"),
        ('name = "m"\ndram_bytes = 0', "dram_bytes = 0 must be positive"),
        ('name = "m"\ncpu_count = "2"', "cpu_count = '2' must be int"),
        ('name = "m"\nunified = 1', "unified = 1 must be bool"),
        ('name = "m"\nnotes = "x"', "notes = 'x' must be a list"),
        ('name = "m"\nunified = true\ngpu_bytes = "1GiB"', "one pool"),
        ("name = ", "cannot be read as TOML"),
    ],
)
def test_bad_profiles_name_the_field(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "m.toml"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        Machine.load(file)
    assert says in str(caught.value)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match="gb10, h100-80g"):
        read_profile("rtx9999")
