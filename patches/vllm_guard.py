"""What memopt's vLLM plugin refuses, so that a server never runs unpruned, or pruned wrongly, without a word.

Two places look: every attention layer when it is made, and the engine before it counts blocks. What the engine found
goes into a file (the receipt), by which `memopt serve` knows that the plugin was at work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memopt import atomic
from memopt.errors import BadInput
from memopt.kv.channel_file import check_same_model
from memopt.patches.hf_identity import identity_of
from memopt.patches.vllm_channels import kept_of, kept_width, sets_of
from memopt.patches.vllm_config import RECEIPT, ThinKeys
from memopt.patches.vllm_recent import SUFFIX

MODEL_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_DRAFTLESS = ("ngram", "ngram_gpu", "suffix")
"""Ways to guess tokens without a draft model, whose layers would be taken for the target's."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What the engine was given. `refused`: why it was not started, in one line."""

    layers: int = 0
    head_size: int = 0
    kept: int = 0
    recent: int = 0
    page_bytes: int = 0
    """Of one block in one layer, on one worker."""
    refused: str = ""

    def save(self) -> None:
        """Write it where `memopt serve` asked for it, if it did."""
        path = os.environ.get(RECEIPT)
        if path:
            atomic.write_text(Path(path), json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Receipt | None:
        """The receipt; None while there is none."""
        return cls(**json.loads(path.read_text())) if path.exists() else None


def refuse(text: str) -> BadInput:
    """The error, after it was noted in the receipt: the log of a failed vLLM start is long."""
    Receipt(refused=text).save()
    return BadInput(text)


def check_config(config: Any, keys: ThinKeys) -> None:
    """Refuse what the whole server was asked for and thin keys cannot do. `config` is vLLM's."""
    speculative, parallel = config.speculative_config, config.parallel_config
    if speculative is not None and speculative.method not in _DRAFTLESS:
        raise refuse(
            f"speculative decoding with a draft model ({speculative.method}): its layers have no channels; "
            "use ngram, or --key-keep 1"
        )
    if config.kv_transfer_config is not None:
        raise refuse("a KV connector (--kv-transfer-config) moves pages of the stock layout; leave it out")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise refuse(f"{name} above 1 cuts pages in another way; set it to 1")
    if keys.exact_prefill and config.use_v2_model_runner:
        # it calls a request that was preempted a prompt to its last token, whose blocks are long given away by then
        raise refuse(f"exact prefill needs vLLM's V1 model runner; set {MODEL_RUNNER}=0 (memopt serve does)")
    if keys.recent and config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise refuse("--disable-hybrid-kv-cache-manager: the recent window would be kept for all tokens; leave it out")
    if config.model_config.is_mm_prefix_lm or config.model_config.rswa_window is not None:
        raise refuse("this model's attention is not plainly causal (prefix or reference windows); use --key-keep 1")
    if config.model_config.use_mla:
        raise refuse("this model's attention has latent keys (MLA), which have no channels to drop; use --key-keep 1")
    if keys.thins:
        assert keys.channels is not None
        try:
            check_same_model(keys.channels, sets_of(keys).model, identity_of(config.model_config.hf_config))
        except BadInput as error:
            raise refuse(str(error)) from error


def check_layer(layer: Any, backend: type) -> None:
    """Refuse an attention layer that would not be thin, or not compute what it should."""
    name, impl = layer.layer_name, layer.impl
    if layer.attn_backend is not backend:
        raise refuse(
            f"{name}: vLLM chose the backend {layer.attn_backend.get_name()}, which does not know thin keys; on a GPU "
            "start with --attention-backend CUSTOM (memopt serve does)"
        )
    if layer.attn_type != "decoder":
        raise refuse(f"{name}: attention of the kind {layer.attn_type} is not thinned; use --key-keep 1")
    if layer.sliding_window is not None:
        raise refuse(
            f"{name}: attends to a window of {layer.sliding_window} tokens; models with sliding windows are served "
            "whole (--key-keep 1)"
        )
    if layer.kv_sharing_target_layer_name is not None:
        raise refuse(f"{name}: reads the cache of {layer.kv_sharing_target_layer_name}; use --key-keep 1")
    if layer.head_size_v != layer.head_size:
        raise refuse(f"{name}: keys of {layer.head_size} and values of {layer.head_size_v} channels; use --key-keep 1")
    if layer.kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise refuse(f"{name}: a {layer.kv_cache_dtype} cache is not thinned; leave --kv-cache-dtype at auto")
    for what, given in (("ALiBi", impl.alibi_slopes is not None), ("attention sinks", impl.sinks is not None)):
        if given:
            raise refuse(f"{name}: {what} are not known to the thin path; use --key-keep 1")
    if impl.logits_soft_cap:
        raise refuse(f"{name}: a cap on the scores is not known to the thin path; use --key-keep 1")


def check_channels(layer: Any, keys: ThinKeys) -> None:
    """Refuse a layer that the file says nothing about, before any prompt asks for it."""
    try:
        kept_of(layer, keys)
    except BadInput as error:
        raise refuse(str(error)) from error


def check_specs(specs: Sequence[Mapping[str, Any]], keys: ThinKeys) -> None:
    """Refuse to start unless every layer of every worker has the pages it should; then write the receipt."""
    pages = {name: spec for worker in specs for name, spec in worker.items()}
    thin = {name: spec for name, spec in pages.items() if not name.endswith(SUFFIX)}
    if not thin:
        raise refuse("no layer of this model has a KV cache; use vllm serve")
    widths, page_bytes = set(), set()
    for name, spec in thin.items():
        full = getattr(spec, "head_size_v", None)
        if full is None or spec.head_size != kept_width(keys, full):
            raise refuse(f"{name}: pages of the kind {type(spec).__name__} are not thin; use --key-keep 1")
        if keys.windowed and name + SUFFIX not in pages:
            raise refuse(f"{name}: has no recent window")
        widths.add((full, spec.head_size))
        page_bytes.add(spec.page_size_bytes)
    (head_size, kept) = max(widths)
    Receipt(layers=len(thin), head_size=head_size, kept=kept, recent=keys.recent, page_bytes=max(page_bytes)).save()
