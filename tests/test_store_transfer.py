"""Tickets and the pool: order, errors, counters, closing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from memopt.store.errors import StoreClosed, StoreIOError, StoreTimeout
from memopt.store.files import DirectFile
from memopt.store.regions import Region
from memopt.store.transfer import IoPool, SerialThread, Transfer
from memopt.units import KiB, MiB


class Gated:
    """A file whose transfers wait for a gate; the test decides when."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls: list[tuple[str, int, int]] = []

    def read_into(self, view: memoryview, offset: int) -> None:
        assert self.gate.wait(30)
        self.calls.append(("read", len(view), offset))

    def write_from(self, view: memoryview, offset: int) -> None:
        assert self.gate.wait(30)
        self.calls.append(("write", len(view), offset))


def test_requests_are_cut_and_counted(tmp_path: Path) -> None:
    with (
        Region(2 * MiB) as region,
        IoPool(workers=3, piece_bytes=64 * KiB) as pool,
        DirectFile.create(tmp_path / "f", MiB) as file,
    ):
        source = region.tensor(torch.uint8, MiB)
        source.random_()
        target = region.tensor(torch.uint8, MiB, MiB)
        pool.write(file, region.view[:MiB], 0).wait()
        pool.read(file, region.view[MiB:], 0).wait()
        assert torch.equal(source, target)
        assert (pool.read_bytes, pool.written_bytes) == (MiB, MiB)
        assert pool.busy_s > 0
        pool.read(file, region.view[:0], 0).wait()


def test_hooks_run_before_writes_and_after_reads() -> None:
    file = Gated()
    file.gate.set()
    order: list[object] = []
    with IoPool(workers=1, piece_bytes=4096) as pool:
        view = memoryview(bytearray(10_000))
        pool.write(file, view, 0, hook=lambda index, piece: order.append((index, len(piece), len(file.calls)))).wait()
        pool.read(file, view, 0, hook=lambda index, piece: order.append((index, len(piece), len(file.calls)))).wait()
    assert order == [(0, 4096, 0), (1, 4096, 1), (2, 1808, 2), (0, 4096, 4), (1, 4096, 5), (2, 1808, 6)]


def test_errors_come_back_in_wait_and_skip_the_rest(tmp_path: Path) -> None:
    file = Gated()
    file.gate.set()

    def refuse(index: int, view: memoryview) -> None:
        raise ZeroDivisionError(f"piece {index}")

    with IoPool(workers=1, piece_bytes=4096) as pool:
        ticket = pool.write(file, memoryview(bytearray(40_960)), 0, hook=refuse)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="piece 0"):
                ticket.wait()
        assert ticket.done() and isinstance(ticket.error, ZeroDivisionError)
        assert file.calls == [] and pool.written_bytes == 0
        with DirectFile.create(tmp_path / "f", 4096) as real, Region(8192) as region, pytest.raises(StoreIOError):
            pool.read(real, region.view, 0).wait()


def test_a_closed_pool_refuses_and_has_finished() -> None:
    file = Gated()
    pool = IoPool(workers=2, piece_bytes=4096)
    tickets = [pool.read(file, memoryview(bytearray(8192)), 0) for _ in range(5)]
    assert not tickets[0].done()
    with pytest.raises(StoreTimeout):
        tickets[0].wait(timeout_s=0)
    file.gate.set()
    pool.close()
    pool.close()
    assert all(ticket.done() for ticket in tickets) and len(file.calls) == 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memopt-io")]
    with pytest.raises(StoreClosed):
        pool.read(file, memoryview(bytearray(10)), 0)


def test_callbacks_run_once_in_the_finishing_thread_before_wait_returns() -> None:
    file = Gated()
    seen: list[str] = []
    with IoPool(workers=1) as pool:
        ticket = pool.read(file, memoryview(bytearray(10)), 0)
        assert ticket.then(lambda done: seen.append(threading.current_thread().name)) is ticket
        ticket.then(lambda done: ticket.then(lambda again: seen.append("nested")))
        file.gate.set()
        ticket.wait()
        assert seen == ["memopt-io-0", "nested"]
        ticket.then(lambda done: seen.append("late"))
        assert seen[-1] == "late"


def test_an_error_in_a_callback_is_not_lost() -> None:
    ticket = Transfer()
    ticket.then(lambda _: 1 // 0)
    ticket.then(lambda done: done)
    ticket.complete()
    with pytest.raises(ZeroDivisionError):
        ticket.wait()


def test_all_waits_for_all_and_keeps_the_first_error() -> None:
    Transfer.all([]).wait()
    parts = [Transfer() for _ in range(3)]
    whole = Transfer.all(parts)
    parts[1].complete(KeyError("second"))
    parts[0].complete(ValueError("first"))
    assert not whole.done()
    parts[2].complete()
    with pytest.raises(KeyError, match="second"):
        whole.wait()
    assert Transfer.all([parts[2]]) is parts[2]


def test_an_idle_pool_keeps_no_buffer_alive() -> None:
    file = Gated()
    file.gate.set()
    with IoPool(workers=1) as pool:
        data = bytearray(4096)
        pool.read(file, memoryview(data), 0).wait()
        # The worker drops its job right after it completed the ticket: the next job finds the first one gone.
        pool.read(file, memoryview(bytearray(1)), 0).wait()
        data.clear()  # BufferError if any view on it were left


def test_many_requests_from_many_threads(tmp_path: Path) -> None:
    with IoPool(workers=4) as pool, DirectFile.create(tmp_path / "f", MiB) as file, Region(64 * KiB) as region:

        def ask(index: int) -> None:
            view = region.view[index * 4096 : (index + 1) * 4096]
            for turn in range(50):
                view[0] = turn
                pool.write(file, view, index * 4096).wait()
                pool.read(file, view, index * 4096).wait()
                assert view[0] == turn

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.read_bytes == pool.written_bytes == 4 * 50 * 4096


def test_a_serial_thread_keeps_the_order_and_the_errors() -> None:
    thread = SerialThread("memopt-test")
    order: list[int] = []
    tickets = [thread.run(lambda index=index: order.append(index)) for index in range(20)]  # type: ignore[misc]
    failed = thread.run(lambda: 1 // 0)
    Transfer.all(tickets).wait()
    assert order == list(range(20))
    with pytest.raises(ZeroDivisionError):
        failed.wait()
    thread.close()
    thread.close()
    with pytest.raises(StoreClosed):
        thread.run(lambda: None)
    SerialThread("never used").close()
