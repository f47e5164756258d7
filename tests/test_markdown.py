from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.profiler.compare import Tolerance, compare
from memopt.profiler.markdown import comparison_markdown, escaped, report_markdown, save_markdown
from memopt.report_types import Report
from tests.report_samples import full_report, sample_report


def tables(text: str) -> list[list[list[str]]]:
    """All tables as rows of cells (no sample has an escaped bar in a table)."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_the_verdict_stands_first_and_the_rest_is_folded() -> None:
    text = report_markdown(full_report())
    first, rest = text.split("<details>", 1)
    assert first.startswith("### ❌ memopt: OVER BUDGET\n\ngpu peaked at 10.18 GiB, 188.00 MiB over its 10.00 GiB; ")
    assert "the job itself failed (SIGKILL).\n" in first
    assert len(first.splitlines()) < 15
    assert rest.rstrip().endswith("</details>")
    assert report_markdown(sample_report()).startswith("### ✅ memopt: within budget\n")


def test_every_table_has_a_ruler_and_equally_long_rows() -> None:
    found = tables(report_markdown(full_report()))
    assert len(found) == 7, "tiers, three categories, phases, GPUs, disks"
    for table in found:
        assert set(table[1]) <= {":--", "--:"}
        assert len({len(row) for row in table}) == 1
    assert found[0][2] == ["gpu", "10.00 GiB", "9.50 GiB", "10.18 GiB", "-6.7%", "102%", "OVER"]


def test_text_from_outside_is_text() -> None:
    report: Report = dataclasses.replace(
        full_report(), notes=["<img src=x> | **loud** @team `code`\n# title"], command=["a`b", "c"]
    )
    text = report_markdown(report)
    assert "- note: &lt;img src=x&gt; \\| \\*\\*loud\\*\\* @\u200bteam \\`code\\` \\# title\n" in text
    assert "`'a'\"'\"'b' c`" not in text and "<img" not in text
    (where,) = [line for line in text.splitlines() if line.endswith(", 20.00 s")]
    assert where.count("`") == 2
    assert escaped("kv_cache") == "kv\\_cache"


def test_a_comparison_shows_what_changed_and_folds_the_whole() -> None:
    comparison = compare(sample_report(), sample_report("over", 1200 * 1024**2), Tolerance.parse("5%"))
    text = comparison_markdown(comparison)
    assert text.startswith("### ❌ memopt: GREW: 2 of")
    short, whole = tables(text)
    assert ["dram", "960.00 MiB", "1.17 GiB", "+240.00 MiB", "+25.0%", "OVER"] in short
    assert "dram weights" not in {row[0] for row in short}
    assert "dram weights" in {row[0] for row in whole}
    assert comparison_markdown(compare(sample_report(), sample_report(), Tolerance.parse("5%"))).startswith("### ✅")


def test_a_path_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"markdown .*choose another path"):
        save_markdown("x", tmp_path / "none" / "out.md")
