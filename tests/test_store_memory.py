"""Regions and buffers: exact sizes, huge pages, lifetimes, back-pressure."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from memopt.budget import Budget
from memopt.errors import OverBudget, StoreError
from memopt.ledger import Ledger
from memopt.store.buffers import BufferPool
from memopt.store.errors import StoreClosed, StoreTimeout
from memopt.store.regions import HUGE_BYTES, PAGE_BYTES, Region
from memopt.tiers import Category, Tier
from memopt.units import MiB


@pytest.mark.parametrize("nbytes", [1, PAGE_BYTES, PAGE_BYTES + 1, HUGE_BYTES, 3 * MiB + 5])
def test_a_region_is_rounded_to_the_page_only(nbytes: int) -> None:
    with Region(nbytes) as region:
        assert region.nbytes == -(-nbytes // PAGE_BYTES) * PAGE_BYTES == len(region.view)
        assert region.address % (HUGE_BYTES if nbytes >= HUGE_BYTES else PAGE_BYTES) == 0
        assert not any(region.view[:PAGE_BYTES])


def _resident_bytes(address: int, field: str) -> int:
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and head == field:
            total += int(line.split()[1]) * 1024
    return total


def test_a_region_costs_its_size_and_takes_huge_pages() -> None:
    with Region(5 * MiB) as region:
        assert _resident_bytes(region.address, "Rss:") == 0
        region.tensor(torch.uint8, region.nbytes).fill_(1)
        assert _resident_bytes(region.address, "Rss:") == 5 * MiB
        if region.huge:
            assert _resident_bytes(region.address, "AnonHugePages:") in (0, 4 * MiB)  # 0: none were free


def test_tensors_share_bytes_and_outlive_the_region() -> None:
    region = Region(3 * MiB)
    tensor = region.tensor(torch.float32, 10, offset_bytes=8)
    tensor.fill_(2.5)
    assert bytes(region.view[8:12]) == torch.tensor([2.5]).numpy().tobytes()
    assert region.tensor(torch.float32, 0).numel() == 0
    region.close()
    region.close()
    gc.collect()
    others = [Region(3 * MiB) for _ in range(4)]  # would land on the memory, had it been unmapped
    for other in others:
        other.tensor(torch.uint8, 3 * MiB).fill_(9)
    assert torch.equal(tensor, torch.full((10,), 2.5))
    with pytest.raises(StoreClosed):
        _ = region.view


def test_closing_returns_the_memory() -> None:
    region = Region(4 * MiB)
    address = region.address
    region.tensor(torch.uint8, 4 * MiB).fill_(1)
    region.close()
    assert _resident_bytes(address, "Rss:") == 0


@pytest.mark.parametrize(("numel", "offset"), [(2, PAGE_BYTES - 4), (-1, 0), (1, -4)])
def test_a_tensor_outside_of_the_region_is_refused(numel: int, offset: int) -> None:
    with Region(PAGE_BYTES) as region, pytest.raises(ValueError, match="outside"):
        region.tensor(torch.float32, numel, offset)


def test_pinning_is_a_wish_without_cuda() -> None:
    with Region(PAGE_BYTES, pin=True) as region:
        assert region.pinned == torch.cuda.is_available()


@pytest.mark.gpu
def test_pinned_memory_is_known_to_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with Region(4 * MiB, pin=True) as region:
        tensor = region.tensor(torch.float32, MiB)
        assert region.pinned and tensor.is_pinned()
        tensor.fill_(3)
        assert torch.equal(tensor.cuda(non_blocking=True).cpu(), tensor)
    assert not tensor.is_pinned()


def test_a_refused_registration_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    with pytest.raises(StoreError, match="refused to pin 4.00 KiB"):
        Region(PAGE_BYTES, pin=True)


def test_pins_are_undone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Cudart:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            calls.append(f"register {nbytes}")
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            calls.append("unregister")
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    region = Region(PAGE_BYTES, pin=True)
    assert region.pinned
    region.close()
    region.close()
    Region(PAGE_BYTES, pin=True)  # dropped at once, without close
    gc.collect()
    assert calls == ["register 4096", "unregister"] * 2


def _pool(count: int = 2, nbytes: int = 5000, dram_bytes: int | None = None) -> tuple[BufferPool, Ledger]:
    ledger = Ledger(Budget(dram_bytes=dram_bytes))
    return BufferPool(nbytes, count, ledger, Category.BUFFERS, "test buffers"), ledger


def test_buffers_are_exact_aligned_and_charged_once() -> None:
    pool, ledger = _pool(count=3)
    assert ledger.charged_bytes(Tier.DRAM) == 3 * 8192
    with pool:
        held = [pool.acquire() for _ in range(3)]
        assert [len(buffer.view) for buffer in held] == [5000] * 3
        for index, buffer in enumerate(held):
            tensor = buffer.tensor(torch.uint8, 5000)
            assert tensor.data_ptr() % PAGE_BYTES == 0
            tensor.fill_(index)
        assert [buffer.view[4999] for buffer in held] == [0, 1, 2]
        for buffer in held:
            buffer.release()
    assert ledger.charged_bytes(Tier.DRAM) == 0


def test_no_room_in_the_budget() -> None:
    with pytest.raises(OverBudget, match="test buffers"):
        _pool(dram_bytes=10_000)


def test_a_timeout_names_the_holders() -> None:
    pool, _ = _pool()
    with (
        pool,
        pool.acquire(who="forward"),
        pool.acquire(who="backward"),
        pytest.raises(StoreTimeout, match=r"for optimizer; they are held by forward, backward"),
    ):
        pool.acquire(timeout_s=0, who="optimizer")


def test_release_wakes_a_waiter() -> None:
    pool, _ = _pool(count=1)
    with pool:
        first = pool.acquire()
        got: list[int] = []

        def borrow() -> None:
            with pool.acquire(timeout_s=30) as buffer:
                got.append(len(buffer.view))

        thread = threading.Thread(target=borrow)
        thread.start()
        first.release()
        thread.join()
        assert got == [5000] and pool.free_count() == 1 and pool.holders() == []


def test_misuse_of_a_loan_is_an_error() -> None:
    pool, _ = _pool(count=1)
    with pool:
        stale = pool.acquire(who="first")
        stale.release()
        with pool.acquire(who="second"):
            with pytest.raises(StoreError, match="released twice by first"):
                stale.release()
            with pytest.raises(StoreError, match="used after its release by first"):
                _ = stale.view
            assert pool.free_count() == 0


def test_closing_wakes_waiters_and_frees_with_the_last_loan() -> None:
    pool, ledger = _pool(count=1)
    buffer = pool.acquire()
    errors: list[BaseException] = []

    def borrow() -> None:
        try:
            pool.acquire()
        except StoreClosed as error:
            errors.append(error)

    thread = threading.Thread(target=borrow)
    thread.start()
    pool.close()
    thread.join()
    assert len(errors) == 1
    assert ledger.charged_bytes(Tier.DRAM) == 8192
    buffer.view[0] = 1
    buffer.release()
    assert ledger.charged_bytes(Tier.DRAM) == 0
    pool.close()
