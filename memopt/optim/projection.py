"""GaLore (Zhao et al. 2024, ICML): an update rule works on a gradient projected to a few directions, R = P(G).

The weights follow `w <- (1 - lr * wd) * w - lr * scale * P^-1(d(R))`, so the states of the rule have the size of R:

| side  | R           | shape of R for G (m, n) | P^-1(d)     | state here   |
|---|---|---|---|---|
| left  | U^T G       | (r, n)                  | U d         | U            |
| right | G V         | (m, r)                  | d V^T       | V            |
| full  | U^T G V     | (r, r)                  | U d V^T     | U and V      |

The state of a matrix (or of a batch of them) is a mapping of plain tensors and numbers: "left" and "right", the bases
with a vector per row, (..., r, m) and (..., r, n), and "left_scale", "right_scale" where they are kept as int8;
"next_refresh", and "gap" where that adapts; "residual_norm" (...) with Fira. Moments belong to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from memopt.errors import BadInput
from memopt.optim import codecs
from memopt.optim.basis import Bases, Method, Side, bases_of
from memopt.optim.codecs import Codec

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
BasisDtype = Literal["float32", "bfloat16", "int8"]

SIMILAR = 0.4
"""Successive subspaces this alike double the gap (Zhang et al. 2024, Q-GaLore, section 3.2)."""
MAX_GAP_FACTOR = 16
"""The adaptive gap ends at this many times `update_proj_gap`: four doublings. Ours; the paper names no end."""
GAMMA = 1.01
"""How much Fira's residual may grow in a step (Chen et al. 2024, Fira, section 4.3)."""
_CODECS = {"float32": Codec.FP32, "bfloat16": Codec.BF16, "int8": Codec.INT8_LINEAR}


@dataclass(frozen=True, kw_only=True)
class GaLore:
    """What a projection is. The first four names and their defaults are those of galore-torch and Hugging Face."""

    rank: int = 128
    """Directions that are kept; from min(m, n) on a matrix is trained at full rank (see `fits`)."""
    update_proj_gap: int = 200
    """Steps between two looks for the subspace."""
    scale: float = 0.25
    """Factor of the update; alpha in the paper."""
    proj_type: ProjType = "std"
    """"std" projects the shorter side away (state max(m, n) * r), "reverse_std" the longer one; "left", "right" and
    "full" are the same for all shapes."""
    basis: Method = "gram"
    rotate: bool = True
    """Express the moments in the new subspace when it changes; False leaves them, as the original does."""
    adaptive: bool = False
    """Double the gap while the subspace hardly changes (Q-GaLore), return to `update_proj_gap` when it does."""
    residual: Literal["fira"] | None = None
    """"fira" adds what the projection leaves out, scaled as the rule scales what it keeps."""
    basis_dtype: BasisDtype = "float32"
    seed: int = 0
    """Of the draws of basis="random"."""

    def __post_init__(self) -> None:
        for name in ("rank", "update_proj_gap", "seed"):
            _whole_number(name, getattr(self, name), at_least=0 if name == "seed" else 1)
        if not isinstance(self.scale, (int, float)) or not 0 < self.scale < math.inf:
            raise BadInput(
                f"scale: {self.scale!r} is not a positive number; use 0.25 to pre-train, 1 to 4 to fine-tune"
            )
        _choice("proj_type", self.proj_type, get_args(ProjType))
        _choice("basis", self.basis, get_args(Method))
        _choice("basis_dtype", self.basis_dtype, get_args(BasisDtype))
        _choice("residual", self.residual, (None, "fira"))


def _whole_number(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise BadInput(f"{name}: {value!r} is not a whole number of {at_least} or more")


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise BadInput(f"{name}: {value!r} is unknown; choose from {', '.join(map(str, choices))}")


ORIGINAL = GaLore(basis="svd", rotate=False)
"""What galore-torch does; `dataclasses.replace` sets the rest."""


@dataclass(frozen=True)
class Rotation:
    """From coordinates in the old basis to those in the new one: new^T old, (..., r, r), per side that is projected."""

    left: torch.Tensor | None
    right: torch.Tensor | None


State = MutableMapping[str, Any]


def fits(config: GaLore, m: int, n: int) -> str | None:
    """Why a matrix (m, n) is better trained at full rank, as a sentence; None if the projection has a use."""
    if config.rank < min(m, n):
        return None
    return f"rank {config.rank} is not below the shorter side of {m} x {n}: full rank, no projection"


def side_of(config: GaLore, m: int, n: int) -> Side:
    """Which side of a matrix (m, n) is projected."""
    if config.proj_type in ("left", "right", "full"):
        return Side(config.proj_type)
    return Side.RIGHT if (m >= n) == (config.proj_type == "std") else Side.LEFT


def shape_of(config: GaLore, m: int, n: int) -> tuple[int, int]:
    """Shape of the projected gradient, and so of each state of the rule, for a matrix (m, n)."""
    side = side_of(config, m, n)
    return (m if side is Side.RIGHT else config.rank, n if side is Side.LEFT else config.rank)


def low_rank_shape(config: GaLore, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the projected gradients of matrices of `shape`, (..., m, n)."""
    return (*shape[:-2], *shape_of(config, *shape[-2:]))


def state_shapes(
    config: GaLore, m: int, n: int, *, batch: tuple[int, ...] = ()
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of the state of matrices (*batch, m, n). Allocates nothing."""
    made: dict[str, Any] = {}
    _allocate_(config, made, m, n, batch, torch.device("meta"))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}


def _allocate_(config: GaLore, state: State, m: int, n: int, batch: tuple[int, ...], device: torch.device) -> None:
    """Add the tensors of the state that are not there."""
    side = side_of(config, m, n)
    for name, unused, size in (("left", Side.RIGHT, m), ("right", Side.LEFT, n)):
        if side is unused or name in state:
            continue
        shape = (*batch, config.rank, size)
        values, scales = codecs.allocate(codecs.storable(_CODECS[config.basis_dtype], shape), shape, device=device)
        state[name] = values
        if scales is not None:
            state[name + "_scale"] = scales
    if config.residual is not None and "residual_norm" not in state:
        state["residual_norm"] = torch.zeros(batch, dtype=torch.float32, device=device)


def refresh_(
    config: GaLore,
    state: State,
    grad: torch.Tensor,  # (..., m, n) float32
    step: int,
    seed_key: int = 0,
) -> Rotation | None:
    """Look for the subspace anew where `step` (from 1) is due: the first time, and then every gap.

    Returns how the rule's states must be turned before they are used again (`rotate_first`, `rotate_second`); None if
    nothing changed, there is nothing to turn yet, or `rotate` is off. A gradient of zeros has no subspace: the old one
    stays and the next step looks again. `seed_key` names the matrix for basis="random".

    Raises BadInput for a gradient with a NaN or an infinity, the state untouched.
    """
    *batch, m, n = grad.shape
    first = "next_refresh" not in state
    if not first and step < state["next_refresh"]:
        return None
    blank = not bool(grad.any())
    if blank and not first:
        state["next_refresh"] = step + 1
        return None
    old = Bases(None, None) if first else _bases(state)
    new = bases_of(
        grad,
        side=side_of(config, m, n),
        rank=config.rank,
        method=config.basis,
        previous=old,
        seed=_seed(config.seed, seed_key, step),
    )
    _allocate_(config, state, m, n, tuple(batch), grad.device)
    for name, vectors in zip(("left", "right"), new, strict=True):
        if vectors is not None:
            _keep_(state, name, vectors.mT)
    turn = None if first else _turn(_bases(state), old)
    _plan_next_(config, state, step, blank=blank, turn=turn, shape=(m, n))
    return turn if config.rotate else None


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence([part & (2**64 - 1) for part in parts]).generate_state(1, np.uint64)[0] >> 1)


def _keep_(state: State, name: str, rows: torch.Tensor) -> None:
    codecs.encode_(_codec_of(state, name), rows, state[name], state.get(name + "_scale"), signed=True)


def _rows(state: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """A basis, a float32 vector per row: the state itself where it is float32."""
    values = state.get(name)
    if values is None or values.dtype == torch.float32:
        return values
    return codecs.decode(_codec_of(state, name), values, state.get(name + "_scale"), signed=True)


def _codec_of(state: Mapping[str, Any], name: str) -> Codec:
    dtype = state[name].dtype
    return {torch.float32: Codec.FP32, torch.bfloat16: Codec.BF16}.get(dtype, Codec.INT8_LINEAR)


def _bases(state: Mapping[str, Any]) -> Bases:
    """Copies of both bases, as columns."""
    left, right = (_rows(state, name) for name in ("left", "right"))
    return Bases(*(None if rows is None else rows.clone().mT for rows in (left, right)))


def _turn(new: Bases, old: Bases) -> Rotation:
    left, right = (
        None if after is None or before is None else after.mT @ before for after, before in zip(new, old, strict=True)
    )
    return Rotation(left, right)


def _plan_next_(
    config: GaLore, state: State, step: int, *, blank: bool, turn: Rotation | None, shape: tuple[int, int]
) -> None:
    """Set "next_refresh", and "gap" where it adapts."""
    gap = config.update_proj_gap
    if config.adaptive:
        if turn is not None and similarity(turn, shape) >= SIMILAR:
            gap = min(2 * state.get("gap", gap), MAX_GAP_FACTOR * gap)
        state["gap"] = gap
        state["next_refresh"] = step + (1 if blank else gap)
    else:
        state["next_refresh"] = step + (1 if blank else gap - (step - 1) % gap)


def similarity(turn: Rotation, shape: tuple[int, int]) -> float:
    """How alike two subspaces of a matrix (m, n) are: 1 the same, 0 as much as chance makes them, the least of a batch
    and of both sides.

    The mean squared cosine of the principal angles, ||new^T old||^2 / r, moved so that its mean over random subspaces,
    r / size, is 0. Q-GaLore compares the bases vector by vector, which calls the same subspace different when two of
    its directions change places.
    """
    least = 1.0
    for matrix, size in zip((turn.left, turn.right), shape, strict=True):
        if matrix is not None:
            rank = matrix.shape[-1]
            shared = matrix.square().sum((-2, -1)).min().item() / rank
            least = min(least, (shared - rank / size) / (1 - rank / size))
    return least


def project(config: GaLore, state: Mapping[str, Any], grad: torch.Tensor) -> torch.Tensor:
    """R = P(G) for G (..., m, n) float32: (..., *shape_of(config, m, n)), a new tensor."""
    left, right = _rows(state, "left"), _rows(state, "right")
    low = grad if left is None else left @ grad
    return low if right is None else low @ right.mT


def back_add_(
    config: GaLore,
    weights: torch.Tensor,  # (..., m, n) float32, updated in place; any strides
    direction: torch.Tensor,  # (..., *shape_of(config, m, n)) float32
    state: Mapping[str, Any],
    *,
    beta: float,
    alpha: float,
) -> None:
    """weights <- beta * weights + alpha * P^-1(direction), without a temporary of the size of the weights."""
    left, right = _rows(state, "left"), _rows(state, "right")
    if left is None:
        assert right is not None
        tall, wide = direction, right
    elif right is None:
        tall, wide = left.mT, direction
    elif weights.shape[-2] <= weights.shape[-1]:
        tall, wide = left.mT @ direction, right
    else:
        tall, wide = left.mT, direction @ right
    _add_product_(weights, tall, wide, beta, alpha)


def _add_product_(weights: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float) -> None:
    if weights.ndim == 2:
        weights.addmm_(a, b, beta=beta, alpha=alpha)
    elif weights.ndim == 3:
        weights.baddbmm_(a, b, beta=beta, alpha=alpha)
    else:
        for one, left, right in zip(weights, a, b, strict=True):
            _add_product_(one, left, right, beta, alpha)


def rotate_first(m: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """The first moment, or a momentum, in the coordinates of the new subspace: Q m, m Q^T, or both. A new tensor."""
    if rotation.left is not None:
        m = rotation.left @ m
    return m if rotation.right is None else m @ rotation.right.mT


def rotate_second(
    v: torch.Tensor,  # as R, float32
    m: torch.Tensor,  # as R, float32: the first moment before its own rotation
    rotation: Rotation,
    *,
    beta1: float,
    beta2: float,
    step: int,
) -> torch.Tensor:
    """The second moment in the coordinates of the new subspace, never negative (Robert et al. 2025, LDAdam, section 3).

    With moments freed of their bias, and variances of old coordinates taken as uncorrelated, the new coordinates have
    E[(Q g)^2] = (Q o Q)(v - m^2) + (Q m)^2. `step` is the step about to be made: the moments hold the steps before it.
    """
    bias1, bias2 = 1 - beta1 ** (step - 1), 1 - beta2 ** (step - 1)
    mean = m / bias1
    spread = rotate_first(v / bias2 - mean.square(), Rotation(*map(_squared, (rotation.left, rotation.right))))
    return spread.add_(rotate_first(mean, rotation).square()).abs_().mul_(bias2)


def _squared(matrix: torch.Tensor | None) -> torch.Tensor | None:
    return None if matrix is None else matrix.square()


def residual(
    config: GaLore,
    state: State,
    grad: torch.Tensor,  # (..., m, n) float32
    low: torch.Tensor,  # (..., *shape_of(config, m, n)) float32: project(grad)
    direction: torch.Tensor,  # as low: what the rule made of it
) -> torch.Tensor:
    """What Fira adds to P^-1(direction): S = phi * (G - P^-1(R)), (..., m, n), a new tensor (Chen et al. 2024, Fira).

    phi = ||direction|| / ||R|| for each column of G (eq. 11); for each row when the right side is projected; for the
    whole matrix (eq. 10) when both are. Where S has grown to more than GAMMA times its norm of the step before, it is
    shrunk to that (eq. 12); the norm is kept in the state. The weights move by -lr * scale * (P^-1(direction) + S)
    (algorithm 1).
    """
    side = side_of(config, *grad.shape[-2:])
    over = {Side.LEFT: (-2,), Side.RIGHT: (-1,), Side.FULL: (-2, -1)}[side]
    size = torch.linalg.vector_norm(low, dim=over, keepdim=True)
    factor = torch.linalg.vector_norm(direction, dim=over, keepdim=True).div_(size.clamp(min=_TINY))
    rest = grad.clone()
    back_add_(config, rest, low, state, beta=1, alpha=-1)
    rest.mul_(factor.masked_fill_(size == 0, 0))
    norm = torch.linalg.vector_norm(rest, dim=(-2, -1))
    last = state["residual_norm"]
    allowed = GAMMA * last
    # after a step without a residual there is nothing to compare with
    shrink = torch.where((last > 0) & (norm > allowed), allowed / norm.clamp(min=_TINY), 1.0)
    last.copy_(norm * shrink)
    return rest.mul_(shrink[..., None, None])


_TINY = torch.finfo(torch.float32).tiny
