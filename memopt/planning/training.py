"""What training will need: bytes of every tier by phase, traffic and work of one step. Pure functions of a job."""

from __future__ import annotations

from memopt.forecast_types import PhaseForecast
from memopt.planning.training_types import TrainingFlops, TrainingJob, TrainingTraffic


def training_phases(job: TrainingJob) -> tuple[PhaseForecast, ...]:
    """Bytes per tier and category at the peak of load, forward, backward, optimizer and save.

    Raises BadInput when the job's variant was not traced, and Infeasible when memopt's engine cannot keep the budget.
    """
    raise NotImplementedError


def training_traffic(job: TrainingJob) -> TrainingTraffic:
    """Bytes that one optimizer step moves."""
    raise NotImplementedError


def training_flops(job: TrainingJob) -> TrainingFlops:
    """Operations of one optimizer step."""
    raise NotImplementedError
