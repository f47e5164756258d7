"""Isotropy metrics against numpy's singular value decomposition."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from memopt.errors import BadInput
from memopt.optim import spectrum as module
from memopt.optim.spectrum import Spectrum, spectrum, squared_singular_values


def by_numpy(matrix: np.ndarray, k: int) -> tuple[float, float, float, float]:
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    shares = squares / squares.sum()
    nats = -sum(q * math.log(q) for q in shares if q > 0)
    upper, lower = np.percentile(squares, [75, 25])
    return nats / math.log(len(squares)), math.exp(nats), shares[:k].sum(), upper / lower


def values(of: Spectrum) -> tuple[float, float, float, float]:
    return of.entropy, of.effective_rank, of.top_k_energy, of.quantile_ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 24), (13, 40), (40, 13), (2, 5), (64, 65)])
@pytest.mark.parametrize("decay", [0.0, 0.7, 3.0])
def test_metrics_equal_numpys(shape: tuple[int, int], decay: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    columns = torch.arange(1, shape[1] + 1) ** -decay
    matrix = (torch.randn(shape, generator=generator) * columns).to(dtype)
    got, expected = values(spectrum(matrix, k=3)), by_numpy(matrix.double().numpy(), 3)
    np.testing.assert_allclose(got[:3], expected[:3], rtol=1e-9)
    # a quartile may be 1e-10 of the largest, and 1e-16 of the largest is what a square is exact to
    np.testing.assert_allclose(got[3], expected[3], rtol=1e-5)


def test_each_metric_of_a_batch_and_their_mean() -> None:
    stack = torch.randn(2, 3, 12, 7, generator=torch.Generator().manual_seed(0))
    functions = (module.normalized_entropy, module.effective_rank, module.top_k_energy, module.quantile_ratio)
    got = [function(stack) for function in functions]
    assert all(each.shape == (2, 3) and each.dtype == torch.float64 for each in got)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose([each[index] for each in got], by_numpy(stack[index].numpy(), 10), rtol=1e-9)
    np.testing.assert_allclose(values(spectrum(stack)), [each.mean() for each in got])


def test_equal_directions_are_the_most_and_one_direction_the_least() -> None:
    even = spectrum(torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0))).Q[:16], k=4)
    np.testing.assert_allclose(values(even), (1, 16, 0.25, 1), rtol=1e-5)
    one = spectrum(torch.ones(9, 5))
    np.testing.assert_allclose(values(one), (0, 1, 1, math.inf), atol=1e-12)


def test_lost_directions_count_as_none() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(30, 4, generator=generator).double() @ torch.randn(4, 20, generator=generator).double()
    assert (squared_singular_values(low)[4:] == 0).all()
    got = spectrum(low)
    assert 1 < got.effective_rank <= 4 and got.top_k_energy == pytest.approx(1)
    assert math.isinf(got.quantile_ratio)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_size_does_not_matter(factor: float) -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(values(spectrum(matrix * factor)), values(spectrum(matrix)), rtol=1e-5)
    np.testing.assert_allclose(
        squared_singular_values(matrix), np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2, rtol=1e-10
    )


def test_zeros_rows_and_nan() -> None:
    assert values(spectrum(torch.zeros(4, 6))) == (0, 0, 0, math.inf)
    np.testing.assert_allclose(values(spectrum(torch.arange(1.0, 5).reshape(1, 4))), (1, 1, 1, 1))
    bad = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan), torch.full((3, 3), torch.inf)])
    assert module.effective_rank(bad).isnan().tolist() == [False, True, True]
    assert all(math.isnan(value) for value in values(spectrum(bad)))


def test_a_spectrum_is_plain_json() -> None:
    as_dict = spectrum(torch.ones(9, 5), k=2).to_dict()
    assert list(as_dict) == ["entropy", "effective_rank", "top_k_energy", "quantile_ratio", "k"]
    assert json.loads(json.dumps(as_dict, allow_nan=False))["quantile_ratio"] is None


@pytest.mark.parametrize("shape", [(4,), (0, 3), ()])
def test_what_has_no_spectrum_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match=r"matrix: a spectrum needs .* got shape"):
        spectrum(torch.ones(shape))
    with pytest.raises(BadInput, match="k: .* got 0"):
        spectrum(torch.eye(3), k=0)
