"""Runs the checks: every selected implementation on every selected vector, refusal and run."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

from adamp_conformance.adapter import DTYPES, Adapter, Capabilities
from adamp_conformance.cases import DESIGNED, Case
from adamp_conformance.digits import DIGITS, DigitsCase
from adamp_conformance.implementations import IMPLEMENTATIONS, ORACLE, Implementation
from adamp_conformance.judge import ALGORITHMS
from adamp_conformance.modes import (
    RUNS,
    WITH_OTHERS,
    Bench,
    Make,
    Outcome,
    Problem,
    create,
    judge_refusal,
    judge_vectors,
    shadow,
)
from adamp_conformance.results import ERRORED, FAILED, PASSED, SKIPPED, Result
from adamp_conformance.vectors import Group, Refusal, Vector, load
from adamp_spec import Layout

STEP, REFUSE = "step", "refuse"
MODES = (STEP, REFUSE, *RUNS)

LIVE: tuple[Case | DigitsCase, ...] = (*(case for case in DESIGNED if case.modes), *DIGITS)


@dataclass(frozen=True)
class Entry:
    """A case as reports name it: a vector, a refusal or a run.

    Attributes:
      modes: the modes that it is run in.
      problems: dtype -> what is run: the group of a vector, the refusal, the run.
    """

    id: str
    algorithm: str
    purpose: str
    clauses: tuple[str, ...]
    flags: tuple[str, ...]
    modes: tuple[str, ...]
    problems: dict[str, Any] = field(default_factory=dict)


@cache
def catalogue() -> dict[str, Entry]:
    """Every case by id.

    Raises:
      CorpusError: the vectors are not intact.
    """
    corpus = load()
    entries: dict[str, Entry] = {}
    for group in sorted(corpus.groups, key=lambda group: list(DTYPES).index(group.dtype)):
        for x in group.vectors:
            entry = Entry(x.id, group.algorithm, x.purpose, x.clauses, x.flags, (STEP,))
            entries.setdefault(x.id, entry).problems[group.dtype] = group
    for r in corpus.refusals:
        entries[r.id] = Entry(r.id, r.algorithm, r.purpose, r.clauses, r.flags, (REFUSE,), {"float32": r})
    for case in LIVE:
        purpose = case.purpose if isinstance(case, DigitsCase) else ", ".join(case.tensors)
        problems: dict[str, Any] = dict.fromkeys(case.dtypes, case)
        entries[case.id] = Entry(case.id, case.algorithm, purpose, case.clauses, (), case.modes, problems)
    return entries


class Check(NamedTuple):
    """One line of the result file, before it is run."""

    implementation: Implementation
    case: str
    dtype: str
    mode: str


def select_checks(
    implementations: Sequence[Implementation], modes: Sequence[str] = (), dtypes: Sequence[str] = (), text: str = ""
) -> list[Check]:
    """The checks of cases whose id contains `text`; an empty choice of modes or dtypes means all.

    Raises:
      CorpusError: the vectors are not intact.
    """
    return [
        Check(implementation, entry.id, dtype, mode)
        for implementation in implementations
        for entry in catalogue().values()
        if text in entry.id
        for dtype in entry.problems
        for mode in entry.modes
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
        key = check.implementation, catalogue()[check.case].algorithm, check.dtype
        by_task.setdefault(key, []).append(check)
    tasks = list(reversed(by_task.values()))  # compiled executions, the slowest, are listed last
    peers = tuple(dict.fromkeys([*(check.implementation for check in checks if check.implementation.ours), ORACLE]))
    work = partial(_run_task, peers=peers, device=device)
    if jobs == 1 and all(check.implementation in IMPLEMENTATIONS for check in checks):
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in as_completed(futures):
            try:
                yield future.result()
            except (Exception, SystemExit) as error:  # BrokenProcessPool, or what could not be sent back
                yield _all_errored(futures[future], error)


class Runner:
    """Runs single checks in this process; those that share a problem are run together, once."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.results: dict[Check, Result] = {}

    def result(self, check: Check) -> Result:
        """The result of one check of `select_checks`."""
        if check not in self.results:
            problem = catalogue()[check.case].problems[check.dtype]
            together = [
                other
                for other in select_checks([check.implementation], dtypes=[check.dtype])
                if catalogue()[other.case].problems[check.dtype] is problem
            ]
            done = _run_task(together, (check.implementation, ORACLE), self.device)
            self.results.update(done.results)
        return self.results[check]


def replay(entry: Entry, dtype: str, make: Make) -> tuple[Problem | None, Outcome]:
    """One case again, judged step by step: the problem (None for a refusal) and what was found."""
    what = entry.problems[dtype]
    if isinstance(what, Refusal):
        return None, Outcome(None, judge_refusal(make, what))
    weights = make().capabilities().weights
    if isinstance(what, Group):
        problem = Problem(what.only([entry.id]), dtype, weights)
        return problem, judge_vectors(create(make, problem), problem)[entry.id]
    problem = Problem(what, dtype, weights)
    return problem, shadow(Bench(create(make, problem), problem, make, {}))


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
    by_problem: dict[int, list[Check]] = {}
    for check in checks:
        by_problem.setdefault(id(catalogue()[check.case].problems[check.dtype]), []).append(check)
    results: list[tuple[Check, Result]] = []
    for together in by_problem.values():
        results += _run_problem(together, make, capabilities, sources)
    return TaskResult(implementation, capabilities.version, results)


def _all_errored(checks: Sequence[Check], error: BaseException) -> TaskResult:
    results = [(check, _result(check, ERRORED, message=f"{type(error).__name__}: {error}")) for check in checks]
    return TaskResult(checks[0].implementation, "", results)


def _run_problem(
    checks: Sequence[Check], make: Make, capabilities: Capabilities, sources: dict[str, Make]
) -> Iterator[tuple[Check, Result]]:
    """Runs the checks of one problem. What an adapter raises becomes a result, never a pass."""
    supported = []
    for check in checks:
        if reason := _unsupported(check, capabilities, sources):
            yield check, _result(check, SKIPPED, message=reason)
        else:
            supported.append(check)
    if not supported:
        return
    problem = catalogue()[checks[0].case].problems[checks[0].dtype]
    if isinstance(problem, Group):
        yield from _run_vectors(supported, problem, make, capabilities)
    elif isinstance(problem, Refusal):
        yield supported[0], _run_refusal(supported[0], problem, make)
    else:
        yield from _run_modes(supported, Problem(problem, checks[0].dtype, capabilities.weights), make, sources)


def _unsupported(check: Check, capabilities: Capabilities, sources: dict[str, Make]) -> str | None:
    """Why a check cannot be run; None if it can."""
    entry = catalogue()[check.case]
    problem = entry.problems[check.dtype]
    if check.implementation.recorded and check.mode != STEP:
        return "a results file holds answers to vectors only"
    if check.dtype not in capabilities.dtypes or entry.algorithm not in capabilities.algorithms:
        return f"{capabilities.name} does not support {entry.algorithm} in {check.dtype}"
    complete = problem.hyper
    if isinstance(problem, Case | DigitsCase):
        complete = asdict(ALGORITHMS[entry.algorithm].hyper(**problem.hyper))
    for name, value in capabilities.fixed.items():
        if complete.get(name, value) != value:
            return f"{capabilities.name} has no switch for {name}, which stands at {value}"
    if capabilities.layouts == "first" and any(layout != Layout() for layout in _layouts(check, problem)):
        return f"{capabilities.name} knows no rows but those along the first axis"
    if check.mode in WITH_OTHERS and not sources:
        return "there is no other implementation to exchange a state with"
    return None


def _layouts(check: Check, problem: Any) -> list[Layout]:
    """The layouts that a check asks for."""
    if isinstance(problem, Group):
        return [_vector(problem, check.case).layout]
    if isinstance(problem, Refusal):
        return [Layout(**problem.layout)]
    parameters = problem.parameters(check.dtype, "torch").values()
    return [parameter.layout for parameter in parameters if parameter.layout is not None]


def _vector(group: Group, id: str) -> Vector:
    return next(vector for vector in group.vectors if vector.id == id)


def _run_vectors(
    checks: Sequence[Check], group: Group, make: Make, capabilities: Capabilities
) -> Iterator[tuple[Check, Result]]:
    """One group; if it raises, each of its vectors alone, so that the error is counted where it belongs."""
    started = time.perf_counter()
    problem = Problem(group.only([check.case for check in checks]), group.dtype, capabilities.weights)
    try:
        outcomes = judge_vectors(create(make, problem), problem)
    except (Exception, SystemExit) as error:
        if len(checks) == 1:
            yield checks[0], _result(checks[0], ERRORED, started, message=_describe(error))
            return
        for check in checks:
            yield from _run_vectors([check], group, make, capabilities)
        return
    for check in checks:
        yield check, _judged(check, started, outcomes[check.case], problem)


def _run_refusal(check: Check, refusal: Refusal, make: Make) -> Result:
    started = time.perf_counter()
    try:
        problem = judge_refusal(make, refusal)
    except (Exception, SystemExit) as error:
        return _result(check, ERRORED, started, message=_describe(error))
    return _result(check, FAILED if problem else PASSED, started, message=problem or "")


def _run_modes(
    checks: Sequence[Check], problem: Problem, make: Make, sources: dict[str, Make]
) -> Iterator[tuple[Check, Result]]:
    """All modes of one run on one bench."""

    @cache
    def bench() -> Bench:
        return Bench(create(make, problem), problem, make, sources, checks[0].implementation.name)

    for check in checks:
        started = time.perf_counter()
        try:
            outcome = RUNS[check.mode](bench())
        except (Exception, SystemExit) as error:
            yield check, _result(check, ERRORED, started, message=_describe(error))
        else:
            yield check, _judged(check, started, outcome, problem)


def _describe(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (in {place.name}, line {place.lineno})"


def _judged(check: Check, started: float, outcome: Outcome, problem: Problem) -> Result:
    step = outcome.worst
    element = None
    if outcome.problem and step and not step.verdict.problem and (place := step.verdict.place):
        element = problem.elements(step, place.parameter)[place.tensor]
    return _result(
        check,
        FAILED if outcome.problem else PASSED,
        started,
        message=outcome.problem or "",
        margin=step.verdict.margin if step else None,
        ambiguous=outcome.ambiguous,
        element=element,
        drift=outcome.drift,
    )


def _result(check: Check, status: str, started: float | None = None, message: str = "", **found: Any) -> Result:
    entry = catalogue()[check.case]
    return Result(
        implementation=check.implementation.name,
        case=check.case,
        algorithm=entry.algorithm,
        dtype=check.dtype,
        mode=check.mode,
        status=status,
        message=message,
        seconds=round(time.perf_counter() - started, 4) if started else 0.0,
        clauses=entry.clauses,
        flags=entry.flags,
        **{"margin": None, "ambiguous": False} | found,
    )
