"""LoRA through peft on a skeleton: the base stays frozen, adapters are the only parameters with gradients."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memopt.errors import BadInput

_BASE = ".base_layer"
_PREFIX = "base_model.model."
_EVERYWHERE = "all-linear"
"""peft's word for every linear layer but the head."""


@dataclass(frozen=True)
class Adapted:
    """A model with adapters in place. Names are those of `module.named_parameters()`."""

    module: nn.Module
    peft_model: Any

    def base(self, name: str) -> str:
        """The name a frozen parameter has in the checkpoint."""
        return name.replace(_BASE + ".", ".")

    def read(
        self, names: list[str], read_base: Callable[[list[str]], Mapping[str, torch.Tensor]], seed: int
    ) -> dict[str, torch.Tensor]:
        """Initial values: the base from the checkpoint, A drawn as peft does (kaiming uniform, a = sqrt 5), B zero."""
        params = dict(self.module.named_parameters())
        base = {self.base(n): n for n in names if not params[n].requires_grad}
        out = {base[k]: v for k, v in read_base(list(base)).items()} if base else {}
        for name in names:
            if params[name].requires_grad:
                out[name] = _initial(name, params[name].shape, seed)
        return out

    def write(self, directory: Path, tensors: Callable[[str], torch.Tensor], tokenizer: Any) -> None:
        """Fill a new directory with the adapters as peft stores them: adapter_model.safetensors,
        adapter_config.json. Raises OSError when the disk refuses."""
        from peft import get_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        state = {_PREFIX + n: tensors(n).clone() for n, p in self.module.named_parameters() if p.requires_grad}
        adapters = get_peft_model_state_dict(self.peft_model, state_dict=state)
        directory.mkdir(parents=True)
        file = directory / "adapter_model.safetensors"
        try:
            save_file(adapters, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(0, str(error), os.fspath(file)) from error
        config = copy.copy(self.peft_model.peft_config["default"])
        config.inference_mode = True
        config.save_pretrained(os.fspath(directory))
        if tokenizer is not None:
            tokenizer.save_pretrained(os.fspath(directory))


def adapt(
    module: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...] | None,
    base_name: str,
) -> Adapted:
    """Put LoRA adapters into a skeleton. Raises BadInput when peft is missing or knows no target modules."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise BadInput("--method lora needs peft: pip install 'memopt[hf]'") from None
    everywhere = target_modules == (_EVERYWHERE,)
    names = () if everywhere or target_modules is None else target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=_EVERYWHERE if everywhere else list(names) or None,
        # peft finds this out by itself, with a warning
        fan_in_fan_out=any(type(child).__name__ == "Conv1D" for child in module.modules()),
        base_model_name_or_path=base_name,
    )
    try:
        peft_model = get_peft_model(module, config)
    except ValueError as error:
        raise BadInput(
            f"LoRA cannot be placed ({str(error).splitlines()[0]}); name modules with --lora-target-modules, "
            "for instance q_proj,v_proj"
        ) from None
    _refuse_unplaced(module, names)
    _refuse_tables(module)
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    for child in module.modules():
        for key, param in list(child._parameters.items()):
            if param is not None and param.requires_grad and not param.is_meta:
                child._parameters[key] = nn.Parameter(param.detach().to("meta"))
    return Adapted(module, peft_model)


def _refuse_unplaced(module: nn.Module, target_modules: tuple[str, ...]) -> None:
    """peft is content when one of the names is found; a name misspelt would not be trained, in silence."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    placed = [name for name, child in module.named_modules() if isinstance(child, BaseTunerLayer)]
    for wanted in target_modules:
        if not any(n == wanted or n.endswith(f".{wanted}") for n in placed):
            raise BadInput(f"LoRA cannot be placed: the model has no module {wanted!r} that it can adapt; leave it out")


def _refuse_tables(module: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for what, table in (
        ("input embedding", module.get_input_embeddings()),  # type: ignore[operator]
        ("output head", module.get_output_embeddings()),  # type: ignore[operator]
    ):
        if isinstance(table, BaseTunerLayer):
            name = next(n for n, child in module.named_modules() if child is table)
            raise BadInput(
                f"LoRA on the {what} ({name}) cannot be streamed; leave {name.rpartition('.')[2]} out of "
                "--lora-target-modules"
            )


def _initial(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    if "lora_B" in name:
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    out = torch.empty(shape)
    nn.init.kaiming_uniform_(out, a=math.sqrt(5), generator=generator)
    return out
