"""What would land in site-packages: memopt and its dist-info, the whole tree and nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "memopt", "patches", "launchers", "profiles")


def tree_files(root: Path) -> set[str]:
    """Every source and data file of the package, links followed."""
    found = set()
    for directory, folders, files in os.walk(root / "memopt", followlinks=True):
        folders[:] = [folder for folder in folders if folder != "__pycache__"]
        for file in files:
            if file.endswith((".py", ".toml")) or file == "py.typed":
                found.add(str((Path(directory) / file).relative_to(root)))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree: a build folder left in the real one would put renamed files into the next wheel."""
    copy = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel_names(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("setuptools is not installed, so the wheel cannot be built without a network")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than the 77 that pyproject.toml asks for")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        return opened.namelist()


def test_only_memopt_would_land_in_site_packages(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    (info,) = tops - {"memopt"}
    assert re.fullmatch(r"memopt-\d+\.\d+\.\d+\.dist-info", info)


def test_the_wheel_holds_the_whole_tree(wheel_names: list[str], source: Path) -> None:
    inside = {name for name in wheel_names if name.startswith("memopt/")}
    assert inside == tree_files(source)
    assert {"memopt/py.typed", "memopt/profiles/ci-2g.toml", "memopt/launchers/main.py"} <= inside


def test_torch_is_pinned_and_every_constraint_is_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][A-Za-z0-9.]*", line), line


def test_what_pyproject_asks_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["hf"], *extras["dev"]]
    names = {re.split(r"[>=<\[ ]", text)[0].lower().replace("_", "-") for text in wanted}
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert not names - pinned
