"""Hugging Face's attention masks under fake tensors: made as they are for real batches without padding or packing.

transformers looks at the values of `position_ids` to see whether sequences are packed; of fake tensors it cannot, and
makes a mask of S x S for every micro-batch, which a real run of whole sequences never has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def whole_sequences() -> Iterator[None]:
    """While open, every row of a batch counts as one sequence. Does nothing where transformers has no such look."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before: Any = getattr(masking_utils, name, None)
    if before is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)
