"""Memory of one CUDA device as torch's allocator and the driver (NVML) see it; nothing at all on a machine without."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from memopt.profiler.samplers import GpuMemory


class GpuSampler:
    """Reads one device. Make it before the first use of CUDA: what the device holds then belongs to others.

    Never imports torch and never starts CUDA: both would cost more memory than there is to measure.
    """

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._nvml: Any = None
        self._handle: Any = None
        self._others_bytes = None if self._torch() is not None else self._used_by_others()

    def sample(self) -> GpuMemory | None:
        """Now; None while this process has not used the device."""
        torch = self._torch()
        if torch is None:
            return None
        free, total = torch.cuda.mem_get_info(self._index)
        return GpuMemory(
            used_bytes=total - free,
            reserved_bytes=torch.cuda.memory_reserved(self._index),
            allocated_bytes=torch.cuda.memory_allocated(self._index),
            process_bytes=self._process_bytes(torch, total - free),
        )

    def reset_peak(self) -> None:
        """Let `allocator_peak_bytes` count from now on."""
        torch = self._torch()
        if torch is not None:
            torch.cuda.reset_peak_memory_stats(self._index)

    def allocator_peak_bytes(self) -> int | None:
        """The most torch's allocator reserved since `reset_peak`: a counter, so short peaks are in it."""
        torch = self._torch()
        return None if torch is None else int(torch.cuda.max_memory_reserved(self._index))

    def close(self) -> None:
        """Leave NVML. Sampling again afterwards re-enters it."""
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                self._nvml.nvmlShutdown()
        self._nvml = self._handle = None

    @staticmethod
    def _torch() -> Any:
        """torch, once somebody has imported it and used CUDA."""
        torch = sys.modules.get("torch")
        # a torch that is still being imported by another thread has no `cuda` yet
        cuda = getattr(torch, "cuda", None)
        return torch if cuda is not None and hasattr(cuda, "is_initialized") and cuda.is_initialized() else None

    def _used_by_others(self) -> int | None:
        """The device's use before this process joins in; known only where torch can ask NVML without starting CUDA."""
        torch = sys.modules.get("torch")
        with contextlib.suppress(Exception):
            if torch is not None and torch.cuda.is_available():
                return int(torch.cuda.device_memory_used(self._index))
        return None

    def _process_bytes(self, torch: Any, used_bytes: int) -> int | None:
        # NVML may be missing, broken, or see other process ids (containers): then the growth since the start stands in
        with contextlib.suppress(Exception):
            if self._handle is None:
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
                uuid = torch.cuda.get_device_properties(self._index).uuid
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
        return None if self._others_bytes is None else max(0, used_bytes - self._others_bytes)
