"""From a parameter with a gradient to the matrices an update works on, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memopt.errors import BadInput
from memopt.optim.part_state import PartState
from memopt.optim.parts import Part
from memopt.optim.presets import Policy
from memopt.optim.roles import Role
from memopt.optim.sharding import is_sharded, local, require_rows, rows_of, whole


@dataclass(frozen=True)
class RoutedPart:
    """A part of a parameter and what is done with it. `prefix` keeps the states of several parts apart."""

    part: Part
    policy: Policy
    prefix: str = ""


@dataclass(frozen=True)
class Route:
    """What is done with a parameter."""

    name: str
    parts: tuple[RoutedPart, ...]
    shape: tuple[int, ...]
    """The shape it was routed by."""

    @property
    def label(self) -> str:
        """What is done, in words: equal for parameters of one group."""
        return " + ".join(dict.fromkeys(routed.policy.label for routed in self.parts))

    @property
    def layout(self) -> str:
        """What the shapes of the states follow from: a saved state fits if it is equal."""
        return " + ".join(routed.prefix + routed.policy.layout for routed in self.parts)

    def by_rows(self, routed: RoutedPart) -> bool:
        """Whether every rank can keep the states of its own rows (else all ranks keep them whole)."""
        return routed.part.whole and routed.policy.projection is None


@dataclass(kw_only=True)
class Item:
    """One matrix (m, n), batch of matrices (B, m, n), or vector (n,): contiguous, with its gradient and states."""

    name: str
    policy: Policy
    weights: torch.Tensor
    grad: torch.Tensor
    state: PartState
    step: int
    like: torch.Tensor | None = None
    """The DTensor whose rows of this rank `weights` and `grad` are."""


def items_of(param: torch.Tensor, route: Route, state: dict[str, Any]) -> tuple[list[Item], Callable[[], None]]:
    """The parts of `param` to update, and a function that writes back those that had to be copied.

    Counts the step in `state`. Under a DTensor whose states are not kept by rows this is a collective.
    """
    grad = param.grad
    assert grad is not None
    require_rows(route.name, param)
    step = state["step"] = int(state.get("step", 0)) + 1
    items: list[Item] = []
    copied: list[tuple[torch.Tensor, Part, torch.Tensor]] = []
    full: tuple[torch.Tensor, torch.Tensor] | None = None
    for routed in route.parts:
        like = param if is_sharded(param) and route.by_rows(routed) else None
        if like is not None:
            base, base_grad = local(param), local(grad)
        else:
            full = full or (whole(param), whole(grad))
            base, base_grad = full
        weights, is_copy = matrix_of(routed.part, base.detach())
        if is_copy:
            copied.append((base.detach(), routed.part, weights))
        items.append(
            Item(
                name=route.name + ("." + routed.prefix.rstrip(".") if routed.prefix else ""),
                policy=routed.policy,
                weights=weights,
                grad=matrix_of(routed.part, base_grad)[0],
                state=PartState(state, routed.prefix),
                step=step,
                like=like,
            )
        )

    def write_back() -> None:
        for base, part, weights in copied:
            view = part.view(base)
            view.copy_(weights.view(view.shape))
        if is_sharded(param) and full is not None:
            local(param).copy_(rows_of(full[0], param))

    return items, write_back


def paired(params: Sequence[torch.nn.Parameter], routes: Sequence[Route]) -> list[tuple[torch.nn.Parameter, Route]]:
    """Each parameter of a group with its route, also where a wrapper has put vectors in their places.

    DeepSpeed ZeRO makes one vector (or several) of all parameters of a group, FSDP1 one of each. Raises BadInput for
    rules that work on matrices.
    """
    if len(params) == len(routes):
        pairs = zip(params, routes, strict=True)
        return [(p, route if tuple(p.shape) == route.shape else _flattened(p, [route])) for p, route in pairs]
    return [(p, _flattened(p, routes)) for p in params]


def _flattened(param: torch.Tensor, routes: Sequence[Route]) -> Route:
    first = routes[0]
    policies = {part.policy for route in routes for part in route.parts}
    if param.ndim == 1 and len(policies) == 1 and not any(policy.shape_aware for policy in policies):
        name = first.name if len(routes) == 1 else f"{first.name} and {len(routes) - 1} more"
        part = RoutedPart(Part(role=Role.OTHER), policies.pop())
        return Route(f"{name} (flattened)", (part,), tuple(param.shape))
    raise BadInput(
        f"parameter {first.name} {first.shape} has become a tensor of shape {tuple(param.shape)}, as DeepSpeed ZeRO "
        f'and FSDP1 make them, and {first.label} works on matrices; use FSDP2, DeepSpeed\'s own Muon ("optimizer": '
        '{"type": "Muon"} in its configuration), or an element-wise preset such as adamw8bit'
    )


def matrix_of(part: Part, tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A part of a parameter, contiguous and of `part.shape`, and whether it is a copy."""
    shape = part.shape(tensor.shape)
    matrix = (tensor if part.whole else part.view(tensor)).reshape(shape).contiguous()
    return matrix, matrix.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def finite_or_first(params: Iterator[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first parameter whose gradient has a NaN or an infinity on this rank; None if all are finite.

    Where all are bad the first is not the one to look at: clipping by a norm that is not finite makes them so.
    """
    named = [(name, local(p.grad)) for name, p in params if p.grad is not None]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for _, grad in named:
        if grad.numel():
            by_device.setdefault(grad.device, []).append(grad)
    for grads in by_device.values():
        # a sum of squares is seven times as fast on a CPU as the largest magnitude, but overflows on gradients that are
        # large and finite: those are looked at again
        if not torch.isfinite(torch.stack(torch._foreach_norm(grads)).float()).all():
            bad = [name for name, grad in named if not torch.isfinite(grad).all()]
            if bad:
                spread = len(bad) == len(named) > 1
                return f"all {len(bad)} parameters (clipping spreads a norm that is not finite)" if spread else bad[0]
    return None


def require_dense(name: str, param: torch.Tensor) -> None:
    """Refuse a sparse gradient. Raises BadInput."""
    if param.grad is not None and param.grad.layout != torch.strided:
        raise BadInput(
            f"parameter {name} has a sparse gradient, which memopt's optimizer does not take; "
            "use nn.Embedding(sparse=False)"
        )
