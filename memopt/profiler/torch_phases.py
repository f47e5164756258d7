"""Phases of a PyTorch program found by its own hooks: forward, prefill, decode, backward, optimizer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Begin = Callable[[str], None]
End = Callable[[str], None]
_CACHE_NAMES = ("past_key_values", "cache_params")  # transformers' arguments, and fields of its results


class _Inside(threading.local):
    """The watched modules this thread is in the call of, outermost first: (id, name of the phase)."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []


class AutoPhases:
    """Calls `begin(name)` and `end(name)` around the passes of watched modules and the steps of watched optimizers.

    A forward pass is a call of a watched module that is not inside another one's. The backward pass begins with the
    first gradient of a module's result, and ends when autograd has finished. `found_cache(cache)`: a key-value cache
    was passed in or came out. Hooks only look; a module's results and gradients are what they were.
    """

    def __init__(self, begin: Begin, end: End, found_cache: Callable[[Any], None]) -> None:
        self._begin, self._end, self._found_cache = begin, end, found_cache
        self._handles: list[Any] = []
        self._threads = _Inside()
        self._backward = False
        self.passes = 0
        """Calls of watched modules so far that were not inside another one's."""
        self.enabled = True
        """Whether phases are found: `begin` and `end` are called, but for `end("optimizer")`, which always is."""
        self.spent_s = 0.0
        """CPU seconds that `begin` and `end` have taken."""

    def watch(self, watched: torch.nn.Module | torch.optim.Optimizer) -> None:
        """Set the hooks of one module or optimizer."""
        if isinstance(watched, torch.nn.Module):
            self._handles.append(watched.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
            self._handles.append(watched.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        else:
            self._handles.append(watched.register_step_pre_hook(self._before_step))
            self._handles.append(watched.register_step_post_hook(self._after_step))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # what is traced into a graph cannot be timed
        calls = self._threads.calls
        if not calls:
            self.passes += 1
            if not self.enabled:
                return
        cache = _cache_in(kwargs)
        if calls:
            name = calls[-1][1]
        else:
            name = _name(cache, args, kwargs)
            self._finish_backward()  # in case nobody told its end
            self._tell(self._begin, name)
        calls.append((id(module), name))
        if cache is not None:
            self._found_cache(cache)

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls = self._threads.calls
        if torch.compiler.is_compiling() or not calls or calls[-1][0] != id(module):
            return
        _, name = calls.pop()
        if calls:
            return
        self._tell(self._end, name)
        if torch.is_grad_enabled():
            for tensor in _tensors(result):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(self._gradient_came)
        elif isinstance(result, Mapping) and (cache := _cache_in(result)) is not None:
            self._found_cache(cache)

    def _gradient_came(self, gradient: torch.Tensor) -> None:
        if self._backward or self._threads.calls:
            return
        with contextlib.suppress(Exception):  # outside an engine's run there is no end to wait for
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._finish_backward)
            self._backward = True
            self._tell(self._begin, "backward")

    def _finish_backward(self) -> None:
        if self._backward:
            self._backward = False
            self._tell(self._end, "backward")

    def _before_step(self, *_: Any) -> None:
        if self.enabled:
            self._finish_backward()
            self._tell(self._begin, "optimizer")

    def _after_step(self, *_: Any) -> None:
        self._end("optimizer")

    def _tell(self, what: Begin | End, name: str) -> None:
        began = time.thread_time()
        what(name)
        self.spent_s += time.thread_time() - began


def _cache_in(values: Mapping[str, Any]) -> Any:
    """A key-value cache among named values; with gradients its tensors are autograd's, and counted as activations."""
    if torch.is_grad_enabled():
        return None
    return next((values[name] for name in _CACHE_NAMES if values.get(name) is not None), None)


def _name(cache: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Generation is told by a cache without gradients: many tokens fill it, one extends it."""
    if cache is None:
        return "forward"
    ids = kwargs.get("input_ids", args[0] if args else None)
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    length = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.ndim > 1 else 1
    return "prefill" if length > 1 else "decode"


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    values = (
        result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else [result]
    )
    yield from (value for value in values if isinstance(value, torch.Tensor))
