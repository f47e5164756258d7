"""What a program is in the middle of: phases named by hand and phases found by hooks, and the bytes of a moment."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from memopt.tiers import Category, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """Bytes at one moment; None for a tier that is not there. `categories`: by tier; `OTHER` is what is left over."""

    dram_bytes: int
    gpu_bytes: int | None = None
    ssd_bytes: int | None = None
    categories: Mapping[Tier, Mapping[Category, int]] = field(default_factory=dict)

    def bytes_of(self, tier: Tier) -> int | None:
        """The bytes of one tier."""
        if tier is Tier.GPU:
            return self.gpu_bytes
        return self.dram_bytes if tier is Tier.DRAM else self.ssd_bytes


class OpenPhases:
    """The phases that have begun: named by hand, or found by hooks, which give way to an open one of the same name."""

    def __init__(self, phase: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
        self._phase = phase
        self._lock = threading.Lock()
        self._open: list[tuple[str, bool, contextlib.AbstractContextManager[None]]] = []

    def begin(self, name: str, *, by_hand: bool) -> bool:
        """Whether a phase began."""
        if not by_hand and self._open:
            with self._lock:
                if any(name == open_name for open_name, _, _ in self._open):
                    return False
        phase = self._phase(name)
        phase.__enter__()
        with self._lock:
            self._open.append((name, by_hand, phase))
        return True

    def end(self, name: str, *, by_hand: bool) -> bool:
        """Whether a phase ended: the last that began of this name and kind."""
        with self._lock:
            found = next((entry for entry in reversed(self._open) if entry[:2] == (name, by_hand)), None)
            if found is None:
                return False
            self._open.remove(found)
        found[2].__exit__(None, None, None)
        return True

    def names(self) -> tuple[str, ...]:
        """What is open now, in the order it began."""
        with self._lock:
            return tuple(name for name, _, _ in self._open)

    def close(self, *, found_only: bool = False) -> list[str]:
        """End what is open, the last first; the names."""
        with self._lock:
            ending = [entry for entry in self._open if not (found_only and entry[1])]
            self._open = [entry for entry in self._open if entry not in ending]
        for _, _, phase in reversed(ending):
            phase.__exit__(None, None, None)
        return [name for name, _, _ in ending]
