"""Measure this machine: capacities, the SSD under a directory, and copies to and from the GPU when there is one."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from memopt.machine import Machine
from memopt.store.bandwidth import SsdSpeed, measure_ssd
from memopt.store.regions import Region
from memopt.units import MiB, format_bytes, format_per_s

_COPY_BYTES = 256 * MiB
_ROUNDS = 5
_CPU_SIDE = 1024
_GPU_SIDE = 8192
"""Sides of the square matrices of the product: as wide as layers are, 2 and 1100 GFLOP, so that starting is nothing."""
_ROW = 4096
"""Columns of the matrix of the matrix-vector product, as wide as a layer of an 8B model."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CopySpeed:
    """Bytes per second between host and device."""

    h2d_per_s: int
    d2h_per_s: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ComputeSpeed:
    """Operations per second of a large matrix product, and bytes per second that a matrix-vector product reads."""

    flops: int
    memory_per_s: int


def probe(directory: str | Path, *, nbytes: int = 512 * MiB) -> Machine:
    """This host with measured numbers; `directory` says which drive, `nbytes` how large the test file is.

    The host-to-device numbers are those of pinned memory; the notes state pageable ones. Raises as `measure_ssd`.
    """
    machine = Machine.capacities(directory)
    speed = measure_ssd(directory, nbytes)
    notes = [*machine.notes, *_ssd_notes(speed, directory, nbytes)]
    cpu = compute_speed("cpu")
    notes.append(f"products measured on {torch.get_num_threads()} threads")
    pinned = pageable = gpu = None
    if torch.cuda.is_available():
        gpu = compute_speed("cuda")
        pinned, pageable = copy_speed(pin=True), copy_speed(pin=False)
        notes.append(
            f"copies from pageable memory: {format_per_s(pageable.h2d_per_s)} to the device, "
            f"{format_per_s(pageable.d2h_per_s)} back"
        )
    return dataclasses.replace(
        machine,
        ssd_read_per_s=speed.read_per_s,
        ssd_write_per_s=speed.write_per_s,
        ssd_mixed_per_s=speed.mixed_per_s,
        ssd_read_iops=speed.read_iops,
        h2d_per_s=None if pinned is None else pinned.h2d_per_s,
        d2h_per_s=None if pinned is None else pinned.d2h_per_s,
        cpu_flops=cpu.flops,
        gpu_flops=None if gpu is None else gpu.flops,
        dram_per_s=cpu.memory_per_s,
        gpu_memory_per_s=None if gpu is None else gpu.memory_per_s,
        notes=tuple(notes),
    )


def copy_speed(*, pin: bool, nbytes: int = _COPY_BYTES) -> CopySpeed:
    """Medians of copies between host memory (pinned or not) and the current CUDA device."""
    with Region(nbytes, pin=pin) as region:
        host = region.tensor(torch.uint8, nbytes)
        host.fill_(1)  # untouched pages would be mapped within the first copy
        device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        return CopySpeed(
            h2d_per_s=_copies_per_s(device, host, pin),
            d2h_per_s=_copies_per_s(host, device, pin),
        )


def compute_speed(device: str, *, side: int | None = None, nbytes: int = _COPY_BYTES) -> ComputeSpeed:
    """Medians of products of square matrices of `side`, and of a matrix of `nbytes` with a vector.

    float32 on a CPU, bfloat16 on a GPU: what memopt computes in there.
    """
    on_gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    side = side or (_GPU_SIDE if on_gpu else _CPU_SIDE)
    square = torch.ones(side, side, dtype=dtype, device=device)
    out = torch.empty_like(square)
    product_s = _median_s(lambda: torch.mm(square, square, out=out), on_gpu)
    rows = max(1, nbytes // (_ROW * dtype.itemsize))
    matrix = torch.ones(rows, _ROW, dtype=dtype, device=device)
    vector = torch.ones(_ROW, dtype=dtype, device=device)
    result = torch.empty(rows, dtype=dtype, device=device)
    read_s = _median_s(lambda: torch.mv(matrix, vector, out=result), on_gpu)
    return ComputeSpeed(flops=round(2 * side**3 / product_s), memory_per_s=round(matrix.nbytes / read_s))


def _median_s(work: Callable[[], object], on_gpu: bool) -> float:
    seconds = []
    for _ in range(_ROUNDS + 1):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    # the first one also sets things up
    return statistics.median(seconds[1:])


def _copies_per_s(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> int:
    return round(source.nbytes / _median_s(lambda: target.copy_(source, non_blocking=non_blocking), on_gpu=True))


def _ssd_notes(speed: SsdSpeed, directory: str | Path, nbytes: int) -> list[str]:
    how = "direct I/O" if speed.direct else f"through the page cache: {speed.reason}"
    return [
        f"SSD measured in {Path(directory).absolute()} with a file of {format_bytes(nbytes)}, {how}",
        f"SSD mixed: {speed.mixed_reads} reads to {speed.mixed_writes} writes at once, both directions added",
    ]
