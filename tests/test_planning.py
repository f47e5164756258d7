"""Plans of fine-tuning jobs: made from numbers alone, each budget used, the smallest sufficient one exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from memopt.budget import Budget
from memopt.jobs.model_costs import model_costs
from memopt.jobs.model_layout import model_layout
from memopt.machine import Machine
from memopt.offload.costs import JobSizes
from memopt.offload.layout import Layout, ParameterSpec, build_layout
from memopt.offload.storage import state_bytes
from memopt.optim.chunked import ChunkRule
from memopt.optim.codecs import Codec
from memopt.optim.items import Route, RoutedPart
from memopt.optim.matrix_rule import MatrixRule
from memopt.optim.parts import Part
from memopt.optim.presets import Policy
from memopt.optim.roles import Role
from memopt.optim_types import UpdateRule
from memopt.patches.hf_checkpoint import build_skeleton, decay_names
from memopt.patches.hf_model import HFLayeredModel
from memopt.plan_types import Infeasible, Plan, Residence
from memopt.planning.finetune import SAVE_EVERY_IN_DRAM, FinetuneJob, plan_finetune, smallest_dram_bytes
from memopt.tiers import Tier
from memopt.units import GiB, MiB
from tests.offload_helpers import config_of, one_thread  # noqa: F401

HOST = Machine(name="host", ssd_read_per_s=2 * GiB, ssd_write_per_s=GiB, ssd_endurance_bytes=600 * 10**12)
RUNTIME = 300 * MiB
ADAMW = ChunkRule()


RuleOf = Callable[[str, tuple[int, ...]], UpdateRule]


def all_adamw(name: str, shape: tuple[int, ...]) -> UpdateRule:
    return ADAMW


def all_bfloat16(name: str, shape: tuple[int, ...]) -> UpdateRule:
    return ChunkRule(codec=Codec.BF16)


def muon(name: str, shape: tuple[int, ...]) -> UpdateRule:
    """For the matrices of blocks, with AdamW for the rest."""
    if len(shape) < 2 or not name.startswith("b"):
        return ADAMW
    part = RoutedPart(Part(role=Role.OTHER), Policy(rule="muon", nesterov=True))
    return MatrixRule(route=Route(name, (part,), shape))


def llama_like(
    layers: int, width: int, vocabulary: int, *, tied: bool = False, rule: RuleOf = all_adamw
) -> Callable[[int], Layout]:
    """The shapes of a Llama, without a model."""

    def spec(name: str, *shape: int) -> ParameterSpec:
        return ParameterSpec(name, shape, torch.float32, rule(name, shape), len(shape) > 1)

    def block(i: int) -> list[ParameterSpec]:
        square = [spec(f"b{i}.{p}", width, width) for p in "qkvo"]
        wide = [spec(f"b{i}.{p}", 3 * width, width) for p in ("gate", "up", "down")]
        return [*square, *wide, spec(f"b{i}.n1", width), spec(f"b{i}.n2", width)]

    @functools.cache
    def layout_of(tile_rows: int) -> Layout:
        return build_layout(
            embed=spec("embed", vocabulary, width),
            head=None if tied else spec("head", vocabulary, width),
            blocks=[block(i) for i in range(layers)],
            rest=[spec("norm", width)],
            tile_rows=tile_rows,
        )

    return layout_of


def job_of(
    layers: int = 6,
    width: int = 512,
    vocabulary: int = 16000,
    *,
    tied: bool = False,
    rule: RuleOf = all_adamw,
    **changes: Any,
) -> FinetuneJob:
    """About 28M parameters in blocks of 13 MiB; fields of the job or of its sizes can be changed."""
    sizes = JobSizes(
        clips=True,
        tokens=512,
        width=width,
        compute_dtype=torch.float32,
        on_gpu=False,
        forward_bytes=4 * MiB,
        backward_bytes=12 * MiB,
        calls_bytes=MiB,
        runtime_bytes=RUNTIME,
    )
    own = {k: changes.pop(k) for k in list(changes) if k in FinetuneJob.__dataclass_fields__}
    job = FinetuneJob(
        sizes=replace(sizes, **changes),
        layout_of=llama_like(layers, width, vocabulary, tied=tied, rule=rule),
        rows=vocabulary,
        row_bytes=4 * width,
        steps=1000,
        offload=True,
        save_every=None,
        compute_threads=2,
        update_threads=1,
    )
    return replace(job, **own)


def plan(job: FinetuneJob, dram_bytes: int | None, **more: int) -> Plan:
    return plan_finetune(job, Budget(dram_bytes=dram_bytes, **more), HOST)


def on_ssd(p: Plan) -> set[Tier]:
    return {t for r in p.residence.values() for t in (r.weights, r.moments, r.gradient)}


KINDS: dict[str, dict[str, Any]] = {
    "clipped": {},
    "fused": {"clips": False},
    "tied": {"tied": True},
    "tied, fused": {"tied": True, "clips": False},
    "bfloat16 state": {"rule": all_bfloat16},
    "matrices": {"rule": muon},
    "matrices, fused": {"rule": muon, "clips": False},
    "large vocabulary": {"vocabulary": 100_000, "layers": 3},
}


def test_what_fits_needs_no_ssd() -> None:
    p = plan(job_of(), 8 * GiB)
    assert on_ssd(p) == {Tier.DRAM}
    assert p.activation_layers_on_ssd == 0 and p.ssd_read_per_step_bytes == 0
    assert p.tile_rows == 16000 and p.loss_tokens == 256
    assert p.save_every == SAVE_EVERY_IN_DRAM
    assert any("everything fits in DRAM" in reason for reason in p.reasons)
    assert plan(job_of(offload=False), 8 * GiB).residence == p.residence
    assert on_ssd(plan(job_of(), None)) == {Tier.DRAM}, "no budget, no limit"


@pytest.mark.parametrize("kind", KINDS)
def test_every_budget_is_kept_and_used(kind: str) -> None:
    """From the smallest to the whole in steps: the prediction stays below, the traffic falls. (More buffers and whole
    tables come before placement, so that a little more memory may cost a few percent of traffic.)"""
    job = job_of(**KINDS[kind])
    smallest, whole = smallest_dram_bytes(job), plan(job, None).predicted[Tier.DRAM].total_bytes
    traffic = []
    for part in range(13):
        budget = smallest + (whole - smallest) * part // 12
        p = plan(job, budget)
        assert p.predicted[Tier.DRAM].total_bytes <= budget
        assert p.reasons and all(p.reasons)
        assert p.residence["rest"].weights == Tier.DRAM
        traffic.append(p.ssd_read_per_step_bytes + p.ssd_write_per_step_bytes)
    assert all(later <= 1.05 * min(traffic[: i + 1]) for i, later in enumerate(traffic))
    assert traffic[0] > 5 * traffic[-1]


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_budget_is_exact(kind: str, offload: bool) -> None:
    job = job_of(**KINDS[kind], offload=offload)
    with pytest.raises(Infeasible) as caught:
        plan(job, RUNTIME)
    smallest = caught.value.smallest_bytes
    assert caught.value.tier == Tier.DRAM and caught.value.wanted_bytes == RUNTIME
    assert plan(job, smallest).predicted[Tier.DRAM].total_bytes <= smallest
    with pytest.raises(Infeasible) as again:
        plan(job, smallest - 1)
    assert again.value.smallest_bytes == smallest
    with pytest.raises(Infeasible):
        plan(job, smallest - MiB)
    if offload:
        assert smallest == smallest_dram_bytes(job)


def test_the_message_of_an_infeasible_budget_says_what_to_do() -> None:
    job = job_of()
    smallest = smallest_dram_bytes(job)
    with pytest.raises(Infeasible, match=rf"--dram {-(-smallest // MiB)}MiB.*It needs .*--seq-len") as caught:
        plan(job, smallest - 1)
    assert caught.value.exit_code == 1
    assert "offload-dir" not in str(caught.value)
    with pytest.raises(Infeasible, match="Give an --offload-dir on an SSD to need far less") as caught:
        plan(replace(job, offload=False), smallest)
    assert caught.value.smallest_bytes > 2 * smallest


def test_kept_numerics_are_honoured() -> None:
    job = job_of()
    first = plan(job, smallest_dram_bytes(job) + 20 * MiB)
    assert first.tile_rows < 16000
    kept = {**first.numerics(), "compute_threads": 7, "update_threads": 3}
    for budget in (smallest_dram_bytes(job) + 20 * MiB, 600 * MiB, 8 * GiB):
        again = plan(replace(job, kept=kept), budget)
        assert again.numerics() == kept
    with pytest.raises(Infeasible):
        plan(replace(job, kept={**kept, "tile_rows": 16000, "loss_tokens": 256}), smallest_dram_bytes(job))


def test_saves_are_as_asked() -> None:
    small = smallest_dram_bytes(job_of()) + MiB
    assert plan(job_of(), small).save_every == 1
    assert plan(job_of(save_every=7), small).save_every == 7
    assert plan(job_of(save_every=7), None).save_every == 7
    rare, often = (plan(job_of(save_every=n), None).ssd_write_per_step_bytes for n in (100, 10))
    assert often == pytest.approx(10 * rare, rel=0.01)


def test_an_ssd_that_is_too_small_is_refused() -> None:
    job = job_of()
    dram = smallest_dram_bytes(job)
    with pytest.raises(Infeasible, match="--ssd .*bfloat16") as caught:
        plan(job, dram, ssd_bytes=100 * MiB)
    enough = caught.value.smallest_bytes
    assert caught.value.tier == Tier.SSD
    assert enough > state_bytes(job.layout_of(16000))
    assert plan(job, dram, ssd_bytes=enough).predicted[Tier.DRAM].total_bytes <= dram
    with pytest.raises(Infeasible):
        plan(job, dram, ssd_bytes=enough - 1)


def test_without_an_offload_directory_no_ssd_is_asked_for() -> None:
    p = plan(job_of(offload=False), 8 * GiB, ssd_bytes=MiB)
    assert on_ssd(p) == {Tier.DRAM}


def test_the_reasons_tell_what_a_person_wants_to_know() -> None:
    job = job_of(steps=500)
    p = plan(job, smallest_dram_bytes(job) + 5 * MiB)
    text = " | ".join(p.reasons)
    for expected in (
        "training state",
        "weights: ",
        "moments: ",
        "boundary activations of",
        "tiles",
        "clipping needs the global norm",
        "saved every 1 step:",
        "written in 500 steps",
        "% of the drive's endurance",
        "the SSD alone needs",
    ):
        assert expected in text, expected
    assert p.ssd_write_total_bytes == 500 * p.ssd_write_per_step_bytes
    assert p.step_s > 0
    assert "no clipping" in " | ".join(plan(job_of(clips=False), smallest_dram_bytes(job)).reasons)


def test_the_plan_can_be_written_down() -> None:
    import json

    p = plan(job_of(), smallest_dram_bytes(job_of()))
    text = json.loads(json.dumps(p.to_dict()))
    assert text["residence"]["block.0"] == {"weights": "ssd", "moments": "ssd", "gradient": "ssd"}
    assert sum(text["predicted"]["dram"].values()) == p.predicted[Tier.DRAM].total_bytes


def test_a_gpu_budget_is_kept_and_refused_by_its_own_name() -> None:
    job = job_of(on_gpu=True, compute_dtype=torch.bfloat16)
    p = plan(job, 8 * GiB, gpu_bytes=8 * GiB)
    assert 0 < p.predicted[Tier.GPU].total_bytes <= 8 * GiB
    with pytest.raises(Infeasible, match="--gpu") as caught:
        plan(job, 8 * GiB, gpu_bytes=MiB)
    assert caught.value.tier == Tier.GPU
    enough = caught.value.smallest_bytes
    assert plan(job, 8 * GiB, gpu_bytes=enough).predicted[Tier.GPU].total_bytes <= enough


def test_more_than_three_ring_buffers_are_for_chunks() -> None:
    """Each holds gradient, weights and state of the largest matrix, 27 MiB each here."""
    wide = {"width": 1536, "vocabulary": 4000, "layers": 3}
    matrices, chunks = (plan(job_of(**wide, **KINDS[k]), 1200 * MiB) for k in ("matrices", "clipped"))
    assert on_ssd(matrices) == on_ssd(chunks) == {Tier.DRAM, Tier.SSD}
    assert (matrices.ring_buffers, chunks.ring_buffers) == (3, 8)
    assert any("21 matrices are updated as a whole, on the CPU" in reason for reason in matrices.reasons)


# -- depth


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_budget_does_not_depend_on_depth(kind: str) -> None:
    shape = {"width": 1024, "vocabulary": 32000, **{k: v for k, v in KINDS[kind].items() if k != "layers"}}
    few, many = (smallest_dram_bytes(job_of(layers=n, **shape)) for n in (24, 48))
    assert few <= many <= 1.05 * few


def test_the_smallest_budget_of_real_models_does_not_depend_on_depth() -> None:
    def smallest(layers: int) -> int:
        config = config_of("llama", hidden_size=256, intermediate_size=768, vocab_size=4000, num_hidden_layers=layers)
        skeleton = build_skeleton(config)
        layered, decay = HFLayeredModel(skeleton), decay_names(skeleton)

        rules = dict.fromkeys((name for name, _ in skeleton.named_parameters()), ADAMW)

        def layout_of(tile_rows: int) -> Layout:
            return model_layout(layered, decay=decay, dtypes={}, rules=rules, tile_rows=tile_rows)

        ids = torch.zeros(2, 64, dtype=torch.long)
        costs = model_costs(layered, layout_of(10**9), {"input_ids": ids}, torch.float32)
        assert not costs.estimated
        sizes = replace(
            job_of().sizes,
            tokens=ids.numel(),
            width=costs.width,
            forward_bytes=costs.forward_bytes,
            backward_bytes=costs.backward_bytes,
            calls_bytes=costs.calls_bytes,
            runtime_bytes=0,
        )
        return smallest_dram_bytes(replace(job_of(), sizes=sizes, layout_of=layout_of, rows=4000, row_bytes=1024))

    assert smallest(24) <= smallest(48) <= 1.05 * smallest(24)


def test_residence_of_nothing_said_is_ssd() -> None:
    assert Residence() == Residence(weights=Tier.SSD, moments=Tier.SSD, gradient=Tier.SSD)


def test_a_tiny_model_needs_less_without_streaming() -> None:
    """The ring alone is larger than the whole training state."""
    job = job_of(layers=2, width=64, vocabulary=500)
    assert on_ssd(plan(job, smallest_dram_bytes(job))) == {Tier.DRAM}
