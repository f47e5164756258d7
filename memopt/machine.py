"""What this host has: capacities and bandwidths, measured or assumed by a profile."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from memopt import cgroups
from memopt.errors import BadInput
from memopt.tiers import Tier
from memopt.units import exact_bytes, format_bytes, parse_bytes

_PROFILES = "memopt.profiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Capacities (bytes) and bandwidths (bytes per second) of one host. None = not known, or not there.

    `unified`: GPU and DRAM are one pool, counted once, in `dram_bytes`; `gpu_bytes` is then None.
    `cpu_flops`, `gpu_flops`: floating-point operations per second of a large matrix product, float32 on the CPU's cores
    together and bfloat16 on the GPU. `dram_per_s`, `gpu_memory_per_s`: bytes per second at which a matrix-vector
    product reads the matrix.
    `ssd_mixed_per_s`: reads and writes at once, both directions added. `assumed`: numbers of a profile, not measured.
    """

    name: str
    assumed: bool = False
    cpu_count: int = 1
    gpu_name: str | None = None
    gpu_bytes: int | None = None
    dram_bytes: int | None = None
    ssd_bytes: int | None = None
    unified: bool = False
    ssd_read_per_s: int | None = None
    ssd_write_per_s: int | None = None
    ssd_mixed_per_s: int | None = None
    ssd_read_iops: int | None = None
    ssd_endurance_bytes: int | None = None
    h2d_per_s: int | None = None
    d2h_per_s: int | None = None
    cpu_flops: int | None = None
    gpu_flops: int | None = None
    dram_per_s: int | None = None
    gpu_memory_per_s: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
                raise BadInput(
                    f"machine {self.name!r}: {field.name} = {value} must be positive; leave out what is not known"
                )
        if self.unified and self.gpu_bytes is not None:
            raise BadInput(f"machine {self.name!r}: unified memory is one pool; give dram_bytes only, not gpu_bytes")

    def capacity_bytes(self, tier: Tier) -> int | None:
        """Bytes of a tier; with unified memory the GPU's capacity is the one pool's."""
        if tier is Tier.GPU:
            return self.dram_bytes if self.unified else self.gpu_bytes
        return self.dram_bytes if tier is Tier.DRAM else self.ssd_bytes

    @classmethod
    def load(cls, name_or_path: str | Path) -> Machine:
        """A machine from a preset's name or a TOML file's path. Raises BadInput that lists the presets."""
        return cls.from_dict(_machine_table(read_profile(name_or_path)), where=str(name_or_path))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], *, where: str = "machine") -> Machine:
        """A machine from field names; sizes are ints or text like "52GiB". Raises BadInput naming the field."""
        hints = get_type_hints(cls)
        unknown = sorted(set(table) - set(hints))
        if unknown:
            raise BadInput(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(hints)}")
        if "name" not in table:
            raise BadInput(f"{where}: the field 'name' is missing")
        return cls(**{key: _value(key, hints[key], value, where) for key, value in table.items()})

    @classmethod
    def capacities(cls, directory: str | Path | None = None) -> Machine:
        """What can be known at once, without measuring: memory within container limits, free space, CPUs, GPU.

        `ssd_bytes` is the free space of `directory` (default: the current one). Bandwidths stay None.
        """
        total, note = dram_capacity()
        gpu_name, gpu_bytes, unified = _gpu(total)
        notes = [note]
        if unified:
            notes.append("the GPU shares the one memory pool counted under DRAM")
        where = Path.cwd() if directory is None else _existing(Path(directory))
        space = os.statvfs(where)
        return cls(
            name=os.uname().nodename,
            cpu_count=cgroups.whole_cpus(len(os.sched_getaffinity(0)), cgroups.cpu_limit()),
            gpu_name=gpu_name,
            gpu_bytes=gpu_bytes,
            dram_bytes=total,
            ssd_bytes=(space.f_bavail * space.f_frsize) or None,
            unified=unified,
            notes=tuple(notes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, all fields; `from_dict` reads it back."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

    def to_toml(self) -> str:
        """A profile for `--machine`; unknown fields are left out."""
        lines = []
        for key, value in self.to_dict().items():
            if value is None or value == []:
                continue
            comment = f"  # {format_bytes(value)}" if key.endswith(("_bytes", "_per_s")) else ""
            lines.append(f"{key} = {_toml(key, value)}{comment}")
        return "\n".join(lines) + "\n"


def profile_names() -> list[str]:
    """The presets that come with memopt."""
    files = resources.files(_PROFILES).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def read_profile(name_or_path: str | Path) -> dict[str, Any]:
    """The parsed TOML of a preset or a file. Raises BadInput when there is none or it cannot be read."""
    text = str(name_or_path)
    try:
        if text in profile_names():
            return tomllib.loads(resources.files(_PROFILES).joinpath(f"{text}.toml").read_text(encoding="utf-8"))
        path = Path(text)
        if not path.is_file():
            raise BadInput(f"machine {text!r}: neither a preset ({', '.join(profile_names())}) nor a file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"machine {text!r}: cannot be read as TOML ({error}); `memopt probe` prints one") from error


def dram_capacity(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes of memory this process may use, and a sentence that says what sets the limit."""
    total = _mem_total(root)
    limit = cgroups.memory_limit(root)
    if limit is not None and limit.limit_bytes < total:
        return (
            limit.limit_bytes,
            f"DRAM is limited by the container to {format_bytes(limit.limit_bytes)} ({limit.file})",
        )
    return total, f"DRAM is the host's {format_bytes(total)}; no container limit below it"


def _mem_total(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no MemTotal in {root / 'proc/meminfo'}")


def _gpu(dram_bytes: int) -> tuple[str | None, int | None, bool]:
    """(name, bytes, unified) of the first CUDA device torch may use."""
    import torch  # here: reading a profile or a budget must not cost an import of torch

    if not torch.cuda.is_available():
        return None, None, False
    device = torch.cuda.get_device_properties(0)
    # an integrated GPU (Jetson, GB10) has no memory of its own: its "total" is the host's pool
    if bool(getattr(device, "is_integrated", False)):
        return device.name, None, True
    return device.name, _nvml_total(device) or int(device.total_memory), False


def _nvml_total(device: Any) -> int | None:
    """What the driver says the card has free for use, when NVML is there and knows this very device."""
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{device.uuid}")
            return min(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total), int(device.total_memory))
        finally:
            pynvml.nvmlShutdown()
    return None


def _existing(directory: Path) -> Path:
    """The directory, or its nearest parent that exists: a run directory is often made later."""
    for candidate in (directory.absolute(), *directory.absolute().parents):
        if candidate.is_dir():
            return candidate
    return Path("/")


def _machine_table(profile: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in profile.items() if key != "budget"}


def _value(key: str, hint: Any, value: Any, where: str) -> Any:
    if value is None and type(None) in getattr(hint, "__args__", ()):
        return None
    if key.endswith(("_bytes", "_per_s")):
        return parse_bytes(value, field=f"{where}: {key}")
    wanted = next((kind for kind in (bool, int, str) if _accepts(hint, kind)), None)
    if wanted is not None:
        if type(value) is not wanted:
            raise BadInput(f"{where}: {key} = {value!r} must be {wanted.__name__}")
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(note, str) for note in value):
        raise BadInput(f"{where}: {key} = {value!r} must be a list of text")
    return tuple(value)


def _accepts(hint: Any, kind: type) -> bool:
    return hint is kind or (isinstance(hint, types.UnionType) and kind in hint.__args__)


def _toml(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f'"{exact_bytes(value)}"' if key.endswith(("_bytes", "_per_s")) else str(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml("", item) for item in value) + "]"
    return '"' + "".join(_toml_char(char) for char in str(value)) + '"'


def _toml_char(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\u{ord(char):04x}"
