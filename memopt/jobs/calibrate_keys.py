"""`memopt calibrate-keys`: choose key channels once, on data, for caches that cannot wait for each prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from memopt.errors import BadInput
from memopt.jobs.data_sources import read_records
from memopt.jobs.tokenizing import Encoder, checked_vocabulary, load_tokenizer
from memopt.kv.channel_file import ChannelSets, save_channels
from memopt.kv.channels import choose, kept_count
from memopt.kv.score_sums import LEAST_TOKENS, MULTIPLE
from memopt.patches.hf_files import resolve_checkpoint

Engine = Literal["hf", "vllm"]


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What was written, and from what."""

    path: Path
    sets: ChannelSets
    windows: int


def calibrate_keys(
    model: str,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: float = 0.6,
    windows: int = 128,
    seq_len: int = 1024,
    observation: int | None = None,
    multiple: int = MULTIPLE,
    device: str | None = None,
    engine: Engine = "hf",
    engine_options: Mapping[str, Any] | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Calibrated:
    """Average what channels are worth over windows of `data`, choose `keep` of every KV head's, write `out`.

    The choice is that of memopt.kv.joint, as in a cache that chooses for each prompt, over all windows together.

    The first `windows` windows of at most `seq_len` tokens are used. `observation`: only that many of each window's
    last queries count. The count of channels is rounded up to `multiple`. `on_window`
    hears the number of windows done and their tokens in all. `engine`: "hf" runs the model in transformers on `device`;
    "vllm" serves the windows with vLLM's stock attention in this process, where it computes, and takes more of its
    engine's options from `engine_options`.

    Raises:
        BadInput: settings, model or data that cannot be used; data without text.
    """
    for name, value in (("windows", windows), ("seq_len", seq_len - LEAST_TOKENS + 1), ("multiple", multiple)):
        if value < 1:
            raise BadInput(f"{name} is too small; {name} >= {LEAST_TOKENS if name == 'seq_len' else 1}")
    if observation is not None and observation < 1:
        raise BadInput(f"observation = {observation}: at least one query must choose the channels")
    if engine not in get_args(Engine):
        raise BadInput(f"engine: {engine!r} is not one of {', '.join(get_args(Engine))}")
    if engine == "vllm" and device is not None:
        raise BadInput(f"device {device}: vLLM computes where its build does; leave --device out with --engine vllm")
    kept_count(8, keep)  # the range, before a model is loaded
    path = Path(out)
    if not path.parent.is_dir():
        raise BadInput(f"--out {path}: no such directory {path.parent}; make it first")
    if path.is_dir():
        raise BadInput(f"--out {path}: is a directory; name a file")
    directory = resolve_checkpoint(model)
    tokenizer = load_tokenizer(str(directory))
    loaded = _load(directory, device) if engine == "hf" else None
    used, seen = 0, 0

    def count(tokens: int) -> None:
        nonlocal used, seen
        used, seen = used + 1, seen + tokens
        if on_window is not None:
            on_window(used, seen)

    vocabulary = int(loaded.get_input_embeddings().weight.shape[0]) if loaded is not None else _vocabulary(directory)
    cut = _windows(tokenizer, data, vocabulary, seq_len, windows)
    try:
        # imported late, as transformers and vLLM are
        if loaded is not None:
            from memopt.patches import hf_calibrate

            found = hf_calibrate.score_channels(loaded, cut, observation=observation, on_window=count)
        else:
            from memopt.patches import vllm_score

            found = vllm_score.score_channels(
                directory,
                cut,
                seq_len=seq_len,
                observation=observation,
                on_window=count,
                options=dict(engine_options or {}),
            )
    except BadInput as error:
        if used or "no text" not in str(error):
            raise
        raise BadInput(f"data {data}: {error} (at least {LEAST_TOKENS} tokens in one document)") from error
    identity, scores, tokens = found
    wanted = kept_count(identity.head_dim, keep, multiple=multiple)
    sets = ChannelSets(
        model=identity, keep=keep, keys={layer: choose(mean, wanted) for layer, mean in scores.items()}, tokens=tokens
    )
    save_channels(path, sets)
    return Calibrated(path=path, sets=sets, windows=used)


def _windows(
    tokenizer: Any, data: str | os.PathLike[str], vocabulary: int, seq_len: int, limit: int
) -> Iterator[Tensor]:
    """Windows of one document each, in order; the rest of a document is a window if it is long enough."""
    given, document = 0, torch.empty(0, dtype=torch.long)
    for piece in checked_vocabulary(Encoder(tokenizer).encode(read_records(data)), vocabulary):
        if piece.first:
            if len(document) >= LEAST_TOKENS:
                yield document
                given += 1
            document = document[:0]
        document = torch.cat([document, torch.as_tensor(piece.ids, dtype=torch.long)])
        while len(document) >= seq_len and given < limit:
            yield document[:seq_len]
            document, given = document[seq_len:], given + 1
        if given >= limit:
            return
    if len(document) >= LEAST_TOKENS:
        yield document


def _vocabulary(directory: Path) -> int:
    from memopt.patches.hf_checkpoint import load_config

    return int(load_config(str(directory)).get_text_config(decoder=True).vocab_size)


def _load(directory: Path, device: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
        return model.to(place).eval()
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{directory}: the model cannot be loaded on {place} ({first})") from error
