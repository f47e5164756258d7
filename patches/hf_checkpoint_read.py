"""Reading a checkpoint a few parameters at a time, whatever transformers makes of its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from memopt.errors import BadInput
from memopt.patches.hf_conversions import Group, plan_loading
from memopt.patches.hf_files import TensorFiles, checkpoint_files, resolve_checkpoint


class CheckpointReader:
    """The tensors of a safetensors checkpoint under the names of `model`'s parameters and persistent buffers.

    `model` is a Hugging Face model whose parameters may be on meta (`build_skeleton`). Opening reads the headers only,
    one file after the other. A tied parameter answers to each of its names; the one to use is that of
    `model.named_parameters()`.
    Raises BadInput when the directory, its index or a header is unusable; `check` looks at the rest.
    """

    def __init__(self, path_or_id: str | os.PathLike[str], model: nn.Module) -> None:
        self.directory = resolve_checkpoint(path_or_id)
        self._model: Any = model
        self._files = TensorFiles(checkpoint_files(self.directory, self._model.config))
        self._plan = plan_loading(model, self._files.specs)
        self._expected, self._names = _expected(model)

    def check(self) -> list[str]:
        """Compare the checkpoint with the model; returns the checkpoint's tensors that the model has no use for.

        Reads no tensor, except where both names of a tied parameter are stored.
        Raises BadInput: a parameter is missing, has another shape, cannot be converted, or is tied by the
        configuration to one that the checkpoint stores with other values.
        """
        report = SimpleNamespace(
            missing_keys={name for name in self._expected if self._stored_name(name) is None},
            unexpected_keys=set(self._plan.unexpected),
        )
        parameters = {name for name, _ in self._model.named_parameters()}
        missing = sorted(report.missing_keys & parameters)
        # the model's own lists of what may be absent or left over; an absent parameter is never harmless here
        self._model._adjust_missing_and_unexpected_keys(report)
        missing += sorted(report.missing_keys - parameters)
        for name in missing:
            self._refuse_broken(name)
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise BadInput(
                f"{self.directory}: {len(missing)} of {len(self._expected)} tensors of {type(self._model).__name__} "
                f"are missing ({some}); fetch the checkpoint again, or check that config.json belongs to it"
            )
        for name, expected in self._expected.items():
            self._check_tensor(name, expected)
        return sorted(report.unexpected_keys)

    def names(self) -> list[str]:
        """Every parameter and persistent buffer of the model that the checkpoint holds, by its canonical name."""
        return [name for name in self._expected if self._stored_name(name) is not None]

    def dtype(self, name: str) -> torch.dtype:
        """The type `read` gives `name` in: the checkpoint's own. Raises BadInput when it is not there."""
        stored, group = self._group(name)
        return group.targets[stored].dtype

    def nbytes(self, name: str) -> int:
        """Bytes of `name` in the checkpoint's own type."""
        stored, group = self._group(name)
        return group.targets[stored].nbytes

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors `names` on CPU, in the checkpoint's own types, with transformers' conversions applied.

        A tensor stored as it is wanted is a copy-on-write view of the file, free of anonymous memory. A converted one
        is made of new memory; while it is made its sources, or an intermediate of its size, exist beside it.
        Raises BadInput for a name that the checkpoint does not hold and for an unreadable file.
        """
        wanted: dict[int, tuple[Group, dict[str, str]]] = {}
        for name in names:
            stored, group = self._group(name)
            wanted.setdefault(id(group), (group, {}))[1][name] = stored
        # file after file, so that each is opened once
        order = sorted(wanted.values(), key=lambda item: self._files.file_of(item[0].sources[0][1]))
        made: dict[str, torch.Tensor] = {}
        for group, stored_of in order:
            tensors = group.convert(self._model, self._files.get)
            for name, stored in stored_of.items():
                made[name] = _own(tensors[stored])
            del tensors
        return {name: made[name] for name in names}

    def load_buffers(self) -> list[str]:
        """Copy the checkpoint's persistent buffers into the model's (router biases, for one); returns their names."""
        stored = set(self.names())
        buffers = {name: buffer for name, buffer in self._model.named_buffers() if name in stored}
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(self.read([name])[name])
        return list(buffers)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stored_name(self, name: str) -> str | None:
        return next((other for other in self._names.get(name, ()) if other in self._plan.group_of), None)

    def _group(self, name: str) -> tuple[str, Group]:
        stored = self._stored_name(name)
        if stored is None:
            self._refuse_broken(name)
            raise BadInput(f"{self.directory} holds no tensor for {name}; check that config.json belongs to it")
        return stored, self._plan.group_of[stored]

    def _refuse_broken(self, name: str) -> None:
        reason = self._plan.broken.get(name)
        if reason is not None:
            raise BadInput(
                f"{self.directory}: {name} cannot be made of the tensors there ({reason}); fetch the checkpoint again"
            )

    def _check_tensor(self, name: str, expected: torch.Tensor) -> None:
        stored = self._stored_name(name)
        if stored is None:
            return  # a buffer that the model allows to be absent
        spec = self._plan.group_of[stored].targets[stored]
        if spec.shape != tuple(expected.shape):
            raise BadInput(
                f"{self.directory}: {name} is {spec.shape} in the checkpoint and {tuple(expected.shape)} by "
                "config.json; they do not belong together (a changed vocab_size, for one)"
            )
        if spec.dtype.is_floating_point != expected.dtype.is_floating_point:
            raise BadInput(
                f"{self.directory}: {name} is {spec.dtype} in the checkpoint where the model has {expected.dtype}; "
                "give a checkpoint that is not quantised"
            )
        for other in self._names[name]:
            if other != stored and other in self._plan.group_of and not self._same(stored, other):
                raise BadInput(
                    f"{self.directory}: config.json ties {stored} to {other}, the checkpoint stores different values; "
                    'set "tie_word_embeddings": false in config.json'
                )

    def _same(self, one: str, other: str) -> bool:
        first = self._plan.group_of[one].convert(self._model, self._files.get)[one]
        second = self._plan.group_of[other].convert(self._model, self._files.get)[other]
        return first.dtype == second.dtype and torch.equal(first, second)


def _expected(model: nn.Module) -> tuple[dict[str, torch.Tensor], Mapping[str, tuple[str, ...]]]:
    """What a checkpoint must hold, by canonical name, and for each name of a tensor all its names, canonical first."""
    persistent = set(model.state_dict())
    shared: dict[int, list[str]] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in _named_tensors(model):
        if name in persistent:
            names = shared.setdefault(id(tensor), [])
            names.append(name)
            if len(names) == 1:
                expected[name] = tensor
    by_name = {name: (name, *(n for n in names if n != name)) for names in shared.values() for name in names}
    return expected, by_name


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and not keeping a larger storage alive (a chunk of a fused tensor would)."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()
