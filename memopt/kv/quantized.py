"""Rows of a cache in 8 or 4 bits, after KIVI (arXiv 2402.02750): keys per channel, values per token.

Keys have channels that are large for every token, so a scale per channel over a group of tokens loses least; values
have no such channels, and get a scale per token over a group of channels. The newest rows stay whole until a group is
full. Codes are asymmetric: x ≈ low + scale · code, with `low` and `scale` as they are stored, so that their own
rounding costs nothing but range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from memopt.errors import BadInput
from memopt.kv.rows import STEP, Rows

GROUP = 32
"""Elements that share a scale, KIVI's choice: 4 bytes of scale and low for 32 codes are one more bit each."""
_PIECE = 1024
"""Rows decoded at a time: what attention holds of the decoded cache at once."""


class Along(Enum):
    """What a group runs over."""

    TOKENS = "tokens"  # keys
    CHANNELS = "channels"  # values


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How rows are coded: 8 or 4 bits, groups along tokens or channels."""

    bits: int
    along: Along
    group: int = GROUP

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise BadInput(f"bits = {self.bits}: rows are stored in 4 or 8 bits")

    def code_width(self, width: int) -> int:
        """Bytes of codes of a row of `width` elements."""
        return width * self.bits // 8

    def channel_group(self, width: int) -> int:
        """Channels that share a scale in a row of `width`: the largest of 32, 16, 8, 4, 2 that divides it."""
        return next(group for group in (self.group, 16, 8, 4, 2, 1) if width % group == 0)

    def scale_shape(self, rows: int, width: int) -> tuple[int, int]:
        """(rows, width) of the scales of `rows` x `width` elements."""
        if self.along is Along.TOKENS:
            return rows // self.group, width
        return rows, width // self.channel_group(width)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of `scale` and `low`: two bytes; bfloat16 where the model's own range needs it."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def quantize(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and lows of x (B, K, N, C); with groups of tokens, N is a multiple of the group.

    Codes are (B, K, N, C · bits / 8) uint8, two to a byte for 4 bits; scales and lows as `Codec.scale_shape` says.
    """
    batch, heads, rows, width = x.shape
    grouped = _grouped(x.float().contiguous(), codec)
    dim = 3 if codec.along is Along.TOKENS else 4
    low, high = grouped.aminmax(dim=dim, keepdim=True)
    stored = scale_dtype(x.dtype)
    low = low.to(stored)
    top = 2**codec.bits - 1
    # a group of equal elements has scale 0: any code decodes to `low`
    scale = ((high - low.float()) / top).clamp(min=0.0).to(stored)
    codes = ((grouped - low.float()) / scale.float().clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, top)
    codes = codes.to(torch.uint8).view(batch, heads, rows, width)
    if codec.bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    shape = (batch, heads, *codec.scale_shape(rows, width))
    return codes.contiguous(), scale.view(shape), low.view(shape)


def dequantize(codes: Tensor, scale: Tensor, low: Tensor, codec: Codec, dtype: torch.dtype) -> Tensor:
    """The reverse of `quantize`, as (B, K, N, C) of `dtype`."""
    if codec.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    grouped = _grouped(codes.to(dtype), codec)
    dim = 3 if codec.along is Along.TOKENS else 4
    return torch.addcmul(low.to(dtype).unsqueeze(dim), grouped, scale.to(dtype).unsqueeze(dim)).view(codes.shape)


def _grouped(x: Tensor, codec: Codec) -> Tensor:
    """(B, K, N / g, g, C) for groups of tokens, (B, K, N, C / g, g) for groups of channels."""
    if codec.along is Along.TOKENS:
        return x.view(*x.shape[:2], -1, codec.group, x.shape[3])
    return x.view(*x.shape[:3], -1, codec.channel_group(x.shape[3]))


class QuantizedRows:
    """Rows whose older part is coded; the newest `whole` to `whole + group - 1` rows are kept as they came."""

    def __init__(self, like: Tensor, width: int, codec: Codec, *, whole: int) -> None:
        if codec.bits == 4 and width % 2:
            raise BadInput(f"4 bits need an even number of channels, not {width}")
        self._codec, self._dtype, self._width, self._whole = codec, like.dtype, width, whole
        batch, heads, device = like.shape[0], like.shape[1], like.device
        self._codes = Rows(batch, heads, codec.code_width(width), dtype=torch.uint8, device=device)
        step, columns = codec.scale_shape(STEP, width)
        kind = scale_dtype(like.dtype)
        self._scales = Rows(batch, heads, columns, dtype=kind, device=device, step=step)
        self._lows = Rows(batch, heads, columns, dtype=kind, device=device, step=step)
        self._fresh = Rows.like(like, width)

    @property
    def length(self) -> int:
        """Rows in all."""
        return self._codes.length + self._fresh.length

    def append(self, rows: Tensor) -> None:
        """Add rows (B, K, N, C); whole groups that are old enough are coded.

        Many rows at once are coded straight from `rows`, so that no whole copy of them is made.
        """
        ready = self._fresh.length + rows.shape[2] - self._whole
        count = max(0, ready) // self._codec.group * self._codec.group
        old = min(count, self._fresh.length)
        if count > old:
            head = rows[:, :, : count - old]
            self._encode(torch.cat([self._fresh.view()[:, :, :old], head], 2) if old else head)
        elif old:
            self._encode(self._fresh.view()[:, :, :old])
        if old:
            self._fresh.drop_front(old)
        self._fresh.append(rows[:, :, count - old :])

    def segments(self) -> Iterator[Tensor]:
        """The rows in order: the coded ones decoded piece by piece, then the whole ones."""
        for start in range(0, self._codes.length, _PIECE):
            yield self._decode(start, min(start + _PIECE, self._codes.length))
        if self._fresh.length:
            yield self._fresh.view()

    def view(self) -> Tensor:
        """All rows decoded, (B, K, length, C); a copy."""
        return torch.cat(list(self.segments()), 2)

    def crop(self, rows: int) -> None:
        """Forget the last `rows`.

        Raises:
            BadInput: some of them are coded already.
        """
        if rows > self._fresh.length:
            raise BadInput(
                f"cannot remove {rows} tokens from a quantised cache: all but the last {self._fresh.length} are coded"
                " in groups; raise `recent`, or use storage=None"
            )
        self._fresh.crop(rows)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """As `Rows.map_batch`."""
        for part in (self._codes, self._scales, self._lows, self._fresh):
            part.map_batch(change)

    def tensors(self) -> list[Tensor]:
        """Everything that holds memory."""
        return [tensor for part in (self._codes, self._scales, self._lows, self._fresh) for tensor in part.tensors()]

    def _encode(self, rows: Tensor) -> None:
        for part, coded in zip((self._codes, self._scales, self._lows), quantize(rows, self._codec), strict=True):
            part.append(coded)

    def _decode(self, start: int, end: int) -> Tensor:
        first, last = start, end
        if self._codec.along is Along.TOKENS:
            first, last = start // self._codec.group, end // self._codec.group
        return dequantize(
            self._codes.view()[:, :, start:end],
            self._scales.view()[:, :, first:last],
            self._lows.view()[:, :, first:last],
            self._codec,
            self._dtype,
        )
