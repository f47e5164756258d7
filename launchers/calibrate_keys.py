"""`memopt calibrate-keys`: static key channels for ThinKCache and `memopt serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from memopt.units import format_bytes


def register(app: typer.Typer) -> None:
    """Add the subcommand to `app`."""
    app.command("calibrate-keys")(_calibrate_keys)


def _calibrate_keys(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.", metavar="MODEL")],
    data: Annotated[str, typer.Option("--data", help=".txt or .jsonl file, directory of them, or `datasets` name.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    keep: Annotated[float, typer.Option("--keep", help="Share of each head's key channels to keep.")] = 0.6,
    windows: Annotated[int, typer.Option("--windows", help="Windows of the data to use, the first ones.")] = 128,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a window.")] = 1024,
    observation: Annotated[
        int | None,
        typer.Option("--observation", help="Only so many of a window's last queries choose. Default: all."),
    ] = None,
    multiple: Annotated[int, typer.Option("--multiple", help="Round the count of channels up to this.")] = 16,
    device: Annotated[
        str | None, typer.Option("--device", help="Where the model runs. Default: cuda if there is one, else cpu.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="hf|vllm",
            help="What computes: transformers, or a vLLM engine.",
        ),
    ] = "hf",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Choose key channels on data, once: the file for ThinKCache(channels=FILE) and memopt serve --key-channels."""
    # imported late: usage errors come before torch
    from memopt.jobs.calibrate_keys import calibrate_keys

    def show(done: int, tokens: int) -> None:
        if not quiet:
            end = "\r" if sys.stderr.isatty() else "\n"
            if sys.stderr.isatty() or done == 1 or done % 16 == 0:
                print(f"window {done} of at most {windows}, {tokens} tokens", end=end, file=sys.stderr, flush=True)

    made = calibrate_keys(
        model,
        data,
        out,
        keep=keep,
        windows=windows,
        seq_len=seq_len,
        observation=observation,
        multiple=multiple,
        device=device,
        engine=engine,  # type: ignore[arg-type]  # checked there
        on_window=show,
    )
    if not quiet:
        sets = made.sets
        print(
            f"{sets.count} of {sets.model.head_dim} key channels in {len(sets.keys)} layers of {sets.model.kv_heads} KV"
            f" heads, from {made.windows} windows ({sets.tokens} tokens);"
            f" {format_bytes(out.stat().st_size)} written to {out}",
            file=sys.stderr,
        )
