"""pytest: a memory budget per test, and a fixture that measures.

```
@pytest.mark.memory_budget(dram="2GiB", ssd_write="1GiB", gpu="4GiB")
def test_training(memory_profile):
    model = build()
    memory_profile.watch(model)
```

`dram` and `gpu` limit how much the process tree grows above what it held when the test function began (fixtures that
were set up before it are not in it): a suite that has imported torch and run a thousand tests holds hundreds of MiB
that no single test can answer for. `absolute=True` limits everything the process tree holds instead; that is for a test
that has a process of its own. `ssd_write` limits the bytes written to devices during the test. Loaded by pytest itself
where memopt is installed; imports nothing but pytest until a test asks for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from memopt.profiler.program import Profiler
    from memopt.profiler.samplers import ProcessMemory
    from memopt.report_types import Report, TierUse

_MARKER = (
    "memory_budget(dram=None, gpu=None, ssd_write=None, absolute=False): fail the test when it takes more memory "
    "(growth above its start; all the process holds with absolute=True) or writes more bytes to devices; "
    "sizes like '512MiB'"
)
_SIZES = ("dram", "gpu", "ssd_write")
_INTERVAL_S = 0.005
_PROFILER = pytest.StashKey["Profiler"]()


@dataclass(frozen=True, kw_only=True)
class _Limits:
    sizes: Mapping[str, int]
    absolute: bool


@dataclass(frozen=True)
class _Before:
    """Bytes held before the test, which are not its own."""

    dram_bytes: int = 0
    gpu_bytes: int = 0


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def memory_profile(request: pytest.FixtureRequest) -> Profiler:
    """The profiler around this test's function: `watch(model)` tells whose bytes they are, `sample()` measures now.

    A `memopt.Profiler`; it runs from the beginning of the test function to its end.
    """
    return _profiler(request.node)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Measure the test function, and hold it to its budget."""
    limits = _limits_of(item)
    if limits is None and _PROFILER not in item.stash:
        return (yield)
    from memopt.profiler.samplers import process_memory

    profiler = _profiler(item)
    _settle()
    marked = _reset_mark()
    with profiler:
        start = profiler.latest()
        result = yield
        memory = process_memory() if marked else None
        written = profiler.io_bytes()[1]
    report = profiler.report
    before = _Before() if limits is not None and limits.absolute else _Before(start.dram_bytes, start.gpu_bytes or 0)
    used = {**_used(report, before, memory), "ssd_write": written}
    item.user_properties.extend((f"memopt_{name}_bytes", nbytes) for name, nbytes in used.items())
    if limits is not None:
        text = _verdict(used, limits, report)
        if text:
            pytest.fail(text, pytrace=False)
    return result


def _profiler(item: pytest.Item) -> Profiler:
    if _PROFILER not in item.stash:
        from memopt.profiler.program import Profiler

        item.stash[_PROFILER] = Profiler(interval_s=_INTERVAL_S)
    return item.stash[_PROFILER]


def _limits_of(item: pytest.Item) -> _Limits | None:
    """The nearest marker decides each size. Ends the test when one cannot be understood."""
    given: dict[str, Any] = {}
    for marker in item.iter_markers("memory_budget"):
        if marker.args:
            pytest.fail(f"memory_budget{marker.args!r}: name the tier, like dram='2GiB'", pytrace=False)
        given = {**marker.kwargs, **given}
    if not given:
        return None
    from memopt.errors import BadInput
    from memopt.units import parse_bytes

    absolute = given.pop("absolute", False)
    unknown = sorted(set(given) - set(_SIZES))
    if unknown:
        pytest.fail(f"memory_budget: {unknown[0]!r} is not known; there are {', '.join(_SIZES)}", pytrace=False)
    try:
        sizes = {
            name: parse_bytes(size, field=f"memory_budget {name}") for name, size in given.items() if size is not None
        }
    except BadInput as error:
        pytest.fail(str(error), pytrace=False)
    return _Limits(sizes=sizes, absolute=bool(absolute))


def _settle() -> None:
    """Give back what earlier tests freed, so that this test is not given it without growing."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized():
        cuda.empty_cache()


def _reset_mark() -> bool:
    """Let the kernel's high-water mark of this process begin anew (proc(5), clear_refs); whether it did."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _used(report: Report, before: _Before, memory: ProcessMemory | None) -> dict[str, int]:
    """Bytes by name. What peaked between two samples shows in the kernel's mark, which has file pages in it too."""
    dram = report.tiers.dram
    peak = dram.peak_bytes or 0
    if memory is not None:
        peak = max(peak, memory.hwm_bytes - max(memory.file_bytes, dram.file_bytes or 0))
    found = {"dram": peak - before.dram_bytes}
    if report.tiers.gpu is not None and report.tiers.gpu.peak_bytes is not None:
        found["gpu"] = report.tiers.gpu.peak_bytes - before.gpu_bytes
    return {name: max(0, nbytes) for name, nbytes in found.items()}


def _verdict(used: Mapping[str, int], limits: _Limits, report: Report) -> str:
    """One line for each budget that was passed; empty when none was."""
    from memopt.units import format_bytes

    lines = []
    for name, budget in limits.sizes.items():
        nbytes = used.get(name, 0)
        if nbytes <= budget:
            continue
        if name == "ssd_write":
            said, tail = "written to devices", ""
        else:
            use = report.tiers.dram if name == "dram" else report.tiers.gpu
            said = f"of {name} in use" if limits.absolute else f"of {name} taken above what was there at the start"
            tail = "" if use is None else f" (at the peak: {_held(use)})"
        over = format_bytes(nbytes - budget)
        lines.append(
            f"memory_budget: {format_bytes(nbytes)} {said}, {over} more than {name}={format_bytes(budget)}{tail}"
        )
    return "\n".join(lines)


def _held(use: TierUse) -> str:
    from memopt.profiler.over import describe
    from memopt.tiers import Category
    from memopt.units import format_bytes

    if use.attributed_by is not None:
        return describe({Category(name): nbytes for name, nbytes in use.at_peak.items()})
    kinds = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in use.kinds_at_peak.items() if nbytes)
    return f"{kinds or 'not told apart'}; memory_profile.watch(model) tells whose they are"
