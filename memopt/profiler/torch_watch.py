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
        self._passes = 0
        self._optimizers = False

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
            self._optimizers |= isinstance(watched, torch.optim.Optimizer)
            self._phases.watch(watched)

    def attributed(self) -> Attributed | None:
        """Bytes now; None in the middle of a step whose gradients and activations are not counted."""
        return self.attribution() if self.attribution.observing else None

    def forward_begins(self, grown: Callable[[], bool]) -> None:
        """A pass forward begins: a step that could not be ended where it ended is ended now."""
        if self._ending:
            self._end_step(grown, skip_phases=False)

    def step_ended(self, grown: Callable[[], bool]) -> None:
        """A step is over; decides what is looked at in the next. In the program's own thread.

        `grown()`: whether memory is higher than at any end of a step before. Does nothing when no pass forward has
        begun since the last time. In the middle of a backward pass (some optimizers step there) it waits for the next
        pass forward.
        """
        if self._phases is not None and self._phases.passes == self._passes:
            return
        self._ending = bool(torch._C._current_graph_task_id() != -1)
        if not self._ending:
            self._end_step(grown, skip_phases=True)

    def backward_ended(self) -> None:
        """Where no optimizer is watched, the step ends with the next pass forward."""
        self._ending |= not self._optimizers

    def _end_step(self, grown: Callable[[], bool], *, skip_phases: bool) -> None:
        self._ending = False
        phases, attribution = self._phases, self.attribution
        if phases is not None:
            self._passes = phases.passes
        if attribution.observing:
            attribution.look()
        wanted = self._observed.ended(
            time.monotonic(),
            spent_s=attribution.spent_s(),
            phases_spent_s=0.0 if phases is None else phases.spent_s,
            grown=grown,
        )
        if wanted.observe != attribution.observing:
            attribution.observe(wanted.observe)
            self._observed.kept(observe=attribution.observing)
        if phases is not None:
            # found phases are what tells the end of such steps
            phases.enabled = wanted.phases or not skip_phases

    def notes(self) -> list[str]:
        """What a report should say."""
        mapped = self.attribution.mapped_bytes()
        return [*self.attribution.notes, *([mapped_note(mapped)] if mapped else []), *self._observed.notes()]

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
