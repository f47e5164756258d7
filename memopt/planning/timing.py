"""Seconds of a step from what it moves and computes, and the machine's speeds: what hides behind what. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memopt.forecast_types import StepTime
from memopt.machine import Machine
from memopt.units import format_s

MATRIX_SHARE = 0.5
"""Share of the speed of one large matrix product that a whole pass of a model reaches: published runs reach 0.38 to
0.57 of the paper value (PaLM 0.46, Megatron-LM 0.52)."""
GPU_FLOAT32_SHARE = 0.125
"""float32 products on a GPU against bfloat16 ones, without TF32: 1/2 (RTX 4090) to 1/16 (A100) by data sheet."""

_TOLD_SHARE = 0.005
"""What takes less than this of the longest is not spoken of."""

Overlap = Literal["all", "none", "update last"]
"""`all`: copies, SSD and updates run beside the computation; `none`: one after the other; `update last`: copies run
beside it, then comes the update with its SSD traffic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step asks of a machine; bytes and operations.

    `memory_bytes`: through the computing device's own memory; products and this run at the same time. `update_flops`,
    `update_bytes`: of the optimizer, on the device, or with `update_on_host` on the processor. `tokens`: made or read.
    """

    flops: int = 0
    memory_bytes: int = 0
    update_flops: int = 0
    update_bytes: int = 0
    update_on_host: bool = False
    to_device_bytes: int = 0
    from_device_bytes: int = 0
    ssd_read_bytes: int = 0
    ssd_write_bytes: int = 0
    tokens: int = 0
    overlap: Overlap = "all"


def step_time(work: Work, machine: Machine, *, device: Literal["cpu", "cuda"], dtype: str) -> StepTime | None:
    """Seconds of `work`; None when the machine does not say how fast something is that it needs.

    Products run at half of the machine's rate (`MATRIX_SHARE`), in float32 on a GPU at an eighth of that again.
    """
    on_gpu = device == "cuda"
    flops, memory = _speeds(machine, on_gpu)
    if on_gpu and dtype == "float32" and flops:
        flops *= GPU_FLOAT32_SHARE
    host_flops, host_memory = _speeds(machine, on_gpu and not work.update_on_host)
    parts = (
        _longest(_seconds(work.flops, flops), _seconds(work.memory_bytes, memory)),
        _longest(_seconds(work.update_flops, host_flops), _seconds(work.update_bytes, host_memory)),
        # a link carries both directions at once
        _longest(
            _seconds(work.to_device_bytes, machine.h2d_per_s or _pool(machine)),
            _seconds(work.from_device_bytes, machine.d2h_per_s or _pool(machine)),
        ),
        _sum(
            _seconds(work.ssd_read_bytes, machine.ssd_read_per_s),
            _seconds(work.ssd_write_bytes, machine.ssd_write_per_s),
        ),
    )
    compute, update, transfer, ssd = parts
    if compute is None or update is None or transfer is None or ssd is None:
        return None
    beside = work.update_on_host and on_gpu
    if work.overlap == "none":
        step = compute + update + transfer + ssd
    elif work.overlap == "update last":
        step = max(compute, transfer) + max(update, ssd)
    else:
        # the processor that computes cannot update at the same time; one beside it can
        step = max(compute, update, transfer, ssd) if beside else max(compute + update, transfer, ssd)
    longest = max(compute + (0.0 if beside else update), update, transfer, ssd)
    waits = _memory_bound(work, flops, memory)
    bound: Literal["compute", "memory", "transfer", "ssd"] = "memory" if waits else "compute"
    if longest in (transfer, ssd) and longest > 0:
        bound = "ssd" if ssd >= transfer else "transfer"
    return StepTime(
        step_s=step,
        compute_s=compute + update,
        transfer_s=transfer,
        ssd_s=ssd,
        bound=bound,
        hidden=_words(work, compute, update, transfer, ssd, beside, memory_bound=waits),
        tokens_per_s=work.tokens / step if work.tokens and step > 0 else None,
    )


def missing_speeds(machine: Machine, *, device: Literal["cpu", "cuda"]) -> tuple[str, ...]:
    """Fields of the machine that seconds need and that it does not say."""
    names = ["gpu_flops", "gpu_memory_per_s"] if device == "cuda" else ["cpu_flops", "dram_per_s"]
    names += ["ssd_read_per_s", "ssd_write_per_s"]
    if device == "cuda" and not machine.unified:
        names += ["h2d_per_s", "d2h_per_s"]
    return tuple(name for name in names if getattr(machine, name) is None)


def _speeds(machine: Machine, on_gpu: bool) -> tuple[float | None, float | None]:
    """Operations and bytes per second."""
    flops = machine.gpu_flops if on_gpu else machine.cpu_flops
    return (None if flops is None else flops * MATRIX_SHARE), (
        machine.gpu_memory_per_s if on_gpu else machine.dram_per_s
    )


def _pool(machine: Machine) -> int | None:
    """With one pool of memory nothing crosses a link: a copy is a copy within it."""
    return machine.dram_per_s if machine.unified else None


def _seconds(amount: float, per_s: float | None) -> float | None:
    if not amount:
        return 0.0
    return None if not per_s else amount / per_s


def _longest(*parts: float | None) -> float | None:
    return None if any(part is None for part in parts) else max(part for part in parts if part is not None)


def _sum(*parts: float | None) -> float | None:
    return None if any(part is None for part in parts) else sum(part for part in parts if part is not None)


def _memory_bound(work: Work, flops: float | None, memory: float | None) -> bool:
    return bool(flops and memory and work.memory_bytes / memory > work.flops / flops)


def _words(
    work: Work, compute: float, update: float, transfer: float, ssd: float, beside: bool, *, memory_bound: bool
) -> str:
    """What runs behind what, in a sentence."""
    named = {
        "reading weights from memory" if memory_bound else "products": compute,
        "the update on the processor" if beside else "the update": update,
        "copies to and from the GPU": transfer,
        "the SSD": ssd,
    }
    told = max(named.values()) * _TOLD_SHARE
    there = {name: seconds for name, seconds in named.items() if seconds > told}
    text = ", ".join(f"{name} {format_s(seconds)}" for name, seconds in there.items())
    if len(there) < 2:
        return text
    if work.overlap == "none":
        return f"{text}; one after the other"
    if work.overlap == "update last":
        return f"{text}; copies run beside the products, then the update beside the SSD"
    if not beside and max(transfer, ssd) <= told:
        return f"{text}; one after the other"
    return f"{text}; the shorter run behind the longest" + (
        "" if beside or not update else ", the update after the products"
    )
