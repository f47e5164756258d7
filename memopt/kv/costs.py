"""Bytes of a thin cache, to the byte, before it exists: the plan reads these, a test holds them to the storage."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.kv.channels import kept_count
from memopt.kv.quantized import Along, Codec
from memopt.kv.rows import STEP, capacity
from memopt.kv.settings import ThinSettings

_INDEX_BYTES = 2  # int16
_SCALE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One attention layer's cache: what decides its bytes besides the settings."""

    batch: int
    kv_heads: int
    head_dim: int
    value_dim: int
    element_bytes: int  # of the model's own type

    @property
    def lanes(self) -> int:
        """Batch rows times heads."""
        return self.batch * self.kv_heads


def dense_bytes(shape: LayerShape, tokens: int) -> int:
    """Bytes of the stock dynamic cache of a layer."""
    return shape.lanes * tokens * (shape.head_dim + shape.value_dim) * shape.element_bytes


def thin_bytes(shape: LayerShape, settings: ThinSettings, *, prompt: int, new: int = 0, padded: bool = False) -> int:
    """Bytes of a layer's thin cache after a `prompt` and `new` tokens one at a time, spare rows included.

    With `padded`, the prompt's batch rows have unequal lengths (matters to eviction only; padding stands on the left).
    """
    kept = kept_count(shape.head_dim, settings.key_keep, multiple=settings.multiple)
    values = kept_count(shape.value_dim, settings.value_keep, multiple=settings.multiple)
    evicts = settings.evict is not None and settings.evict < prompt
    rows = (settings.evict if evicts and settings.evict is not None else prompt) + new
    whole = _whole_rows(settings, min(prompt, settings.recent), new)
    total = _stored(shape, settings, rows, kept, Along.TOKENS) + _stored(shape, settings, rows, values, Along.CHANNELS)
    total += shape.lanes * capacity(whole) * (shape.head_dim - kept) * shape.element_bytes
    total += shape.lanes * shape.head_dim * _INDEX_BYTES
    if values < shape.value_dim:
        total += shape.lanes * values * _INDEX_BYTES
    if evicts and padded:
        total += shape.lanes * (rows - new)
    return total


def _whole_rows(settings: ThinSettings, start: int, new: int) -> int:
    if settings.fold == "keep":
        return start + new
    if new < settings.block:
        return start + new
    return min(settings.recent, start + settings.block) + new % settings.block


def _stored(shape: LayerShape, settings: ThinSettings, rows: int, width: int, along: Along) -> int:
    if settings.bits is None:
        return shape.lanes * capacity(rows) * width * shape.element_bytes
    codec = Codec(bits=settings.bits, along=along)
    coded = max(0, rows - settings.recent) // codec.group * codec.group
    step, columns = codec.scale_shape(STEP, width)
    scale_rows = codec.scale_shape(coded, width)[0]
    per_lane = capacity(coded) * codec.code_width(width) + 2 * capacity(scale_rows, step) * columns * _SCALE_BYTES
    return shape.lanes * (per_lane + capacity(rows - coded) * width * shape.element_bytes)
