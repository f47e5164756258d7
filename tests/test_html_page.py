"""The page, read as text and opened in Chromium (without a network)."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.profiler.html_page import html_page, save_html
from memopt.report_types import DramUse, Report, Tiers, Timeline
from memopt.units import GiB, MiB
from tests.chromium_helpers import Browser, chromium
from tests.report_samples import full_report, sample_report

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;<!--"


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data = ""
        self._inside: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = (tag, dict(attrs))
        self.tags.append(self._inside)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attributes = self._inside
        if attributes.get("id") == "data":
            self.data += data
        elif tag not in ("script", "style"):
            self.text += data


def nasty_report() -> Report:
    """What comes from outside, in every place where text can stand."""
    return dataclasses.replace(
        full_report(),
        command=["python", NASTY],
        notes=[NASTY],
        reasons=[NASTY],
        results={NASTY: NASTY},
        config={NASTY: NASTY},
        machine=dataclasses.replace(full_report().machine, name=NASTY),
        phases=[dataclasses.replace(full_report().phases[0], name=NASTY)],
        tiers=Tiers(dram=DramUse(peak_bytes=MiB, at_peak={NASTY: MiB, "other": 0}, kinds_at_peak={NASTY: 1})),
        timeline=Timeline(t_s=[0, 1], dram_bytes=[1, 2], categories={"dram": {NASTY: [1, 1]}}),
    )


def test_nothing_is_loaded_from_anywhere() -> None:
    page = html_page(full_report())
    found = Parsed(page)
    for tag, attributes in found.tags:
        assert "src" not in attributes, tag
        assert tag != "a" and attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|importScripts", page)
    assert "Copyright (c) 2022 Leon Sorokin" in page, "the licence of uPlot goes where uPlot goes"
    assert len(page) < 200_000


def test_the_verdict_the_tiers_the_plan_and_the_notes_are_words_on_the_page() -> None:
    text = " ".join(Parsed(html_page(full_report())).text.split())
    for words in (
        "OVER BUDGET gpu peaked at 10.18 GiB, 188.00 MiB over its 10.00 GiB".replace("BUDGET ", "BUDGET"),
        "predicted 9.50 GiB, error -6.7%",
        "moments pinned in DRAM: 2.00 GiB would not fit beside the activations",
        "seed 0 & 1 < 2",
        "limit 32.00 GiB (/sys/fs/cgroup/job/memory.max)",
        "nvme0n1",
        "left with exit code 137, ended by SIGKILL",
        "2026-01-02 03:04:05 UTC",
    ):
        assert words in text
    assert "Within budget" in Parsed(html_page(sample_report())).text


def test_the_chart_data_is_the_reports_with_other_as_the_rest() -> None:
    report = full_report()
    data = json.loads(Parsed(html_page(report)).data)
    assert data["t"] == report.timeline.t_s
    gpu, dram, ssd = data["panels"]
    assert [gpu["tier"], dram["tier"], ssd["tier"]] == ["gpu", "dram", "ssd"]
    assert list(gpu["categories"]) == ["weights", "optimizer", "activations", "other"]
    assert gpu["measured"] == [sum(held) for held in zip(*gpu["categories"].values(), strict=True)]
    assert ssd["categories"] == {} and ssd["measured"][0] is None
    assert (gpu["budget"], gpu["predicted"]) == (10 * GiB, int(9.5 * GiB))
    assert len(data["phases"]) == len(report.phases)


def test_what_comes_from_the_report_is_text_and_nothing_else() -> None:
    page = html_page(nasty_report())
    found = Parsed(page)
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in found.tags}
    assert found.text.count("document.title='owned'") >= 7
    assert json.loads(found.data)["phases"][0]["name"] == NASTY


def test_a_report_without_time_line_and_budgets_still_makes_a_page() -> None:
    bare = dataclasses.replace(
        sample_report("unbounded"), tiers=Tiers(dram=DramUse()), timeline=Timeline(), phases=[], command=[]
    )
    page = html_page(bare)
    assert "No budget was given" in Parsed(page).text
    assert "data-panel=" not in page.split("<script")[0]


def test_a_path_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"page .*none/out\.html.*choose another path"):
        save_html(sample_report(), tmp_path / "none" / "out.html")


# in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("no Chromium here; scripts/install-chromium installs it")
    with Browser() as opened:
        yield opened


@pytest.fixture
def page(tmp_path: Path) -> Path:
    save_html(full_report(), tmp_path / "page.html")
    return tmp_path / "page.html"


def pixels(png: bytes) -> tuple[int, int, list[bytes]]:
    """Width, bytes per pixel and rows of an 8-bit PNG without interlacing."""
    at, packed, width, samples = 8, b"", 0, 0
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, _, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, interlaced) == (8, 0)
            samples = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    raw, stride, rows = zlib.decompress(packed), width * samples, []
    above = bytes(stride)
    for start in range(0, len(raw), stride + 1):
        above = _unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + stride]), above, samples)
        rows.append(above)
    return width, samples, rows


def _unfiltered(kind: int, row: bytearray, above: bytes, samples: int) -> bytes:
    """PNG specification, section 9."""
    if kind == 0:
        return bytes(row)
    for i in range(len(row)):
        left = row[i - samples] if i >= samples else 0
        up, corner = above[i], above[i - samples] if i >= samples else 0
        if kind == 1:
            guess = left
        elif kind == 2:
            guess = up
        elif kind == 3:
            guess = (left + up) // 2
        else:
            away = [abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)]
            guess = (left, up, corner)[away.index(min(away))]
        row[i] = (row[i] + guess) & 255
    return bytes(row)


def colours(png: bytes) -> tuple[int, float]:
    """How many colours a picture has, and the brightness (0 to 1) of most of it."""
    _, samples, rows = pixels(png)
    counts: dict[bytes, int] = {}
    for row in rows[::3]:
        for i in range(0, len(row), 3 * samples):
            counts[row[i : i + 3]] = counts.get(row[i : i + 3], 0) + 1
    most = max(counts, key=lambda colour: counts[colour])
    return len(counts), sum(most) / (3 * 255)


INK = """[...document.querySelectorAll('.panel canvas')].map(c => {
  const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;
  for (let i = 3; i < all.length; i += 4) n += all[i] > 0; return n / (c.width * c.height); })"""

# the share of a tier's chart that has just the colour of each category
AREAS = """(panel => { const canvas = document.querySelector(`[data-panel="${panel}"] canvas`), found = {};
  const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  for (const name of ['weights', 'gradients', 'optimizer', 'activations', 'buffers', 'other']) {
    const hex = getComputedStyle(document.documentElement).getPropertyValue('--c-' + name).trim();
    const [r, g, b] = [1, 3, 5].map(k => parseInt(hex.slice(k, k + 2), 16)); let n = 0;
    for (let i = 0; i < all.length; i += 4) n += all[i] === r && all[i + 1] === g && all[i + 2] === b;
    found[name] = n * 4 / all.length; } return found; })"""


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (400, False), (400, True)])
def test_the_page_is_drawn_without_a_word_on_the_console_or_the_network(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    inked = browser.value(INK)
    picture = browser.screenshot()
    assert browser.troubles == []
    assert browser.asked == [page.as_uri()]
    assert len(inked) == 4, "phases and three tiers"
    assert min(inked) > 0.3
    areas = browser.value(f"{AREAS}(0)")
    assert [name for name, share in areas.items() if share > 0.01] == ["weights", "optimizer", "activations", "other"]
    assert [name for name, share in browser.value(f"{AREAS}(1)").items() if share > 0.01] == ["buffers", "other"]
    shown, brightness = colours(picture)
    assert shown > 30
    assert brightness < 0.3 if dark else brightness > 0.8
    assert browser.value("document.documentElement.scrollWidth") <= width, "nothing hangs over the edge"


@pytest.mark.browser
def test_every_panel_has_the_same_time_axis(browser: Browser, page: Path) -> None:
    browser.open(page)
    edges = browser.value(
        "[...document.querySelectorAll('.u-over')].map(e => { const r = e.getBoundingClientRect(); "
        "return [Math.round(r.left), Math.round(r.right)] })"
    )
    assert len(edges) == 4
    assert all(edge == edges[0] for edge in edges)


def middle_of(browser: Browser, panel: int, share: float) -> tuple[float, float]:
    left, top, width, height = browser.value(
        f"(() => {{ const r = document.querySelector('[data-panel=\"{panel}\"] .u-over').getBoundingClientRect(); "
        "return [r.left, r.top, r.width, r.height] })()"
    )
    return left + width * share, top + height / 2


@pytest.mark.browser
def test_pointing_at_a_chart_reads_all_of_them(browser: Browser, page: Path) -> None:
    browser.open(page, height=2000)
    idle = browser.value("document.getElementById('readout').textContent")
    browser.move(*middle_of(browser, 0, 0.15))
    assert "Point at" in idle
    said = browser.value("document.getElementById('readout').textContent")
    time, words = said.split(" s", 1)
    assert float(time) == pytest.approx(0.15 * 20, abs=0.05)
    assert words.split() == ["·", "step", "›", "forward"]
    legends = browser.value("[...document.querySelectorAll('.u-legend')].map(e => e.textContent)")
    assert len(legends) == 3
    assert "weights4.00 GiB" in legends[0] and "activations2.80 GiB" in legends[0] and "other700.00 MiB" in legends[0]
    assert "buffers4.50 GiB" in legends[1]
    assert "measured12.00 GiB" in legends[2]


@pytest.mark.browser
def test_the_button_changes_the_colours_and_redraws(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value("document.getElementById('theme').click()")
    assert browser.value("document.documentElement.dataset.theme") == "dark"
    assert min(browser.value(INK)) > 0.02
    assert colours(browser.screenshot())[1] < 0.3
    assert browser.troubles == []


@pytest.mark.browser
def test_printed_from_the_dark_it_is_light_again_after(browser: Browser, page: Path) -> None:
    browser.open(page, dark=True)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF") and len(printed) > 20_000
    assert browser.value("document.documentElement.dataset.theme") == "dark", "on the screen it stays as it was"
    assert browser.troubles == []


@pytest.mark.browser
def test_nothing_inside_a_report_is_run(browser: Browser, tmp_path: Path) -> None:
    save_html(nasty_report(), tmp_path / "nasty.html")
    browser.open(tmp_path / "nasty.html")
    assert browser.value("document.title").startswith("OVER BUDGET: python")
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.troubles == []
    assert min(browser.value(INK)) > 0.02, "the charts are drawn all the same"


@pytest.mark.browser
def test_the_policy_of_the_page_stops_foreign_scripts(browser: Browser, tmp_path: Path) -> None:
    """A second wall: even where escaping failed, no script but the page's own would run."""
    file = tmp_path / "broken.html"
    file.write_text(html_page(full_report()).replace("</main>", "</main><script>document.title='owned'</script>"))
    browser.open(file)
    assert browser.value("document.title") != "owned"
    assert any("Content Security Policy" in trouble for trouble in browser.troubles)
