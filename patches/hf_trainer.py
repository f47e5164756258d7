"""A Hugging Face Trainer (transformers 5.16 and later, trl's trainers too) with memopt's optimizer.

Uses the Trainer's own extension points: `optimizer_cls_and_kwargs`, which is read when training begins, and a callback.
Nothing is replaced, so undo is taking both away.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from memopt.errors import BadInput
from memopt.optim.layerwise import Clipping, Layerwise
from memopt.optim.optimizer import Optimizer
from memopt.optim.sharding import whole
from memopt.optim.spectrum import spectrum
from memopt.patches.hf_callback import LoggingCallback
from memopt.tiers import Tier

_MIB = 2**20


class OptimizerCallback(LoggingCallback):
    """Logs state bytes, budgets and skipped steps at logging steps; runs the layer-wise update; logs spectra."""

    def __init__(self, trainer: Trainer, *, clipping: Clipping | None, max_norm: float, spectra: bool) -> None:
        self._trainer, self._clipping, self._max_norm, self._spectra = trainer, clipping, max_norm, spectra
        self.optimizer: Optimizer | None = None
        self.layerwise: Layerwise | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Find the optimizer the Trainer made; parameters are in their final form now, so hooks can be set."""
        self.on_train_end(args, state, control)  # a run that was interrupted has left its hooks
        self.optimizer = ours(self._trainer.optimizer)
        if self.optimizer is None:
            made = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
            raise BadInput(
                f"{type(self._trainer).__name__} made its own optimizer ({type(made).__name__}) "
                "although memopt.attach_optimizer was called; its create_optimizer ignores `optimizer_cls_and_kwargs`: "
                "pass `optimizers=(memopt.build_optimizer(model, ...), None)` instead"
            )
        if self._clipping is not None:
            if isinstance(self._trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel):
                raise BadInput(_NO_DDP)
            gradient_state = self._trainer.accelerator.gradient_state
            self.layerwise = Layerwise(
                self.optimizer,
                gate=lambda: bool(gradient_state.sync_gradients),
                clipping=self._clipping,
                max_norm=self._max_norm,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the hooks off the parameters."""
        if self.layerwise is not None:
            self.layerwise.close()
            self.layerwise = None

    def numbers(self) -> dict[str, float]:
        """What is added to a log entry; bytes in MiB."""
        if self.optimizer is None:
            return {}
        out: dict[str, float] = {"optimizer_state_mib": self.optimizer.state_bytes() / _MIB}
        ledger = self.optimizer.ledger
        for tier in (Tier.GPU, Tier.DRAM):
            budget = ledger.budget.bytes_of(tier)
            if budget is not None:
                out[f"{tier.value.lower()}_charged_mib"] = ledger.charged_bytes(tier) / _MIB
                out[f"{tier.value.lower()}_budget_mib"] = budget / _MIB
        if self.optimizer.nonfinite == "skip":
            out["skipped_steps"] = self.optimizer.skipped_steps
        if self.layerwise is not None:
            out["grad_norm"] = self.layerwise.norm
        if self._spectra:
            out |= mean_spectra(self.optimizer)
        return out


def attach(
    trainer: Trainer,
    make: Callable[[torch.nn.Module], Optimizer],
    *,
    clipping: Clipping | None,
    spectra: bool = False,
) -> Callable[[], None]:
    """Have `trainer` train with the optimizer `make(model)` returns. Returns the undo.

    `clipping` None is the ordinary step; otherwise parameters are updated during the backward pass, and the Trainer's
    own clipping, which would find no gradients, is turned off. Raises BadInput.
    """
    require_attachable(trainer)
    args = trainer.args
    max_norm, before = float(args.max_grad_norm or 0.0), (args.max_grad_norm, trainer.optimizer_cls_and_kwargs)
    if clipping is not None:
        _check_layerwise(trainer, clipping, max_norm)
        args.max_grad_norm = 0.0
    callback = OptimizerCallback(trainer, clipping=clipping, max_norm=max_norm or 1.0, spectra=spectra)
    trainer.optimizer_cls_and_kwargs = (lambda: lambda model, **_: make(model), {})
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())  # before those that print and report what is logged

    def undo() -> None:
        if callback not in trainer.callback_handler.callbacks:
            return
        callback.on_train_end(args, trainer.state, trainer.control)
        trainer.remove_callback(callback)
        args.max_grad_norm, trainer.optimizer_cls_and_kwargs = before
        if ours(trainer.optimizer) is not None:
            trainer.optimizer = trainer.lr_scheduler = None

    return undo


def require_attachable(trainer: Trainer) -> None:
    """Refuse, with a reason, what memopt's optimizer cannot be attached to."""
    if trainer.optimizer is not None:
        raise BadInput(
            f"this Trainer already has an optimizer ({type(trainer.optimizer).__name__}); call memopt.attach_optimizer "
            "before training begins, on a Trainer made without `optimizers`"
        )
    if trainer.optimizer_cls_and_kwargs is not None:
        raise BadInput(
            "this Trainer was given `optimizer_cls_and_kwargs`, or memopt.attach_optimizer was called before; it can "
            "have one optimizer"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
        raise BadInput(
            "FSDP version 1 flattens parameters, so that no rule can see a matrix; use version 2 (fsdp_version: 2 in "
            "`fsdp_config`)"
        )


def is_deepspeed(trainer: Trainer) -> bool:
    """Whether DeepSpeed will flatten the parameters."""
    return bool(trainer.is_deepspeed_enabled)


def hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """lr, weight decay, and betas and eps where they are not TrainingArguments' defaults (else the preset's hold)."""
    args, default = trainer.args, {field.name: field.default for field in _fields(trainer.args)}
    found: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if (args.adam_beta1, args.adam_beta2) != (default.get("adam_beta1"), default.get("adam_beta2")):
        found["betas"] = (args.adam_beta1, args.adam_beta2)
    if args.adam_epsilon != default.get("adam_epsilon"):
        found["eps"] = args.adam_epsilon
    return found


def ours(optimizer: Any) -> Optimizer | None:
    """memopt's optimizer inside accelerate's wrapper, or None."""
    while optimizer is not None and not isinstance(optimizer, Optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def mean_spectra(optimizer: Optimizer) -> Mapping[str, float]:
    """Isotropy of the weight matrices, averaged by role (`spectrum/v/entropy`, ...)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _, param, route in optimizer.placed_params():
        for routed in route.parts:
            if param.ndim == 2 and routed.part.role in _SPECTRA:
                view = routed.part.view(whole(param.detach()))
                matrix = view.reshape(-1, view.shape[-1]).float()
                found.setdefault(routed.part.role.value, []).append(spectrum(matrix).to_dict())
    means = {}
    for role, rows in found.items():
        for name in rows[0]:
            values = [row[name] for row in rows if row[name] is not None]
            if values:
                means[f"spectrum/{role}/{name}"] = sum(values) / len(values)
    return means


_NO_DDP = (
    "layerwise: DistributedDataParallel averages gradients in buckets after the hooks have run; use FSDP2, or train "
    "without layerwise"
)
_SPECTRA = {"q", "k", "v", "o", "ffn-up", "ffn-gate", "ffn-down"}


def _fields(args: TrainingArguments) -> tuple[Any, ...]:
    return tuple(args.__dataclass_fields__.values())


def _check_layerwise(trainer: Trainer, clipping: Clipping, max_norm: float) -> None:
    if clipping not in get_args(Clipping):
        raise BadInput(f"layerwise: {clipping!r} is not True, False or one of {', '.join(get_args(Clipping))}")
    if getattr(trainer.accelerator, "scaler", None) is not None:
        raise BadInput("layerwise: fp16 loss scaling looks at gradients after they were used; train in bf16")
    if is_deepspeed(trainer):
        raise BadInput("layerwise: DeepSpeed runs its own backward pass; train without layerwise, or with FSDP2")
    if trainer.args.parallel_mode.value == "distributed" and not trainer.is_fsdp_enabled:
        raise BadInput(_NO_DDP)
    if max_norm and clipping == "none":
        warnings.warn(
            f"layerwise: gradients are not clipped (max_grad_norm={max_norm} needs the global norm, which is known "
            "only after the updates); choose clipping 'previous_norm' or 'per_param'",
            stacklevel=4,
        )
    if trainer.args.gradient_accumulation_steps > 1:
        warnings.warn(
            "layerwise: with gradient accumulation gradients are held until the last micro-batch, which saves nothing",
            stacklevel=4,
        )
