"""The recent window of a vLLM server: dropped key channels of the last tokens, in a KV-cache group of their own.

vLLM's block manager allocates, frees, preempts and caches the group like that of any sliding-window layer, so nothing
is kept per request here. For each attention layer a second "layer" stands in the forward context; it has pages, but no
attention of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from memopt.kv.paged import Suffix, write_rows
from memopt.patches.vllm_channels import kept_width
from memopt.patches.vllm_config import ThinKeys

SUFFIX = ".memopt_recent"


def beside(layer: Any, keys: ThinKeys) -> None:
    """Give an attention layer the pages of its recent window."""
    from vllm.config import get_current_vllm_config

    context = get_current_vllm_config().compilation_config.static_forward_context
    context[layer.layer_name + SUFFIX] = _classes(layer.attn_backend)[0](layer, keys)


def write(layer: Any, dropped: torch.Tensor) -> None:
    """Put the step's dropped key channels (T, H_kv, D - D_kept) into their pages."""
    cache, slots = pages(layer)
    write_rows(cache, dropped[: len(slots)], slots)


def suffix(layer: Any, row: int, context: int, own: torch.Tensor, keys: ThinKeys) -> Suffix:
    """Dropped channels of the window before a row's own tokens, and of these (`own`, (Q, H_kv, D - D_kept)).

    After its prompt a request's older entries of the block table are stale, the pages given away: only the window is
    read then. Block 0 is nobody's: there the window was not cached.
    """
    forward, recent = _context(layer)
    metadata, page_tokens = forward.attn_metadata[recent.layer_name], recent.kv_cache.shape[2]
    whole = keys.exact_prefill and bool(metadata.is_prefilling[row])
    window = context if whole else min(keys.recent, context)
    positions = torch.arange(context - window, context)
    blocks = metadata.block_table[row][positions // page_tokens].long()
    before = recent.kv_cache[blocks, :, positions % page_tokens]
    present = torch.cat((blocks != 0, torch.ones(len(own), dtype=torch.bool)))
    return Suffix(keys=torch.cat((before.to(own.dtype), own)), present=present)


def pages(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The window's pages of a layer, and the slots of the step's tokens in them."""
    context, recent = _context(layer)
    return recent.kv_cache, context.slot_mapping[recent.layer_name]


def block_table(layer: Any) -> torch.Tensor:
    """(requests, blocks) int32: where the window's pages of each request of the step are; 0: nowhere."""
    context, recent = _context(layer)
    table: torch.Tensor = context.attn_metadata[recent.layer_name].block_table
    return table


def _context(layer: Any) -> tuple[Any, Any]:
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    return context, context.no_compile_layers[layer.layer_name + SUFFIX]


@functools.lru_cache(maxsize=2)
def _classes(thin_backend: Any) -> tuple[Any, Any]:
    """The layer and its backend, beside that of the thin pages; made late, because their base classes are vLLM's."""
    from types import SimpleNamespace

    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.utils.torch_utils import get_dtype_size
    from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    from memopt.patches.vllm_spec import PromptWindowSpec

    class Builder(AttentionMetadataBuilder):
        _cudagraph_support = AttentionCGSupport.ALWAYS

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract in vLLM

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            common = common_attn_metadata
            return SimpleNamespace(block_table=common.block_table_tensor, is_prefilling=common.is_prefilling)

    class Backend(AttentionBackend):
        @staticmethod
        def get_name() -> str:
            return "CUSTOM"

        @staticmethod
        def get_impl_cls() -> type:
            raise NotImplementedError  # vLLM asks backends whether their attention can do this or that

        @staticmethod
        def get_builder_cls() -> type:
            return Builder

        @classmethod
        def supported_kv_cache_layouts(cls) -> Any:
            return thin_backend.supported_kv_cache_layouts()

        @classmethod
        def supports_sliding_window(cls) -> bool:
            return True

    class RecentPages(AttentionLayerBase):
        impl = None

        def __init__(self, layer: Any, keys: ThinKeys) -> None:
            self.layer_name = layer.layer_name + SUFFIX
            self.num_heads, self.num_kv_heads = layer.num_heads, layer.num_kv_heads
            self._head_size, self._dtype, self._keys = layer.head_size, layer.kv_cache_torch_dtype, keys
            self.kv_cache = torch.tensor([])

        def get_attn_backend(self) -> type:
            return Backend

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            """Pages as large as the thin ones (all groups share one pool), with as many tokens as they take."""
            width, block = self._head_size, vllm_config.cache_config.block_size
            keep = kept_width(self._keys, width)
            page = block * (keep + width)  # elements of one head
            tokens = max(block, page // (width - keep) // block * block)
            fills = tokens * (width - keep) == page
            kind = PromptWindowSpec if self._keys.exact_prefill else SlidingWindowSpec
            return kind(
                block_size=tokens,
                num_kv_heads=self.num_kv_heads,
                head_size=width - keep,
                head_size_v=0,
                dtype=self._dtype,
                page_size_padded=None if fills else page * self.num_kv_heads * get_dtype_size(self._dtype),
                sliding_window=self._keys.recent + 1,
            )

    return RecentPages, Backend
