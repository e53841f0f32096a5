"""Runs the checks: every selected implementation on every selected case, dtype and mode."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from itertools import groupby
from typing import Any, NamedTuple

from adamp_conformance.adapter import Adapter, Capabilities
from adamp_conformance.cases import DESIGNED
from adamp_conformance.digits import DIGITS
from adamp_conformance.implementations import ORACLE, Implementation
from adamp_conformance.modes import MODES, Bench, Make, Outcome, Problem, create
from adamp_conformance.results import ERRORED, FAILED, PASSED, SKIPPED, Result

CASES: tuple[Any, ...] = (*DESIGNED, *DIGITS)
BY_ID = {case.id: case for case in CASES}


class Check(NamedTuple):
    """One line of the result file, before it is run."""

    implementation: Implementation
    case: str
    dtype: str
    mode: str


def select_checks(
    implementations: Sequence[Implementation], modes: Sequence[str] = (), dtypes: Sequence[str] = (), text: str = ""
) -> list[Check]:
    """The checks of cases whose id contains `text`; an empty choice of modes or dtypes means all."""
    return [
        Check(implementation, case.id, dtype, mode)
        for implementation in implementations
        for case in CASES
        if text in case.id
        for dtype in case.dtypes
        for mode in case.modes
        if (not dtypes or dtype in dtypes) and (not modes or mode in modes)
    ]


class TaskResult(NamedTuple):
    """What one task found, and the version of its implementation (empty if it could not be loaded)."""

    implementation: Implementation
    version: str
    results: list[tuple[Check, Result]]


def run(checks: Sequence[Check], device: str, jobs: int) -> Iterator[TaskResult]:
    """Runs the checks in `jobs` processes; results come as they are ready.

    One task is all checks of one implementation, algorithm and dtype, so that what a framework
    compiles for one of them serves the others. The checks of a process that dies are errors.
    """
    by_task: dict[tuple[Implementation, str, str], list[Check]] = {}
    for check in checks:
        key = check.implementation, BY_ID[check.case].algorithm, check.dtype
        by_task.setdefault(key, []).append(check)
    tasks = list(reversed(by_task.values()))  # compiled executions, the slowest, are listed last
    peers = tuple(dict.fromkeys([*(check.implementation for check in checks), ORACLE]))
    work = partial(_run_task, peers=peers, device=device)
    if jobs == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in as_completed(futures):
            try:
                yield future.result()
            except (Exception, SystemExit) as error:  # BrokenProcessPool, or what could not be sent back
                yield _all_errored(futures[future], error)


@cache
def _factory(implementation: Implementation, device: str) -> Make:
    return implementation.factory(device)


def _make(implementation: Implementation, device: str) -> Adapter:
    return _factory(implementation, device)()


def _run_task(checks: Sequence[Check], peers: Sequence[Implementation], device: str) -> TaskResult:
    implementation = checks[0].implementation
    make = partial(_make, implementation, device)
    try:
        capabilities = make().capabilities()
    except (Exception, SystemExit) as error:
        return _all_errored(checks, error)
    first_of: dict[str, Implementation] = {}
    for peer in peers:
        if peer.backend != implementation.backend:
            first_of.setdefault(peer.backend, peer)
    sources: dict[str, Make] = {peer.name: partial(_make, peer, device) for peer in first_of.values()}
    results: list[tuple[Check, Result]] = []
    for (case, dtype), group in groupby(checks, key=lambda check: (check.case, check.dtype)):
        results += _run_problem(
            list(group), make, capabilities, Problem(BY_ID[case], dtype, capabilities.weights), sources
        )
    return TaskResult(implementation, capabilities.version, results)


def _all_errored(checks: Sequence[Check], error: BaseException) -> TaskResult:
    results = [(check, _result(check, ERRORED, message=f"{type(error).__name__}: {error}")) for check in checks]
    return TaskResult(checks[0].implementation, "", results)


def _run_problem(
    checks: Sequence[Check], make: Make, capabilities: Capabilities, problem: Problem, sources: dict[str, Make]
) -> Iterator[tuple[Check, Result]]:
    """Runs all modes of one problem on one bench. What an adapter raises becomes a result, never a pass."""

    @cache
    def bench() -> Bench:
        return Bench(create(make, problem), problem, make, sources)

    for check in checks:
        if problem.dtype not in capabilities.dtypes or problem.case.algorithm not in capabilities.algorithms:
            skipped = f"{capabilities.name} does not support {problem.case.algorithm} in {problem.dtype}"
            yield check, _result(check, SKIPPED, message=skipped)
        elif check.mode == "transplant" and not sources:
            yield check, _result(check, SKIPPED, message="there is no other implementation to take a state from")
        else:
            yield check, _run_check(check, bench)


def _run_check(check: Check, bench: Callable[[], Bench]) -> Result:
    started = time.perf_counter()
    try:
        outcome = MODES[check.mode](bench())
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} (in {place.name}, line {place.lineno})"
        return _result(check, ERRORED, started, message=message)
    return _result(check, FAILED if outcome.problem else PASSED, started, outcome, outcome.problem or "")


def _result(
    check: Check, status: str, started: float | None = None, outcome: Outcome | None = None, message: str = ""
) -> Result:
    return Result(
        implementation=check.implementation.name,
        case=check.case,
        algorithm=BY_ID[check.case].algorithm,
        dtype=check.dtype,
        mode=check.mode,
        status=status,
        margin=outcome.worst.verdict.margin if outcome and outcome.worst else None,
        ambiguous=outcome.ambiguous if outcome else False,
        message=message,
        seconds=round(time.perf_counter() - started, 4) if started else 0.0,
    )
