"""Training data, ready to use: prepared once into a token file, then read back sequence by sequence."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import BadInput, StoreError
from memopt.jobs.data_sources import OnBytes, read_records, source_files
from memopt.jobs.packing import labels, pack, positions
from memopt.jobs.token_file import FORMAT, TokenFile, require_targets, write_token_file
from memopt.jobs.tokenizing import Encoder, checked_vocabulary, tokenizer_digest

if TYPE_CHECKING:
    import torch


def prepare(
    source: str,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    path: Path,
    on_bytes: OnBytes | None = None,
) -> TokenDataset:
    """Tokenise and pack `source` into `path` (its directory must exist), or reuse `path` when it is of the same data.

    `source` as in `data_sources.read_records`; `tokenizer` as `tokenizing.load_tokenizer` gives it; `vocab_size` is
    the model's. Memory does not grow with the data. Raises BadInput (file, line, remedy) or StoreError (disk), and
    leaves nothing half-written.
    """
    key = _key(source, tokenizer, seq_len)
    if (existing := _reusable(path, key)) is not None:
        return existing
    encoder = Encoder(tokenizer)
    pieces = checked_vocabulary(encoder.encode(read_records(source, on_bytes)), vocab_size)
    write_token_file(path, pack(pieces, seq_len, encoder.pad_id), seq_len, {"key": key, "vocab_size": vocab_size})
    file = TokenFile(path)
    try:
        require_targets(file, source)
    except BadInput:
        file.close()
        path.unlink()
        raise
    return TokenDataset(file)


def _reusable(path: Path, key: str | None) -> TokenDataset | None:
    if key is None or not path.exists():
        return None
    try:
        file = TokenFile(path)
    except StoreError:
        return None
    if file.header.get("key") == key:
        return TokenDataset(file)
    file.close()
    return None


def _key(source: str, tokenizer: Any, seq_len: int) -> str | None:
    """Changes with the files, the tokenizer or the length; None when the source cannot be looked at cheaply."""
    files = source_files(source)
    if files is None:
        return None
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    parts = [FORMAT, seq_len, tokenizer_digest(tokenizer), stats]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class TokenDataset:
    """Packed sequences of one length; what it reads stays in the file's pages."""

    def __init__(self, file: TokenFile) -> None:
        self._file = file

    @classmethod
    def open(cls, path: Path) -> TokenDataset:
        """An existing token file. Raises StoreError when it is not one."""
        return cls(TokenFile(path))

    def __len__(self) -> int:
        return len(self._file)

    @property
    def seq_len(self) -> int:
        """Tokens in a sequence."""
        return self._file.seq_len

    @property
    def content_hash(self) -> str:
        """Equal hashes are equal training data."""
        return self._file.content_hash

    @property
    def counts(self) -> dict[str, int]:
        """`sequences`, `tokens` (real ones), `target_tokens` (with a loss), `documents`, `padding`."""
        names = ("sequences", "tokens", "target_tokens", "documents", "padding")
        return {name: int(self._file.header[name]) for name in names}

    def micro_batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` (-100 where there is no loss, not shifted), `position_ids`; each (B, S) int64.

        Positions restart at every document, which is how transformers models (given no attention mask) know not to
        attend across documents.
        """
        import torch

        tokens, flags = self._file.read(indices)
        return {
            "input_ids": torch.from_numpy(tokens.astype(np.int64)),
            "labels": torch.from_numpy(labels(tokens, flags)),
            "position_ids": torch.from_numpy(positions(flags)),
        }

    def target_tokens(self, indices: Sequence[int]) -> int:
        """Tokens of these sequences that have a loss after the shift."""
        tokens, flags = self._file.read(indices)
        return int(np.count_nonzero(labels(tokens, flags)[:, 1:] >= 0))

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()


@functools.lru_cache(maxsize=1)
def _order(n_sequences: int, seed: int, epoch: int) -> NDArray[np.int32]:
    return np.random.default_rng([seed, epoch]).permutation(np.arange(n_sequences, dtype=np.int32))


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which sequences each optimizer step sees: a pure function of the step number, so a run resumes from that alone.

    Each epoch is shuffled anew; its last step may hold fewer micro-batches and its last micro-batch fewer sequences
    (as with Hugging Face's `dataloader_drop_last=False`). `seed=None` keeps the order of the file, for evaluation.
    """

    n_sequences: int
    batch_size: int = 1
    grad_accum: int = 1
    seed: int | None = 42
    epochs: float = 1.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_sequences", "batch_size", "grad_accum"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} = {getattr(self, name)}: give at least 1")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(self.n_sequences / (self.batch_size * self.grad_accum))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; `max_steps` overrides `epochs` both ways, as in Hugging Face's Trainer."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * self.steps_per_epoch))

    def indices(self, step: int) -> list[list[int]]:
        """The micro-batches of optimizer step `step` (0 is the first): lists of sequence numbers."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.batch_size * self.grad_accum
        last = min(first + self.batch_size * self.grad_accum, self.n_sequences)
        if self.seed is None:
            chosen = list(range(first, last))
        else:
            chosen = [int(each) for each in _order(self.n_sequences, self.seed, epoch)[first:last]]
        return [chosen[at : at + self.batch_size] for at in range(0, len(chosen), self.batch_size)]
