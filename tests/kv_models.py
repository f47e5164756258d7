"""Tiny random models of several families, and the reference's logits, for tests of the thin cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.reference.think import Plan, zero_filled

VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("llama", "mqa", "qwen3", "gpt_neox", "gemma3", "gemma2")


def tiny_model(
    family: str = "llama", attention: str = "sdpa", *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model with weights large enough that its attention has something to choose."""
    torch.manual_seed(5)
    grouped = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**grouped))
    elif family == "mqa":
        model = LlamaForCausalLM(LlamaConfig(**{**grouped, "num_key_value_heads": 1}))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**grouped))
    elif family == "gpt_neox":  # every query head has its own keys, and rotary on a quarter of the channels
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**_SIZES, "num_attention_heads": 2}))
    elif family == "gemma3":  # one sliding and one full layer
        kinds = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**grouped, sliding_window=16, layer_types=kinds))
    else:  # caps its scores, where attention is eager
        kinds = ["full_attention", "full_attention"]
        model = Gemma2ForCausalLM(Gemma2Config(**grouped, attn_logit_softcapping=2.0, layer_types=kinds))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            # small at the end: logits of about 1, so that absolute tolerances mean something
            torch.nn.init.normal_(parameter, std=0.04 if parameter.shape[0] == VOCABULARY else 0.15)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def sequences(lengths: Sequence[int]) -> list[Tensor]:
    """Random sequences, always the same."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, longest)."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def step_logits(
    model: PreTrainedModel, cache: Any, prompts: Sequence[Tensor], steps: Sequence[Tensor], side: str
) -> Tensor:
    """Logits of all tokens of all `steps` (B, n) after the padded prompts: (B, tokens of the steps, V)."""
    ids, mask = padded(prompts, side)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = []
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
        last = mask.sum(1, keepdim=True)
        for step in steps:
            count = step.shape[1]
            mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
            position = last + torch.arange(count)
            last = last + count
            out.append(model(step, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
    return torch.cat(out, 1)


def reference_logits(model: PreTrainedModel, prompts: Sequence[Tensor], steps: Sequence[Tensor], **plan: Any) -> Tensor:
    """The same by the zero-filled dense reference, row by row and unpadded."""
    rows = []
    for i, prompt in enumerate(prompts):
        with zero_filled(model, Plan(**plan)):
            cache = DynamicCache(config=model.config)
            rows.append(step_logits(model, cache, [prompt], [step[i : i + 1] for step in steps], "left"))
    return torch.cat(rows)


def some_steps(batch: int, counts: Sequence[int]) -> list[Tensor]:
    """Random tokens for steps of the given lengths."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCABULARY, (batch, count), generator=generator) for count in counts]
