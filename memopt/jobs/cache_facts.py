"""What a Hugging Face model caches per token and needs to run, found by running it on meta tensors: nothing is
allocated or computed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from memopt.errors import BadInput
from memopt.offload.trace import LiveBytes
from memopt.planning.inference_types import CacheFacts, CacheLayer
from memopt.planning.training_types import Curve, DType

_ATTENTION = "memopt_shapes_only"
_REPEATING = "memopt_shapes_of_repeated_heads"
_LENGTHS = (64, 128, 256)
"""Tokens of the forwards that the curve of working memory goes through (it is a parabola). Recurrent layers work in
chunks of 64."""
_SPARSE = frozenset({"relu", "relu2", "relu_squared"})


def read_cache_facts(config: Any, dtype: DType) -> CacheFacts:
    """Facts of the model of a transformers configuration, computing in `dtype`.

    Raises BadInput for an architecture that is no causal language model or that cannot be run on meta tensors.
    """
    name = getattr(config, "model_type", type(config).__name__)
    try:
        with _quiet(), _shapes_only():
            layers, transient, masked, fused = _run(config, getattr(torch, dtype))
    except BadInput:
        raise
    except Exception as error:  # whatever the model's own code raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"model type {name!r} cannot be planned for generation ({lines[0][:160]}); memopt plans causal language "
            "models of transformers"
        ) from error
    text = config.get_text_config()
    activation = str(
        getattr(text, "hidden_act", None)
        or getattr(text, "activation_function", None)
        or getattr(text, "hidden_activation", None)
        or ""
    )
    return CacheFacts(
        dtype=dtype,
        layers=layers,
        transient=transient,
        masked=masked,
        query_groups=_query_groups(config, layers),
        fused=fused,
        active_share=_active_share(text),
        activation=activation,
        sparse_ffn=activation in _SPARSE,
    )


def _run(config: Any, dtype: torch.dtype) -> tuple[tuple[CacheLayer, ...], Curve, Curve, bool]:
    """Cache, working memory without and with a mask, and whether attention goes through transformers' interface."""
    try:
        model = _meta_model(config, dtype, _ATTENTION)
        layers, transient = _cache_layers(model, config), _transient(model)
        return layers, transient, _transient(_meta_model(config, dtype, _REPEATING)), True
    except (KeyError, ValueError, NotImplementedError):  # older families bring their own attention
        try:
            model = _meta_model(config, dtype, "sdpa")
        except ValueError:
            model = _meta_model(config, dtype, "eager")
        transient = _transient(model)
        return _cache_layers(model, config), transient, transient, False


def _meta_model(config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BadInput(
            f"model type {config.model_type!r}: transformers knows no causal language model of it; memopt plans causal "
            "language models"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.config.pad_token_id = None  # some models look for padding in the values of their input
    return cast(nn.Module, model)


def _cache_layers(model: nn.Module, config: Any) -> tuple[CacheLayer, ...]:
    """What every layer holds after a forward over 2 sequences of 5 tokens."""
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
    cache = getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)
    if cache is None or not getattr(cache, "layers", None):
        raise BadInput(f"model type {config.model_type!r}: it hands no cache back; memopt plans models that generate")
    latent = getattr(config.get_text_config(), "kv_lora_rank", None) is not None
    return tuple(_cache_layer(layer, 2, 5, latent) for layer in cache.layers)


def _cache_layer(layer: Any, batch: int, tokens: int, latent: bool) -> CacheLayer:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4:
        if keys.shape[0] != batch or keys.shape[2] != tokens:
            raise BadInput(f"its cache holds keys of shape {tuple(keys.shape)}, which memopt cannot read")
        return CacheLayer(
            kv_heads=keys.shape[1],
            key_dim=keys.shape[3],
            value_dim=values.shape[3],
            window=getattr(layer, "sliding_window", None),
            latent=latent,
        )
    held = torch.utils._pytree.tree_leaves([v for v in vars(layer).values()])
    state = sum(t.untyped_storage().nbytes() for t in held if isinstance(t, torch.Tensor))
    return CacheLayer(state_bytes=-(-state // batch))


def _transient(model: nn.Module) -> Curve:
    """Peak bytes of a forward without cache: a parabola in the tokens, and a line in the sequences."""
    one, two = (_parabola(model, batch) for batch in (1, 2))
    # what every sequence adds, and what is there once (rotary tables)
    each = [b - a for a, b in zip(one, two, strict=True)]
    once = [a - e for a, e in zip(one, each, strict=True)]
    return Curve((once[0], once[1], each[0], each[1], once[2], each[2]))


def _parabola(model: nn.Module, batch: int) -> tuple[float, float, float]:
    base = getattr(model, "base_model", model)
    peaks = []
    for tokens in _LENGTHS:
        ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
        with torch.no_grad(), LiveBytes(meta=True) as live:
            base(input_ids=ids, use_cache=False)
        peaks.append(live.peak)
    (x0, x1, x2), (y0, y1, y2) = _LENGTHS, peaks
    slope = (y1 - y0) / (x1 - x0)  # divided differences (Newton)
    bend = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0)
    return y0 - slope * x0 + bend * x0 * x1, slope - bend * (x0 + x1), bend


def _query_groups(config: Any, layers: tuple[CacheLayer, ...]) -> int:
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    counts = [layer.kv_heads for layer in layers if layer.kv_heads]
    return max(1, heads // min(counts)) if isinstance(heads, int) and counts else 1


def _active_share(config: Any) -> float:
    """Experts that a token passes through, of all."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((n for name in names if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    return min(1.0, chosen / total) if isinstance(chosen, int) and total else 1.0


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Attention functions that make their output and no scores, as a fused kernel does; no masks come with them."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionInterface.register(_REPEATING, _repeat_and_attend)
    try:
        yield
    finally:
        for name in (_ATTENTION, _REPEATING):
            AttentionInterface._global_mapping.pop(name, None)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    batch, heads, tokens, _dim = query.shape  # (B, H, S, D) in, (B, S, H, D_v) out
    return query.new_empty(batch, tokens, heads, value.shape[-1]), None


def _repeat_and_attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """With keys and values copied for every query head, as sdpa is called where there is a mask, and with the numbers
    that sdpa makes of a boolean mask."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # as transformers' repeat_kv: no copy where there is one key head
        key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    bias = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2])  # noqa: F841 (alive while attention runs)
    return _attend(module, query, key, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Some models say at every start that a faster kernel is missing; nothing is computed here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
