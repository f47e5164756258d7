"""Which requests a step of a vLLM server computes, as plain numbers on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a step: its queries are tokens [begin, end) of the batch, the last of `tokens` in all."""

    number: int  # in the batch
    begin: int
    end: int
    tokens: int

    @property
    def context(self) -> int:
        """Tokens that were in the pages before this step."""
        return self.tokens - (self.end - self.begin)


def rows_of(common: Any) -> list[Row]:
    """The rows of vLLM's CommonAttentionMetadata that have queries, in order.

    On a GPU the lengths are the host's, which vLLM promises to be exact while a prompt is computed; without them the
    device is asked, which waits for it.
    """
    lengths = common.seq_lens_cpu_upper_bound
    lengths = (common.seq_lens if lengths is None else lengths).tolist()
    return rows_between(common.query_start_loc_cpu.tolist(), lengths)


def rows_between(starts: list[int], lengths: list[int]) -> list[Row]:
    """The rows that have queries, of the starts of all (one more than rows) and their tokens in all."""
    spans = zip(starts, starts[1:], lengths, strict=False)
    return [Row(i, begin, end, tokens) for i, (begin, end, tokens) in enumerate(spans) if end > begin]
