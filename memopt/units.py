"""Bytes, rates and seconds as text. Everything inside memopt is `int` bytes; GiB = 1024**3 and GB is never used."""

from __future__ import annotations

import re
from fractions import Fraction

from memopt.errors import BadInput

KiB = 1024
MiB = 1024**2
GiB = 1024**3
TiB = 1024**4

_UNITS = {"b": 1, "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB}
_NAMES = ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB"))
_SIZE = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*([A-Za-z%]*)\s*")
_REMEDY = "write a size like 512MiB, 24GiB, 1TiB or 80%"


def parse_bytes(value: int | str, capacity_bytes: int | None = None, *, field: str = "size") -> int:
    """Bytes meant by `value`: an int (bytes), or text with a unit (B, KiB, MiB, GiB, TiB) or a percentage.

    A percentage is the share of `capacity_bytes`. Fractions of a byte are dropped. Zero is accepted here.
    Raises BadInput, naming `field`, on a missing or unknown unit, a negative size, or a percentage of nothing.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise BadInput(f"{field}: {value} is negative; {_REMEDY}")
        return value
    if not isinstance(value, str):
        raise BadInput(f"{field}: {value!r} is not a size; {_REMEDY}")
    match = _SIZE.fullmatch(value)
    if match is None:
        raise BadInput(f"{field}: {value!r} is not a size; {_REMEDY}")
    number, unit = Fraction(match[1]), match[2].lower()
    if number < 0:
        raise BadInput(f"{field}: {value!r} is negative; {_REMEDY}")
    if unit == "%":
        return _share(number, value, capacity_bytes, field)
    if unit not in _UNITS:
        raise BadInput(f"{field}: {value!r} {_unit_trouble(match[2])}")
    return int(number * _UNITS[unit])


def parse_share(text: str, *, field: str) -> float:
    """A share of one meant by `10%` or `0.1`. Raises BadInput, naming `field`."""
    match = _SIZE.fullmatch(text)
    share = None if match is None else Fraction(match[1]) / (100 if match[2] == "%" else 1)
    if match is None or share is None or match[2] not in ("", "%") or share < 0 or (share > 1 and not match[2]):
        raise BadInput(f"{field}: {text!r} is not a share; write it like 10% or 0.1")
    return float(share)


def _share(percent: Fraction, text: str, capacity_bytes: int | None, field: str) -> int:
    if capacity_bytes is None:
        raise BadInput(f"{field}: {text!r} is a share of an unknown capacity; write a size like 24GiB")
    if percent > 100:
        raise BadInput(f"{field}: {text!r} is more than all of it; write at most 100%")
    return int(percent * capacity_bytes / 100)


def _unit_trouble(unit: str) -> str:
    if not unit:
        return f"has no unit; {_REMEDY}"
    binary = {"k": "KiB", "m": "MiB", "g": "GiB", "t": "TiB"}.get(unit[0].lower())
    if binary and unit.lower() in (binary[0].lower(), f"{binary[0].lower()}b"):
        return f"has the unit {unit!r}; sizes are binary here, write {binary}"
    return f"has the unknown unit {unit!r}; {_REMEDY}"


def format_bytes(nbytes: int | float) -> str:
    """For reading: `7.25 GiB`, `512 B`."""
    for unit, name in _NAMES:
        # just below a unit already prints as 1024.00 of the smaller one
        if abs(nbytes) >= unit * (1 - 0.005 / 1024):
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} B"


def exact_bytes(nbytes: int) -> str:
    """The shortest text that `parse_bytes` turns back into exactly `nbytes`: `8GiB`, `1.5GiB`, `1000B`."""
    for unit, name in _NAMES:
        if nbytes >= unit and nbytes * 100 % unit == 0:
            whole, hundredths = divmod(nbytes * 100 // unit, 100)
            return f"{whole}.{hundredths:02d}".rstrip("0").rstrip(".") + name
    return f"{nbytes}B"


def format_per_s(bytes_per_s: float) -> str:
    """For reading: `1.83 GiB/s`."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_s(seconds: float) -> str:
    """For reading: `850 us`, `12.3 ms`, `4.21 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 0:
        return f"-{format_s(-seconds)}"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 99.995:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
