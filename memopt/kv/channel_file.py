"""The file of static channel choices: one set per layer and KV head, for one model and no other.

A safetensors file: `keys.<layer>` is (K, C) int16, channels in rising order; the metadata says which model the sets
were calibrated on, so that the file of another model is refused instead of silently pruning the wrong channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from memopt.atomic import write_bytes
from memopt.errors import BadInput

FORMAT = "memopt.key-channels/1"
_PREFIX = "keys."


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What decides whether channel sets fit a model; all but `weights` can be read off a model's configuration."""

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    rope_theta: float
    weights: str = ""  # digest of a sample of the weights ("" = not known); compared only where both sides know it

    @property
    def digest(self) -> str:
        """SHA-256 over the configuration's part (not `weights`), 16 hexadecimal digits."""
        content = {name: value for name, value in asdict(self).items() if name != "weights"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class ChannelSets:
    """Static key channels of a model. `keys[layer]` is (K, C) int64, rising; layers without an entry are not pruned."""

    model: ModelIdentity
    keep: float  # the share that was asked for
    keys: Mapping[int, Tensor]
    tokens: int = 0  # how many tokens the calibration saw

    def __post_init__(self) -> None:
        if not self.keys:
            raise BadInput("channel sets without a single layer")
        for layer, sets in self.keys.items():
            _check_sets(layer, sets, self.model)
        if len({sets.shape[-1] for sets in self.keys.values()}) > 1:
            raise BadInput("the channels must be as many in every layer")

    @property
    def count(self) -> int:
        """Channels kept per head; the same in every layer."""
        return next(iter(self.keys.values())).shape[-1]


def save_channels(path: Path, sets: ChannelSets) -> None:
    """Write the file; an existing one is replaced at once and never half written.

    Raises:
        BadInput: the place cannot be written.
    """
    tensors = {f"{_PREFIX}{layer}": channels.to(torch.int16).contiguous() for layer, channels in sets.keys.items()}
    about = {
        "format": FORMAT,
        "digest": sets.model.digest,
        "model": json.dumps(asdict(sets.model), sort_keys=True),
        "keep": repr(sets.keep),
        "count": str(sets.count),
        "tokens": str(sets.tokens),
    }
    try:
        write_bytes(path, save(tensors, metadata=about))
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); give another path") from error


def load_channels(path: Path, model: ModelIdentity | None = None) -> ChannelSets:
    """Read a file and check it against `model` (None: only against itself).

    Raises:
        BadInput: no such file, not a file of channels, damaged, of other shapes, or of another model.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; make one with: memopt calibrate-keys MODEL --data FILE --out {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator of its own
    except (safetensors.SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a safetensors file of key channels ({error})") from error
    if about.get("format") != FORMAT:
        raise BadInput(f"{path} is not a file of key channels: its format is {about.get('format')!r}, not {FORMAT!r}")
    try:
        known = {field.name for field in fields(ModelIdentity)}
        owner = ModelIdentity(**{k: v for k, v in json.loads(about["model"]).items() if k in known})
        keys = {int(name.removeprefix(_PREFIX)): found[name].long() for name in found if name.startswith(_PREFIX)}
        sets = ChannelSets(model=owner, keep=float(about["keep"]), keys=keys, tokens=int(about.get("tokens", 0)))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: its metadata is damaged ({error!r}); calibrate again") from error
    if owner.digest != about.get("digest"):
        raise BadInput(f"{path}: its metadata contradicts its own digest; calibrate again")
    if model is not None:
        check_same_model(path, owner, model)
    return sets


def check_same_model(path: Path, owner: ModelIdentity, model: ModelIdentity) -> None:
    """Refuse the channels of `owner` for `model` where they differ, and name what differs.

    Raises:
        BadInput: the configurations differ, or both know their weights and these differ.
    """
    remedy = f"calibrate for this model: memopt calibrate-keys MODEL --data FILE --out {path}"
    if owner.digest != model.digest:
        differing = ", ".join(
            f"{field.name} {getattr(owner, field.name)} != {getattr(model, field.name)}"
            for field in fields(ModelIdentity)
            if field.name != "weights" and getattr(owner, field.name) != getattr(model, field.name)
        )
        raise BadInput(f"{path} belongs to another model ({differing}); {remedy}")
    if owner.weights and model.weights and owner.weights != model.weights:
        raise BadInput(
            f"{path} belongs to other weights of the same shape ({owner.weights} != {model.weights}); {remedy}"
        )


def _check_sets(layer: int, sets: Tensor, model: ModelIdentity) -> None:
    if not 0 <= layer < model.layers:
        raise BadInput(f"channels for layer {layer} of a model with {model.layers} layers")
    if sets.dim() != 2 or sets.shape[0] != model.kv_heads or not 1 <= sets.shape[1] <= model.head_dim:
        raise BadInput(
            f"layer {layer}: channels of shape {tuple(sets.shape)}, where ({model.kv_heads}, at most {model.head_dim})"
            " is expected"
        )
    steps = sets.long().diff(dim=-1)
    if sets.min() < 0 or sets.max() >= model.head_dim or bool((steps <= 0).any()):
        raise BadInput(f"layer {layer}: channels must rise and lie in [0, {model.head_dim})")
