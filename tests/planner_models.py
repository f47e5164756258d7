"""Tiny models of a few families for tests of the planner."""

from __future__ import annotations

from typing import Any


def config(kind: str, *, layers: int = 3, **changes: Any) -> Any:
    """A transformers configuration of `kind` (llama, qwen3, gpt2, opt, mixtral) of about 100 thousand parameters."""
    from transformers import AutoConfig

    llama = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
    }
    values: dict[str, dict[str, Any]] = {
        "llama": llama,
        "qwen3": {**llama, "head_dim": 32, "tie_word_embeddings": True},
        "mixtral": {**llama, "num_local_experts": 4},
        "gpt2": {"n_embd": 64, "n_layer": layers, "n_head": 4, "vocab_size": 300, "n_positions": 512},
        "opt": {
            "hidden_size": 64,
            "ffn_dim": 160,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "vocab_size": 300,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 512,
        },
    }
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **{**values[kind], **special, **changes})


def model(settings: Any) -> Any:
    """A real model with random weights, in train mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings).train()
