"""Hugging Face checkpoints without ever holding one: configuration, skeleton, reading and writing by streaming."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from memopt.errors import BadInput
from memopt.patches.hf_checkpoint_read import CheckpointReader
from memopt.patches.hf_checkpoint_write import write_checkpoint
from memopt.patches.hf_files import checkpoint_files, hub_trouble, local_directory, resolve_checkpoint
from memopt.patches.hf_init import build_skeleton, decay_names, random_init

__all__ = [
    "CheckpointReader",
    "build_skeleton",
    "decay_names",
    "load_config",
    "load_generation_config",
    "random_init",
    "resolve_checkpoint",
    "write_checkpoint",
]


def load_config(path_or_id: str | os.PathLike[str], *, weights: bool = True) -> Any:
    """The transformers configuration of a model directory or hub id; the repository's own code is never run.

    With `weights` (not for a random start) a local directory must also hold safetensors weights.
    Raises BadInput: no such directory, not a model directory, a model type this transformers does not know, quantised
    weights, pickled weights only.
    """
    from transformers import AutoConfig

    directory = local_directory(path_or_id)
    if directory is not None and not (directory / "config.json").is_file():
        raise BadInput(f"{directory} holds no config.json; give a directory made by save_pretrained")
    try:
        config = AutoConfig.from_pretrained(os.fspath(directory or path_or_id), trust_remote_code=False)
    except Exception as error:  # transformers lets KeyError, TypeError and its validator's errors out as well
        if directory is None:
            raise hub_trouble(path_or_id, error) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"{directory / 'config.json'} cannot be used ({lines[0]})") from error
    _refuse_quantised(config, os.fspath(path_or_id))
    if directory is not None and weights:
        checkpoint_files(directory, config)
    return config


def load_generation_config(path_or_id: str | os.PathLike[str]) -> Any:
    """The generation settings stored beside a checkpoint, to hand to `write_checkpoint`; None where there are none."""
    from transformers import GenerationConfig

    directory: Path = resolve_checkpoint(path_or_id, weights=False)
    if not (directory / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(os.fspath(directory))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{directory / 'generation_config.json'} cannot be used ({error})") from error


def _refuse_quantised(config: Any, where: str) -> None:
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        method = getattr(part, "quantization_config", None)
        if method:
            kind = method.get("quant_method", "unknown") if isinstance(method, dict) else type(method).__name__
            raise BadInput(
                f"{where}: the weights are quantised ({kind}), and memopt trains unquantised ones; "
                "give the original checkpoint in float32 or bfloat16"
            )
