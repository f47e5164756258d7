"""`memopt serve`: vLLM's own server with thinner keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.errors import BadInput


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    app.command("serve", context_settings={"allow_extra_args": True})(_serve)


def _serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory or hub id.", metavar="MODEL")],
    key_keep: Annotated[float, typer.Option("--key-keep", help="Share of the key channels to keep; 1: all.")] = 0.6,
    key_channels: Annotated[
        Path | None, typer.Option("--key-channels", help="Which channels: a file of memopt calibrate-keys.")
    ] = None,
    calibrate_keys: Annotated[
        Path | None,
        typer.Option("--calibrate-keys", help="Serve whole keys, and write which the prompts ask for to this file."),
    ] = None,
    key_recent: Annotated[int, typer.Option("--key-recent", help="Keep the keys of the last tokens whole.")] = 0,
    exact_prefill: Annotated[
        bool, typer.Option("--exact-prefill", help="Whole keys until a prompt is done; needs --key-recent.")
    ] = False,
    kernel: Annotated[
        str, typer.Option("--kernel", metavar="auto|stock|own", help="Attention by vLLM's kernels or memopt's own.")
    ] = "auto",
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Serve memopt's gauges there under /metrics; 0: a free port.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write the plan here (JSON).")] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Check and plan, start nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors and what vLLM prints.")] = False,
) -> None:
    """Serve MODEL with vLLM and thinner keys: more KV blocks in the same memory. What follows -- goes to vllm serve."""
    # imported late: usage errors come before torch
    from memopt.jobs.serve import ServeRequest, check, serve, tier_of_server
    from memopt.patches.vllm_config import Calibration, ThinKeys

    calibration = None if calibrate_keys is None else Calibration(path=calibrate_keys, keep=key_keep)
    if calibration is not None and (key_channels is not None or key_recent or exact_prefill):
        raise BadInput("--calibrate-keys serves whole keys; leave out --key-channels, --key-recent and --exact-prefill")
    keys = ThinKeys(
        key_keep=key_keep if calibration is None else 1.0,
        channels=key_channels,
        recent=key_recent,
        exact_prefill=exact_prefill,
        kernel=kernel,  # type: ignore[arg-type]  # checked there
    )
    request = ServeRequest(
        model=model, keys=keys, calibration=calibration, options=tuple(context.args), metrics_port=metrics_port
    )
    plan = check(request)

    def say(text: str) -> None:
        if not quiet:
            typer.echo(f"memopt: {text}", err=True)

    for line in plan.lines():
        say(line)
    if report is not None:
        plan.forecast(tier_of_server()).save(report)
    if not plan_only:
        raise typer.Exit(serve(request, plan, on_ready=say))
