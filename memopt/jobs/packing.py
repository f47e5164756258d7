"""Documents laid end to end and cut into sequences of one length (pure; numpy only)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOSS = 1
"""Flag of a token that is to be predicted."""
START = 2
"""Flag of the first token of a document."""
PAD = 4
"""Flag of filling at the end of the last sequence."""
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Piece:
    """Tokens of a document, or of the next part of one: `first` says whether a document begins here."""

    ids: NDArray[np.int32]  # (N,)
    loss: NDArray[np.bool_]  # (N,) which of them are to be predicted
    first: bool = True

    @staticmethod
    def of(ids: Any, loss: Any, first: bool = True) -> Piece:
        """From anything array-like; `loss` may be one bool for all."""
        tokens = np.asarray(ids, dtype=np.int32)
        return Piece(tokens, np.broadcast_to(np.asarray(loss, dtype=np.bool_), tokens.shape), first)


Sequence = tuple[NDArray[np.int32], NDArray[np.uint8]]


def pack(pieces: Iterable[Piece], seq_len: int, pad_id: int) -> Iterator[Sequence]:
    """Tokens and flags of consecutive sequences, each (seq_len,); every token of every piece appears once, in order.

    The first token of a document has no loss: it would be predicted from another document. The last sequence is
    filled up with `pad_id`, as a document of its own without loss.
    """
    tokens = np.empty(seq_len, np.int32)
    flags = np.empty(seq_len, np.uint8)
    filled = 0
    begins = True
    for piece in pieces:
        marks = piece.loss.astype(np.uint8) * np.uint8(LOSS)
        begins = begins or piece.first
        if begins and len(marks):
            marks[0] = START
            begins = False
        at = 0
        while at < len(marks):
            n = min(len(marks) - at, seq_len - filled)
            tokens[filled : filled + n] = piece.ids[at : at + n]
            flags[filled : filled + n] = marks[at : at + n]
            filled, at = filled + n, at + n
            if filled == seq_len:
                yield tokens.copy(), flags.copy()
                filled = 0
    if filled:
        tokens[filled:] = pad_id
        flags[filled:] = PAD
        flags[filled] |= START
        yield tokens, flags


def positions(flags: NDArray[np.uint8]) -> NDArray[np.int64]:  # (..., S) -> (..., S)
    """Position of each token in its document; a document continued from the sequence before restarts at 0."""
    index = np.arange(flags.shape[-1], dtype=np.int64)
    starts = np.where(flags & START, index, 0)
    return index - np.maximum.accumulate(starts, axis=-1)


def labels(tokens: NDArray[np.int32], flags: NDArray[np.uint8]) -> NDArray[np.int64]:  # (..., S) -> (..., S)
    """The token itself where it is to be predicted, -100 elsewhere; not shifted (Hugging Face models shift inside)."""
    return np.where(flags & LOSS, tokens, IGNORED_LABEL).astype(np.int64)
