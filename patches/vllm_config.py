"""How memopt's vLLM plugin is configured: environment variables, which reach every process that vLLM starts.

`memopt serve` sets them; without them the plugin does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from memopt.errors import BadInput

Kernel = Literal["auto", "stock", "own"]

_KEEP = "MEMOPT_VLLM_KEY_KEEP"
_CHANNELS = "MEMOPT_VLLM_KEY_CHANNELS"
_RECENT = "MEMOPT_VLLM_KEY_RECENT"
_EXACT_PREFILL = "MEMOPT_VLLM_EXACT_PREFILL"
_KERNEL = "MEMOPT_VLLM_KERNEL"
RECEIPT = "MEMOPT_VLLM_RECEIPT"
"""Where the engine writes what it found (patches/vllm_guard.py); set by `memopt serve`."""
_CALIBRATE = "MEMOPT_VLLM_CALIBRATE"
_CALIBRATE_KEEP = "MEMOPT_VLLM_CALIBRATE_KEEP"
VARIABLES = (_KEEP, _CHANNELS, _RECENT, _EXACT_PREFILL, _KERNEL, _CALIBRATE, _CALIBRATE_KEEP, RECEIPT)
VARIABLE_PREFIX = "MEMOPT_VLLM_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinKeys:
    """What is kept of the keys in a vLLM server.

    `key_keep`: share of the key channels that is kept, in (0, 1]; 1 keeps the stock layout. `channels`: the channel
    file that says which (required below 1). `recent`: the last tokens whose keys stay whole, in a KV group of their
    own; 0: none. `exact_prefill`: the group keeps what was dropped until the prompt is done, so that a prompt in
    several chunks is computed with whole keys. `kernel`: "own" is memopt's, in torch on a CPU and in Triton on a GPU;
    "stock" is vLLM's, in C++ on a CPU and in Triton for keys and values of two widths on a GPU. "auto" takes the stock
    one on a CPU where it can be used, and the own one on a GPU.
    """

    key_keep: float
    channels: Path | None = None
    recent: int = 0
    exact_prefill: bool = False
    kernel: Kernel = "auto"

    def __post_init__(self) -> None:
        _check_share(self.key_keep)
        if self.key_keep < 1 and self.channels is None:
            raise BadInput(
                f"key_keep: {self.key_keep} needs a channel file that says which channels to keep; make one with "
                "memopt calibrate-keys and give it with --key-channels"
            )
        if self.recent < 0:
            raise BadInput(f"key_recent: {self.recent} is negative; write the number of tokens, 0 for none")
        if self.exact_prefill and self.recent == 0:
            raise BadInput("exact_prefill: needs a recent window to keep the channels in; set key_recent, 32 for one")
        if self.kernel not in get_args(Kernel):
            raise BadInput(f"kernel: {self.kernel!r} is not one of {', '.join(get_args(Kernel))}")
        if self.kernel == "stock" and self.recent > 0:
            raise BadInput("kernel: the stock kernel cannot add the recent window; use own, or key_recent 0")

    @property
    def thins(self) -> bool:
        """Whether anything is dropped at all."""
        return self.key_keep < 1

    @property
    def windowed(self) -> bool:
        """Whether there are dropped channels of recent tokens to keep, and to read."""
        return self.thins and self.recent > 0

    def environment(self) -> dict[str, str]:
        """The variables that carry this to another process."""
        given = {_KEEP: repr(self.key_keep), _KERNEL: self.kernel, _RECENT: str(self.recent)}
        given[_EXACT_PREFILL] = str(int(self.exact_prefill))
        if self.channels is not None:
            given[_CHANNELS] = str(self.channels.absolute())
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A server that keeps its keys whole, and writes to `path` which `keep` of their channels its prompts ask for."""

    path: Path
    keep: float

    def __post_init__(self) -> None:
        _check_share(self.keep)

    def environment(self) -> dict[str, str]:
        """The variables that carry this to another process."""
        return {_CALIBRATE: str(self.path.absolute()), _CALIBRATE_KEEP: repr(self.keep)}


def from_environment(environment: Mapping[str, str] = os.environ) -> ThinKeys | Calibration | None:
    """What the variables ask for; None when there are none. Raises BadInput for what cannot be read."""
    given = {name for name in environment if name.startswith(VARIABLE_PREFIX)} - {RECEIPT}
    if not given:
        return None
    unknown = sorted(given - set(VARIABLES))
    if unknown:
        raise BadInput(f"{unknown[0]} is not known; the variables are {', '.join(VARIABLES)}")
    if _CALIBRATE in given:
        more = sorted(given - {_CALIBRATE, _CALIBRATE_KEEP})
        if more:
            raise BadInput(f"{more[0]} and {_CALIBRATE} are both set, but who calibrates prunes nothing; unset one")
        return Calibration(path=Path(environment[_CALIBRATE]), keep=_number(environment, _CALIBRATE_KEEP))
    if _KEEP not in given:
        raise BadInput(f"{sorted(given)[0]} is set but {_KEEP} is not; set it to the share of key channels to keep")
    channels = environment.get(_CHANNELS)
    return ThinKeys(
        key_keep=_number(environment, _KEEP),
        channels=Path(channels) if channels else None,
        recent=_whole(environment, _RECENT),
        exact_prefill=_whole(environment, _EXACT_PREFILL) != 0,
        kernel=environment.get(_KERNEL, "auto"),  # type: ignore[arg-type]  # checked in __post_init__
    )


def _check_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise BadInput(f"key_keep: {keep} is not in (0, 1]; 0.6 keeps 60% of the key channels")


def _number(environment: Mapping[str, str], name: str) -> float:
    text = environment.get(name, "")
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"{name}: {text!r} is not a number; 0.6 keeps 60% of the key channels") from None


def _whole(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment.get(name, "0"))
    except ValueError:
        raise BadInput(f"{name}: {environment[name]!r} is not a whole number") from None


def configured() -> ThinKeys:
    """What the variables ask for, where the plugin is already at work."""
    keys = from_environment()
    if not isinstance(keys, ThinKeys):
        raise BadInput(f"{_KEEP} is no longer set in this process, but memopt's attention backend is in use")
    return keys
