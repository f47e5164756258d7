"""The plugin in pytest runs of its own."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

PREAMBLE = """
import mmap, os
import pytest

MiB = 2**20

def touched(nbytes):
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, nbytes, mmap.PAGESIZE):
        region[offset] = 1
    return region
"""


def run(pytester: pytest.Pytester, code: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(PREAMBLE + code)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers", "-Werror", *arguments)


def test_budgets_are_growth_unless_absolute(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        """
before = touched(100 * MiB)

@pytest.mark.memory_budget(dram="40MiB")
def test_within():
    touched(20 * MiB).close()

@pytest.mark.memory_budget(dram="40MiB")
def test_over():
    touched(60 * MiB).close()

@pytest.mark.memory_budget(dram="90MiB", absolute=True)
def test_absolute():
    pass

@pytest.mark.memory_budget(dram=50 * MiB)
class TestNearest:
    def test_of_the_class(self):
        touched(60 * MiB)

    @pytest.mark.memory_budget(dram="80MiB")
    def test_its_own(self):
        touched(60 * MiB)

@pytest.fixture
def large():
    return touched(60 * MiB)

@pytest.mark.memory_budget(dram="40MiB")
def test_fixtures_are_there_before(large):
    pass

def test_without_a_budget():
    touched(60 * MiB)
""",
    )
    done.assert_outcomes(passed=4, failed=3)
    done.stdout.re_match_lines(
        [
            r"memory_budget: (59|60)\.\d+ MiB of dram taken above what was there at the start, (19|20)\.\d+ MiB more "
            r"than dram=40.00 MiB \(at the peak: anonymous .*; memory_profile.watch\(model\) tells whose they are\)",
            r"memory_budget: 1\d\d\.\d+ MiB of dram in use, .* more than dram=90.00 MiB",
        ]
    )
    done.stdout.re_match_lines([r"FAILED .*::test_over .*", r"FAILED .*::test_absolute .*", r"FAILED .*of_the_class.*"])


def test_whose_bytes_they_are(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        """
import torch

@pytest.mark.memory_budget(dram="16MiB")
def test_model(memory_profile):
    model = torch.nn.Linear(2048, 4096, bias=False)
    memory_profile.watch(model)
    with memory_profile.phase("backward"):
        model.weight.grad = torch.ones(4096, 2048)

def test_only_the_fixture(memory_profile):
    region = touched(30 * MiB)
    assert memory_profile.sample().dram_bytes > 30 * MiB
    assert memory_profile.peak_bytes("dram") > 30 * MiB
""",
        "--junitxml=out.xml",
        "-vv",
    )
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.re_match_lines([r"memory_budget: 6\d\.\d+ MiB of dram .*weights 32.00 MiB.*"])
    xml = (pytester.path / "out.xml").read_text()
    assert xml.count('name="memopt_dram_bytes"') == 2
    assert xml.count('name="memopt_ssd_write_bytes"') == 2


def test_bytes_written(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        """
def write(path, nbytes):
    with open(path, "wb") as file:
        file.write(os.urandom(nbytes))
        file.flush()
        os.fsync(file.fileno())

@pytest.mark.memory_budget(ssd_write="4MiB")
def test_writes_little(tmp_path):
    write(tmp_path / "f", MiB)

@pytest.mark.memory_budget(ssd_write="4MiB", dram="1GiB")
def test_writes_much(tmp_path, memory_profile):
    write(tmp_path / "f", 8 * MiB)
    if memory_profile.io_bytes()[1] < MiB:
        pytest.skip("not on a drive")
""",
    )
    if done.parseoutcomes().get("skipped"):
        pytest.skip("the temporary directory is not on a drive, or the kernel does not count")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.re_match_lines([r"memory_budget: [89]\.\d+ MiB written to devices, .* more than ssd_write=4.00 MiB"])


def test_a_test_that_fails_fails_as_it_did(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        """
@pytest.mark.memory_budget(dram="1MiB")
def test_wrong():
    region = touched(30 * MiB)
    assert 1 == 2

@pytest.mark.memory_budget(dram="1MiB")
def test_skipped():
    region = touched(30 * MiB)
    pytest.skip("not here")

@pytest.mark.memory_budget(dram="1MiB")
@pytest.mark.xfail(strict=True, reason="too large")
def test_expected():
    region = touched(30 * MiB)
""",
    )
    done.assert_outcomes(failed=1, skipped=1, xfailed=1)
    done.stdout.fnmatch_lines(["*assert 1 == 2*"])
    done.stdout.no_fnmatch_line("*memory_budget:*")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('"2GiB"', "memory_budget('2GiB',): name the tier, like dram='2GiB'"),
        ('ssd="2GiB"', "memory_budget: 'ssd' is not known; there are dram, gpu, ssd_write"),
        ('dram="2GB"', "memory_budget dram: '2GB' has the unit 'GB'; sizes are binary here, write GiB"),
        ('dram="80%"', "memory_budget dram: '80%' is a share of an unknown capacity; write a size like 24GiB"),
    ],
)
def test_budgets_that_make_no_sense(arguments: str, message: str, pytester: pytest.Pytester) -> None:
    done = run(pytester, f"@pytest.mark.memory_budget({arguments})\ndef test_it(): raise AssertionError('ran')\n")
    done.assert_outcomes(failed=1)
    assert message in done.stdout.str()


def test_costs_nothing_until_it_is_used(pytester: pytest.Pytester) -> None:
    done = run(
        pytester,
        """
import sys

def test_imports():
    heavy = {"torch", "numpy", "psutil", "rich", "memopt.profiler.program", "memopt.profiler.session"}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
""",
    )
    done.assert_outcomes(passed=1)
    markers = pytester.runpytest_subprocess("--markers")
    markers.stdout.fnmatch_lines(["@pytest.mark.memory_budget(dram=None, gpu=None, ssd_write=None, absolute=False): *"])
