"""Growing rows against torch.cat, coded rows against their bounds."""

from __future__ import annotations

import pytest
import torch

from memopt.errors import BadInput
from memopt.kv.quantized import Along, Codec, QuantizedRows, dequantize, quantize, scale_dtype
from memopt.kv.rows import Rows


def test_rows_are_what_was_appended() -> None:
    torch.manual_seed(0)
    pieces = [torch.randn(2, 3, count, 5) for count in (1, 63, 1, 200, 7)]
    rows = Rows.like(pieces[0], 5)
    for piece in pieces:
        rows.append(piece)
    everything = torch.cat(pieces, 2)
    assert torch.equal(rows.view(), everything) and rows.length == 272
    assert rows.tensors()[0].shape[2] == 320
    rows.crop(10)
    assert torch.equal(rows.view(), everything[:, :, :262])
    rows.drop_front(200)
    assert torch.equal(rows.view(), everything[:, :, 200:262]) and rows.tensors()[0].shape[2] == 64
    rows.append(everything[:, :, :1])
    assert torch.equal(rows.view(), torch.cat([everything[:, :, 200:262], everything[:, :, :1]], 2))


def test_rows_outlive_inference_mode() -> None:
    with torch.inference_mode():
        rows = Rows.like(torch.zeros(2, 1, 1, 2), 2)
        rows.append(torch.ones(2, 1, 3, 2))
        rows.map_batch(lambda x: x.index_select(0, torch.tensor([1, 0])))
    rows.append(torch.ones(2, 1, 1, 2))
    assert rows.view().sum() == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("along", list(Along))
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_within_half_a_step(bits: int, along: Along, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codec = Codec(bits=bits, along=along)
    x = (torch.randn(2, 3, 64, 24) * torch.tensor([0.01, 1.0, 100.0]).repeat(8) + 5).to(dtype)
    x[0, 0] = 3.0  # groups of equal elements
    codes, scale, low = quantize(x, codec)
    assert codes.shape == (2, 3, 64, 24 * bits // 8) and scale.dtype == scale_dtype(dtype)
    assert scale.shape == ((2, 3, 2, 24) if along is Along.TOKENS else (2, 3, 64, 3))
    back = dequantize(codes, scale, low, codec, torch.float32)
    step = scale.float().repeat_interleave(32, 2) if along is Along.TOKENS else scale.float().repeat_interleave(8, 3)
    # half a step, and what the stored scale and low round away at the ends of the range
    slack = (x.float().abs() + step * 2**bits) * torch.finfo(scale.dtype).eps
    assert ((back - x.float()).abs() <= step / 2 + slack).all()
    assert ((back[0, 0] - 3.0).abs() < 0.02).all()


@pytest.mark.parametrize("along", list(Along))
def test_coded_rows_do_not_depend_on_how_they_came(along: Along) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 150, 16)
    whole, piecewise = (QuantizedRows(x, 16, Codec(bits=8, along=along), whole=10) for _ in range(2))
    whole.append(x)
    for piece in x.split([3, 60, 1, 1, 40, 5, 40], 2):
        piecewise.append(piece)
    assert torch.equal(whole.view(), piecewise.view()) and whole.length == 150
    assert torch.equal(whole.view()[:, :, 128:], x[:, :, 128:])  # 150 - 10 newest, in groups of 32
    assert not torch.equal(whole.view()[:, :, 127], x[:, :, 127])
    assert (whole.view() - x).abs().max() < 0.03


def test_what_cannot_be_coded() -> None:
    with pytest.raises(BadInput, match="bits = 3"):
        Codec(bits=3, along=Along.TOKENS)
    with pytest.raises(BadInput, match="even number of channels, not 5"):
        QuantizedRows(torch.zeros(1, 1, 1, 5), 5, Codec(bits=4, along=Along.TOKENS), whole=1)
