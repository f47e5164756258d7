"""The plan of a job: plain frozen data, made from the budget before anything is allocated, readable by all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from memopt.errors import MemoptError
from memopt.tiers import Category, Tier
from memopt.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Residence:
    """Where the vectors of one unit live between uses."""

    weights: Tier = Tier.SSD
    moments: Tier = Tier.SSD
    gradient: Tier = Tier.SSD
    """Matters only while a gradient is held (exact clipping, tied tables)."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Expected peak of one tier by category, bytes."""

    by_category: Mapping[Category, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.by_category.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every choice the engine follows. Counts are numbers of buffers; sizes are bytes unless named otherwise."""

    residence: Mapping[str, Residence]
    block_slots: int
    head_slots: int
    gradient_slots: int
    head_gradient_slots: int
    ring_buffers: int
    tile_rows: int
    """Rows of the embedding and head tables that are in memory together."""
    loss_tokens: int
    """Tokens whose logits are in memory together."""
    activation_layers_on_ssd: int
    """Boundary activations of this many first layers are written to SSD."""
    io_workers: int
    save_every: int
    compute_threads: int
    update_threads: int
    predicted: Mapping[Tier, Prediction] = field(default_factory=dict)
    ssd_read_per_step_bytes: int = 0
    ssd_write_per_step_bytes: int = 0
    steps: int = 0
    step_s: float = 0.0
    reasons: tuple[str, ...] = ()

    @property
    def ssd_write_total_bytes(self) -> int:
        """Bytes the whole run writes to SSD."""
        return self.ssd_write_per_step_bytes * self.steps

    def numerics(self) -> dict[str, Any]:
        """The choices that can change a rounding; a resumed run keeps them."""
        return {
            "tile_rows": self.tile_rows,
            "loss_tokens": self.loss_tokens,
            "compute_threads": self.compute_threads,
            "update_threads": self.update_threads,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form for the report."""
        out = asdict(self)
        out["predicted"] = {str(t): {str(c): n for c, n in p.by_category.items()} for t, p in self.predicted.items()}
        out["residence"] = {name: {k: str(v) for k, v in asdict(r).items()} for name, r in self.residence.items()}
        return out


class Infeasible(MemoptError):
    """No placement fits the budget. `smallest_bytes` is the smallest budget of `tier` that would do."""

    exit_code = 1

    def __init__(self, tier: Tier, wanted_bytes: int, smallest_bytes: int, detail: str):
        self.tier, self.wanted_bytes, self.smallest_bytes = tier, wanted_bytes, smallest_bytes
        super().__init__(
            f"the job does not fit {format_bytes(wanted_bytes)} of {tier.upper()}: the smallest sufficient budget is "
            f"--{tier} {_round_up_mib(smallest_bytes)}. {detail}"
        )


def _round_up_mib(nbytes: int) -> str:
    return f"{-(-nbytes // (1 << 20))}MiB"
