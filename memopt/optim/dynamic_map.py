"""The dynamic 8-bit number format (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 1.3).

A value in [-1, 1] is one of 256 entries. Each decade from 1e-7..1e-6 up to 0.1..1 is cut into equal intervals, twice as
many as the decade below, and the entries are the middles of the intervals: small values are kept with few digits, large
ones with many. The signed map has 1, 2, ... 64 entries per decade and sign, the unsigned one 2, 4, ... 128; both have 0
and 1 besides. The entries are those of bitsandbytes, bit for bit, so that states can be compared and converted.

An entry has a *magnitude index*: 0 for zero, then upwards. The code, which is what is stored, counts the sorted
entries: the magnitude index itself in the unsigned map, 127 plus or minus it in the signed one. -1 has no entry: the
negative side ends at magnitude index 127.
"""

from __future__ import annotations

import functools

import torch

ENTRIES = 256
DECADES = 7
SIGNED_ZERO = 127
"""Code of 0 in the signed map; in the unsigned map it is 0."""

SEARCH_SHIFT = 16
"""A magnitude's bin in the search table is its float32 bits without the lowest 16: exponent, 7 bits of fraction."""
SEARCH_FIRST = (127 - 23) << (23 - SEARCH_SHIFT)
"""Bin of 2^-23, below the smallest midpoint (1.6e-7); everything smaller shares bin 0 of the table."""
SEARCH_BINS = (127 << (23 - SEARCH_SHIFT)) - SEARCH_FIRST + 1
"""Up to and with the bin that starts at 1."""
_LOW_BITS = (1 << SEARCH_SHIFT) - 1
_MAGNITUDE = 0x7FFFFFFF


def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """The entries, (256,) float32, ascending: what each code stands for. Shared: do not write to it."""
    return _tables(signed, torch.device(device))[0]


def search_table(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """(SEARCH_BINS,) int32, by which the nearest entry to a magnitude is found with one look-up and one addition.

    No bin holds more than one midpoint of neighbouring entries. With `bits` a magnitude's float32 bits and `entry` the
    table at `max(0, (bits >> 16) - SEARCH_FIRST)`, the magnitude index is `(entry + (bits & 0xffff)) >> 16`: the upper
    half of `entry` is the index at the lower end of the bin, the lower half is such that the sum carries exactly when
    the magnitude is above the bin's midpoint. A magnitude on a midpoint goes to the entry nearer zero. Valid for
    magnitudes below 1 + 2^-7.
    """
    return _tables(signed, torch.device(device))[1]


def nearest_code(values: torch.Tensor, signed: bool) -> torch.Tensor:
    """Codes of the nearest entries to `values`, float32 in [-1, 1] ([0, 1] unsigned), any shape: uint8, same shape.

    Exactly the nearest; half-way between two, the one nearer zero. But in the unsigned map what is above 0 gets the
    smallest entry at least: a second moment that became 0 while the first did not would leave Adam to divide by the
    square root of one gradient (next to a gradient 10^4 times as large in the block, steps are 10^4 times too long).
    A rounding error above 1 does no harm; NaN and larger values give some code.
    """
    raw = values.view(torch.int32)
    bins = raw.bitwise_and(_MAGNITUDE).bitwise_right_shift_(SEARCH_SHIFT).sub_(SEARCH_FIRST).clamp_(0, SEARCH_BINS - 1)
    index = search_table(signed, values.device).index_select(0, bins.flatten()).view(values.shape)
    low = torch.bitwise_and(raw, _LOW_BITS, out=bins)
    index.add_(low).bitwise_right_shift_(SEARCH_SHIFT)
    if signed:
        sign = torch.bitwise_right_shift(raw, 31, out=low)  # 0 or -1, by which the index is negated
        index.bitwise_xor_(sign).sub_(sign).add_(SIGNED_ZERO).clamp_(min=0)
    else:
        index.add_((index == 0).logical_and_(values > 0))
    return index.to(torch.uint8)


def midpoints(signed: bool) -> torch.Tensor:
    """Midpoints between neighbouring magnitudes, ascending, float32: (128,) signed, (255,) unsigned.

    Rounded down where the exact one has more bits than a float32, so that `x > midpoint` is right for every float32 x.
    """
    return _midpoints(dynamic_map(signed)[SIGNED_ZERO if signed else 0 :])


def _midpoints(magnitudes: torch.Tensor) -> torch.Tensor:
    magnitudes = magnitudes.double()
    exact = (magnitudes[:-1] + magnitudes[1:]) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double() > exact, below, rounded)


def lines(signed: bool) -> torch.Tensor:
    """The map as straight lines, for processors that look up in registers: (6, 8) float32, on the CPU.

    Decoding: the index of a magnitude, in the unsigned map plus one, has the decade as its binary logarithm. Rows 0 and
    1, by the three lowest bits of a float32's exponent, are the first magnitude of a decade and the step; the result
    may differ from the map by a unit in the last place or two.
    Encoding: rows 2 to 5, by decade, are the largest magnitude that belongs to it, and slope, offset and greatest value
    of a line whose whole part is the index (512 higher in the unsigned map, half a step lower in the signed one). The
    eighth column is for what is nearest to 1.
    """
    middles = midpoints(signed).double().tolist()
    raised = -0.5 if signed else 512.0
    made = torch.zeros(6, 8, dtype=torch.float64, device="cpu")
    last = 0  # index of the largest magnitude so far
    for decade in range(DECADES):
        unit = 10.0 ** (decade - DECADES + 1)
        intervals = (1 if signed else 2) << decade
        step = 0.9 * unit / intervals
        place = (127 + decade + (0 if signed else 1)) % 8
        made[0, place], made[1, place] = 0.1 * unit + step / 2, step
        slope, offset = 1 / step, last + 1 - 0.1 * unit / step
        if decade == 0:  # the first interval is longer: through the midpoints around the smallest magnitude instead
            slope = 0.5 / middles[0] if signed else 1 / (middles[1] - middles[0])
            offset = 1 - slope * middles[0]
        last += intervals
        made[2:, decade] = made.new_tensor([middles[last], slope, offset + raised, last + 0.5 + raised])
    made[0, (place + 1) % 8] = 1
    made[2:, DECADES] = made.new_tensor([torch.inf, 0, last + 1.5 + raised, last + 1.5 + raised])
    return made.float()


def line_entries(signed: bool) -> torch.Tensor:
    """(256,) float32, on the CPU: what decoding with `lines` gives for each code, bit for bit."""
    first, step = lines(signed)[:2].double()  # in which the sum is exact, so that rounding it is a fused multiply-add
    codes = torch.arange(ENTRIES, dtype=torch.float32, device="cpu")
    index = codes - SIGNED_ZERO if signed else codes
    number = index.abs() if signed else index + 1
    bits = number.view(torch.int32)
    place = (bits >> 23) % 8
    count = number - (bits & 0x7F800000).view(torch.float32)
    magnitude: torch.Tensor = first[place] + step[place] * count.double()
    return magnitude.float() * index.sign()


@functools.cache
def _tables(signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if device.type == "cpu":
        values = _make_map(signed)
        return values, _make_search_table(values[SIGNED_ZERO if signed else 0 :])
    values, search = _tables(signed, torch.device("cpu"))
    return values.to(device), search.to(device)


def _make_map(signed: bool) -> torch.Tensor:
    middles = []
    for decade in range(DECADES):
        intervals = (1 if signed else 2) << decade
        edges = torch.linspace(0.1, 1, intervals + 1, dtype=torch.float32, device="cpu")
        middles.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - DECADES + 1))
    positive = torch.cat(middles)
    parts = [-positive.flip(0)] if signed else []
    return torch.cat([*parts, positive.new_zeros(1), positive, positive.new_ones(1)])


def _make_search_table(magnitudes: torch.Tensor) -> torch.Tensor:
    bits = _midpoints(magnitudes).view(torch.int32)
    bins = (bits >> SEARCH_SHIFT) - SEARCH_FIRST
    assert bins[0] > 0 and bool((bins.diff() > 0).all())  # bin 0 has none, the others at most one
    index_at_start = torch.searchsorted(bins, torch.arange(SEARCH_BINS, dtype=torch.int32, device="cpu"), right=False)
    table = index_at_start.to(torch.int32) << SEARCH_SHIFT
    table[bins.long()] += _LOW_BITS - (bits & _LOW_BITS)
    return table
