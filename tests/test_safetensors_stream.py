"""The streaming writer makes the very bytes of safetensors' own writer, and fails without leaving doubt."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memopt.errors import BadInput, StoreError
from memopt.store import safetensors_stream
from memopt.store.safetensors_stream import SafetensorsWriter, TensorSpec


def sample() -> dict[str, torch.Tensor]:
    return {
        "b": torch.randn(3, 5),
        "a": torch.randn(2, 2).bfloat16(),
        'quoted "é"': torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "half": torch.ones(3).half(),
        "double": torch.ones(3).double(),
        "flags": torch.ones(3) > 0,
        "small": torch.ones(4).to(torch.float8_e4m3fn),
        "turned": torch.randn(4, 6).T,
    }


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_bytes_equal_the_reference_writer(
    tmp_path: Path, metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_stream, "PIECE_BYTES", 7)
    monkeypatch.setattr(safetensors_stream, "FLUSH_BYTES", 50)
    tensors = sample()
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, tmp_path / "reference", metadata=metadata or None)
    with SafetensorsWriter(tmp_path / "streamed", specs_of(tensors), metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        assert writer.complete
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "reference").read_bytes()


def test_misuse_is_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3)}
    writer = SafetensorsWriter(tmp_path / "x", specs_of(tensors))
    with pytest.raises(ValueError, match="announced as"):
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="announced as"):
        writer.write("a", torch.zeros(2).half())
    writer.write("a", tensors["a"])
    with pytest.raises(KeyError, match="already written"):
        writer.write("a", tensors["a"])
    with pytest.raises(StoreError, match="1 tensors were never written"):
        writer.close()
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "x", specs_of(tensors))
    with pytest.raises(BadInput, match="complex128"):
        TensorSpec(shape=(1,), dtype=torch.complex128)


def test_full_disk_names_the_file_and_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match=r"x: No space left on device writing .* at offset 0; .* are free there"):
            SafetensorsWriter(tmp_path / "x", specs_of(sample()))
    writer = SafetensorsWriter(tmp_path / "y", {"a": TensorSpec(shape=(4,), dtype=torch.float32)})
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"16 B at offset \d+"):
        writer.write("a", torch.zeros(4))
    writer.abandon()


def test_a_file_system_without_preallocation_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    test_bytes_equal_the_reference_writer(tmp_path, {}, monkeypatch)
