"""The documents say what is there: options up to date, links that lead somewhere, flags that exist."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest
import typer

from memopt.launchers.main import build_app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ABOUT_COMMANDS = [page for page in PAGES if page.name != "CONTRIBUTING.md"]

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def known_flags() -> set[str]:
    """Every option of every command, `--help` included."""
    program: Any = typer.main.get_command(build_app())
    found = {"--help"}
    for command in (program, *program.commands.values()):
        for parameter in command.params:
            found.update(parameter.opts)
            found.update(parameter.secondary_opts)
    return found


def flags_in(text: str) -> set[str]:
    """The flags a text mentions; what follows a lone `--` on a line is another program's."""
    return set(_FLAG.findall(re.sub(r" -- .*", "", text)))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    wrong = []
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


def test_the_options_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "options-doc")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    written = (ROOT / "docs" / "finetune-options.md").read_text(encoding="utf-8")
    assert written == done.stdout, "run: scripts/options-doc > docs/finetune-options.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


@pytest.mark.parametrize("page", ABOUT_COMMANDS, ids=lambda page: page.name)
def test_every_flag_that_is_mentioned_exists(page: Path) -> None:
    assert not flags_in(page.read_text(encoding="utf-8")) - known_flags()


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n[x](#a-b-c) [y](nowhere.md) [z](#gone) [w](https://example.org)\n```\n[v](code.md)\n```\n"
    )
    assert broken_links(page) == ["nowhere.md", "#gone"]
    assert flags_in("`--seq-len 512`, not a--b or --- or\nserve --dir d -- --port 1\n--quiet") == {
        "--seq-len",
        "--dir",
        "--quiet",
    }
    assert {"--seq-len", "--no-resume", "--dir", "--version"} <= known_flags()


def test_the_picture_is_well_formed_and_has_both_themes() -> None:
    picture = ROOT / "docs" / "tiers.svg"
    assert xml.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in picture.read_text(encoding="utf-8")
