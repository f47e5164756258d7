"""Which key channels each attention layer of a vLLM worker keeps: the file, cut for the rank, on the layer's device."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memopt.errors import BadInput
from memopt.kv.channel_file import ChannelSets, load_channels
from memopt.kv.channels import complement
from memopt.patches.vllm_config import ThinKeys

_ATTRIBUTE = "_memopt_channels"


@dataclass(frozen=True, slots=True)
class LayerChannels:
    """Channel numbers of one layer's own key-value heads: the kept ones, then the dropped ones, each ascending."""

    order: torch.Tensor  # (H_kv, D) int64
    keep: int

    @property
    def kept(self) -> torch.Tensor:
        """(H_kv, D_kept)."""
        return self.order[:, : self.keep]

    @property
    def dropped(self) -> torch.Tensor:
        """(H_kv, D - D_kept)."""
        return self.order[:, self.keep :]


@functools.lru_cache(maxsize=4)
def read_file(path: Path) -> ChannelSets:
    """The channel file, read once per process."""
    return load_channels(path)


def sets_of(keys: ThinKeys) -> ChannelSets:
    """The channel sets that a server asked for.

    Raises:
        BadInput: no such file, damaged, or calibrated for another share than `key_keep`.
    """
    assert keys.channels is not None
    sets = read_file(keys.channels)
    if abs(sets.keep - keys.key_keep) > 1e-9:
        raise BadInput(
            f"{keys.channels} was calibrated for a share of {sets.keep:g}, not {keys.key_keep:g}; give --key-keep "
            f"{sets.keep:g}, or calibrate again"
        )
    return sets


def kept_width(keys: ThinKeys, head_size: int) -> int:
    """Key channels that a head of `head_size` keeps in its pages."""
    return sets_of(keys).count if keys.thins else head_size


def thin_spec(keys: ThinKeys, spec: Any) -> Any:
    """A layer's page with thin keys and whole values: vLLM's block manager counts blocks by it."""
    keep = kept_width(keys, spec.head_size)
    return spec if keep == spec.head_size else replace(spec, head_size=keep)


def channels_of(layer: Any, keys: ThinKeys, device: torch.device) -> LayerChannels:
    """The channels of an attention layer, kept on the layer after the first call.

    That call comes from the profiling run or the first step, before any graph is captured. Raises BadInput when the
    file has nothing for the layer.
    """
    found = getattr(layer, _ATTRIBUTE, None)
    if found is None:
        found = _cut(layer, keys, device)
        setattr(layer, _ATTRIBUTE, found)
    assert isinstance(found, LayerChannels)
    return found


def heads_of_rank(total: int, local: int, world: int, rank: int) -> slice:
    """The key-value heads of a tensor-parallel rank: its share of them, or one of several copies of one head."""
    start = rank * local if total >= world else rank * total // world
    return slice(start, start + local)


def kept_of(layer: Any, keys: ThinKeys) -> torch.Tensor:
    """The channels an attention layer keeps, of all ranks' heads, (H_kv, D_kept). Raises BadInput without any."""
    from vllm.model_executor.models.utils import extract_layer_index

    kept = sets_of(keys).keys.get(extract_layer_index(layer.layer_name))
    if kept is None:
        raise BadInput(f"{keys.channels} has no channels for {layer.layer_name}; calibrate again")
    return kept


def _cut(layer: Any, keys: ThinKeys, device: torch.device) -> LayerChannels:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    width, local = layer.head_size, layer.num_kv_heads
    if not keys.thins:
        kept = torch.arange(width).expand(local, width)
    else:
        world, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        every = kept_of(layer, keys)
        kept = every[heads_of_rank(len(every), local, world, rank)]
    return LayerChannels(torch.cat((kept, complement(kept, width)), dim=1).to(device), kept.shape[1])
