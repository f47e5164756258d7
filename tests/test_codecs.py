"""The dynamic map and the codecs of optimizer states."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.optim import dynamic_map as maps
from memopt.optim.codecs import BLOCK, Codec, allocate, decode, encode_, nbytes, scales_shape, storable
from tests.reference import dynamic_map as reference

EIGHT_BIT = [Codec.INT8, Codec.INT8_LINEAR]
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
CODECS = pytest.mark.parametrize("codec", list(Codec))


def drawn(shape: tuple[int, ...], seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Numbers over several decades, as moments are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (spread * torch.randn(shape, generator=generator)).exp()


def coded(
    codec: Codec, x: torch.Tensor, *, signed: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Values, scales, and what they decode to."""
    values, scales = allocate(codec, x.shape, device="cpu")
    encode_(codec, x, values, scales, signed=signed)
    return values, scales, decode(codec, values, scales, signed=signed)


@SIGNED
def test_the_map_is_its_definition(signed: bool) -> None:
    table = maps.dynamic_map(signed)
    wanted = torch.tensor(reference.entries(signed), dtype=torch.float64)
    assert table.dtype == torch.float32 and table.shape == (256,)
    torch.testing.assert_close(table.double(), wanted, rtol=3e-7, atol=0)
    assert table[maps.SIGNED_ZERO if signed else 0] == 0 and table[255] == 1


@SIGNED
def test_the_map_is_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(maps.dynamic_map(signed), functional.create_dynamic_map(signed))


@SIGNED
def test_codes_are_the_nearest_at_every_midpoint(signed: bool) -> None:
    middles = maps.midpoints(signed)
    far, near = torch.tensor(2.0), torch.tensor(0.0)
    edges = [middles, middles.nextafter(far), middles.nextafter(near), maps.dynamic_map(signed).abs()]
    edges += [torch.tensor([0.0, 1e-45, 1e-38, 1e-8, 1.0, 1.0000001])]
    magnitudes = torch.cat(edges)
    values = torch.cat([magnitudes, -magnitudes]) if signed else magnitudes
    table = maps.dynamic_map(signed).tolist()
    codes = maps.nearest_code(values, signed)
    assert codes.tolist() == [reference.nearest(value, table) for value in values.tolist()]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), st.booleans())
def test_codes_are_the_nearest_of_any_number(values: list[float], signed: bool) -> None:
    values = values if signed else [abs(value) for value in values]
    table = maps.dynamic_map(signed).tolist()
    codes = maps.nearest_code(torch.tensor(values), signed)
    assert codes.tolist() == [reference.nearest(value, table) for value in values]


@SIGNED
@pytest.mark.parametrize("shape", [(2, 700), (256,), (1,), (2, 1, 257)])
def test_int8_is_the_reference(signed: bool, shape: tuple[int, ...]) -> None:
    x = drawn(shape) if signed else drawn(shape).square()
    before = x.clone()
    values, scales, decoded = coded(Codec.INT8, x, signed=signed)
    assert torch.equal(x, before)
    assert values.dtype == torch.uint8 and scales is not None
    table = maps.dynamic_map(signed)
    in_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, values, scales))
    for row, row_codes, row_scales in zip(*in_rows, strict=True):
        multiply = row_scales.reciprocal().tolist()
        codes, wanted_scales = reference.encode_row(row.tolist(), table.tolist(), multiply)
        assert row_codes.tolist() == codes
        assert row_scales.tolist() == wanted_scales
    blocks = torch.arange(shape[-1]) // BLOCK
    assert torch.equal(decoded, table[values.long()] * scales[..., blocks])


def test_int8_equals_bitsandbytes_where_its_table_is_fine_enough() -> None:
    # on the CPU it looks values up in 65536 equal bins of [-1, 1]: below about 2^-13 it is not the nearest
    functional = pytest.importorskip("bitsandbytes.functional")
    x = drawn((64, 256))
    values, scales, _ = coded(Codec.INT8, x)
    theirs, state = functional.quantize_blockwise(x, code=maps.dynamic_map(True).clone(), blocksize=BLOCK)
    assert scales is not None and torch.equal(state.absmax, scales.flatten())
    away = (theirs.int() - values.int()).abs()
    assert away[(x / scales).abs() > 2**-13].max() <= 1
    table = maps.dynamic_map(True)
    error, their_error = ((x / scales - table[codes.long()]).abs() for codes in (values, theirs))
    assert bool((error <= their_error + 1e-7).all())


def test_int8_linear_is_its_formula() -> None:
    x = drawn((4, 300))
    values, scales, decoded = coded(Codec.INT8_LINEAR, x)
    assert values.dtype == torch.int8 and scales is not None
    for block, columns in enumerate((slice(0, 256), slice(256, 300))):
        part = x[:, columns].double()
        largest = part.abs().amax(1, keepdim=True)
        assert torch.equal(scales[:, block : block + 1].double(), largest)
        exact = 127 * part / largest
        assert (values[:, columns].double() - exact).abs().max() <= 0.5 + 1e-5
        assert ((decoded[:, columns] - part).abs() <= largest / 127 * (0.5 + 1e-5)).all()


def test_bfloat16_rounds_to_nearest_and_float32_is_exact() -> None:
    x = drawn((7, 33))
    assert torch.equal(coded(Codec.BF16, x)[2], x.bfloat16().float())
    values, _, decoded = coded(Codec.FP32, x)
    assert torch.equal(decoded, x) and decoded.data_ptr() != values.data_ptr()


@SIGNED
def test_int8_error_is_within_its_intervals(signed: bool) -> None:
    x = drawn((16, 1024)) if signed else drawn((16, 1024)).square()
    _, scales, decoded = coded(Codec.INT8, x, signed=signed)
    assert scales is not None
    unit = scales.repeat_interleave(BLOCK, -1)
    # half an interval of the top decade, 0.9 / 64 or 0.9 / 128; -1 has no entry, so it loses half an interval, too
    top = 0.45 / (64 if signed else 128)
    assert ((decoded - x).abs() / unit).max() <= top * 1.001
    small = x.abs() < 0.1 * unit
    assert ((decoded - x).abs() / unit)[small].max() <= 0.2 * top * 1.001


def test_the_default_dtype_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn((2, 300))
    _, wanted_scales, wanted = coded(Codec.INT8, x)
    wanted_lines = maps.lines(True)
    monkeypatch.setattr(maps, "_tables", maps._tables.__wrapped__)
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, scales, decoded = coded(Codec.INT8, x)
        lines = maps.lines(True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert wanted_scales is not None and scales is not None and torch.equal(scales, wanted_scales)
    assert torch.equal(decoded, wanted) and torch.equal(lines, wanted_lines)


@CODECS
@pytest.mark.parametrize("shape", [(0, 300), (5, 0), (0,), (2, 0, 64)])
def test_empty_states(codec: Codec, shape: tuple[int, ...]) -> None:
    values, scales, decoded = coded(codec, torch.zeros(shape))
    assert decoded.shape == values.shape == shape
    assert scales is None or scales.shape == scales_shape(shape)


@CODECS
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 700), (300,), (2, 3, 64)])
def test_a_fresh_state_is_zero_and_bytes_are_what_is_stored(codec: Codec, signed: bool, shape: tuple[int, ...]) -> None:
    values, scales = allocate(codec, shape, device="cpu")
    decoded = decode(codec, values, scales, signed=signed)
    assert decoded.dtype == torch.float32 and decoded.shape == shape and bool((decoded == 0).all())
    stored = values.untyped_storage().nbytes() + (0 if scales is None else scales.untyped_storage().nbytes())
    assert nbytes(codec, shape) == stored


@pytest.mark.parametrize("codec", EIGHT_BIT)
@pytest.mark.parametrize("signed", [True, False])
def test_zeros_stay_zero(codec: Codec, signed: bool) -> None:
    _, scales, decoded = coded(codec, torch.zeros(2, 300), signed=signed)
    assert scales is not None and not scales.any() and bool((decoded == 0).all())


@pytest.mark.parametrize("codec", EIGHT_BIT)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_block_with_a_bad_number_is_nan_and_no_other(codec: Codec, bad: float) -> None:
    x = drawn((2, 700))
    clean = coded(codec, x)[2]
    x[1, 300] = bad
    _, _, decoded = coded(codec, x)
    assert bool(decoded[1, 256:512].isnan().all())
    clean[1, 256:512] = decoded[1, 256:512] = 0
    assert torch.equal(decoded, clean)


@pytest.mark.parametrize("codec", EIGHT_BIT)
def test_tiny_blocks_become_zero_and_small_ones_do_not(codec: Codec) -> None:
    x = torch.stack([torch.full((10,), 1.17e-38), torch.full((10,), 1.18e-38), torch.full((10,), 3e38)])
    _, scales, decoded = coded(codec, x)
    assert scales is not None and scales[0] == 0 and bool((decoded[0] == 0).all())
    assert torch.equal(decoded[1:], x[1:])


@pytest.mark.parametrize("codec", EIGHT_BIT)
def test_cuts_between_rows_and_blocks_change_nothing(codec: Codec) -> None:
    x = drawn((6, 900))
    values, scales, decoded = coded(codec, x)
    again, again_scales = allocate(codec, x.shape, device="cpu")
    assert scales is not None and again_scales is not None
    for rows in (slice(0, 2), slice(2, 6)):
        for columns, blocks in ((slice(0, 512), slice(0, 2)), (slice(512, 900), slice(2, 4))):
            part, part_scales = again[rows, columns], again_scales[rows, blocks]
            encode_(codec, x[rows, columns], part, part_scales, signed=True)
            assert torch.equal(decode(codec, part, part_scales, signed=True), decoded[rows, columns])
    assert torch.equal(again, values) and torch.equal(again_scales, scales)


@pytest.mark.parametrize("codec", EIGHT_BIT)
def test_a_transposed_state_can_be_encoded(codec: Codec) -> None:
    x = drawn((300, 5))
    assert torch.equal(coded(codec, x.T)[2], coded(codec, x.T.contiguous())[2])


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((64, 64), Codec.INT8),
        ((4096,), Codec.INT8),
        ((4095,), Codec.FP32),
        ((63, 64), Codec.FP32),
        ((1000, 63), Codec.FP32),
        ((8, 16, 64), Codec.INT8),
        ((), Codec.FP32),
    ],
)
def test_small_and_narrow_states_stay_float32(shape: tuple[int, ...], wanted: Codec) -> None:
    assert storable(Codec.INT8, shape) == wanted
    assert storable(Codec.INT8_LINEAR, shape) == (Codec.INT8_LINEAR if wanted == Codec.INT8 else wanted)
    assert storable(Codec.BF16, shape) == Codec.BF16


def test_a_scalar_has_no_blocks() -> None:
    with pytest.raises(ValueError, match="scalar"):
        allocate(Codec.INT8, (), device="cpu")
    assert allocate(Codec.FP32, (), device="cpu")[0].shape == ()
