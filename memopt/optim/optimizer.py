"""One torch optimizer: per part of a parameter a rule, a projection and a state codec, chosen by a preset.

The state is plain tensors and numbers, so that it passes `torch.load(weights_only=True)`, accelerate and distributed
checkpoints. Nothing is keyed by a parameter object except torch's own `state`: wrappers may swap parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch

from memopt.budget import Budget
from memopt.errors import BadInput, NonFinite
from memopt.ledger import Lease, Ledger
from memopt.optim import costs
from memopt.optim.element import DeviceKernels, Hyper
from memopt.optim.items import Item, Route, finite_or_first, items_of, paired, require_dense
from memopt.optim.sharding import is_sharded, local, rows_of, wrap
from memopt.optim.updates import Means, update_
from memopt.tiers import Category, Tier

NonFinitePolicy = Literal["raise", "skip", "ignore"]
_KNOB = "use 8-bit states or a low-rank preset (adamw8bit, galore8bit), or raise the budget"


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that share a learning rate, weight decay and what is done with them."""

    routes: tuple[Route, ...]
    params: tuple[torch.nn.Parameter, ...]
    weight_decay: float


class Optimizer(torch.optim.Optimizer):
    """Made by `build_optimizer` or `attach_optimizer`; used like any torch optimizer.

    `nonfinite` says what a NaN or infinite gradient does: "raise" names the parameter and leaves everything untouched,
    "skip" leaves the step out and counts it, "ignore" does not look.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        *,
        preset: str,
        lr: float,
        nonfinite: NonFinitePolicy = "raise",
        ledger: Ledger | None = None,
        kernels: DeviceKernels | None = None,
        seed: int = 0,
    ) -> None:
        _check(groups, lr, nonfinite)
        self.preset = preset
        self.nonfinite = nonfinite
        self.ledger = ledger or Ledger(Budget())
        self.means = Means(seed=seed, kernels=kernels)
        self.routes: list[tuple[Route, ...]] = []
        self._leases: list[Lease] = []
        self._charged: set[torch.Tensor] = set()
        made = [{**_torch_group(group, preset, lr), "number": number} for number, group in enumerate(groups)]
        super().__init__(made, {"lr": lr, "weight_decay": 0.0})
        self.routes = [group.routes for group in groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: a group without names has no roles."""
        if self.routes:
            raise BadInput("memopt's optimizer routes parameters by name: build a new one for the whole model")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Raises NonFinite (see `nonfinite`), BadInput for sparse gradients and OverBudget when the states do not fit the
        ledger's budget; in all three cases no parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.charge()
        everything = [(route.name, param) for _, param, route in self.placed_params()]
        if self._gradients_sound(everything, "nothing was updated"):
            for number in range(len(self.param_groups)):
                self.update_params(number, list(self._numbered(number)))
        else:
            self.count_skipped()
        return loss

    def update_params(self, group: int, params: Sequence[tuple[torch.nn.Parameter, Route]]) -> None:
        """One step on some parameters of a group; those without a gradient are left out."""
        items: list[Item] = []
        finish = []
        for param, route in params:
            if param.grad is not None:
                made, write_back = items_of(param, route, self.state[param])
                items += made
                finish.append(write_back)
        update_(items, _hyper(self.param_groups[group]), self.means)
        for write_back in finish:
            write_back()

    def placed_params(self) -> Iterator[tuple[int, torch.nn.Parameter, Route]]:
        """(group, parameter, route) of every parameter, as it is now: wrappers swap parameters."""
        for number in range(len(self.param_groups)):
            for param, route in self._numbered(number):
                yield number, param, route

    def update_one(self, group: int, param: torch.nn.Parameter, route: Route) -> bool:
        """One step on one parameter (of `placed_params`), if its gradient is sound. Returns whether it was updated."""
        sound = self._gradients_sound([(route.name, param)], "it was not updated, those before it in this pass were")
        if sound:
            self.update_params(group, [(param, route)])
        return sound

    def count_skipped(self) -> None:
        """Remember that a step, or a part of it, was left out."""
        for group in self.param_groups:
            group["skipped_steps"] += 1

    @property
    def skipped_steps(self) -> int:
        """Steps left out because of a gradient that was not finite (`nonfinite="skip"`)."""
        return int(self.param_groups[0]["skipped_steps"])

    def state_dict(self) -> dict[str, Any]:
        """As torch's; values are tensors, numbers, strings, lists and dicts only."""
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but no tensor changes its dtype. Raises BadInput, with nothing changed, for the state of another
        preset or of other parameters."""
        saved = list(state_dict["param_groups"])
        self._require_ours(saved)
        numbers = [number for group in saved for number in group["params"]]
        of = {number: (p, route) for number, (_, p, route) in zip(numbers, self.placed_params(), strict=True)}
        state: dict[Any, dict[str, Any]] = defaultdict(dict)  # parameters may be swapped later (accelerate's FSDP2)
        for key, values in state_dict["state"].items():
            if key in of:
                param, route = of[key]
                state[param] = _placed(values, param, route)
            else:
                state[key] = deepcopy(values)
        groups = []
        for mine, theirs in zip(self.param_groups, saved, strict=True):
            kept = {key: deepcopy(value) for key, value in theirs.items() if key != "params"}
            groups.append({**mine, **kept, "params": mine["params"]})
        self.__setstate__({"state": state, "param_groups": groups})
        self._release()

    def charge(self) -> None:
        """Charge all states to the ledger, before the first of them exists. Raises OverBudget."""
        wanted: dict[tuple[str, Tier], int] = {}
        params = [each for each in self.placed_params() if each[1] not in self._charged]
        for number, param, route in params:
            key = self.param_groups[number]["policy"], Tier.GPU if param.device.type == "cuda" else Tier.DRAM
            wanted[key] = wanted.get(key, 0) + costs.held_bytes(route, param)
        leases: list[Lease] = []
        try:
            for (policy, tier), nbytes in wanted.items():
                what = f"optimizer state ({policy})"
                leases.append(self.ledger.charge(tier, Category.OPTIMIZER, nbytes, what, knob=_KNOB))
        except BaseException:
            for lease in leases:
                lease.release()
            raise
        self._leases += leases
        self._charged.update(param for _, param, _ in params)

    def state_bytes(self, group: int | None = None) -> int:
        """Bytes the states hold now on this rank, counted from their storages, each once."""
        groups = self.param_groups if group is None else [self.param_groups[group]]
        seen: dict[int, int] = {}
        for values in (self.state.get(p, {}) for g in groups for p in g["params"]):
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    storage = local(value).untyped_storage()
                    seen[storage.data_ptr()] = storage.nbytes()
        return sum(nbytes for pointer, nbytes in seen.items() if pointer)

    def memory_report(self) -> list[dict[str, Any]]:
        """One row per group: what is done, parameters, elements, bytes of state now and when all exist, per element."""
        rows = []
        for number, group in enumerate(self.param_groups):
            elements = sum(local(p).numel() for p in group["params"])
            planned = sum(costs.held_bytes(route, p) for p, route in self._numbered(number))
            rows.append(
                {
                    "policy": group["policy"],
                    "weight_decay": group["weight_decay"],
                    "parameters": len(group["params"]),
                    "elements": elements,
                    "state_bytes": self.state_bytes(number),
                    "planned_bytes": planned,
                    "bytes_per_element": planned / max(elements, 1),
                }
            )
        return rows

    def _numbered(self, group: int) -> Iterable[tuple[torch.nn.Parameter, Route]]:
        # by the group's own number: DeepSpeed shows one group at a time
        return paired(self.param_groups[group]["params"], self.routes[self.param_groups[group]["number"]])

    def _gradients_sound(self, params: Sequence[tuple[str, torch.nn.Parameter]], outcome: str) -> bool:
        for name, param in params:
            require_dense(name, param)
        if self.nonfinite == "ignore":
            return True
        bad = finite_or_first(iter(params))
        if not _any_rank(bad is not None, params):
            return True
        if self.nonfinite == "raise":
            raise NonFinite(
                f"gradient of {bad or 'a parameter on another rank'} has NaN or infinite values; {outcome}. "
                'Lower the learning rate, clip gradients, or build the optimizer with nonfinite="skip"'
            )
        return False

    def _require_ours(self, saved: list[dict[str, Any]]) -> None:
        theirs = [(g.get("preset", "another optimizer"), g.get("layout"), len(g["params"])) for g in saved]
        mine = [(g["preset"], g["layout"], len(g["params"])) for g in self.param_groups]
        if theirs != mine:
            first = next(
                (pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]), (mine[-1], "no group")
            )
            raise BadInput(
                f"this state belongs to another optimizer: expected groups (preset, layout, parameters) like "
                f"{first[0]}, found {first[1]}; build it with the preset and options the state was saved with"
            )

    def _release(self) -> None:
        for lease in self._leases:
            lease.release()
        self._leases = []
        self._charged = set()


def _check(groups: Sequence[ParamGroup], lr: float, nonfinite: str) -> None:
    if not groups:
        raise BadInput("the model has no parameter that requires a gradient: nothing to optimize")
    if not lr >= 0:
        raise BadInput(f"lr: {lr} is not a learning rate; give a number >= 0")
    if nonfinite not in ("raise", "skip", "ignore"):
        raise BadInput(f"nonfinite: {nonfinite!r} is not one of raise, skip, ignore")
    for group in groups:
        for param, route in zip(group.params, group.routes, strict=True):
            if param.is_complex():
                raise BadInput(f"parameter {route.name} is complex; memopt's optimizer knows real parameters only")


def _torch_group(group: ParamGroup, preset: str, lr: float) -> dict[str, Any]:
    """Numbers and strings only: this is saved. Rules read what they need from it, so schedulers may change it."""
    policies = [routed.policy for route in group.routes for routed in route.parts]
    adaptive = next((p for p in policies if p.rule in ("adamw", "lion")), policies[0])
    momentum = next((p for p in policies if p.rule in ("sgd", "muon")), policies[0])
    return {
        "params": list(group.params),
        "lr": lr,
        "weight_decay": group.weight_decay,
        "betas": tuple(adaptive.betas),
        "eps": adaptive.eps,
        "momentum": momentum.momentum,
        "nesterov": momentum.nesterov,
        "preset": preset,
        "policy": group.routes[0].label,
        "layout": group.routes[0].layout,
        "skipped_steps": 0,
        "previous_norm": 0.0,
    }


def _hyper(group: Mapping[str, Any]) -> Hyper:
    beta1, beta2 = group["betas"]
    return Hyper(
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        momentum=float(group["momentum"]),
        nesterov=bool(group["nesterov"]),
    )


def _placed(values: Mapping[str, Any], param: torch.Tensor, route: Route) -> dict[str, Any]:
    """A copy of one parameter's states where the parameter is; cut as it is, if states are kept by rows."""
    placed: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(value, torch.Tensor):
            placed[key] = deepcopy(value)
        elif is_sharded(param) and not is_sharded(value) and costs.kept_by_rows(route, key, value, param):
            mine = rows_of(value.detach().to(param.device), param).clone()  # a view would keep the whole alive
            placed[key] = wrap(mine, param, value.shape)
        else:
            placed[key] = value.detach().to(device=param.device, copy=True)
    return placed


def _any_rank(bad: bool, params: Sequence[tuple[str, torch.Tensor]]) -> bool:
    """Whether it is bad on any rank that holds a cut of these parameters; they must agree on leaving out a step."""
    # a set's order could differ between ranks
    meshes = list(dict.fromkeys(p.device_mesh for _, p in params if is_sharded(p)))  # type: ignore[attr-defined]
    for mesh in meshes:
        for dim in range(mesh.ndim):
            flag = torch.tensor(float(bad), device=mesh.device_type)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
            bad = bool(flag.item())
    return bad
