"""The KV group of exact chunked prefill: everything until a prompt is done, then the recent window.

vLLM pickles specs from workers to the engine core, so this module is imported, and the spec registered, on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class PromptWindowSpec(SlidingWindowSpec):
    """A sliding window that does not slide over an unfinished prompt."""

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """A whole prompt may have to be held at once; the stock bound of a window would admit one that cannot end."""
        return int(-(-max_model_len // self.block_size) + 1)


class PromptWindowManager(SlidingWindowManager):
    """Frees what leaves the window, but not before the prompt is done."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        if num_prompt_tokens is None or processed_computed_tokens >= num_prompt_tokens:
            super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)


# a first registration of ours would keep vLLM from registering its own
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(PromptWindowSpec, PromptWindowManager, uniform_type_base_spec=SlidingWindowSpec)
