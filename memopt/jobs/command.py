"""Run a command as the shell would, and stay its guardian: signals pass, orphans are adopted, nothing is left behind
unseen. For one command at a time, in the main thread (signals are waited for there).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from memopt.errors import BadInput
from memopt.profiler.samplers import descendants, process_memory

_PR_SET_CHILD_SUBREAPER = 36
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_WAITED_FOR = (*_PASSED_ON, signal.SIGCHLD)
# Python ignores these two at its start; what it runs must not inherit that
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_POLL_S = 0.1
_REAP_EVERY_S = 0.5  # SIGCHLD says so at once; several that end together can be one signal
_SIGNALLED = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended. `exit_code` as a shell says it; `max_resident_bytes`: the kernel's mark of its largest
    process, file pages included (None: smaller than this process's own, which the mark starts from)."""

    exit_code: int
    signal: str | None = None
    max_resident_bytes: int | None = None


class Command:
    """A running command and all that it started. Make it within `guardian`."""

    def __init__(self, command: Sequence[str], before: frozenset[int], mask: set[signal.Signals]) -> None:
        """Raises BadInput when it cannot be started. `before`: processes that are not the command's."""
        self._before = before
        self._own_mark = _own_high_water_bytes()
        self._ended: tuple[int, int] | None = None
        self._patient = True
        self._stopping_until_s: float | None = None
        try:
            self.pid = os.posix_spawnp(
                command[0], list(command), os.environ, setsigmask=mask, setsigdef=_IGNORED_BY_PYTHON
            )
        except OSError as error:
            raise BadInput(trouble(command[0], error)) from error

    def processes(self) -> list[int]:
        """The command and its descendants, adopted ones too; ended ones until they are waited for."""
        return [pid for pid in descendants() if pid not in self._before]

    def wait(self, look: Callable[[], None], adopted_ends: Callable[[int], None]) -> None:
        """Until the command and all that it left behind has ended. `look` is called about ten times a second.

        `adopted_ends(pid)`: before an orphan is waited for. Signals that were sent to this process alone are passed on;
        those of the terminal reach the command by themselves. Once only orphans are left, a signal ends the waiting.
        """
        reap_again_s = 0.0
        while True:
            received = signal.sigtimedwait(_WAITED_FOR, _POLL_S)
            if received is not None and received.si_signo in _PASSED_ON:
                self._pass_on(received)
            if received is not None or time.monotonic() > reap_again_s:
                reap_again_s = time.monotonic() + _REAP_EVERY_S
                self._reap(adopted_ends)
            if self._ended is not None and not (self._patient and self._left_behind()):
                return
            look()
            if self._stopping_until_s is not None and time.monotonic() > self._stopping_until_s:
                self._signal_all(signal.SIGKILL)

    def stop(self, grace_s: float) -> None:
        """Ask everything to end now (SIGTERM); what is still there after `grace_s` seconds is killed by `wait`."""
        if self._stopping_until_s is None:
            self._stopping_until_s = time.monotonic() + grace_s
            self._signal_all(signal.SIGTERM)

    def left_behind(self) -> int:
        """How many processes outlive the command; zero while it runs."""
        return 0 if self._ended is None else len(self._left_behind())

    def collect(self) -> Ended:
        """Wait for the command itself, which has ended: until now it was a zombie, so that it could be looked at."""
        _, _, usage = os.wait4(self.pid, 0)
        how, value = self._ended or (os.CLD_EXITED, 0)
        mark = usage.ru_maxrss * 1024
        killed = how != os.CLD_EXITED
        return Ended(
            exit_code=_SIGNALLED + value if killed else value,
            signal=_signal_name(value) if killed else None,
            # across fork and exec the mark is inherited: below our own it says nothing of the command
            max_resident_bytes=mark if mark > self._own_mark else None,
        )

    def _pass_on(self, received: signal.struct_siginfo) -> None:
        if self._ended is not None:
            self._patient = False
        elif received.si_code <= 0:  # SI_USER and the like; the terminal's own say SI_KERNEL
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, received.si_signo)

    def _reap(self, adopted_ends: Callable[[int], None]) -> None:
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            self._ended = (ended.si_code, ended.si_status)
        for pid in self.processes():
            if pid == self.pid:
                continue
            with contextlib.suppress(ChildProcessError):  # a grandchild: its parent waits for it
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    adopted_ends(pid)
                    os.waitpid(pid, 0)

    def _left_behind(self) -> list[int]:
        return [pid for pid in self.processes() if pid != self.pid]

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


@contextlib.contextmanager
def guardian() -> Iterator[Callable[[Sequence[str]], Command]]:
    """Hold signals for `Command.wait` and adopt orphans; gives what starts a command. Undone at the end."""
    before = frozenset(descendants())
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    adopts = _subreaper(True)
    try:
        yield lambda command: Command(command, before, {signal.Signals(number) for number in mask})
    finally:
        if adopts:
            _subreaper(False)
        while signal.sigtimedwait(_WAITED_FOR, 0) is not None:
            pass  # what came in late was meant for the command
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def find(name: str) -> None:
    """Raises BadInput when a command is not there or may not be run."""
    if shutil.which(name) is None:
        known = os.path.exists(name) if os.sep in name else False
        raise BadInput(trouble(name, PermissionError() if known else FileNotFoundError()))


def trouble(name: str, error: OSError) -> str:
    """Why a command could not be started, and what to do."""
    if isinstance(error, FileNotFoundError):
        return f"command {name!r} not found; check its name, or give its path"
    if isinstance(error, PermissionError):
        return f"command {name!r} may not be executed; chmod +x it, or name its interpreter (python {name})"
    return f"command {name!r} cannot be started: {error.strerror}; name its interpreter (python {name})"


def _subreaper(on: bool) -> bool:
    return int(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)) == 0


def _own_high_water_bytes() -> int:
    own = process_memory()
    return 0 if own is None else own.hwm_bytes


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
