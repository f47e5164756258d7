"""What a server with thin keys should compute, slowly: Hugging Face, dense keys, dropped channels set to zero.

A query of a later step sees whole keys only of the last `recent` tokens before the step, and of the step itself if
`recent` is not 0; a prompt without context sees whole keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from memopt.kv.channel_file import ChannelSets


def greedy(
    model: Path, prompts: list[list[int]], new_tokens: int, sets: ChannelSets, *, recent: int = 0, chunk: int = 10**6
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and their log-probabilities; prompts are computed in chunks of `chunk` tokens."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float = 1.0, **_: Any) -> Any:
        queries, tokens = query.shape[2], key.shape[2]
        context = tokens - queries
        thin = 0 if context == 0 else (tokens if recent == 0 else max(0, context - recent))
        key = key.clone()
        for head, kept in enumerate(sets.keys[module.layer_idx]):
            whole = key[0, head, :thin].clone()
            key[0, head, :thin] = 0
            key[0, head, :thin, kept] = whole[:, kept]
        group = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
        future = torch.arange(tokens)[None] > torch.arange(context, tokens)[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("thin_server", attention)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.config._attn_implementation = "thin_server"
    all_tokens, all_logprobs = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens, logprobs, past = [], [], None
        with torch.no_grad():
            for piece in ids.split(chunk, dim=1):
                out = loaded(piece, past_key_values=past, use_cache=True)
                past = out.past_key_values
            for _ in range(new_tokens):
                best = out.logits[0, -1].float().log_softmax(-1).max(-1)
                tokens.append(int(best.indices))
                logprobs.append(float(best.values))
                out = loaded(best.indices.view(1, 1), past_key_values=past, use_cache=True)
                past = out.past_key_values
        all_tokens.append(tokens)
        all_logprobs.append(logprobs)
    return all_tokens, all_logprobs
