"""`memopt profile` as a person meets it: exit codes, budgets, signals, what a job leaves behind, what goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.forecast_types import Forecast, PhaseForecast
from memopt.jobs.profile import SHORT_S, ProfileConfig, exit_code, misses, profile
from memopt.profiler import tree_sampler
from memopt.report_types import Report
from memopt.units import MiB
from tests.conftest import ROOT

MAIN = "from memopt.launchers.main import app_main; app_main()"
PYTHON = (sys.executable, "-S", "-E", "-c")
HOLDING = "import sys, time; held = bytearray(b'1') * (96 << 20); print('held', flush=True); sys.stdin.read()"


def start(arguments: Sequence[str], **more: object) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", MAIN, "profile", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, **more)  # type: ignore[call-overload, no-any-return]


def run(*arguments: str) -> tuple[int, str, str]:
    done = start(arguments)
    out, err = done.communicate("", timeout=60)
    return done.returncode, out, err


def test_a_command_has_its_own_input_output_and_exit_code(tmp_path: Path) -> None:
    report = tmp_path / "run.json"
    done = start(["--report", str(report), "--", *PYTHON, "import sys; print(sys.stdin.read()); sys.exit(7)"])
    out, err = done.communicate("hello", timeout=60)
    assert (done.returncode, out) == (7, "hello\n")
    assert "the job itself failed (exit code 7)" in err
    loaded = Report.load(report)
    assert loaded.child is not None
    assert (loaded.child.exit_code, loaded.child.signal, loaded.complete) == (7, None, True)
    assert loaded.verdict == "unbounded"
    assert os.listdir(tmp_path) == ["run.json"], "no journal stays"
    assert loaded.overhead is not None
    assert loaded.overhead.samples > 2
    assert loaded.overhead.dram_bytes is not None


def test_the_profiler_itself_is_not_counted() -> None:
    report = profile(ProfileConfig(command=("sleep", "0.2"))).report
    assert 0 < (report.tiers.dram.peak_bytes or 0) < 4 * MiB


def test_over_budget_leaves_1(tmp_path: Path) -> None:
    report = tmp_path / "run.json"
    code, out, err = run("--dram", "64MiB", "--quiet", "--report", str(report), "--", *PYTHON, HOLDING)
    assert (code, out) == (1, "held\n")
    assert err.splitlines()[-1].startswith("memopt: over budget: dram peak ")
    loaded = Report.load(report)
    assert loaded.verdict == "over"
    assert loaded.tiers.dram.within is False
    code, _, err = run("--dram", "1GiB", "--quiet", "--", *PYTHON, HOLDING)
    assert (code, err) == (0, "")


def test_over_budget_can_stop_the_command_and_its_children() -> None:
    # the command's child ignores the polite signal
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-E', '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); held = bytearray(b'1') * (96 << 20); time.sleep(600)"
    )
    import memopt.jobs.profile as module

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_GRACE_S", 0.3)
        done = profile(ProfileConfig(command=(*PYTHON, code), dram="64MiB", on_over="stop"), said.append)
    assert done.exit_code == 1
    assert done.report.child is not None
    assert (done.report.child.exit_code, done.report.child.signal) == (143, "SIGTERM")
    assert done.report.verdict == "over"
    assert len(said) == 1
    assert "stopping the command" in said[0]
    assert done.messages[0].startswith("over budget: dram peak ")
    assert "the command was stopped: over budget: dram" in done.messages[1]


def test_written_bytes_have_a_budget(tmp_path: Path) -> None:
    writes = (
        f"import os; f = open({str(tmp_path / 'f')!r}, 'wb'); f.write(bytes(8 << 20)); f.flush(); os.fsync(f.fileno())"
    )
    done = profile(ProfileConfig(command=(*PYTHON, writes), ssd_write="4MiB"))
    ssd = done.report.tiers.ssd
    assert ssd is not None
    if not ssd.process_write_bytes:
        pytest.skip("the temporary directory is not on a drive")
    assert ssd.write_budget_bytes == 4 * MiB
    assert (done.exit_code, done.report.verdict) == (1, "over")
    assert profile(ProfileConfig(command=(*PYTHON, writes), ssd_write="64MiB")).exit_code == 0


def test_what_is_left_behind_is_counted_until_it_ends() -> None:
    said: list[str] = []
    # forks, and the parent ends at once: the orphan holds the memory and ends by itself
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        held = bytearray(b'1') * (96 << 20); time.sleep(0.7)\n"
        "    os._exit(0)\n"
    )
    done = profile(ProfileConfig(command=(*PYTHON, code)), said.append)
    assert done.exit_code == 0
    assert 96 * MiB < (done.report.tiers.dram.peak_bytes or 0) < 110 * MiB
    assert "left behind" in said[0]


def test_a_job_of_a_moment_is_seen(tmp_path: Path) -> None:
    # by a profiler of its own: the kernel's mark of a child begins at what its parent held, and pytest holds much
    path = tmp_path / "run.json"
    code, _, err = run("--quiet", "--report", str(path), "--", *PYTHON, "held = bytearray(b'1') * (96 << 20)")
    assert (code, err) == (0, "")
    report = Report.load(path)
    dram = report.tiers.dram
    assert (dram.upper_bound_bytes or 0) > 96 * MiB, "the kernel's mark"
    assert (dram.peak_bytes or 0) > 0
    assert any("can be low" in note for note in report.notes) is (report.wall_s < SHORT_S)


def test_a_signal_is_told_as_a_shell_would() -> None:
    done = profile(ProfileConfig(command=("sh", "-c", "kill -SEGV $$")))
    assert done.exit_code == 128 + signal.SIGSEGV
    assert done.report.child is not None
    assert done.report.child.signal == "SIGSEGV"
    killed = profile(ProfileConfig(command=("sh", "-c", "kill -KILL $$")))
    assert killed.exit_code == 137
    assert killed.report.child is not None
    if not killed.report.child.killed_for_memory:  # nobody else ran out of memory meanwhile
        assert "no counter of the kernel says it was for memory" in killed.messages[0]


@pytest.mark.parametrize("to_group", [True, False], ids=["from the terminal", "to the profiler alone"])
def test_control_c_ends_the_command_and_saves_the_report(tmp_path: Path, to_group: bool) -> None:
    report = tmp_path / "run.json"
    code = "import time; print('up', flush=True); time.sleep(600)"
    done = start(["--quiet", "--report", str(report), "--", *PYTHON, code], start_new_session=True)
    assert done.stdout is not None
    assert done.stdout.readline() == "up\n"
    (os.killpg if to_group else os.kill)(done.pid, signal.SIGINT)
    done.communicate(timeout=60)
    assert done.returncode == 130
    assert Report.load(report).child is not None


def test_a_killed_profiler_leaves_a_report(tmp_path: Path) -> None:
    report = tmp_path / "run.json"
    report.write_text("of an earlier run")
    done = start(["--dram", "64MiB", "--report", str(report), "--", *PYTHON, HOLDING], start_new_session=True)
    assert done.stdout is not None
    assert done.stdout.readline() == "held\n"
    assert done.stderr is not None
    assert "over budget" in done.stderr.readline()  # so it has been sampled
    journal = tmp_path / "run.json.journal"
    size = journal.stat().st_size
    while journal.stat().st_size == size:  # the next lines reach the disk about every two seconds
        assert done.poll() is None
        os.sched_yield()
    done.kill()
    done.communicate(timeout=60)
    loaded = Report.load(report)
    assert loaded.complete is False
    assert loaded.verdict == "over"
    assert (loaded.tiers.dram.peak_bytes or 0) > 96 * MiB
    assert max(nbytes or 0 for nbytes in loaded.timeline.dram_bytes) > 96 * MiB
    assert "did not finish" in loaded.notes[-1]
    assert loaded.command[-1] == HOLDING


def test_the_kernel_enforces_and_its_kill_is_told(tmp_path: Path) -> None:
    code = "held = bytearray(b'1') * (400 << 20)"
    try:
        done = profile(ProfileConfig(command=(*PYTHON, code), dram="100MiB", enforce=True))
    except BadInput as error:
        assert "leave --enforce out" in str(error)
        pytest.skip(str(error))
    child, dram = done.report.child, done.report.tiers.dram
    assert child is not None
    assert (done.exit_code, child.signal, child.killed_for_memory) == (137, "SIGKILL", True)
    assert "oom_kill went up by 1" in (child.evidence or "")
    assert "the kernel killed the job for memory" in done.messages[0]
    assert done.report.verdict == "over"
    assert dram.oom_kills == 1
    assert dram.limit_bytes == 100 * MiB
    assert dram.container_peak_bytes is not None
    assert 90 * MiB < dram.container_peak_bytes <= 101 * MiB
    assert not Path(dram.limit_file or "").parent.exists(), "the group is gone"
    fits = profile(ProfileConfig(command=(*PYTHON, "pass"), dram="100MiB", enforce=True))
    assert (fits.exit_code, fits.report.verdict) == (0, "within")


def plan_of(tmp_path: Path, nbytes: int) -> str:
    phase = PhaseForecast(name="all", use={"dram": {"weights": nbytes}})
    path = tmp_path / f"plan-{nbytes}.json"
    Forecast(job="test", verdict="fits", phases=(phase,)).save(path)
    return str(path)


def test_a_prediction_that_missed_leaves_3(tmp_path: Path) -> None:
    held = (*PYTHON, "import time; held = bytearray(b'1') * (96 << 20); time.sleep(0.3)")
    near, far = plan_of(tmp_path, 100 * MiB), plan_of(tmp_path, 150 * MiB)
    assert profile(ProfileConfig(command=held, plan=near, tolerance=0.1)).exit_code == 0
    missed = profile(ProfileConfig(command=held, plan=far, tolerance=0.1))
    assert missed.exit_code == 3
    assert missed.report.tiers.dram.predicted_bytes == 150 * MiB
    assert missed.messages[0].startswith("the prediction missed: dram ")
    assert profile(ProfileConfig(command=held, plan=far)).exit_code == 0, "shown, not judged"
    failed = profile(ProfileConfig(command=("false",), plan=far, tolerance=0.1))
    assert failed.exit_code == 1
    assert misses(missed.report, None) == []
    assert exit_code(missed.report, missed=True, stopped=True) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--", "no-such-command-here"], "command 'no-such-command-here' not found"),
        (["--", "/etc/passwd"], "may not be executed"),
        ([], "no command: write it after --"),
        (["--dram", "8", "--", "true"], "--dram: '8' has no unit"),
        (["--dram", "0GiB", "--", "true"], "must be more than zero"),
        (["--enforce", "--", "true"], "add --dram"),
        (["--ssd", "1GiB", "--", "true"], "--watch DIR"),
        (["--watch", "/no/such/dir", "--", "true"], "no such directory"),
        (["--tolerance", "10%", "--", "true"], "--plan FILE.json"),
        (["--tolerance", "ten", "--plan", "x", "--", "true"], "write it like 10% or 0.1"),
        (["--plan", "/no/plan.json", "--", "true"], "cannot be read"),
        (["--on-over", "panic", "--", "true"], "write warn or stop"),
        (["--interval", "0", "--", "true"], "write seconds from 0.001 to 60"),
        (["--report", "/no/dir/run.json", "--", "true"], "cannot be written"),
    ],
)
def test_bad_usage_is_one_line_and_runs_nothing(
    capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    from memopt.launchers import main

    assert main.run(["profile", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


def test_options_after_the_command_are_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    from memopt.launchers import main

    assert main.run(["profile", "--quiet", "echo", "--dram", "x"]) == 0
    assert capfd.readouterr().out == "--dram x\n"


def test_a_command_whose_numbers_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's process: status can be read, smaps and io cannot; then what forks share counts for each."""
    monkeypatch.setattr(tree_sampler, "proportional_memory", lambda pid: None)
    monkeypatch.setattr(tree_sampler, "process_io", lambda pid: None)
    code = "import subprocess, sys; held = bytearray(b'1') * (96 << 20); subprocess.run(['sleep', '0.5'])"
    done = profile(ProfileConfig(command=(*PYTHON, code)))
    assert 96 * MiB < (done.report.tiers.dram.peak_bytes or 0) < 110 * MiB
    assert done.exit_code == 0


def test_nothing_of_the_guardian_stays() -> None:
    def state() -> tuple[set[signal.Signals], int]:
        return set(signal.pthread_sigmask(signal.SIG_BLOCK, ())), len(os.listdir("/proc/self/fd"))

    before = state()
    profile(ProfileConfig(command=("true",)))
    with pytest.raises(BadInput):
        profile(ProfileConfig(command=("/etc/passwd",)))
    assert state() == before


def test_profiling_imports_no_framework(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys\n"
        "from memopt.jobs.profile import SHORT_S, ProfileConfig, profile\n"
        "profile(ProfileConfig(command=('true',)))\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
