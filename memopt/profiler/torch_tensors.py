"""Which storages stand behind tensors: views and ties once, local shards, every part of quantised weights."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memopt.tiers import Tier

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# A quantisation state may hold a state that holds a table; nothing that is met in practice nests deeper.
_DEPTH = 6
_LEAVES: tuple[type, ...] = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    torch.dtype,
    torch.device,
    torch.Size,
    types.ModuleType,
)
_LEAVES += (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
# /proc/PID/pagemap, per page: 63 = in memory, 62 = swapped out, 61 = page of a file (Documentation/admin-guide/mm)
_ANONYMOUS, _OF_A_FILE = np.uint64(3 << 62), np.uint64(1 << 61)


class Held:
    """One storage that is known but not kept alive: while this exists, no other storage gets its key."""

    __slots__ = ("_ref", "address", "key", "nbytes", "tier")

    def __init__(self, storage: torch.UntypedStorage, tier: Tier) -> None:
        self._ref = StorageWeakRef(storage)
        self.key = int(storage._cdata)
        self.nbytes = int(storage.nbytes())
        self.tier = tier
        self.address = int(storage.data_ptr()) if tier is Tier.DRAM else 0

    def alive(self) -> bool:
        """Whether somebody still holds the storage. Safe from any thread."""
        return not self._ref.expired()


def tier_of(device: torch.device) -> Tier | None:
    """Where a device's memory counts; None for `meta`, which has none."""
    if device.type == "meta":
        return None
    return Tier.DRAM if device.type == "cpu" else Tier.GPU


def held(tensors: Iterable[torch.Tensor], seen: set[int]) -> list[Held]:
    """The storages behind `tensors` that are not in `seen` yet (keys; they are added)."""
    found = []
    for tensor in tensors:
        for part in dense_parts(tensor):
            storage = part.untyped_storage()
            tier = tier_of(storage.device)
            if tier is not None and storage._cdata not in seen:
                seen.add(int(storage._cdata))
                found.append(Held(storage, tier))
    return found


def dense_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors inside one: a DTensor's local shard, a subclass's inner tensors, values and indices."""
    if _wraps(tensor):
        names, _ = cast(Any, tensor).__tensor_flatten__()
        for name in names:
            inner = getattr(tensor, name)
            if isinstance(inner, torch.Tensor):  # a DTensor names its mesh too
                yield from dense_parts(inner)
    elif tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())


def _wraps(tensor: torch.Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor reachable from `value` through containers and attributes (a cache, an optimizer's state).

    A quantised weight is followed by what it carries in attributes (scales and code tables, in bitsandbytes).
    """
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
            if type(item) in _PLAIN or _wraps(item):
                continue
        if depth < _DEPTH:
            # a weight may know its module, whose other tensors are not its own
            inside = (inner for inner in _inside(item) if not isinstance(inner, torch.nn.Module))
            todo.extend((inner, depth + 1) for inner in inside)


def _inside(item: Any) -> Iterable[Any]:
    # lists are made in one go: another thread may be adding to what is looked at
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    inner = list(getattr(item, "__dict__", {}).values())
    if isinstance(item, torch.Tensor):
        return inner
    for base in type(item).__mro__:
        slots = base.__dict__.get("__slots__", ())
        inner.extend(getattr(item, name, None) for name in ((slots,) if isinstance(slots, str) else slots))
    return inner


class FileRanges:
    """Address ranges of this process that are mapped from files, as of when it was made."""

    def __init__(self) -> None:
        starts, ends = [], []
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/") and not fields[5].startswith("/dev/"):
                    start, _, end = fields[0].partition("-")
                    starts.append(int(start, 16))
                    ends.append(int(end, 16))
        self._starts, self._ends = np.array(starts, np.uint64), np.array(ends, np.uint64)

    def __contains__(self, address: int) -> bool:
        index = int(np.searchsorted(self._starts, np.uint64(address), side="right")) - 1
        return index >= 0 and bool(np.uint64(address) < self._ends[index])


def anonymous_bytes(address: int, nbytes: int, page_bytes: int = 4096) -> int | None:
    """Bytes of a range that this process has written to, so that they are its own and no longer the file's pages.

    From /proc/self/pagemap, whole pages clipped to the range; None where it cannot be read.
    """
    first, last = address // page_bytes, (address + nbytes - 1) // page_bytes
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(first * 8)
            flags = np.frombuffer(pagemap.read((last - first + 1) * 8), np.uint64)
    except OSError:
        return None
    own = ((flags & _ANONYMOUS) != 0) & ((flags & _OF_A_FILE) == 0)
    return min(nbytes, int(own.sum()) * page_bytes)
