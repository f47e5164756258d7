"""bitsandbytes' 8-bit kernels (0.44 and later) for states on a GPU, through its public functional interface.

Its blocks of 256 run over the flat tensor, ours along rows: they are the same where rows are whole blocks. Its AdamW
decays after the step and ours before, so the decay is done here. Its SGD couples the decay with the momentum, so only
AdamW and Lion are taken; the rest goes the plain way.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from memopt.optim.codecs import BLOCK, Codec
from memopt.optim.dynamic_map import dynamic_map
from memopt.optim.element import Hyper, Stored, Task

_NAMES = {"adamw": "adam", "lion": "lion"}
_FLOATS = (torch.float32, torch.bfloat16)


class BitsAndBytes:
    """Meets memopt.optim.element.DeviceKernels."""

    def takes(self, rule: str, task: Task) -> bool:
        """Whether the kernel does what the plain path would."""
        weights = task.weights
        whole_blocks = weights.ndim < 2 or weights.shape[-1] % BLOCK == 0
        same = weights.dtype == task.grad.dtype and weights.dtype in _FLOATS
        return rule in _NAMES and same and whole_blocks and all(s.codec == Codec.INT8 for s in task.states)

    def step_(self, rule: str, hyper: Hyper, task: Task) -> None:
        """One step in place."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        first, second = task.states[0], task.states[1] if len(task.states) > 1 else None
        if hyper.weight_decay:
            task.weights.mul_(1 - hyper.lr * hyper.weight_decay)
        # by name: 0.50 took arguments out of the middle, and a call by position then meant something else
        optimizer_update_8bit_blockwise(
            optimizer_name=_NAMES[rule],
            g=task.grad,
            p=task.weights,
            state1=first.values,
            state2=None if second is None else second.values,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            beta3=0.0,
            alpha=0.0,
            eps=hyper.eps,
            step=task.step,
            lr=hyper.lr,
            qmap1=dynamic_map(True, task.weights.device),
            qmap2=None if second is None else dynamic_map(False, task.weights.device),
            absmax1=_flat(first),
            absmax2=None if second is None else _flat(second),
            weight_decay=0.0,
            gnorm_scale=1.0,
            skip_zeros=False,
        )


def _flat(state: Stored) -> torch.Tensor:
    assert state.scales is not None
    return state.scales.view(-1)


def available() -> BitsAndBytes | None:
    """The kernels, if bitsandbytes is installed."""
    return BitsAndBytes() if find_spec("bitsandbytes") is not None else None
