"""Scores of key channels from a vLLM engine that serves as it always does: whole keys, its own attention kernels.

Only `Attention.__init__` is wrapped: each layer's implementation is watched as it is called, whatever its backend.
vLLM tells neither when a request begins nor which it is, so a request is known by its first block: a row without
context begins one, rows with context continue it. The engine must therefore compute every prompt (no prefix caching)
and call Python for every step (no CUDA graphs).
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memopt.errors import BadInput
from memopt.kv.score_sums import MeanScores, PromptEnergy

_LIVE = 1024
"""Requests of a layer whose energies are kept apart; the longest idle are taken for ended, more never run at once."""


class Recorder:
    """Energies of the requests under way, and the mean scores of those that ended. Safe to read while serving."""

    def __init__(self, *, observation: int | None = None, live: int = _LIVE) -> None:
        self._observation, self._live = observation, live
        self._requests: dict[int, OrderedDict[int, PromptEnergy]] = {}
        self._means = MeanScores()
        self._lock = threading.Lock()
        self._rows: tuple[Any, list[tuple[int, int, int, int]]] = (None, [])
        self.dtype = torch.float32
        self.tokens = 0
        """Seen by the layer that saw most, of the requests that count."""
        self._seen: dict[int, int] = {}

    def add(self, layer: int, query: Tensor, key: Tensor, metadata: Any) -> None:
        """Watch one layer compute one step: query (T, H, D), key (T, K, D); `metadata` is its backend's."""
        with self._lock:
            self.dtype = query.dtype
            requests = self._requests.setdefault(layer, OrderedDict())
            for block, begin, end, tokens in self._spans(metadata):
                context = tokens - (end - begin)
                energy = requests.pop(block, None)
                if context == 0 and energy is not None:
                    self._end(layer, energy)
                if context == 0:
                    energy = PromptEnergy(self._observation)
                if energy is None or energy.tokens != context:
                    continue  # its beginning was not seen
                energy.add(query[begin:end], key[begin:end])
                requests[block] = energy
            while len(requests) > self._live:
                self._end(layer, requests.popitem(last=False)[1])

    def finish(self) -> None:
        """All requests have ended."""
        with self._lock:
            for layer, requests in self._requests.items():
                while requests:
                    self._end(layer, requests.popitem(last=False)[1])

    def forget(self) -> None:
        """Drop everything: what an engine computes to warm up is nobody's prompt."""
        with self._lock:
            self._requests.clear()
            self._means, self._seen, self.tokens = MeanScores(), {}, 0

    def means(self) -> dict[int, Tensor]:
        """Mean scores of the requests that ended, by layer, (K, D) float64; raises BadInput when there are none."""
        with self._lock:
            return self._means.means(self.dtype)

    def _end(self, layer: int, energy: PromptEnergy) -> None:
        self._means.add(layer, energy.scores())
        self._seen[layer] = self._seen.get(layer, 0) + energy.tokens
        self.tokens = max(self._seen.values())

    def _spans(self, metadata: Any) -> list[tuple[int, int, int, int]]:
        """(first block, begin, end, tokens in all) of each request of the step; layers of a group share them."""
        known, spans = self._rows
        if known is metadata:
            return spans
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        blocks = metadata.block_table[:, 0].tolist()
        # block 0 is nobody's: rows of a warm-up
        spans = [
            (block, begin, end, tokens)
            for block, begin, end, tokens in zip(blocks, starts, starts[1:], lengths, strict=False)
            if end > begin and block > 0
        ]
        self._rows = (metadata, spans)
        return spans


def watch(recorder: Recorder) -> Callable[[], None]:
    """Watch every attention layer that is made from now on in this process; call the result to stop.

    Layers with a sliding window, of an encoder, or that read another layer's cache are left out, since they are never
    pruned.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    original = Attention.__init__

    @functools.wraps(original)
    def watched(self: Any, *args: Any, **options: Any) -> None:
        check_config(get_current_vllm_config())
        original(self, *args, **options)
        shared = self.kv_sharing_target_layer_name is not None
        if self.attn_type == "decoder" and self.sliding_window is None and not shared:
            _observe(self.impl, extract_layer_index(self.layer_name), recorder)

    Attention.__init__ = watched
    return lambda: setattr(Attention, "__init__", original)


def check_config(config: Any) -> None:
    """Refuse an engine whose steps cannot all be watched from one process. `config` is vLLM's."""
    parallel = config.parallel_config
    ways = [f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "data", "decode_context", "prefill_context")]
    for name in ways:
        if getattr(parallel, name, 1) > 1:
            raise BadInput(f"{name} above 1: each worker sees only its share; calibrate with 1 (any server may use it)")
    if config.cache_config.enable_prefix_caching:
        raise BadInput("prefix caching skips the prompts that calibration must see; --no-enable-prefix-caching")
    if not config.model_config.enforce_eager:
        raise BadInput("CUDA graphs run without being seen; calibrate with --enforce-eager")


def _observe(impl: Any, layer: int, recorder: Recorder) -> None:
    forward = impl.forward

    @functools.wraps(forward)
    def observed(module: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, **rest: Any) -> Any:
        if attn_metadata is not None:
            recorder.add(layer, query, key, attn_metadata)
        return forward(module, query, key, value, kv_cache, attn_metadata, **rest)

    impl.forward = observed
