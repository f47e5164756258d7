"""How an optimizer keeps its state between steps: float32, bfloat16, or 8-bit codes with a scale per block.

Blocks of 256 elements lie along the last dimension only, and the last block of a row may be short: a state of shape
(..., cols) is `values` (..., cols) and `scales` (..., ceil(cols / 256)) float32, so that both are cut like the
parameter on any dimension but the last. The scale of a block is its largest magnitude.

- INT8: codes (uint8) of the dynamic map, signed or unsigned, nearest entry, where an unsigned number above 0 never
  becomes 0 (`memopt.optim.dynamic_map`). Spans seven decades within a block: for Adam's moments.
- INT8_LINEAR: q = round(127 x / scale), int8, half to even (8-bit Muon, arXiv 2509.23106, equation 4). For momentum.

Nothing is random. A block in which every magnitude is below 2^-126 becomes zero. A block with an infinity or a NaN is
kept as such: its scale is NaN and all of it decodes to NaN, whatever the codec of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import StrEnum

import torch

from memopt.optim.dynamic_map import dynamic_map, nearest_code

BLOCK = 256
"""Elements that share a scale; bitsandbytes' choice for optimizer states since 0.44."""
MIN_NUMEL = 4096
"""Smaller states stay float32, as in bitsandbytes: they are norms and biases, and weigh nothing."""
MIN_COLS = 64
"""Narrower states stay float32: a scale per row would cost more than a sixteenth of a code's byte each."""
_SMALLEST = torch.finfo(torch.float32).tiny
_LEVELS = 127


class Codec(StrEnum):
    """What a state is kept in."""

    FP32 = "float32"
    BF16 = "bfloat16"
    INT8 = "int8"
    INT8_LINEAR = "int8_linear"


_DTYPES = {
    Codec.FP32: torch.float32,
    Codec.BF16: torch.bfloat16,
    Codec.INT8: torch.uint8,
    Codec.INT8_LINEAR: torch.int8,
}
_BLOCKED = (Codec.INT8, Codec.INT8_LINEAR)


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scales of a state of `shape`, which must have a last dimension."""
    if not shape:
        raise ValueError("a scalar has no last dimension to cut into blocks; keep it in float32")
    return (*shape[:-1], -(-shape[-1] // BLOCK))


def allocate(
    codec: Codec, shape: Sequence[int], *, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and, for the 8-bit codecs, scales of a state that decodes to zeros."""
    scales = torch.zeros(scales_shape(shape), dtype=torch.float32, device=device) if codec in _BLOCKED else None
    return torch.zeros(tuple(shape), dtype=_DTYPES[codec], device=device), scales


def nbytes(codec: Codec, shape: Sequence[int]) -> int:
    """Bytes of values and scales of a state of `shape`."""
    scales = math.prod(scales_shape(shape)) * torch.float32.itemsize if codec in _BLOCKED else 0
    return math.prod(shape) * _DTYPES[codec].itemsize + scales


def storable(codec: Codec, shape: Sequence[int]) -> Codec:
    """`codec`, or FP32 where 8 bits are not worth it: fewer than 4096 elements, or rows of fewer than 64."""
    small = math.prod(shape) < MIN_NUMEL or (len(shape) > 0 and shape[-1] < MIN_COLS)
    return Codec.FP32 if codec in _BLOCKED and small else codec


def decode(codec: Codec, values: torch.Tensor, scales: torch.Tensor | None, *, signed: bool) -> torch.Tensor:
    """The state, (..., cols) float32, in new memory. `signed` chooses the map of INT8 and is ignored otherwise."""
    if codec not in _BLOCKED:
        return values.to(torch.float32, copy=True)
    assert scales is not None
    if codec == Codec.INT8:
        entries = dynamic_map(signed, values.device)
        decoded = entries.index_select(0, values.flatten().int()).view(values.shape)
    else:
        decoded = values.to(torch.float32).div_(_LEVELS)
    for part, scale in _parts(decoded, scales):
        part.mul_(scale)
    return decoded


def encode_(codec: Codec, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None, *, signed: bool) -> None:
    """Put `x` (..., cols) float32, left as it is, into `values` and `scales`, rounding to nearest.

    An unsigned state must not be negative. Temporaries of the 8-bit codecs take up to 16 bytes per element.
    """
    if codec not in _BLOCKED:
        values.copy_(x)
        return
    assert scales is not None
    normalised = torch.empty_like(x, memory_format=torch.contiguous_format)
    for (part, scale), (into, _) in zip(_parts(x, scales), _parts(normalised, scales), strict=True):
        # neither vector_norm, which is ten times slower on a CPU, nor abs, which would be another temporary
        largest = torch.maximum(part.amax(-1, keepdim=True), part.amin(-1, keepdim=True).neg_())
        finite = largest.isfinite()
        usable = finite & (largest >= _SMALLEST)
        # the reciprocal, rounded, is part of the format: the native kernels multiply, too
        torch.mul(part, torch.where(usable, largest.reciprocal(), 0.0), out=into)
        scale.copy_(largest.masked_fill_(~usable, 0.0).masked_fill_(~finite, math.nan))
    if codec == Codec.INT8:
        values.copy_(nearest_code(normalised, signed))
    else:
        values.copy_(normalised.mul_(_LEVELS).round_().nan_to_num_(0.0))


def _parts(x: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of the full blocks, (..., blocks, 256), and of the short ones at the ends of rows, (..., rest), each with
    its scales, (..., 1)."""
    blocks, rest = divmod(x.shape[-1], BLOCK)
    if blocks:
        yield x[..., : blocks * BLOCK].unflatten(-1, (blocks, BLOCK)), scales[..., :blocks].unsqueeze(-1)
    if rest:
        yield x[..., blocks * BLOCK :], scales[..., blocks:]
