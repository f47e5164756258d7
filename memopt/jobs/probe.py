"""Measure this machine: capacities, the SSD under a directory, and copies to and from the GPU when there is one."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import torch

from memopt.machine import Machine
from memopt.store.bandwidth import SsdSpeed, measure_ssd
from memopt.store.regions import Region
from memopt.units import MiB, format_bytes, format_per_s

_COPY_BYTES = 256 * MiB
_ROUNDS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CopySpeed:
    """Bytes per second between host and device."""

    h2d_per_s: int
    d2h_per_s: int


def probe(directory: str | Path, *, nbytes: int = 512 * MiB) -> Machine:
    """This host with measured numbers; `directory` says which drive, `nbytes` how large the test file is.

    The host-to-device numbers are those of pinned memory; the notes state pageable ones. Raises as `measure_ssd`.
    """
    machine = Machine.capacities(directory)
    speed = measure_ssd(directory, nbytes)
    notes = [*machine.notes, *_ssd_notes(speed, directory, nbytes)]
    pinned = pageable = None
    if torch.cuda.is_available():
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


def _copies_per_s(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> int:
    seconds = []
    for _ in range(_ROUNDS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=non_blocking)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    # the first copy also sets things up
    return round(source.nbytes / statistics.median(seconds[1:]))


def _ssd_notes(speed: SsdSpeed, directory: str | Path, nbytes: int) -> list[str]:
    how = "direct I/O" if speed.direct else f"through the page cache: {speed.reason}"
    return [
        f"SSD measured in {Path(directory).absolute()} with a file of {format_bytes(nbytes)}, {how}",
        f"SSD mixed: {speed.mixed_reads} reads to {speed.mixed_writes} writes at once, both directions added",
    ]
