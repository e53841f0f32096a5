"""Runs the checks: every selected implementation on every selected case, dtype and mode."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adamp_conformance.adapter import Adapter, Capabilities
from adamp_conformance.cases import DESIGNED
from adamp_conformance.digits import DIGITS
from adamp_conformance.implementations import Implementation
from adamp_conformance.modes import MODES, Make, Problem
from adamp_conformance.results import ERRORED, FAILED, PASSED, SKIPPED, Result

CASES: tuple[Any, ...] = (*DESIGNED, *DIGITS)


class Check(NamedTuple):
    """One line of the result file, before it is run."""

    implementation: str
    case: Any
    dtype: str
    mode: str


class Selection(NamedTuple):
    """What to run; an empty choice of modes, dtypes or text means all."""

    modes: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    text: str = ""

    def cases(self) -> list[Any]:
        return [case for case in CASES if self.text in case.id]

    def checks(self, implementations: Sequence[str]) -> list[Check]:
        return [
            Check(name, case, dtype, mode)
            for name in implementations
            for case in self.cases()
            for dtype in case.dtypes
            for mode in case.modes
            if (not self.dtypes or dtype in self.dtypes) and (not self.modes or mode in self.modes)
        ]


def sources_for(name: str, makes: Mapping[str, Make], backends: Mapping[str, str]) -> dict[str, Make]:
    """One implementation of each other backend, to hand states to `name`."""
    first: dict[str, str] = {}
    for other in makes:
        if backends[other] != backends[name]:
            first.setdefault(backends[other], other)
    return {other: makes[other] for other in first.values()}


def load(implementations: Sequence[Implementation], device: str) -> tuple[dict[str, Make], dict[str, Capabilities]]:
    """Imports the frameworks and asks each implementation what it can do."""
    makes: dict[str, Callable[[], Adapter]] = {x.name: x.factory(device) for x in implementations}
    return makes, {name: make().capabilities() for name, make in makes.items()}


def run(
    checks: Sequence[Check], makes: Mapping[str, Make], capabilities: Mapping[str, Capabilities]
) -> Iterator[Result]:
    """Runs the checks in order."""
    backends = {name: capability.name for name, capability in capabilities.items()}
    for check in checks:
        yield run_one(check, makes[check.implementation], capabilities[check.implementation], sources_for(check.implementation, makes, backends))


def run_one(check: Check, make: Make, capability: Capabilities, sources: Mapping[str, Make]) -> Result:
    """Runs one check. What an adapter raises becomes the result's message, never a pass."""
    case = check.case
    started = time.perf_counter()

    def result(status: str, margin: float | None = None, message: str = "", ambiguous: bool = False) -> Result:
        seconds = round(time.perf_counter() - started, 4)
        return Result(check.implementation, case.id, case.algorithm, check.dtype, check.mode, status, margin, ambiguous, message, seconds)

    if check.dtype not in capability.dtypes or case.algorithm not in capability.algorithms:
        return result(SKIPPED, message=f"{capability.name} does not support {case.algorithm} in {check.dtype}")
    if check.mode == "transplant" and not sources:
        return result(SKIPPED, message="no other implementation is selected to take a state from")
    try:
        outcome = MODES[check.mode](make, Problem(case, check.dtype, capability.weights), sources)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return result(ERRORED, message=f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})")
    margin = None if outcome.worst is None else outcome.worst.verdict.margin
    return result(FAILED if outcome.problem else PASSED, margin, outcome.problem or "", outcome.ambiguous)
