"""What a job will need, whoever runs it: bytes of every tier by phase, seconds, advice. Plain frozen data.

`Plan` (plan_types) is every choice memopt's own engine follows; a `Forecast` is what anybody can be told of a job:
training in memory, offloaded by memopt or by DeepSpeed, or inference. Schema `memopt.plan/1`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memopt import atomic
from memopt.decode import decode
from memopt.errors import BadInput
from memopt.plan_types import Prediction
from memopt.tiers import Category, Tier

SCHEMA = "memopt.plan/1"

Verdict = Literal["fits", "does not fit", "unbounded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseForecast:
    """One stretch of the job: load, forward, backward, optimizer, save, prefill, decode.

    `use`: tier -> category -> bytes at this phase's own peak; keys are the values of `Tier` and `Category`.
    `seconds`: per step; None where the machine's speeds are not known.
    """

    name: str
    use: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float | None = None

    def total_bytes(self, tier: Tier) -> int:
        """Bytes of one tier at the peak of this phase."""
        return sum(self.use.get(str(tier), {}).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step (training) or one token (decoding) from the machine's bandwidths.

    `hidden` says what runs behind what; `bound` is what sets the pace (memory: the computing device's own, where
    reading weights takes longer than the products).
    """

    step_s: float
    compute_s: float
    transfer_s: float = 0.0
    ssd_s: float = 0.0
    bound: Literal["compute", "memory", "transfer", "ssd"] = "compute"
    hidden: str = ""
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One knob: what it saves at the binding peak of `tier` (bytes) and what it costs.

    `slow_down`: predicted step time over today's (1.0: none; None: not known). `same_result`: the numbers of the job do
    not change. `enough`: this knob alone makes the job fit.
    """

    flag: str
    text: str
    tier: Tier
    saved_bytes: int
    slow_down: float | None = None
    same_result: bool = True
    enough: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The answer of `memopt plan`. `assumptions` stand on the verdict's line; `reasons` explain the choices.

    `budgets`: bytes allowed per tier, by name; a tier that is not there has no limit. `smallest`: when the job does not
    fit, the smallest budget of each short tier that would do, after the knobs in `smallest_flags`.
    """

    job: str
    verdict: Verdict
    assumptions: tuple[str, ...] = ()
    budgets: dict[str, int] = field(default_factory=dict)
    phases: tuple[PhaseForecast, ...] = ()
    time: StepTime | None = None
    steps: int = 0
    ssd_read_per_step_bytes: int = 0
    ssd_write_per_step_bytes: int = 0
    suggestions: tuple[Suggestion, ...] = ()
    smallest: dict[str, int] = field(default_factory=dict)
    smallest_flags: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    schema: str = SCHEMA

    def binding(self, tier: Tier) -> PhaseForecast | None:
        """The phase with the highest peak of a tier; None when no phase uses it."""
        used = [phase for phase in self.phases if phase.total_bytes(tier) > 0]
        return max(used, key=lambda phase: phase.total_bytes(tier), default=None)

    def predicted(self) -> dict[Tier, Prediction]:
        """The binding peak of each tier by category, as a report takes it."""
        found = ((tier, self.binding(tier)) for tier in Tier)
        return {
            tier: Prediction(by_category={Category(name): n for name, n in phase.use[str(tier)].items()})
            for tier, phase in found
            if phase is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON in one atomic step. Raises BadInput when the path cannot be written."""
        atomic.save_text("plan", path, self.to_json())

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Whether there is a file that says it is a plan; False for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(data, dict) and data.get("schema") == SCHEMA

    @classmethod
    def load(cls, path: str | Path) -> Forecast:
        """Read a saved plan. Raises BadInput when it is missing, cut short, something else, or newer than this."""
        where = f"plan {str(path)!r}"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"{where} cannot be read: {error.strerror}; check the path") from error
        except ValueError as error:
            raise BadInput(f"{where} is cut short or not JSON ({error}); make it again with memopt plan") from error
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise BadInput(f"{where} is not a plan this memopt reads (schema {found!r}, wanted {SCHEMA!r})")
        return decode(cls, data, where)
