"""The program `memopt`: collects the subcommands and turns errors into one line and an exit code.

Exit codes: 0 done and within budget; 1 over budget or infeasible; 2 bad usage or input; 3 a prediction missed by more
than asked for; 70 a defect of memopt; 130 interrupted. `memopt profile` passes the code of a failed command through.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from memopt.errors import BadInput, MemoptError

# Modules of this package with `register(app)`, in the order of the help; none of them may import torch at its top.
_MODULES = ("plan", "finetune", "profile", "serve", "store_commands", "probe", "report", "calibrate_keys", "demo")
_EXIT_DEFECT = 70
_EXIT_INTERRUPTED = 130


def app_main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code. Errors are one line on stderr."""
    try:
        build_app()(args=list(arguments), prog_name="memopt")
    except SystemExit as leaving:
        if leaving.code == _EXIT_INTERRUPTED:  # what typer makes of KeyboardInterrupt, without a word
            _say("interrupted")
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except MemoptError as error:
        _say(str(error))
        return error.exit_code
    except Exception as error:
        _say(f"a defect of memopt ({type(error).__name__}: {error}); {_keep_traceback()}")
        return _EXIT_DEFECT
    return 0


def build_app() -> typer.Typer:
    """The typer program with every subcommand."""
    app = typer.Typer(
        name="memopt",
        help="LLM training and inference that fit a memory budget, and show where every byte went.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_program)
    for name in _MODULES:
        try:
            importlib.import_module(f"memopt.launchers.{name}").register(app)
        except ImportError as error:
            # the other subcommands must go on working where an optional package is missing
            _register_missing(app, name, error)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from memopt import __version__

        typer.echo(__version__)
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the program itself; --version has done its work before this is called."""


def _register_missing(app: typer.Typer, name: str, error: ImportError) -> None:
    message = f"{name} cannot be loaded ({error}); install what is missing: pip install 'memopt[hf]'"

    def unavailable() -> None:
        raise BadInput(message) from error

    app.command(name, help="(not available: a package is missing)")(unavailable)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone; the exit code is not
        print(f"memopt: {' '.join(text.split())}", file=sys.stderr)


def _keep_traceback() -> str:
    """Write the current traceback where it can be found; the sentence that says where."""
    try:
        handle, path = tempfile.mkstemp(prefix="memopt-crash-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError as error:
        return f"the traceback could not be written ({error.strerror})"
    return f"please report it with {path}"
