"""Writing a checkpoint that `from_pretrained` loads, one group of tensors at a time."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memopt.errors import BadInput, StoreError
from memopt.patches.hf_conversions import Group, plan_saving
from memopt.patches.hf_files import INDEX_FILE, SINGLE_FILE, TOKENIZER_FILES, resolve_checkpoint
from memopt.store.safetensors_stream import SafetensorsWriter, TensorSpec

MAX_SHARD_BYTES = 5 * 10**9  # the hub client's default; smaller files upload and resume better
_MARKER = ".memopt-unfinished"


def write_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module,
    config: Any,
    tensors: Callable[[str], torch.Tensor],
    *,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_from: Any = None,
    generation_config: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `model` (its parameters may be on meta) to `directory`, the values fetched one by one from `tensors`.

    `tensors(name)` gives a parameter of `model.named_parameters()` on CPU; `dtypes[name]` is its type on disk (the
    model's own where absent). Persistent buffers are the model's. Tensor names are those of the checkpoint that
    a `CheckpointReader` was opened on for this model, else transformers' standard ones; a tied weight is written once.
    Held at a time: the tensors of one conversion and what they become. `progress(written_bytes, total_bytes)` is called
    after each tensor. `tokenizer_from`: a tokenizer to save, or a model directory or hub id to copy the files of.
    The directory appears whole or not at all; it must not exist or be empty.
    Raises BadInput when it is not, StoreError when the disk refuses, and what `tensors` raises.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{target} exists already; name another output directory or remove it first")
    if max_shard_bytes <= 0:
        raise BadInput(f"max_shard_bytes is {max_shard_bytes}; give a positive size")
    source = _Source(model, tensors, dtypes)
    groups = plan_saving(model, source.specs)
    try:
        with _unfinished(target) as place:
            _write_weights(place, model, groups, source, max_shard_bytes, progress)
            _write_configs(place, model, config, generation_config, source)
            _write_tokenizer(place, tokenizer_from)
    except OSError as error:
        raise StoreError(f"{error.filename or target}: {error.strerror or error} writing the checkpoint") from error


class _Source:
    """What is to be written: its names after transformers dropped tied duplicates, its specs, and the values."""

    def __init__(self, model: Any, tensors: Callable[[str], torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self._tensors = tensors
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        self._canonical = {
            name: canonical[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self.specs: dict[str, TensorSpec] = {}
        for name, tensor in _kept(model).items():
            dtype = dtypes.get(self._canonical.get(name, name), tensor.dtype)
            self.specs[name] = TensorSpec(shape=tuple(tensor.shape), dtype=dtype)

    def fetch(self, name: str) -> torch.Tensor:
        tensor = self._buffers[name] if name in self._buffers else self._tensors(self._canonical[name])
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: the model has the shape {spec.shape}, its value {tuple(tensor.shape)}")
        return tensor.detach().to(device="cpu", dtype=spec.dtype)

    def main_dtype(self) -> torch.dtype:
        """The floating type that most bytes are stored in."""
        weight: Counter[torch.dtype] = Counter()
        for spec in self.specs.values():
            if spec.dtype.is_floating_point:
                weight[spec.dtype] += spec.nbytes
        return weight.most_common(1)[0][0] if weight else torch.float32


def _kept(model: Any) -> dict[str, torch.Tensor]:
    """The state dict as save_pretrained writes it: no ignored names, no second names of tied weights."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    # told apart by the parameter objects where the tensors are on meta
    kept: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(state, model)
    return kept


@dataclass(frozen=True, kw_only=True)
class _Shard:
    file: str
    specs: Mapping[str, TensorSpec]


def _shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[_Shard]:
    """Fill files in the order of `specs`; a tensor above the limit has a file of its own."""
    parts: list[dict[str, TensorSpec]] = []
    room = 0
    for name, spec in specs.items():
        if not parts or spec.nbytes > room:
            parts.append({})
            room = max_shard_bytes
        parts[-1][name] = spec
        room -= spec.nbytes
    if len(parts) <= 1:
        return [_Shard(file=SINGLE_FILE, specs=specs)]
    return [
        _Shard(file=f"model-{index:05d}-of-{len(parts):05d}.safetensors", specs=part)
        for index, part in enumerate(parts, start=1)
    ]


def _write_weights(
    directory: Path,
    model: Any,
    groups: Sequence[Group],
    source: _Source,
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    specs = {name: spec for group in groups for name, spec in group.targets.items()}
    total_bytes = sum(spec.nbytes for spec in specs.values())
    shards = _shards(specs, max_shard_bytes)
    file_of = {name: shard.file for shard in shards for name in shard.specs}
    written_bytes = 0
    with contextlib.ExitStack() as stack:
        writers = {
            shard.file: stack.enter_context(
                SafetensorsWriter(directory / shard.file, shard.specs, metadata={"format": "pt"})
            )
            for shard in shards
        }
        for group in groups:
            made = group.convert(model, source.fetch)
            for name in list(made):
                tensor = made.pop(name)
                writer = writers[file_of[name]]
                writer.write(name, tensor)
                if writer.complete:
                    writer.close()
                written_bytes += tensor.nbytes
                if progress is not None:
                    progress(written_bytes, total_bytes)
                del tensor
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), "total_size": total_bytes},
            "weight_map": file_of,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX_FILE).write_text(text, encoding="utf-8")


def _write_configs(directory: Path, model: Any, config: Any, generation_config: Any, source: _Source) -> None:
    config = copy.deepcopy(config)
    dtype = str(source.main_dtype()).removeprefix("torch.")
    for part in [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]:
        if part is not None:
            part.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if generation_config is None and model.can_generate():
        generation_config = model.generation_config
    if generation_config is not None:
        # not save_pretrained: it refuses settings that older checkpoints came with, after hours of training
        generation_config.to_json_file(directory / "generation_config.json", use_diff=True)


def _write_tokenizer(directory: Path, tokenizer_from: Any) -> None:
    if tokenizer_from is None:
        return
    if hasattr(tokenizer_from, "save_pretrained"):
        tokenizer_from.save_pretrained(os.fspath(directory))
        return
    origin = resolve_checkpoint(tokenizer_from, weights=False)
    for pattern in TOKENIZER_FILES:
        for file in origin.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
    templates = origin / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, directory / templates.name)


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its name when the block ends well, and is removed when it does not.

    One left behind by a killed process is removed first: the marker says it is ours, its lock that nobody is at it.
    """
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f".{glob.escape(target.name)}.unfinished-*"):
        with contextlib.suppress(OSError), open(left / _MARKER, "r+b") as marker:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    place = parent / f".{target.name}.unfinished-{secrets.token_hex(4)}"
    place.mkdir()
    try:
        with open(place / _MARKER, "xb") as marker:
            fcntl.flock(marker, fcntl.LOCK_EX)
            yield place
            (place / _MARKER).unlink()
            for folder, _, files in os.walk(place):
                for name in (*files, "."):
                    _sync(os.path.join(folder, name))
            os.rename(place, target)
        _sync(parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _sync(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
