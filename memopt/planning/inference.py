"""What generation will need: weights, key-value cache and working memory by phase, and the work of a token. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memopt.forecast_types import PhaseForecast
from memopt.kv.costs import LayerShape, thin_bytes
from memopt.kv.settings import ThinSettings
from memopt.optim.roles import Role
from memopt.planning import allocators
from memopt.planning.inference_types import (
    FLASH_PREDICTOR_RANK,
    CacheLayer,
    InferenceJob,
    Quantised,
    thin_layer,
)
from memopt.planning.timing import Overlap, Work
from memopt.planning.training_types import ParameterFact
from memopt.tiers import Category, Tier
from memopt.units import MiB

_BITS = {"int8": 8, "int4": 4}
_WEIGHT_BLOCK = 64
"""int4 weights have one float32 scale per block of so many (bitsandbytes' default)."""
_CACHE_GROUP = 64
_CACHE_RESIDUAL = 128
"""A quantised cache has a scale and a zero point per group, and keeps the newest tokens whole (transformers'
QuantizedCache, its defaults)."""
_QUANTISED_ROLES = frozenset({Role.Q, Role.K, Role.V, Role.O, Role.QKV, Role.FFN_UP, Role.FFN_GATE, Role.FFN_DOWN})
_FFN_ROLES = frozenset({Role.FFN_UP, Role.FFN_GATE, Role.FFN_DOWN})
_OFFLOAD_SLOTS = 2
"""Blocks on the GPU together while the next one is copied."""
_FLASH_RECORD = 4096
"""Bytes that a neuron's record is padded to: what a drive reads at the least."""
_HEAP_SLACK_BYTES = 128 * MiB
"""What glibc's heap holds of freed working memory in the prompt, at most: blocks below 32 MiB come from it, larger ones
go back at once. Measured on two cores, Llama-, GPT-2- and OPT-like models of 30M to 80M: 67 to 180 MiB; with
MALLOC_MMAP_THRESHOLD_ set it is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Where the weights are: `resident` on the computing device, `host` in DRAM beside it, `ssd` in flash records.

    `streamed`: bytes of what passes through the device once per forward; `slot`: room for that on the device.
    """

    resident: int
    host: int = 0
    ssd: int = 0
    streamed: int = 0
    slot: int = 0


def cache_bytes(job: InferenceJob, tokens: int, *, new_tokens: int = 0) -> int:
    """Bytes of the key-value cache of all sequences at `tokens` tokens each, the last `new_tokens` generated."""
    return sum(_layer_bytes(job, layer, tokens, new_tokens) for layer in job.cache.layers)


def weight_bytes(job: InferenceJob) -> WeightBytes:
    """Bytes of the weights by place."""
    params = job.facts.parameters
    resident = sum(parameter_bytes(p, job) for p in params) + job.facts.buffer_bytes
    if job.engine == "memory":
        return WeightBytes(resident=resident)
    if job.engine == "cpu-offload":
        blocks = _by_layer(job, lambda p: True)
        host = sum(blocks.values())
        slot = _OFFLOAD_SLOTS * max(blocks.values(), default=0)
        return WeightBytes(resident=resident - host, host=host, streamed=host, slot=slot)
    ffn = _by_layer(job, lambda p: p.role in _FFN_ROLES and len(p.shape) == 2)
    streamed = sum(ffn.values())
    predictors = len(ffn) * FLASH_PREDICTOR_RANK * (job.facts.hidden + job.facts.intermediate) * job.itemsize
    window = round(job.flash_window * streamed)
    return WeightBytes(
        resident=resident - streamed + predictors + window,
        ssd=len(ffn) * job.facts.intermediate * _record_bytes(job, ffn),
        streamed=streamed,
        # a prompt touches nearly every neuron: its layers pass through densely, one read while one is used
        slot=_OFFLOAD_SLOTS * max(ffn.values(), default=0),
    )


def parameter_bytes(param: ParameterFact, job: InferenceJob) -> int:
    """Bytes of one parameter as it is held."""
    if job.weights is None or param.layer is None or param.role not in _QUANTISED_ROLES or len(param.shape) != 2:
        return param.numel * job.itemsize
    return quantised_bytes(param.shape, job.weights)


def quantised_bytes(shape: tuple[int, ...], kind: Quantised) -> int:
    """A matrix of (rows, columns): int8 has a float32 scale per row, int4 one per 64 numbers."""
    rows, columns = shape
    if kind == "int8":
        return rows * columns + 4 * rows
    return -(-rows * columns // 2) + 4 * -(-rows * columns // _WEIGHT_BLOCK)


def inference_phases(job: InferenceJob) -> tuple[PhaseForecast, ...]:
    """Bytes per tier and category at the peak of load, prefill and decode."""
    weights = weight_bytes(job)
    converted = (
        p.numel * job.itemsize
        for p in job.facts.parameters
        if p.dtype != job.dtype or parameter_bytes(p, job) != p.numel * job.itemsize
    )
    chunk = min(job.prefill_chunk or job.prompt_tokens, job.prompt_tokens)
    # a tensor that is converted or quantised is there twice for a moment
    load = {Category.WEIGHTS: weights.resident, Category.BUFFERS: max(converted, default=0)}
    prefill = {
        Category.WEIGHTS: weights.resident,
        Category.BUFFERS: weights.slot,
        Category.KV_CACHE: cache_bytes(job, job.prompt_tokens) + _prefill_extra(job),
        Category.ACTIVATIONS: _activations(job, chunk, job.prompt_tokens),
    }
    if job.device == "cpu":
        prefill[Category.OTHER] = min(prefill[Category.ACTIVATIONS], _HEAP_SLACK_BYTES)
    decode = {
        Category.WEIGHTS: weights.resident,
        Category.BUFFERS: (weights.slot if job.engine == "cpu-offload" else 0) + _decode_copies(job),
        Category.KV_CACHE: cache_bytes(job, job.cached, new_tokens=job.new_tokens - 1),
        Category.ACTIVATIONS: _activations(job, 1, job.cached),
    }
    return tuple(
        _phase(name, job, weights, use) for name, use in (("load", load), ("prefill", prefill), ("decode", decode))
    )


def prefill_work(job: InferenceJob) -> Work:
    """Reading the whole prompt, all sequences."""
    tokens = job.batch * job.prompt_tokens
    weights = weight_bytes(job)
    passes = -(-job.prompt_tokens // (job.prefill_chunk or job.prompt_tokens))
    cached = cache_bytes(job, job.prompt_tokens)
    to_device, read = _moved(job, weights, passes, dense=True)
    return Work(
        # a token attends to half of the prompt on average; only the last one needs logits
        flops=_matrix_flops(job, head=False) * tokens + _attention_flops(job, job.prompt_tokens // 2) * tokens,
        memory_bytes=passes * weights.resident + passes * cached // 2,
        tokens=tokens,
        overlap=_overlap(job),
        to_device_bytes=to_device,
        ssd_read_bytes=read,
    )


def decode_work(job: InferenceJob) -> Work:
    """One token of every sequence, at the mean length of the cache."""
    weights = weight_bytes(job)
    length = job.prompt_tokens + job.new_tokens // 2
    table = sum(parameter_bytes(p, job) for p in job.facts.parameters if p.role == Role.EMBEDDING and not p.tied)
    # tokens of different sequences go to different experts, at the worst
    idle = round((1 - min(1.0, job.cache.active_share * job.batch)) * _expert_bytes(job))
    cached = cache_bytes(job, length, new_tokens=job.new_tokens // 2)
    to_device, read = _moved(job, weights, 1, dense=False)
    # appending copies the cache: written once, read once more
    copied = cached if job.kv is None else 2 * _dense_bytes(job, length)
    return Work(
        flops=(_matrix_flops(job, head=True) + _attention_flops(job, length)) * job.batch,
        memory_bytes=max(0, weights.resident + weights.host - table - idle) + cached + 2 * copied,
        tokens=job.batch,
        overlap=_overlap(job),
        to_device_bytes=to_device,
        ssd_read_bytes=read,
    )


def _phase(name: str, job: InferenceJob, weights: WeightBytes, use: dict[Category, int]) -> PhaseForecast:
    def named(categories: dict[Category, int]) -> dict[str, int]:
        return {str(category): nbytes for category, nbytes in categories.items() if nbytes}

    tiers: dict[Tier, dict[Category, int]] = {}
    if job.device == "cuda":
        rounded = use.get(Category.BUFFERS, 0) + _segment_slack(job)
        tiers[Tier.GPU] = {Category.RUNTIME: job.gpu_runtime_bytes, **use, Category.BUFFERS: rounded}
        host = job.runtime_bytes + allocators.CUDA_HOST_BYTES
        tiers[Tier.DRAM] = {Category.RUNTIME: host, Category.WEIGHTS: weights.host}
    else:
        tiers[Tier.DRAM] = {Category.RUNTIME: job.runtime_bytes + allocators.WORK_BYTES, **use}
    tiers[Tier.SSD] = {Category.WEIGHTS: weights.ssd}
    return PhaseForecast(name=name, use={str(tier): found for tier, kept in tiers.items() if (found := named(kept))})


def _segment_slack(job: InferenceJob) -> int:
    """What torch's CUDA allocator reserves for the weights beyond their bytes."""
    held = [p for p in job.facts.parameters if job.engine == "memory" or p.layer is None]
    sizes = [parameter_bytes(p, job) for p in held]
    return allocators.cuda_segment_bytes(sizes) - sum(sizes)


def _layer_bytes(job: InferenceJob, layer: CacheLayer, tokens: int, new_tokens: int) -> int:
    if not layer.kv_heads:
        return job.batch * layer.state_bytes
    held = tokens if layer.window is None else min(tokens, layer.window)
    if job.key_keep < 1 and thin_layer(layer):
        shape = LayerShape(
            batch=job.batch,
            kv_heads=layer.kv_heads,
            head_dim=layer.key_dim,
            value_dim=layer.value_dim,
            element_bytes=job.itemsize,
        )
        settings = ThinSettings(key_keep=job.key_keep, storage=job.kv)
        return thin_bytes(shape, settings, prompt=tokens - new_tokens, new=new_tokens)
    elements = job.batch * layer.token_elements()
    if job.kv is None or layer.window is not None:
        return held * elements * job.itemsize
    recent = min(held, new_tokens, _CACHE_RESIDUAL)
    packed = (held - recent) * elements
    scales = -(-packed // _CACHE_GROUP) * 2 * job.itemsize
    return packed * _BITS[job.kv] // 8 + scales + recent * elements * job.itemsize


def _dense_layer(job: InferenceJob, layer: CacheLayer, tokens: int) -> int:
    held = tokens if layer.window is None else min(tokens, layer.window)
    return job.batch * held * layer.token_elements() * job.itemsize


def _dense_bytes(job: InferenceJob, tokens: int) -> int:
    return sum(_dense_layer(job, layer, tokens) for layer in job.cache.layers)


def _prefill_extra(job: InferenceJob) -> int:
    """What the cache holds during the prompt beyond its later size.

    A sliding layer keeps the whole chunk until something is appended (its window is a view of that); a layer that is
    pruned or quantised is there whole while that happens.
    """
    extra = 0
    chunk = job.prefill_chunk or job.prompt_tokens
    for layer in job.cache.layers:
        if layer.window is not None:
            more = min(job.prompt_tokens, layer.window - 1 + chunk) - min(job.prompt_tokens, layer.window)
            extra += job.batch * max(0, more) * layer.token_elements() * job.itemsize
    changed = [x for x in job.cache.layers if job.kv is not None or (job.key_keep < 1 and thin_layer(x))]
    whole = max((_dense_layer(job, layer, job.prompt_tokens) for layer in changed), default=0)
    return extra + whole


def _decode_copies(job: InferenceJob) -> int:
    """A layer's keys are copied when a token is appended; a quantised cache is unpacked a layer at a time, and the
    unpacked is copied too."""
    layers = [layer for layer in job.cache.layers if layer.kv_heads]
    if job.kv is not None:
        return 2 * max((_dense_layer(job, layer, job.cached) for layer in layers), default=0)
    return max(
        (_dense_layer(job, x, job.cached) * max(x.key_dim, x.value_dim) // (x.key_dim + x.value_dim) for x in layers),
        default=0,
    )


def _activations(job: InferenceJob, chunk: int, length: int) -> int:
    """Working memory of a forward over `chunk` tokens of each sequence with `length` in the cache, and its logits."""
    logits = job.batch * job.facts.vocab * (job.itemsize + 4)  # the last token's, and a float32 copy to sample from
    return max(_working(job, chunk, length), logits)


def _working(job: InferenceJob, chunk: int, length: int) -> int:
    """Of the model's body. Where a mask is needed, sdpa takes no grouped heads (transformers' use_gqa_in_sdpa): keys
    and values are repeated for every query head."""
    plain = max(0, job.cache.transient.at(job.batch, chunk))
    if not job.cache.fused:  # the matrix of scores is square in the trace, and longer where chunks went before
        square = job.cache.transient.c[4] + job.batch * job.cache.transient.c[5]
        return plain + round(square * chunk * (length - chunk))
    if chunk == 1 or not _needs_mask(job, chunk, length):
        return plain
    # traced with as many keys as queries: earlier chunks make mask and repeated heads longer
    mask = job.batch * chunk * (length + (length - chunk) * job.itemsize)
    grouped = [layer for layer in job.cache.layers if layer.kv_heads > 1 and job.cache.query_groups > 1]
    more = max((_dense_layer(job, x, length) - _dense_layer(job, x, chunk) for x in grouped), default=0)
    return job.cache.masked.at(job.batch, chunk) + mask + job.cache.query_groups * more


def _needs_mask(job: InferenceJob, chunk: int, length: int) -> bool:
    windows = [layer.window for layer in job.cache.layers if layer.window is not None]
    return chunk < length or (bool(windows) and length > min(windows))


def _matrix_flops(job: InferenceJob, *, head: bool) -> int:
    """Of one token through every matrix it passes: two per weight."""
    total = 0.0
    for param in job.facts.parameters:
        if param.role == Role.EXPERT:
            total += job.cache.active_share * param.numel
        elif len(param.shape) >= 2 and param.layer is not None:
            total += param.numel
    tables = job.facts.vocab * job.facts.hidden if head else 0
    return round(2 * (total + tables))


def _attention_flops(job: InferenceJob, length: int) -> int:
    """Of one token against `length` cached ones: scores and sums."""
    total = 0
    for layer in job.cache.layers:
        seen = length if layer.window is None else min(length, layer.window)
        total += 2 * seen * layer.token_elements() * job.cache.query_groups
    return total


def _expert_bytes(job: InferenceJob) -> int:
    return sum(parameter_bytes(p, job) for p in job.facts.parameters if p.role == Role.EXPERT)


def _moved(job: InferenceJob, weights: WeightBytes, passes: int, *, dense: bool) -> tuple[int, int]:
    """Bytes to the device, and read from the SSD, in `passes` forwards."""
    if job.engine == "cpu-offload":
        return passes * weights.streamed, 0
    if job.engine == "memory":
        return 0, 0
    read = round(passes * (1.0 if dense else job.flash_fresh) * weights.ssd)
    return (read if job.device == "cuda" else 0), read


def _overlap(job: InferenceJob) -> Overlap:
    """A block is copied when its turn comes, and a neuron is read when it is known to be needed: nothing waits less."""
    return "all" if job.engine == "memory" else "none"


def _by_layer(job: InferenceJob, wanted: Callable[[ParameterFact], bool]) -> dict[int, int]:
    found: dict[int, int] = {}
    for param in job.facts.parameters:
        if param.layer is not None and wanted(param):
            found[param.layer] = found.get(param.layer, 0) + parameter_bytes(param, job)
    return found


def _record_bytes(job: InferenceJob, ffn: dict[int, int]) -> int:
    """A neuron's rows and columns side by side, padded to what a drive reads at the least."""
    neuron = max(ffn.values(), default=0) // max(1, job.facts.intermediate)
    return -(-neuron // _FLASH_RECORD) * _FLASH_RECORD
