"""The suite for the adapter that `--adamp-adapter` names; see `adamp_conformance.pytest_plugin`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adamp_conformance.pytest_plugin import items


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    adapter = metafunc.config.getoption("--adamp-adapter")
    if adapter is None:
        raise pytest.UsageError(
            "say what is to be checked: --adamp-adapter=package.module:Class, exec:COMMAND or a known name like torch"
        )
    try:
        parameters = items(adapter, expected=metafunc.config.getoption("--adamp-expected"))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error
    metafunc.parametrize("examine", parameters)


def test_conformance(examine: Callable[[], None]) -> None:
    examine()
