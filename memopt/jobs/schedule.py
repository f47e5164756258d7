"""Learning-rate schedules as a pure function of the step; the same numbers as `transformers.get_scheduler`."""

from __future__ import annotations

import math

from memopt.errors import BadInput


def lr_at(step: int, total_steps: int, *, lr: float, schedule: str, warmup_steps: int = 0) -> float:
    """Learning rate of optimizer step `step` (0 is the first) of `total_steps`.

    `linear` and `cosine` rise from 0 over `warmup_steps` and reach 0 after the last step; `constant` ignores the
    warm-up, as in transformers (`optimization.py`, 5.x). Raises BadInput on an unknown schedule.
    """
    if schedule == "constant":
        return lr
    if schedule not in ("constant_with_warmup", "linear", "cosine"):
        raise BadInput(f"schedule = {schedule!r}: give constant, constant_with_warmup, linear or cosine")
    if step < warmup_steps:
        return lr * (step / max(1.0, warmup_steps))
    if schedule == "constant_with_warmup":
        return lr
    decay_steps = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return lr * max(0.0, (total_steps - step) / decay_steps)
    progress = (step - warmup_steps) / decay_steps
    return lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
