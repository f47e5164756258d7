"""Where bytes live (`Tier`) and what they are (`Category`)."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """A pool of memory with its own budget."""

    GPU = "gpu"
    DRAM = "dram"
    SSD = "ssd"


class Category(StrEnum):
    """What the bytes are. `RUNTIME` is interpreter, libraries and CUDA context; `OTHER` is measured minus charged."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    KV_CACHE = "kv_cache"
    BUFFERS = "buffers"
    RUNTIME = "runtime"
    OTHER = "other"
