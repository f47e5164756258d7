"""What the bytes of a PyTorch program are, found by looking at its modules, optimizers and caches."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from memopt.profiler.measured import Attributed
from memopt.profiler.torch_saved import SavedTensors
from memopt.profiler.torch_tensors import FileRanges, Held, anonymous_bytes, held, tensors_in, tier_of
from memopt.tiers import Category, Tier
from memopt.units import format_bytes

# Looking again costs time in proportion to the number of tensors; it waits until that is at most this share of it.
_SHARE = 1 / 1000
# The hooks time what they do themselves; getting there and back takes as long again.
_AROUND = 2.0
_COUNTED = (Tier.GPU, Tier.DRAM)
_MAY_BE_MAPPED = (Category.WEIGHTS, Category.BUFFERS)


class TorchAttribution:
    """Bytes by tier and category of what is watched; call it from any thread. Nothing watched is kept alive.

    Weights, buffers, optimizer state and caches are the storages found in them, each counted once. Gradients are noted
    as autograd accumulates them, and besides at `look`. Activations are what autograd saves for the backward pass
    (`torch_saved`); on a GPU, during a forward or backward pass, they are all that torch's allocator handed out less
    the other categories, so temporaries are among them. Pages of weights that are still those of a mapped file are
    not counted: they belong to no budget.

    `runtime_bytes`: what the process held before there were tensors, as `runtime_bytes()` measures it.
    """

    def __init__(self, *, runtime_bytes: int = 0, activations: bool = True) -> None:
        self.notes: list[str] = []
        self._runtime_bytes = runtime_bytes
        self._modules: list[weakref.ref[torch.nn.Module]] = []
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._caches: list[Callable[[], Any]] = []
        self._lock = threading.Lock()
        self._found: dict[Category, list[Held]] = {}
        self._gradients: dict[int, Held] = {}
        self._fixed: frozenset[int] = frozenset()
        self._mapped: dict[int, int] = {}
        self._due_s = 0.0
        self._sizes: list[int] = []
        self._hooks: dict[int, Any] = {}
        self._passes = 0
        self._spent_s = 0.0
        self.observing = True
        """Whether gradients and activations are being counted."""
        self.saved = SavedTensors() if activations else None

    def watch(self, watched: Any) -> None:
        """A module, an optimizer, or anything that holds tensors and is then taken for a key-value cache."""
        if isinstance(watched, torch.nn.Module):
            _add(self._modules, watched)
            if self.saved is not None and self.observing and not self.saved.install():
                self._note("other saved-tensor hooks were in place at watch(): activations are not counted under them")
        elif isinstance(watched, torch.optim.Optimizer):
            _add(self._optimizers, watched)
        else:
            try:
                if not _add(self._caches, watched):
                    return  # decoding passes it in again and again
            except TypeError:  # a tuple or a dict cannot be referred to weakly
                self._caches.append(lambda: watched)
        self.look(force=True)

    def observe(self, on: bool) -> None:
        """Count gradients and activations from now on, or leave the program alone; between steps, in its own thread.

        Other hooks that lie on top keep things as they are.
        """
        if on == self.observing or (not on and self.saved is not None and not self.saved.pause()):
            return
        if on and self.saved is not None:
            self.saved.install()
        self.observing = on
        if on:
            self.look(force=True)
        else:
            self._remove_hooks()

    def spent_s(self) -> float:
        """Seconds that counting gradients and activations has taken so far."""
        return _AROUND * (self._spent_s + (0.0 if self.saved is None else self.saved.spent_s))

    def passing(self, step: int) -> None:
        """A forward or backward pass begins (+1) or ends (-1); decides how a GPU's activations are counted."""
        with self._lock:
            self._passes = max(0, self._passes + step)

    def look(self, *, force: bool = False) -> None:
        """Look at everything again, in the program's own thread, so gradients too. Rarely unless `force`."""
        self._guarded(lambda: self._look(force=force, own_thread=True))

    def close(self) -> None:
        """Take all hooks away; what was seen last stays readable."""
        self._remove_hooks()
        if self.saved is not None and not self.saved.remove():
            self._note("other saved-tensor hooks were put on top of memopt's; those stay until these are gone, idle")

    def _remove_hooks(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def mapped_bytes(self) -> int:
        """Bytes of watched weights and buffers that are still pages of a file."""
        with self._lock:
            return sum(self._mapped.values())

    def __call__(self) -> Attributed:
        """Bytes now. Never raises: what cannot be seen becomes a note."""
        self._guarded(lambda: self._look(force=False, own_thread=False))
        counts = {tier: dict.fromkeys(Category, 0) for tier in _COUNTED}
        with self._lock:
            for category, items in self._found.items():
                for item in items:
                    if item.alive():
                        counts[item.tier][category] += item.nbytes - self._mapped.get(item.key, 0)
            for key, item in list(self._gradients.items()):
                if item.alive():
                    counts[item.tier][Category.GRADIENTS] += item.nbytes
                else:
                    self._gradients.pop(key, None)
        counts[Tier.DRAM][Category.RUNTIME] = self._runtime_bytes
        for tier in _COUNTED:
            counts[tier][Category.ACTIVATIONS] = 0 if self.saved is None else self.saved.nbytes(tier)
        self._guarded(lambda: self._rest_of_gpu(counts[Tier.GPU]))
        for tier in _COUNTED:
            counts[tier].pop(Category.OTHER)
        return counts

    def _rest_of_gpu(self, counts: dict[Category, int]) -> None:
        if self._passes and (allocated := _gpu_allocated_bytes()) is not None:
            others = sum(nbytes for category, nbytes in counts.items() if category is not Category.ACTIVATIONS)
            counts[Category.ACTIVATIONS] = max(0, allocated - others)

    def _guarded(self, action: Callable[[], None]) -> None:
        """The program goes on whatever its objects answer."""
        try:
            action()
        except Exception as error:
            self._note(f"attribution: {type(error).__name__}: {error}")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _look(self, *, force: bool, own_thread: bool) -> None:
        begun = time.monotonic()
        # the first step of an optimizer makes its state, which may be the largest part of all
        sizes = [len(optimizer.state) for optimizer in _living(self._optimizers)]
        if not force and begun < self._due_s and sizes == self._sizes:
            return
        if not self._lock.acquire(blocking=own_thread):
            return  # somebody is looking
        try:
            modules, optimizers = _living(self._modules), _living(self._optimizers)
            self._sizes = sizes
            self._find(modules, optimizers)
            self._note_gradients(modules, optimizers, own_thread)
            self._map_files()
        finally:
            self._due_s = time.monotonic() + (time.monotonic() - begun) / _SHARE
            self._lock.release()
        if self.saved is not None:
            self.saved.skip = self._fixed

    def _find(self, modules: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
        seen: set[int] = set()
        found = {
            Category.WEIGHTS: held(_weights(modules), seen),
            Category.BUFFERS: held((b for module in modules for b in module.buffers()), seen),
            Category.OPTIMIZER: held((t for o in optimizers for t in _state(o)), seen),
        }
        # parameters that only an optimizer knows; copies of weights that it keeps (master weights) are its state
        found[Category.WEIGHTS] += held((t for o in optimizers for p in _params(o) for t in tensors_in(p)), seen)
        self._fixed = frozenset(seen)
        found[Category.KV_CACHE] = held((t for cache in _living(self._caches) for t in tensors_in(cache)), seen)
        self._found = found

    def _note_gradients(
        self, modules: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer], own_thread: bool
    ) -> None:
        if not own_thread:
            # reading .grad beside a running backward pass is a race in C++; what that makes, the hooks note
            return
        params: dict[int, torch.Tensor] = {id(p): p for module in modules for p in module.parameters()}
        params.update((id(p), p) for o in optimizers for p in _params(o))
        for number, param in params.items():
            if param.grad is not None:
                self._note_gradient(param)
            # ids of parameters that are gone may come again, without a hook
            known = self._hooks.get(number)
            if (
                self.observing
                and param.requires_grad
                and param.is_leaf
                and (known is None or known.param() is not param)
            ):
                self._hooks[number] = _GradientHook(param, self._note_gradient)

    def _note_gradient(self, param: torch.Tensor) -> None:
        began = time.perf_counter()
        try:
            gradient = param.grad
            if type(gradient) is torch.Tensor and gradient.layout is torch.strided:  # quickly, there are many
                if gradient.untyped_storage()._cdata in self._gradients:
                    return  # as long as it is in there, no other storage has its key
                items = [Held(gradient.untyped_storage(), tier)] if (tier := tier_of(gradient.device)) else []
            else:
                items = held([] if gradient is None else [gradient], set())
            for item in items:
                self._gradients[item.key] = item
        except Exception as error:  # this runs inside the program's backward pass
            self._note(f"attribution of gradients: {type(error).__name__}: {error}")
        finally:
            self._spent_s += time.perf_counter() - began

    def _map_files(self) -> None:
        items = [item for category in _MAY_BE_MAPPED for item in self._found[category] if item.tier is Tier.DRAM]
        ranges = FileRanges() if items else None
        mapped = {}
        for item in items:
            if ranges is not None and item.address in ranges:
                own = anonymous_bytes(item.address, item.nbytes)
                if own is not None and own < item.nbytes:
                    mapped[item.key] = item.nbytes - own
        self._mapped = mapped


class _GradientHook:
    """Tells of a parameter's gradient at the moment it is there; refers to the parameter weakly."""

    def __init__(self, param: torch.Tensor, note: Callable[[torch.Tensor], None]) -> None:
        self.param = weakref.ref(param)
        self._handle = param.register_post_accumulate_grad_hook(note)

    def remove(self) -> None:
        self._handle.remove()


def runtime_bytes(charged_bytes: int) -> int:
    """What of a process's anonymous and shared memory is no tensor's: interpreter, libraries, and all it had loaded.

    Goes through the objects that the garbage collector knows, once: 0.2 s for 350,000 of them.
    """
    import gc

    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    ranges = FileRanges()
    total = 0
    seen: set[int] = set()
    for tensor in tensors:
        try:
            found = held([tensor], seen)
        except Exception:
            continue  # half made, or without storage
        for item in found:
            if item.tier is Tier.DRAM:
                own = anonymous_bytes(item.address, item.nbytes) if item.address in ranges else item.nbytes
                total += item.nbytes if own is None else own
    return max(0, charged_bytes - total)


def mapped_note(nbytes: int) -> str:
    """The sentence for a report where weights are still pages of a file."""
    return (
        f"{format_bytes(nbytes)} of watched weights are pages of a mapped file, clean and reclaimable: they are in "
        "no budget until they are written to"
    )


def _gpu_allocated_bytes() -> int | None:
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return None
    return sum(int(cuda.memory_allocated(index)) for index in range(cuda.device_count()))


def _add(references: list[Any], thing: Any) -> bool:
    """Whether it was not there yet. Forgets those that are gone."""
    references[:] = [reference for reference in references if reference() is not None]
    if any(reference() is thing for reference in references):
        return False
    references.append(weakref.ref(thing))
    return True


def _living(references: Iterable[Callable[[], Any]]) -> list[Any]:
    return [thing for reference in references if (thing := reference()) is not None]


def _weights(modules: list[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        for part in module.modules():
            for param in list(part._parameters.values()):
                if param is not None:
                    yield from tensors_in(param)
            # bitsandbytes' 8-bit layers move their weights into a state of their own once they are used
            if (state := part.__dict__.get("state")) is not None and type(state).__name__ == "MatmulLtState":
                yield from tensors_in(state)


def _params(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in list(optimizer.param_groups):
        yield from (param for param in list(group["params"]) if isinstance(param, torch.Tensor))


def _state(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in list(optimizer.state.values()):
        yield from tensors_in(state)
