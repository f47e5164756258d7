"""The dynamic 8-bit map from its definition, and block coding with it one number at a time."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

FLOAT32_TINY = 2.0**-126


def entries(signed: bool) -> list[float]:
    """The 256 numbers in double precision, ascending."""
    found = [0.0, 1.0]
    for decade in range(7):
        intervals = 2**decade if signed else 2 ** (decade + 1)
        for i in range(intervals):
            middle = 10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / intervals)
            found += [middle, -middle] if signed else [middle]
    return sorted(found)


def nearest(value: float, table: Sequence[float]) -> int:
    """Position of the nearest entry; half-way between two, the one nearer zero. In the unsigned map, whose first entry
    is zero, what is above zero does not become zero.

    The distances of a float32 to the two entries around it are exact in double precision.
    """
    code = min(range(len(table)), key=lambda code: (abs(table[code] - value), abs(table[code])))
    return max(code, 1) if table[0] == 0 and value > 0 else code


def encode_row(
    row: Sequence[float], table: Sequence[float], multiply: Sequence[float], block: int = 256
) -> tuple[list[int], list[float]]:
    """Codes and scales of one row. `multiply[b]`: the float32 reciprocal of the scale of block b."""
    codes, scales = [], []
    zero = table.index(0.0)
    for b, start in enumerate(range(0, len(row), block)):
        part = row[start : start + block]
        largest = max(abs(x) for x in part)
        if any(not math.isfinite(x) for x in part):
            largest = math.nan
        if largest >= FLOAT32_TINY:
            codes += [nearest(_float32(x * multiply[b]), table) for x in part]
            scales.append(largest)
        else:
            codes += [zero] * len(part)
            scales.append(largest if math.isnan(largest) else 0.0)
    return codes, scales


def _float32(x: float) -> float:
    # the product of two float32 is exact in double precision, so this rounds once
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded
