"""Who may import whom, what `import memopt` costs, and what names may not be taken."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import memopt

PACKAGE = Path(__file__).resolve().parent.parent / "memopt"

# Each line may import only from lines above it. Packages (folders) of one line never import each other; the plain
# modules at the top may import modules of their own line, in no circle.
LINES: tuple[tuple[str, ...], ...] = (
    ("errors", "tiers", "units", "atomic", "cgroups", "decode", "journal"),
    ("budget", "machine", "plan_types", "optim_types", "report_types", "forecast_types"),
    ("ledger",),
    ("store",),
    ("optim", "offload", "flash", "kv"),
    ("planning", "profiler"),
    ("patches",),
    ("jobs",),
    ("launchers",),
)
LINE_OF = {name: number for number, line in enumerate(LINES) for name in line}

# Frameworks are known to patches and to the jobs that put everything together, and to nobody else.
FOREIGN = {"transformers", "peft", "accelerate", "datasets", "tokenizers", "huggingface_hub"}
FOREIGN |= {"deepspeed", "vllm", "bitsandbytes"}
MAY_IMPORT_FOREIGN = {"patches", "jobs"}


def sources() -> list[Path]:
    return sorted(file for top in PACKAGE.iterdir() for file in files_of(top))


def files_of(top: Path) -> Iterator[Path]:
    # glob does not follow links to directories, and three of the packages are links
    if top.is_dir():
        for inner in top.iterdir():
            yield from files_of(inner)
    elif top.suffix == ".py":
        yield top


def imports_of(source: str) -> set[str]:
    """All modules a source imports, anywhere in it, with dots; `from memopt import x` is `memopt.x`.

    So is `memopt.x` after `import memopt`, which reaches the lazy public names.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "memopt":
            found.add(f"memopt.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            found.update(f"memopt.{alias.name}" if module == "memopt" else module for alias in node.names)
    return found


def part_of(module: str) -> str:
    return module.split(".")[1]


def trouble(importer: str, imported: str) -> str | None:
    """Why the part `importer` of memopt may not import the module `imported`; None if it may."""
    top = imported.split(".")[0]
    if top in ("patches", "launchers", "profiles"):
        return f"import memopt.{top} instead"
    if top in FOREIGN and importer not in MAY_IMPORT_FOREIGN:
        return f"{top} is known only to {sorted(MAY_IMPORT_FOREIGN)}"
    # what is used of a plain `import memopt` counts, not the import
    if top != "memopt" or imported in ("memopt", "memopt.__version__", "memopt.__file__"):
        return None
    target = part_of(imported)
    if target == importer:
        return None
    if target not in LINE_OF:
        return f"{target} has no line in LINES; a lazy public name must be imported from where it is defined"
    here, there = LINE_OF[importer], LINE_OF[target]
    same_line_of_modules = here == there and here < LINE_OF["store"]
    return None if there < here or same_line_of_modules else f"{target} is not above {importer}"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("store", "memopt.ledger", True),
        ("store", "memopt.offload.stream", False),
        ("ledger", "memopt.store.files", False),
        ("optim", "memopt.offload", False),
        ("optim", "memopt.optim.rules", True),
        ("planning", "memopt.profiler.session", False),
        ("budget", "memopt.machine", True),
        ("machine", "memopt.ledger", False),
        ("store", "memopt.finetune", False),
        ("store", "memopt.nowhere", False),
        ("store", "transformers.models", False),
        ("jobs", "memopt.patches.hf_model", True),
        ("launchers", "patches.hf_model", False),
        ("profiler", "memopt.__version__", True),
        ("units", "math", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert (trouble(importer, imported) is None) is allowed


def test_imports_inside_functions_are_seen() -> None:
    source = (
        "def f():\n    from memopt import store\n    import memopt.kv.cache as c\n    from memopt.jobs.x import y\n"
    )
    assert imports_of(source) == {"memopt.store", "memopt.kv.cache", "memopt.jobs.x"}


def test_every_import_points_upwards() -> None:
    wrong = []
    for file in sources():
        relative = file.relative_to(PACKAGE)
        part = relative.parts[0].removesuffix(".py")
        if part in ("__init__", "profiles"):  # the one file that may point anywhere, and data
            continue
        assert part in LINE_OF, f"memopt/{part} has no line yet; give it one in LINES"
        for imported in sorted(imports_of(file.read_text(encoding="utf-8"))):
            reason = trouble(part, imported)
            if reason is not None:
                wrong.append(f"{relative} imports {imported}: {reason}")
    assert not wrong, "\n".join(wrong)


def test_modules_of_one_line_import_in_no_circle() -> None:
    names = {name for name in LINE_OF if (PACKAGE / f"{name}.py").exists()}
    graph = {
        name: {
            part_of(found) for found in imports_of((PACKAGE / f"{name}.py").read_text()) if found.startswith("memopt.")
        }
        & names
        for name in names
    }
    while leaves := {name for name, needs in graph.items() if not needs}:
        graph = {name: needs - leaves for name, needs in graph.items() if name not in leaves}
    assert not graph, f"circle among {sorted(graph)}"


def test_import_memopt_imports_no_framework(run_python: Callable[..., object]) -> None:
    code = (
        "import sys, memopt\n"
        "dir(memopt)\n"
        f"heavy = sorted({FOREIGN | {'torch', 'numpy'}!r} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
        "memopt.Budget, memopt.Machine, memopt.Ledger, memopt.Report\n"
        f"heavy = sorted({FOREIGN | {'torch'}!r} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]


def test_public_names_resolve_and_are_listed() -> None:
    for name in memopt.__all__:
        assert getattr(memopt, name) is not None
        assert name in dir(memopt)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'.*Budget"):
        _ = memopt.nonsense


def test_no_submodule_carries_a_public_name() -> None:
    """`memopt.plan` must stay the function: importing a submodule of that name would put the module in its place."""
    submodules = {entry.name.removesuffix(".py") for entry in PACKAGE.iterdir()}
    assert not submodules & set(memopt.__all__)


def test_the_three_folders_are_relative_links() -> None:
    for name in ("patches", "launchers", "profiles"):
        link = PACKAGE / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
