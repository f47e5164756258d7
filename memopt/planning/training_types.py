"""A training job as numbers: what its model is made of, what a step keeps in memory, and how it is to be trained.

Plain frozen data. `memopt.jobs.model_facts` makes the facts of a Hugging Face model, `memopt.planning.training` reads
them. Nothing here is allocated, and nothing knows a framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.machine import Machine
from memopt.optim.parts import Part
from memopt.optim.roles import Role
from memopt.planning.finetune import FinetuneJob
from memopt.units import MiB

Engine = Literal["memory", "cpu-offload", "ssd", "zero3", "zero-infinity"]
"""`memory`: model, gradients and states on the computing device (a Trainer, a plain loop); `cpu-offload` and `ssd`:
memopt's streaming engine without and with an offload directory; `zero3`, `zero-infinity`: DeepSpeed."""
Implementation = Literal["memopt", "fused", "foreach", "single"]
"""Who updates: memopt's optimizer of the preset, or torch's AdamW in one of its three implementations."""
DType = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]

ITEMSIZE: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
RUNTIME_BYTES = 352 * MiB
"""Anonymous memory of a process that has imported torch and transformers' Trainer, where nobody measured it
(`memopt.jobs.model_facts.measure_runtime`): measured with Python 3.11, torch 2.13+cpu, transformers 5.19; without the
Trainer it is 249 MiB."""
CUDA_CONTEXT_BYTES = 500 * MiB
"""Device memory of a CUDA context with cuBLAS and its kernels, outside torch's allocator: 450 to 550 MiB is what the
driver shows on recent cards; assumed, not measured here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterFact:
    """One parameter. `layer`: index of the decoder block that holds it; None for tables, final norm and the like."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As stored in the checkpoint, or as the configuration says."""
    role: Role
    parts: tuple[Part, ...]
    trainable: bool = True
    layer: int | None = None
    tied: tuple[str, ...] = ()
    """Other names of the same parameter."""

    @property
    def numel(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes as a function of batch B and sequence length S: c[0] + c[1] S + c[2] B + c[3] B S + c[4] S^2 + c[5] B S^2.

    Every tensor of a transformer's step is of this form, so sums of them are.
    """

    c: tuple[float, float, float, float, float, float]

    def at(self, batch: int, seq: int) -> int:
        """Bytes of a micro-batch of `batch` sequences of `seq` tokens."""
        c = self.c
        return round(c[0] + seq * (c[1] + seq * c[4]) + batch * (c[2] + seq * (c[3] + seq * c[5])))


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes more than at the start of a segment: all of them, and of these the gradients of parameters."""

    total: Curve
    gradients: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of a micro-batch: the entry, one block or the exit, forward or backward.

    `moments`: where the peak may be (which of them depends on B and S); `end`: what is left of it for the next.
    """

    moments: tuple[Moment, ...]
    end: Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One micro-batch, cut where the hidden state passes from block to block. `blocks_*`: one segment per kind."""

    entry_forward: Segment
    blocks_forward: tuple[Segment, ...]
    exit_forward: Segment
    exit_backward: Segment
    blocks_backward: tuple[Segment, ...]
    entry_backward: Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What a trace depends on besides batch and sequence length. `lora_targets` None: peft's choice for the model."""

    weights_dtype: DType = "float32"
    autocast: DType | None = None
    gradient_checkpointing: bool = False
    attention: Attention = "sdpa"
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] | None = None
    one_sequence: bool = False
    """Micro-batches of a single sequence: some kernels make other copies then."""
    beyond_window: bool = False
    """Sequences are longer than the model's sliding window: its masks are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """What one variant keeps in memory. `first`: gradients are made; `later`: they exist and are added to.

    `parameters`: all, adapters included, with what is trainable in this variant. `kinds[i]` is the kind of block i: an
    index into `Pass.blocks_*`.
    """

    variant: Variant
    parameters: tuple[ParameterFact, ...]
    kinds: tuple[int, ...]
    first: Pass
    later: Pass
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model without its weights. `parameters` are the model's own; those of a variant with adapters are in its trace.

    `buffer_bytes`: rotary tables and other buffers.
    """

    source: str
    key: str
    """Which configuration these are the facts of."""
    architecture: str
    parameters: tuple[ParameterFact, ...]
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    max_positions: int | None = None
    sliding_window: int | None = None
    buffer_bytes: int = 0
    checkpoint_bytes: int | None = None
    """Of the safetensors files, when their headers were read."""
    largest_shard_bytes: int | None = None
    traces: tuple[StepTrace, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return sum(p.numel for p in self.parameters)

    def trace(self, variant: Variant) -> StepTrace:
        """The trace of a variant. Raises BadInput when it was not made (`memopt.jobs.model_facts.prepare` makes it)."""
        for each in self.traces:
            if each.variant == variant:
                return each
        raise BadInput(f"{self.source}: {variant} was not traced; call memopt.jobs.model_facts.prepare on the job")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSettings:
    """DeepSpeed's knobs that cost memory; the names are those of its configuration, defaults too.

    `offload_optimizer`, `offload_param`: where ZeRO-3 keeps them; ZeRO-Infinity means both on nvme.
    """

    gpus: int = 1
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    sub_group_size: int = 10**9
    reduce_bucket_size: int = 5 * 10**8
    prefetch_bucket_size: int = 5 * 10**7
    max_live_parameters: int = 10**9
    param_buffer_size: int = 10**8
    param_buffer_count: int = 5
    optimizer_buffer_count: int = 4
    pin_memory: bool = True
    power_of_two: bool = False
    """Pinned blocks are rounded up to a power of two: torch's caching host allocator does, DeepSpeed's own does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """How a model is to be trained. Numbers are per device; `grad_accum` micro-batches of `batch_size` make a step.

    `offload` is memopt's own engine's job (engines cpu-offload and ssd); `memopt.jobs.model_facts.prepare` fills it in.
    """

    facts: ModelFacts
    engine: Engine = "memory"
    device: Literal["cpu", "cuda"] = "cpu"
    method: Literal["full", "lora"] = "full"
    lora_rank: int = 8
    lora_targets: tuple[str, ...] | None = None
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    implementation: Implementation = "memopt"
    weights_dtype: DType = "float32"
    autocast: DType | None = None
    """Weights stay in `weights_dtype`, products are computed in this (Trainer's --bf16)."""
    attention: Attention = "sdpa"
    gradient_checkpointing: bool = False
    seq_len: int = 1024
    batch_size: int = 1
    grad_accum: int = 1
    max_grad_norm: float = 1.0
    steps: int = 100
    save: bool = True
    """Weights are saved at the end, and optimizer states with them where the Trainer saves a checkpoint."""
    save_every: int | None = None
    pretrained: bool = True
    """Weights are loaded from safetensors; else drawn."""
    packed: bool = False
    """Documents are packed, with positions that begin anew: memopt's own engine makes masks that keep them apart."""
    budget: Budget = Budget()
    """What memopt's own engine places by; without limits everything is in DRAM."""
    machine: Machine | None = None
    offload: FinetuneJob | None = None
    zero: ZeroSettings = ZeroSettings()
    fixed_heap: bool = False
    """malloc's threshold is fixed (MALLOC_MMAP_THRESHOLD_ in the environment; memopt's own jobs do it themselves):
    large blocks are mapped and returned one by one, and glibc's heap keeps no holes."""
    runtime_bytes: int = RUNTIME_BYTES
    gpu_runtime_bytes: int = CUDA_CONTEXT_BYTES

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "grad_accum", "steps", "lora_rank"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} = {getattr(self, name)}: give a whole number from 1 on")
        limit = self.facts.max_positions
        if limit is not None and self.seq_len > limit:
            raise BadInput(
                f"seq_len = {self.seq_len}: {self.facts.source} has {limit} positions; use --seq-len {limit} or less"
            )
        if self.implementation != "memopt" and self.optimizer != "adamw":
            raise BadInput(
                f"optimizer = {self.optimizer!r} with torch's {self.implementation} implementation: torch plans are "
                "made for adamw; use the implementation memopt"
            )
        if self.engine in ("zero3", "zero-infinity") and self.device != "cuda":
            raise BadInput(f"engine = {self.engine!r} is planned for GPUs; use --device cuda, or the engine ssd")

    @property
    def variant(self) -> Variant:
        """The trace this job reads."""
        window = self.facts.sliding_window
        lora = self.method == "lora"
        return Variant(
            weights_dtype=self.weights_dtype,
            autocast=self.autocast,
            gradient_checkpointing=self.gradient_checkpointing,
            attention=self.attention,
            lora_rank=self.lora_rank if lora else None,
            lora_targets=self.lora_targets if lora else None,
            one_sequence=self.batch_size == 1,
            beyond_window=window is not None and self.seq_len >= window,
        )

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step on one device."""
        return self.seq_len * self.batch_size * self.grad_accum


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTraffic:
    """Bytes of one optimizer step on one device: between host and device, and of the SSD. `space`: bytes of files."""

    to_device_bytes: int = 0
    from_device_bytes: int = 0
    ssd_read_bytes: int = 0
    ssd_write_bytes: int = 0
    ssd_space_bytes: int = 0
    save_write_bytes: int = 0
    """Of one save of what does not live on the SSD anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlops:
    """Floating-point operations of one optimizer step on one device. `recomputed`: again, by gradient checkpointing."""

    forward: int
    backward: int
    recomputed: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.recomputed + self.optimizer
