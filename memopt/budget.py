"""The bytes a person allows on each tier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memopt.errors import BadInput
from memopt.machine import Machine, read_profile
from memopt.tiers import Tier
from memopt.units import MiB, exact_bytes, parse_bytes

# What is left to file pages and the kernel when the limit is a container's: below this, page cache thrashes before
# the limit is reached (DESIGN §1.1).
_RESERVE_BYTES = 128 * MiB
_RESERVE_SHARE = 20  # one part in 20 = 5 %


@dataclass(frozen=True, slots=True, repr=False)
class Budget:
    """Bytes allowed per tier; None = not limited. Positive numbers only (BadInput otherwise)."""

    gpu_bytes: int | None = None
    dram_bytes: int | None = None
    ssd_bytes: int | None = None

    def __post_init__(self) -> None:
        for tier in Tier:
            nbytes = self.bytes_of(tier)
            if nbytes is None:
                continue
            if isinstance(nbytes, bool) or not isinstance(nbytes, int):
                raise BadInput(f"--{tier} {nbytes!r}: must be whole bytes; Budget.of(...) reads text like 8GiB")
            if nbytes <= 0:
                raise BadInput(_not_positive(tier, nbytes))

    def bytes_of(self, tier: Tier) -> int | None:
        """The budget of one tier."""
        if tier is Tier.GPU:
            return self.gpu_bytes
        return self.dram_bytes if tier is Tier.DRAM else self.ssd_bytes

    def __repr__(self) -> str:
        limited = [f"{tier}={exact_bytes(n)}" for tier in Tier if (n := self.bytes_of(tier)) is not None]
        return f"Budget({', '.join(limited) or 'not limited'})"

    def __str__(self) -> str:
        """Text that `parse` reads back: `gpu=20GiB,dram=8GiB`."""
        return ",".join(f"{tier}={exact_bytes(n)}" for tier in Tier if (n := self.bytes_of(tier)) is not None)

    @classmethod
    def of(
        cls,
        *,
        gpu: int | str | None = None,
        dram: int | str | None = None,
        ssd: int | str | None = None,
        machine: Machine | None = None,
    ) -> Budget:
        """From sizes as bytes or text (`"8GiB"`; `"80%"` is that share of `machine`'s tier). Raises BadInput."""
        values = {Tier.GPU: gpu, Tier.DRAM: dram, Tier.SSD: ssd}
        sizes = {tier: None if value is None else _size(tier, value, machine) for tier, value in values.items()}
        return cls(gpu_bytes=sizes[Tier.GPU], dram_bytes=sizes[Tier.DRAM], ssd_bytes=sizes[Tier.SSD])

    @classmethod
    def parse(cls, text: str, machine: Machine | None = None) -> Budget:
        """From `dram=8GiB,gpu=20GiB`. Raises BadInput on an unknown or repeated tier or a bad size."""
        values: dict[str, str] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            key, equals, value = part.partition("=")
            key = key.strip().lower()
            if not equals or key not in list(Tier):
                raise BadInput(f"budget {text!r}: {part!r} is not tier=size; write like dram=8GiB,gpu=20GiB,ssd=500GiB")
            if key in values:
                raise BadInput(f"budget {text!r}: {key} is given twice; keep one")
            values[key] = value.strip()
        return cls.of(machine=machine, **values)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Budget:
        """The `[budget]` table of a preset or TOML file, percentages taken of its machine.

        Without such a table: the machine's capacities less the reserve, as `from_machine`.
        """
        machine = Machine.load(name_or_path)
        table = read_profile(name_or_path).get("budget")
        if table is None:
            return cls.from_machine(machine)
        if not isinstance(table, dict) or (unknown := sorted(set(table) - set(Tier))):
            wrong = "[budget]" if not isinstance(table, dict) else f"[budget] field {unknown[0]!r}"
            raise BadInput(f"{name_or_path}: {wrong} is not known; write gpu, dram and ssd sizes under [budget]")
        return cls.of(machine=machine, **table)

    @classmethod
    def from_machine(cls, machine: Machine) -> Budget:
        """All the machine has, DRAM less a reserve for file pages: 128 MiB or 5 %, the larger.

        Unified memory is one pool: the DRAM budget covers it and the GPU gets no budget of its own.
        """
        dram = machine.dram_bytes
        if dram is not None:
            rest = dram - max(_RESERVE_BYTES, dram // _RESERVE_SHARE)
            if rest <= 0:
                raise BadInput(
                    f"machine {machine.name!r}: {exact_bytes(dram)} of DRAM leaves nothing after the reserve of "
                    f"{exact_bytes(_RESERVE_BYTES)} for file pages; raise the container's memory limit"
                )
            dram = rest
        return cls(gpu_bytes=machine.gpu_bytes, dram_bytes=dram, ssd_bytes=machine.ssd_bytes)


def _size(tier: Tier, value: int | str, machine: Machine | None) -> int:
    capacity = None if machine is None else machine.capacity_bytes(tier)
    nbytes = parse_bytes(value, capacity, field=f"--{tier}")
    if nbytes == 0:
        raise BadInput(_not_positive(tier, value))
    return nbytes


def _not_positive(tier: Tier, value: int | str) -> str:
    remedy = "to work without a GPU use --device cpu" if tier is Tier.GPU else f"leave --{tier} out for no limit"
    return f"--{tier} {value}: a budget must be more than zero; {remedy}"
