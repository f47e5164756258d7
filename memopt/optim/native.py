"""Steps with 8-bit states on the CPU in one pass over memory: C kernels (csrc/), built with the package where there is
a compiler, loaded with ctypes.

Per block of 256 elements they decode the states, update the weights and encode the states again, so that nothing of the
size of a tensor is held besides. The numbers are those of `memopt.optim.rules` between `codecs.decode` and
`codecs.encode_` with Codec.INT8 (dynamic map), up to float32 rounding; they do not depend on the number of threads, nor
on the instructions of the machine.

Weights and gradients are float32 or bfloat16, in any mixture; bfloat16 weights are rounded to nearest, half to even.
Every tensor is a vector, a contiguous tensor of any shape, or a matrix whose rows are contiguous; its state has the
same shape and the layout of `memopt.optim.codecs`. Gradients must be finite: a block with one that is not decodes to
NaN from then on.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memopt.optim.codecs import BLOCK
from memopt.optim.dynamic_map import line_entries, lines, search_table

LIBRARY = "_step8.so"
"""File name beside this module; setup.py builds it."""
_VERSION = 1
_TASK = struct.Struct("@" + 6 * "Pq" + "3q2f2i")
_SETTINGS = struct.Struct("@2P8f")
_MAP = struct.Struct("@P304f")
_LEVELS = ("plain", "avx2", "avx512")
_FLOATS = (torch.float32, torch.bfloat16)
_DTYPES = {"weight": _FLOATS, "gradient": _FLOATS, "codes": (torch.uint8,), "scales": (torch.float32,)}

States = Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]


def available() -> bool:
    """Whether the kernels can be called."""
    return _load().library is not None


def why_not() -> str:
    """One sentence on why the kernels cannot be called and what to do; empty if they can."""
    return _load().reason


def levels() -> tuple[str, ...]:
    """Names of the instruction sets this machine can run, the plainest first; the last is used by default."""
    library = _load().library
    return () if library is None else _LEVELS[: library.memopt_step8_level() + 1]


def adamw8_(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avg: Sequence[torch.Tensor],  # uint8, signed map
    exp_avg_scales: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],  # uint8, unsigned map
    exp_avg_sq_scales: Sequence[torch.Tensor],
    *,
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    threads: int | None = None,
    level: str | None = None,
) -> None:
    """One AdamW step of many tensors, in place. `steps`, one per tensor, count from 1.

    `grad_scale` multiplies the gradients (a clipping coefficient). `threads` defaults to torch's. `level`, one of
    `levels()`, is for tests. Raises ValueError for tensors that do not fit together, RuntimeError if not available.
    """
    if len(steps) != len(weights) or min(steps, default=1) < 1:
        raise ValueError(f"steps: {len(steps)} for {len(weights)} tensors; give each a number from 1 on")
    # m / (sqrt(v) / root + eps) = root * m / (sqrt(v) + eps * root): nothing is left to correct per element
    roots = [(1 - beta2**step) ** 0.5 for step in steps]
    sizes = [lr * root / (1 - beta1**step) for root, step in zip(roots, steps, strict=True)]
    settings = _settings((beta1, beta2), decay=1 - lr * weight_decay, grad_scale=grad_scale)
    states = ((exp_avg, exp_avg_scales), (exp_avg_sq, exp_avg_sq_scales))
    _step(
        "memopt_adamw8", _tasks(weights, grads, states, sizes, [eps * root for root in roots]), settings, threads, level
    )
    torch.autograd.graph.increment_version(weights)


def lion8_(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avg: Sequence[torch.Tensor],  # uint8, signed map
    exp_avg_scales: Sequence[torch.Tensor],
    *,
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    threads: int | None = None,
    level: str | None = None,
) -> None:
    """One Lion step of many tensors, in place; see `adamw8_`."""
    settings = _settings((beta1, beta2), decay=1 - lr * weight_decay, grad_scale=grad_scale)
    tasks = _tasks(weights, grads, ((exp_avg, exp_avg_scales),), [lr] * len(weights))
    _step("memopt_lion8", tasks, settings, threads, level)
    torch.autograd.graph.increment_version(weights)


def sgd8_(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momentum_buffer: Sequence[torch.Tensor],  # uint8, signed map
    momentum_buffer_scales: Sequence[torch.Tensor],
    *,
    steps: Sequence[int],
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    grad_scale: float = 1.0,
    threads: int | None = None,
    level: str | None = None,
) -> None:
    """One step of SGD with momentum and decoupled decay of many tensors, in place; see `adamw8_`."""
    direction = (momentum, 1.0) if nesterov else (1.0, 0.0)
    settings = _settings((momentum, 0.0), decay=1 - lr * weight_decay, grad_scale=grad_scale, direction=direction)
    tasks = _tasks(weights, grads, ((momentum_buffer, momentum_buffer_scales),), [lr] * len(weights))
    _step("memopt_sgd8", tasks, settings, threads, level)
    torch.autograd.graph.increment_version(weights)


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL | None
    reason: str


@functools.cache
def _load() -> _Loaded:
    path = Path(__file__).with_name(LIBRARY)
    remedy = "install a C compiler and reinstall memopt (pip install -e . in a source tree)"
    if not path.exists():
        return _Loaded(None, f"{path} was not built; {remedy}")
    try:
        library = ctypes.CDLL(str(path))
        version = library.memopt_step8_version()
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"{path} cannot be loaded ({error}); {remedy}")
    if version != _VERSION:
        return _Loaded(None, f"{path} was built from other sources (version {version}, not {_VERSION}); {remedy}")
    for name in ("memopt_adamw8", "memopt_lion8", "memopt_sgd8"):
        function = getattr(library, name)
        long, integer, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
        function.argtypes = (pointer, long, long, pointer, integer, integer, pointer)
        function.restype = None
    return _Loaded(library, "")


@dataclass(frozen=True)
class _Tasks:
    """The C array of tasks, and how many blocks they have together."""

    packed: bytes
    count: int
    blocks: int


def _tasks(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: States,
    step_sizes: Sequence[float],
    epsilons: Sequence[float] | None = None,
) -> _Tasks:
    count = len(weights)
    columns = [tensors for pair in states for tensors in pair]
    if any(len(tensors) != count for tensors in (grads, *columns)):
        raise ValueError(f"{count} weights need as many gradients, codes and scales")
    absent = (0, 0, 0, 0) if len(states) == 1 else ()
    blocks, packed = 0, bytearray(_TASK.size * count)
    for i, (weight, grad, *state) in enumerate(zip(weights, grads, *columns, strict=True)):
        rows, cols, stride = _matrix(weight, "weight", i)
        per_row = -(-cols // BLOCK)
        rest: list[int] = []
        for codes, scales in zip(state[::2], state[1::2], strict=True):
            rest += _rows(codes, "codes", i, rows, cols)
            rest += _rows(scales, "scales", i, rows, per_row)
        _TASK.pack_into(
            packed,
            i * _TASK.size,
            weight.data_ptr(),
            stride,
            *_rows(grad, "gradient", i, rows, cols),
            *rest,
            *absent,
            rows,
            cols,
            blocks,
            step_sizes[i],
            0.0 if epsilons is None else epsilons[i],
            weight.dtype == torch.bfloat16,
            grad.dtype == torch.bfloat16,
        )
        blocks += rows * per_row
    return _Tasks(bytes(packed), count, blocks)


def _rows(tensor: torch.Tensor, what: str, i: int, rows: int, cols: int) -> tuple[int, int]:
    """Address and row stride of a tensor that must have so many rows and columns."""
    found_rows, found_cols, stride = _matrix(tensor, what, i)
    if found_rows != rows or found_cols != cols:
        raise ValueError(f"{what} of tensor {i}: {found_rows} x {found_cols}, but the weights ask for {rows} x {cols}")
    return tensor.data_ptr(), stride


def _matrix(tensor: torch.Tensor, what: str, i: int) -> tuple[int, int, int]:
    """Rows, columns and row stride."""
    if not tensor.is_cpu or tensor.dtype not in _DTYPES[what]:
        needed = " or ".join(map(str, _DTYPES[what]))
        raise ValueError(f"{what} of tensor {i}: {tensor.dtype} on {tensor.device}; needed is {needed} on cpu")
    shape = tensor.shape
    if shape and tensor.is_contiguous():
        cols = shape[-1]
        return tensor.numel() // cols if cols else 0, cols, cols
    if len(shape) == 2 and (tensor.stride(1) == 1 or shape[1] == 1):
        return shape[0], shape[1], tensor.stride(0)
    raise ValueError(f"{what} of tensor {i}: strides {tensor.stride()}; it, or its rows, must be contiguous")


def _settings(
    beta: tuple[float, float],
    *,
    decay: float,
    grad_scale: float,
    direction: tuple[float, float] = (1.0, 0.0),
) -> bytes:
    maps = (ctypes.addressof(_map(signed)) for signed in (True, False))
    return _SETTINGS.pack(*maps, *beta, 1 - beta[0], 1 - beta[1], decay, grad_scale, *direction)


@functools.cache
def _map(signed: bool) -> ctypes.Array[ctypes.c_char]:
    numbers = [*line_entries(signed).tolist(), *lines(signed).flatten().tolist()]
    packed = _MAP.pack(search_table(signed).data_ptr(), *numbers)
    return ctypes.create_string_buffer(packed, len(packed))


def _step(name: str, tasks: _Tasks, settings: bytes, threads: int | None, level: str | None) -> None:
    loaded = _load()
    if loaded.library is None:
        raise RuntimeError(f"no native 8-bit step: {loaded.reason}")
    function: Callable[..., None] = getattr(loaded.library, name)
    known = levels()
    number = known.index(level) if level is not None else len(known) - 1
    wanted = torch.get_num_threads() if threads is None else threads
    function(tasks.packed, tasks.count, tasks.blocks, settings, number, wanted, _parallel())


@functools.cache
def _parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch uses; None if there is no such thing."""
    try:
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # searches what the file depends on, too
    except (OSError, AttributeError):
        return None
    return ctypes.cast(found, ctypes.c_void_p).value
