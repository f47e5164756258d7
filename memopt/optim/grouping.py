"""From assignments (which part gets which policy) to the groups of an optimizer, and the table that is printed."""

from __future__ import annotations

from collections.abc import Sequence

from memopt.errors import BadInput
from memopt.optim import costs, newton_schulz
from memopt.optim.items import Route, RoutedPart
from memopt.optim.optimizer import ParamGroup
from memopt.optim.presets import Assignment, decays
from memopt.units import format_bytes


def routes_of(assignments: Sequence[Assignment]) -> list[tuple[Route, Assignment]]:
    """One route per parameter, with the first of its assignments, in their order."""
    by_name: dict[str, list[Assignment]] = {}
    for assignment in assignments:
        by_name.setdefault(assignment.routed.name, []).append(assignment)
    found = []
    for name, mine in by_name.items():
        parts = tuple(RoutedPart(a.part, a.policy, "" if len(mine) == 1 else f"{a.part.role}.") for a in mine)
        if len({routed.prefix for routed in parts}) < len(parts):
            parts = tuple(RoutedPart(p.part, p.policy, f"{i}.{p.prefix}") for i, p in enumerate(parts))
        _require_one_of_a_kind(name, [routed.policy.rule for routed in parts])
        found.append((Route(name, parts, tuple(mine[0].routed.parameter.shape)), mine[0]))
    return found


def _require_one_of_a_kind(name: str, rules: list[str]) -> None:
    for kind, numbers in ((("adamw", "lion"), "betas"), (("sgd", "muon"), "momentum")):
        if set(kind) <= set(rules):
            raise BadInput(
                f"overrides: parts of {name} would get {' and '.join(kind)}, but parts of one parameter share one "
                f"{numbers}; give all of them the same rule"
            )


def group(assignments: Sequence[Assignment], weight_decay: float) -> list[ParamGroup]:
    """Parameters with the same policies and weight decay together, in the order of their first member."""
    if not weight_decay >= 0:
        raise BadInput(f"weight_decay: {weight_decay} is not usable; give a number >= 0")
    members: dict[tuple[object, float], list[tuple[Route, Assignment]]] = {}
    for route, first in routes_of(assignments):
        decay = weight_decay if decays(first.routed) else 0.0
        policies = tuple(routed.policy for routed in route.parts)
        members.setdefault((policies, decay), []).append((route, first))
    return [
        ParamGroup(
            routes=tuple(route for route, _ in mine),
            params=tuple(first.routed.parameter for _, first in mine),
            weight_decay=decay,
        )
        for (_, decay), mine in members.items()
    ]


def describe(preset: str, assignments: Sequence[Assignment]) -> str:
    """The table of which parameters get what and why, and the bytes of state."""
    rows: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    sample: dict[tuple[str, str, str], str] = {}
    for assignment in assignments:
        shape = tuple(assignment.routed.parameter.shape)
        part = costs.part_shape(RoutedPart(assignment.part, assignment.policy), shape)
        numel = 1
        for size in part:
            numel *= size
        key = (str(assignment.part.role), assignment.policy.label, assignment.why)
        rows.setdefault(key, []).append((numel, costs.part_bytes(assignment.policy, part)))
        sample.setdefault(key, assignment.routed.name)
    lines = [("role", "update", "tensors", "elements", "state", "B/element", "for example", "why")]
    for key, sizes in rows.items():
        numel, nbytes = sum(n for n, _ in sizes), sum(b for _, b in sizes)
        lines.append(
            (
                key[0],
                key[1],
                str(len(sizes)),
                f"{numel:,}",
                format_bytes(nbytes),
                f"{nbytes / max(numel, 1):.2f}",
                sample[key],
                key[2],
            )
        )
    total = sum(b for sizes in rows.values() for _, b in sizes)
    every = sum(n for sizes in rows.values() for n, _ in sizes)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    numbers = {2, 3, 4, 5}
    text = [f"memopt optimizer {preset}: {every:,} parameters, {format_bytes(total)} of state"]
    for line in lines:
        cells = [c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False))]
        text.append("  ".join([*cells, line[-1]]).rstrip())
    defaults = (a for a in assignments if a.policy.rule == "muon" and a.policy.ns_dtype is None)
    hints = (newton_schulz.faster_products(a.routed.parameter.device) for a in defaults)
    text.extend(dict.fromkeys(hint for hint in hints if hint))
    return "\n".join(text)
