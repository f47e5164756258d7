from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import BadInput
from memopt.units import GiB, KiB, MiB, TiB, exact_bytes, format_bytes, format_per_s, format_s, parse_bytes, parse_share


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512MiB", 512 * MiB),
        ("24GiB", 24 * GiB),
        (" 1.5 gib ", 3 * GiB // 2),
        ("1TiB", TiB),
        ("7B", 7),
        (".5KiB", 512),
        ("0.1KiB", 102),  # 102.4: a part of a byte is dropped
        (12345, 12345),
        (0, 0),
    ],
)
def test_parses(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


def test_a_large_decimal_is_exact() -> None:
    assert parse_bytes("1048575.99609375TiB") == 1048575 * TiB + 255 * TiB // 256  # a float would be off


@pytest.mark.parametrize(("percent", "nbytes"), [("80%", 800), ("100%", 1000), ("0.15%", 1), ("33.39%", 333)])
def test_a_percentage_is_a_share_of_the_capacity(percent: str, nbytes: int) -> None:
    assert parse_bytes(percent, 1000) == nbytes


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("5GB", "write GiB"),
        ("5g", "write GiB"),
        ("5K", "write KiB"),
        ("5", "has no unit"),
        ("5XiB", "unknown unit 'XiB'"),
        ("-5GiB", "negative"),
        (-5, "negative"),
        ("GiB", "not a size"),
        ("", "not a size"),
        ("1e3MiB", "not a size"),
        ("nanGiB", "not a size"),
        (True, "not a size"),
        (1.5, "not a size"),
        (None, "not a size"),
        ("80%", "unknown capacity"),
    ],
)
def test_refuses_naming_field_and_remedy(value: object, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_bytes(value, field="--dram")  # type: ignore[arg-type]
    message = str(caught.value)
    assert says in message
    assert message.startswith("--dram: ")
    assert "write" in message
    assert "\n" not in message


def test_more_than_all_is_refused() -> None:
    with pytest.raises(BadInput, match="at most 100%"):
        parse_bytes("101%", 1000)


@given(st.integers(0, 2**60))
def test_exact_text_is_read_back(nbytes: int) -> None:
    assert parse_bytes(exact_bytes(nbytes)) == nbytes


@pytest.mark.parametrize(("nbytes", "text"), [(8 * GiB, "8GiB"), (3 * GiB // 2, "1.5GiB"), (1000, "1000B"), (0, "0B")])
def test_exact_text_is_short(nbytes: int, text: str) -> None:
    assert exact_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KiB, "1.00 KiB"),
        (29 * GiB // 4, "7.25 GiB"),
        (-3 * MiB, "-3.00 MiB"),
        (MiB - 1, "1.00 MiB"),  # never 1024.00 KiB
        (5000 * TiB, "5000.00 TiB"),
    ],
)
def test_formats_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 2**60))
def test_formatted_bytes_are_close(nbytes: int) -> None:
    text = format_bytes(nbytes)
    assert not text.startswith("1024.00")
    assert abs(parse_bytes(text) - nbytes) <= max(1, nbytes * 0.005)


def test_formats_rates() -> None:
    assert format_per_s(1.5 * GiB) == "1.50 GiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00085, "850 us"),
        (0.0123, "12.3 ms"),
        (4.21, "4.21 s"),
        (99.999, "1 min 40 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (-4.21, "-4.21 s"),
        (0, "0 us"),
    ],
)
def test_formats_seconds(seconds: float, text: str) -> None:
    assert format_s(seconds) == text


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.1", 0.1), ("1", 1.0), ("250%", 2.5), ("0%", 0.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text, field="--tolerance") == share


@pytest.mark.parametrize("text", ["", "ten", "10", "-1%", "10MiB", "1%%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(BadInput, match="--tolerance: .* is not a share; write it like 10% or 0.1"):
        parse_share(text, field="--tolerance")
