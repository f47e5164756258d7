"""A Hugging Face model directory on disk: found, checked, and its tensors read one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from memopt.errors import BadInput
from memopt.store.safetensors_stream import TensorSpec, dtype_from_code
from memopt.units import MiB

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "*.model",
    "*.tiktoken",
)
# A file stays mapped, its touched pages with it, until this much was read from it; opening again costs milliseconds.
REMAP_BYTES = 256 * MiB
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONVERT = (
    "convert it once on a machine that trusts it: "
    "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW_DIR), then give NEW_DIR"
)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def local_directory(path_or_id: str | os.PathLike[str]) -> Path | None:
    """The directory meant, or None where the text can only be the id of a hub repository.

    Raises BadInput for a file, an unreadable directory, or a path that does not exist.
    """
    text = os.fspath(path_or_id)
    path = Path(text).expanduser()
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise BadInput(f"{path} cannot be read; check its permissions")
        return path
    if path.exists():
        raise BadInput(f"{path} is a file; give the directory that holds config.json and the *.safetensors files")
    if isinstance(path_or_id, os.PathLike) or text.startswith((".", "~", "/")) or not _HUB_ID.fullmatch(text):
        raise BadInput(f"{text!r}: no such directory; give a model directory or the id of a hub repository")
    return None


def resolve_checkpoint(path_or_id: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local directory of a model; a hub id is downloaded first (safetensors, JSON and tokenizer files only).

    Without `weights` only the small files are.

    Raises BadInput when there is no such directory and the hub cannot give it.
    """
    directory = local_directory(path_or_id)
    if directory is not None:
        return directory
    from huggingface_hub import snapshot_download

    patterns = ["*.json", *TOKENIZER_FILES, *(["model*.safetensors"] if weights else [])]
    try:
        found = snapshot_download(os.fspath(path_or_id), allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as error:  # the hub client raises its HTTP library's errors, OSError and ValueError alike
        raise hub_trouble(path_or_id, error) from error
    return Path(found)


def hub_trouble(path_or_id: str | os.PathLike[str], error: Exception) -> BadInput:
    """One line for whatever kept a hub repository from being fetched."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BadInput(
        f"{os.fspath(path_or_id)!r} is no directory here and could not be fetched from the hub ({lines[0]}); "
        "check the name and the network, or download the model elsewhere and give its directory"
    )


def checkpoint_files(directory: Path, config: Any = None) -> list[Path]:
    """The safetensors files of a model directory, in reading order.

    Raises BadInput for pickle-only directories, missing shards and an index that points outside the directory.
    """
    explicit = getattr(config, "transformers_weights", None)
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if explicit:
        _refuse_separator(explicit, f"{directory}/config.json: transformers_weights")
        single = index = directory / explicit
    if single.is_file() and not single.name.endswith(".index.json"):
        return [single]
    if index.is_file() and index.name.endswith(".index.json"):
        return _files_of_index(index)
    if any(next(directory.glob(pattern), None) for pattern in _PICKLES):
        raise BadInput(f"{directory} holds pickled weights only, and unpickling can run any code; {_CONVERT}")
    raise BadInput(f"{directory} holds no {single.name} or {index.name}; give a directory made by save_pretrained")


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index} is not a safetensors index ({error!r}); fetch the checkpoint again") from error
    for name in names:
        _refuse_separator(name, f"{index}: shard")
        if not (index.parent / name).is_file():
            raise BadInput(f"{index.parent / name} is missing, {index.name} lists it; fetch the checkpoint again")
    return [index.parent / name for name in names]


def _refuse_separator(name: object, where: str) -> None:
    if not isinstance(name, str) or "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        raise BadInput(f"{where} {name!r} contains a path separator or is not a name; this checkpoint is not usable")


class TensorFiles:
    """The tensors of several safetensors files. One file is open at a time, and only what is asked for is touched.

    A tensor from `get` is a private copy-on-write view of the file's pages: it costs no anonymous memory until it is
    written to. Pages already read leave memory when their tensors are gone and the file is mapped anew. Not for use by
    several threads at once.
    """

    def __init__(self, files: list[Path]) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        self._touched_bytes = 0
        for file in files:
            reader = self._switch(file)
            for name in reader.keys():  # noqa: SIM118 (not a mapping)
                _refuse_separator(name, f"{file}: tensor")
                part = reader.get_slice(name)
                dtype = dtype_from_code(part.get_dtype())
                if dtype is None:
                    raise BadInput(f"{file}: tensor {name} has type {part.get_dtype()}, which torch cannot hold")
                self.specs[name] = TensorSpec(shape=tuple(part.get_shape()), dtype=dtype)
                self._file_of[name] = file
        self.close()

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def get(self, name: str) -> torch.Tensor:
        """The tensor as stored, on CPU. Raises BadInput when the file has become unreadable."""
        file = self._file_of[name]
        if self._touched_bytes >= REMAP_BYTES:
            self.close()
        try:
            tensor: torch.Tensor = self._switch(file).get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise BadInput(f"{file}: tensor {name} cannot be read ({error}); fetch the checkpoint again") from error
        self._touched_bytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Close the open file and let its pages leave the page cache; views handed out stay valid."""
        if self._open is None:
            return
        path, reader = self._open
        self._open = None
        self._touched_bytes = 0
        reader.__exit__(None, None, None)
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def _switch(self, file: Path) -> Any:
        if self._open is not None and self._open[0] == file:
            return self._open[1]
        self.close()
        try:
            opened: Any = safe_open(str(file), framework="pt", device="cpu")
            reader = opened.__enter__()
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file} is not a whole safetensors file ({error}); fetch the checkpoint again") from error
        self._open = (file, reader)
        return reader


def stored_embedding(directory: Path) -> torch.Tensor | None:
    """The input embedding (V, S) of a checkpoint as it is stored; None where no tensor has a name known for it."""
    files = TensorFiles(checkpoint_files(directory))
    try:
        name = next((each for each in files.specs if each.endswith(_EMBEDDINGS)), None)
        return None if name is None else files.get(name)
    finally:
        files.close()
