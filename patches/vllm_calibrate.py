"""What key channels are worth to a vLLM engine that serves as it always does: whole keys, its own attention kernels.

`Attention.__init__` is wrapped, so that each layer's implementation is watched as it is called, whatever its backend.
What is scored is a prompt's first step: a row without context has its queries and all the keys they look at in that
call, and memopt.kv.joint can be asked as it is in a cache that chooses for each prompt. That is the whole prompt, or
its first chunk; steps with context are left out. What an engine computes to warm up is nobody's prompt and not heard.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memopt.kv.joint import drop_order, observe_spread, set_errors
from memopt.kv.score_sums import LEAST_TOKENS, RECENT, MeanScores
from memopt.kv.window import observe
from memopt.patches.vllm_guard import refuse
from memopt.patches.vllm_rows import Row, rows_between

_SILENT = ("FLASHINFER",)
"""Backends whose metadata has no query_start_loc and seq_lens."""


class Recorder:
    """Errors of sets of channels, averaged over the prompts that were heard. Safe to read while serving.

    `observation`: only a window's last so many queries count. `asked`: at most so many of them, evenly apart, which
    bounds what a long prompt costs. Neither: all.
    """

    def __init__(self, *, observation: int | None = None, asked: int | None = None) -> None:
        self._observation, self._asked = observation, asked
        self._errors = MeanScores()
        self._heard: dict[int, tuple[int, int]] = {}  # prompts and tokens, by layer
        self._lock = threading.Lock()
        self._step: tuple[Any, list[Row]] = (None, [])
        self._on = False
        self._dtype = torch.float32
        self.layers: set[int] = set()
        """Whose steps are shown to it."""

    def start(self) -> None:
        """What is computed from now on is somebody's prompt."""
        self._on = True

    def add(self, layer: int, query: Tensor, key: Tensor, scale: float, metadata: Any) -> None:
        """Watch one layer compute one step: query (T, H, D), key (T, K, D); `metadata` is its backend's."""
        if not self._on:
            return
        with self._lock:
            self._dtype = query.dtype
            for row in self._prompts(metadata):
                # (1, H, T, D), (1, K, T, D)
                asking, looked_at = (states[row.begin : row.end].transpose(0, 1)[None] for states in (query, key))
                if self._asked is None:
                    window = observe(asking, None, 0, self._observation or row.tokens)
                else:
                    window = observe_spread(asking, None, 0, self._asked)
                errors = set_errors(window, looked_at, None, scaling=scale, recent=RECENT)
                self._errors.add(layer, errors[0])
                prompts, tokens = self._heard.get(layer, (0, 0))
                self._heard[layer] = prompts + 1, tokens + row.tokens

    @property
    def prompts(self) -> int:
        """Heard by every layer: a step goes through them one after the other."""
        with self._lock:
            return min((self._heard.get(layer, (0, 0))[0] for layer in self.layers | self._heard.keys()), default=0)

    def scores(self) -> tuple[dict[int, Tensor], int]:
        """By layer, (K, D): the turn in which a greedy choice drops the channel, and the tokens heard.

        Raises:
            BadInput: no prompt, or errors that are not finite.
        """
        with self._lock:
            means = self._errors.means(self._dtype)
            tokens = max(tokens for _, tokens in self._heard.values())
        return {layer: drop_order(mean, mean.shape[-1]) for layer, mean in means.items()}, tokens

    def _prompts(self, metadata: Any) -> list[Row]:
        """The rows of the step that have no context and something to say; layers of a group share them."""
        known, prompts = self._step
        if known is not metadata:
            rows = rows_between(metadata.query_start_loc.tolist(), metadata.seq_lens.tolist())
            prompts = [row for row in rows if row.context == 0 and row.tokens >= LEAST_TOKENS]
            self._step = (metadata, prompts)
        return prompts


def watch(recorder: Recorder, on_start: Callable[[Any], Callable[[], None]] | None = None) -> Callable[[], None]:
    """Watch every attention layer that is made from now on in this process; call the result to stop.

    Layers with a sliding window, of an encoder, or that read another layer's cache are left out, since they are never
    pruned. `on_start` is shown vLLM's configuration when a worker is ready in this process; what it returns is
    called before that worker ends.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.worker.worker_base import WorkerBase

    made, begun = Attention.__init__, WorkerBase.__init__

    @functools.wraps(made)
    def watched(self: Any, *args: Any, **options: Any) -> None:
        check_config(get_current_vllm_config())
        made(self, *args, **options)
        if self.attn_backend.get_name() in _SILENT:
            raise refuse(
                f"{self.attn_backend.get_name()} does not tell where a request's queries are; calibrate with "
                "--attention-backend TRITON_ATTN"
            )
        shared = self.kv_sharing_target_layer_name is not None
        if self.attn_type == "decoder" and self.sliding_window is None and not shared:
            _observe(self.impl, extract_layer_index(self.layer_name), recorder)

    @functools.wraps(begun)
    def beginning(self: Any, *args: Any, **options: Any) -> None:
        begun(self, *args, **options)
        warm_up = self.compile_or_warm_up_model

        def warmed_up() -> Any:
            done = warm_up()
            recorder.start()
            if on_start is not None:
                _before_shutdown(self, on_start(self.vllm_config))
            return done

        self.compile_or_warm_up_model = warmed_up  # of this worker, whatever its class

    Attention.__init__, WorkerBase.__init__ = watched, beginning

    def undo() -> None:
        Attention.__init__, WorkerBase.__init__ = made, begun

    return undo


def _before_shutdown(worker: Any, call: Callable[[], None]) -> None:
    shutdown = worker.shutdown

    def both() -> None:
        call()
        shutdown()

    worker.shutdown = both


def check_config(config: Any) -> None:
    """Refuse an engine whose steps cannot all be watched from one process. `config` is vLLM's."""
    parallel = config.parallel_config
    ways = [f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "data", "decode_context", "prefill_context")]
    for name in ways:
        if getattr(parallel, name, 1) > 1:
            raise refuse(f"{name} above 1: each worker sees only its share; calibrate with 1 (any server may use it)")
    if not config.model_config.enforce_eager:
        raise refuse("CUDA graphs run without being seen; calibrate with --enforce-eager")


def _observe(impl: Any, layer: int, recorder: Recorder) -> None:
    recorder.layers.add(layer)
    forward = impl.forward

    @functools.wraps(forward)
    def observed(module: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, **rest: Any) -> Any:
        if attn_metadata is not None:
            recorder.add(layer, query, key, impl.scale, attn_metadata)
        return forward(module, query, key, value, kv_cache, attn_metadata, **rest)

    impl.forward = observed
