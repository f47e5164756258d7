"""Where every unit's vectors live: in DRAM for good, or on SSD with a stay in a slot when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from memopt.ledger import Lease, Ledger
from memopt.offload.layout import Layout, Piece, Segment, Unit
from memopt.plan_types import Residence
from memopt.store.block_store import BlockStore
from memopt.store.regions import Region
from memopt.store.transfer import Transfer
from memopt.tiers import Category, Tier


def weights_name(segment: Segment) -> str:
    return f"{segment.name}.weights"


def moments_name(segment: Segment) -> str:
    return f"{segment.name}.moments"


def frozen_name(unit: Unit) -> str:
    return f"{unit.name}.frozen"


def gradient_name(unit: Unit) -> str:
    return f"{unit.name}.gradient"


@dataclass
class Home:
    """One unit. A vector that is None lives on SSD."""

    unit: Unit
    index: int
    """Position among all units: the tensor key of stochastic rounding."""
    weights: torch.Tensor | None = None
    """(numel,) float32 master."""
    frozen: torch.Tensor | None = None
    """(frozen_bytes,) uint8."""
    moments: torch.Tensor | None = None
    """(unit.record_bytes,) uint8: records of the spans one after the other, segment by segment."""
    gradient: torch.Tensor | None = None
    """(numel,) float32, allocated when gradients of this unit are held in DRAM."""
    updating: Transfer | None = None
    """The last update submitted for this unit."""
    writes: list[Transfer] = field(default_factory=list)
    """What that update wrote."""

    @property
    def resident(self) -> bool:
        """No read is needed before computing with this unit."""
        return (self.weights is not None or not self.unit.trained) and (self.frozen is not None or not self.unit.frozen)

    def wait_updated(self) -> None:
        """Wait until the last update is in memory (if the weights live there) and its writes are issued."""
        if self.updating is not None:
            self.updating.wait()

    def settle(self) -> None:
        """Wait until the weights of the last update can be read back from SSD."""
        self.wait_updated()
        for write in self.writes:
            write.wait()


class Homes:
    """All units of a model with the memory of those that stay in DRAM, charged to the ledger."""

    def __init__(
        self,
        layout: Layout,
        residence: Mapping[str, Residence],
        store: BlockStore | None,
        scratch: BlockStore | None,
        ledger: Ledger,
        *,
        hold_gradients: frozenset[str],
        pin: bool,
    ):
        self.layout = layout
        self._store, self._scratch = store, scratch
        self._ledger, self._pin = ledger, pin
        self._regions: list[Region] = []
        self._leases: list[Lease] = []
        self._by_name: dict[str, Home] = {}
        for index, unit in enumerate(layout.units):
            home = Home(unit, index)
            where = residence[unit.name]
            if where.weights == Tier.DRAM:
                if unit.trained:
                    home.weights = self._allocate(Category.WEIGHTS, unit.master_bytes, f"{unit.name}.weights").view(
                        torch.float32
                    )
                if unit.frozen:
                    home.frozen = self._allocate(Category.WEIGHTS, unit.frozen_bytes, frozen_name(unit))
            if where.moments == Tier.DRAM and unit.record_bytes:
                home.moments = self._allocate(Category.OPTIMIZER, unit.record_bytes, f"{unit.name}.moments")
            if where.gradient == Tier.DRAM and unit.trained and unit.name in hold_gradients:
                home.gradient = self._allocate(Category.GRADIENTS, unit.master_bytes, gradient_name(unit)).view(
                    torch.float32
                )
            self._by_name[unit.name] = home

    def __getitem__(self, unit: Unit) -> Home:
        return self._by_name[unit.name]

    @property
    def store(self) -> BlockStore:
        """The state: what lives on SSD, and what is saved."""
        assert self._store is not None
        return self._store

    @property
    def spill(self) -> BlockStore:
        """The scratch store: gradients of units whose gradient lives on SSD."""
        assert self._scratch is not None
        return self._scratch

    def load(self) -> None:
        """Read what lives in DRAM from the store."""
        for home in self._by_name.values():
            if home.weights is not None:
                for name, part in weight_parts(home.unit, home.weights):
                    self.store.read(name, part).wait()
            if home.moments is not None:
                for name, part in record_parts(home.unit, home.moments):
                    self.store.read(name, part).wait()
            if home.frozen is not None:
                self.store.read(frozen_name(home.unit), as_bytes(home.frozen)).wait()

    def fill(self, initial: Callable[[list[str]], Mapping[str, torch.Tensor]]) -> None:
        """Everything lives in DRAM: take the weights from `initial`, moments are zero."""
        for home in self._by_name.values():
            fill_vectors(home.unit, home.weights, home.frozen, initial)

    def parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole parameters: trained ones in float32, frozen ones as stored. Copies where they come from SSD or
        tiles."""
        wanted = set(names)
        parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for home in self._by_name.values():
            for vector, pieces in ((home.weights, home.unit.trained), (home.frozen, home.unit.frozen)):
                for piece in pieces:
                    if piece.name in wanted:
                        value = piece.of(vector) if vector is not None else self._read_piece(home, piece)
                        parts.setdefault(piece.name, []).append((piece.row, value))
        return {
            name: found[0][1] if len(found) == 1 else torch.cat([t for _, t in sorted(found, key=lambda x: x[0])])
            for name, found in parts.items()
        }

    def close(self) -> None:
        """Give the memory and the leases back."""
        for home in self._by_name.values():
            home.weights = home.frozen = home.moments = home.gradient = None
        for region in self._regions:
            region.close()
        for lease in self._leases:
            lease.release()
        self._regions, self._leases = [], []

    def _read_piece(self, home: Home, piece: Piece) -> torch.Tensor:
        """One parameter from SSD, by whole chunks so that their checksums are compared."""
        home.settle()
        if piece.rule is None:
            name, before, nbytes = frozen_name(home.unit), 0, home.unit.frozen_bytes
        else:
            segment = next(s for s in reversed(home.unit.segments) if 4 * s.start <= piece.offset_bytes)
            name, before, nbytes = weights_name(segment), 4 * segment.start, 4 * segment.numel
        step = self.store.chunk_bytes_of(name)
        offset = piece.offset_bytes - before
        start = offset // step * step
        stop = min(-(-(offset + piece.nbytes) // step) * step, nbytes)
        region = Region(stop - start)
        self.store.read(name, region.view[: stop - start], start).wait()
        return replace(piece, offset_bytes=offset - start).of(region.tensor(torch.uint8, stop - start))

    def _allocate(self, category: Category, nbytes: int, what: str) -> torch.Tensor:
        self._leases.append(self._ledger.charge(Tier.DRAM, category, nbytes, what))
        region = Region(nbytes, pin=self._pin)
        self._regions.append(region)
        return region.tensor(torch.uint8, nbytes)


def fill_vectors(
    unit: Unit,
    master: torch.Tensor | None,  # (numel,) float32
    frozen: torch.Tensor | None,  # (frozen_bytes,) uint8
    initial: Callable[[list[str]], Mapping[str, torch.Tensor]],
) -> None:
    """Copy the initial values of a unit's parameters into its vectors."""
    values = initial([p.name for p in (*unit.trained, *unit.frozen)])
    for vector, pieces in ((master, unit.trained), (frozen, unit.frozen)):
        for piece in pieces:
            assert vector is not None
            value = values[piece.name]
            piece.of(vector).copy_(value[piece.row : piece.row + piece.shape[0]] if piece.shape else value)


def weight_parts(unit: Unit, weights: torch.Tensor) -> Iterator[tuple[str, memoryview]]:
    """Names in the store and bytes of a whole master vector (numel,)."""
    for segment in unit.segments:
        yield weights_name(segment), as_bytes(weights[segment.start : segment.stop])


def record_parts(unit: Unit, moments: torch.Tensor) -> Iterator[tuple[str, memoryview]]:
    """Names in the store and bytes of all records of a unit (record_bytes,)."""
    for segment in unit.segments:
        start = segment.record_start
        yield moments_name(segment), as_bytes(moments[start : start + segment.record_bytes])


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data
