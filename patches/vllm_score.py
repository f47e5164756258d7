"""Scores of key channels from an offline vLLM engine in this process: stock attention, whole keys."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memopt.errors import BadInput
from memopt.kv.channel_file import ModelIdentity
from memopt.patches.hf_identity import identity_of, stored_digest
from memopt.patches.vllm_calibrate import Recorder, watch

_AT_ONCE = 8
"""Windows that are computed together, where the cache holds them; more would add nothing."""
_STEP_TOKENS = 2048
_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


def score_channels(
    model: Path,
    windows: Iterable[Tensor],  # token ids (T,), one prompt each
    *,
    seq_len: int,  # no window is longer
    observation: int | None = None,
    on_window: Callable[[int], None] | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[ModelIdentity, dict[int, Tensor], int]:
    """What memopt.patches.hf_calibrate.score_channels gives, computed by vLLM.

    `options`: more of its engine's.

    The engine runs in this process (the layers are watched here) on one device, and lives until the process ends.

    Raises:
        BadInput: no vLLM, no window, options with which not all can be seen, or scores that are not finite.
    """
    recorder, tokens = Recorder(observation=observation), 0
    if torch.cuda.is_available():
        options = {"attention_backend": "TRITON_ATTN"} | (options or {})  # tells where each request's queries are
    with _in_this_process():
        try:
            from vllm import LLM, SamplingParams
            from vllm.inputs import TokensPrompt
        except ImportError as error:
            raise BadInput("engine vllm: vLLM is not installed here; pip install vllm, or use engine hf") from error
        undo = watch(recorder)
        try:
            engine = LLM(
                model=str(model),
                max_model_len=seq_len + 1,  # vLLM does not take a prompt without room for an answer
                # a window's queries and keys are all seen where it is computed whole, in one step
                max_num_batched_tokens=max(_STEP_TOKENS, seq_len + 1),
                enable_chunked_prefill=False,
                enable_prefix_caching=False,
                enforce_eager=True,
                disable_log_stats=True,
                max_num_seqs=_AT_ONCE,
                **(options or {}),
            )
            cache = engine.llm_engine.vllm_config.cache_config
            # as many as the cache holds: a prompt that made room for another would be computed, and counted, twice
            blocks = -(-(seq_len + 1) // cache.block_size)
            together = max(1, min(_AT_ONCE, (cache.num_gpu_blocks - 1) // blocks))
            sampling, rest = SamplingParams(max_tokens=1, temperature=0, detokenize=False), iter(windows)
            while group := list(islice(rest, together)):
                given = [TokensPrompt(prompt_token_ids=window.tolist()) for window in group]
                engine.generate(given, sampling, use_tqdm=False)
                for window in group:
                    tokens += len(window)
                    if on_window is not None:
                        on_window(len(window))
            config = engine.llm_engine.vllm_config.model_config.hf_config
        finally:
            undo()
    scores, heard = recorder.scores()
    if heard != tokens:
        raise BadInput(f"{heard} of {tokens} tokens were seen in vLLM's attention; calibrate with engine hf")
    return identity_of(config, weights=stored_digest(model)), scores, tokens


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    before = os.environ.get(_IN_PROCESS)
    os.environ[_IN_PROCESS] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_IN_PROCESS]
        else:
            os.environ[_IN_PROCESS] = before
