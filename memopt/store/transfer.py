"""Reads and writes in the background: a bounded set of threads, and a ticket for each request."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from memopt.store.errors import StoreClosed, StoreTimeout
from memopt.units import MiB

PIECE_BYTES = 8 * MiB

# Called in a worker thread with the index of the piece and its bytes: after a read, before a write.
Hook = Callable[[int, memoryview], None]
# Bytes in memory and the offset in the file they belong to.
Piece = tuple[memoryview, int]


class RandomAccessFile(Protocol):
    """What a pool moves bytes to and from; `DirectFile` is one."""

    def read_into(self, view: memoryview, offset: int) -> None: ...

    def write_from(self, view: memoryview, offset: int) -> None: ...


class Transfer:
    """A ticket for work under way. Errors of the threads that do it come back in `wait`."""

    __slots__ = ("_callbacks", "_error", "_event", "_finished", "_left", "_lock")

    def __init__(self, parts: int = 1) -> None:
        self._left = parts
        self._error: BaseException | None = None
        self._finished = False
        self._callbacks: list[Callable[[Transfer], object]] = []
        self._lock = threading.Lock()
        self._event = threading.Event()
        if parts == 0:
            self._finish()

    @staticmethod
    def all(transfers: Iterable[Transfer]) -> Transfer:
        """Done when all are; carries the first error among them."""
        group = list(transfers)
        if len(group) == 1:
            return group[0]
        whole = Transfer(len(group))
        for transfer in group:
            transfer.then(lambda part: whole.complete(part.error))
        return whole

    @property
    def error(self) -> BaseException | None:
        """The first error so far."""
        return self._error

    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._event.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when all is done; raises the error of the work, or StoreTimeout after `timeout_s`.

        Not from a callback or hook: the thread that would finish the work may be the one that waits.
        """
        if not self._event.wait(timeout_s):
            raise StoreTimeout(f"a transfer was not finished after {timeout_s} s")
        if self._error is not None:
            raise self._error

    def then(self, callback: Callable[[Transfer], object]) -> Transfer:
        """Call `callback(self)` when done, also after an error: in the thread that finishes last and before any
        `wait` returns, or at once if that is past. What it raises becomes the error of the transfer. Returns self."""
        with self._lock:
            if not self._finished:
                self._callbacks.append(callback)
                return self
        callback(self)
        return self

    def complete(self, error: BaseException | None = None) -> None:
        """One part is done (or failed). For those who do the work; the last part runs the callbacks."""
        with self._lock:
            if error is not None and self._error is None:
                self._error = error
            self._left -= 1
            if self._left:
                return
        self._finish()

    def _finish(self) -> None:
        while True:
            with self._lock:
                callbacks, self._callbacks = self._callbacks, []
                if not callbacks:
                    self._finished = True
                    break
            for callback in callbacks:
                try:
                    callback(self)
                except BaseException as error:
                    if self._error is None:
                        self._error = error
        self._event.set()


class IoPool:
    """`workers` threads that read and write `piece_bytes` at a time, oldest request first.

    The counters are totals since the start: `read_bytes`, `written_bytes`, and `busy_s`, the seconds in which at least
    one request was under way. What bounds the work under way is memory: each request needs a buffer to move.
    """

    def __init__(self, workers: int = 4, piece_bytes: int = PIECE_BYTES) -> None:
        if workers < 1 or piece_bytes < 1 or piece_bytes % 4096:
            raise ValueError(f"{workers} workers, pieces of {piece_bytes} bytes: wants at least 1, a multiple of 4096")
        self.piece_bytes = piece_bytes
        self.read_bytes = 0
        self.written_bytes = 0
        self._busy_s = 0.0
        self._busy_since = 0.0
        self._under_way = 0
        self._closed = False
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"memopt-io-{index}", daemon=True) for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, file: RandomAccessFile, view: memoryview, offset: int, *, hook: Hook | None = None) -> Transfer:
        """Fill `view` from byte `offset` of `file`; the view must not be used until the ticket is done."""
        return self.submit(file, self._split(view, offset), write=False, hook=hook)

    def write(self, file: RandomAccessFile, view: memoryview, offset: int, *, hook: Hook | None = None) -> Transfer:
        """Write `view` at byte `offset` of `file`; the view must not be changed until the ticket is done."""
        return self.submit(file, self._split(view, offset), write=True, hook=hook)

    def submit(
        self, file: RandomAccessFile, pieces: Sequence[Piece], *, write: bool, hook: Hook | None = None
    ) -> Transfer:
        """Move pieces as they are cut, under one ticket. After the first error the rest is skipped."""
        transfer = Transfer(len(pieces))
        with self._lock:
            if self._closed:
                raise StoreClosed("the I/O pool was closed before this request")
            if pieces and self._under_way == 0:
                self._busy_since = time.perf_counter()
            self._under_way += len(pieces)
            for index, (view, offset) in enumerate(pieces):
                self._queue.put(_Job(transfer, file, view, offset, write, hook, index))
        return transfer

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one request was queued or moving."""
        with self._lock:
            running = time.perf_counter() - self._busy_since if self._under_way else 0.0
            return self._busy_s + running

    def close(self) -> None:
        """Finish what was asked for, then end the threads; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._queue.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> IoPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _split(self, view: memoryview, offset: int) -> list[Piece]:
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        size = self.piece_bytes
        return [(view[start : start + size], offset + start) for start in range(0, len(view), size)]

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            error: BaseException | None = None
            moved = 0
            if job.transfer.error is None:
                try:
                    job.run()
                    moved = len(job.view)
                except BaseException as caught:
                    error = caught
            with self._lock:
                if job.write:
                    self.written_bytes += moved
                else:
                    self.read_bytes += moved
                self._under_way -= 1
                if self._under_way == 0:
                    self._busy_s += time.perf_counter() - self._busy_since
            job.transfer.complete(error)
            del job, error  # an idle thread must not keep a buffer alive


class _Job:
    """One piece of one request."""

    __slots__ = ("file", "hook", "index", "offset", "transfer", "view", "write")

    def __init__(
        self,
        transfer: Transfer,
        file: RandomAccessFile,
        view: memoryview,
        offset: int,
        write: bool,
        hook: Hook | None,
        index: int,
    ) -> None:
        self.transfer = transfer
        self.file = file
        self.view = view
        self.offset = offset
        self.write = write
        self.hook = hook
        self.index = index

    def run(self) -> None:
        if self.write:
            if self.hook is not None:
                self.hook(self.index, self.view)
            self.file.write_from(self.view, self.offset)
        else:
            self.file.read_into(self.view, self.offset)
            if self.hook is not None:
                self.hook(self.index, self.view)


class SerialThread:
    """One background thread that runs what it is given, in order; it starts with the first call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Transfer, Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lock = threading.Lock()

    def run(self, work: Callable[[], object]) -> Transfer:
        """Queue `work`; what it raises comes back in the ticket's `wait`."""
        with self._lock:
            if self._closed:
                raise StoreClosed(f"the thread {self._name} was closed before this request")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            transfer = Transfer()
            self._queue.put((transfer, work))
        return transfer

    def close(self) -> None:
        """Finish what was queued, then end the thread; a second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            transfer, work = item
            error: BaseException | None = None
            try:
                work()
            except BaseException as caught:
                error = caught
            transfer.complete(error)
            del item, transfer, work, error
