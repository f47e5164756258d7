from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.machine import Machine, profile_names
from memopt.tiers import Tier
from memopt.units import GiB, MiB

MACHINE = Machine(name="m", dram_bytes=10 * GiB, gpu_bytes=4 * GiB, ssd_bytes=100 * GiB)


def test_parse() -> None:
    assert Budget.parse("dram=8GiB, gpu=20GiB") == Budget(dram_bytes=8 * GiB, gpu_bytes=20 * GiB, ssd_bytes=None)
    assert Budget.parse("") == Budget()


def test_percentages_are_of_the_tiers_capacity() -> None:
    budget = Budget.of(dram="50%", gpu="25%", ssd=7, machine=MACHINE)
    assert budget == Budget(dram_bytes=5 * GiB, gpu_bytes=GiB, ssd_bytes=7)
    assert Budget.parse("dram=50%", machine=MACHINE).dram_bytes == 5 * GiB


def test_a_gpu_percentage_on_unified_memory_is_of_the_one_pool() -> None:
    unified = Machine(name="u", unified=True, dram_bytes=10 * GiB)
    assert Budget.of(gpu="50%", machine=unified).gpu_bytes == 5 * GiB


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dram=0GiB", "--dram 0GiB: a budget must be more than zero"),
        ("gpu=0B", "--device cpu"),
        ("dram=-1GiB", "negative"),
        ("dram=1XB", "unknown unit 'XB'"),
        ("dram=80%", "unknown capacity"),
        ("ram=8GiB", "'ram=8GiB' is not tier=size"),
        ("8GiB", "is not tier=size"),
        ("dram=1GiB,dram=2GiB", "given twice"),
    ],
)
def test_refuses(text: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        Budget.parse(text)
    assert says in str(caught.value)


def test_zero_gpu_is_explained_and_a_tiny_share_is_zero() -> None:
    with pytest.raises(BadInput, match="--gpu 0: .*use --device cpu"):
        Budget.of(gpu=0)
    with pytest.raises(BadInput, match="more than zero"):
        Budget.of(dram="0.00000000001%", machine=MACHINE)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "8GiB"])
def test_the_plain_constructor_checks_too(wrong: object) -> None:
    with pytest.raises(BadInput, match="--dram"):
        Budget(dram_bytes=wrong)  # type: ignore[arg-type]


def test_is_frozen_and_readable() -> None:
    budget = Budget.of(dram="1.5GiB", gpu="20GiB")
    assert repr(budget) == "Budget(gpu=20GiB, dram=1.5GiB)"
    assert repr(Budget()) == "Budget(not limited)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.dram_bytes = 1  # type: ignore[misc]


sizes = st.none() | st.integers(1, 2**50)


@given(sizes, sizes, sizes)
def test_text_is_read_back(gpu: int | None, dram: int | None, ssd: int | None) -> None:
    budget = Budget(gpu, dram, ssd)
    assert Budget.parse(str(budget)) == budget
    assert [budget.bytes_of(tier) for tier in Tier] == [gpu, dram, ssd]


@pytest.mark.parametrize(
    ("dram", "reserve"), [(GiB, 128 * MiB), (2560 * MiB, 128 * MiB), (10 * GiB, 512 * MiB), (100 * GiB, 5 * GiB)]
)
def test_from_machine_leaves_the_larger_reserve(dram: int, reserve: int) -> None:
    budget = Budget.from_machine(dataclasses.replace(MACHINE, dram_bytes=dram))
    assert budget == Budget(gpu_bytes=4 * GiB, dram_bytes=dram - reserve, ssd_bytes=100 * GiB)


def test_from_machine_refuses_what_the_reserve_eats_up() -> None:
    with pytest.raises(BadInput, match="leaves nothing after the reserve of 128MiB"):
        Budget.from_machine(Machine(name="tiny", dram_bytes=128 * MiB))


@pytest.mark.parametrize("name", profile_names())
def test_presets_budget_less_than_the_machine_has(name: str) -> None:
    machine, budget = Machine.load(name), Budget.load(name)
    assert budget.dram_bytes is not None
    for tier in Tier:
        wanted, capacity = budget.bytes_of(tier), machine.capacity_bytes(tier)
        assert wanted is None or (capacity is not None and wanted < capacity)
    assert not (machine.unified and budget.gpu_bytes), "one pool has one budget"


def test_load_takes_percentages_of_the_files_own_machine(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\ndram_bytes = "10GiB"\n[budget]\ndram = "20%"\n')
    assert Budget.load(file).dram_bytes == 2 * GiB
    file.write_text('name = "mine"\ndram_bytes = "10GiB"\n')
    assert Budget.load(file).dram_bytes == 10 * GiB - 512 * MiB
    file.write_text('name = "mine"\ndram_bytes = "10GiB"\n[budget]\nram = "20%"\n')
    with pytest.raises(BadInput, match=r"\[budget\] field 'ram'"):
        Budget.load(file)
    file.write_text('name = "mine"\nbudget = 3\n')
    with pytest.raises(BadInput, match=r"\[budget\]"):
        Budget.load(file)
