"""Tiny configurations of model families, and the role of each of their tables, written down by hand from their code."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
_MLP = {**_SIZES, "intermediate_size": 48}
_GQA = {**_MLP, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 64}
_MOE = {**_GQA, "num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}

_QKVO = "q_proj=q k_proj=k v_proj=v o_proj=o "
_OUT = "q_proj=q k_proj=k v_proj=v out_proj=o "
_GATED = "gate_proj=ffn-gate up_proj=ffn-up down_proj=ffn-down "
_FC = "fc1=ffn-up fc2=ffn-down "
_ENDS = "embed_tokens=embedding lm_head=head "
_LLAMA = _QKVO + _GATED + _ENDS
_FUSED_UP = "gate_up_proj=ffn-gate+ffn-up down_proj=ffn-down "
_DENSE_4H = "dense_h_to_4h=ffn-up dense_4h_to_h=ffn-down "
_EXPERTS = "gate=router experts.gate_up_proj=expert+expert experts.down_proj=expert "
_SHARED = "shared_expert.gate_proj=ffn-gate shared_expert.up_proj=ffn-up shared_expert.down_proj=ffn-down "
_BERT = (
    "word_embeddings=embedding position_embeddings=embedding token_type_embeddings=embedding query=q key=k value=v "
    "attention.output.dense=o intermediate.dense=ffn-up output.dense=ffn-down "
)

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", _GQA, _LLAMA),
    "mistral": ("MistralForCausalLM", _GQA, _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", _GQA, _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", _GQA, _LLAMA),
    "gemma2, tied": ("Gemma2ForCausalLM", _GQA, _QKVO + _GATED + "embed_tokens=embedding"),
    "olmo2": ("Olmo2ForCausalLM", _GQA, _LLAMA),
    "stablelm": ("StableLmForCausalLM", _GQA, _LLAMA),
    "phi": ("PhiForCausalLM", _GQA, "q_proj=q k_proj=k v_proj=v dense=o " + _FC + _ENDS),
    "phi3": ("Phi3ForCausalLM", _GQA, "qkv_proj=q+k+v o_proj=o " + _FUSED_UP + _ENDS),
    "glm4": ("Glm4ForCausalLM", _GQA, _QKVO + _FUSED_UP + _ENDS),
    "gpt2": (
        "GPT2LMHeadModel",
        _GPT2,
        "wte=embedding wpe=embedding c_attn=q+k+v attn.c_proj=o c_fc=ffn-up mlp.c_proj=ffn-down",
    ),
    "gpt-j": (
        "GPTJForCausalLM",
        {**_GPT2, "rotary_dim": 4},
        _OUT + "wte=embedding fc_in=ffn-up fc_out=ffn-down lm_head=head",
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_heads": 4, "num_layers": 1, "attention_types": [[["global"], 1]], "vocab_size": 64},
        _OUT + "wte=embedding wpe=embedding c_fc=ffn-up c_proj=ffn-down",
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        _MLP,
        "embed_in=embedding query_key_value=q+k+v attention.dense=o lm_head=head " + _DENSE_4H,
    ),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64},
        "word_embeddings=embedding query_key_value=q+k+v self_attention.dense=o " + _DENSE_4H,
    ),
    "persimmon": (
        "PersimmonForCausalLM",
        _MLP,
        "query_key_value=q+k+v self_attn.dense=o " + _DENSE_4H + _ENDS,
    ),
    "falcon": (
        "FalconForCausalLM",
        _SIZES,
        "word_embeddings=embedding query_key_value=q+k+v self_attention.dense=o " + _DENSE_4H,
    ),
    "mpt": (
        "MptForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64},
        "wte=embedding Wqkv=q+k+v out_proj=o up_proj=ffn-up down_proj=ffn-down",
    ),
    "codegen": (
        "CodeGenForCausalLM",
        {**_GPT2, "rotary_dim": 4},
        "wte=embedding qkv_proj=q+v+k out_proj=o fc_in=ffn-up fc_out=ffn-down lm_head=head",
    ),
    "starcoder": (
        "GPTBigCodeForCausalLM",
        _GPT2,
        "wte=embedding wpe=embedding c_attn=q+k+v attn.c_proj=o c_fc=ffn-up mlp.c_proj=ffn-down",
    ),
    "opt": (
        "OPTForCausalLM",
        {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
        _OUT + _FC + "embed_tokens=embedding embed_positions=embedding",
    ),
    "mixtral": ("MixtralForCausalLM", {**_GQA, "num_local_experts": 2}, _QKVO + _EXPERTS + _ENDS),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        _MOE,
        _QKVO + _EXPERTS + _SHARED + "shared_expert_gate=router " + _ENDS,
    ),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        {
            **_MOE,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "layer_types": ["linear_attention"],
        },
        "in_proj_qkvz=q+k+v+other in_proj_ba=other out_proj=o conv1d=conv shared_expert_gate=router "
        + _EXPERTS
        + _SHARED
        + _ENDS,
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **_MLP,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 0,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
        "q_a_proj=q q_b_proj=q kv_a_proj_with_mqa=qkv-fused kv_b_proj=k+v o_proj=o "
        + _EXPERTS
        + _SHARED.replace("shared_expert", "shared_experts")
        + _ENDS,
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {**_GQA, "num_local_experts": 2},
        _QKVO
        + _EXPERTS.replace("gate=", "router=")
        + "gate_up_proj_bias=bias down_proj_bias=bias embed_tokens=embedding lm_head=head",
    ),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 1,
            "vocab_size": 64,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 1e3},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        },
        "wte=embedding Wqkv=q+k+v out_proj=o router.layer=router w1=expert+expert v1=expert+expert w2=expert+expert "
        "lm_head=head",
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        {**_MLP, "num_key_value_heads": 2, "num_local_experts": 2, "kv_channels": 8, "activation_function": "silu"},
        "kv_proj=k+v mlp.input_linear=expert+expert mlp.output_linear=expert router.layer=router "
        "experts.input_linear=expert experts.output_linear=expert embed_tokens=embedding",
    ),
    "mamba": (
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64},
        "embeddings=embedding A_log=other conv1d=conv in_proj=other x_proj=other dt_proj=other out_proj=other",
    ),
    "bert": ("BertForMaskedLM", _MLP, _BERT + "predictions.transform.dense=head"),
    "bert classifier": ("BertForSequenceClassification", _MLP, _BERT + "pooler.dense=other classifier=head"),
    "deberta": (
        "DebertaForMaskedLM",
        _MLP,
        "word_embeddings=embedding position_embeddings=embedding in_proj=q+k+v attention.output.dense=o "
        "intermediate.dense=ffn-up output.dense=ffn-down predictions.transform.dense=head",
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": 64},
        "word_embeddings=embedding position_embeddings=embedding q_lin=q k_lin=k v_lin=v out_lin=o lin1=ffn-up "
        "lin2=ffn-down vocab_transform=head",
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**_MLP, "pad_token_id": 0},
        "tok_embeddings=embedding Wqkv=q+k+v attn.Wo=o Wi=ffn-gate+ffn-up mlp.Wo=ffn-down head.dense=head",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64},
        "shared=embedding relative_attention_bias=embedding q=q k=k v=v o=o wi=ffn-up wo=ffn-down",
    ),
    "t5 v1.1": (
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "vocab_size": 64,
            "feed_forward_proj": "gated-gelu",
        },
        "shared=embedding relative_attention_bias=embedding q=q k=k v=v o=o wi_0=ffn-gate wi_1=ffn-up wo=ffn-down",
    ),
    "bart": ("BartForConditionalGeneration", _BART, _OUT + _FC + "shared=embedding embed_positions=embedding"),
    "whisper": (
        "WhisperForConditionalGeneration",
        _BART,
        _OUT + _FC + "conv1=conv conv2=conv embed_tokens=embedding embed_positions=embedding",
    ),
    "vit": (
        "ViTForImageClassification",
        {**_MLP, "image_size": 8, "patch_size": 4},
        _QKVO + _FC + "cls_token=embedding position_embeddings=embedding projection=conv classifier=head",
    ),
}
"""Class, configuration, and the roles of parts by the end of the name; several are in the order of the rows."""


def build(family: str, *, device: str = "cpu", **changes: Any) -> Any:
    """A random model of a family; parameters that training would change are drawn, so that nothing is a constant."""
    class_name, settings, _ = FAMILIES[family]
    return build_class(class_name, {**settings, **changes}, device=device)


def build_class(class_name: str, settings: dict[str, Any], *, device: str = "cpu") -> Any:
    """A random model of a transformers class."""
    torch.manual_seed(0)
    made = getattr(transformers, class_name)
    with torch.device(device):
        model = made(made.config_class(**settings))
    if device != "meta":
        with torch.no_grad():
            for param in model.parameters():
                param.normal_(std=0.3)
    return model.eval()
