"""Anonymous memory of an exact size on huge pages, seen as bytes or tensors without a copy.

Physically contiguous pages matter more than the I/O interface: with 4 KiB pages one disk request holds 0.5-1 MiB, with
2 MiB pages close to 4 MiB, which doubled the bandwidth of direct reads and writes where it was measured.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import torch

from memopt.errors import StoreError
from memopt.store.errors import StoreClosed
from memopt.units import MiB, format_bytes

PAGE_BYTES = mmap.PAGESIZE
HUGE_BYTES = 2 * MiB


def round_up(nbytes: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


def address_of(view: memoryview) -> int:
    """The address of the first byte of a writable, non-empty view."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Region:
    """Private anonymous memory of `nbytes` (rounded up to the page), 2 MiB aligned, zero until written.

    From 2 MiB on, huge pages are asked for before the first touch; `huge` says whether the kernel agreed to try.
    `pin=True` registers the memory with CUDA where there is a device (`pinned` says so) and does nothing elsewhere.
    Raises StoreError when the memory cannot be mapped or registered.
    """

    def __init__(self, nbytes: int, *, pin: bool = False) -> None:
        if nbytes <= 0:
            raise ValueError(f"a region of {nbytes} bytes")
        self.nbytes = round_up(nbytes, PAGE_BYTES)
        self.huge = False
        self.pinned = False
        # The slack that buys the alignment is address space only: it is never touched.
        slack = HUGE_BYTES if self.nbytes >= HUGE_BYTES else 0
        try:
            mapping = mmap.mmap(-1, self.nbytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise StoreError(
                f"mapping {format_bytes(self.nbytes)} of memory failed ({error.strerror}); lower --dram or free memory"
            ) from error
        whole = memoryview(mapping)
        start = -address_of(whole) % HUGE_BYTES if slack else 0
        if slack:
            try:
                # Exactly the region: a huge page that straddled its end would cost more than was asked for.
                mapping.madvise(mmap.MADV_HUGEPAGE, start, self.nbytes)
                self.huge = True
            except OSError:  # a kernel without transparent huge pages; only speed is lost
                pass
        # The views are the only owners of the mapping: it is unmapped when the last of them, or tensor on it, is gone.
        self._view: memoryview | None = whole[start : start + self.nbytes]
        self._unpin: weakref.finalize[Any, Region] | None = None
        if pin and torch.cuda.is_available():
            self._register()

    @property
    def view(self) -> memoryview:
        """All bytes, writable."""
        if self._view is None:
            raise StoreClosed("this memory region was closed")
        return self._view

    @property
    def address(self) -> int:
        """Where the first byte is."""
        return address_of(self.view)

    def tensor(self, dtype: torch.dtype, numel: int, offset_bytes: int = 0) -> torch.Tensor:
        """A flat tensor of `numel` elements on these bytes; it keeps the memory alive, also after `close`."""
        return tensor_on(self.view, dtype, numel, offset_bytes)

    def close(self) -> None:
        """Let go of the memory. It returns to the system as soon as no view or tensor is left on it."""
        if self._unpin is not None:
            self._unpin()
        self.pinned = False
        self._view = None

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _register(self) -> None:
        address = self.address
        code = int(_cudart().cudaHostRegister(address, self.nbytes, 0))
        if code != 0:
            self._view = None
            raise StoreError(
                f"CUDA refused to pin {format_bytes(self.nbytes)} (cudaHostRegister code {code}); "
                "lower --dram, raise the limit on locked memory (ulimit -l), or run without pinned buffers"
            )
        self.pinned = True
        self._unpin = weakref.finalize(self, _unregister, address)
        self._unpin.atexit = False  # the CUDA context may be gone by then, and the process takes its pages along


def tensor_on(view: memoryview, dtype: torch.dtype, numel: int, offset_bytes: int = 0) -> torch.Tensor:
    """A flat tensor of `numel` elements that shares the bytes of `view` from `offset_bytes` on."""
    wanted = numel * dtype.itemsize
    if numel < 0 or offset_bytes < 0 or offset_bytes + wanted > len(view):
        raise ValueError(f"{numel} x {dtype} at byte {offset_bytes} is outside of {len(view)} bytes")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    # A slice, not the mmap: torch keeps the object it is given but not the buffer lock, and only a memoryview holds
    # that lock. With the mmap itself, closing would unmap memory under a live tensor.
    return torch.frombuffer(view[offset_bytes : offset_bytes + wanted], dtype=dtype, count=numel)


def _unregister(address: int) -> None:
    _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()
