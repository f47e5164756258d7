"""How fast a directory's drive is, measured with the very files, threads and buffers that jobs use."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from memopt.errors import BadInput
from memopt.store.files import DirectFile
from memopt.store.regions import Region
from memopt.store.transfer import IoPool, Piece, Transfer
from memopt.units import MiB

# One optimizer step in fp32 with the update fused into the backward reads 16 and writes 12 bytes per parameter.
STEP_READS, STEP_WRITES = 4, 3
_ROUNDS = 3
_SMALL_BYTES = 4096
_SMALL_WORKERS = 32
_SMALL_READS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SsdSpeed:
    """Bytes per second (medians of three rounds) of large transfers, and 4 KiB random reads per second.

    `mixed_per_s`: both directions added, with `mixed_reads` reads to `mixed_writes` writes going on at once. Writes
    count until the drive has confirmed them. `read_iops` is what memopt's own threads reach, not the drive's limit.
    `direct`: the page cache was bypassed; otherwise `reason` says why not, and the numbers are partly the cache's.
    """

    read_per_s: int
    write_per_s: int
    mixed_per_s: int
    mixed_reads: int
    mixed_writes: int
    read_iops: int
    direct: bool
    reason: str


def measure_ssd(
    directory: str | Path,
    nbytes: int = 512 * MiB,
    piece_bytes: int = 8 * MiB,
    workers: int = 4,
    *,
    mixed_reads: int = STEP_READS,
    mixed_writes: int = STEP_WRITES,
) -> SsdSpeed:
    """Measure the drive under `directory` with a nameless file of `nbytes`; writes five times `nbytes`, at most.

    Takes two buffers of `piece_bytes` per worker. The file has no name from the moment it exists, so nothing is left
    behind, however this ends. Raises BadInput for a bad size or directory, StoreError when the file cannot be made.
    """
    pieces = nbytes // max(piece_bytes, _SMALL_BYTES)
    if piece_bytes < _SMALL_BYTES or piece_bytes % _SMALL_BYTES or pieces < 2:
        raise BadInput(f"measuring {nbytes} bytes by {piece_bytes}: pieces must be multiples of 4096, at least two")
    if not Path(directory).is_dir():
        raise BadInput(f"{directory}: not a directory; make it first, or name the one your runs will use")
    with (
        _nameless_file(Path(directory), pieces * piece_bytes) as file,
        IoPool(workers, piece_bytes) as pool,
        Region(2 * workers * piece_bytes) as region,
    ):
        # a drive that compresses would otherwise be measured on zeros
        region.view[:] = random.Random(0).randbytes(region.nbytes)
        bench = _Bench(file, pool, region, pieces, piece_bytes)
        write_per_s = _median(bench.write_all)
        read_per_s = _median(bench.read_all)
        mixed_per_s = _median(lambda: bench.mix(mixed_reads, mixed_writes))
        with IoPool(_SMALL_WORKERS, _SMALL_BYTES) as small_pool:
            read_iops = _median(lambda: _small_reads(file, small_pool, region))
        return SsdSpeed(
            read_per_s=read_per_s,
            write_per_s=write_per_s,
            mixed_per_s=mixed_per_s,
            mixed_reads=mixed_reads,
            mixed_writes=mixed_writes,
            read_iops=read_iops,
            direct=file.direct,
            reason=file.reason,
        )


def _nameless_file(directory: Path, nbytes: int) -> DirectFile:
    try:
        inner = Path(tempfile.mkdtemp(dir=directory, prefix=".memopt-probe-"))
    except OSError as error:
        raise BadInput(
            f"{directory}: cannot be written: {error.strerror}; name a directory you may write to"
        ) from error
    path = inner / "probe"
    try:
        return DirectFile.create(path, nbytes)
    finally:
        path.unlink(missing_ok=True)
        os.rmdir(inner)


def _median(measure: Callable[[], float]) -> int:
    return max(1, round(statistics.median(measure() for _ in range(_ROUNDS))))


class _Bench:
    """Rounds over one file; each returns bytes per second."""

    def __init__(self, file: DirectFile, pool: IoPool, region: Region, pieces: int, piece_bytes: int) -> None:
        self._file = file
        self._pool = pool
        self._region = region
        self._pieces = pieces
        self._piece_bytes = piece_bytes

    def write_all(self) -> float:
        began = time.perf_counter()
        self._pool.submit(self._file, [self._piece(i) for i in range(self._pieces)], write=True).wait()
        self._file.sync()
        return self._pieces * self._piece_bytes / (time.perf_counter() - began)

    def read_all(self) -> float:
        began = time.perf_counter()
        self._pool.submit(self._file, [self._piece(i) for i in range(self._pieces)], write=False).wait()
        return self._pieces * self._piece_bytes / (time.perf_counter() - began)

    def mix(self, reads: int, writes: int) -> float:
        """Reads walk the first half of the file, writes the second, `reads` to `writes` of each."""
        half = self._pieces // 2
        turns = half // max(reads, writes) or 1
        transfers: list[Transfer] = []
        began = time.perf_counter()
        for step in range(turns * (reads + writes)):
            turn, place = divmod(step, reads + writes)
            # spread the writes evenly among the reads, as a step that streams both ways does
            writes_before, writes_after = (n * writes // (reads + writes) for n in (place, place + 1))
            write = writes_after > writes_before
            index = (
                (turn * writes + writes_before) % half + half
                if write
                else (turn * reads + place - writes_before) % half
            )
            transfers.append(self._pool.submit(self._file, [self._piece(index, step)], write=write))
        Transfer.all(transfers).wait()
        self._file.sync()
        return len(transfers) * self._piece_bytes / (time.perf_counter() - began)

    def _piece(self, index: int, buffer: int | None = None) -> Piece:
        size = self._piece_bytes
        start = (index if buffer is None else buffer) % (self._region.nbytes // size) * size
        return self._region.view[start : start + size], index * size


def _small_reads(file: DirectFile, pool: IoPool, region: Region) -> float:
    """Random 4 KiB reads per second."""
    places = random.Random(1)
    blocks, slots = file.nbytes // _SMALL_BYTES, region.nbytes // _SMALL_BYTES
    pieces = []
    for number in range(_SMALL_READS):
        start = number % slots * _SMALL_BYTES
        pieces.append((region.view[start : start + _SMALL_BYTES], places.randrange(blocks) * _SMALL_BYTES))
    began = time.perf_counter()
    pool.submit(file, pieces, write=False).wait()
    return len(pieces) / (time.perf_counter() - began)
