"""Rows of a table gathered from SSD are the rows of the table, whatever their width and wherever it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from memopt.budget import Budget
from memopt.ledger import Ledger
from memopt.offload.gradients import RowGradient
from memopt.offload.homes import Homes, as_bytes, gradient_name
from memopt.offload.layout import Layout, ParameterSpec, build_layout
from memopt.offload.rows import CompactEmbedding, RowReader
from memopt.offload.storage import create_scratch, create_state, fill_state
from memopt.optim.chunked import ChunkRule
from memopt.plan_types import Residence
from memopt.store.extents import TensorSpec
from memopt.store.regions import Region
from memopt.store.transfer import IoPool
from memopt.tiers import Tier
from tests.offload_helpers import IN_DRAM, one_thread  # noqa: F401

ROWS = 3000
RULE = ChunkRule()


def table_of(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)


def layout_of(rows: int, width: int, tile_rows: int, *, dtype: torch.dtype, trained: bool) -> Layout:
    block = ParameterSpec("block.w", (4,), torch.float32, RULE, False)
    return build_layout(
        embed=ParameterSpec("embed.w", (rows, width), dtype, RULE if trained else None, True),
        head=None,
        blocks=[[block]],
        rest=[ParameterSpec("norm", (4,), torch.float32, RULE, False)],
        tile_rows=tile_rows,
    )


def picks(rows: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "all": torch.arange(rows),
        "one in the middle": torch.tensor([rows // 2]),
        "the ends": torch.tensor([0, rows - 1]),
        "none": torch.zeros(0, dtype=torch.long),
        "some": torch.randperm(rows, generator=draw)[: rows // 20].sort().values,
        "neighbours": torch.tensor([5, 6, 7, rows - 2, rows - 1]),
    }


# widths whose rows are no multiple of a sector, smaller than one, exactly one, and larger than the merging distance
@pytest.mark.parametrize("width", [1, 33, 100, 128, 1000, 1025])
@pytest.mark.parametrize("tile_rows", [ROWS, 701])
@pytest.mark.parametrize(("dtype", "trained"), [(torch.float32, True), (torch.bfloat16, False)])
def test_rows_from_ssd_equal_rows_from_dram(
    width: int, tile_rows: int, dtype: torch.dtype, trained: bool, tmp_path: Path
) -> None:
    table = table_of(ROWS, width, dtype)
    layout = layout_of(ROWS, width, tile_rows, dtype=dtype, trained=trained)
    values = {"embed.w": table, "block.w": torch.zeros(4), "norm": torch.zeros(4)}
    with IoPool(2) as pool, create_state(tmp_path / "state", layout, pool, {}) as store:
        fill_state(store, layout, lambda names: {n: values[n] for n in names}, {})
        for where in (Residence(), IN_DRAM):
            ledger = Ledger(Budget())
            homes = Homes(
                layout,
                {u.name: where for u in layout.units},
                store,
                None,
                ledger,
                hold_gradients=frozenset(),
                pin=False,
            )
            homes.load()
            reader = RowReader(homes, ledger)
            for name, rows in picks(ROWS).items():
                for out in (torch.float32, torch.bfloat16):
                    got = reader.gather(layout.embed, rows, out)
                    assert got.dtype == out
                    assert torch.equal(got, table[rows].to(out)), name
            reader.close()
            homes.close()
            assert ledger.charged_bytes(Tier.DRAM) == 0


@pytest.mark.parametrize("width", [33, 1000])
def test_gradient_rows_are_read_where_they_were_spilled(width: int, tmp_path: Path) -> None:
    layout = layout_of(ROWS, width, 701, dtype=torch.float32, trained=True)
    table = table_of(ROWS, width, torch.float32)
    specs = [TensorSpec(gradient_name(u), "gradients", u.master_bytes) for u in layout.embed]
    held = frozenset(u.name for u in layout.embed)
    with IoPool(2) as pool:
        scratch = create_scratch(tmp_path / "scratch", specs, pool)
        assert scratch is not None
        with scratch:
            for tier in (Tier.SSD, Tier.DRAM):
                ledger = Ledger(Budget())
                where = {u.name: Residence(gradient=tier) for u in layout.units}
                homes = Homes(layout, where, None, scratch, ledger, hold_gradients=held, pin=False)
                reader = RowReader(homes, ledger)
                for unit in layout.embed:
                    part = table[slice(*unit.rows)].flatten()
                    if tier == Tier.SSD:
                        with Region(unit.master_bytes) as region:
                            region.tensor(torch.float32, part.numel()).copy_(part)
                            scratch.write(gradient_name(unit), region.view).wait()
                    else:
                        gradient = homes[unit].gradient
                        assert gradient is not None and len(as_bytes(gradient)) == unit.master_bytes
                        gradient[: part.numel()].copy_(part)
                    rows = torch.tensor([unit.rows[0], unit.rows[0] + 3, unit.rows[1] - 1])
                    assert torch.equal(reader.gather_gradient(unit, rows), table[rows])
                reader.close()
                homes.close()


def test_sparse_rows_are_added_to_the_chunks_they_fall_into() -> None:
    layout = layout_of(50, 7, 20, dtype=torch.float32, trained=True)
    rows = torch.tensor([0, 3, 19, 20, 21, 49])
    gradient = RowGradient(rows, torch.randn(6, 7))
    dense = torch.zeros(50, 7)
    dense[rows] = gradient.values
    for unit in layout.embed:
        first, last = unit.rows
        flat, size = dense[first:last].flatten(), (last - first) * 7
        for step in (1, 5, 7, 16, 1000):
            got = torch.ones(size)
            for start in range(0, size, step):
                gradient.of(unit).add_to_(got[start : start + step], unit, start)
            assert torch.equal(got, flat + 1)


@pytest.mark.parametrize("padding", [None, 0, 5, 9])
def test_a_compact_embedding_is_the_embedding(padding: int | None) -> None:
    """Padding rows get no gradient, whether or not they are among the rows at hand."""
    plain = nn.Embedding(10, 3, padding_idx=padding)
    ids = torch.tensor([[2, 5, 5], [0, 7, 2]])
    plain(ids).square().sum().backward()
    rows = ids.flatten().unique()
    compact = nn.Embedding(10, 3, padding_idx=padding, device="meta")
    table = nn.Parameter(plain.weight.detach()[rows].clone())
    with CompactEmbedding(compact, rows).bound(table):
        out = compact(ids)
    assert torch.equal(out, plain(ids))
    out.square().sum().backward()
    assert plain.weight.grad is not None and table.grad is not None
    assert torch.equal(table.grad, plain.weight.grad[rows])
    assert compact.padding_idx == padding and compact.weight.is_meta
