"""Bytes of temporaries of an update, from policies and shapes alone.

The numbers count float32 tensors that are alive together in memopt.optim.updates and what it calls, and the workspace
of LAPACK's eigensolver (ssyevd: 2 n^2); what BLAS packs is not counted. tests/test_matrix_rule.py follows the storages.
"""

from __future__ import annotations

from math import prod

import torch

from memopt.optim import codecs, native, newton_schulz, projection
from memopt.optim.basis import Side
from memopt.optim.codecs import Codec
from memopt.optim.element import CHUNK
from memopt.optim.parts import Part
from memopt.optim.presets import Policy

_CODING_BYTES = 16
"""Per element, of encoding a state in 8 bits (`codecs.encode_`) and of what is encoded."""
_PLAIN_BYTES = 40
"""Per element of a piece, of the plain path of `element.step_`: decoded states, direction, coding."""
_GRAMS = 5
"""Small Gram matrices alive in `basis`: it, its eigenvectors, LAPACK's workspace, and what is cut out of them."""


def part_bytes(policy: Policy, part: Part, shape: tuple[int, ...]) -> int:
    """Of one step on a part of `shape`: (n,), (m, n) or (B, m, n)."""
    copies = 8 * prod(shape) if _is_copied(part, shape) else 0
    if policy.projection is not None:
        return copies + _low_rank_bytes(policy, shape)
    return copies + (_muon_bytes(policy, shape) if policy.rule == "muon" else _element_bytes(policy, shape))


def _is_copied(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether weights and gradient of a part are no contiguous piece of the parameter (items.matrix_of)."""
    pieces = part.groups * (shape[0] if len(shape) == 3 else 1)
    return part.transposed or (part.length is not None and pieces > 1)


def _element_bytes(policy: Policy, shape: tuple[int, ...]) -> int:
    if policy.rule == "adamw" and policy.codec == Codec.FP32:
        return 0  # torch's fused kernel
    if policy.codec == Codec.INT8 and codecs.storable(policy.codec, shape) == Codec.INT8 and native.available():
        return 0
    return _PLAIN_BYTES * min(prod(shape), CHUNK)


def _muon_bytes(policy: Policy, shape: tuple[int, ...]) -> int:
    update = 4 * prod(shape)
    coded = codecs.storable(policy.codec, shape) != Codec.FP32
    buffer = 4 * prod(shape) if coded else 0
    coding = _CODING_BYTES * prod(shape) if coded else 0
    return update + buffer + max(coding, _newton_schulz_bytes(policy, shape))


def _newton_schulz_bytes(policy: Policy, shape: tuple[int, ...]) -> int:
    return prod(shape[:-2]) * newton_schulz.scratch_bytes(*shape[-2:], dtype=policy.ns_dtype or torch.float32)


def _low_rank_bytes(policy: Policy, shape: tuple[int, ...]) -> int:
    config = policy.projection
    assert config is not None
    *batch, m, n = shape
    small = (*batch, *projection.shape_of(config, m, n))
    low = 4 * prod(small)
    side = projection.side_of(config, m, n)
    kept = (0 if side is Side.RIGHT else m) + (0 if side is Side.LEFT else n)
    bases = 4 * prod(batch) * config.rank * kept
    # old and new bases, the latter before and after signs are fixed; one matrix of a batch after the other
    refresh = 5 * bases + 4 * _GRAMS * min(m, n) ** 2 + (12 * m * n if config.basis == "svd" else 0)
    coding = 0 if codecs.storable(policy.codec, small) == Codec.FP32 else 5 * low + _CODING_BYTES * prod(small)
    if policy.rule == "muon":
        step = max(_newton_schulz_bytes(policy, small), coding)
    else:
        step = max(_element_bytes(policy, small), coding)
    turn = 6 * low + coding if config.rotate else 0
    rest = 12 * prod(shape) if config.residual is not None else 0
    return max(refresh, 2 * bases + 4 * low + max(step, turn) + rest)
