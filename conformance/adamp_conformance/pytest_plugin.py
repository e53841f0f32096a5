"""The suite as tests of pytest: one item per check, in a test file or without one.

In a test file:

    from adamp_conformance import suite

    test_conformance = suite("my_package:MyAdapter", expected="expected.toml")

Without one:

    pytest --pyargs adamp_conformance.conformance_tests --adamp-adapter=my_package:MyAdapter

pytest imports this module wherever it is installed, so the harness itself is imported when it is used.
With xdist, `--dist loadgroup` keeps the checks that share an adapter in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from adamp_conformance.adapter import Adapter
    from adamp_conformance.expected import Expectation
    from adamp_conformance.runner import Check, Runner


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adamp", "conformance of AdamP and SGDP (adamp_conformance.conformance_tests)")
    group.addoption("--adamp-adapter", metavar="ADAPTER", help="a known name, package.module:Class, or exec:COMMAND")
    group.addoption("--adamp-expected", metavar="FILE", help="expected failures, a TOML file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): what runs in one process under --dist loadgroup")


def suite(
    adapter: str | Callable[[], Adapter],
    *,
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    text: str = "",
    device: str = "cpu",
    expected: str | Path | None = None,
) -> Callable[..., None]:
    """A test function with one item per check; give it a name that starts with `test`.

    A failure prints the case's purpose, its clauses, the mistakes that it is for and the element; what the adapter
    does not support is skipped; an expected failure is an xfail, strict.

    Args:
      adapter: what `adamp-parity run --adapter` takes, or a class or function that makes one without arguments.
      modes, dtypes: to check, empty for all.
      text: only cases whose id contains it.
      device: `cpu` or `cuda`, for the adapters that the suite brings.
      expected: a file of expected failures; relative to the working directory.

    Raises:
      ValueError: the adapter is unknown or not installed, nothing is selected, or the file is not what it should be.
    """

    @pytest.mark.parametrize("examine", items(adapter, modes, dtypes, text, device, expected))
    def test(examine: Callable[[], None]) -> None:
        examine()

    return test


def items(
    adapter: str | Callable[[], Adapter],
    modes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    text: str = "",
    device: str = "cpu",
    expected: str | Path | None = None,
) -> list[Any]:
    """Parameters of pytest, each a function without arguments that passes, skips, xfails or fails; see `suite`."""
    from adamp_conformance.expected import read
    from adamp_conformance.implementations import resolve
    from adamp_conformance.runner import Runner, select_checks

    implementations = resolve(adapter)
    for x in implementations:
        if x.missing:
            extra = f'pip install "adamp-parity[{x.extra},conformance]"'
            raise ValueError(f"adapter {adapter!r} needs {', '.join(x.missing)}: {extra}")
    checks = select_checks(implementations, modes, dtypes, text)
    if not checks:
        chosen = f"modes={list(modes)}, dtypes={list(dtypes)}, text={text!r}"
        raise ValueError(f"nothing is selected by {chosen}; adamp-parity list shows the cases")
    entries = read(Path(expected), select_checks(implementations)) if expected is not None else ()
    runner = Runner(device)
    return [
        pytest.param(
            partial(_examine, runner, check, entries),
            id="-".join(
                [check.case, check.dtype, check.mode, *([check.implementation.name] if implementations[1:] else [])]
            ),
            marks=pytest.mark.xdist_group(f"{check.implementation.name} {check.case.split('/')[0]} {check.dtype}"),
        )
        for check in checks
    ]


def _examine(runner: Runner, check: Check, entries: Sequence[Expectation]) -> None:
    from adamp_conformance import results
    from adamp_conformance.expected import apply
    from adamp_conformance.publish.summary import explanation
    from adamp_conformance.publish.words import notes, purposes

    (result,) = apply([runner.result(check)], entries, date.today())
    if result.status == results.PASSED:
        return
    if result.status == results.SKIPPED:
        pytest.skip(result.message)
    if result.status == results.EXPECTED:
        pytest.xfail(result.message)
    # An expected failure gets here with --runxfail.
    where = f"{result.implementation} {result.case} {result.dtype} {result.mode}"
    pytest.fail(f"{where}: {result.status}\n{explanation(result, notes(), purposes())}", pytrace=False)
