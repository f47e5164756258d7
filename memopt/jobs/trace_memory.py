"""What a training step of a Hugging Face model keeps in memory, followed on fake tensors: nothing is computed.

A model of a few blocks (the first, the second, one of every kind between, the last) is run forward and backward at a
few small batches and lengths. Every moment at which a tensor is made gives one number of live bytes, which is a
polynomial of batch and length (`Curve`); a model of any depth is put together from the blocks' numbers
(`memopt.planning`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memopt.errors import BadInput
from memopt.offload.model import first
from memopt.offload.trace import LiveBytes, quiet
from memopt.patches.hf_masks import whole_sequences
from memopt.patches.hf_model import HFLayeredModel, text_config
from memopt.planning.training_types import Curve, Moment, Pass, Segment, Variant

_BATCHES = (2, 3)
_LENGTHS = (64, 128, 192)
"""Multiples of 64: no kernel pads them. A polynomial of second degree needs three lengths and two batches; one sequence
alone is followed apart, as some copies are made of it only, others not."""


@dataclass(frozen=True)
class Traced:
    """Both passes (see `StepTrace`) and the kind of every block."""

    kinds: tuple[int, ...]
    first: Pass
    later: Pass
    notes: tuple[str, ...]


def trace_step(module: nn.Module, variant: Variant, window: int | None) -> Traced:
    """Follow one step of `module`, a skeleton on meta with the variant's adapters in place; it is used up.

    Raises BadInput for a model that cannot be followed without values.
    """
    model = HFLayeredModel(module)
    kinds, chosen = _kinds(model)
    _cut(model, chosen)
    module.train()
    if variant.gradient_checkpointing:
        module.gradient_checkpointing_enable()  # type: ignore[operator]
        if variant.lora_rank is not None:
            module.enable_input_require_grads()  # type: ignore[operator]
    lengths = _lengths(variant, window)
    batches = (1,) if variant.one_sequence else _BATCHES
    sizes = [(batch, seq) for batch in batches for seq in lengths]
    firsts, laters = _followed(model, variant, sizes)
    fit = _Fit(batches, lengths)
    passes = [fit.whole(runs, len(chosen)) for runs in (firsts, laters)]
    notes = ("some moments differ between lengths: their peaks are fitted instead",) if fit.rough else ()
    return Traced(kinds, passes[0], passes[1], notes)


def _followed(
    model: HFLayeredModel, variant: Variant, sizes: Sequence[tuple[int, int]]
) -> tuple[list[list[_Samples]], list[list[_Samples]]]:
    """The segments of the first and of a later micro-batch at all sizes (batch, length). Raises BadInput.

    A later micro-batch finds gradients already there: what it adds to the first one's bytes has the size of parameters,
    whatever the batch and length. So it is followed at the smallest and the largest size only, unless those disagree.
    """
    corners = (sizes[0], sizes[-1])
    runs = {size: _passes(model, variant, size, later=size in corners) for size in sizes}
    added = [_added(*runs[size]) for size in corners]
    if added[0] is None or added[0] != added[1]:
        runs = {size: _passes(model, variant, size, later=True) for size in sizes}
        return [found[0] for found in runs.values()], [found[1] for found in runs.values()]
    firsts = [found[0] for found in runs.values()]
    return firsts, [_later(found, added[0]) for found in firsts]


def _passes(model: HFLayeredModel, variant: Variant, size: tuple[int, int], *, later: bool) -> list[list[_Samples]]:
    try:
        with quiet("transformers"), whole_sequences():
            return _Run(model, variant, *size).passes(2 if later else 1)
    except BadInput:
        raise
    except Exception as error:  # data-dependent code: anything may be raised
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{type(model.module).__name__} cannot be followed without values "
            f"({type(error).__name__}: {line[:150]}); measure a short run with memopt profile"
        ) from error


def _kinds(model: HFLayeredModel) -> tuple[tuple[int, ...], list[int]]:
    """The kind of every block, and which blocks stand for the kinds: first, second, last, and those between."""
    types = getattr(text_config(model.module.config), "layer_types", None)
    chosen: list[int] = []
    number: dict[Any, int] = {}
    kinds = []
    last = len(model.blocks) - 1
    for index, block in enumerate(model.blocks):
        shapes = tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in block.parameters())
        # what the second finds depends on whether gradients pass through the first: they may not, with adapters
        place = "first" if index == 0 else "last" if index == last else "second" if index == 1 else "between"
        key = (place, type(block), shapes, types[index] if types and len(types) > index else None)
        if key not in number:
            number[key] = len(chosen)
            chosen.append(index)
        kinds.append(number[key])
    return tuple(kinds), chosen


def _cut(model: HFLayeredModel, chosen: Sequence[int]) -> None:
    """Leave only some blocks in the model."""
    parent, _, name = model.blocks_path.rpartition(".")
    blocks = [model.blocks[index] for index in chosen]
    setattr(model.module.get_submodule(parent), name, nn.ModuleList(blocks))
    model.blocks = blocks
    config = text_config(model.module.config)
    types = getattr(config, "layer_types", None)
    if types:
        config.layer_types = [types[index] for index in chosen]


def _lengths(variant: Variant, window: int | None) -> tuple[int, ...]:
    if window is None:
        return _LENGTHS
    if variant.beyond_window:
        start = max(window, 64)
        return (start, start + 64, start + 128)
    if window > _LENGTHS[-1]:
        return _LENGTHS
    if window < 4:
        raise BadInput(f"sliding window of {window} tokens: sequences within it are too short to be planned")
    return (window // 4, window // 2, 3 * window // 4)


@dataclass
class _Samples:
    """Of one segment: (bytes, gradient bytes) of every moment and at the end, above its start."""

    moments: list[tuple[int, int]]
    end: tuple[int, int]


def _added(first: Sequence[_Samples], later: Sequence[_Samples]) -> list[_Samples] | None:
    """By how much every number of a later micro-batch is above the first one's; None if they have other moments."""
    if [len(samples.moments) for samples in first] != [len(samples.moments) for samples in later]:
        return None
    return [
        _Samples([_minus(b, a) for a, b in zip(one.moments, two.moments, strict=True)], _minus(two.end, one.end))
        for one, two in zip(first, later, strict=True)
    ]


def _later(first: Sequence[_Samples], added: Sequence[_Samples]) -> list[_Samples]:
    return [
        _Samples([_plus(a, b) for a, b in zip(one.moments, more.moments, strict=True)], _plus(one.end, more.end))
        for one, more in zip(first, added, strict=True)
    ]


def _plus(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def _minus(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] - b[0], a[1] - b[1]


class _Live(LiveBytes):
    """Live bytes at every moment at which a tensor was made, cut into segments."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients = 0
        self.segments: list[_Samples] = []
        self._start = (0, 0)
        self._moments: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # a model that looks at a value has drawn it to drop a layer with some probability (OPT): it is not dropped
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _watch(self, key: int, t: torch.Tensor) -> None:
        super()._watch(key, t)
        self._moments.append(self._above())

    def _above(self) -> tuple[int, int]:
        return self.now - self._start[0], self.gradients - self._start[1]

    def mark(self) -> None:
        """The current segment ends here."""
        self.segments.append(_Samples(self._moments, self._above()))
        self._moments, self._start = [], (self.now, self.gradients)


class _Run:
    """One batch size and length."""

    def __init__(self, model: HFLayeredModel, variant: Variant, batch: int, seq: int):
        self._model, self._variant, self._batch, self._seq = model, variant, batch, seq
        self._forward = True
        self._live = _Live()

    def passes(self, count: int) -> list[list[_Samples]]:
        """Segments of `count` micro-batches, one after the other."""
        with FakeTensorMode() as mode, contextlib.ExitStack() as undo:
            undo.enter_context(_fake_state(self._model.module, mode))
            for hooks in self._hooks():
                undo.callback(hooks.remove)
            tokens = torch.zeros(self._batch, self._seq, dtype=torch.int64, device="cpu")
            found = []
            with self._live:
                for _ in range(count):
                    self._live.segments = []
                    self._step(tokens)
                    found.append(self._live.segments)
            return found

    def _step(self, tokens: torch.Tensor) -> None:
        self._forward = True
        cast = self._variant.autocast
        with torch.autocast("cpu", getattr(torch, cast) if cast else torch.bfloat16, enabled=cast is not None):
            loss = self._model.module(input_ids=tokens, labels=tokens, use_cache=False).loss
        self._live.mark()
        self._forward = False
        loss.backward()
        del loss
        blocks = len(self._model.blocks)
        while len(self._live.segments) < 2 * blocks + 4:  # nothing before the first adapter has a gradient
            self._live.mark()

    def _hooks(self) -> Iterator[Any]:
        for index, block in enumerate(self._model.blocks):
            if index == 0:
                yield block.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield block.register_forward_hook(self._leave)
        for param in self._model.module.parameters():
            if param.requires_grad:
                yield param.register_post_accumulate_grad_hook(self._tally())

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._forward:
            self._live.mark()
            self._watch_gradient(args[0] if args else kwargs["hidden_states"])

    def _leave(self, _: nn.Module, __: Any, out: Any) -> None:
        if self._forward:
            self._live.mark()
            self._watch_gradient(first(out))

    def _watch_gradient(self, hidden: torch.Tensor) -> None:
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._live.mark())

    def _tally(self) -> Callable[[torch.Tensor], None]:
        counted = False

        def hook(param: torch.Tensor) -> None:
            nonlocal counted
            if not counted and param.grad is not None:
                counted = True
                self._live.gradients += param.grad.untyped_storage().nbytes()

        return hook


@contextlib.contextmanager
def _fake_state(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Fake parameters and buffers in place of a skeleton's, tied ones tied."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Any] = {}
    for child in module.modules():
        for key, param in child._parameters.items():
            if param is not None:
                if id(param) not in made:
                    fake = torch.empty(param.shape, dtype=param.dtype, device="cpu")
                    made[id(param)] = nn.Parameter(fake, requires_grad=param.requires_grad)
                before.append((child._parameters, key, param))
        for key, buffer in child._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    on_meta = buffer.is_meta
                    made[id(buffer)] = (
                        torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
                        if on_meta
                        else mode.from_tensor(buffer)
                    )
                before.append((child._buffers, key, buffer))
    for holder, key, old in before:
        holder[key] = made[id(old)]
    try:
        yield
    finally:
        for holder, key, old in before:
            holder[key] = old


class _Fit:
    """Curves through samples at every batch and length, batch by batch."""

    def __init__(self, batches: Sequence[int], lengths: Sequence[int]):
        rows = np.array([[1, s, b, b * s, s * s, b * s * s] for b in batches for s in lengths], dtype=np.float64)
        self._terms = [0, 1, 4] if len(batches) == 1 else list(range(6))
        self._inverse = np.linalg.inv(rows[:, self._terms])
        self.rough = False

    def whole(self, runs: Sequence[Sequence[_Samples]], blocks: int) -> Pass:
        """One pass from the segments of all runs, in the order in which they came."""
        segments = [self._segment([run[i] for run in runs]) for i in range(2 * blocks + 4)]
        backward = segments[blocks + 3 : 2 * blocks + 3]
        return Pass(
            entry_forward=segments[0],
            blocks_forward=tuple(segments[1 : blocks + 1]),
            exit_forward=segments[blocks + 1],
            exit_backward=segments[blocks + 2],
            blocks_backward=tuple(reversed(backward)),
            entry_backward=segments[2 * blocks + 3],
        )

    def _segment(self, samples: Sequence[_Samples]) -> Segment:
        lists = [s.moments for s in samples]
        if len({len(moments) for moments in lists}) > 1:
            self.rough = True
            lists = [[max(moments, default=(0, 0))] for moments in lists]
        curves = self._curves([[total for total, _ in moments] for moments in lists])
        gradients = [g for _, g in lists[0]]
        end = self._curves([[s.end[0]] for s in samples])
        return Segment(
            moments=tuple(_undominated(curves, gradients)), end=Moment(Curve(_numbers(end[0])), samples[0].end[1])
        )

    def _curves(self, values: Sequence[Sequence[int]]) -> Any:
        """values: one row per run, one column per moment -> (moments, 6) coefficients."""
        table = np.array(values, dtype=np.float64).reshape(len(values), -1)
        curves = np.zeros((table.shape[1], 6))
        curves[:, self._terms] = np.round(self._inverse @ table, 4).T
        return curves


def _undominated(curves: Any, gradients: Sequence[int]) -> Iterator[Moment]:
    """Moments that may be the highest for some batch and length."""
    order = sorted(range(len(curves)), key=lambda i: -float(curves[i].sum()))
    kept: list[int] = []
    for i in order:
        if not any((curves[i] <= curves[k]).all() for k in kept):
            kept.append(i)
            yield Moment(Curve(_numbers(curves[i])), gradients[i])


def _numbers(c: Any) -> tuple[float, float, float, float, float, float]:
    a = [float(x) + 0.0 for x in c]
    return (a[0], a[1], a[2], a[3], a[4], a[5])
