"""What is measured, in Prometheus' text format: a string, a file for node_exporter's textfile collector, an endpoint.

The format is version 0.0.4 (prometheus.io, "Exposition formats"): `# HELP` and `# TYPE` before the samples of a metric,
counters end in `_total`, label values escape backslash, quote and line feed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from memopt import atomic
from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.profiler.session import Session
from memopt.tiers import Category, Tier

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TIER_NAMES = {Tier.GPU: "GPU memory", Tier.DRAM: "anonymous and shared memory of the process tree", Tier.SSD: "files"}
_ENDING = ".prom"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric: samples are (labels, value)."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    samples: tuple[tuple[Mapping[str, str], int | float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a program adds to what its session measures."""

    budget: Budget = field(default_factory=Budget)
    categories: Mapping[Tier, Mapping[Category, int]] = field(default_factory=dict)
    crossings: Mapping[Tier, int] = field(default_factory=dict)
    phases: tuple[str, ...] = ()
    steps: int = 0
    running: bool = True


def exposition(metrics: Iterable[Metric]) -> str:
    """The text; a metric without samples is left out."""
    lines = []
    for metric in metrics:
        if not metric.samples:
            continue
        lines.append(f"# HELP {metric.name} {_escaped(metric.help)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for labels, value in metric.samples:
            inside = ",".join(f'{name}="{_escaped(text, quote=True)}"' for name, text in labels.items())
            lines.append(f"{metric.name}{{{inside}}} {value}" if inside else f"{metric.name} {value}")
    return "".join(f"{line}\n" for line in lines)


def metrics_of(session: Session, state: State | None = None) -> Iterator[Metric]:
    """The latest sample of a started session, without measuring again. From any thread."""
    state = state or State()
    latest = {Tier.GPU: session.gpu_bytes(), Tier.DRAM: session.dram_bytes(), Tier.SSD: session.ssd_bytes()}
    for tier, what in _TIER_NAMES.items():
        yield _gauge(f"memopt_{tier}_bytes", f"Bytes of {what} in use.", latest[tier])
        yield _gauge(f"memopt_{tier}_peak_bytes", f"Highest bytes of {what} so far.", session.peak_bytes(tier))
        yield _gauge(f"memopt_{tier}_budget_bytes", f"Bytes of {what} allowed.", state.budget.bytes_of(tier))
    yield Metric(
        name="memopt_category_bytes",
        kind="gauge",
        help="Bytes in use by what they are; other is what nobody accounts for, below zero where too much was.",
        samples=tuple(
            ({"tier": str(tier), "category": str(category)}, nbytes)
            for tier, by in state.categories.items()
            for category, nbytes in by.items()
        ),
    )
    read_bytes, write_bytes = session.io_bytes()
    yield _counter("memopt_io_read_bytes_total", "Bytes the process tree read from devices.", read_bytes)
    yield _counter("memopt_io_written_bytes_total", "Bytes the process tree wrote to devices.", write_bytes)
    yield _counter("memopt_steps_total", "Steps of the program.", state.steps)
    yield Metric(
        name="memopt_over_budget_total",
        kind="counter",
        help="Times that a budget was passed.",
        samples=tuple(
            ({"tier": str(tier)}, times)
            for tier, times in state.crossings.items()
            if state.budget.bytes_of(tier) is not None
        ),
    )
    yield Metric(
        name="memopt_phase",
        kind="gauge",
        help="1 for each phase the program is in.",
        samples=tuple(({"phase": name}, 1) for name in dict.fromkeys(state.phases)),
    )
    yield _gauge("memopt_running", "1 while it is measured, 0 in what is left afterwards.", int(state.running))


def write(path: Path, text: str) -> None:
    """Replace the file in one step, as the textfile collector needs. Raises BadInput."""
    if path.suffix != _ENDING:
        raise BadInput(f"metrics file {str(path)!r}: the textfile collector reads *{_ENDING} only; name it so")
    atomic.save_text("metrics file", path, text)


class FileWriter:
    """Writes a metrics file at once, then every `every_s` seconds, and when closed. `failed`: why it gave up."""

    def __init__(self, path: Path, text: Callable[[], str], every_s: float) -> None:
        if not every_s > 0:
            raise BadInput(f"every_s = {every_s}; write seconds, more than zero")
        write(path, text())
        self._path, self._text, self._every_s = path, text, every_s
        self.failed: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memopt-metrics-file", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write a last time and end the thread."""
        self._end.set()
        self._thread.join()
        self._write()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            self._write()

    def _write(self) -> None:
        try:
            write(self._path, self._text())
        except BadInput as error:  # a full disk is no reason to end the program
            self.failed = str(error)


class Server:
    """Serves `text()` under /metrics in threads of its own until closed. Port 0 takes a free one. Raises BadInput."""

    def __init__(self, text: Callable[[], str], port: int, host: str = "127.0.0.1") -> None:
        try:
            self._server = _HttpServer((host, port), _handler_for(text))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BadInput(f"metrics cannot be served on {host}:{port}: {reason}; choose another port, or 0") from error
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="memopt-metrics", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where to read them."""
        return f"http://{self.host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop listening. A second call does nothing."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _HttpServer(ThreadingHTTPServer):
    # a client that hangs must not hold up the end of the program
    daemon_threads = True
    block_on_close = False


def _handler_for(text: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/metrics", "/"):
                self.send_error(404, "metrics are under /metrics")
                return
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: scrapes come every few seconds."""

    return Handler


def _gauge(name: str, text: str, value: int | None) -> Metric:
    return Metric(name=name, kind="gauge", help=text, samples=() if value is None else (({}, value),))


def _counter(name: str, text: str, value: int) -> Metric:
    return Metric(name=name, kind="counter", help=text, samples=(({}, value),))


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text
