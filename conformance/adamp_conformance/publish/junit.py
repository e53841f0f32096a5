"""JUnit XML: one suite per implementation, one case per check."""

from __future__ import annotations

import re
from collections.abc import Mapping

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from adamp_conformance.publish.summary import explanation, standings
from adamp_conformance.results import ERRORED, EXPECTED, FAILED, PASSED, SKIPPED, Result, Run


def render_junit(run: Run, notes: Mapping[str, str], purposes: Mapping[str, str]) -> str:
    """The document as text. An expected failure is a skipped case of type `expected`: it did not pass."""
    document = JUnitXml(f"AdamP and SGDP, specification {run.spec}")
    for standing in standings(run):
        suite = TestSuite(_text(standing.implementation))
        for name, value in {
            "specification": run.spec,
            "version": standing.version,
            "python": run.python,
            "numpy": run.numpy,
            "platform": run.platform,
            "device": run.device,
        }.items():
            suite.add_property(name, _text(value))
        suite.add_testcases(
            [_case(x, notes, purposes) for x in run.results if x.implementation == standing.implementation]
        )
        document.add_testsuite(suite)
    return document.tostring().decode()


def _case(result: Result, notes: Mapping[str, str], purposes: Mapping[str, str]) -> TestCase:
    case = TestCase(f"{result.case} {result.dtype} {result.mode}", _text(result.implementation), result.seconds)
    if result.status != PASSED:
        found = _ELEMENTS[result.status](_text(result.message), result.status)
        found.text = _text(explanation(result, notes, purposes))
        case.result = [found]
    return case


def _text(text: str) -> str:
    """XML has no escape for most control characters."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


_ELEMENTS = {FAILED: Failure, ERRORED: Error, SKIPPED: Skipped, EXPECTED: Skipped}
