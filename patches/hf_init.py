"""A Hugging Face model without its weights, initial weights for a part of it, and its weight-decay groups."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from memopt.errors import BadInput

_CONSTRUCTION = threading.RLock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While open, each parameter that any module registers goes to the meta device; buffers stay real. Not nested.

    Transformers' own meta construction empties the buffers too (rotary frequencies, embedding scales).
    """
    with _CONSTRUCTION:
        register = nn.Module.register_parameter

        def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and not param.is_meta:
                kept = param.__dict__
                param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
                param.__dict__.update(kept)
            # one that is already there is passed on as the same object, which is how ties survive
            register(module, name, param)

        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty` allocate nothing: the kernel may refuse an embedding larger than the memory it sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_skeleton(
    config: Any, *, attn_implementation: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The causal language model of `config`: parameters on meta, ties kept, buffers real on CPU, in train mode.

    `dtype` is that of the parameters and of the buffers made in the default type (None: the one in `config`). Give the
    type computed in: some models round their embedding scale to it. `config` is copied, never changed.
    Raises BadInput when transformers has no causal language model for it.
    """
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if dtype is not None:
        options["dtype"] = dtype
    try:
        with _EmptyOnMeta():
            model = _construct(config, options)
        if any(buffer.is_meta for buffer in model.buffers()):
            model = _construct(config, options)
    except (ValueError, ImportError, AttributeError) as error:
        kind = getattr(config, "model_type", type(config).__name__)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"model type {kind!r}: no causal language model can be built from its config ({lines[0]})"
        ) from error
    return model.train()


def _construct(config: Any, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False, **options)
    return model


def random_init(
    model: nn.Module, submodule_path: str, seed: int, *, names: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Initial values, on CPU, of the parameters of one submodule ("" is the whole model), as the model draws them.

    `names` restricts it to some parameters (full names). The values depend on the seed, the path and `names` alone,
    not on what was drawn before. They come under the names of `model.named_parameters()`; the model is left as found.
    Raises BadInput for an unknown path and for a parameter that transformers' `_init_weights` leaves unset.
    """
    try:
        part = model.get_submodule(submodule_path)
    except AttributeError as error:
        raise BadInput(f"{type(model).__name__} has no submodule {submodule_path!r}") from error
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    homes = [
        (module, key, parameter)
        for module in part.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and (names is None or canonical[id(parameter)] in names)
    ]
    drawn: dict[int, nn.Parameter] = {}
    try:
        for module, key, parameter in homes:
            empty = torch.full(parameter.shape, float("nan"), dtype=parameter.dtype, device="cpu")
            module._parameters[key] = drawn.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mix(seed, submodule_path))
            _initialise(model, submodule_path)
        for module, key, _ in homes:
            _require_drawn(module, key, submodule_path)
    finally:
        for module, key, parameter in homes:
            module._parameters[key] = parameter
    return {canonical[key]: parameter.data for key, parameter in drawn.items()}


def decay_names(model: nn.Module) -> set[str]:
    """Names of the parameters that get weight decay when transformers' Trainer (the installed one) trains `model`."""
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = _trainer_patterns()
    if patterns is not None:
        names = get_parameter_names(model, [nn.LayerNorm], patterns)
    else:
        from transformers import Trainer

        names = Trainer.get_decay_parameter_names(None, model)
    return set(names) & {name for name, _ in model.named_parameters()}


def _trainer_patterns() -> list[str] | None:
    """The name patterns in the installed Trainer's source; None where it no longer decides the way we know.

    Importing the Trainer costs 50 MiB that are never given back (transformers 5.19), so its text is read instead.
    """
    spec = importlib.util.find_spec("transformers.trainer")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).read_text(encoding="utf-8")
    found = re.search(
        r"def get_decay_parameter_names\(self, model[^\n]*\n(?:\s*\"{3}.*?\"{3}\n)?"
        r"\s*forbidden_name_patterns = (\[[^\n]*\])\n"
        r"\s*decay_parameters = get_parameter_names\(model, \[nn\.LayerNorm\], forbidden_name_patterns\)\n"
        r"\s*return decay_parameters\n",
        text,
        re.DOTALL,
    )
    if found is None:
        return None
    patterns: list[str] = ast.literal_eval(found[1])
    return patterns


def _initialise(model: Any, path: str) -> None:
    """Run `_init_weights` of the model that owns them on the modules of the part, children first, then on its parents.

    As PreTrainedModel.initialize_weights does for the whole model; what is on meta stays untouched.
    """
    owner = model
    parents = [model]
    for step in path.split(".") if path else []:
        parents.append(getattr(parents[-1], step))
    for parent in parents:
        owner = parent if hasattr(parent, "_init_weights") else owner

    def visit(module: Any, owner: Any) -> None:
        owner = module if hasattr(module, "_init_weights") else owner
        for child in module.children():
            visit(child, owner)
        owner._init_weights(module)

    visit(parents[-1], owner)
    # a parent may set weights deep inside it (the scaled projections of GPT-like models)
    for depth in range(len(parents) - 2, -1, -1):
        above = [parent for parent in parents[: depth + 1] if hasattr(parent, "_init_weights")]
        above[-1]._init_weights(parents[depth])


def _require_drawn(module: nn.Module, key: str, path: str) -> None:
    parameter = module._parameters[key]
    if parameter is not None and parameter.numel() and bool(parameter.aminmax()[0].isnan()):
        raise BadInput(
            f"{key} of {type(module).__name__} in {path!r} gets no initial value from transformers; "
            "start from a pretrained checkpoint"
        )


def _mix(seed: int, path: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
