"""From bytes of tensors to bytes of a tier: what allocators round up and keep, and what a process takes besides."""

from __future__ import annotations

from collections.abc import Iterable

from memopt.planning.training_types import ITEMSIZE, ParameterFact, TrainingJob
from memopt.tiers import Category, Tier
from memopt.units import MiB

WORK_BYTES = 11 * MiB
"""What a process grows by in its first steps besides tensors: products' packing buffers, autograd's graph, the loop's
own objects. With malloc's thresholds fixed 8 to 12 MiB were measured in full, LoRA, checkpointed, Muon and foreach
runs."""
CUDA_HOST_BYTES = 1024 * MiB
"""Host memory of the CUDA libraries and a context; assumed, not measured here."""
_CUDA_ROUND = 512
_CUDA_SMALL = 1 * MiB
_CUDA_SMALL_SEGMENT = 2 * MiB
_CUDA_LARGE_SEGMENT = 20 * MiB
_CUDA_LARGE = 10 * MiB
"""c10/cuda/CUDACachingAllocator: sizes are rounded to 512 bytes; up to 1 MiB they are cut from segments of 2 MiB, below
10 MiB from segments of 20 MiB, larger ones get segments of their own in steps of 2 MiB."""


HEAP_HOLES = 0.30
"""Of the bytes that tensors have in glibc's heap at the peak of a micro-batch: what its holes add with malloc's
default, moving threshold, where blocks of up to 32 MiB come out of the heap. Measured 17 to 46 % in six runs of a
40M-parameter model (full, LoRA, checkpointed, Muon, foreach), and it drifts with the steps: the weakest number of a
plan for a CPU."""
HEAP_BLOCK_BYTES = 32 * MiB
"""glibc's DEFAULT_MMAP_THRESHOLD_MAX: larger blocks are always mapped, and leave no hole."""


def on_cpu(job: TrainingJob, by_category: dict[Category, int], in_heap: int) -> dict[Tier, dict[Category, int]]:
    """Tensors in DRAM, and the process around them. `in_heap`: bytes of tensors among which holes are kept."""
    holes = 0 if job.fixed_heap else int(HEAP_HOLES * in_heap)
    use = {**by_category, Category.RUNTIME: job.runtime_bytes + WORK_BYTES}
    use[Category.BUFFERS] = use.get(Category.BUFFERS, 0) + holes
    return {Tier.DRAM: use}


def mapped_bytes(parameters: Iterable[ParameterFact], copies: int) -> int:
    """Bytes of `copies` tensors of each of these shapes that are too large for glibc's heap."""
    sizes = (p.numel * ITEMSIZE[p.dtype] for p in parameters)
    return copies * sum(n for n in sizes if n > HEAP_BLOCK_BYTES)


def on_cuda(job: TrainingJob, by_category: dict[Category, int], host: int) -> dict[Tier, dict[Category, int]]:
    """Tensors in GPU memory as torch's allocator reserves it; `host` bytes of weights are in DRAM meanwhile."""
    gpu = {**by_category, Category.RUNTIME: job.gpu_runtime_bytes}
    total = sum(by_category.values())
    gpu[Category.BUFFERS] = gpu.get(Category.BUFFERS, 0) + cuda_segment_bytes([total]) - total
    dram = {Category.RUNTIME: job.runtime_bytes + CUDA_HOST_BYTES, Category.BUFFERS: host}
    return {Tier.GPU: gpu, Tier.DRAM: dram}


def cuda_rounded(parameters: Iterable[ParameterFact]) -> int:
    """Bytes by which torch's CUDA allocator rounds tensors of these shapes up."""
    return sum(-(p.numel * ITEMSIZE[p.dtype]) % _CUDA_ROUND for p in parameters)


def cuda_segment_bytes(sizes: Iterable[int]) -> int:
    """Bytes torch's CUDA allocator reserves for tensors that are all alive, made in this order."""
    small = medium = 0
    total = 0
    for size in sizes:
        rounded = -(-size // _CUDA_ROUND) * _CUDA_ROUND
        if rounded <= _CUDA_SMALL:
            small += rounded
        elif rounded < _CUDA_LARGE:
            medium += rounded
        else:
            total += -(-rounded // _CUDA_SMALL_SEGMENT) * _CUDA_SMALL_SEGMENT
    total += -(-small // _CUDA_SMALL_SEGMENT) * _CUDA_SMALL_SEGMENT
    return total + -(-medium // _CUDA_LARGE_SEGMENT) * _CUDA_LARGE_SEGMENT


def pinned_bytes(nbytes: int, *, power_of_two: bool) -> int:
    """Bytes that a pinned block takes: torch's caching host allocator rounds up to a power of two (pytorch#150517)."""
    return 1 << (nbytes - 1).bit_length() if power_of_two and nbytes > 0 else nbytes
