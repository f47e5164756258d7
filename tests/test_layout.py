"""What would land in site-packages: memopt and its dist-info, the whole tree, the compiled kernels and nothing else."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from memopt.optim import native

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "memopt/optim/_step8.so"
NEEDED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "memopt", "patches", "launchers", "profiles")


def tree_files(root: Path) -> set[str]:
    """Every source and data file of the package, links followed."""
    found = set()
    for directory, folders, files in os.walk(root / "memopt", followlinks=True):
        folders[:] = [folder for folder in folders if folder != "__pycache__"]
        for file in files:
            data = file == "py.typed" or Path(directory).name in ("page", "vendor")
            if data or file.endswith((".py", ".toml")):
                found.add(str((Path(directory) / file).relative_to(root)))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree: a build folder left in the real one would put renamed files into the next wheel."""
    copy = tmp_path_factory.mktemp("source")
    left_out = shutil.ignore_patterns("__pycache__", "*.so")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def compiler_works(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether the compiler that setuptools would take can make a shared library."""
    directory = tmp_path_factory.mktemp("compiler")
    (directory / "empty.c").write_text("int nothing;\n")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    try:
        made = subprocess.run([*compiler, "-shared", "-fPIC", "empty.c", "-o", "empty.so"], cwd=directory, check=False)
    except OSError:
        return False
    return made.returncode == 0


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("setuptools is not installed, so the wheel cannot be built without a network")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than the 77 that pyproject.toml asks for")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [*command, "-w", str(out), str(source)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    shutil.rmtree(source / "build", ignore_errors=True)
    return wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def test_only_memopt_would_land_in_site_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names_in(wheel)}
    (info,) = tops - {"memopt"}
    assert re.fullmatch(r"memopt-\d+\.\d+\.\d+\.dist-info", info)


def test_the_wheel_holds_the_whole_tree_and_the_kernels(wheel: Path, source: Path, compiler_works: bool) -> None:
    inside = {name for name in names_in(wheel) if name.startswith("memopt/")}
    assert inside == tree_files(source) | ({KERNELS} if compiler_works else set())
    assert {"memopt/py.typed", "memopt/profiles/ci-2g.toml", "memopt/launchers/main.py"} <= inside
    assert {"memopt/profiler/page/report.js", "memopt/profiler/vendor/uPlot-LICENSE"} <= inside


def test_the_kernels_in_the_wheel_are_for_the_platform_and_any_python(
    wheel: Path, compiler_works: bool, tmp_path: Path
) -> None:
    if not compiler_works:
        pytest.skip("no C compiler")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as opened:
        library = ctypes.CDLL(opened.extract(KERNELS, tmp_path))
    assert library.memopt_step8_version() == native._VERSION


def test_without_a_compiler_there_is_a_wheel_for_every_platform(source: Path, tmp_path: Path) -> None:
    bare = build_wheel(source, tmp_path, CC="/bin/false")
    assert bare.name.endswith("-py3-none-any.whl")
    assert {name for name in names_in(bare) if name.startswith("memopt/")} == tree_files(source)


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
