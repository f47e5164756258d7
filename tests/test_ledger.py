from __future__ import annotations

import threading

import pytest

from memopt.budget import Budget
from memopt.errors import OverBudget
from memopt.ledger import Ledger
from memopt.tiers import Category, Tier
from memopt.units import GiB, MiB


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(Budget(dram_bytes=GiB))


def test_counts_charges_and_releases(ledger: Ledger) -> None:
    first = ledger.charge(Tier.DRAM, Category.WEIGHTS, 600 * MiB, "embedding")
    with ledger.charge(Tier.DRAM, Category.BUFFERS, 424 * MiB, "staging"):
        assert ledger.charged_bytes(Tier.DRAM) == GiB
        assert ledger.free_bytes(Tier.DRAM) == 0
    assert ledger.charged_bytes(Tier.DRAM) == 600 * MiB
    first.release()
    first.release()
    assert ledger.charged_bytes(Tier.DRAM) == 0
    assert ledger.charged_by(Tier.DRAM)[Category.WEIGHTS] == 0
    assert ledger.peak_bytes(Tier.DRAM) == GiB


def test_one_byte_too_many_is_refused_and_charges_nothing(ledger: Ledger) -> None:
    ledger.charge(Tier.DRAM, Category.WEIGHTS, GiB, "all of it")
    with pytest.raises(OverBudget):
        ledger.charge(Tier.DRAM, Category.WEIGHTS, 1, "a byte")
    assert ledger.charged_bytes(Tier.DRAM) == GiB
    assert ledger.peak_bytes(Tier.DRAM) == GiB


def test_the_error_names_everything_one_needs(ledger: Ledger) -> None:
    for number, nbytes in enumerate((100, 50, 300, 200)):
        ledger.charge(Tier.DRAM, Category.BUFFERS, nbytes * MiB, f"holder {number}")
    ledger.charge(Tier.DRAM, Category.BUFFERS, 60 * MiB, "holder 1")
    with pytest.raises(OverBudget) as caught:
        ledger.charge(Tier.DRAM, Category.WEIGHTS, 512 * MiB, "block 7", knob="lower --prefetch")
    error = caught.value
    assert (error.tier, error.wanted_bytes, error.free_bytes) == (Tier.DRAM, 512 * MiB, (1024 - 710) * MiB)
    assert error.budget_bytes == GiB
    assert error.holders == (("holder 2", 300 * MiB), ("holder 3", 200 * MiB), ("holder 1", 110 * MiB))
    message = str(error)
    for part in ("dram", "1.00 GiB", "block 7", "512.00 MiB", "314.00 MiB", "holder 2", "lower --prefetch"):
        assert part in message
    assert "holder 0" not in message


def test_each_tier_names_its_own_knob() -> None:
    ledger = Ledger(Budget(gpu_bytes=1, dram_bytes=1, ssd_bytes=1))
    for tier in Tier:
        with pytest.raises(OverBudget, match=f"raise --{tier}"):
            ledger.charge(tier, Category.OTHER, 2, "x")


def test_peaks_remember_their_categories(ledger: Ledger) -> None:
    weights = ledger.charge(Tier.DRAM, Category.WEIGHTS, 300, "w")
    with ledger.charge(Tier.DRAM, Category.ACTIVATIONS, 200, "a"):
        pass
    weights.release()
    ledger.charge(Tier.DRAM, Category.OPTIMIZER, 499, "o")
    peak = ledger.at_peak(Tier.DRAM)
    assert peak[Category.WEIGHTS] == 300
    assert peak[Category.ACTIVATIONS] == 200
    assert peak[Category.OPTIMIZER] == 0
    assert set(peak) == set(Category)
    peak[Category.WEIGHTS] = 0
    assert ledger.at_peak(Tier.DRAM)[Category.WEIGHTS] == 300, "the caller got a copy"


def test_an_unlimited_tier_is_counted(ledger: Ledger) -> None:
    ledger.charge(Tier.SSD, Category.OPTIMIZER, 10 * GiB, "state")
    assert ledger.free_bytes(Tier.SSD) is None
    assert ledger.peak_bytes(Tier.SSD) == 10 * GiB
    assert ledger.charged_bytes(Tier.DRAM) == 0


def test_negative_charges_are_a_mistake_of_the_caller(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="negative"):
        ledger.charge(Tier.DRAM, Category.OTHER, -1, "x")


def test_threads_never_pass_the_budget_together() -> None:
    ledger = Ledger(Budget(dram_bytes=10))
    start = threading.Barrier(8)
    refused = []

    def work() -> None:
        start.wait()
        for _ in range(300):
            try:
                lease = ledger.charge(Tier.DRAM, Category.BUFFERS, 3, "x")
            except OverBudget:
                refused.append(1)
            else:
                lease.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.charged_bytes(Tier.DRAM) == 0
    assert ledger.peak_bytes(Tier.DRAM) <= 9


def test_a_lease_released_by_many_threads_is_given_back_once(ledger: Ledger) -> None:
    ledger.charge(Tier.DRAM, Category.BUFFERS, 1000, "stays")
    lease = ledger.charge(Tier.DRAM, Category.BUFFERS, 10, "goes")
    threads = [threading.Thread(target=lease.release) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.charged_bytes(Tier.DRAM) == 1000
