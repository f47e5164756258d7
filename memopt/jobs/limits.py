"""Where a run computes and what it may use: device, machine and budget, before anything else is looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.jobs.config import FinetuneConfig
from memopt.machine import Machine
from memopt.tiers import Tier
from memopt.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and in what the blocks are computed, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The machine a run is planned for and what it may use of it. Unasked: all there is, less a reserve."""

    compute: Compute
    machine: Machine
    budget: Budget
    notes: tuple[str, ...] = ()


def find_limits(config: FinetuneConfig, directory: Path | None) -> Limits:
    """Device, machine (a profile, or this host with its container's limits) and budget. Raises BadInput."""
    compute = choose_compute(config)
    if config.gpu is not None and compute.device.type != "cuda":
        raise BadInput(f"gpu = {config.gpu!r}: the run computes on {compute.device}; leave --gpu out")
    machine = Machine.load(config.machine) if config.machine else Machine.capacities(directory)
    if config.ssd_endurance_bytes is not None:
        machine = replace(machine, ssd_endurance_bytes=config.ssd_endurance_bytes)
    asked = Budget.of(gpu=config.gpu, dram=config.dram, ssd=config.ssd, machine=machine)
    whole = Budget.load(config.machine) if config.machine else Budget.from_machine(machine)
    budget = Budget(
        gpu_bytes=asked.gpu_bytes or (whole.gpu_bytes if compute.device.type == "cuda" else None),
        dram_bytes=asked.dram_bytes or whole.dram_bytes,
        ssd_bytes=asked.ssd_bytes,
    )
    if config.dry_run:  # another machine may be planned for
        return Limits(compute=compute, machine=machine, budget=budget)
    budget, notes = _within(budget, Machine.capacities(directory) if config.machine else machine)
    return Limits(compute=compute, machine=machine, budget=budget, notes=notes)


def _within(budget: Budget, host: Machine) -> tuple[Budget, tuple[str, ...]]:
    """No more than there is: the kernel would end the run where the budget should have."""
    notes = []
    if budget.dram_bytes is not None and host.dram_bytes is not None and budget.dram_bytes > host.dram_bytes:
        all_of_it = Budget.from_machine(host).dram_bytes
        assert all_of_it is not None
        notes.append(_lowered(Tier.DRAM, budget.dram_bytes, host.dram_bytes, all_of_it))
        budget = replace(budget, dram_bytes=all_of_it)
    if budget.gpu_bytes is not None and host.gpu_bytes is not None and budget.gpu_bytes > host.gpu_bytes:
        notes.append(_lowered(Tier.GPU, budget.gpu_bytes, host.gpu_bytes, host.gpu_bytes))
        budget = replace(budget, gpu_bytes=host.gpu_bytes)
    return budget, tuple(notes)


def _lowered(tier: Tier, asked: int, there: int, left: int) -> str:
    return (
        f"the {tier} budget of {format_bytes(asked)} is more than the {format_bytes(there)} of this machine or "
        f"container: {format_bytes(left)} are used"
    )


def choose_compute(config: FinetuneConfig) -> Compute:
    """Device and dtype: what the hardware does well."""
    cuda = torch.cuda.is_available()
    if config.device.startswith("cuda") and not cuda:
        raise BadInput(f"device = {config.device!r}: this PyTorch sees no CUDA device; use --device cpu")
    name = ("cuda" if cuda else "cpu") if config.device == "auto" else config.device
    device = torch.device(name)
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
        return Compute(device=device, dtype=dtype, reason=f"computing on {device} in {config.dtype}, as asked")
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        return Compute(
            device=device, dtype=dtype, reason=f"computing on {device} in {str(dtype)[6:]}: what its matrix units do"
        )
    return Compute(
        device=device,
        dtype=torch.float32,
        reason="computing on cpu in float32: bfloat16 matrix products are slower on most CPUs (up to 25 times)",
    )
