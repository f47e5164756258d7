"""Attribution and phases of the PyTorch objects of a program, together: the only door from `program` to torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from memopt.profiler.torch_attribution import TorchAttribution, mapped_note, runtime_bytes
from memopt.profiler.torch_phases import AutoPhases


class TorchWatch:
    """Made at the first `watch`: what the process holds then (`charged_bytes`) less its tensors counts as runtime.

    `begin` None: no phases are found.
    """

    def __init__(
        self, *, charged_bytes: int, activations: bool, begin: Callable[[str], None] | None, end: Callable[[str], None]
    ) -> None:
        self.attribution = TorchAttribution(runtime_bytes=runtime_bytes(charged_bytes), activations=activations)
        self._phases = None if begin is None else AutoPhases(begin, end, self.attribution.watch)
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(self, watched: Any) -> None:
        """A module, an optimizer (also inside a wrapper such as accelerate's), or a key-value cache."""
        watched = _inner_optimizer(watched)
        self.attribution.watch(watched)
        if (
            self._phases is not None
            and isinstance(watched, torch.nn.Module | torch.optim.Optimizer)
            and watched not in self._known
        ):
            self._known.add(watched)
            self._phases.watch(watched)

    def notes(self) -> list[str]:
        """What a report should say."""
        mapped = self.attribution.mapped_bytes()
        return [*self.attribution.notes, *([mapped_note(mapped)] if mapped else [])]

    def close(self) -> None:
        """Take all hooks away."""
        if self._phases is not None:
            self._phases.close()
        self.attribution.close()


def _inner_optimizer(watched: Any) -> Any:
    while hasattr(watched, "param_groups") and isinstance(inner := getattr(watched, "optimizer", None), object):
        if not hasattr(inner, "param_groups"):
            break
        watched = inner
    return watched
