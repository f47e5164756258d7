"""A command line made from a settings dataclass: one flag per field; help, panel and default come from the field."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from memopt.jobs.fields import choices, members

Run = Callable[[dict[str, Any], Path | None], None]

_CONFIG_HELP = "TOML file with any of these settings, or the report of an earlier run; a flag wins over the file."


def command(settings: type, run: Run, doc: str) -> Callable[..., None]:
    """A typer command whose flags are the fields of `settings`, plus `--config`.

    `run` receives the settings given explicitly as flags (and only those), and the path given with `--config`.
    """
    parameters = [*(_parameter(settings, field) for field in dataclasses.fields(settings)), _config_parameter()]

    def called(**given: Any) -> None:
        config = given.pop("config")
        run({name: value for name, value in given.items() if value is not None}, config)

    called.__doc__ = doc
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called


def _parameter(settings: type, field: dataclasses.Field[Any]) -> inspect.Parameter:
    about = field.metadata
    flag = "--" + field.name.replace("_", "-")
    kind = _kind(settings, field.name)
    metavar = about["metavar"] or "|".join(choices(settings, field.name)) or None
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=" ".join(filter(None, (about["help"], _default(field)))),
        rich_help_panel=about["group"],
        show_default=False,
        metavar=None if kind is bool else metavar,
    )
    return _keyword(field.name, Annotated[kind | None, option])


def _config_parameter() -> inspect.Parameter:
    option = typer.Option("--config", help=_CONFIG_HELP, metavar="FILE", show_default=False, rich_help_panel="Run")
    return _keyword("config", Annotated[Path | None, option])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    # None stands for "not given": that is how an explicit flag is told from a default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(settings: type, name: str) -> type:
    found = members(settings, name)
    return found[0] if found in ((int,), (float,), (bool,)) else str


def _default(field: dataclasses.Field[Any]) -> str:
    """What the help says of the default (typer would put a text of ours in a second pair of brackets)."""
    if field.default is dataclasses.MISSING:
        return "Required."
    if field.metadata["shown"] is not None:
        return f"Default: {field.metadata['shown']}."
    if field.default is None:
        return ""
    if isinstance(field.default, bool):
        return f"Default: {'yes' if field.default else 'no'}."
    return f"Default: {field.default:g}." if isinstance(field.default, float) else f"Default: {field.default}."
