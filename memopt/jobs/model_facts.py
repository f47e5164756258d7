"""Facts of a Hugging Face model from its configuration and safetensors headers: nothing is loaded or allocated."""

from __future__ import annotations

from memopt.planning.training_types import ModelFacts, TrainingJob


def read_model_facts(path_or_config: object) -> ModelFacts:
    """Facts of a model directory, a hub id (config.json and headers are downloaded) or a transformers configuration.

    Raises BadInput.
    """
    raise NotImplementedError


def prepare(job: TrainingJob) -> TrainingJob:
    """The same job with all that `training_phases` reads: the trace of its variant, and memopt's own engine's job.

    Cheap when it is there already. Call it again after `replace` of any field. Raises BadInput.
    """
    raise NotImplementedError


def measure_runtime(device: str = "cpu") -> int:
    """Anonymous memory of a new process that has imported torch and transformers, measured now, in bytes."""
    raise NotImplementedError
