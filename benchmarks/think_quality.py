"""What pruned keys cost: perplexity and needles found, against the share of channels kept, beside two controls.

Choices of channels, all through ThinKCache with the same count per KV head: `query-driven` (ThinKCache's own, each
prompt its own: memopt.kv.joint), `published` (ThinK's score of the last 32 queries, score="think"), `static` (chosen as
the first, but once, from library text that is not evaluated on), and the controls `random` (a new set per
layer, head and seed) and `magnitude` (largest mean square of the keys, the queries not asked).

Perplexity: 128 tokens of prompt, then 64 that are scored, in steps of 32, with recent=0 and fold="prune": every key is
pruned, also the newest, so that nothing hides the choice. (The small models here hardly use what is farther away than
the default 32 whole tokens; the first line says what a prompt is worth to them at all.)
Needles (benchmarks/needles.py trains such a model): facts in 448 tokens of text, default settings; the question comes
after the pruning, so that the choice could not know it, and the answer (three words, greedy) must come out of the
pruned cache. "Question seen": the prompt ends with the question but for its last token, as in the usual needle test,
so that the choice knows what is asked. The windows of a seed are the same for all, so differences are paired: the
spread of the difference to all channels is over seeds, and the last column is the query-driven choice's lead over the
row's choice, positive where it is better, with its 95 % interval over windows (in log-perplexity or share found).

Channels are rounded up to a multiple of 8: at head dimension 64, 0.4 would keep the same 32 as 0.5, so 0.375 and 0.25
stand in for it. Exits 1 unless the query-driven choice beats both controls at 0.5 and below, in every measure; a level
at which no choice finds one needle in six says nothing about choices, and is named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import Table, machine_facts, number, say
from benchmarks.needles import ANSWER, Needles, library_text

COLUMNS = (
    "model",
    "measure",
    "choice",
    "keep",
    "channels of 64",
    "mean",
    "against all channels",
    "its spread",
    "query-driven leads by",
)
KEEPS = (0.8, 0.6, 0.5, 0.375, 0.25)
PERPLEXITY, UNSEEN, SEEN = "perplexity", "needles found", "needles found, question seen"
CHOICES = ("query-driven", "published", "static", "random", "magnitude")
_PROMPT, _SCORED, _STEP, _BATCH = 128, 64, 32, 8
_NEEDLE_TOKENS, _NEEDLES = 448, 6
_CALIBRATION = 24
_FLOOR = 1 / 6
_HELD_OUT = 50_000
"""Tokens at the end of the library text that neither needles.py trains on nor the calibration sees."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and what is asked of it."""

    name: str
    model: Any
    tokenizer: Any
    scores: dict[int, Tensor]  # static channel scores by layer
    identity: Any
    text: list[int]  # for perplexity
    needles: bool


def main() -> int:
    """Measure; 1 where a control is not beaten."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    given = [(args.model, False), (args.needle_model, True)]
    given = [(path, needles) for path, needles in given if path is not None and (path / "config.json").is_file()]
    if not given:
        say("skipped: no model; name one with --model or --needle-model")
        return 0
    table = Table("think_quality", COLUMNS, machine_facts(Path.cwd(), 0, None), record=args.record)
    good = True
    for path, needles in given:
        subject = _subject(path, args.text, needles)
        good &= _measure(table, subject, PERPLEXITY, args)
        if needles:
            good &= _measure(table, subject, UNSEEN, args)
            good &= _measure(table, subject, SEEN, args)
    return 0 if good else 1


def _measure(table: Table, subject: Subject, measure: str, args: argparse.Namespace) -> bool:
    if args.only not in (None, measure):
        return True
    results: dict[tuple[str, float], list[float]] = {}
    singles: dict[tuple[str, float], Tensor] = {}  # one value a window, over all seeds
    if measure == PERPLEXITY:
        alone = [
            _mean(measure, _values(subject, measure, "no prompt", 1.0, seed, args.windows))
            for seed in range(args.seeds)
        ]
        table.note(f"{subject.name}: perplexity of the scored tokens without their prompt {statistics.mean(alone):.3f}")
    for keep in (1.0, *args.keeps):
        for choice in CHOICES if keep < 1.0 else ("all channels",):
            windows = [_values(subject, measure, choice, keep, seed, args.windows) for seed in range(args.seeds)]
            values = [_mean(measure, each) for each in windows]
            results[choice, keep], singles[choice, keep] = values, torch.cat(windows)
            lead, width = _lead(measure, singles, keep, choice)
            against = [value - full for value, full in zip(values, results["all channels", 1.0], strict=True)]
            row = {
                "model": subject.name,
                "measure": measure,
                "choice": choice,
                "keep": keep,
                "values": values,
                "mean": statistics.mean(values),
                "against": statistics.mean(against),
                "spread": statistics.stdev(against) if len(against) > 1 else 0.0,
            }
            count = 64 if keep == 1.0 else min(64, -(-math.ceil(keep * 64 - 1e-9) // 8) * 8)
            cells = (subject.name, measure, choice, f"{keep:g}", str(count), number(row["mean"], 3))
            row |= {"lead": lead, "interval": width}
            said = "" if choice in ("query-driven", "all channels") else f"{lead:+.3f} ± {width:.3f}"
            table.add(row, (*cells, number(row["against"], 3), number(row["spread"], 3), said))
    told = [keep for keep in args.keeps if keep <= 0.5]
    if measure != PERPLEXITY:
        silent = [keep for keep in told if all(singles[choice, keep].mean() < _FLOOR for choice in CHOICES)]
        told = [keep for keep in told if keep not in silent]
        for keep in silent:
            table.note(f"{subject.name}, {measure}: nothing is found at keep {keep:g}, whoever chooses; left out.")
    beaten = bool(told) and all(
        _lead(measure, singles, keep, control)[0] > 0.0 for keep in told for control in ("random", "magnitude")
    )
    table.note(
        f"{subject.name}, {measure}: the query-driven choice {'beats' if beaten else 'DOES NOT BEAT'} both controls."
    )
    return beaten


def _mean(measure: str, values: Tensor) -> float:
    mean = values.mean().item()
    return math.exp(mean) if measure == PERPLEXITY else mean


def _lead(measure: str, singles: dict[tuple[str, float], Tensor], keep: float, other: str) -> tuple[float, float]:
    """How much better the query-driven choice is than another on the same windows, and half its 95 % interval."""
    if ("query-driven", keep) not in singles:
        return 0.0, 0.0
    lead = (singles["query-driven", keep] - singles[other, keep]) * (-1.0 if measure == PERPLEXITY else 1.0)
    return lead.mean().item(), 1.96 * lead.std().item() / math.sqrt(len(lead))


def _values(subject: Subject, measure: str, choice: str, keep: float, seed: int, windows: int) -> Tensor:
    """Of each window: the mean loss of its scored tokens, or 1 where the needle was found and 0 where not."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(windows // _BATCH):
        ids, scored = (_text if measure == PERPLEXITY else _facts)(subject, generator)
        prompt = ids.shape[1] - scored if measure == PERPLEXITY else scored
        if measure == SEEN:
            prompt = ids.shape[1] - ANSWER - 1
        if choice == "no prompt":
            ids, prompt = ids[:, prompt - 1 :], 1
        strict = {"recent": 0, "fold": "prune"} if measure == PERPLEXITY else {}
        with _cache(subject, choice, keep, seed, strict) as cache, torch.inference_mode():
            subject.model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
            steps = ids[:, prompt:].split(_STEP, 1)
            logits = torch.cat([subject.model(step, past_key_values=cache).logits for step in steps], 1)[:, :-1].float()
        target = ids[:, prompt + 1 :]
        if measure == PERPLEXITY:
            values.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1))
        else:
            values.append((logits.argmax(-1) == target)[:, -ANSWER:].all(1).float())
    return torch.cat(values)


def _text(subject: Subject, generator: torch.Generator) -> tuple[Tensor, int]:
    length = _PROMPT + _SCORED
    starts = torch.randint(len(subject.text) - length, (_BATCH,), generator=generator).tolist()
    return torch.tensor([subject.text[start : start + length] for start in starts]), _SCORED


def _facts(subject: Subject, generator: torch.Generator) -> tuple[Tensor, int]:
    """Windows cut after the answer, and where the question begins: the prompt ends before it."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    needles = Needles(subject.tokenizer, library_text(subject.tokenizer)[-_HELD_OUT:], seed=seed)
    windows = [needles.window(_NEEDLE_TOKENS, _NEEDLES, 1) for _ in range(_BATCH)]
    asked = windows[0].asked[0]
    assert all(window.asked == [asked] for window in windows)
    question = asked - needles.question_tokens
    return torch.tensor([window.ids[: asked + ANSWER] for window in windows]), question


@contextlib.contextmanager
def _cache(subject: Subject, choice: str, keep: float, seed: int, options: dict[str, Any]) -> Iterator[Any]:
    import memopt
    from memopt.kv import state
    from memopt.kv.channel_file import ChannelSets, save_channels
    from memopt.kv.channels import choose, energy, kept_count

    with contextlib.ExitStack() as stack:
        options = {"key_keep": keep, **options}
        if choice in ("static", "random"):
            count = kept_count(subject.identity.head_dim, keep)
            generator = torch.Generator().manual_seed(1000 + seed)
            drawn = {k: torch.rand(v.shape, generator=generator) for k, v in subject.scores.items()}
            scores = subject.scores if choice == "static" else drawn
            keys = {layer: choose(each, count) for layer, each in scores.items()}
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "keys.safetensors"
            save_channels(path, ChannelSets(model=subject.identity, keep=keep, keys=keys))
            options["channels"] = path
        elif choice == "published":
            options["score"] = "think"
        elif choice == "magnitude":
            options["score"] = "think"  # whose scores are replaced

            def norms(query: Tensor, key: Tensor, *, query_real: Any = None, key_real: Any = None) -> Tensor:
                return energy(key, key_real)

            stack.enter_context(mock.patch.object(state, "channel_scores", norms))
        yield stack.enter_context(memopt.ThinKCache(subject.model, **options))


def _subject(path: Path, text: Path, needles: bool) -> Subject:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memopt.patches.hf_calibrate import score_channels

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = library_text(tokenizer)[:-_HELD_OUT]
    generator = torch.Generator().manual_seed(7)
    starts = torch.randint(len(ids) - 512, (_CALIBRATION,), generator=generator).tolist()
    identity, scores, _ = score_channels(model, [torch.tensor(ids[start : start + 512]) for start in starts])
    held_out = library_text(tokenizer)[-_HELD_OUT:]
    if not needles:
        held_out = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    name = path.resolve().name
    return Subject(
        name=name, model=model, tokenizer=tokenizer, scores=scores, identity=identity, text=held_out, needles=needles
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a small pretrained Llama, for perplexity")
    parser.add_argument("--needle-model", type=Path, help="directory that benchmarks.needles wrote")
    parser.add_argument(
        "--text", type=Path, default=Path("validation.txt"), help="text that --model was not trained on"
    )
    parser.add_argument("--windows", type=int, default=16, help="of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS, help="shares of channels to keep")
    parser.add_argument("--only", choices=(PERPLEXITY, UNSEEN, SEEN), help="this measure alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
