"""The suite as tests of pytest, in a test file of somebody else and without one."""

import subprocess
import sys
from datetime import date, timedelta

import pytest

from adamp_conformance import implementations, pytest_plugin, runner

pytest_plugins = ["pytester"]

PLUGIN = pytest_plugin.__name__

ADAPTERS = """
from dataclasses import replace
from adamp_conformance.adapters.oracle import OracleAdapter

class Good(OracleAdapter):
    created = 0

    def create(self, *arguments):
        type(self).created += 1
        super().create(*arguments)

class Wrong(OracleAdapter):
    def step(self, gradients):
        super().step(gradients)
        if "zero-row" in self.state.parameters:
            self.state.parameters["zero-row"][1, 2] *= 1.25

class Raises(OracleAdapter):
    def step(self, gradients):
        raise RuntimeError("out of memory")

class HalfOnly(OracleAdapter):
    def capabilities(self):
        return replace(super().capabilities(), dtypes=("float16",))
"""

TEST = """
from adamp_conformance.pytest_plugin import suite
{imports}
test_conformance = suite({adapter}, text="adamp/zeros", {more})
{after}
"""

# The only check of `Wrong` that fails in float32.
CHECK = "adamp/zeros/zero-row"


@pytest.fixture
def run(pytester):
    """Runs pytest on a test file with a suite for one of the adapters above; the vectors are loaded already."""
    runner.catalogue()
    pytester.makepyfile(my_adapters=ADAPTERS)
    pytester.syspathinsert()

    def run(adapter, more="dtypes=['float32']", *arguments, imports="", after=""):
        pytester.makepyfile(test_mine=TEST.format(adapter=adapter, more=more, imports=imports, after=after))
        return pytester.runpytest_inprocess("-p", PLUGIN, "-p", "no:cacheprovider", "-rA", *arguments)

    return run


def expectation(pytester, case=CHECK, days=1, **more):
    lines = {"case": case, "reason": "slow upstream", **more}
    text = "\n".join(f'{key} = "{value}"' for key, value in lines.items())
    pytester.path.joinpath("expected.toml").write_text(
        f"[[expected]]\n{text}\nexpires = {date.today() + timedelta(days)}\n"
    )
    return "dtypes=['float32'], expected='expected.toml'"


def test_a_conforming_adapter_passes(run):
    result = run("'my_adapters:Good'")
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines([f"PASSED test_mine.py::test_conformance[[]{CHECK}-float32-step[]]"])


def test_a_class_will_do_and_what_shares_a_problem_is_run_once(run):
    once = "def test_once():\n    assert my_adapters.Good.created == 4  # one per dtype"
    run("my_adapters.Good", "", imports="import my_adapters", after=once).assert_outcomes(passed=21)


def test_a_wrong_adapter_fails_and_the_failure_explains(run):
    result = run("'my_adapters:Wrong'")
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(
        [
            f"my_adapters:Wrong {CHECK} float32 step: failed",
            "p of 'zero-row'[[]1, 2[]] is off by *",
            "the case: one zero gradient row among orthogonal ones",
            "EDGE-1: A zero gradient or a zero parameter has cosine 0.*",
            "meant to catch zeros*",
            "  legal     *",
            f"again: adamp-parity explain {CHECK} --adapter my_adapters:Wrong --dtype float32",
        ]
    )
    result.stdout.no_fnmatch_line("*pytest_plugin.py:*")  # no traceback of the harness


def test_an_adapter_that_raises_fails(run):
    result = run("'my_adapters:Raises'")
    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines(["*: errored", "RuntimeError: out of memory*"])


def test_what_is_not_supported_is_skipped_with_the_reason(run):
    result = run("'my_adapters:HalfOnly'", "dtypes=['float32', 'float16']")
    result.assert_outcomes(passed=5, skipped=5)
    result.stdout.fnmatch_lines(["SKIPPED*oracle does not support adamp in float32"])


def test_k_selects_and_x_stops(run):
    run("'my_adapters:Wrong'", "dtypes=['float32']", "-k", "zero-row and float32").assert_outcomes(
        failed=1, deselected=4
    )
    result = run("'my_adapters:Raises'", "dtypes=['float32']", "-x")
    result.assert_outcomes(failed=1)


def test_xdist_runs_it(run):
    result = run("'my_adapters:Wrong'", "", "-n", "2", "--dist", "loadgroup", "--strict-markers")
    result.assert_outcomes(passed=16, failed=4)


def test_an_expected_failure_is_an_xfail(run, pytester):
    result = run("'my_adapters:Wrong'", expectation(pytester))
    result.assert_outcomes(passed=4, xfailed=1)
    result.stdout.fnmatch_lines(["XFAIL*(expected until *: slow upstream)*"])


def test_an_expected_failure_is_one_with_runxfail_too(run, pytester):
    result = run("'my_adapters:Wrong'", expectation(pytester), "--runxfail")
    result.assert_outcomes(passed=4, failed=1)


def test_an_expected_failure_that_passes_fails(run, pytester):
    result = run("'my_adapters:Good'", expectation(pytester))
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines([f"passed, against the expected failure '{CHECK}' (slow upstream): remove the entry*"])


def test_an_expected_failure_that_expired_fails(run, pytester):
    result = run("'my_adapters:Wrong'", expectation(pytester, days=-1))
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines([f"*the expected failure '{CHECK}' expired on *: mend what fails*"])


@pytest.mark.parametrize(
    ("adapter", "more", "words"),
    [
        ("'my_adapters:Good'", "dtypes=['float8']", "nothing is selected by *dtypes=[[]'float8'[]]*adamp-parity list*"),
        ("'my_adapters:Good'", "expected='gone.toml'", "*No such file*gone.toml*"),
        ("'my_adapters:Gone'", "", "*my_adapters:Gone*cannot be imported*"),
        ("'gone'", "", "*unknown adapter 'gone'*"),
    ],
)
def test_nothing_to_check_is_an_error(run, adapter, more, words):
    result = run(adapter, more)
    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([f"*{words}"])


def test_an_expectation_of_nothing_is_an_error(run, pytester):
    result = run("'my_adapters:Wrong'", expectation(pytester, case="adamp/gone"))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*'adamp/gone' speaks of no check of this suite; correct it or remove it"])


def test_an_adapter_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(implementations, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'optax' needs jax, optax: pip install \"adamp-parity\[jax,conformance\]\""):
        pytest_plugin.suite("optax")


# Without a test file


@pytest.fixture
def one_liner(pytester):
    pytester.makepyfile(my_adapters=ADAPTERS)
    pytester.syspathinsert()

    def one_liner(*arguments):
        module = "adamp_conformance.conformance_tests"
        return pytester.runpytest_inprocess(
            "-p", PLUGIN, "-p", "no:cacheprovider", "-rA", "--pyargs", module, *arguments
        )

    return one_liner


def test_without_a_test_file(one_liner, pytester):
    expectation(pytester, dtype="float32")
    chosen = "-k", "adamp and zeros and float32"
    one_liner("--adamp-adapter=my_adapters:Good", *chosen).assert_outcomes(passed=5)
    wrong = one_liner("--adamp-adapter=my_adapters:Wrong", *chosen)
    wrong.assert_outcomes(passed=4, failed=1)
    wrong.stdout.fnmatch_lines(["EDGE-1: *"])
    known = one_liner("--adamp-adapter=my_adapters:Wrong", "--adamp-expected=expected.toml", *chosen)
    known.assert_outcomes(passed=4, xfailed=1)


def test_without_an_adapter_there_is_nothing_to_check(one_liner):
    result = one_liner()
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    result.stdout.fnmatch_lines(["*say what is to be checked: --adamp-adapter=*"])


def test_a_wrong_option_is_an_error(one_liner):
    result = one_liner("--adamp-adapter=my_adapters:Good", "--adamp-expected=gone.toml")
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    result.stdout.fnmatch_lines(["*No such file*gone.toml*"])


def test_the_plugin_costs_a_foreign_run_nothing():
    """pytest imports it in every run, with whichever extra is installed."""
    program = f"""
import sys, pytest
before = set(sys.modules)
import {PLUGIN}
heavy = {{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
assert heavy == {{"adamp_conformance"}}, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)
