"""The optimizer for a model, or for a Hugging Face Trainer, by the name of a preset."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from memopt.budget import Budget
from memopt.errors import BadInput
from memopt.ledger import Ledger
from memopt.optim import grouping, presets, routing
from memopt.optim.element import DeviceKernels
from memopt.optim.layerwise import Clipping
from memopt.optim.optimizer import NonFinitePolicy, Optimizer

if TYPE_CHECKING:
    from transformers import Trainer


def build_optimizer(
    model: torch.nn.Module,
    preset: str = "adamw",
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    nonfinite: NonFinitePolicy = "raise",
    budget: Budget | str | None = None,
    ledger: Ledger | None = None,
    seed: int = 0,
    **options: Any,
) -> Optimizer:
    """A torch optimizer for all parameters of `model` that require a gradient.

    `preset` is a name of `memopt.optim.presets.PRESETS`; `options` are those of `presets.resolve`: `betas`, `eps`,
    `momentum`, `nesterov`, `state_dtype`, `rank`, `update_proj_gap`, `scale`, `proj_type`, `overrides`, and so on.
    Biases and norms get no weight decay. `budget` (`"dram=2GiB"`) or `ledger` limits the states: more raises OverBudget
    at the first step, before any parameter changes. Raises BadInput for everything that cannot be used.
    """
    groups = grouping.group(_assign(model, preset, options), weight_decay)
    return Optimizer(
        groups,
        preset=preset,
        lr=lr,
        nonfinite=nonfinite,
        ledger=_ledger(budget, ledger),
        kernels=_kernels(model),
        seed=seed,
    )


def attach_optimizer(
    trainer: Trainer,
    preset: str = "adamw",
    *,
    layerwise: bool | Clipping = False,
    spectra: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Callable[[], None]:
    """Have a Hugging Face Trainer train with the optimizer `preset`, and print which parameters get what.

    Learning rate, weight decay, betas and eps come from the Trainer's arguments unless given in `options`, which are
    those of `build_optimizer`. `layerwise` updates each parameter during the backward pass and frees its gradient; its
    clipping is "none", "per_param" or "previous_norm" (True: previous_norm if the Trainer clips, else none; the limits
    are in memopt.optim.layerwise.Layerwise). `spectra` logs the isotropy of weight matrices by role. At logging steps
    the log gets `optimizer_state_mib`, and budgets if one was given.

    Returns a function that undoes it. Raises BadInput, with the Trainer as it was.
    """
    from memopt.patches import hf_trainer

    hf_trainer.require_attachable(trainer)

    def settings() -> dict[str, Any]:
        return {**hf_trainer.hyperparameters(trainer), **options}

    named = {k: v for k, v in settings().items() if k not in _BUILD_OPTIONS}
    assignments = _assign(trainer.model, preset, named)
    if hf_trainer.is_deepspeed(trainer):
        presets.require_elementwise(preset, _FLAT)
    build_optimizer(
        trainer.model, preset, **settings()
    )  # what cannot be used is refused here, not when training begins
    undo = hf_trainer.attach(
        trainer,
        lambda model: build_optimizer(model, preset, **settings()),
        clipping=_clipping(layerwise, float(trainer.args.max_grad_norm or 0.0)),
        spectra=spectra,
    )
    if not quiet and trainer.is_world_process_zero():
        print(grouping.describe(preset, assignments), file=sys.stderr)
    return undo


_FLAT = (
    'DeepSpeed ZeRO makes vectors of them; use FSDP2, or DeepSpeed\'s own Muon ("optimizer": {"type": "Muon"} in its '
    "configuration)"
)
_BUILD_OPTIONS = {"lr", "weight_decay", "nonfinite", "budget", "ledger", "seed"}


def _assign(model: torch.nn.Module, preset: str, options: dict[str, Any]) -> list[presets.Assignment]:
    return presets.resolve(preset, routing.route(model), **options)


def _clipping(layerwise: bool | Literal["none", "per_param", "previous_norm"], max_norm: float) -> Clipping | None:
    if layerwise is False:
        return None
    if layerwise is True:
        return "previous_norm" if max_norm > 0 else "none"
    return layerwise


def _ledger(budget: Budget | str | None, ledger: Ledger | None) -> Ledger | None:
    if budget is None or ledger is None:
        return Ledger(Budget.parse(budget) if isinstance(budget, str) else budget) if budget is not None else ledger
    raise BadInput("budget and ledger: give one of them; a ledger has its own budget")


def _kernels(model: torch.nn.Module) -> DeviceKernels | None:
    if not any(param.device.type == "cuda" for param in model.parameters()):
        return None
    from memopt.patches import bnb_kernels

    return bnb_kernels.available()
