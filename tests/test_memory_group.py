"""The group that --enforce makes: what is written where, and what is said when it cannot be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.jobs import memory_group
from memopt.jobs.memory_group import join_command, limited_group
from tests.test_profiler_machine import V1_MOUNT, V2_MOUNT

FakeHost = Callable[[dict[str, str]], Path]


@pytest.fixture(autouse=True)
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up group holds real files, so it cannot be removed like the kernel's."""
    monkeypatch.setattr(memory_group, "_REMOVE_TRIES", 1)
    monkeypatch.setattr(memory_group, "_REMOVE_EVERY_S", 0.0)


def host(fake_host: FakeHost, version: int) -> Path:
    mount, line = (V1_MOUNT, "4:memory:/job\n") if version == 1 else (V2_MOUNT, "0::/job\n")
    directory = "sys/fs/cgroup/memory/job" if version == 1 else "sys/fs/cgroup/job"
    return fake_host({"proc/self/mountinfo": mount, "proc/self/cgroup": line, f"{directory}/cgroup.procs": ""})


def test_version_1(fake_host: FakeHost) -> None:
    with limited_group(12345, host(fake_host, 1)) as group:
        assert group.version == 1
        assert (group.path / "memory.limit_in_bytes").read_text() == "12345"
        assert join_command(group, ["train", "-x"])[-3:] == [str(group.path / "cgroup.procs"), "train", "-x"]


def test_version_2_hands_the_controller_down(fake_host: FakeHost) -> None:
    with limited_group(12345, host(fake_host, 2)) as group:
        assert (group.path / "memory.max").read_text() == "12345"
        assert (group.path.parent / "cgroup.subtree_control").read_text() == "+memory"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        # the kernel says EBUSY where processes and controllers may not share a group; any refusal is told the same way
        (lambda job: (job / "cgroup.subtree_control").mkdir(), "the limit cannot be set"),
        (lambda job: [job.joinpath("cgroup.procs").unlink(), job.rmdir(), job.touch()], "no group may be made here"),
    ],
)
def test_what_is_not_permitted_is_one_line(fake_host: FakeHost, spoil: Callable[[Path], object], says: str) -> None:
    root = host(fake_host, 2)
    spoil(root / "sys/fs/cgroup/job")
    with pytest.raises(BadInput, match=f"--enforce: .*{says}.*leave --enforce out") as error, limited_group(1, root):
        pass
    assert "\n" not in str(error.value)


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no memory cgroup is mounted"), limited_group(1, tmp_path):
        pass
