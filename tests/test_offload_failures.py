"""Crashes, full disks, broken numbers: the last save is intact, and training goes on from it to the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from memopt.errors import BadInput, MemoptError, NonFinite
from memopt.plan_types import Residence
from memopt.store.errors import StoreCorrupt
from memopt.store.transfer import Hook, IoPool, Piece, RandomAccessFile, Transfer
from tests.offload_helpers import (
    IN_DRAM,
    WHOLE,
    Setup,
    Steps,
    Subject,
    Trained,
    assert_same,
    batches,
    config_of,
    everywhere,
    one_thread,  # noqa: F401
    opened,
    run_steps,
    scattered,
    setup,
    subject,
    train,
    weights_of,
    within,
)

STEPS = 5

WHERE: dict[str, Callable[[Any], dict[str, Residence]]] = {
    "ssd": lambda layout: everywhere(layout, Residence()),
    "mixed": lambda layout: scattered(layout, 4),
    "dram": lambda layout: everywhere(layout, IN_DRAM),
}


class Crash(Exception):
    """What a test throws in the middle of things."""


def state_of(this: Setup) -> dict[str, torch.Tensor]:
    with opened(this) as at:
        return weights_of(this, at)


# -- abandoned runs


@pytest.mark.parametrize(
    ("family", "where", "clip", "save_every"),
    [
        ("llama", "ssd", 0.05, 1),
        ("llama", "mixed", 0.05, 3),
        ("llama", "dram", 0.0, 3),
        ("llama", "mixed", 0.0, 1),
        ("llama_tied", "ssd", 0.0, 3),
        ("llama_tied", "mixed", 0.05, 1),
        ("llama_tied", "dram", 0.05, 3),
    ],
)
def test_an_abandoned_run_goes_on_from_its_last_save(
    family: str, where: str, clip: float, save_every: int, tmp_path: Path
) -> None:
    model = subject(family)
    steps = batches(model.vocabulary, STEPS)

    def at(name: str) -> Setup:
        return setup(model, tmp_path / name, steps, clip_norm=clip, residence=WHERE[where], activation_layers_on_ssd=1)

    whole = train(at("whole"), steps, save_every=save_every)
    saved: set[int] = set()
    for crashed_after in (2, 4):
        this = at(f"crash {crashed_after}")
        with opened(this) as open_:
            run_steps(open_.engine, steps[:crashed_after], save_every=save_every)
        with opened(this) as open_:
            start = open_.engine.progress.step
        # with clipping the update of the last step was still waiting for the next one
        done = crashed_after - 1 if clip else crashed_after
        assert start == done // save_every * save_every
        saved.add(start)
        assert_same(state_of(this), train(at(f"only {start}"), steps[:start]).weights if start else model.initial)
        rest = train(this, steps, save_every=save_every)
        assert rest.losses == whole.losses[start:]
        assert_same(rest.weights, whole.weights)
    assert len(saved) >= 2


@pytest.mark.parametrize("where", ["ssd", "mixed"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_a_crash_inside_a_step_loses_that_step_only(moment: str, clip: float, where: str, tmp_path: Path) -> None:
    """In the backward of an unclipped step half the units are updated already."""
    model = subject("llama")
    steps = batches(model.vocabulary, 5)

    def at(name: str) -> Setup:
        return setup(model, tmp_path / name, steps, clip_norm=clip, residence=WHERE[where])

    whole = train(at("whole"), steps, save_every=1)
    this = at("crashed")
    with opened(this) as open_:
        run_steps(open_.engine, steps[:3], save_every=1)
        with crashing(model, moment), pytest.raises(Crash):
            open_.engine.step(steps[3], lr=1e-4, save=True)
    rest = train(this, steps, save_every=1)
    start = len(steps) - len(rest.losses)
    # the riding update of step 3 is committed by the forward of step 4 only if that comes to its end
    assert start in ({3} if not clip else {2, 3} if moment == "backward" else {2})
    assert rest.losses == whole.losses[start:]
    assert_same(rest.weights, whole.weights)


def test_after_a_crash_inside_a_step_nothing_half_done_can_be_saved(tmp_path: Path) -> None:
    model = subject("llama")
    steps = batches(model.vocabulary, 2)
    this = setup(model, tmp_path, steps)
    with opened(this) as at:
        at.engine.step(steps[0], lr=1e-4, save=True)
        with crashing(model, "backward"), pytest.raises(Crash):
            at.engine.step(steps[1], lr=1e-4, save=True)
        for act in (at.engine.save, at.engine.flush, lambda: at.engine.step(steps[1], lr=1e-4, save=True)):
            with pytest.raises(MemoptError, match="step 2 was broken off.*last save"):
                act()
    expected = train(setup(model, tmp_path / "one", steps), steps[:1])
    assert_same(state_of(this), expected.weights)


class crashing:
    """Within it the model's middle block fails, in the forward pass or while its gradient is computed."""

    def __init__(self, model: Subject, moment: str):
        self._block, self._moment = model.layered.blocks[1], moment
        self._handle: Any = None

    def __enter__(self) -> None:
        def before(*_: Any) -> None:
            if torch.is_grad_enabled() == (self._moment == "backward"):
                raise Crash

        self._handle = self._block.register_forward_pre_hook(before)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def test_a_step_that_was_not_to_be_saved_is_saved_at_the_end(tmp_path: Path) -> None:
    model = subject("llama_tied")
    steps = batches(model.vocabulary, 3)
    this = setup(model, tmp_path, steps, clip_norm=0.05, residence=WHERE["mixed"])
    with opened(this) as at:
        run_steps(at.engine, steps, save_every=2)
        at.engine.flush()  # applies the third update, for which the save of the second has to be over
        assert at.engine.saved_step == 2
        at.engine.save()
        assert at.engine.saved_step == 3
        commits = at.store.commits if at.store else 0
        at.engine.save()
        assert at.store is not None and at.store.commits == commits, "nothing new, nothing written"
        expected = weights_of(this, at)
    assert_same(state_of(this), expected)


# -- broken numbers


def poisoned() -> Subject:
    """Token 2 has an embedding of NaN. Batches do not contain it unless a test puts it there."""
    model = Subject(config_of("llama"))
    model.initial["model.embed_tokens.weight"][2] = float("nan")
    return model


def with_poison(steps: Steps, at: Sequence[int]) -> Steps:
    out = []
    for index, micros in enumerate(steps):
        micro = {k: v.clone() for k, v in micros[0].items()}
        if index in at:
            micro["input_ids"][0, 0] = 2
        out.append([micro])
    return out


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize(("where", "tile_rows"), [("ssd", WHOLE), ("mixed", 50), ("dram", 50)])
def test_a_loss_that_is_not_finite(clip: float, where: str, tile_rows: int, tmp_path: Path) -> None:
    model = poisoned()
    clean = batches(model.vocabulary, 5)
    steps = with_poison(clean, [2])
    choice: dict[str, Any] = {"clip_norm": clip, "residence": WHERE[where], "tile_rows": tile_rows}

    strict = setup(model, tmp_path / "strict", steps, **choice)
    with opened(strict) as at:
        run_steps(at.engine, steps[:2], save_every=1)
        with pytest.raises(NonFinite, match="step 3.*last saved"):
            at.engine.step(steps[2], lr=1e-4, save=True)
        with pytest.raises(MemoptError, match="step 3 was not finite"):
            at.engine.save()
    # an update that was still waiting is kept only once a loss has been seen with it
    kept_steps = 1 if clip else 2
    expected = train(setup(model, tmp_path / "kept", steps, **choice), steps[:kept_steps])
    with opened(strict) as at:
        assert at.engine.progress.step == kept_steps
    drop_poison(expected.weights, kept := state_of(strict))
    assert_same(kept, expected.weights)

    lenient = setup(model, tmp_path / "lenient", steps, skip_nonfinite=True, **choice)
    got = train(lenient, steps, save_every=1)
    assert [r.skipped for r in got.results] == [False, False, True, False, False]
    others = [clean[i] for i in (0, 1, 3, 4)]
    without = train(setup(model, tmp_path / "without", others, **choice), others)
    assert [got.losses[i] for i in (0, 1, 3, 4)] == without.losses
    drop_poison(got.weights, without.weights)
    assert_same(got.weights, without.weights)
    with opened(lenient) as at:
        assert (at.engine.progress.step, at.engine.progress.updates) == (5, 4)


def drop_poison(*weights: dict[str, torch.Tensor]) -> None:
    """NaN is not equal to itself."""
    for some in weights:
        assert not some["model.embed_tokens.weight"][2].isfinite().any()
        some["model.embed_tokens.weight"][2] = 0
        assert all(t.isfinite().all() for t in some.values())


class exploding:
    """Within it the gradient that leaves the model's middle block is infinite; the loss is what it was."""

    def __init__(self, model: Subject):
        self._block = model.layered.blocks[1]
        self._handle: Any = None

    def __enter__(self) -> None:
        def before(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            if args[0].requires_grad:
                args[0].register_hook(lambda grad: grad * float("inf"))

        self._handle = self._block.register_forward_pre_hook(before)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_gradient_that_is_not_finite(family: str, tmp_path: Path) -> None:
    model = subject(family)
    steps = batches(model.vocabulary, 4)

    def at(name: str, **more: Any) -> Setup:
        return setup(model, tmp_path / name, steps, clip_norm=0.05, residence=WHERE["mixed"], **more)

    with opened(at("strict")) as open_:
        run_steps(open_.engine, steps[:2], save_every=1)
        with exploding(model), pytest.raises(NonFinite, match="step 3: the loss is [0-9.]+ and the gradient norm"):
            open_.engine.step(steps[2], lr=1e-4, save=True)
    assert_same(state_of(at("strict")), train(at("two"), steps[:2]).weights)

    this = at("lenient", skip_nonfinite=True)
    with opened(this) as open_:
        run_steps(open_.engine, steps[:2], save_every=1)
        with exploding(model):
            result = open_.engine.step(steps[2], lr=1e-4, save=True)
        assert result.skipped and result.loss > 0
        run_steps(open_.engine, steps, save_every=1)
        open_.engine.save()
        got = weights_of(this, open_)
    assert_same(got, train(at("without"), [*steps[:2], steps[3]]).weights)


# -- bad batches


def test_bad_batches_are_refused_and_the_engine_goes_on(tmp_path: Path) -> None:
    model = subject("llama_tied")
    steps = batches(model.vocabulary, 3)
    this = setup(model, tmp_path, steps, clip_norm=0.05)
    too_large = batches(model.vocabulary, 1, accum=2)[0]
    unlabelled = [{**steps[1][0], "labels": torch.full_like(steps[1][0]["labels"], -100)}]
    only_first = [{**steps[1][0], "labels": unlabelled[0]["labels"].index_fill(1, torch.tensor([0]), 5)}]
    with opened(this) as at:
        at.engine.step(steps[0], lr=1e-4, save=True)
        with pytest.raises(BadInput, match=r"step 2: 64 tokens.*at most 32"):
            at.engine.step(too_large, lr=1e-4, save=True)
        for batch in (unlabelled, only_first):
            with pytest.raises(BadInput, match=r"step 2: no token.*label"):
                at.engine.step(batch, lr=1e-4, save=True)
        with pytest.raises(BadInput, match="no token"):
            at.engine.evaluate(unlabelled)
        run_steps(at.engine, steps, save_every=1)
        at.engine.save()
        got = weights_of(this, at)
    assert_same(got, train(setup(model, tmp_path / "good", steps, clip_norm=0.05), steps).weights)


# -- failing drives


class FailingPool(IoPool):
    """Moves bytes until it is armed; then, after so many more, requests of one direction on one file fail."""

    def __init__(self) -> None:
        super().__init__(2)
        self._armed: tuple[str, bool] | None = None
        self._left = 0

    def arm(self, kind: str, *, write: bool, after: int) -> None:
        self._armed, self._left = (f"{kind}.bin", write), after

    def submit(
        self, file: RandomAccessFile, pieces: Sequence[Piece], *, write: bool, hook: Hook | None = None
    ) -> Transfer:
        if self._armed == (Path(str(getattr(file, "path", ""))).name, write):
            self._left -= 1
            if self._left < 0:
                file = BrokenFile()
        return super().submit(file, pieces, write=write, hook=hook)


class BrokenFile:
    def read_into(self, view: memoryview, offset: int) -> None:
        raise OSError(5, "the drive is on fire")

    def write_from(self, view: memoryview, offset: int) -> None:
        raise OSError(28, "the drive is full")


FAILURES = [
    ("weights", False, 0.05),
    ("weights", True, 0.05),
    ("weights", True, 0.0),
    ("moments", False, 0.05),
    ("moments", False, 0.0),
    ("moments", True, 0.0),
    ("gradients", True, 0.05),
    ("gradients", False, 0.05),
    ("activations", True, 0.0),
    ("activations", False, 0.05),
]


@functools.cache
def undisturbed(clip: float) -> Trained:
    model, steps = subject("llama_tied"), batches(128, 6)
    return train(setup(model, None, steps, clip_norm=clip, residence=lambda layout: everywhere(layout, IN_DRAM)), steps)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(("kind", "write", "clip"), FAILURES)
def test_an_io_error_surfaces_and_the_last_save_is_intact(
    kind: str, write: bool, clip: float, after: int, tmp_path: Path
) -> None:
    model = subject("llama_tied")
    steps = batches(model.vocabulary, 6)
    pool = FailingPool()
    this = setup(
        model,
        tmp_path / "failing",
        steps,
        clip_norm=clip,
        activation_layers_on_ssd=3,
        pool_of=lambda: pool,
    )

    def until_it_fails() -> None:
        with opened(this) as at:
            run_steps(at.engine, steps[:3], save_every=1)
            pool.arm(kind, write=write, after=after)
            run_steps(at.engine, steps, save_every=1)
            at.engine.save()

    error = within(60, until_it_fails)
    assert error is not None and "drive is" in "".join(chain(error)), repr(error)
    this.pool_of = lambda: IoPool(2)
    whole = undisturbed(clip)
    rest = train(this, steps)
    assert len(rest.losses) <= 4, "what was saved is still there"
    assert_same(rest.weights, whole.weights)


def chain(error: BaseException | None) -> list[str]:
    """The messages of an error and its causes."""
    return [] if error is None else [str(error), *chain(error.__cause__ or error.__context__)]


def test_a_damaged_byte_is_named(tmp_path: Path) -> None:
    model = subject("llama")
    steps = batches(model.vocabulary, 2)
    this = setup(model, tmp_path, steps)
    train(this, steps[:1])
    file = tmp_path / "state" / "weights.bin"
    data = bytearray(file.read_bytes())
    file.write_bytes(bytes(b ^ 1 for b in data))

    def go_on() -> None:
        with opened(this) as at:
            at.engine.step(steps[1], lr=1e-4, save=True)

    error = within(60, go_on)
    assert isinstance(error, StoreCorrupt)
    assert "weights" in str(error) and "weights.bin" in str(error)


def test_an_evaluation_that_breaks_off_stops_the_engine_too(tmp_path: Path) -> None:
    """What was fetched for it still waits in the stream."""
    model = subject("gpt2")
    steps = batches(model.vocabulary, 4)
    this = setup(model, tmp_path / "a", steps)
    with opened(this) as at:
        run_steps(at.engine, steps[:2], save_every=1)
        with crashing(model, "forward"), pytest.raises(Crash):
            at.engine.evaluate(steps[2])
        with pytest.raises(MemoptError, match="evaluation after step 2"):
            at.engine.step(steps[2], lr=1e-4, save=True)
    assert_same(
        train(this, steps, save_every=1).weights,
        train(setup(model, tmp_path / "b", steps), steps).weights,
    )
