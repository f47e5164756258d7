"""What memopt's callbacks of a Hugging Face Trainer share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LoggingCallback(TrainerCallback, ABC):
    """Adds `numbers()` to each training loss that is logged."""

    @abstractmethod
    def numbers(self) -> Mapping[str, float]:
        """What is added now; nothing when there is nothing to tell."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add our numbers to what is logged, and to the history that has already been written."""
        if logs is None or "loss" not in logs:
            return
        extra = self.numbers()
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)
