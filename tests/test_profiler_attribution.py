"""Whose bytes they are: asked at peaks and along the time line, and `other` is always the rest of what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.budget import Budget
from memopt.ledger import Ledger
from memopt.machine import Machine
from memopt.profiler.assemble import Story, assemble
from memopt.profiler.attribution import Attribution
from memopt.profiler.measured import Attributed, by_category
from memopt.profiler.peaks import Peaks
from memopt.profiler.session import Session
from memopt.profiler.thinning import Point, Thinner
from memopt.tiers import Category, Tier
from memopt.units import MiB
from tests.test_profiler_session import SIZE, SLACK, touched


def test_peaks_of_phases_and_of_the_run_know_whose_bytes_they_were() -> None:
    held: dict[Category, int] = {}
    with Session(interval_s=0.01, attribution=lambda: {Tier.DRAM: held}) as session:
        with session.phase("load"):
            held[Category.WEIGHTS] = SIZE  # first: the thread may sample at any moment
            weights = touched(SIZE)
            session.sample()
        with session.phase("step"):
            held[Category.ACTIVATIONS] = SIZE
            more = touched(SIZE)
            session.sample()
            more.close()
            del held[Category.ACTIVATIONS]
        weights.close()
        held.clear()
    measured = session.stop()
    load, step = measured.phases
    assert load.at_peak["dram"]["weights"] == SIZE
    assert load.at_peak["dram"]["activations"] == 0
    assert step.at_peak["dram"]["activations"] == SIZE
    for phase in (load, step):
        assert sum(phase.at_peak["dram"].values()) == phase.dram_peak_bytes, "other is the rest"
        assert abs(phase.at_peak["dram"]["other"] - measured.dram_start_bytes) < 2 * SLACK
    report = assemble(measured, Ledger(Budget()), Machine(name="box"), Story())
    dram = report.tiers.dram
    assert dram.attributed_by == "torch"
    assert (dram.at_peak["weights"], dram.at_peak["activations"]) == (SIZE, SIZE)
    assert sum(dram.at_peak.values()) == dram.peak_bytes
    line = report.timeline
    assert set(line.categories) == {"dram"}
    assert max(nbytes or 0 for nbytes in line.categories["dram"]["weights"]) == SIZE
    for index, total in enumerate(line.dram_bytes):
        assert sum(column[index] or 0 for column in line.categories["dram"].values()) == total


def test_without_attribution_the_ledger_tells_and_without_both_all_is_other() -> None:
    with Session() as session:
        pass
    measured = session.stop()
    assert measured.timeline.categories == {}
    ledger = Ledger(Budget())
    nobody = assemble(measured, ledger, Machine(name="box"), Story()).tiers.dram
    assert nobody.attributed_by is None
    assert nobody.at_peak["other"] == nobody.peak_bytes
    ledger.charge(Tier.DRAM, Category.BUFFERS, MiB, "b")
    told = assemble(measured, ledger, Machine(name="box"), Story()).tiers.dram
    assert told.attributed_by == "ledger"
    assert told.at_peak["buffers"] == MiB


def test_the_error_of_an_attribution_is_told() -> None:
    def broken() -> Attributed:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        Session(attribution=broken).start()


def test_asked_rarely_along_the_line_and_at_once_for_a_peak() -> None:
    asked: list[int] = []

    def ask() -> Attributed:
        asked.append(1)
        return {Tier.GPU: {Category.WEIGHTS: len(asked)}}

    attribution = Attribution(ask)
    for index in range(100):  # one second of samples
        attribution.latest(index / 100, at_peak=False)
    assert 1 <= len(asked) <= 11
    before = len(asked)
    found = attribution.latest(5.0, at_peak=True)
    assert found == {Tier.GPU: {Category.WEIGHTS: before + 1}}
    assert Attribution(None).latest(0.0, at_peak=True) is None


def test_a_peak_that_creeps_is_not_worth_asking_at_every_sample() -> None:
    peaks = Peaks()
    worth = 0
    for step in range(1000):
        point = Point(step / 50, 100 * MiB + step * 4096)
        asked = peaks.worth_asking(point)
        worth += asked
        peaks.see(point, asked=asked)
    assert 1 <= worth <= 5
    assert peaks.of(Tier.DRAM) == 100 * MiB + 999 * 4096


@given(st.dictionaries(st.sampled_from(list(Category)), st.integers(0, 1000)), st.integers(0, 3000))
def test_categories_add_up_to_what_was_measured(attributed: dict[Category, int], measured: int) -> None:
    named = by_category(attributed, measured)
    assert sum(named.values()) == measured
    assert list(named) == [str(category) for category in Category]


def test_thinning_keeps_the_peaks_of_every_tier() -> None:
    thinner = Thinner(60)
    for index in range(10_000):
        thinner.add(Point(float(index), 5, gpu_bytes=9 if index == 4321 else 1, ssd_bytes=7 if index == 77 else None))
    line = thinner.timeline()
    assert len(line.t_s) <= 60
    assert max(nbytes or 0 for nbytes in line.gpu_bytes) == 9
    assert 7 in line.ssd_bytes


@pytest.mark.parametrize(("later_bytes", "known"), [(600 * MiB, True), (500 * MiB, False)])
def test_attribution_that_begins_after_the_peak_is_its_own_when_little_has_gone(later_bytes: int, known: bool) -> None:
    peaks = Peaks()
    peaks.see(Point(0.0, 600 * MiB + MiB // 2, attributed={}), asked=True)
    weights: Attributed = {Tier.DRAM: {Category.WEIGHTS: 400 * MiB}}
    peaks.see(Point(1.0, later_bytes, attributed=weights), asked=False)
    peaks.see(Point(2.0, later_bytes, attributed={Tier.DRAM: {Category.WEIGHTS: 1}}), asked=False)
    assert peaks.of(Tier.DRAM) == 600 * MiB + MiB // 2
    assert peaks.attributed() == (weights if known else {})


def test_a_moment_that_nobody_could_tell_of_is_other_and_the_highest_known_one_stands_for_the_peak() -> None:
    answers: list[Attributed | None] = [
        {Tier.DRAM: {Category.WEIGHTS: 4, Category.ACTIVATIONS: 3}},
        None,
        {Tier.DRAM: {Category.WEIGHTS: 4, Category.ACTIVATIONS: 5}},
    ]
    attribution = Attribution(lambda: answers.pop(0))
    peaks = Peaks()
    told = []
    for t_s, nbytes in ((0.0, 100 * MiB), (10.0, 300 * MiB), (20.0, 200 * MiB)):
        rising = peaks.worth_asking(Point(t_s, nbytes))
        assert rising
        now = attribution.latest(t_s, at_peak=rising)
        told.append((now or {}).get(Tier.DRAM))
        asked = attribution.asked and attribution.current
        peaks.see(Point(t_s, nbytes, attributed=now if attribution.current else None), asked=asked)
    assert told[1] == {Category.WEIGHTS: 4}, "of the answer before, what stays from step to step"
    assert peaks.of(Tier.DRAM) == 300 * MiB
    assert peaks.attributed() == {Tier.DRAM: {Category.WEIGHTS: 4, Category.ACTIVATIONS: 5}}
    creeping = {Tier.DRAM: {Category.WEIGHTS: 4}}
    peaks.see(Point(30.0, 300 * MiB + 4096, attributed=creeping), asked=False)
    assert peaks.attributed()[Tier.DRAM][Category.ACTIVATIONS] == 5, "a peak that creeps keeps what was known of it"
