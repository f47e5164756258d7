"""Memory of the CUDA devices as torch's allocator and the driver (NVML) see it; nothing at all on a machine without.

A device is counted with what the driver says of our processes; where it does not know them (containers, devices that
share the host's memory), with what it is used more than when the sampling began; at least with what torch reserved.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from memopt.profiler.peaks import highest
from memopt.report_types import DeviceUse


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of one device now. `process_bytes`: our processes, context and libraries included; None: nobody can say,
    then `grown_bytes`, what the device holds more than at the start, stands in where the device is known to be used.
    """

    index: int
    name: str
    used_bytes: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    grown_bytes: int = 0

    @property
    def charged_bytes(self) -> int:
        """What a GPU budget counts."""
        told = self.grown_bytes if self.process_bytes is None else self.process_bytes
        return max(told, self.reserved_bytes or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """All devices our processes use, now. `pinned_bytes`: host memory that torch holds pinned."""

    devices: list[DeviceMemory] = field(default_factory=list)
    pinned_bytes: int | None = None

    @property
    def charged_bytes(self) -> int:
        """What a GPU budget counts: all devices together."""
        return sum(device.charged_bytes for device in self.devices)

    def kinds(self) -> dict[str, int]:
        """The charged bytes as the allocator tells them apart; empty when it is another process's."""
        known = [device for device in self.devices if device.allocated_bytes is not None]
        if not known:
            return {}
        allocated = sum(device.allocated_bytes or 0 for device in known)
        reserved = sum(device.reserved_bytes or 0 for device in known)
        return {
            "allocated": allocated,
            "cached": reserved - allocated,
            "non_torch": self.charged_bytes - reserved,
        }


class GpuSampler:
    """Reads every device. Make it before the job's first use of CUDA: what the devices hold then belongs to others.

    `own`: torch's allocator of this process is asked too. Never imports torch and never starts CUDA: both would cost
    more memory than there is to measure.
    """

    def __init__(self, *, own: bool = True) -> None:
        self._own = own
        self._driver = _Driver()
        self._devices: dict[int, DeviceUse] = {}
        self._torch_index: dict[int, int] = {}
        self._guessed = False
        self._pinned_bytes: int | None = None
        self._retries_before: dict[int, int] = {}
        self._retries: dict[int, int] = {}

    def sample(self, pids: Collection[int] | None = None) -> GpuMemory | None:
        """Now, of `pids` (default: this process); None while they use no device."""
        told = {device.index: device for device in self._driver.devices(pids or [os.getpid()])}
        torch = self._torch()
        if torch is not None:
            for index in range(torch.cuda.device_count()):
                self._ask_torch(torch, index, told)
        if self._own:  # that a device fills up says nothing about us while torch does not use it
            told = {k: d for k, d in told.items() if d.process_bytes is not None or k in self._torch_index}
        devices = [device for _, device in sorted(told.items()) if device.charged_bytes > 0]
        self._guessed |= any(device.process_bytes is None for device in devices)
        if not devices:
            return None
        for device in devices:
            self._keep(device)
        memory = GpuMemory(devices=devices, pinned_bytes=_pinned(torch))
        self._pinned_bytes = highest(self._pinned_bytes, memory.pinned_bytes)
        return memory

    def reset_peak(self) -> None:
        """Let the allocator's own peaks count from now on."""
        torch = self._torch()
        if torch is not None:
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)

    def allocator_peak_bytes(self) -> int | None:
        """The most torch's allocator reserved since `reset_peak`, over devices: a counter, so short peaks are in it."""
        torch = self._torch()
        if torch is None:
            return None
        return sum(int(torch.cuda.max_memory_reserved(index)) for index in range(torch.cuda.device_count())) or None

    def devices(self) -> list[DeviceUse]:
        """Peaks of every device used so far; the allocator's own counters are in them."""
        torch = self._torch()
        used = []
        for place, device in sorted(self._devices.items()):
            if torch is not None and place in self._torch_index:
                index = self._torch_index[place]
                device = replace(
                    device,
                    allocated_bytes=highest(device.allocated_bytes, int(torch.cuda.max_memory_allocated(index))),
                    reserved_bytes=highest(device.reserved_bytes, int(torch.cuda.max_memory_reserved(index))),
                )
            used.append(device)
        return used

    def guessed(self) -> bool:
        """Whether a device's growth stood in for what the driver would not tell of our processes."""
        return self._guessed

    def pinned_bytes(self) -> int | None:
        """The most host memory torch held pinned."""
        return self._pinned_bytes

    def alloc_retries(self) -> int | None:
        """Times an allocation only worked after the allocator's cache was emptied; None without torch on a device."""
        if not self._retries:
            return None
        return sum(count - self._retries_before.get(index, 0) for index, count in self._retries.items())

    def close(self) -> None:
        """Leave NVML. Sampling again afterwards re-enters it."""
        self._driver.close()

    def _torch(self) -> Any:
        """torch, once somebody has imported it and used CUDA."""
        torch = sys.modules.get("torch") if self._own else None
        # a torch that is still being imported by another thread has no `cuda` yet
        cuda = getattr(torch, "cuda", None)
        return torch if cuda is not None and hasattr(cuda, "is_initialized") and cuda.is_initialized() else None

    def _ask_torch(self, torch: Any, index: int, told: dict[int, DeviceMemory]) -> None:
        stats: Mapping[str, int] = torch.cuda.memory_stats(index)
        reserved = int(stats.get("reserved_bytes.all.current", 0))
        if index not in self._retries_before:
            self._retries_before[index] = int(stats.get("num_alloc_retries", 0))
        if reserved == 0 and index not in self._retries:
            return  # asking more of a device that is not in use would set up a context on it
        self._retries[index] = int(stats.get("num_alloc_retries", 0))
        properties = torch.cuda.get_device_properties(index)
        # NVML numbers all devices of the machine, torch the visible ones: the same device has the same UUID
        found = self._driver.index_of(getattr(properties, "uuid", None))
        place = index if found is None else found
        device = told.get(place)
        if device is None:
            free, total = torch.cuda.mem_get_info(index)
            device = DeviceMemory(index=place, name=str(properties.name), used_bytes=int(total - free))
        self._torch_index[place] = index
        told[place] = replace(
            device, allocated_bytes=int(stats.get("allocated_bytes.all.current", 0)), reserved_bytes=reserved
        )

    def _keep(self, now: DeviceMemory) -> None:
        then = self._devices.get(now.index)
        others = None if now.process_bytes is None else max(0, now.used_bytes - now.charged_bytes)
        self._devices[now.index] = DeviceUse(
            index=now.index,
            name=now.name,
            used_bytes=max(now.used_bytes, then.used_bytes if then else 0),
            allocated_bytes=highest(then.allocated_bytes if then else None, now.allocated_bytes),
            reserved_bytes=highest(then.reserved_bytes if then else None, now.reserved_bytes),
            process_bytes=highest(then.process_bytes if then else None, now.process_bytes),
            others_bytes=highest(then.others_bytes if then else None, others),
        )


def driver_devices() -> list[tuple[str, int | None]]:
    """(name, bytes) of every GPU the driver knows; bytes None where it has no memory of its own. Empty without NVML."""
    driver = _Driver()
    try:
        return driver.totals()
    finally:
        driver.close()


class _Driver:
    """NVML, where it is there; every failure of it reads as "not known"."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._missing = False
        self._handles: list[Any] = []
        self._uuids: list[str] = []
        self._names: list[str] = []
        self._before = [self._used(handle) for handle in self._open()]

    def devices(self, pids: Collection[int]) -> list[DeviceMemory]:
        """Every device whose use the driver knows."""
        found = []
        for index, handle in enumerate(self._open()):
            used, process = self._used(handle), self._processes(handle, pids)
            before = self._before[index] if index < len(self._before) else None
            if used is not None or process:  # one that shares the host's memory only knows of processes
                grown = 0 if before is None or used is None else max(0, used - before)
                found.append(
                    DeviceMemory(
                        index=index,
                        name=self._names[index],
                        used_bytes=(process or 0) if used is None else used,
                        process_bytes=process,
                        grown_bytes=grown,
                    )
                )
        return found

    def totals(self) -> list[tuple[str, int | None]]:
        """(name, bytes) of every device."""
        found: list[tuple[str, int | None]] = []
        for handle, name in zip(self._open(), self._names, strict=True):
            total = None
            with contextlib.suppress(Exception):
                total = int(self._nvml.nvmlDeviceGetMemoryInfo(handle).total)
            found.append((name, total))
        return found

    def index_of(self, uuid: object) -> int | None:
        """The driver's number of torch's device."""
        wanted = str(uuid).removeprefix("GPU-")
        return self._uuids.index(wanted) if wanted in self._uuids else None

    def close(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                self._nvml.nvmlShutdown()
        self._nvml, self._handles = None, []

    def _open(self) -> list[Any]:
        if self._nvml is None and not self._missing:
            self._missing = True  # unless all of this works; a failed import is too slow to repeat
            with contextlib.suppress(Exception):
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
                self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
                self._uuids = [_text(pynvml.nvmlDeviceGetUUID(each)).removeprefix("GPU-") for each in self._handles]
                self._names = [_text(pynvml.nvmlDeviceGetName(each)) for each in self._handles]
                self._missing = False
        return self._handles

    def _used(self, handle: Any) -> int | None:
        with contextlib.suppress(Exception):  # devices that share the host's memory do not support this
            return int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
        return None

    def _processes(self, handle: Any, pids: Collection[int]) -> int | None:
        """Bytes of our processes; None where the driver sees other process ids than we do (containers), or none."""
        with contextlib.suppress(Exception):
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            ours = [process.usedGpuMemory for process in running if process.pid in pids]
            if ours:
                return None if None in ours else sum(ours)
            if any(os.path.exists(f"/proc/{process.pid}") for process in running):
                return 0
        return None


def _pinned(torch: Any) -> int | None:
    ask = getattr(getattr(torch, "cuda", None), "host_memory_stats", None)
    if ask is None:
        return None
    with contextlib.suppress(RuntimeError):
        return int(ask().get("allocated_bytes.current", 0))
    return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
