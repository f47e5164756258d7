"""What a thin cache is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memopt.errors import BadInput

Fold = Literal["keep", "prune"]
Storage = Literal["int8", "int4"]
Score = Literal["joint", "think"]


@dataclass(frozen=True, kw_only=True)
class ThinSettings:
    """Settings of a thin cache.

    `key_keep`, `value_keep`: shares of the channels of a head that stay. `observation`: the last prompt tokens whose
    queries choose. `recent`: the newest tokens that stay whole. `fold`: "keep" leaves all tokens after the prompt whole
    (the paper's), "prune" drops the same channels of them once they are older than `recent`, a block at a time.
    `evict`: tokens of the prompt that survive per KV head (SnapKV), None for all. `storage`: bits of what is stored.
    `score`: "joint" asks queries of all of the prompt and chooses channels together (memopt.kv.joint), "think" asks the
    `observation` and scores each channel alone (the paper's). `multiple`: counts of channels are rounded up to it.
    """

    key_keep: float = 0.6
    value_keep: float = 1.0
    observation: int = 32
    recent: int = 32
    fold: Fold = "keep"
    evict: int | None = None
    storage: Storage | None = None
    score: Score = "joint"
    multiple: int = 8

    def __post_init__(self) -> None:
        for name in ("key_keep", "value_keep"):
            share = getattr(self, name)
            check_number(name, share)
            if not 0.0 < share <= 1.0:
                raise BadInput(f"{name} = {share}: the share of channels to keep must lie in (0, 1]")
        for name in ("observation", "recent", *(["evict"] if self.evict is not None else [])):
            check_number(name, getattr(self, name), whole=True)
        if self.observation < 1:
            raise BadInput(f"observation = {self.observation}: at least one query must choose the channels")
        if self.recent < 0:
            raise BadInput(f"recent = {self.recent}: must not be negative")
        if self.fold not in ("keep", "prune"):
            raise BadInput(f"fold = {self.fold!r}: must be 'keep' or 'prune'")
        if self.score not in ("joint", "think"):
            raise BadInput(f"score = {self.score!r}: must be 'joint' or 'think'")
        if self.storage not in (None, "int8", "int4"):
            raise BadInput(f"storage = {self.storage!r}: must be None, 'int8' or 'int4'")
        if self.evict is not None and self.evict <= self.newest:
            raise BadInput(
                f"evict = {self.evict}: must be more than the {self.newest} newest tokens, which always stay"
                " (the larger of observation and recent)"
            )

    @property
    def newest(self) -> int:
        """Tokens of the prompt that eviction never takes."""
        return max(self.observation, self.recent)

    @property
    def block(self) -> int:
        """Tokens that are folded at a time: as many as stay whole, so that a fold never meets padding of the prompt."""
        return max(self.recent, 32)

    @property
    def bits(self) -> int | None:
        """Bits of a stored element; None: as the model computes."""
        return {None: None, "int8": 8, "int4": 4}[self.storage]


def check_number(name: str, value: object, *, whole: bool = False) -> None:
    """Raise BadInput for what is no number, or with `whole` no whole one."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise BadInput(f"{name} = {value!r}: must be a {'whole ' if whole else ''}number")
