"""Training by DeepSpeed ZeRO-3 and ZeRO-Infinity on GPUs: its own arithmetic, not measured on a GPU here.

Terms and factors: DeepSpeed 0.19.8's stage3.py and swap_tensor, checked against runs of 134M and 374M parameters on a
CPU, where this sum was 96 % of the resident memory and SSD traffic was exact (20 bytes read, 18 written per parameter
and step). P: parameters; bfloat16 weights and gradients, float32 master weights and two moments.
"""

from __future__ import annotations

from dataclasses import replace

from memopt.planning import allocators, training_memory
from memopt.planning.training_types import TrainingJob, TrainingTraffic, ZeroSettings
from memopt.tiers import Category, Tier

Use = dict[Tier, dict[Category, int]]
_HALF, _FULL = 2, 4
_STATES = 3
"""Master weights and two moments, float32."""


def settings(job: TrainingJob) -> ZeroSettings:
    """The job's settings; ZeRO-Infinity puts both on NVMe."""
    if job.engine == "zero-infinity":
        return replace(job.zero, offload_optimizer="nvme", offload_param="nvme")
    return job.zero


def phases(job: TrainingJob) -> dict[str, Use]:
    """Bytes per phase and tier of one node: GPU bytes are of one GPU, DRAM and SSD bytes of all its processes."""
    zero, trace = settings(job), job.facts.trace(job.variant)
    sizes = [p.numel for p in trace.parameters]
    params, largest = sum(sizes), max(sizes)
    share = -(-params // zero.gpus)
    peaks = training_memory.micro_peaks(trace, job, later=job.grad_accum > 1)
    gathered = _HALF * min(params, zero.max_live_parameters)
    bucket = _HALF * min(zero.reduce_bucket_size, params)
    gpu = {Category.WEIGHTS: gathered, Category.BUFFERS: bucket, Category.RUNTIME: job.gpu_runtime_bytes}
    dram = {Category.RUNTIME: zero.gpus * (job.runtime_bytes + allocators.CUDA_HOST_BYTES)}
    use: Use = {Tier.GPU: gpu, Tier.DRAM: dram, Tier.SSD: {}}
    _place_parameters(zero, share, largest, use)
    _place_states(zero, share, largest, use)
    found: dict[str, Use] = {}
    for name, (total, own) in (("forward", peaks.forward), ("backward", peaks.backward)):
        found[name] = {**use, Tier.GPU: {**gpu, Category.ACTIVATIONS: total - own}}
    found["load"] = found["optimizer"] = use
    if job.save:
        # stage3_gather_16bit_weights_on_model_save: the whole model in bfloat16 on one process
        saved = {**dram, Category.WEIGHTS: dram.get(Category.WEIGHTS, 0) + _HALF * params}
        found["save"] = {**use, Tier.DRAM: saved}
    return found


def _place_parameters(zero: ZeroSettings, share: int, largest: int, use: Use) -> None:
    gpu, dram, ssd = use[Tier.GPU], use[Tier.DRAM], use[Tier.SSD]
    if zero.offload_param == "none":
        gpu[Category.WEIGHTS] += _HALF * share
    elif zero.offload_param == "cpu":
        _add(dram, Category.WEIGHTS, zero.gpus * _pinned(zero, _HALF * share))
    else:
        buffer = _pinned(zero, _HALF * max(zero.param_buffer_size, largest))
        _add(dram, Category.BUFFERS, zero.gpus * (zero.param_buffer_count * buffer + _pinned(zero, _HALF * largest)))
        _add(ssd, Category.WEIGHTS, _HALF * share * zero.gpus)


def _place_states(zero: ZeroSettings, share: int, largest: int, use: Use) -> None:
    gpu, dram, ssd = use[Tier.GPU], use[Tier.DRAM], use[Tier.SSD]
    if zero.offload_optimizer == "none":
        _add(gpu, Category.OPTIMIZER, _STATES * _FULL * share)
        _add(gpu, Category.GRADIENTS, _HALF * share)
        return
    # grad_partitions_flat_buffer: always in DRAM, also where gradients go to NVMe (stage3.py)
    _add(dram, Category.GRADIENTS, zero.gpus * _pinned(zero, _HALF * share))
    if zero.offload_optimizer == "cpu":
        _add(dram, Category.OPTIMIZER, zero.gpus * _pinned(zero, _STATES * _FULL * share))
        return
    group = min(share, max(zero.sub_group_size, largest))
    pool = _pinned(zero, zero.optimizer_buffer_count * _FULL * group)
    _add(dram, Category.BUFFERS, zero.gpus * pool)
    _add(ssd, Category.OPTIMIZER, zero.gpus * _STATES * _FULL * share)
    _add(ssd, Category.GRADIENTS, zero.gpus * _FULL * share)


def traffic(job: TrainingJob) -> TrainingTraffic:
    """Bytes of one step of one GPU. Each micro-batch reads all weights twice (forward, backward)."""
    zero = settings(job)
    params = sum(p.numel for p in job.facts.trace(job.variant).parameters)
    share = -(-params // zero.gpus)
    passes = 2 * job.grad_accum
    on_host = zero.offload_param != "none"
    read = write = 0
    if zero.offload_param == "nvme":
        read += passes * _HALF * share
        write += _HALF * share
    if zero.offload_optimizer == "nvme":
        read += (_STATES + 1) * _FULL * share
        write += (_STATES + 1) * _FULL * share
    return TrainingTraffic(
        to_device_bytes=passes * _HALF * share if on_host else 0,
        from_device_bytes=job.grad_accum * _HALF * share if zero.offload_optimizer != "none" else 0,
        ssd_read_bytes=read,
        ssd_write_bytes=write,
        ssd_space_bytes=sum(phases(job)["forward"][Tier.SSD].values()),
        save_write_bytes=_HALF * params + _STATES * _FULL * share,
    )


def _pinned(zero: ZeroSettings, nbytes: int) -> int:
    return allocators.pinned_bytes(nbytes, power_of_two=zero.pin_memory and zero.power_of_two)


def _add(use: dict[Category, int], category: Category, nbytes: int) -> None:
    use[category] = use.get(category, 0) + nbytes
