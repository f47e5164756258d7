"""Being asked to stop: by Ctrl-C, by a scheduler's SIGTERM, by a terminal that is closed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from memopt.errors import Interrupted, MemoptError
from memopt.jobs.progress import Progress
from memopt.jobs.run_dir import RunDirectory

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether the person asked to stop. What is in `finishing` is brought to its end first; all else stops at once,
    and so does everything when asked again: KeyboardInterrupt."""

    def __init__(self, progress: Progress) -> None:
        self.asked = False
        self._progress = progress
        self._finishing = False

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """While signals come here. In a thread that is not the main one they cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in _NUMBERS}
        if before[signal.SIGHUP] == signal.SIG_IGN:  # nohup
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._ask)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Work that looks at `asked` itself."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self._progress.silence()
        if self.asked or not self._finishing:
            raise KeyboardInterrupt
        self.asked = True
        self._progress.note("stopping after this step (once more: at once)")


@contextmanager
def interruptible(directory: RunDirectory | None) -> Iterator[None]:
    """KeyboardInterrupt inside becomes Interrupted, which says what was saved."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_saved(directory)}") from None


def _saved(directory: RunDirectory | None) -> str:
    if directory is None:
        return "there is no --offload-dir, so nothing was saved"
    saved = None
    with contextlib.suppress(MemoptError):
        saved = directory.saved()
    if saved is None:
        return "nothing was saved yet"
    return f"the last save in {directory.path} is of step {saved['step']}; go on with --resume"
