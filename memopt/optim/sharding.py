"""Parameters that are cut over ranks (DTensor, as FSDP2 makes them): local rows, whole tensors, and the way back."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from memopt.errors import BadInput


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor."""
    return isinstance(tensor, DTensor)


def require_rows(name: str, tensor: torch.Tensor) -> None:
    """Refuse a layout other than whole copies and cuts along dimension 0, which is what blocks of states follow."""
    if isinstance(tensor, DTensor):
        for placement in tensor.placements:
            if not isinstance(placement, Replicate) and not (isinstance(placement, Shard) and placement.dim == 0):
                raise BadInput(
                    f"parameter {name} is laid out as {tensor.placements}; memopt's optimizer knows parameters that "
                    "are whole or cut along dimension 0 (fully_shard's default)"
                )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds: the storage itself, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the rows of all ranks. A collective: every rank must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wrap(mine: torch.Tensor, like: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """This rank's rows `mine` of a tensor of `shape`, cut as `like` is."""
    if not isinstance(like, DTensor):
        return mine
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def rows_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a `tensor` that is whole on every rank, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    cut: DTensor = replicated.redistribute(placements=like.placements)
    return cut.to_local()
