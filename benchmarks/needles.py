"""A small language model that has something to lose: it models text and finds facts far back in its context.

Starts from a small pretrained Llama (`--model`: its directory, with its tokenizer) and trains it on the standard
library's text with needles: sentences "The code of NAME is A B C." scattered over a window of text, and questions
"The code of NAME is" after it, each answered from the window. Names and codes are drawn anew from a word list for every
window, so that an answer can only come from the cache. Training ends when the model answers `--target` of the
questions of held-out windows right (all three words, greedy), or when `--minutes` of CPU time are over. The result is
a Hugging Face directory for benchmarks/think_quality.py.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import memopt
from benchmarks.harness import say

ANSWER = 3
_TEXT_BYTES = 2_000_000
_HELD_OUT = 50_000
_ANSWER_WEIGHT = 8.0
"""How much a token of an answer counts beside a token of text; answers are one token in twenty."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Token ids of one window; `asked` are the positions of each answer's first token."""

    ids: list[int]
    asked: list[int]


class Needles:
    """Windows of text with needles in it, drawn from a seed."""

    def __init__(self, tokenizer: Any, text: list[int], *, seed: int) -> None:
        self._random = random.Random(seed)
        self._text = text
        encode = lambda words: tokenizer.encode(words, add_special_tokens=False)  # noqa: E731
        vocabulary = (tokenizer.decode([i]) for i in range(len(tokenizer)))
        self._words = [
            ids[0]
            for word in vocabulary
            if word.startswith(" ") and word[1:].isalpha() and word[1:].islower() and len(word) > 4
            for ids in [encode(word)]
            if len(ids) == 1
        ]
        self._before, self._between, self._after = encode("\nThe code of"), encode(" is"), encode(".\n")
        self.question_tokens = len(self._before) + 1 + len(self._between)

    def window(self, length: int, needles: int, questions: int) -> Window:
        """A window of `length` tokens: text with `needles` facts, then `questions` about them."""
        words = self._random.sample(self._words, needles * (ANSWER + 1))
        facts = [(words[i], words[i + 1 : i + 1 + ANSWER]) for i in range(0, len(words), ANSWER + 1)]
        sentence = self.question_tokens + ANSWER + len(self._after)
        room = length - (needles + questions) * sentence
        assert room > 0, f"{length} tokens do not hold {needles} needles and {questions} questions"
        start = self._random.randrange(len(self._text) - room)
        text = self._text[start : start + room]
        cuts = sorted(self._random.randrange(room) for _ in facts)
        ids: list[int] = []
        for fact, begin, end in zip([None, *facts], [0, *cuts], [*cuts, room], strict=True):
            ids += self._sentence(*fact) if fact else []
            ids += text[begin:end]
        asked = []
        for name, answer in self._random.sample(facts, questions):
            asked.append(len(ids) + self.question_tokens)
            ids += self._sentence(name, answer)
        return Window(ids=ids, asked=asked)

    def repetition(self, length: int) -> Window:
        """Random words that repeat with a random period; `asked` are the positions that can be known."""
        period = self._random.randrange(8, length // 2)
        words = self._random.choices(self._words, k=period)
        return Window(ids=[words[i % period] for i in range(length)], asked=list(range(period + 1, length)))

    def _sentence(self, name: int, answer: list[int]) -> list[int]:
        return [*self._before, name, *self._between, *answer, *self._after]


@functools.cache
def library_text(tokenizer: Any, nbytes: int = _TEXT_BYTES) -> list[int]:
    """Token ids of the standard library's sources, the same files on every machine with the same Python."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:nbytes]
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def accuracy(model: Any, needles: Needles, *, length: int, windows: int, needle_count: int = 6) -> float:
    """Share of questions answered right, all tokens of the answer by greedy choice, one question a window."""
    right = 0
    with torch.inference_mode():
        for _ in range(windows):
            window = needles.window(length, needle_count, 1)
            at = window.asked[0]
            # teacher-forced: a greedy answer is right exactly when every token is the argmax after the right ones
            guess = model(torch.tensor([window.ids[: at + ANSWER - 1]])).logits[0, at - 1 :].argmax(-1).tolist()
            right += guess == window.ids[at : at + ANSWER]
    return right / windows


def train(model: Any, needles: Needles, test: Needles, args: argparse.Namespace) -> float:
    """Train in place; the last held-out accuracy."""
    optimizer = memopt.build_optimizer(model, args.optimizer, lr=args.lr, weight_decay=0.05)
    begun, got, step = time.process_time(), 0.0, 0
    for step, (ids, weights) in enumerate(_batches(needles, args.batch, args.copying)):
        past = (time.process_time() - begun) / (60 * args.minutes)
        if past >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20, max(0.1, 2.0 * (1.0 - past)))
        logits = model(ids).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 26 == 25:
            of_answers = losses[weights[:, 1:].flatten() > 1].mean().item()
            of_text = losses[weights[:, 1:].flatten() == 1].mean().item()
            spent, length = time.process_time() - begun, ids.shape[1]
            say(f"step {step + 1}, {spent:.0f} s, windows of {length}: loss {of_answers:.3f} asked, {of_text:.3f} else")
        if step % 100 == 99 and step > args.copying:
            got = accuracy(model, test, length=args.length, windows=32)
            say(f"step {step + 1}: {got:.0%} of held-out needles at {args.length} tokens")
            model.save_pretrained(args.out)
            if got >= args.target:
                break
    return accuracy(model, test, length=args.length, windows=100)


def _batches(needles: Needles, tokens: int, copying_steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # first lists of random words that repeat: what is learned there (look for the same word, copy what followed) is
    # what finding a needle needs, and is supervised at nearly every token; then needles, from near to far
    step = 0
    while True:
        copying = step < copying_steps or step % 4 == 0
        length = 64 if copying else (128, 256, 512)[step % 3]
        rows = tokens // length
        if copying:
            windows = [needles.repetition(length) for _ in range(rows)]
        else:
            windows = [needles.window(length, length // 32, length // 64) for _ in range(rows)]
        weights = torch.ones(rows, length)
        for row, window in enumerate(windows):
            for at in window.asked:
                weights[row, at : at + (1 if copying else ANSWER)] = _ANSWER_WEIGHT
        yield torch.tensor([window.ids for window in windows]), weights
        step += 1


def main() -> int:
    """Train and write the model; 1 when the target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a small pretrained Llama")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0, help="CPU time; a busy machine takes longer")
    parser.add_argument("--copying", type=int, default=300, help="steps on repeated words before the first needle")
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", default="muon", help="a preset of memopt.build_optimizer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    text = library_text(tokenizer)
    tokenizer.save_pretrained(args.out)
    say(f"{len(text)} tokens of text, {model.num_parameters() / 1e6:.1f}M parameters")
    got = train(
        model,
        Needles(tokenizer, text[:-_HELD_OUT], seed=args.seed),
        Needles(tokenizer, text[-_HELD_OUT:], seed=args.seed + 1000),
        args,
    )
    model.save_pretrained(args.out)
    print(f"{got:.0%} of 100 held-out needles found at {args.length} tokens; written to {args.out}")
    return 0 if got >= args.target else 1


if __name__ == "__main__":
    sys.exit(main())
