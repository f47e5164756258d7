"""Metrics as text, as a file, and over HTTP; read back by rules of the format and by Prometheus' own parser."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

import memopt
from memopt.errors import BadInput
from memopt.profiler.program import Profiler
from memopt.profiler.prometheus import CONTENT_TYPE, FileWriter, Metric, exposition, metrics_of
from memopt.profiler.session import Session
from memopt.units import GiB

_SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (-?\d+(?:\.\d+)?)')
_LABEL = re.compile(r'([a-z]+)="((?:[^"\\]|\\.)*)"')
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """Check the format's rules line by line, and return the samples."""
    assert text.endswith("\n")
    found: Samples = {}
    kinds: dict[str, str] = {}
    seen: list[str] = []
    helped = None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            helped = line.split(" ", 3)[2]
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert helped == name and name not in kinds, line
            assert kind in ("gauge", "counter")
            assert name.endswith("_total") == (kind == "counter")
            kinds[name] = kind
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            name = match[1]
            assert name in kinds and list(kinds)[-1] == name, "samples follow their TYPE, all in one group"
            labels = frozenset(
                (key, value.replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\"))
                for key, value in _LABEL.findall(match[2] or "")
            )
            assert (name, labels) not in found, "no sample twice"
            found[name, labels] = float(match[3])
            seen.append(name)
    assert set(kinds) == set(seen), "no metric without a sample"
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def read(url: str) -> tuple[str, str]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    model = nn.Linear(64, 64)
    (tmp_path / "file").write_bytes(b"x" * 5000)
    with Profiler(budget="dram=1TiB,ssd=1GiB", watch_dirs=[tmp_path]) as prof:
        prof.watch(model)
        prof.step()
        with prof.phase('odd "name"\\ of\na phase'), prof.phase("forward"), prof.phase("forward"):
            model(torch.ones(2, 64)).sum().backward()
            return prof.metrics()


def test_what_is_in_it(text: str) -> None:
    samples = parsed(text)
    assert value(samples, "memopt_category_bytes", tier="dram", category="weights") == (64 * 64 + 64) * 4
    assert value(samples, "memopt_category_bytes", tier="dram", category="gradients") == (64 * 64 + 64) * 4
    categories = sum(
        n for (name, labels), n in samples.items() if name == "memopt_category_bytes" and ("tier", "dram") in labels
    )
    assert categories == value(samples, "memopt_dram_bytes") <= value(samples, "memopt_dram_peak_bytes")
    assert value(samples, "memopt_dram_budget_bytes") == 1024 * GiB
    assert value(samples, "memopt_ssd_budget_bytes") == GiB
    assert value(samples, "memopt_ssd_bytes") >= 5000
    assert value(samples, "memopt_steps_total") == 1
    assert value(samples, "memopt_over_budget_total", tier="dram") == 0
    assert value(samples, "memopt_phase", phase='odd "name"\\ of\na phase') == 1
    assert value(samples, "memopt_phase", phase="forward") == 1
    assert value(samples, "memopt_io_written_bytes_total") >= 0
    assert ("memopt_gpu_bytes", frozenset()) not in samples or torch.cuda.is_available()


def test_prometheus_own_parser_reads_the_same(text: str) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    theirs = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert theirs == parsed(text)


def test_a_plain_session() -> None:
    with Session() as session:
        samples = parsed(exposition(metrics_of(session)))
    assert value(samples, "memopt_dram_bytes") > 0
    assert ("memopt_dram_budget_bytes", frozenset()) not in samples


def test_help_is_escaped() -> None:
    metric = Metric(name="a", kind="gauge", help='back\\slash, "quote" and\nline', samples=(({}, 1.5),))
    assert exposition([metric]) == '# HELP a back\\\\slash, "quote" and\\nline\n# TYPE a gauge\na 1.5\n'


class TestFile:
    def test_once(self, tmp_path: Path) -> None:
        file = tmp_path / "job.prom"
        with Profiler() as prof:
            prof.write_metrics(file)
            assert value(parsed(file.read_text()), "memopt_running") == 1
        assert value(parsed(file.read_text()), "memopt_running") == 1
        assert [entry.name for entry in tmp_path.iterdir()] == ["job.prom"]

    def test_again_and_again_and_at_the_end(self, tmp_path: Path) -> None:
        file = tmp_path / "job.prom"
        with Profiler() as prof:
            prof.write_metrics(file, every_s=600)
            prof.step()
        samples = parsed(file.read_text())
        assert (value(samples, "memopt_running"), value(samples, "memopt_steps_total")) == (0, 1)

    def test_the_thread_writes_and_a_reader_never_sees_half(self, tmp_path: Path) -> None:
        file = tmp_path / "a.prom"
        count = 0
        enough = threading.Event()

        def lines() -> str:
            nonlocal count
            count += 1
            if count > 20:
                enough.set()
            return f"a {count}\n" * 2000

        writer = FileWriter(file, lines, 0.001)
        while not enough.is_set():
            assert len(set(file.read_text().splitlines())) == 1
        writer.close()
        assert file.read_text() == f"a {count}\n" * 2000
        assert writer.failed is None

    def test_where_it_cannot_be(self, tmp_path: Path) -> None:
        with Profiler() as prof:
            with pytest.raises(BadInput, match=r"reads \*.prom only; name it so"):
                prof.write_metrics(tmp_path / "job.txt")
            with pytest.raises(BadInput, match="cannot be written"):
                prof.write_metrics(tmp_path / "none" / "job.prom", every_s=1)
            with pytest.raises(BadInput, match="every_s = 0"):
                prof.write_metrics(tmp_path / "job.prom", every_s=0)
        with pytest.raises(RuntimeError, match="not running"):
            prof.write_metrics(tmp_path / "job.prom")

    def test_a_directory_that_goes_does_not_end_the_program(self, tmp_path: Path) -> None:
        directory = tmp_path / "gone"
        directory.mkdir()
        with Profiler() as prof:
            prof.write_metrics(directory / "job.prom", every_s=600)
            (directory / "job.prom").unlink()
            directory.rmdir()
        assert prof.report.wall_s > 0


class TestServer:
    def test_serves_until_the_end(self) -> None:
        threads = threading.active_count()
        with memopt.Profiler() as prof:
            server = prof.serve_metrics()
            body, kind = read(server.url)
            assert kind == CONTENT_TYPE
            assert value(parsed(body), "memopt_steps_total") == 0
            prof.step()
            assert value(parsed(read(server.url + "?x=1")[0]), "memopt_steps_total") == 1
            with pytest.raises(urllib.error.HTTPError) as caught:
                read(server.url + "/other")
            assert caught.value.code == 404
            caught.value.close()
            with pytest.raises(BadInput, match=f"127.0.0.1:{server.port}: Address already in use"):
                prof.serve_metrics(server.port)
            with pytest.raises(BadInput, match="choose another port"):
                prof.serve_metrics(70000)
            idle = socket.create_connection((server.host, server.port))  # says nothing, and holds nothing up
        idle.close()
        with pytest.raises(urllib.error.URLError):
            read(server.url)
        assert threading.active_count() <= threads + 1  # the one of the idle client may still be about to end
        server.close()

    def test_an_error_of_the_program_ends_it_too(self) -> None:
        with pytest.raises(KeyError), memopt.Profiler() as prof:
            server = prof.serve_metrics()
            raise KeyError("mine")
        connection = http.client.HTTPConnection(server.host, server.port, timeout=5)
        with pytest.raises(ConnectionRefusedError):
            connection.request("GET", "/metrics")
