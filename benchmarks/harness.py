"""What the benchmark programs share: measured child processes, facts about the machine, rows and dated tables."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cgroup import NotPermitted, memory_group
from memopt.store.bandwidth import SsdSpeed, measure_ssd
from memopt.units import GiB, MiB, format_bytes, format_per_s

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESULT_MARK = "benchmark-result "
DROPPED_STEPS = 2
"""First steps of every child that no median sees: memory is touched first, and with clipping no update is due yet."""
_ERROR_LINES = 8


class ChildFailed(Exception):
    """A measured process ended without a result; the text holds the last lines it wrote."""


def run_child(name: str, arguments: dict[str, Any], *, limit_bytes: int | None = None) -> dict[str, Any]:
    """Run `benchmarks.children.NAME(**arguments)` in a process of its own and return its result.

    With `limit_bytes` the process lives in a memory cgroup, and the result gains `kernel` (KernelCount's fields); where
    that is not permitted, `kernel_skipped` says why. Raises ChildFailed.
    """
    command = [sys.executable, "-m", "benchmarks.children", name, json.dumps(arguments)]
    with contextlib.ExitStack() as stack:
        group, skipped = None, None
        if limit_bytes is not None:
            try:
                group = stack.enter_context(memory_group(limit_bytes))
                command = group.command(command)
            except NotPermitted as reason:
                skipped = str(reason)
                say(f"no memory cgroup: {skipped}")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        kernel = asdict(group.count()) if group is not None else None
    last = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(RESULT_MARK)), None)
    if done.returncode != 0 or last is None:
        tail = "\n  ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-_ERROR_LINES:])
        raise ChildFailed(f"{name} ended with exit code {done.returncode}; kernel: {kernel}\n  {tail}")
    result: dict[str, Any] = json.loads(last[len(RESULT_MARK) :])
    if limit_bytes is not None:
        result.update(kernel=kernel, kernel_skipped=skipped)
    return result


def say(text: str) -> None:
    """A line for the person who waits; results go to stdout, this does not."""
    print(f"[{datetime.now(UTC):%H:%M:%S}] {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def workspace(directory: str | None) -> Iterator[Path]:
    """A new directory under `directory` (default: the current one), removed at the end with all that is in it."""
    path = Path(tempfile.mkdtemp(prefix=".memopt-bench-", dir=directory or Path.cwd())).resolve()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def ceiling(directory: Path, reads: int, writes: int, nbytes: int) -> SsdSpeed:
    """The drive's raw speed now, `reads` to `writes` under way at once, with the engine's own files and threads."""
    return measure_ssd(directory, nbytes, mixed_reads=reads, mixed_writes=writes)


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def kept(values: Sequence[Any]) -> list[Any]:
    """The values of the steps that count."""
    return list(values[DROPPED_STEPS:])


def mib(nbytes: float | None) -> str:
    """Whole MiB, or a dash."""
    return "-" if nbytes is None else f"{nbytes / MiB:.0f}"


def gib(nbytes: float | None) -> str:
    """GiB (per second) with two digits, or a dash."""
    return "-" if nbytes is None else f"{nbytes / GiB:.2f}"


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits, or a dash for what was not measured."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def machine_facts(directory: Path, seed: int, probe: SsdSpeed | None) -> dict[str, str]:
    """What a reader must know to judge a number."""
    versions = {name: _version(name) for name in ("torch", "transformers")}
    facts = {
        "command": "python -m " + shlex.join([_module_name(), *sys.argv[1:]]),
        "seed": str(seed),
        "commit": _commit(),
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores for this process",
        "DRAM": f"{format_bytes(psutil.virtual_memory().total)}, "
        f"{format_bytes(psutil.virtual_memory().available)} available at the start",
        "kernel": f"{platform.system()} {platform.release()}",
        "software": f"Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "load before": " ".join(f"{value:.2f}" for value in os.getloadavg()),
    }
    if probe is not None:
        facts["disk probe"] = (
            f"{_file_system(directory)}, read {format_per_s(probe.read_per_s)}, write "
            f"{format_per_s(probe.write_per_s)}, mixed {probe.mixed_reads}:{probe.mixed_writes} "
            f"{format_per_s(probe.mixed_per_s)}, {'direct' if probe.direct else f'cached ({probe.reason})'}"
        )
    return facts


class Table:
    """Rows as they are measured: a JSON line and a Markdown row each on stdout, and in a dated file where asked."""

    def __init__(self, name: str, columns: Sequence[str], facts: dict[str, str], *, record: bool) -> None:
        self._columns = columns
        self._started = False
        now = datetime.now(UTC)
        self._file = RESULTS / f"{name}-{now:%Y-%m-%d}.md" if record else None
        lines = [f"- {key}: {value}" for key, value in facts.items()]
        print("\n".join(lines), flush=True)
        self._append(f"\n## {name}, {now:%Y-%m-%d %H:%M} UTC\n\n" + "\n".join(lines) + "\n\n")

    def add(self, row: dict[str, Any], cells: Sequence[str]) -> None:
        """One configuration: `row` is all that was measured, `cells` one text per column."""
        assert len(cells) == len(self._columns), (len(cells), len(self._columns))
        print(json.dumps(row), flush=True)
        if self._file is not None:
            with open(self._file.with_suffix(".jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if not self._started:
            self._started = True
            self._line("| " + " | ".join(self._columns) + " |")
            self._line("|" + "---|" * len(self._columns))
        self._line("| " + " | ".join(cells) + " |")

    def note(self, text: str) -> None:
        """Text below the rows; the next row starts a new table."""
        self._started = False
        self._line(f"\n{text}\n")

    def _line(self, text: str) -> None:
        print(text, flush=True)
        self._append(text + "\n")

    def _append(self, text: str) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(text)


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).name


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    except OSError:
        return "unknown"
    return head + changed if head else "unknown"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(directory: Path) -> str:
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda each: -len(each.mountpoint))
    inside = (each for each in mounts if directory.resolve().is_relative_to(each.mountpoint))
    return next((each.fstype for each in inside), "unknown file system")
