"""The attention backend of memopt's vLLM plugin on a GPU: vLLM's own Triton kernels for keys and values of two widths.

They were made for models whose values are narrower than their keys, and take any two widths. They read a step's own
keys from the pages, so keys are thin inside a prompt too. Chosen with --attention-backend CUSTOM. Its parts were driven
through Triton's interpreter on a CPU; it has not been run in a server on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.triton_attn_diffkv import (
    TritonAttentionDiffKVBackend,
    TritonAttentionDiffKVImpl,
    TritonAttentionDiffKVMetadataBuilder,
)

from memopt.kv.paged import pick
from memopt.patches.vllm_channels import channels_of, kept_width, thin_spec
from memopt.patches.vllm_config import configured


class ThinTritonBackend(TritonAttentionDiffKVBackend):
    """vLLM's DiffKV backend, whose keys are the kept channels."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The hook that makes pages smaller; the kernels read the values' width from their class."""
        TritonAttentionDiffKVBackend.set_head_size_v(spec.head_size_v)
        return thin_spec(configured(), spec)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return ThinTritonImpl

    @staticmethod
    def get_builder_cls() -> type:
        return TritonAttentionDiffKVMetadataBuilder  # type: ignore[no-any-return]


class ThinTritonImpl(TritonAttentionDiffKVImpl):
    """Gathers the kept channels of queries and new keys, and leaves the rest to vLLM."""

    def __init__(self, num_heads: int, head_size: int, *args: Any, **options: Any) -> None:
        super().__init__(num_heads, head_size, *args, **options)  # the scale comes from the model and stays
        self._keys = configured()
        TritonAttentionDiffKVBackend.set_head_size_v(head_size)
        self.head_size = kept_width(self._keys, head_size)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Put the new tokens' kept key channels and values into their pages."""
        thin = pick(key, channels_of(layer, self._keys, key.device).kept)
        super().do_kv_cache_update(layer, thin, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step, into `output` (tokens, H, D). The profiling run fills the table of channels."""
        thin = pick(query, channels_of(layer, self._keys, query.device).kept)
        super().forward(layer, thin, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        return output
