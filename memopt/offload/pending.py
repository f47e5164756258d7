"""The update that waits for its step's clipping coefficient and rides on the next forward, and the commits after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memopt.offload.gradients import RowGradient
from memopt.offload.homes import Home
from memopt.offload.layout import UnitKind
from memopt.offload.parts import Parts
from memopt.offload.updater import StepTerms, Update
from memopt.store.block_store import BlockStore
from memopt.store.transfer import Transfer


@dataclass(frozen=True)
class Progress:
    """How far training has come: what a commit remembers."""

    step: int = 0
    """Batches seen."""
    updates: int = 0
    """Optimizer updates applied (skipped steps do not count)."""


@dataclass(frozen=True)
class Pending:
    """An update whose gradients are held and whose clipping coefficient is known."""

    terms: StepTerms
    rows: RowGradient | None
    progress: Progress


class Updates:
    """Orders updates and commits: what is announced is submitted in that order, and nothing overtakes a commit."""

    def __init__(self, parts: Parts, store: BlockStore | None, about: Mapping[str, Any]):
        self._parts, self._store, self._about = parts, store, dict(about)
        self._pending: Pending | None = None
        self._commit = Transfer(0)
        self.committed: Progress | None = None
        """What the last commit, durable or under way, is of."""

    def hold(self, pending: Pending) -> None:
        """Gradients are held; the update comes with the next `begin`."""
        self._pending = pending

    def begin(self, *, riding: bool) -> dict[str, Update]:
        """Announce the update that waits for this forward: rest and tables first, then blocks in order, then the head.

        Units that the forward visits get their weights from the visit when `riding`; all others pass through the ring.
        """
        if self._pending is None:
            return {}
        pending, layout, homes = self._pending, self._parts.layout, self._parts.homes
        visited = set(layout.blocks) | (set() if layout.tied else set(layout.head)) if riding else set()
        order = (layout.rest, *layout.embed, *layout.blocks, *(() if layout.tied else layout.head))
        updates = {}
        for unit in order:
            home = homes[unit]
            if not unit.trained:
                continue
            update = self.of_held(home, pending.terms, visited=unit in visited)
            update.rows = pending.rows.of(unit) if pending.rows is not None and unit.kind == UnitKind.EMBED else None
            updates[unit.name] = update
        self.announce(list(updates.values()))
        return updates

    def of_held(self, home: Home, terms: StepTerms, *, visited: bool = False) -> Update:
        """The update of a unit whose dense gradient (if it has one: an untied embedding's is rows) was held.

        The weights pass through the ring unless they live in DRAM or a visit of the forward brings them.
        """
        by_rows = home.unit.kind == UnitKind.EMBED and not self._parts.layout.tied
        return Update(
            home=home,
            terms=terms,
            weights=home.weights,
            weights_in_ring=home.weights is None and not visited,
            gradient=home.gradient,
            spilled=home.gradient is None and not by_rows,
        )

    def end(self) -> None:
        """Every unit of the pending update has been submitted: commit if the step was to be saved."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if pending.terms.save:
                self.commit(pending.progress)

    def sweep(self) -> None:
        """Apply a pending update now, without a forward to ride on; returns when it is done."""
        for update in self.begin(riding=False).values():
            self._parts.updater.submit(update)
        self.end()
        self._parts.updater.drain()

    def wait(self) -> None:
        """Wait until the last commit is durable."""
        self._commit.wait()

    def announce(self, updates: Sequence[Update]) -> None:
        """Updates are coming in this order; nothing is modified before the last commit is durable."""
        commit = self._commit
        self._parts.updater.run(commit.wait)
        self._parts.updater.expect(updates)

    def commit(self, progress: Progress) -> None:
        """Commit once everything submitted so far has been issued; does not wait."""
        if self._store is None:
            return
        store, ticket = self._store, Transfer()
        meta = {**self._about, "step": progress.step, "updates": progress.updates}

        def commit() -> None:
            try:
                self._parts.updater.require_sound()  # a unit that was left out would not be missed by the store
                store.commit(meta).then(lambda done: ticket.complete(done.error))
            except BaseException as error:
                ticket.complete(error)
                raise

        self._commit = ticket
        self._parts.updater.run(commit)
        self.committed = progress
