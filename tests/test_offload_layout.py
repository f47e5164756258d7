"""How units are cut into segments and spans: rule by rule, matrices alone, all on pages."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from memopt.offload.layout import CHUNK, PAGE, Layout, ParameterSpec, Unit, UnitKind, build_table, build_unit
from memopt.offload.storage import state_specs
from memopt.optim.chunked import ChunkRule
from memopt.optim.codecs import Codec
from memopt.optim.items import Route, RoutedPart
from memopt.optim.matrix_rule import MatrixRule
from memopt.optim.parts import Part
from memopt.optim.presets import Policy
from memopt.optim.roles import Role
from memopt.optim_types import UpdateRule
from tests.offload_helpers import rules_of, subject

ADAMW, ADAMW8 = ChunkRule(), ChunkRule(codec=Codec.INT8)


def muon(name: str, *shape: int) -> MatrixRule:
    part = RoutedPart(Part(role=Role.OTHER), Policy(rule="muon"))
    return MatrixRule(route=Route(name, (part,), shape))


def spec(name: str, *shape: int, rule: UpdateRule | None = ADAMW) -> ParameterSpec:
    return ParameterSpec(name, shape, torch.float32, rule, len(shape) > 1)


def block(*specs: ParameterSpec) -> Unit:
    return build_unit("block.0", UnitKind.BLOCK, 0, specs)


MIXED = block(
    spec("a", 3, 5, rule=muon("a", 3, 5)),
    spec("norm", 100),
    spec("b", 70, 100, rule=ADAMW8),
    spec("wide", 1200, 1024),
    spec("experts", 3, 64, 128, rule=muon("experts", 3, 64, 128)),
    spec("c", 300, 7, rule=ADAMW8),
    spec("bias", 33, rule=ADAMW8),
    spec("d", 64, 1024, rule=muon("d", 64, 1024)),
)


def test_one_rule_is_one_segment_with_decayed_parameters_first() -> None:
    unit = block(spec("norm", 100), spec("a", 3, 5), spec("bias", 7), spec("b", 6, 6))
    (segment,) = unit.segments
    assert [p.name for p in unit.trained] == ["a", "b", "norm", "bias"]
    assert (segment.name, segment.start, segment.stop) == ("block.0", 0, unit.numel)
    assert segment.decay_numel == unit.trained[1].offset_bytes // 4 + 36
    (span,) = unit.spans
    assert (span.decay_numel, span.record_offset, span.record_bytes) == (segment.decay_numel, 0, 8 * unit.numel)


def test_rules_lie_apart_and_matrices_alone() -> None:
    assert [p.name for p in MIXED.trained] == ["wide", "norm", "b", "c", "bias", "a", "experts", "d"]
    names = [[p.name for p in MIXED.trained if s.start <= p.offset_bytes // 4 < s.stop] for s in MIXED.segments]
    assert names == [["wide", "norm"], ["b", "c", "bias"], ["a"], ["experts"], ["d"]]
    assert [s.name for s in MIXED.segments] == ["block.0", *(f"block.0.{i}" for i in range(1, 5))]


def test_segments_and_spans_cover_the_vector_on_pages() -> None:
    for parts in (MIXED.segments, MIXED.spans):
        assert parts[0].start == 0 and parts[-1].stop == MIXED.numel
        assert all(a.stop == b.start for a, b in pairwise(parts))
        assert all(4 * p.start % PAGE == 0 for p in parts)
    assert [s.record_start % PAGE for s in MIXED.segments] == [0] * 5
    assert all(a.record_start + a.record_bytes <= b.record_start for a, b in pairwise(MIXED.segments))
    assert MIXED.record_bytes >= MIXED.segments[-1].record_start + MIXED.segments[-1].record_bytes
    for segment in MIXED.segments:
        mine = [span for span in MIXED.spans if span.segment == segment]
        assert [span.record_offset % PAGE for span in mine] == [0] * len(mine)
        assert sum(span.record_bytes for span in mine) == segment.record_bytes


def test_what_a_span_is() -> None:
    spans = {i: [x.numel for x in MIXED.spans if x.segment == s] for i, s in enumerate(MIXED.segments)}
    wide = 1200 * 1024
    assert spans[0] == [CHUNK, MIXED.segments[0].stop - CHUNK] and sum(spans[0]) > wide
    assert len(spans[1]) == len(spans[2]) == 1
    assert spans[3] == [64 * 128] * 3, "matrices of experts are updated one by one"
    assert spans[4] == [64 * 1024]
    decayed = [span.decay_numel for span in MIXED.spans]
    assert decayed[:2] == [CHUNK, wide - CHUNK]
    assert decayed[2] == MIXED.trained[3].offset_bytes // 4 + 300 * 7 - MIXED.segments[1].start
    assert decayed[3:] == [15, 64 * 128, 64 * 128, 64 * 128, 64 * 1024]


def test_parameters_with_8_bits_share_no_block() -> None:
    for piece in MIXED.trained:
        assert piece.offset_bytes % (1024 if piece.rule == ADAMW8 else 64) == 0, piece.name


def test_frozen_parameters_have_no_segments() -> None:
    unit = block(spec("a", 30, 5, rule=None), spec("b", 7, rule=None))
    assert unit.segments == unit.spans == () and unit.record_bytes == 0 and unit.frozen_bytes == PAGE
    (tile,) = build_table(UnitKind.EMBED, spec("t", 50, 8, rule=None), 100)
    assert tile.segments == ()


def test_writes_may_start_where_spans_do() -> None:
    """A record of a chunk is 8 MiB in float32 (two chunks of the store), a little more than 2 MiB with 8 bits."""
    wide = block(spec("a", 3000, 1024), spec("b", 3000, 1024, rule=ADAMW8))
    rest = build_unit("rest", UnitKind.REST, 0, [spec("norm", 4)])
    tables = build_table(UnitKind.EMBED, spec("t", 50, 8), 20)
    layout = Layout(embed=tables, blocks=(wide, MIXED), head=tables, rest=rest, tied=True)
    # two units with one name are no layout, but their tensors can be looked at
    specs = {(s.name, i): s for i, s in enumerate(state_specs(layout))}
    moments = [s for (name, _), s in specs.items() if name.endswith(".moments")]
    by_unit = moments[len(tables) :]
    assert [s.chunk_bytes for s in by_unit[:2]] == [None, 2 * (CHUNK + CHUNK // 64)]
    experts = MIXED.segments[3].rule.record_bytes(64 * 128)
    assert by_unit[5].chunk_bytes == experts and by_unit[6].chunk_bytes is None
    weights = [s for (name, _), s in specs.items() if name.endswith(".weights")][len(tables) :]
    assert [s.chunk_bytes for s in weights[:7]] == [None, None, None, None, None, 4 * 64 * 128, None]


@pytest.mark.parametrize("preset", ["muon", "galore8bit"])
def test_a_models_tables_are_never_matrices(preset: str) -> None:
    for family in ("llama", "llama_tied", "gpt2"):
        layout = subject(family).layout(50, rules_of(subject(family), preset, rank=8))
        assert not any(s.rule.whole for unit in layout.tables for s in unit.segments)
        assert any(s.rule.whole for unit in layout.blocks for s in unit.segments)
