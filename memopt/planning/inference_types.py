"""A generation job as numbers: what its model caches and computes per token, and how it is to be run.

Plain frozen data. `memopt.jobs.cache_facts` makes the facts of a Hugging Face model, `memopt.planning.inference` reads
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memopt.errors import BadInput
from memopt.planning.training_types import CUDA_CONTEXT_BYTES, ITEMSIZE, RUNTIME_BYTES, Curve, DType, ModelFacts

InferenceEngine = Literal["memory", "cpu-offload", "flash"]
"""`memory`: weights on the computing device; `cpu-offload`: blocks in DRAM, copied to the GPU when their turn comes;
`flash`: feed-forward weights on the SSD, recently used neurons in memory."""
Quantised = Literal["int8", "int4"]

FLASH_WINDOW_SHARE = 0.24
"""Share of the feed-forward weights that the window of the last tokens keeps in memory: OPT-6.7B, a window of 4 (LLM in
a flash, 2312.11514)."""
FLASH_FRESH_SHARE = 0.024
"""Share of the feed-forward weights read per token with that window: the same model and source."""
FLASH_PREDICTOR_RANK = 240
"""Mean rank of the predictors: the same model and source (128, and 1024 in the last four layers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """What one decoder layer caches.

    `window`: it attends to that many tokens, None to all. `latent`: its keys are a compressed latent (multi-head latent
    attention). `state_bytes`: fixed bytes per sequence of a recurrent layer, which then has no keys.
    """

    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    latent: bool = False
    state_bytes: int = 0

    def token_elements(self) -> int:
        """Cached numbers per token and sequence."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFacts:
    """What running a model without gradients takes, in one `dtype`.

    `transient`: bytes alive at the worst moment of a forward without cache, logits not counted; `masked`: the same
    where a mask is needed (the boolean mask itself not counted). `query_groups`: query heads per key head. `fused`:
    attention goes through a kernel that keeps no matrix of scores. `active_share`: share of the experts' weights that a
    token passes through. `sparse_ffn`: the activation is ReLU-like, most neurons are 0.
    """

    dtype: DType
    layers: tuple[CacheLayer, ...]
    transient: Curve
    masked: Curve
    query_groups: int = 1
    fused: bool = True
    active_share: float = 1.0
    activation: str = ""
    sparse_ffn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceJob:
    """How a model is to generate: `batch` sequences of `prompt_tokens`, continued by `new_tokens` each.

    `weights`: type of the blocks' matrices when not `dtype`; `kv`: type of the cache when not `dtype`. `key_keep`:
    share of key channels that ThinK keeps. `prefill_chunk`: prompt tokens computed at once; None: all.
    """

    facts: ModelFacts
    cache: CacheFacts
    engine: InferenceEngine = "memory"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: DType = "bfloat16"
    weights: Quantised | None = None
    kv: Quantised | None = None
    key_keep: float = 1.0
    batch: int = 1
    prompt_tokens: int = 1024
    new_tokens: int = 256
    prefill_chunk: int | None = None
    flash_window: float = FLASH_WINDOW_SHARE
    flash_fresh: float = FLASH_FRESH_SHARE
    runtime_bytes: int = RUNTIME_BYTES
    gpu_runtime_bytes: int = CUDA_CONTEXT_BYTES

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} = {value}: give a whole number from 1 on")
        if not 0 < self.key_keep <= 1:
            raise BadInput(f"key_keep = {self.key_keep}: the share of key channels to keep is above 0 and at most 1")
        if not 0 < self.flash_window <= 1:
            raise BadInput(f"flash_window = {self.flash_window}: the share of neurons kept is above 0 and at most 1")
        if self.cache.dtype != self.dtype:
            raise BadInput(f"dtype = {self.dtype}: the facts were taken in {self.cache.dtype}; take them again")
        if self.engine == "cpu-offload" and self.device == "cpu":
            raise BadInput("engine = 'cpu-offload' on the CPU: the weights are in DRAM already; use memory or flash")
        if self.engine == "flash" and self.weights is not None:
            raise BadInput(f"flash with {self.weights} weights: its records hold the model's own type; use one of them")
        if self.key_keep < 1 and not any(thin_layer(layer) for layer in self.cache.layers):
            raise BadInput(
                f"key_keep = {self.key_keep}: {self.facts.architecture} has no layer of ordinary full attention, whose "
                "keys could be made thinner; leave it out"
            )
        limit = self.facts.max_positions
        if limit is not None and self.tokens > limit:
            raise BadInput(
                f"prompt of {self.prompt_tokens} and {self.new_tokens} new tokens: {self.facts.source} has {limit} "
                f"positions; use --seq-len {limit - self.new_tokens} or less"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of one number of `dtype`."""
        return ITEMSIZE[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens of a sequence at the end."""
        return self.prompt_tokens + self.new_tokens

    @property
    def cached(self) -> int:
        """Tokens in the cache at the end: the last one generated is not fed back."""
        return self.tokens - 1


def thin_layer(layer: CacheLayer) -> bool:
    """Whether ThinK can leave out key channels of a layer: full attention with keys of their own."""
    return layer.kv_heads > 0 and layer.window is None and not layer.latent
