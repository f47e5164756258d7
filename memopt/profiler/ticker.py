"""The thread behind a session, and the watch on its limit."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Ticker:
    """A daemon thread that calls `tick` again and again, `pause()` seconds apart; its error is raised by `stop`."""

    def __init__(self, tick: Callable[[], None], pause: Callable[[], float]) -> None:
        self._tick = tick
        self._pause = pause
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="memopt-profiler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it. Raises what `tick` raised, once."""
        self._end.set()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            while not self._end.wait(self._pause()):
                self._tick()
        except BaseException as error:  # carried to the caller of stop()
            self._error = error


class OverWatch:
    """Calls back once each time a limit is crossed upwards."""

    def __init__(self, limit_bytes: int | None, on_over: Callable[[int, int], None] | None) -> None:
        self._limit_bytes = limit_bytes
        self._on_over = on_over
        self._is_over = False

    def see(self, now_bytes: int) -> None:
        """Take one sample."""
        if self._limit_bytes is None or self._on_over is None:
            return
        was_over, self._is_over = self._is_over, now_bytes > self._limit_bytes
        if self._is_over and not was_over:
            self._on_over(now_bytes, self._limit_bytes)
