"""Bytes that autograd holds for a backward pass, counted as they come and go."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Container
from typing import Any

import torch
import torch.utils.checkpoint

from memopt.profiler.torch_tensors import dense_parts, tier_of
from memopt.tiers import Tier

_CHANGED_IN_PLACE = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of shape "
    "{shape} is at version {now}, expected version {then} instead (torch.autograd.set_detect_anomaly(True) tells where)"
)
_Key = int


class _Saved:
    """What autograd keeps in place of a tensor; its end is the end of the saving."""

    __slots__ = ("_gone", "_keys", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor, keys: tuple[_Key, ...], gone: deque[_Key]) -> None:
        # a detached alias shares the version counter; the tensor itself would make a circle through its grad_fn
        self._tensor = tensor.detach()
        self._version = self._tensor._version
        self._keys = keys
        self._gone = gone

    def unpack(self) -> torch.Tensor:
        # with hooks installed autograd leaves this check to the hooks
        now = self._tensor._version
        if now != self._version:
            shape = tuple(self._tensor.shape)
            raise RuntimeError(_CHANGED_IN_PLACE.format(shape=shape, now=now, then=self._version))
        return self._tensor

    def __del__(self) -> None:
        self._gone.extend(self._keys)


class SavedTensors:
    """Counts storages that autograd saves while installed, each once however often it is saved.

    `skip`: keys of storages that are something else (weights, buffers). What `torch.utils.checkpoint` computes again is
    counted too; what is saved under hooks of others is not seen. With hooks in place `torch.func.grad` refuses to work:
    that is torch's rule, and the reason why this can be left out.
    """

    def __init__(self, skip: Container[int] = ()) -> None:
        self.skip = skip
        self.spent_s = 0.0
        """Seconds that packing and unpacking have taken."""
        self._lock = threading.Lock()
        self._gone: deque[_Key] = deque()
        self._holders: dict[_Key, tuple[int, int, Tier]] = {}
        self._bytes = dict.fromkeys((Tier.GPU, Tier.DRAM), 0)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._undo_checkpoint: Callable[[], None] | None = None
        self._installed = False
        self._counting = False

    def install(self) -> bool:
        """Count what this thread saves from now on. Saving in a thread that was started before is not counted.

        False where others have hooks: whoever set those will take off what lies on top, which must not be these.
        """
        if self._installed:
            return True
        if _top_hooks() is not None:
            return False
        try:
            self._hooks.__enter__()
        except RuntimeError:  # inside torch.autograd.graph.disable_saved_tensors_hooks
            return False
        self._undo_checkpoint = _tell_of_recomputation(self._saved_again)
        self._installed = self._counting = True
        return True

    def pause(self) -> bool:
        """Take the hooks off until `install`. False when other hooks lie on top of these; then nothing changes."""
        top = _top_hooks()
        if self._installed and (top is None or top[0] != self._hooks.pack_hook):
            return False
        return self.remove()

    def remove(self) -> bool:
        """Stop counting. False when other hooks lie on top of these, which then stay, idle."""
        self._counting = False
        if self._undo_checkpoint is not None:
            self._undo_checkpoint()
            self._undo_checkpoint = None
        if not self._installed:
            return True
        top = _top_hooks()
        if top is None or top[0] != self._hooks.pack_hook:
            return False
        self._hooks.__exit__()
        self._installed = False
        return True

    def nbytes(self, tier: Tier) -> int:
        """Bytes held now. Safe from any thread."""
        with self._lock:
            self._settle()
            return self._bytes.get(tier, 0)

    def _pack(self, tensor: torch.Tensor) -> Any:
        began = time.perf_counter()
        saved = _Saved(tensor, self._count(tensor) if self._counting else (), self._gone)
        self.spent_s += time.perf_counter() - began
        return saved

    def _unpack(self, saved: Any) -> torch.Tensor:
        began = time.perf_counter()
        tensor: torch.Tensor = saved.unpack()
        self.spent_s += time.perf_counter() - began
        return tensor

    def _count(self, tensor: torch.Tensor) -> tuple[_Key, ...]:
        if _is_weight(tensor):
            return ()
        if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            found = [storage] if storage._cdata not in self.skip else []
        else:
            found = [s for part in dense_parts(tensor) if (s := part.untyped_storage())._cdata not in self.skip]
        return self._add(found) if found else ()

    def _add(self, storages: list[torch.UntypedStorage]) -> tuple[_Key, ...]:
        keys = []
        with self._lock:
            self._settle()  # before counting: a freed storage's key may be in use again
            for storage in storages:
                key = storage._cdata
                known = self._holders.get(key)
                if known is not None:
                    self._holders[key] = (known[0] + 1, *known[1:])
                elif (tier := tier_of(storage.device)) is not None:
                    nbytes = storage.nbytes()
                    self._holders[key] = (1, nbytes, tier)
                    self._bytes[tier] += nbytes
                else:
                    continue
                keys.append(key)
        return tuple(keys)

    def _saved_again(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor until the alias that is returned dies; the one who keeps it for backward keeps that."""
        alias = tensor.detach()
        if self._counting and (keys := self._count(tensor)):
            weakref.finalize(alias, self._gone.extend, keys).atexit = False
        return alias

    def _settle(self) -> None:
        while self._gone:
            key = self._gone.popleft()
            holders, nbytes, tier = self._holders[key]
            if holders > 1:
                self._holders[key] = (holders - 1, nbytes, tier)
            else:
                del self._holders[key]
                self._bytes[tier] -= nbytes


def _top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _is_weight(tensor: torch.Tensor) -> bool:
    # this runs for every tensor that is saved: issubclass, since Parameter's own isinstance takes 1 us
    return issubclass(type(tensor), torch.nn.Parameter) or issubclass(type(tensor._base), torch.nn.Parameter)


def _tell_of_recomputation(tell: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None] | None:
    """Have `torch.utils.checkpoint` keep `tell(tensor)` of what it saves when it computes again.

    Its hooks come before all others while it recomputes, so these are wrapped. Returns the undo; None where the hooks
    are not what they are in torch 2.11 to 2.13, and those bytes stay unattributed.
    """
    module: Any = torch.utils.checkpoint
    theirs = getattr(module, "_recomputation_hook", None)
    if not isinstance(theirs, type) or not issubclass(theirs, torch.autograd.graph.saved_tensors_hooks):
        return None

    def telling(*args: Any, **kwargs: Any) -> Any:
        hooks: Any = theirs(*args, **kwargs)
        pack = hooks.pack_hook
        hooks.pack_hook = lambda tensor: pack(tell(tensor))
        return hooks

    def undo() -> None:
        if module._recomputation_hook is telling:
            module._recomputation_hook = theirs

    module._recomputation_hook = telling
    return undo
