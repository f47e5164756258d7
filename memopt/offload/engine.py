"""The engine of SSD-offloaded training: runs steps, evaluates, saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from memopt.errors import MemoptError, NonFinite
from memopt.ledger import Ledger
from memopt.offload.homes import record_parts, weight_parts
from memopt.offload.layout import Layout
from memopt.offload.model import Batch, LayeredModel
from memopt.offload.parts import EngineSettings, Parts
from memopt.offload.pending import Pending, Progress, Updates
from memopt.offload.step import StepRun
from memopt.offload.updater import StepTerms
from memopt.plan_types import Plan
from memopt.store.block_store import BlockStore
from memopt.store.transfer import Transfer

__all__ = ["Engine", "EngineSettings", "Progress", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """One step. `grad_norm` is None where no clipping asks for it."""

    loss: float
    grad_norm: float | None
    target_tokens: int
    skipped: bool = False


class Engine:
    """Trains a layered model out of a block store. Use as a context manager, or call `close`.

    The calling thread computes; one thread fetches weights, one updates, the store's pool moves bytes.
    """

    def __init__(
        self,
        model: LayeredModel,
        layout: Layout,
        plan: Plan,
        store: BlockStore | None,
        scratch: BlockStore | None,
        ledger: Ledger,
        settings: EngineSettings,
        *,
        initial: Callable[[list[str]], Mapping[str, torch.Tensor]] | None = None,
        progress: Progress | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        """`store` is None when everything lives in DRAM and nothing is to be saved; `initial` then gives the weights.

        `about` goes into the meta of every commit, beside the progress.
        """
        self.store, self.settings = store, settings
        self.progress = progress or Progress()
        self._parts = Parts(model, layout, plan, store, scratch, ledger, settings, initial)
        self._updates = Updates(self._parts, store, about or {})
        self._changed = False
        self._broken: str | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and give the memory back; what was not committed is lost."""
        self._parts.close()

    @property
    def clips(self) -> bool:
        return self.settings.clip_norm > 0

    def step(self, batch: Sequence[Batch], *, lr: float, save: bool) -> StepResult:
        """One optimizer step over the micro-batches of `batch`.

        With `save` the state after this step becomes durable (with clipping: during the next step, or in `flush`).
        Raises NonFinite, and whatever went wrong in a thread.
        """
        run = StepRun(self._parts, self._updates, batch, self.progress.step + 1, train=True)
        terms = StepTerms(step=self.progress.updates + 1, lr=lr, save=save)
        with self._whole(f"step {self.progress.step + 1}"):
            loss = run.train(None if self.clips else terms)
            norm = run.gradient_norm() if self.clips else None
        finite = math.isfinite(loss) and (norm is None or math.isfinite(norm))
        seen = self.progress.step + 1
        if not finite and not self.settings.skip_nonfinite:
            self._broken = f"step {seen} was not finite"  # its forward has applied the update before, uncommitted
            raise NonFinite(
                f"step {seen}: the loss is {loss}"
                + (f" and the gradient norm {norm}" if math.isfinite(loss) else "")
                + "; stopped, the last saved state is intact (--skip-nonfinite goes on without such steps; "
                "a lower --lr or more --warmup-steps often helps)"
            )
        updates = self.progress.updates + (1 if finite else 0)
        if self.clips and finite:
            assert norm is not None
            scale = min(1.0, self.settings.clip_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
            pending = Pending(replace(terms, scale=scale), run.row_gradient(), Progress(seen, updates))
            self._updates.hold(pending)
        self.progress = Progress(seen, updates)
        self._changed = True
        if not self.clips and save:
            self._updates.commit(self.progress)
        return StepResult(loss, norm, run.target_tokens, skipped=not finite)

    def evaluate(self, batch: Sequence[Batch]) -> tuple[float, int]:
        """Mean loss over the target tokens of these micro-batches, and how many there are. No state changes."""
        self.flush()
        run = StepRun(self._parts, self._updates, batch, self.progress.step, train=False)
        with self._whole(f"the evaluation after step {self.progress.step}"):
            return run.evaluate(), run.target_tokens

    def flush(self) -> None:
        """Apply a pending update now, in a sweep of its own."""
        self._require_whole()
        self._updates.sweep()

    def save(self) -> None:
        """Make the present state durable and wait for it."""
        self.flush()
        self._updates.wait()
        if self.store is None or self._updates.committed == self.progress or not self._changed:
            return
        writes = []
        for unit in self._parts.layout.units:
            home = self._parts.homes[unit]
            if home.weights is not None and unit.trained:
                writes += [self.store.write(*part) for part in weight_parts(unit, home.weights)]
            if home.moments is not None:
                writes += [self.store.write(*part) for part in record_parts(unit, home.moments)]
        Transfer.all(writes).wait()
        self._updates.commit(self.progress)
        self._parts.updater.drain()
        self._updates.wait()

    @property
    def saved_step(self) -> int:
        """The step the last durable save is of."""
        return 0 if self.store is None else int(self.store.meta.get("step", 0))

    @property
    def waited_s(self) -> float:
        """Seconds the computation stood still for weights, updates or a free gradient slot."""
        return self._parts.stream.waited_s + self._parts.sinks.waited_s

    def parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Current values of parameters, trained ones in float32. Call `flush` first."""
        return self._parts.homes.parameters(names)

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """What breaks off in here leaves half a step behind, which must not be saved or built upon."""
        self._require_whole()
        try:
            yield
        except BaseException as error:
            self._broken = f"{what} was broken off ({type(error).__name__}: {error})"
            raise

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise MemoptError(f"{self._broken}; open a new engine: it starts from the last save")
