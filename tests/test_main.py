from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from memopt.errors import BadInput, Interrupted, MemoptError
from memopt.launchers import main
from memopt.machine import Machine
from tests.report_samples import sample_report


@pytest.fixture
def with_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Replace the subcommands by `go` and `stay`, of which `go` does what the test wants."""

    def install(go: Callable[[], None]) -> None:
        def build() -> typer.Typer:
            app = typer.Typer(pretty_exceptions_enable=False)
            app.command("go")(go)
            app.command("stay")(lambda: None)
            return app

        monkeypatch.setattr(main, "build_app", build)

    return install


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoptError("over it"), 1, "memopt: over it"),
        (BadInput("--lr: no\nnumber"), 2, "memopt: --lr: no number"),
        (Interrupted("saved at step 3"), 130, "memopt: saved at step 3"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    with_command: Callable[[Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
    error: MemoptError,
    code: int,
    line: str,
) -> None:
    def go() -> None:
        raise error

    with_command(go)
    assert main.run(["go"]) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_control_c(with_command: Callable[[Callable[[], None]], None], capsys: pytest.CaptureFixture[str]) -> None:
    def go() -> None:
        raise KeyboardInterrupt

    with_command(go)
    assert main.run(["go"]) == 130
    assert capsys.readouterr() == ("", "memopt: interrupted\n")


def test_a_defect_keeps_its_traceback_in_a_file(
    with_command: Callable[[Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def go() -> None:
        raise ZeroDivisionError("of my own making")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with_command(go)
    assert main.run(["go"]) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "ZeroDivisionError: of my own making" in err
    (file,) = tmp_path.iterdir()
    assert str(file) in err
    assert "Traceback" in file.read_text()
    assert "of my own making" in file.read_text()


@pytest.mark.parametrize(("exit_with", "code"), [(0, 0), (1, 1), (3, 3)])
def test_a_command_chooses_its_exit_code(
    with_command: Callable[[Callable[[], None]], None], exit_with: int, code: int
) -> None:
    def go() -> None:
        raise typer.Exit(exit_with)

    with_command(go)
    assert main.run(["go"]) == code


def test_usage_errors_are_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["no-such-command"]) == 2
    assert main.run(["report"]) == 2
    assert main.run(["report", "--no-such-flag", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    assert main.run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("finetune", "probe", "report"):
        assert name in text


def test_a_broken_subcommand_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "_MODULES", ("not_there", "report"))
    assert main.run(["report", "--help"]) == 0
    capsys.readouterr()
    assert main.run(["not_there"]) == 2
    assert "not_there cannot be loaded" in capsys.readouterr().err


def test_help_is_fast_because_it_imports_no_torch(run_python: Callable[..., object]) -> None:
    code = (
        "import sys\n"
        "from memopt.launchers.main import build_app\n"
        "build_app()\n"
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    sample_report().save(file)
    assert main.run(["report", str(file)]) == 0
    assert "within budget" in capsys.readouterr().out
    assert main.run(["report", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())
    file.write_text("{")
    assert main.run(["report", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.toml"
    assert main.run(["probe", "--dir", str(tmp_path), "--size", "16MiB", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().err
    assert Machine.load(out).ssd_read_per_s
    assert main.run(["probe", "--size", "16MB"]) == 2
    assert "--size: '16MB'" in capsys.readouterr().err
    assert main.run(["probe", "--dir", str(tmp_path / "none")]) == 2
