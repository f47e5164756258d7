"""A thin cache's way into a Hugging Face model: attention functions and masks, set on a model and taken off again.

`Cache.update` gives the attention function whatever the cache layer returns, and nothing in between looks at it (in
every model this cache accepts): a thin layer returns a handle that carries the layer. For everything that is not such a
handle (another cache, sliding layers, no cache at all) the functions here are the model's own.
Written for transformers 5.16 to 5.19.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from memopt.errors import BadInput

PREFIX = "memopt_thin_"
_BASES = ("sdpa", "eager")

Stock = Callable[..., tuple[Tensor, Tensor | None]]


class ThinLayerLike(Protocol):
    """What the attention function needs of a cache layer."""

    def attend(
        self, stock: Stock, module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the newest queries over everything cached."""


class ThinKeys:
    """Stands for a layer's keys (and values) between the cache and the attention function; has a tensor's measures."""

    def __init__(self, layer: ThinLayerLike, like: Tensor, tokens: int, values: Tensor) -> None:
        self.layer = layer
        self.values = values
        """What was handed out beside them."""
        self.shape = (*like.shape[:2], tokens, like.shape[3])
        self.dtype, self.device = like.dtype, like.device

    def size(self, dim: int | None = None) -> Any:
        """As `Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # probes of copy, pickle and torch
            raise AttributeError(name)
        raise self._touched(name)

    def __getitem__(self, index: Any) -> Any:
        raise self._touched("a slice")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise cls._touched(getattr(function, "__name__", str(function)))

    @staticmethod
    def _touched(what: str) -> BadInput:
        return BadInput(
            f"the cached keys of a ThinKCache reached code that does not know it ({what}): the cache was closed, the"
            " model's attention implementation was changed after the cache was made, or the model's own code works on"
            " its keys before attention, and then ThinKCache cannot serve it"
        )


def attach(model: PreTrainedModel) -> Callable[[], None]:
    """Give `model` the attention functions; the function that undoes it, once. Nested: the last undo restores.

    Raises:
        BadInput: the model's attention is not sdpa or eager, or cannot be set.
    """
    _register()
    held = _held.get(model)
    if held is None or not is_attached(model):  # an older cache may be alive, and the implementation changed since
        # a copied model, or one that shares its configuration with another, is called as the other is now
        base = (model.config.get_text_config(decoder=True)._attn_implementation or "eager").removeprefix(PREFIX)
        if base not in _BASES:
            raise BadInput(
                f"ThinKCache works with attn_implementation 'sdpa' or 'eager', not {base!r}:"
                " model.set_attn_implementation('sdpa') first"
            )
        model.set_attn_implementation(PREFIX + base)
        if model.config.get_text_config(decoder=True)._attn_implementation != PREFIX + base:
            model.set_attn_implementation(base)
            raise BadInput(
                f"{type(model).__name__} does not take attention functions from transformers' AttentionInterface;"
                " ThinKCache cannot serve it"
            )
        if held is None:
            held = _held[model] = _Held(base)
        held.base = base
    held.count += 1
    reference, done = weakref.ref(model), False

    def undo() -> None:
        nonlocal done
        model = reference()
        if done or model is None:
            return
        done = True
        held.count -= 1
        if held.count == 0:
            _held.pop(model, None)
            # a person may have set another implementation since; that choice stands
            if str(model.config.get_text_config(decoder=True)._attn_implementation).startswith(PREFIX):
                model.set_attn_implementation(held.base)

    return undo


def is_attached(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through the functions here now."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation).startswith(PREFIX)


class _Held:
    def __init__(self, base: str) -> None:
        self.base, self.count = base, 0


_held: weakref.WeakKeyDictionary[PreTrainedModel, _Held] = weakref.WeakKeyDictionary()


def _sdpa(
    module: nn.Module, query: Tensor, key: Any, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    return _dispatch(sdpa_attention_forward, module, query, key, value, attention_mask, options)


def _eager(
    module: nn.Module, query: Tensor, key: Any, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    # every modeling file has its own, with its own extras
    home = sys.modules.get(type(module).__module__) or importlib.import_module(type(module).__module__)
    stock = getattr(home, "eager_attention_forward", None)
    if stock is None:
        raise BadInput(f"{home.__name__} has no eager_attention_forward; model.set_attn_implementation('sdpa') first")
    return _dispatch(stock, module, query, key, value, attention_mask, options)


def _dispatch(
    stock: Any, module: nn.Module, query: Tensor, key: Any, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Any:
    if not isinstance(key, ThinKeys):
        return stock(module, query, key, value, mask, **options)
    if value is not key.values:
        raise BadInput(f"{type(module).__name__} changes its values behind the cache; ThinKCache cannot serve it")
    return key.layer.attend(cast(Stock, stock), module, query, mask, options)


def _register() -> None:
    for base, function, mask in (("sdpa", _sdpa, sdpa_mask), ("eager", _eager, eager_mask)):
        AttentionInterface.register(PREFIX + base, function)
        # without a mask function of the same name, transformers would silently make no mask at all
        AttentionMaskInterface.register(PREFIX + base, mask)
