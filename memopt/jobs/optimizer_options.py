"""Which optimizers have a use for which of the settings that only some of them read."""

from __future__ import annotations

from collections.abc import Mapping

from memopt.errors import BadInput
from memopt.optim.presets import PRESETS, Policy
from memopt.optim.roles import Role


def require_effect(optimizer: str, options: Mapping[str, object]) -> None:
    """Raises BadInput for a setting that `optimizer` has no use for; a value of None was not set."""
    for name, value in options.items():
        users = [key for key, preset in PRESETS.items() if any(_reads(preset.policy(role), name) for role in Role)]
        if value is not None and optimizer not in users:
            raise BadInput(
                f"{name} = {value!r} with optimizer = {optimizer!r}: only {', '.join(users)} use it; "
                "leave it out or choose one of them"
            )


def _reads(policy: Policy, name: str) -> bool:
    return policy.rule in ("sgd", "muon") if name == "momentum" else policy.projection is not None
