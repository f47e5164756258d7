"""The attention backend of memopt's vLLM plugin on a GPU, chosen with --attention-backend CUSTOM.

Two ways to read and write the same pages. "own": memopt's Triton kernel, which computes what the CPU backend does: a
prompt without cached context attends to itself with whole keys, and with a recent window its keys and the new ones are
whole. "stock": vLLM's own Triton kernels for keys and values of two widths, which read a step's own keys from the
pages, so keys are thin inside a prompt too and there is no window. Both were driven through Triton's interpreter on a
CPU, the first inside a whole engine; neither has run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn_diffkv import (
    TritonAttentionDiffKVBackend,
    TritonAttentionDiffKVImpl,
    TritonAttentionDiffKVMetadataBuilder,
)

from memopt.kv import triton_thin
from memopt.kv.paged import dense_attention, pick
from memopt.patches import vllm_recent
from memopt.patches.vllm_channels import channels_of, kept_width, thin_spec
from memopt.patches.vllm_config import configured
from memopt.patches.vllm_rows import Row, rows_of

_FEW_ROWS, _PROMPT_ROWS = 16, 32
"""Rows of a tile of a request with few new tokens, and of a prompt's."""
_SPLIT_TOKENS = 256
"""Cached tokens that are worth a program of their own."""
_MOST_SPLITS = 32


class ThinTritonBackend(TritonAttentionDiffKVBackend):
    """vLLM's DiffKV backend, whose keys are the kept channels."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The hook that makes pages smaller; vLLM's kernels read the values' width from their class."""
        TritonAttentionDiffKVBackend.set_head_size_v(spec.head_size_v)
        return thin_spec(configured(), spec)

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # the splits of a context depend on what else is in the batch

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # tiles are made of the host's lengths

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return ThinDiffKVImpl if configured().kernel == "stock" else ThinOwnImpl

    @staticmethod
    def get_builder_cls() -> type:
        return TritonAttentionDiffKVMetadataBuilder if configured().kernel == "stock" else ThinOwnBuilder


class ThinDiffKVImpl(TritonAttentionDiffKVImpl):
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


@dataclass(frozen=True, slots=True)
class Launch:
    """Tiles that one call of the kernel computes."""

    tiles: torch.Tensor  # (n, 2) int32 of request and first query
    queries: int
    splits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What all layers share of one step."""

    prompts: list[Row]
    """Rows that attend to themselves, with whole keys; the kernel computes the others."""
    launches: list[Launch]
    starts: torch.Tensor  # (R + 1,) int32
    lengths: torch.Tensor  # (R,) int32
    table: torch.Tensor  # (R, blocks) int32
    exact_from: torch.Tensor | None
    """(R,) int32, with a recent window: from which position a request's dropped channels are in the window's pages."""


class ThinOwnBuilder(AttentionMetadataBuilder):
    """Sorts the rows of a step once, for all layers.

    A step of one token a request needs nothing of the host, and its tensors stay where they are: it may be captured in
    a CUDA graph. The tiles of any other step are made on the host.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._keys = configured()
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._kv_heads = kv_cache_spec.num_kv_heads
        self._group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
        requests = vllm_config.scheduler_config.max_num_seqs
        single, self._queries = triton_thin.query_tiles([1] * requests, self._group, _FEW_ROWS)
        self._single = single.to(device)
        self._exact_from = torch.zeros(requests, dtype=torch.int32, device=device)
        # a few waves of programs; the interpreter's count only has to exercise splitting
        self._programs = (
            4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 32
        )

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        common = common_attn_metadata
        if common.max_query_len == 1:
            # a prompt of one token attends to itself, whatever is left of its key
            prompts: list[Row] = []
            launches = [self._launch(self._single[: common.num_reqs], self._queries, common)]
        else:
            prompts, launches = self._sorted(common)
        return Step(
            prompts=prompts,
            launches=launches,
            starts=common.query_start_loc,
            lengths=common.seq_lens,
            table=common.block_table_tensor,
            exact_from=self._windows(common) if self._keys.windowed else None,
        )

    def _sorted(self, common: Any) -> tuple[list[Row], list[Launch]]:
        prompts: list[Row] = []
        few, many = [0] * common.num_reqs, [0] * common.num_reqs
        dense = self._keys.thins and not self._keys.windowed
        for row in rows_of(common):
            if dense and row.context == 0:
                prompts.append(row)
            else:
                new = row.end - row.begin
                (few if new <= self._queries else many)[row.number] = new
        launches = []
        for lengths, rows in ((few, _FEW_ROWS), (many, _PROMPT_ROWS)):
            tiles, queries = triton_thin.query_tiles(lengths, self._group, rows)
            if len(tiles):
                launches.append(self._launch(tiles.to(common.seq_lens.device, non_blocking=True), queries, common))
        return prompts, launches

    def _launch(self, tiles: torch.Tensor, queries: int, common: Any) -> Launch:
        wanted = -(-self._programs // (len(tiles) * self._kv_heads))
        most = min(_MOST_SPLITS, -(-common.max_seq_len // _SPLIT_TOKENS), wanted)
        return Launch(tiles, queries, 1 << (max(1, most).bit_length() - 1))  # each count is a kernel of its own

    def _windows(self, common: Any) -> torch.Tensor:
        """A prompt under way has all of its dropped channels with exact prefill, else the window before the step."""
        starts, found = common.query_start_loc, self._exact_from[: common.num_reqs]
        torch.clamp(common.seq_lens - (starts[1:] - starts[:-1]) - self._keys.recent, min=0, out=found)
        if self._keys.exact_prefill:
            whole = common.is_prefilling.to(found.device, non_blocking=True)
            found[: len(whole)].masked_fill_(whole, 0)
        return found


class ThinOwnImpl(TritonAttentionDiffKVImpl):
    """Writes and reads the pages of one layer with memopt.kv.triton_thin."""

    def __init__(self, num_heads: int, head_size: int, *args: Any, **options: Any) -> None:
        super().__init__(num_heads, head_size, *args, **options)
        self._keys = configured()

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Put the new tokens' key channels, kept and dropped, and values into their pages."""
        rest, rest_slots = vllm_recent.pages(layer) if self._keys.windowed else (None, None)
        pages, count = self._pages(layer, kv_cache, rest), len(slot_mapping)
        triton_thin.write(key[:count], value[:count], pages, slot_mapping, rest_slots)

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
        if attn_metadata is None:
            channels_of(layer, self._keys, query.device)
            return output.fill_(0)
        step: Step = attn_metadata
        for row in step.prompts:
            mine = slice(row.begin, row.end)
            output[mine] = dense_attention(query[mine], key[mine], value[mine], scale=self.scale)
        if not step.launches:
            return output
        rest = rest_table = None
        if self._keys.windowed:
            rest, rest_table = vllm_recent.pages(layer)[0], vllm_recent.block_table(layer)
        tables = triton_thin.Tables(thin=step.table, rest=rest_table, exact_from=step.exact_from)
        pages = self._pages(layer, kv_cache, rest)
        for launch in step.launches:
            triton_thin.attend(
                query,
                pages,
                tables,
                step.starts,
                step.lengths,
                launch.tiles,
                queries=launch.queries,
                scale=self.scale,
                splits=launch.splits,
                out=output,
            )
        return output

    def _pages(self, layer: Any, kv_cache: torch.Tensor, rest: torch.Tensor | None) -> triton_thin.ThinPages:
        channels = channels_of(layer, self._keys, kv_cache.device)
        return triton_thin.ThinPages(thin=kv_cache, channels=channels.order, kept=channels.keep, rest=rest)
