"""The C kernels against the same step in plain torch, at odd shapes, cuts and instruction sets, and bitsandbytes."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from memopt.optim import dynamic_map, native, rules
from memopt.optim.codecs import BLOCK, Codec, allocate, decode, encode_

built = pytest.mark.skipif(not native.available(), reason=native.why_not())
RULES = ("adamw", "lion", "sgd", "nesterov")
FLOATS = (torch.float32, torch.bfloat16)
DTYPES = pytest.mark.parametrize(("weight_dtype", "grad_dtype"), list(itertools.product(FLOATS, FLOATS)))
LR, BETA1, BETA2, EPS, DECAY, CLIP = 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.5


class Tensors:
    """Weights and the two 8-bit states of one tensor."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights.clone()
        self.first, self.second = (allocate(Codec.INT8, weights.shape, device="cpu") for _ in range(2))

    def all(self) -> list[torch.Tensor]:
        return [self.weights, *(x for pair in (self.first, self.second) for x in pair if x is not None)]

    def copy(self) -> Tensors:
        made = Tensors(self.weights)
        for into, x in zip(made.all(), self.all(), strict=True):
            into.copy_(x)
        return made


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    return x.to(dtype)


def native_step(rule: str, many: Sequence[Tensors], grads: Sequence[torch.Tensor], step: int, **more: Any) -> None:
    weights, grads = [each.weights for each in many], list(grads)
    states = [list(column) for column in zip(*(each.all()[1:] for each in many), strict=True)]
    common: dict[str, Any] = {"steps": [step] * len(many), "lr": LR, "weight_decay": DECAY, "grad_scale": CLIP, **more}
    if rule == "adamw":
        native.adamw8_(weights, grads, *states, beta1=BETA1, beta2=BETA2, eps=EPS, **common)
    elif rule == "lion":
        native.lion8_(weights, grads, *states[:2], beta1=BETA1, beta2=BETA2, **common)
    else:
        native.sgd8_(weights, grads, *states[:2], momentum=BETA1, nesterov=rule == "nesterov", **common)


def plain_step(rule: str, tensors: Tensors, grad: torch.Tensor, step: int) -> None:
    g = grad.float() * CLIP
    m = decode(Codec.INT8, *tensors.first, signed=True)
    if rule == "adamw":
        v = decode(Codec.INT8, *tensors.second, signed=False)
        d = rules.adamw(g, m, v, step=step, beta1=BETA1, beta2=BETA2, eps=EPS)
        encode_(Codec.INT8, v, *tensors.second, signed=False)
    elif rule == "lion":
        d = rules.lion(g, m, beta1=BETA1, beta2=BETA2)
    else:
        d = rules.sgd(g, m, momentum=BETA1, nesterov=rule == "nesterov")
    encode_(Codec.INT8, m, *tensors.first, signed=True)
    tensors.weights.copy_(tensors.weights.float() * (1 - LR * DECAY) - LR * d)


def assert_same_bits(a: Tensors, b: Tensors) -> None:
    for x, y in zip(a.all(), b.all(), strict=True):
        assert torch.equal(x, y)


def assert_close(found: Tensors, wanted: Tensors) -> None:
    """Weights up to a few roundings, codes at most one apart and nearly all equal."""
    ulp = 2.0**-7 if found.weights.dtype == torch.bfloat16 else 2.0**-21
    torch.testing.assert_close(found.weights, wanted.weights, rtol=ulp, atol=LR * 1e-5)
    for (codes, scales), (wanted_codes, wanted_scales) in ((found.first, wanted.first), (found.second, wanted.second)):
        assert scales is not None and wanted_scales is not None
        torch.testing.assert_close(scales, wanted_scales, rtol=1e-6, atol=0)
        apart = (codes.int() - wanted_codes.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.002


@built
@DTYPES
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_plain_one_whatever_the_instructions(
    rule: str, weight_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    shape = (5, 700)
    tensors = Tensors(drawn(shape, 0, weight_dtype))
    for step in range(1, 6):
        grad = drawn(shape, step, grad_dtype)
        wanted, plainest = tensors.copy(), tensors.copy()
        plain_step(rule, wanted, grad, step)
        native_step(rule, [plainest], [grad], step, level="plain")
        assert_close(plainest, wanted)
        for level in native.levels():
            found = tensors.copy()
            native_step(rule, [found], [grad], step, level=level)
            assert_same_bits(found, plainest)
        tensors = plainest


def around(x: torch.Tensor) -> torch.Tensor:
    """`x` and what lies next to it, in rows of a block that end with 1, so that the scale is 1."""
    found = torch.cat(
        [x, x.nextafter(torch.tensor(2.0)), x.nextafter(torch.tensor(0.0)), drawn((1000,), 3).clamp(-1, 1)]
    )
    found = torch.cat([found, found.new_zeros(-found.numel() % (BLOCK - 1))]).view(-1, BLOCK - 1)
    return torch.nn.functional.pad(found, (0, 1), value=1.0)


@built
@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_codes_are_exactly_the_nearest(level: str) -> None:
    """SGD without momentum keeps the gradient, AdamW with beta2 = 0 its square: the kernels as bare encoders."""
    if level not in native.levels():
        pytest.skip(f"this machine has no {level}")
    common: dict[str, Any] = {"steps": [1], "lr": 0.0, "weight_decay": 0.0, "level": level}
    x = torch.cat([dynamic_map.midpoints(True), dynamic_map.dynamic_map(True)])
    x = around(torch.cat([x, -x]))
    tensors, wanted = Tensors(x), Tensors(x)
    native.sgd8_([tensors.weights], [x], *([s] for s in tensors.first), momentum=0.0, nesterov=False, **common)
    encode_(Codec.INT8, x, *wanted.first, signed=True)
    assert torch.equal(tensors.first[0], wanted.first[0])
    assert torch.equal(tensors.first[0], dynamic_map.nearest_code(x, True))
    roots = around(torch.cat([dynamic_map.midpoints(False), dynamic_map.dynamic_map(False)]).sqrt())
    tensors, wanted = Tensors(roots), Tensors(roots)
    states = [[s] for s in (*tensors.first, *tensors.second)]
    native.adamw8_([tensors.weights], [roots], *states, beta1=0.0, beta2=0.0, eps=1.0, **common)
    encode_(Codec.INT8, roots.square(), *wanted.second, signed=False)
    assert torch.equal(tensors.second[0], wanted.second[0])


@built
@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_every_code_is_decoded_as_lines_say(level: str) -> None:
    """SGD with momentum 1, no gradient and rate 1 takes the state itself off the weights."""
    if level not in native.levels():
        pytest.skip(f"this machine has no {level}")
    tensors = Tensors(torch.zeros(1, BLOCK))
    tensors.first[0].copy_(torch.arange(BLOCK))
    tensors.first[1].fill_(3.0)
    native.sgd8_(
        [tensors.weights],
        [torch.zeros(1, BLOCK)],
        *([s] for s in tensors.first),
        momentum=1.0,
        nesterov=False,
        steps=[1],
        lr=1.0,
        weight_decay=0.0,
        level=level,
    )
    assert torch.equal(-tensors.weights[0], 3 * dynamic_map.line_entries(True))


@pytest.mark.parametrize("signed", [True, False])
def test_lines_are_the_map(signed: bool) -> None:
    entries = dynamic_map.line_entries(signed)
    torch.testing.assert_close(entries, dynamic_map.dynamic_map(signed), rtol=2.0**-22, atol=0)


@built
@pytest.mark.parametrize("threads", ["torch's", "own"])
@pytest.mark.parametrize("rule", RULES)
def test_threads_lists_and_layouts_change_no_bit(rule: str, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if threads == "own":
        monkeypatch.setattr(native, "_parallel", lambda: None)
    elif native._parallel() is None:
        pytest.skip("this torch has no GOMP_parallel")
    shapes = [(300, 257), (1, 256), (256,), (70000,), (4, 5, 320), (9, 3), (0, 300), (3, 0), (255,)]
    alone = [Tensors(drawn(shape, i, FLOATS[i % 2])) for i, shape in enumerate(shapes)]
    many, threaded = [t.copy() for t in alone], [t.copy() for t in alone]
    for step in (1, 2, 3):
        grads = [drawn(shape, 100 * step + i, FLOATS[i // 2 % 2]) for i, shape in enumerate(shapes)]
        for tensors, grad in zip(alone, grads, strict=True):
            native_step(rule, [tensors], [grad], step, threads=1)
        native_step(rule, many, grads, step, threads=1)
        native_step(rule, threaded, grads, step, threads=5)
    for a, b, c in zip(alone, many, threaded, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


@built
@DTYPES
def test_slices_that_start_anywhere_are_stepped_and_nothing_else(
    weight_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    for start, length in ((1, 600), (3, 256), (7, 5)):
        whole = drawn((1000,), 1, weight_dtype)
        gradients = drawn((1000,), 2, grad_dtype)
        part = slice(start, start + length)
        apart, inside = Tensors(whole[part]), Tensors(whole[part])
        inside.weights = whole[part]
        untouched = whole.clone()
        for step in (1, 2):
            native_step("adamw", [apart], [gradients[part].clone()], step)
            native_step("adamw", [inside], [gradients[part]], step)
        assert_same_bits(apart, inside)
        assert torch.equal(whole[:start], untouched[:start])
        assert torch.equal(whole[start + length :], untouched[start + length :])


@built
def test_rows_of_a_wider_matrix() -> None:
    wide, wide_grad = drawn((6, 900), 1), drawn((6, 1000), 2)
    apart, inside = Tensors(wide[:, 100:700]), Tensors(wide[:, 100:700])
    inside.weights = wide[:, 100:700]
    codes = torch.zeros(6, 800, dtype=torch.uint8)
    inside.first = (codes[:, :600], inside.first[1])
    untouched = wide.clone()
    native_step("adamw", [apart], [wide_grad[:, 5:605].clone()], 1)
    native_step("adamw", [inside], [wide_grad[:, 5:605]], 1)
    assert_same_bits(apart, inside)
    assert not codes[:, 600:].any()
    untouched[:, 100:700] = wide[:, 100:700]
    assert torch.equal(wide, untouched)


@built
def test_every_tensor_has_its_own_step() -> None:
    together = [Tensors(drawn((2, 300), i)) for i in (0, 1)]
    apart = [t.copy() for t in together]
    grads = [drawn((2, 300), i) for i in (2, 3)]
    for tensors, grad, step in zip(apart, grads, (1, 9), strict=True):
        native_step("adamw", [tensors], [grad], step)
    native_step("adamw", together, grads, 1, steps=[1, 9])
    for a, b in zip(apart, together, strict=True):
        assert_same_bits(a, b)


@built
def test_a_large_neighbour_does_not_make_steps_long() -> None:
    """Where |g| is 10^-4 of the largest in the block, v is 10^-8 of it, which is nearer to 0 than to any entry."""
    scale = torch.full((8, 256), 1e-4)
    scale[:, 0] = 1.0
    tensors, exact = Tensors(torch.zeros(8, 256)), torch.nn.Parameter(torch.zeros(8, 256))
    peer = torch.optim.AdamW([exact], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    for step in range(1, 51):
        grad = scale * (drawn((8, 256), step).sign() + 0.3)
        exact.grad = grad * CLIP
        before, before_exact = tensors.weights.clone(), exact.detach().clone()
        peer.step()
        native_step("adamw", [tensors], [grad], step)
        longest = (exact.detach() - before_exact).abs().max()
        assert (tensors.weights - before).abs().max() <= 1.1 * longest


@built
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_spoils_its_block_only(bad: float) -> None:
    tensors, grad = Tensors(drawn((2, 700), 0)), drawn((2, 700), 1)
    clean = tensors.copy()
    native_step("adamw", [clean], [grad], 1)
    grad[1, 300] = bad
    native_step("adamw", [tensors], [grad], 1)
    spoilt = decode(Codec.INT8, *tensors.first, signed=True).isnan()
    assert bool(spoilt[1, 256:512].all()) and int(spoilt.sum()) == BLOCK
    assert torch.equal(decode(Codec.INT8, *tensors.second, signed=False).isnan(), spoilt)
    assert torch.equal(tensors.weights[0], clean.weights[0])


@built
def test_blocks_that_fade_away_become_zero() -> None:
    tensors = Tensors(drawn((1, 256), 0))
    native_step("adamw", [tensors], [torch.full((1, 256), 1e-18)], 1)
    assert all(scales is not None for _, scales in (tensors.first, tensors.second))
    assert tensors.first[1] > 0 and tensors.second[1] == 0
    assert bool((decode(Codec.INT8, *tensors.second, signed=False) == 0).all())


@built
def test_a_step_is_noticed_by_autograd() -> None:
    weights = torch.nn.Parameter(drawn((4, 300), 0))
    tensors = Tensors(weights.detach())
    tensors.weights = weights
    loss = (weights * weights).sum()
    native_step("lion", [tensors], [drawn((4, 300), 1)], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def exact_quantizer(
    x: torch.Tensor, code: torch.Tensor, absmax_out: torch.Tensor, out: torch.Tensor, blocksize: int
) -> None:
    """What bitsandbytes' table of 65536 bins stands for, the nearest entry, except that v > 0 does not become 0."""
    blocks = x.reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    middles = (code[1:].double() + code[:-1].double()) / 2
    values = blocks * absmax.reciprocal()[:, None]
    nearest = torch.searchsorted(middles, values.double())
    out.copy_(torch.where((code[0] == 0) & (values > 0), nearest.clamp(min=1), nearest).view(out.shape))
    absmax_out.copy_(absmax)


@built
@pytest.mark.parametrize("dtype", FLOATS)
def test_twenty_steps_equal_bitsandbytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CPU step around an exact search; its own is off by up to 7 codes for small numbers, and for that reason does
    not let v become 0 either (test_codecs)."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    kernels: ModuleType = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(kernels, "_quant_blockwise_fp32_direct", exact_quantizer)
    tensors = Tensors(drawn((32, 512), 0, dtype))
    parameter = torch.nn.Parameter(tensors.weights.clone())
    peer = bitsandbytes.optim.AdamW8bit([parameter], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    for step in range(1, 21):
        grad = drawn((32, 512), step, dtype)
        parameter.grad = grad * CLIP  # exact: a power of two
        peer.step()
        native_step("adamw", [tensors], [grad], step)
        state = peer.state[parameter]
        for codes, (ours, _) in zip((state["state1"], state["state2"]), (tensors.first, tensors.second), strict=True):
            # a number half-way between two entries may fall to either side, and is seen again in the next steps
            apart = (codes.int() - ours.int()).abs()
            assert int((apart > 0).sum()) <= 20 and int((apart > 1).sum()) <= 10
    torch.testing.assert_close(tensors.weights, parameter.data, rtol=1e-5, atol=2 * LR)
    assert ((tensors.weights - parameter.data).abs() > 1e-6 + 0.01 * parameter.abs()).float().mean() < 0.001


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(2, 300, dtype=torch.float64)}, "weight of tensor 0: torch.float64 on cpu; needed"),
        ({"weights": torch.zeros(300, 2).T}, r"weight of tensor 0: strides \(1, 2\)"),
        ({"weights": torch.zeros(2, 2, 2)[:, :1]}, "weight of tensor 0: strides"),
        ({"weights": torch.zeros(2, 300, device="meta")}, "weight of tensor 0: torch.float32 on meta"),
        ({"weights": torch.zeros(())}, "weight of tensor 0"),
        ({"grads": torch.zeros(2, 299)}, "gradient of tensor 0: 2 x 299, but the weights ask for 2 x 300"),
        ({"exp_avg": torch.zeros(2, 300, dtype=torch.int8)}, "codes of tensor 0: torch.int8"),
        ({"exp_avg_scales": torch.zeros(2, 1)}, "scales of tensor 0: 2 x 1, but the weights ask for 2 x 2"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    tensors = Tensors(drawn((2, 300), 0))
    names = ("weights", "exp_avg", "exp_avg_scales", "exp_avg_sq", "exp_avg_sq_scales")
    given = {**dict(zip(names, tensors.all(), strict=True)), "grads": drawn((2, 300), 1), **change}
    before = tensors.copy()
    with pytest.raises(ValueError, match=message):
        native.adamw8_(
            **{name: [x] for name, x in given.items()}, steps=[1], lr=LR, beta1=0.9, beta2=0.9, eps=EPS, weight_decay=0
        )
    assert_same_bits(tensors, before)


@built
def test_lists_that_do_not_fit_are_refused() -> None:
    tensors, grad = Tensors(drawn((2, 300), 0)), drawn((2, 300), 1)
    for steps in ([], [0], [1, 2]):
        with pytest.raises(ValueError, match="steps: "):
            native_step("adamw", [tensors], [grad], 1, steps=steps)
    with pytest.raises(ValueError, match="1 weights need as many"):
        native_step("lion", [tensors], [grad, grad], 1)


@pytest.fixture
def other_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the module looks for the library in this test."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    return tmp_path / native.LIBRARY


def test_without_the_library_it_says_why(other_library: Path) -> None:
    assert not native.available() and native.levels() == ()
    assert re.fullmatch(r".*_step8\.so was not built; install a C compiler and reinstall memopt.*", native.why_not())
    with pytest.raises(RuntimeError, match="no native 8-bit step: .* was not built"):
        native_step("lion", [Tensors(drawn((2, 300), 0))], [drawn((2, 300), 1)], 1)


def test_a_library_that_is_none_is_a_reason(other_library: Path) -> None:
    other_library.write_bytes(b"not a library")
    assert not native.available()
    assert "cannot be loaded" in native.why_not()


@built
def test_a_library_of_other_sources_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    monkeypatch.setattr(native, "_VERSION", -1)
    assert not native.available()
    assert "was built from other sources" in native.why_not()


def test_both_sides_say_the_same_version_and_layout() -> None:
    header = (Path(native.__file__).parent / "csrc" / "step8.h").read_text()
    assert f"STEP8_VERSION = {native._VERSION} " in header
    if native.available():
        library = ctypes.CDLL(str(Path(native.__file__).with_name(native.LIBRARY)))
        sizes = tuple(library.memopt_step8_sizes(which) for which in range(3))
        # C fills structs up to a multiple of their largest member; the packed ones end with their last field
        assert sizes == tuple(-(-x.size // 8) * 8 for x in (native._TASK, native._SETTINGS, native._MAP))
