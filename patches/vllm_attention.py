"""The attention backend of memopt's vLLM plugin on a CPU: pages with thin keys, written and read.

What a step computes, whichever kernel does it: a prompt without cached context attends to itself with whole keys; any
other row reads its keys from the pages, kept channels only, and with a recent window its own and the window's keys
whole. vLLM's C++ kernel has one head size, but takes keys and values apart: where the head size is a multiple of the
kept channels it is called once per slice of the values. Everywhere else memopt.kv.paged does it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from memopt.errors import BadInput
from memopt.kv.paged import dense_attention, gather_rows, pick, thin_attention, write_rows
from memopt.patches import vllm_recent
from memopt.patches.vllm_channels import channels_of, kept_width, thin_spec
from memopt.patches.vllm_config import ThinKeys, configured
from memopt.patches.vllm_rows import Row, rows_of


@dataclass
class ThinMetadata:
    """What all layers share of one step. `stock`: vLLM's own, of the rows with context only, None without such rows."""

    rows: list[Row]
    block_table: torch.Tensor
    stock: Any = None
    stock_tokens: torch.Tensor | None = None
    """Which of the batch's tokens those rows are; None: all, in order."""
    slot_mapping: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class ThinCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with thin keys. It keeps the name: vLLM looks it up among the backends it knows."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The hook that makes pages smaller."""
        return thin_spec(configured(), spec)

    @staticmethod
    def get_impl_cls() -> type:
        return ThinCPUImpl

    @staticmethod
    def get_builder_cls() -> type:
        return ThinCPUBuilder


def takes_stock_kernel(keys: ThinKeys, head_size: int) -> bool:
    """Whether vLLM's C++ kernel does the reading and writing; raises BadInput where it is asked for and cannot."""
    keep = kept_width(keys, head_size)
    fits = head_size % keep == 0 and keep in CPUAttentionBackend.get_supported_head_sizes()
    if keys.kernel == "stock" and not fits:
        raise BadInput(
            f"kernel: vLLM's kernel cannot read {keep} key channels of {head_size}: it wants a divisor of the head "
            f"size out of {CPUAttentionBackend.get_supported_head_sizes()}; use kernel auto"
        )
    return fits and keys.recent == 0 and keys.kernel != "own"


class ThinCPUBuilder(CPUAttentionMetadataBuilder):
    """Sorts the rows of a step once, for all layers."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        keys = configured()
        head_size = kv_cache_spec.head_size_v
        self._stock_kernel = takes_stock_kernel(keys, head_size)
        self._whole = not keys.thins and self._stock_kernel
        if not self._stock_kernel:  # the C++ scheduler is not used then, but knows only its own head sizes
            kv_cache_spec = replace(kv_cache_spec, head_size=head_size)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        common = common_attn_metadata
        if self._whole:
            return super().build(common_prefix_len, common, fast_build)
        rows = rows_of(common)
        made = ThinMetadata(rows, common.block_table_tensor, slot_mapping=common.slot_mapping)
        paged = [row for row in rows if row.context]
        if self._stock_kernel and paged:
            if len(paged) < common.num_reqs:
                made.stock_tokens = torch.cat([torch.arange(row.begin, row.end) for row in paged])
                common = _only(common, paged)
            made.stock = super().build(0, common, fast_build)
        return made


class ThinCPUImpl(CPUAttentionBackendImpl):
    """Writes and reads the pages of one layer."""

    def __init__(self, num_heads: int, head_size: int, *args: Any, **options: Any) -> None:
        super().__init__(num_heads, head_size, *args, **options)
        self._keys = configured()
        self._stock_kernel = takes_stock_kernel(self._keys, head_size)
        self._whole = not self._keys.thins and self._stock_kernel

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Put the new tokens' kept key channels and values into their pages."""
        if self._whole:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        channels = channels_of(layer, self._keys, key.device)
        thin = pick(key, channels.kept)
        if not self._stock_kernel:
            write_rows(kv_cache, torch.cat((thin, value), dim=-1), slot_mapping)
            if self._keys.windowed:
                vllm_recent.write(layer, pick(key, channels.dropped))
            return
        pages, *slices = self._slices(kv_cache, thin.shape[-1])
        for part, page in zip(value.split(thin.shape[-1], dim=-1), slices, strict=True):
            ops.cpu_attn_reshape_and_cache(
                thin,
                part.contiguous(),
                pages,
                page,
                slot_mapping,
                layer.isa,
                k_scale=layer._k_scale_float,
                v_scale=layer._v_scale_float,
                kv_cache_dtype=self.kv_cache_dtype,
            )

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
        """Attention of one step, into `output` (tokens, H, D)."""
        if self._whole or attn_metadata is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
            return output
        assert isinstance(attn_metadata, ThinMetadata)
        for row in attn_metadata.rows:
            mine = slice(row.begin, row.end)
            if row.context == 0:
                output[mine] = dense_attention(query[mine], key[mine], value[mine], scale=self.scale)
            elif not self._stock_kernel:
                output[mine] = self._own(layer, query[mine], key[mine], kv_cache, row, attn_metadata)
        if attn_metadata.stock is not None:
            self._stock(layer, query, kv_cache, attn_metadata, output)
        return output

    def _own(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        kv_cache: torch.Tensor,
        row: Row,
        metadata: ThinMetadata,
    ) -> torch.Tensor:
        channels = channels_of(layer, self._keys, query.device)
        suffix = None
        if self._keys.windowed:
            suffix = vllm_recent.suffix(layer, row.number, row.context, pick(key, channels.dropped), self._keys)
        rows = gather_rows(kv_cache, metadata.block_table[row.number], row.tokens)
        return thin_attention(query, rows, channels.kept, channels.dropped, scale=self.scale, suffix=suffix)

    def _stock(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, metadata: ThinMetadata, output: torch.Tensor
    ) -> None:
        channels, stock, places = channels_of(layer, self._keys, query.device), metadata.stock, metadata.stock_tokens
        thin = pick(query[: stock.num_actual_tokens] if places is None else query[places], channels.kept)
        keep = thin.shape[-1]
        out = torch.empty(*thin.shape[:2], self.head_size, dtype=output.dtype)
        pages, *slices = self._slices(kv_cache, keep)
        for i, page in enumerate(slices):
            part = torch.empty_like(thin)
            ops.cpu_attention_with_kv_cache(
                query=thin,
                key_cache=pages,
                value_cache=page,
                output=part,
                query_start_loc=stock.query_start_loc,
                seq_lens=stock.seq_lens,
                scale=self.scale,
                causal=stock.causal,
                alibi_slopes=None,
                sliding_window=self.sliding_window,
                block_table=stock.block_table,
                softcap=self.logits_soft_cap,
                scheduler_metadata=stock.scheduler_metadata,
                s_aux=None,
                dynamic_causal=stock.dynamic_causal,
                k_scale=layer._k_scale_float,
                v_scale=layer._v_scale_float,
                kv_cache_dtype=self.kv_cache_dtype,
            )
            out[..., i * keep : (i + 1) * keep] = part
        if places is None:
            output[: out.shape[0]] = out
        else:
            output[places] = out

    def _slices(self, kv_cache: torch.Tensor, keep: int) -> tuple[torch.Tensor, ...]:
        """Pages (B, H, N, keep + D) as the kernel wants them: keys and D / keep slices of values, (B, H, N, keep) each.

        A page has no order of its own: what was written through these views is read through them.
        """
        blocks, heads, tokens, _ = kv_cache.shape
        return tuple(kv_cache.view(blocks, heads, -1, keep).split(tokens, dim=2))


def _only(common: Any, rows: list[Row]) -> Any:
    """vLLM's description of a step, of some of its rows."""
    numbers = torch.tensor([row.number for row in rows])
    queries = torch.tensor([row.end - row.begin for row in rows], dtype=torch.int32)
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = queries.cumsum(0)
    return replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=common.seq_lens[numbers],
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(queries.max()),
        max_seq_len=max(row.tokens for row in rows),
        block_table_tensor=common.block_table_tensor[numbers],
    )
