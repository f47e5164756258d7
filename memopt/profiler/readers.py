"""All that a session looks at, asked together and each no more often than it is worth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from memopt import cgroups
from memopt.profiler.container import ContainerSampler, ContainerUse
from memopt.profiler.disks import disk_counts, disk_use
from memopt.profiler.gpu_sampler import GpuMemory, GpuSampler
from memopt.profiler.pace import Pace
from memopt.profiler.peaks import highest
from memopt.profiler.thinning import Point
from memopt.profiler.tree_sampler import TreeMemory, TreeSampler
from memopt.profiler.watched import WatchedFiles
from memopt.report_types import DiskUse
from memopt.tiers import Tier

_GPU_EVERY_S = 0.1
_CONTAINER_EVERY_S = 0.5


class Readers:
    """The samplers of one session; made when it starts. Remembers the highest of what no budget counts.

    `root_pid` and `adopted` as for TreeSampler; `group`: the memory group the job has for itself. `unified`: the GPU's
    memory is the host's, so what the job holds on it is counted in DRAM, and nowhere else.
    """

    def __init__(
        self,
        *,
        root_pid: int | None = None,
        adopted: bool = False,
        watch: Iterable[str | Path] = (),
        group: cgroups.Group | None = None,
        unified: bool = False,
    ) -> None:
        self.tree = TreeSampler(root_pid, adopted=adopted)
        self.gpu = GpuSampler(own=root_pid is None and not adopted)
        self._files = WatchedFiles(watch)
        self._container = ContainerSampler(group)
        self._unified = unified
        self._disks = disk_counts()
        self._gpu_pace, self._container_pace = Pace(_GPU_EVERY_S), Pace(_CONTAINER_EVERY_S)
        self._memory = TreeMemory()
        self._on_gpu: GpuMemory | None = None
        self.file_peak_bytes = self.hwm_peak_bytes = self.locked_peak_bytes = 0
        self.proportional_peak_bytes: int | None = None
        self.gpu.reset_peak()

    def read(self, t_s: float, *, fresh: bool) -> Point:
        """One sample of every tier; `fresh` asks all, however recently that was done."""
        memory = self._memory = self.tree.sample(fresh=fresh)
        self.file_peak_bytes = max(self.file_peak_bytes, memory.file_bytes)
        self.hwm_peak_bytes = max(self.hwm_peak_bytes, memory.hwm_bytes)
        self.locked_peak_bytes = max(self.locked_peak_bytes, memory.locked_bytes)
        self.proportional_peak_bytes = highest(self.proportional_peak_bytes, memory.proportional_bytes)
        if fresh or self._gpu_pace.due(t_s):
            with self._gpu_pace.spending(t_s):
                self._on_gpu = self.gpu.sample(self.tree.pids())
        if fresh or self._container_pace.due(t_s):
            with self._container_pace.spending(t_s):
                self._container.sample()
        on_gpu = None if self._on_gpu is None else self._on_gpu.charged_bytes
        in_the_pool = (on_gpu or 0) if self._unified else 0
        return Point(t_s, memory.charged_bytes + in_the_pool, on_gpu, self._files.sample(t_s, fresh=fresh))

    def kinds(self) -> dict[Tier, dict[str, int]]:
        """The bytes of the last sample as the system tells them apart; each tier's add up to its sample."""
        dram = {"anonymous": self._memory.anon_bytes, "shared": self._memory.shmem_bytes}
        found = {Tier.DRAM: dram}
        if self._on_gpu is not None:
            found[Tier.GPU] = self._on_gpu.kinds()
            if self._unified:
                dram["device"] = self._on_gpu.charged_bytes
        return found

    def container(self) -> ContainerUse:
        """What the kernel counted of the container until now."""
        return self._container.use()

    def disks(self, wall_s: float) -> list[DiskUse]:
        """What the machine's drives did until now."""
        return disk_use(self._disks, disk_counts(), wall_s)

    def cached_peak_bytes(self) -> int | None:
        """The most the page cache held of the watched files."""
        return self._files.cached_peak_bytes()

    def close(self) -> None:
        """Close what is kept open."""
        self.tree.close()
        self.gpu.close()
