"""The machine and the budgets of a profiled command, found without torch: it would cost more than many a command."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memopt import cgroups
from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.machine import Machine, dram_capacity
from memopt.profiler.gpu_sampler import driver_devices
from memopt.tiers import Tier
from memopt.units import parse_bytes

Size = int | str | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """This host, and what a command may use of it. `write_bytes`: to drives, in all."""

    machine: Machine
    budget: Budget
    write_bytes: int | None = None


def find_limits(gpu: Size, dram: Size, ssd: Size, ssd_write: Size, watch: Sequence[str]) -> Limits:
    """Sizes as bytes; percentages are shares of this host. Raises BadInput."""
    for directory in watch:
        if not os.path.exists(directory):
            raise BadInput(f"--watch {directory}: there is no such directory; make it first, or name another")
    machine = this_machine(Path(watch[0]) if watch else Path.cwd())
    write_bytes = None
    if ssd_write is not None:
        write_bytes = parse_bytes(ssd_write, machine.capacity_bytes(Tier.SSD), field="--ssd-write")
    return Limits(
        machine=machine,
        budget=Budget.of(gpu=gpu, dram=dram, ssd=ssd, machine=machine),
        write_bytes=write_bytes,
    )


def this_machine(directory: Path) -> Machine:
    """Capacities of this host as the kernel and the GPU's driver tell them; `ssd_bytes` is free space there."""
    dram_bytes, note = dram_capacity()
    notes = [note]
    devices = driver_devices()
    # a GPU whose driver has no memory of its own to tell of shares the host's
    unified = any(total is None for _, total in devices)
    if unified:
        notes.append("the GPU shares the one memory pool counted under DRAM")
    elif len(devices) > 1:
        notes.append(f"{len(devices)} GPUs; their memory is added up")
    gpu_bytes = sum(total or 0 for _, total in devices)
    space = os.statvfs(directory)
    machine = Machine(
        name=os.uname().nodename,
        cpu_count=cgroups.whole_cpus(len(os.sched_getaffinity(0)), cgroups.cpu_limit()),
        gpu_name=devices[0][0] if devices else None,
        gpu_bytes=None if unified else gpu_bytes or None,
        dram_bytes=dram_bytes,
        ssd_bytes=(space.f_bavail * space.f_frsize) or None,
        unified=unified,
    )
    return dataclasses.replace(machine, notes=tuple(notes))
