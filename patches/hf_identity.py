"""Which model a Hugging Face configuration describes, for files of channels; vLLM hands out the same configurations."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memopt.errors import BadInput
from memopt.kv.channel_file import ModelIdentity
from memopt.patches.hf_files import stored_embedding

_SAMPLE_ROWS = 64


def identity_of(config: Any, *, weights: str = "") -> ModelIdentity:
    """The identity of the language model that a `PreTrainedConfig` describes; `weights` from `weights_digest` or "".

    Raises:
        BadInput: the configuration names no attention heads or layers.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    try:
        layers, heads, hidden = text.num_hidden_layers, text.num_attention_heads, text.hidden_size
    except AttributeError as error:
        raise BadInput(f"a {config.model_type} model has no attention heads to choose channels of ({error})") from error
    return ModelIdentity(
        model_type=str(text.model_type),
        layers=int(layers),
        heads=int(heads),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        hidden_size=int(hidden),
        vocab_size=int(text.vocab_size),
        rope_theta=_rope_theta(text),
        weights=weights,
    )


def weights_digest(embedding: Tensor) -> str:
    """Digest of the first rows of the input embedding (V, S), as bfloat16, so that float32 and bfloat16 loads agree.

    A LoRA leaves it alone; another pretraining or a full fine-tune changes it.
    """
    sample = embedding.detach()[:_SAMPLE_ROWS].to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
    return hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]


def stored_digest(directory: Path) -> str:
    """`weights_digest` of a checkpoint's embedding; "" where it has none of a known name."""
    embedding = stored_embedding(directory)
    return "" if embedding is None else weights_digest(embedding)


def _rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    # models that mix kinds of attention keep one set of parameters per kind; the full layers are the pruned ones
    parameters = parameters.get("full_attention", parameters)
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    return float(theta) if theta is not None else 0.0
