"""Fine-tune a small pretrained model on text it has not seen, and see with plain transformers what it learned.

The model is a 7M-parameter Llama trained on Python and PostgreSQL documentation and dictionaries (its README). The new
domain is the manual text inside Perl's own modules (POD blocks), which every Debian-like system with Perl has; or any
text given with `--text`. One file in ten is held out, chosen by a hash of its text; equal texts count once.

Losses before and after come from plain transformers (windows of 512 tokens, no memopt code): on the held-out files,
and on the model's own validation text, which tells how much was forgotten. memopt's own evaluation is printed beside.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from benchmarks.harness import ROOT, ChildFailed, Table, machine_facts, median, mib, number, run_child, say, workspace
from memopt.units import parse_bytes

COLUMNS = (
    "steps x tokens",
    "held-out loss before",
    "after",
    "perplexity before",
    "after",
    "memopt's own before",
    "after",
    "validation loss before",
    "after",
    "s/step",
    "peak of budget MiB",
    "state MiB",
)
_POD_ROOTS = ("/usr/share/perl", "/usr/share/perl5")
_PROMPTS = ("=head1 NAME\n\n", "=head1 SYNOPSIS\n\n", "This module provides")
_POD_BLOCK = re.compile(r"^=[a-z]\w*.*?(?:^=cut[^\n]*\n|\Z)", re.MULTILINE | re.DOTALL)
_LEAST_CHARACTERS, _MOST_CHARACTERS = 1000, 40_000
_HELD_OUT_ONE_IN = 10


def main() -> int:
    """Measure; 0 when the held-out loss fell and the run stayed within its budget, also when there is no model."""
    args = _arguments()
    if not (args.model / "config.json").is_file():
        say(f"skipped: no model at {args.model}; name its directory with --model")
        return 0
    texts = list(_texts(args.text))
    if len(texts) < 2 * _HELD_OUT_ONE_IN:
        say(f"skipped: only {len(texts)} texts under {', '.join(args.text)}; name a directory of text with --text")
        return 0
    with workspace(args.dir) as work:
        sizes = _write(texts, work, args.bytes)
        table = Table("finetune_pretrained", COLUMNS, _facts(args, work, sizes), record=args.record)
        try:
            row, samples = _measure(args, work)
        except ChildFailed as error:
            say(f"FAILED: {error}")
            return 1
        table.add(row, _cells(row))
        table.note(samples)
    fell = row["after"]["losses"]["held_out"] < row["before"]["losses"]["held_out"]
    return 0 if fell and row["verdict"] == "within" else 1


def _measure(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], str]:
    scored = {"held_out": str(work / "held-out.txt")}
    if args.validation.is_file():
        scored["validation"] = str(args.validation)
    ask = {"texts": scored, "prompts": list(_PROMPTS), "seed": args.seed, "max_windows": args.windows}
    say("scoring the model as it is")
    before = run_child("score", {"model": str(args.model), **ask})
    settings = _settings(args, work)
    settings["dram"] = synthetic.dram_budget(args.dram, settings, None)
    say(f"training {args.steps} steps in {mib(settings['dram'])} MiB")
    run = run_child("train_memopt", {"settings": settings, "batches": None})
    say("scoring what was trained")
    after = run_child("score", {"model": settings["output"], **ask})
    row = {
        "benchmark": "finetune_pretrained",
        "steps": args.steps,
        "tokens_per_step": args.seq * args.accum,
        "lr": args.lr,
        "before": before,
        "after": after,
        **{name: run[name] for name in ("eval_losses", "losses", "step_s", "peak_bytes", "dram_budget_bytes")},
        **{name: run[name] for name in ("training_state_bytes", "verdict", "parameters", "plan")},
    }
    shown = [
        f"{when}:\n\n```\n" + "\n---\n".join(each["samples"]) + "\n```"
        for when, each in (("Sampled before", before), ("Sampled after", after))
    ]
    return row, "\n\n".join(shown)


def _settings(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    return {
        **synthetic.settings(args.model, work / "run", clip=True, lr=args.lr, seed=args.seed),
        "data": str(work / "train"),
        "eval_data": str(work / "held-out"),
        "output": str(work / "out"),
        "seq_len": args.seq,
        "grad_accum": args.accum,
        "max_steps": args.steps,
        "schedule": "cosine",
        "warmup_steps": max(1, args.steps // 10),
        "device": args.device,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    before, after = row["before"]["losses"], row["after"]["losses"]
    own = [loss for _, loss in row["eval_losses"]]
    return [
        f"{row['steps']} x {row['tokens_per_step']}",
        number(before["held_out"], 4),
        number(after["held_out"], 4),
        number(math.exp(before["held_out"]), 1),
        number(math.exp(after["held_out"]), 1),
        number(own[0], 4),
        number(own[-1], 4),
        number(before.get("validation"), 4),
        number(after.get("validation"), 4),
        number(median(row["step_s"][1:])),
        f"{mib(row['peak_bytes'])} of {mib(row['dram_budget_bytes'])}",
        mib(row["training_state_bytes"]),
    ]


def _facts(args: argparse.Namespace, work: Path, sizes: dict[str, Any]) -> dict[str, str]:
    facts = machine_facts(work, args.seed, None)
    facts["model"] = args.model.name
    facts["text"] = f"{sizes['train'][0]} files, {sizes['train'][1]} characters to learn; " + (
        f"{sizes['held-out'][0]} files, {sizes['held-out'][1]} characters held out; from {', '.join(args.text)}"
    )
    facts["training"] = f"AdamW, lr {args.lr}, cosine, clipped at 1.0, {args.steps} steps of {args.seq} x {args.accum}"
    return facts


def _texts(roots: list[str]) -> Iterator[tuple[str, str]]:
    """(digest, text) of every document, each text once, in the order of the digests."""
    found: dict[str, str] = {}
    files = {path.resolve() for root in roots for path in Path(root).rglob("*") if path.is_file()}
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if path.suffix in (".pm", ".pl", ".pod"):
            text = "\n".join(block.group(0) for block in _POD_BLOCK.finditer(text))
        text = text[:_MOST_CHARACTERS]
        if len(text) >= _LEAST_CHARACTERS:
            found[hashlib.blake2b(text.encode(), digest_size=16).hexdigest()] = text
    yield from sorted(found.items())


def _write(texts: list[tuple[str, str]], work: Path, most_bytes: int) -> dict[str, tuple[int, int]]:
    """One file per document under `train` and `held-out`, and all that is held out in one; (files, characters) each."""
    sizes = {"train": (0, 0), "held-out": (0, 0)}
    held_out = []
    for index, (digest, text) in enumerate(texts):
        part = "held-out" if index % _HELD_OUT_ONE_IN == 0 else "train"
        files, characters = sizes[part]
        if sum(total for _, total in sizes.values()) + len(text) > most_bytes:
            break
        (work / part).mkdir(exist_ok=True)
        (work / part / f"{digest}.txt").write_text(text, encoding="utf-8")
        sizes[part] = (files + 1, characters + len(text))
        if part == "held-out":
            held_out.append(text)
    (work / "held-out.txt").write_text("\n\n".join(held_out), encoding="utf-8")
    return sizes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune_pretrained", description="See the module's text."
    )
    models = ROOT.parent / "shared" / "models"
    parser.add_argument("--model", type=Path, default=models / "relu-llama-7m")
    parser.add_argument("--validation", type=Path, default=models / "validation.txt")
    parser.add_argument(
        "--text", nargs="+", default=list(_POD_ROOTS), help="directories of text the model has not seen"
    )
    parser.add_argument("--bytes", type=lambda text: parse_bytes(text, field="--bytes"), default="3MiB")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--accum", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=200, help="of 512 tokens, at most, per text that is scored")
    parser.add_argument("--dram", default="smallest", help="a size, or `smallest` (and 16 MiB)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dir", help="where to work, on an SSD; default: here")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    args.model = args.model.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
