"""`memopt profile`: run any command and show what it used of GPU, DRAM and SSD."""

from __future__ import annotations

from typing import Annotated

import typer

from memopt.units import parse_share

_DOC = (
    "Run any command and report what it used of GPU, DRAM and SSD, with all the processes it starts.\n\n"
    "memopt profile --dram 8GiB --report run.json -- python train.py --epochs 1\n\n"
    "The command's output and input are its own; the report goes to stderr. Leaves with the command's exit code when "
    "it failed, else 1 when it went over a budget, 3 when a prediction missed by more than --tolerance, else 0."
)
_SIZE = "Sizes are binary: 512MiB, 24GiB, 1TiB, 80%."


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    # what follows the command's name is the command's, with or without the two dashes
    settings = {"allow_interspersed_args": False}
    app.command("profile", help=_DOC, context_settings=settings)(_profile)


def _profile(
    command: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND [ARGUMENTS]", show_default=False)] = None,
    dram: Annotated[str | None, typer.Option(help=f"Budget of anonymous and shared memory. {_SIZE}")] = None,
    gpu: Annotated[str | None, typer.Option(help="Budget of GPU memory, all devices together.")] = None,
    ssd: Annotated[str | None, typer.Option(help="Budget of the files under --watch, as they lie on disk.")] = None,
    ssd_write: Annotated[str | None, typer.Option(help="What may be written to drives in all.")] = None,
    watch: Annotated[list[str] | None, typer.Option(help="Directory whose files count; can be repeated.")] = None,
    report: Annotated[str | None, typer.Option(metavar="FILE.json", help="Save the report here.")] = None,
    enforce: Annotated[bool, typer.Option(help="The kernel holds the command to --dram (memory cgroup).")] = False,
    on_over: Annotated[str, typer.Option(metavar="warn|stop", help="What to do when a budget is passed.")] = "warn",
    interval: Annotated[
        float | None,
        typer.Option(help="Seconds between samples. Default: 0.02 while memory grows, up to 0.1.", show_default=False),
    ] = None,
    plan: Annotated[str | None, typer.Option(metavar="FILE.json", help="A saved plan to compare with.")] = None,
    tolerance: Annotated[
        str | None, typer.Option(help="Leave with 3 when a measured peak is off the plan's by more (10%).")
    ] = None,
    quiet: Annotated[bool, typer.Option(help="Show no report; what went wrong is still said.")] = False,
) -> None:
    from memopt.jobs.profile import ProfileConfig, profile

    config = ProfileConfig(
        command=tuple(command or ()),
        dram=dram,
        gpu=gpu,
        ssd=ssd,
        ssd_write=ssd_write,
        watch=tuple(watch or ()),
        report=report,
        enforce=enforce,
        on_over=on_over,  # type: ignore[arg-type]  # checked there
        interval_s=interval,
        plan=plan,
        tolerance=None if tolerance is None else parse_share(tolerance, field="--tolerance"),
    )
    profiled = profile(config)
    if quiet:
        for message in profiled.messages:
            typer.echo(f"memopt: {message}", err=True)
    else:  # the messages are among the notes
        from rich.console import Console

        from memopt.profiler.render import render

        render(profiled.report, Console(stderr=True))
    raise typer.Exit(profiled.exit_code)
