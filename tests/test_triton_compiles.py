"""The Triton kernels are compiled for real cards, down to machine code: Triton's interpreter takes what no card would.

Nothing is launched: Triton's compiler and NVIDIA's assembler, which its wheel brings, need no GPU. The calls are those
of memopt.kv.triton_thin, so the arguments are specialised as they would be in a server.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED_BYTES = 99 * 2**10
"""What a block may have on cards of compute capability 8.6 and 8.9 (CUDA C++ Programming Guide, technical
specifications); others have more."""

CODE = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from memopt.kv import triton_thin

class Card:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Card())
made = []
JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: made.append(self.warmup(*a, grid=grid, **k))

def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int32)

def compile(dtype, full, kept, window, rows, splits, heads=2, group=4):
    def random(*shape):
        return torch.zeros(*shape, dtype=dtype)

    new = [1, 5, 40] if rows > 16 else [1, 1, 1]
    pages = triton_thin.ThinPages(thin=random(8, heads, 16, kept + full), kept=kept,
                                  channels=torch.arange(full).repeat(heads, 1),
                                  rest=random(8, heads, 48, full - kept) if window else None)
    held = {"rest": ints(3, 4), "exact_from": ints(3)} if window else {}
    slots = torch.zeros(sum(new), dtype=torch.int64)
    key = random(sum(new), heads, full)
    triton_thin.write(key, key, pages, slots, slots if window else None)
    tiles, queries = triton_thin.query_tiles(new, group, rows)
    triton_thin.attend(random(sum(new), heads * group, full), pages, triton_thin.Tables(thin=ints(3, 4), **held),
                       ints(4), ints(3), tiles, queries=queries, scale=0.1, splits=splits)

for name, full, kept, window in json.loads(sys.argv[2]):
    for rows, splits in ((16, 4), (32, 1)):
        compile(getattr(torch, name), full, kept, window, rows, splits)
print(json.dumps([(each.metadata.name, each.metadata.shared, len(each.asm["cubin"])) for each in made]))
"""
SHAPES = [
    ("bfloat16", 128, 80, True),
    ("bfloat16", 64, 64, False),
    ("float16", 256, 160, True),
    ("float32", 256, 128, True),
]


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_become_machine_code_that_fits_a_card(run_python: Callable[..., Any], capability: int) -> None:
    done = run_python(CODE, str(capability), json.dumps(SHAPES), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads(done.stdout)
    # write, attend and join for few new tokens; write and attend for many
    assert [name for name, _, _ in made] == ["_write", "_attend", "_join", "_write", "_attend"] * len(SHAPES)
    assert all(binary > 0 for _, _, binary in made)
    assert max(shared for _, shared, _ in made) <= SHARED_BYTES
