from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.profiler.readers import Readers
from memopt.profiler.session import Session
from memopt.profiler.thinning import Point, Thinner
from memopt.units import MiB

SIZE = 48 * MiB
SLACK = 6 * MiB


def touched(nbytes: int) -> mmap.mmap:
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, nbytes, mmap.PAGESIZE):
        region[offset] = 1
    return region


def test_peak_phases_and_time_line() -> None:
    with Session(interval_s=0.01) as session:
        with session.phase("quiet"):
            pass
        with session.phase("outer"), session.phase("inner"):
            region = touched(SIZE)
            session.sample()
        region.close()
        with session.phase("after"):
            pass
    measured = session.stop()
    base = measured.dram_start_bytes
    assert SIZE - SLACK < measured.dram_peak_bytes - base < SIZE + SLACK
    assert measured.dram_upper_bound_bytes >= measured.dram_peak_bytes
    peaks = {phase.name: (phase.dram_peak_bytes or 0) - base for phase in measured.phases}
    assert peaks["quiet"] < SLACK
    assert peaks["after"] < SLACK
    assert peaks["inner"] > SIZE - SLACK
    assert peaks["outer"] > SIZE - SLACK
    assert [phase.name for phase in measured.phases] == ["quiet", "inner", "outer", "after"]
    for phase in measured.phases:
        assert 0 <= phase.start_s <= phase.end_s <= measured.wall_s
    assert max(nbytes or 0 for nbytes in measured.timeline.dram_bytes) == measured.dram_peak_bytes
    assert measured.timeline.t_s == sorted(measured.timeline.t_s)
    assert measured.samples >= 6
    assert 0 < measured.cost_s <= measured.wall_s + 0.1
    assert measured.oom_kills == 0


def test_the_thread_sees_a_limit_crossed_each_time_once() -> None:
    crossed = threading.Event()
    calls: list[tuple[int, int]] = []

    def on_over(now_bytes: int, limit_bytes: int) -> None:
        calls.append((now_bytes, limit_bytes))
        crossed.set()

    probe = Session()
    probe.start()
    limit = probe.stop().dram_start_bytes + SIZE // 2
    with Session(interval_s=0.005, limit_bytes=limit, on_over=on_over) as session:
        assert not calls
        region = touched(SIZE)
        assert crossed.wait(10), "the background thread took no sample"
        session.sample()
        assert len(calls) == 1
        region.close()
        session.sample()
        region = touched(SIZE)
        session.sample()
        assert len(calls) == 2
        region.close()
    assert all(now_bytes > limit == given_limit for now_bytes, given_limit in calls)


def test_an_error_of_the_thread_is_raised_by_stop() -> None:
    raised = threading.Event()

    def on_over(now_bytes: int, limit_bytes: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raised.set()
            raise RuntimeError("from the thread")

    session = Session(interval_s=0.005, limit_bytes=1, on_over=on_over)
    session.start()  # over at once, in this thread
    session._over._is_over = False
    assert raised.wait(10)
    with pytest.raises(RuntimeError, match="from the thread"):
        session.stop()
    assert session.stop().samples > 0, "what was measured is still to be had"


def test_watched_directories(tmp_path: Path) -> None:
    with Session(watch=[tmp_path]) as session:
        (tmp_path / "file").write_bytes(b"x" * MiB)
        with (tmp_path / "file").open("rb+") as file:
            file.flush()
            os.fsync(file.fileno())
        session.sample()
        (tmp_path / "file").unlink()
        session.sample()
        assert (session.ssd_bytes() or 0) < MiB
    peak = session.stop().ssd_peak_bytes
    assert peak is not None
    assert MiB <= peak < 2 * MiB


def test_used_once_and_in_order() -> None:
    session = Session()
    with pytest.raises(RuntimeError, match="not started"):
        session.sample()
    session.start()
    with pytest.raises(RuntimeError, match="used once"):
        session.start()
    first = session.stop()
    assert session.stop() is first
    assert session.dram_bytes() > 0
    with pytest.raises(ValueError, match="interval_s"):
        Session(interval_s=0)


def test_no_thread_and_no_file_stays_behind() -> None:
    def fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = threading.active_count(), fds()
    for _ in range(3):
        with Session() as session:
            session.sample()
    assert (threading.active_count(), fds()) == before


def test_many_phases_stay_few() -> None:
    with Session(interval_s=1.0) as session:
        for index in range(1005):
            with session.phase("a" if index % 2 else "b"):
                pass
        with session.phase("new"):
            pass
    phases = session.stop().phases
    assert len(phases) == 1001
    assert phases[-1].name == "new"
    merged, plain = phases[998:1000], phases[:998]
    assert {phase.name for phase in merged} == {"a", "b"}
    assert min(phase.end_s for phase in merged) > max(phase.end_s for phase in plain)
    assert all(phase.start_s < phase.end_s for phase in merged)


series = st.lists(st.integers(0, 1000), min_size=1, max_size=500)


@given(series, st.integers(6, 33))
def test_thinning_keeps_peaks_valleys_and_order(values: list[int], max_points: int) -> None:
    thinner = Thinner(max_points)
    given_points = [Point(float(index), value) for index, value in enumerate(values)]
    for point in given_points:
        thinner.add(point)
    kept = thinner.points()
    assert len(kept) <= max_points
    assert len({point.t_s for point in kept}) == len(kept)
    assert [point.t_s for point in kept] == sorted(point.t_s for point in kept)
    assert set(kept) <= set(given_points)
    assert max(point.dram_bytes for point in kept) == max(values)
    assert min(point.dram_bytes for point in kept) == min(values)


def test_thinning_covers_the_whole_time_evenly() -> None:
    thinner = Thinner(100)
    for index in range(100_000):
        thinner.add(Point(float(index), index % 7))
    kept = thinner.points()
    assert len(kept) >= 50
    gaps = [later.t_s - earlier.t_s for earlier, later in zip(kept, kept[1:], strict=False)]
    assert max(gaps) <= 2 * 100_000 / 25, "no stretch is left empty"


def test_few_points_are_all_kept() -> None:
    thinner = Thinner(10)
    for index in range(5):
        thinner.add(Point(float(index), index))
    assert [point.t_s for point in thinner.points()] == [0, 1, 2, 3, 4]
    assert thinner.timeline().dram_bytes == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="max_points"):
        Thinner(3)


def test_another_process_is_watched_without_this_one_and_may_vanish() -> None:
    code = f"import sys; x = bytearray(b'1') * {SIZE}; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-S", "-E", "-c", code], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        own = touched(4 * SIZE)
        with Session(root_pid=child.pid) as session:
            assert session.pids() == [child.pid]
            child.kill()
            child.wait()
            assert session.sample() == 0
        own.close()
    measured = session.stop()
    assert SIZE < measured.dram_peak_bytes < SIZE + 2 * SLACK
    assert measured.dram_start_bytes == measured.dram_peak_bytes
    assert measured.own_dram_bytes is not None
    assert measured.own_dram_bytes > 0
    with Session(root_pid=2**22 + 1) as nobody:
        pass
    assert nobody.stop().dram_peak_bytes == 0


def test_a_dear_look_does_not_leave_the_job_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = threading.Event()
    looks = 0
    read = Readers.read

    def dear(self: Readers, t_s: float, *, fresh: bool) -> Point:
        nonlocal looks
        looks += 1
        if looks == 3:  # what the shares of many new processes take: more than the time pays for in a minute
            began = time.thread_time()
            while time.thread_time() - began < 0.15:
                pass
        elif looks == 8:
            enough.set()
        return read(self, t_s, fresh=fresh)

    monkeypatch.setattr(Readers, "read", dear)
    with Session():
        assert enough.wait(20), f"{looks} samples"


def test_a_step_of_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(interval_s=0.005) as session:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        with session.phase("after the step"):
            session.sample()
        monkeypatch.setattr(time, "time", lambda: 4e9)
    measured = session.stop()
    assert 0 < measured.wall_s < 60
    assert measured.timeline.t_s == sorted(measured.timeline.t_s)
    (phase,) = measured.phases
    assert 0 <= phase.start_s <= phase.end_s <= measured.wall_s


def test_many_short_phases_cost_little_and_still_have_peaks() -> None:
    with Session(interval_s=1.0) as session:
        begun = session._running()
        begun.edges.spend(1e9, begun.elapsed_s())  # all that the ends of phases may cost is spent
        before = session._seen.samples
        for _ in range(100):
            with session.phase("step"):
                pass
        assert session._seen.samples - before < 100
    phases = session.stop().phases
    assert len(phases) == 100
    assert all((phase.dram_peak_bytes or 0) > 0 for phase in phases)
