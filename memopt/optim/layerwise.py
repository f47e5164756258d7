"""Update each parameter during the backward pass, as soon as its gradient is complete, and free the gradient.

Works with every preset. With gradient accumulation the update waits for the last micro-batch (`gate`): the gradients of
all parameters are then held from the first to the last, as without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from memopt.errors import BadInput
from memopt.optim.items import Route
from memopt.optim.optimizer import Optimizer
from memopt.optim.sharding import is_sharded, local

Clipping = Literal["none", "per_param", "previous_norm"]
_EPS = 1e-6
"""Added to a norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does."""


class Layerwise:
    """Hooks on the parameters of an optimizer, from construction to `close`.

    The global norm is known only when the last gradient is there, and by then the first are gone. So clipping is one of
    `none`; `per_param`, each gradient by its own norm, which bounds the update of every parameter but changes the
    direction of the whole; `previous_norm`, by the global norm of the step before, which is exact while the norm moves
    slowly, and leaves the first step unclipped and a sudden spike clipped one step late.

    A gradient that is not finite is found when those of later layers have been used: nonfinite="skip" leaves out that
    parameter's update only, and counts the step once.

    `optimizer.step()` still has to be called: it updates what was used outside the backward pass, and lets schedulers
    count. fp16 loss scaling cannot work (a gradient is used before the scaler has looked at it).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        gate: Callable[[], bool] = lambda: True,
        clipping: Clipping = "none",
        max_norm: float = 1.0,
    ) -> None:
        if clipping not in ("none", "per_param", "previous_norm"):
            raise BadInput(f"clipping: {clipping!r} is not one of none, per_param, previous_norm")
        if clipping != "none" and not max_norm > 0:
            raise BadInput(f"max_norm: {max_norm} is not positive; use clipping='none' to clip nothing")
        self._optimizer, self._gate, self._clipping, self._max_norm = optimizer, gate, clipping, max_norm
        self._square, self._skipped = 0.0, False
        self._finish = optimizer.register_step_post_hook(lambda *_: self._end_step())
        optimizer.charge()  # what does not fit is refused before the first backward pass changes anything
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._on_grad, number, route))
            for number, param, route in optimizer.placed_params()
            if param.requires_grad
        ]

    @property
    def norm(self) -> float:
        """Global norm of the gradients of the last complete step for which it was finite, before clipping."""
        return float(self._optimizer.param_groups[0]["previous_norm"])

    def close(self) -> None:
        """Take the hooks away: the next step is an ordinary one."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._finish.remove()

    @torch.no_grad()
    def _on_grad(self, group: int, route: Route, param: torch.Tensor) -> None:
        if not self._gate() or param.grad is None:
            return
        assert isinstance(param, torch.nn.Parameter)
        norm = _norm(param.grad)
        self._square += norm**2
        reference = {"none": 0.0, "per_param": norm, "previous_norm": self.norm}[self._clipping]
        if self._max_norm < reference < math.inf:
            local(param.grad).mul_(self._max_norm / (reference + _EPS))
        self._skipped |= not self._optimizer.update_one(group, param, route)
        param.grad = None

    def _end_step(self) -> None:
        norm = self._square**0.5
        if self._skipped:
            self._optimizer.count_skipped()
        self._square, self._skipped = 0.0, False
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["previous_norm"] = norm


def _norm(grad: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
    return float(norm.full_tensor() if is_sharded(norm) else norm)
