"""The learning rate of each step, against transformers' own schedulers."""

from __future__ import annotations

import pytest

from memopt.errors import BadInput
from memopt.jobs.config import SCHEDULES
from memopt.jobs.schedule import lr_at


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (10, 0), (17, 5), (7, 7), (5, 9)])
def test_equals_transformers(schedule: str, total: int, warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 2):
        expected = optimizer.param_groups[0]["lr"]
        assert lr_at(step, total, lr=3e-4, schedule=schedule, warmup_steps=warmup) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_unknown_schedule() -> None:
    with pytest.raises(BadInput, match="schedule = 'step'"):
        lr_at(0, 1, lr=1.0, schedule="step")
