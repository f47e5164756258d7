"""Attribution and phases of the PyTorch objects of a program, together: the only door from `program` to torch."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from memopt.profiler.measured import Attributed
from memopt.profiler.observed import Observed
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
        self._observed = Observed()
        self._ending = False
        self._fresh = begin is None

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

    def attributed(self) -> Attributed | None:
        """Bytes now; None in the middle of a step whose gradients and activations are not counted."""
        return self.attribution() if self.attribution.observing else None

    def forward_begins(self, grown: Callable[[], bool]) -> None:
        """A pass forward begins: a step that could not be ended where it ended is ended now."""
        if self._ending:
            self.step_ended(grown)
        self._fresh = True

    def step_ended(self, grown: Callable[[], bool]) -> None:
        """A step is over; decides whether the next is observed. In the program's own thread.

        `grown()`: whether memory is higher than at any end of a step before. Does nothing when no pass forward has
        begun since the last time. In the middle of a backward pass (some optimizers step there) it waits for the next
        pass forward.
        """
        if not self._fresh and not self._ending:
            return
        self._ending = bool(torch._C._current_graph_task_id() != -1)
        if self._ending:
            return
        self._fresh = self._phases is None
        attribution = self.attribution
        observing = attribution.observing
        if observing:
            attribution.look()
        spent_s = attribution.spent_s()
        attribution.observe(self._observed.ended(time.monotonic(), observing=observing, spent_s=spent_s, grown=grown()))

    def end_later(self) -> None:
        """The step ends where the next pass forward begins."""
        self._ending = True

    def notes(self) -> list[str]:
        """What a report should say."""
        mapped, unobserved = self.attribution.mapped_bytes(), self._observed.note()
        told = [mapped_note(mapped)] if mapped else []
        return [*self.attribution.notes, *told, *([unobserved] if unobserved else [])]

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
