"""What one block costs in activations, found by running it on fake tensors: shapes are followed, nothing is
computed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.offload.model import BlockCall, first


@dataclass(frozen=True)
class BlockTrace:
    """Bytes alive at the worst moment of one micro-batch in one block, parameters and inputs not counted."""

    forward_bytes: int
    backward_bytes: int
    """Recomputation and backward, with the gradient of one parameter at a time."""


class _FakeRun:
    """One block with fake parameters of a dtype, and its call with fake tensors."""

    def __init__(self, mode: FakeTensorMode, block: nn.Module, call: BlockCall, dtype: torch.dtype):
        def convert(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            fake = mode.from_tensor(x)
            return torch.empty_like(fake, dtype=dtype) if fake.is_floating_point() else fake

        self.block = block
        self.params = {
            n: nn.Parameter(torch.empty(p.shape, dtype=dtype, device="cpu"), p.requires_grad)
            for n, p in block.named_parameters()
        }
        self.buffers = {n: mode.from_tensor(b) for n, b in block.named_buffers()}
        self.args, self.kwargs = torch.utils._pytree.tree_map(convert, (call.args, dict(call.kwargs)))

    def __call__(self, hidden: torch.Tensor) -> Any:
        return functional_call(self.block, {**self.params, **self.buffers}, (hidden, *self.args), self.kwargs)


def returns_tuple(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> bool:
    """Whether a block returns (hidden, ...) rather than hidden."""
    with quiet(), FakeTensorMode() as mode, torch.no_grad():
        # bfloat16: the one dtype every operator has a shape rule for (grouped matrix products of MoE blocks)
        run = _FakeRun(mode, block, call, torch.bfloat16)
        return isinstance(run(torch.empty(hidden.shape, dtype=torch.bfloat16, device="cpu")), tuple)


def trace_block(block: nn.Module, hidden: torch.Tensor, call: BlockCall, dtype: torch.dtype) -> BlockTrace:
    """Follow one forward without gradients and one recomputation with backward.

    hidden: (B, S, D) of the micro-batch (its values do not matter). Where an operator has no shape rule for `dtype`,
    the trace is made in bfloat16 and scaled. Raises whatever the block raises when it needs values fake tensors do
    not have.
    """
    try:
        return _trace(block, hidden, call, dtype)
    except RuntimeError:
        trace = _trace(block, hidden, call, torch.bfloat16)
        scale = dtype.itemsize / torch.bfloat16.itemsize
        return BlockTrace(int(trace.forward_bytes * scale), int(trace.backward_bytes * scale))


def _trace(block: nn.Module, hidden: torch.Tensor, call: BlockCall, dtype: torch.dtype) -> BlockTrace:
    with quiet(), FakeTensorMode() as mode:
        run = _FakeRun(mode, block, call, dtype)
        entry = torch.empty(hidden.shape, dtype=dtype, device="cpu")
        with LiveBytes() as live, torch.no_grad():
            run(entry)
        forward = live.peak
        for p in run.params.values():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_drop_grad)
        gradient = torch.empty_like(entry)
        with LiveBytes() as live:
            first(run(entry.requires_grad_())).backward(gradient)
        return BlockTrace(forward_bytes=forward, backward_bytes=live.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still alive.

    `meta`: of tensors on meta too, as if they took any.
    """

    def __init__(self, *, meta: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._meta = meta
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_storage_key(t) for t in _tensors((args, kwargs))}
        if func is torch.ops.aten._grouped_mm.default:
            func = _grouped_mm
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            if (key := _storage_key(t)) not in inputs and key not in self._seen and (self._meta or not t.is_meta):
                self._watch(key, t)
        return out

    def _watch(self, key: int, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        nbytes = storage.nbytes()
        self.now += nbytes
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.now -= nbytes

        self._seen[key] = weakref.ref(storage, gone)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    """Shapes of a grouped matrix product (the experts of an MoE block): torch has a rule for bfloat16 only, its CPU
    kernel takes any type."""
    half = [torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device=x.device) for x in (a, b)]
    out = torch.ops.aten._grouped_mm.default(*half, *rest, **more)
    return torch.empty_strided(out.shape, out.stride(), dtype=a.dtype, device=a.device)


def _storage_key(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _drop_grad(p: torch.Tensor) -> None:
    p.grad = None


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Fake tensors log every operator they cannot follow, with a traceback; the exception says as much. `names`: other
    loggers that shall say nothing meanwhile."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", *names)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
