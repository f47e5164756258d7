"""Presets: which rule, projection and state codec the parameters of each role get, and the options that change them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch

from memopt.errors import BadInput
from memopt.optim import codecs
from memopt.optim.codecs import Codec
from memopt.optim.muon import Scale
from memopt.optim.newton_schulz import Coefficients, polynomials
from memopt.optim.parts import Part
from memopt.optim.projection import GaLore, fits, low_rank_shape
from memopt.optim.roles import HIDDEN, Role
from memopt.optim.routing import Routed, require_shapes

Rule = Literal["adamw", "lion", "sgd", "muon"]


def _choice(what: str, value: object, choices: Iterable[object]) -> None:
    known = list(choices)
    if value not in known:
        raise BadInput(f"{what}: {value!r} is unknown; choose from {', '.join(map(str, known))}")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is done with a part of a parameter: rule, projection, state codec, and the numbers of the rule."""

    rule: Rule = "adamw"
    projection: GaLore | None = None
    codec: Codec = Codec.FP32
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW and Lion."""
    eps: float = 1e-8
    """Of AdamW."""
    momentum: float = 0.95
    """Of SGD and Muon."""
    nesterov: bool = False
    coefficients: Coefficients = Coefficients.POLAR_EXPRESS
    """Of Muon's Newton-Schulz iteration, like the next two."""
    ns_steps: int = 5
    ns_dtype: torch.dtype | None = None
    """None: bfloat16 on CUDA, float32 elsewhere."""
    scale_mode: Scale = Scale.MATCH_RMS_ADAMW

    def __post_init__(self) -> None:
        _choice("rule", self.rule, get_args(Rule))
        if self.rule == "adamw" and self.codec == Codec.INT8_LINEAR:
            raise BadInput(
                "rule adamw with int8_linear states: second moments span more decades than 127 equal steps can hold; "
                "use int8"
            )
        for name, value in (("betas", self.betas), ("eps", (self.eps,)), ("momentum", (self.momentum,))):
            if not isinstance(value, tuple) or not all(isinstance(number, int | float) for number in value):
                raise BadInput(f"{name}: {getattr(self, name)!r} is not made of numbers")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"betas: {self.betas} are not two numbers from 0 to below 1; (0.9, 0.999) is usual")
        if not self.eps > 0:
            raise BadInput(f"eps: {self.eps} is not above 0; 1e-8 is usual")
        if not 0 <= self.momentum < 1:
            raise BadInput(f"momentum: {self.momentum} is not from 0 to below 1; 0.9 and 0.95 are usual")
        polynomials(self.coefficients, self.ns_steps)

    @property
    def shape_aware(self) -> bool:
        """Whether it works on matrices, not on elements."""
        return self.rule == "muon" or self.projection is not None

    @property
    def label(self) -> str:
        """In words, as in `galore(128) adamw int8`: equal for what one group of parameters shares."""
        low_rank = f"galore({self.projection.rank}) " if self.projection is not None else ""
        return low_rank + self.rule + ("" if self.codec == Codec.FP32 else f" {self.codec}")

    @property
    def layout(self) -> str:
        """The label, and what else the states' shapes depend on."""
        low_rank = self.projection
        return (
            self.label
            if low_rank is None
            else f"{self.label} {low_rank.proj_type} {low_rank.basis_dtype} {low_rank.residual}"
        )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A table from roles to policies. `main` is what the preset is named for; an override by its name gives that."""

    doc: str
    source: str
    main: Policy
    roles: frozenset[Role] = frozenset(Role)
    """Of parameters that get `main`."""
    rest: Policy = Policy()
    """For all others, but `PRECISE`."""

    def policy(self, role: Role) -> Policy:
        """What parameters of `role` get."""
        policy = self.main if role in self.roles else self.rest
        return replace(policy, codec=Codec.FP32) if role in PRECISE else policy

    @property
    def shape_aware(self) -> bool:
        """Whether it needs matrices as matrices."""
        return self.main.shape_aware


PRECISE = frozenset({Role.EMBEDDING, Role.NORM, Role.BIAS})
"""States in float32 whatever the preset's codec, as bitsandbytes (StableEmbedding) and Hugging Face's Trainer do."""

_MUON = Policy(rule="muon", nesterov=True)
_AUX = Policy(betas=(0.9, 0.95))
"""AdamW beside Muon; the betas are those of arXiv 2509.26030 at 0.7 billion parameters."""
_LION = Policy(rule="lion", betas=(0.9, 0.99))

PRESETS: dict[str, Preset] = {
    "adamw": Preset(
        doc="AdamW with float32 states", source="Loshchilov & Hutter 2019, arXiv 1711.05101", main=Policy()
    ),
    "adamw8bit": Preset(
        doc="AdamW with both moments in 8 bits; float32 for embeddings, norms and biases",
        source="Dettmers et al. 2022, arXiv 2110.02861",
        main=Policy(codec=Codec.INT8),
    ),
    "lion": Preset(doc="Lion, one state", source="Chen et al. 2023, arXiv 2302.06675", main=_LION),
    "lion8bit": Preset(
        doc="Lion with its state in 8 bits; float32 for embeddings, norms and biases",
        source="Chen et al. 2023, arXiv 2302.06675; Dettmers et al. 2022, arXiv 2110.02861",
        main=replace(_LION, codec=Codec.INT8),
    ),
    "sgd": Preset(
        doc="SGD with momentum", source="Sutskever et al. 2013, as in torch", main=Policy(rule="sgd", momentum=0.9)
    ),
    "galore": Preset(
        doc="AdamW in a low-rank subspace for hidden matrices, AdamW for the rest",
        source="Zhao et al. 2024, arXiv 2403.03507",
        main=Policy(projection=GaLore()),
        roles=HIDDEN,
    ),
    "galore8bit": Preset(
        doc="8-bit AdamW in a low-rank subspace for hidden matrices, 8-bit AdamW for the rest",
        source="Zhao et al. 2024, arXiv 2403.03507",
        main=Policy(projection=GaLore(), codec=Codec.INT8),
        roles=HIDDEN,
        rest=Policy(codec=Codec.INT8),
    ),
    "galore_muon": Preset(
        doc="Muon with its momentum in a low-rank subspace for hidden matrices, AdamW for the rest",
        source="after SUMO, arXiv 2505.24749, with Newton-Schulz in the subspace",
        main=replace(_MUON, projection=GaLore()),
        roles=HIDDEN,
        rest=_AUX,
    ),
    "muon": Preset(
        doc="Muon for hidden matrices, AdamW for the rest; both with AdamW's learning rate",
        source="Jordan 2024; Liu et al. 2025, arXiv 2502.16982",
        main=_MUON,
        roles=HIDDEN,
        rest=_AUX,
    ),
    "muon_vo_ffn": Preset(
        doc="Muon without Nesterov for values, outputs and feed-forward layers, AdamW for queries, keys and the rest",
        source="arXiv 2509.26030, the ablation over parameters",
        main=replace(_MUON, nesterov=False),
        roles=HIDDEN - {Role.Q, Role.K, Role.QKV},
        rest=_AUX,
    ),
    "muon8bit": Preset(
        doc="Muon with momentum in 8 linear bits for hidden matrices, 8-bit AdamW for the rest",
        source="arXiv 2509.23106",
        main=replace(_MUON, codec=Codec.INT8_LINEAR),
        roles=HIDDEN,
        rest=replace(_AUX, codec=Codec.INT8),
    ),
}

_RULE_OPTIONS = ("betas", "eps", "momentum", "nesterov", "ns_steps", "coefficients", "ns_dtype", "scale_mode")
_MUON_OPTIONS = ("ns_steps", "coefficients", "ns_dtype", "scale_mode")
_PROJECTION_OPTIONS = (
    "rank",
    "update_proj_gap",
    "scale",
    "proj_type",
    "basis",
    "rotate",
    "adaptive",
    "residual",
    "basis_dtype",
)
OPTIONS = (*_RULE_OPTIONS, *_PROJECTION_OPTIONS, "state_dtype", "overrides")
"""Names `resolve` knows; the projection's are galore-torch's where it has them."""
_STATE_DTYPES = {"float32": Codec.FP32, "bfloat16": Codec.BF16, "int8": Codec.INT8}
_NS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What is done with one part of a parameter, and why."""

    routed: Routed
    part: Part
    policy: Policy
    why: str


def decays(routed: Routed) -> bool:
    """Whether weight decay applies: not to biases, norms and other vectors (Hugging Face's Trainer decays the last)."""
    return routed.role not in (Role.BIAS, Role.NORM) and routed.parameter.ndim > 1


def require_elementwise(preset: str, reason: str) -> None:
    """Refuse a preset that works on matrices, because of `reason`. Raises BadInput."""
    if preset_named(preset).shape_aware:
        fine = ", ".join(name for name, other in PRESETS.items() if not other.shape_aware)
        raise BadInput(f"preset {preset} works on matrices, but {reason}; choose from {fine}")


def preset_named(name: str) -> Preset:
    """The preset of this name. Raises BadInput."""
    if "+" in name:
        return _combination(name)
    _choice("preset", name, PRESETS)
    return PRESETS[name]


def _combination(name: str) -> Preset:
    """`rule+galore+codec` in any selection: "lion+galore", "sgd+int8_linear", "muon+galore+bfloat16"."""
    rule, *choices = name.split("+")
    _choice(f"preset {name}: the rule", rule, get_args(Rule))
    for choice in choices:
        _choice(f"preset {name}: the projection or codec", choice, ["galore", *Codec])
    codecs_named = [Codec(choice) for choice in choices if choice != "galore"]
    if len(codecs_named) > 1 or len(choices) > 1 + len(codecs_named):
        raise BadInput(f"preset {name}: give at most one projection and one codec")
    main = PRESETS[rule].main if not codecs_named else replace(PRESETS[rule].main, codec=codecs_named[0])
    main = replace(main, projection=GaLore()) if "galore" in choices else main
    return Preset(
        doc="rule, projection and codec by name; AdamW for what is no hidden matrix, if the rule works on matrices",
        source="",
        main=main,
        roles=HIDDEN if main.shape_aware else frozenset(Role),
        rest=PRESETS[rule].rest if rule == "muon" else Policy(),
    )


def resolve(preset: str, routed: Sequence[Routed], **options: Any) -> list[Assignment]:
    """The policy of every part of every parameter, in order.

    Options (`OPTIONS`; None leaves the preset's value): numbers of the rules; those of `GaLore`; `state_dtype`
    ("float32", "bfloat16", or "int8", which leaves embeddings, norms and biases alone; of Muon's momentum it is the
    linear one); and `overrides`, from a role or a pattern of names (fnmatch) to the name of a preset, whose main policy
    is taken with its own codec and, where this preset has that rule too, this preset's numbers. Patterns of names go
    before roles, later ones before earlier ones. Trainers pass `betas` and `eps` to all presets: rules without them do
    not read them.

    Parts of a fused parameter that end with the same element-wise policy are one part again. Raises BadInput for what
    is unknown, out of range, without any effect, or of the wrong shape.
    """
    table = _Table(preset, options)
    table.require_matches(routed)
    chosen = (table.choose(item, part)[0] for item in routed for part in item.parts)
    if table.preset.shape_aware or any(policy.shape_aware for policy in chosen):
        require_shapes(routed, preset)
    return [assignment for item in routed for assignment in _assign(table, item)]


class _Table:
    """A preset with the options applied, and the overrides."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        for option in options:
            _choice("option", option, OPTIONS)
        given = {key: value for key, value in options.items() if value is not None}
        self.preset = preset_named(name)
        self.by_role: dict[Role, Policy] = {}
        self.by_name: dict[str, Policy] = {}
        codec = _codec(given.pop("state_dtype", None))
        overrides = _overrides(given.pop("overrides", {}))
        own = {role: self.preset.policy(role) for role in Role}
        replaced = {key: _with_numbers(preset_named(choice).main, own.values()) for key, choice in overrides.items()}
        _require_effect(name, given, [*own.values(), *replaced.values()])
        self.own = {role: _with_options(policy, given) for role, policy in own.items()}
        if codec is not None:
            exact = PRECISE if codec == Codec.INT8 else frozenset()
            self.own = {r: p if r in exact else _with_codec(p, codec) for r, p in self.own.items()}
        for key, policy in replaced.items():
            if key in set(Role):
                self.by_role[Role(key)] = _with_options(policy, given)
            else:
                self.by_name[key] = _with_options(policy, given)

    def require_matches(self, routed: Sequence[Routed]) -> None:
        for pattern in self.by_name:
            if not any(_names(item, pattern) for item in routed):
                raise BadInput(
                    f"overrides: {pattern!r} is no role ({', '.join(Role)}) and matches no name of a trainable "
                    f"parameter (such as {routed[0].name if routed else 'none'})"
                )

    def choose(self, item: Routed, part: Part) -> tuple[Policy, str]:
        """The policy of a part and, if an override decides, which."""
        for pattern, policy in reversed(self.by_name.items()):
            if _names(item, pattern):
                return policy, f"override {pattern}"
        roles = (part.role, Role.QKV) if item.role == Role.QKV else (part.role,)
        for role in roles:
            if role in self.by_role:
                return self.by_role[role], f"override {role}"
        return self.own[part.role], ""


def _assign(table: _Table, item: Routed) -> list[Assignment]:
    chosen = [(part, *table.choose(item, part)) for part in item.parts]
    shape = tuple(item.parameter.shape)
    if not any(policy.shape_aware for _, policy, _ in chosen) and len({policy for _, policy, _ in chosen}) == 1:
        chosen = [(Part(role=item.role), *chosen[0][1:])]
    assignments = []
    for part, policy, override in chosen:
        notes = [item.why, override] if override else [item.why]
        policy, more = _fitted(policy, part.shape(shape), f"{item.name} {shape}", override)
        assignments.append(Assignment(routed=item, part=part, policy=policy, why="; ".join([*notes, *more])))
    return assignments


def _fitted(policy: Policy, shape: tuple[int, ...], what: str, override: str) -> tuple[Policy, list[str]]:
    """The policy a part of `shape` can have, and notes on what is different."""
    notes = []
    if policy.rule == "muon" and len(shape) < 2:
        raise BadInput(f"{override or 'the preset'} puts Muon on {what}, which is no matrix; use adamw for it")
    worked = shape
    if policy.projection is not None:
        reason = fits(policy.projection, *shape[-2:]) if len(shape) > 1 else "no matrix, no projection"
        if reason is None:
            worked = low_rank_shape(policy.projection, shape)
        else:
            policy = replace(policy, projection=None)
            notes.append(reason)
    codec = codecs.storable(policy.codec, worked)
    if codec != policy.codec:
        count = torch.Size(worked).numel()
        narrow = f"rows of {worked[-1]}" if worked and count >= codecs.MIN_NUMEL else f"only {count} elements"
        notes.append(f"{narrow}: states in float32")
    return replace(policy, codec=codec), notes


def _names(item: Routed, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (item.name, *item.tied))


def _overrides(overrides: Any) -> dict[str, str]:
    if not isinstance(overrides, Mapping):
        raise BadInput(f"overrides: {overrides!r} is no mapping from roles or patterns of names to presets")
    for key, choice in overrides.items():
        if "+" not in choice:
            _choice(f"overrides: the policy of {key!r}", choice, PRESETS)
    return {str(key): choice for key, choice in overrides.items()}


def _with_numbers(policy: Policy, own: Iterable[Policy]) -> Policy:
    """A policy with the numbers a preset has for its rule, if any: one rule does not go by two sets in one run."""
    like = next((other for other in own if other.rule == policy.rule), None)
    return policy if like is None else replace(policy, **{name: getattr(like, name) for name in _RULE_OPTIONS})


def _with_options(policy: Policy, given: Mapping[str, Any]) -> Policy:
    numbers = {name: given[name] for name in _RULE_OPTIONS if name in given}
    if isinstance(numbers.get("betas"), list):
        numbers["betas"] = tuple(numbers["betas"])
    if "coefficients" in numbers:
        _choice("coefficients", numbers["coefficients"], tuple(Coefficients))
        numbers["coefficients"] = Coefficients(numbers["coefficients"])
    if "scale_mode" in numbers:
        _choice("scale_mode", numbers["scale_mode"], tuple(Scale))
        numbers["scale_mode"] = Scale(numbers["scale_mode"])
    if "ns_dtype" in numbers and not isinstance(numbers["ns_dtype"], torch.dtype):
        _choice("ns_dtype", numbers["ns_dtype"], _NS_DTYPES)
        numbers["ns_dtype"] = _NS_DTYPES[numbers["ns_dtype"]]
    low_rank = {name: given[name] for name in _PROJECTION_OPTIONS if name in given}
    if policy.projection is not None and low_rank:
        numbers["projection"] = replace(policy.projection, **low_rank)
    return replace(policy, **numbers)


def _with_codec(policy: Policy, codec: Codec) -> Policy:
    return replace(policy, codec=Codec.INT8_LINEAR if (policy.rule, codec) == ("muon", Codec.INT8) else codec)


def _codec(dtype: str | torch.dtype | None) -> Codec | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    _choice("state_dtype", name, _STATE_DTYPES)
    return _STATE_DTYPES[name]


def _require_effect(preset: str, given: Mapping[str, Any], policies: Sequence[Policy]) -> None:
    """Refuse an option no policy reads."""
    rules = {policy.rule for policy in policies}
    reads = {name: rules & {"muon"} for name in _MUON_OPTIONS}
    reads |= {name: rules & {"muon", "sgd"} for name in ("momentum", "nesterov")}
    low_rank = any(policy.projection is not None for policy in policies)
    for name in given:
        if (name in reads and not reads[name]) or (name in _PROJECTION_OPTIONS and not low_rank):
            family = "a galore preset" if name in _PROJECTION_OPTIONS else "a preset with momentum"
            family = "a muon preset" if name in _MUON_OPTIONS else family
            raise BadInput(f"option {name} does nothing in preset {preset}; leave it out or choose {family}")
