"""Records into tokens with the model's own tokenizer: what is learnt, what is only read, and where documents end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from memopt.errors import BadInput
from memopt.jobs.chat import encode_chat
from memopt.jobs.data_sources import PIECE_CHARS, Chat, Pair, Record, Text
from memopt.jobs.packing import Piece

# Characters handed to the tokenizer at once: enough to use its threads, a few MiB of its bookkeeping at most.
_BATCH_CHARS = 16 * PIECE_CHARS


def load_tokenizer(model: str) -> Any:
    """The fast tokenizer of a model directory or hub id. BadInput when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True, trust_remote_code=False)
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"model {model!r}: no usable tokenizer ({first_line}); give a directory that holds tokenizer.json beside "
            "config.json, or a hub id"
        ) from None
    if not tokenizer.is_fast:
        raise BadInput(
            f"model {model!r}: its tokenizer is not backed by the tokenizers library; convert it to tokenizer.json "
            "(load it with transformers and save_pretrained)"
        )
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of what decides a tokenizer's output."""
    digest = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16)
    digest.update(json.dumps([tokenizer.eos_token_id, tokenizer.chat_template]).encode())
    return digest.hexdigest()


class Encoder:
    """Turns records into packable pieces.

    A document gets what the tokenizer itself puts before a text (Llama's BOS), and the end-of-sequence token after it
    where the tokenizer has one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        plain = self._ids(["a"])[0]
        special: list[int] = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
        self._before = special[:at]

    @property
    def pad_id(self) -> int:
        """A token to fill with; it is never learnt nor seen by real tokens."""
        given = self._tokenizer.pad_token_id
        return int(given) if given is not None else (self._eos or [0])[0]

    def encode(self, records: Iterable[Record]) -> Iterator[Piece]:
        """Pieces of all records, in order. Empty texts give nothing. Raises BadInput that names file and line."""
        waiting: list[Text] = []
        chars = 0
        for record in records:
            if isinstance(record, Text):
                waiting.append(record)
                chars += len(record.text)
                if chars < _BATCH_CHARS:
                    continue
            yield from self._texts(waiting)
            waiting, chars = [], 0
            if isinstance(record, Pair):
                yield self._pair(record)
            elif isinstance(record, Chat):
                yield self._chat(record)
        yield from self._texts(waiting)

    def _texts(self, records: list[Text]) -> Iterator[Piece]:
        records = [record for record in records if record.text]
        if not records:
            return
        for record, ids in zip(records, self._ids([record.text for record in records]), strict=True):
            before = self._before if record.first else []
            after = self._eos if record.last else []
            yield Piece.of([*before, *ids, *after], True, record.first)

    def _pair(self, record: Pair) -> Piece:
        prompt, joint = self._ids([record.prompt, record.prompt + record.completion])
        # The prompt has the tokens it will have when it stands alone at inference. The completion keeps the tokens it
        # has behind the prompt, unless the tokenizer would merge across the seam.
        seam_holds = joint[: len(prompt)] == prompt
        completion = joint[len(prompt) :] if seam_holds else self._ids([record.completion])[0]
        before = [*self._before, *prompt]
        after = [*completion, *self._eos]
        return Piece.of([*before, *after], [False] * len(before) + [True] * len(after))

    def _chat(self, record: Chat) -> Piece:
        ids, loss = encode_chat(self._tokenizer, record)
        # A template that closes its turns with the end token (perhaps and a line end) needs no other.
        if self._eos and self._eos[0] not in ids[-2:]:
            ids, loss = [*ids, *self._eos], [*loss, loss[-1]]
        return Piece.of(ids, loss)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # straight to the Rust side: the same tokens without offsets and masks, in two thirds of the time
        return [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def checked_vocabulary(pieces: Iterable[Piece], vocab_size: int) -> Iterator[Piece]:
    """The same pieces; BadInput at the first token the model has no embedding for."""
    for piece in pieces:
        if len(piece.ids) and not 0 <= int(piece.ids.max()) < vocab_size:
            raise BadInput(
                f"the tokenizer gives token {int(piece.ids.max())}, but the model's vocabulary has {vocab_size}; "
                "use the tokenizer that belongs to the model, or resize the model's embeddings first"
            )
        yield piece
