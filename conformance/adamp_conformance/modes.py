"""The ways to examine an implementation: on frozen vectors, on what must be refused, and in runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from itertools import pairwise, permutations
from typing import Any, NamedTuple

import numpy as np

from adamp_conformance import refusals
from adamp_conformance.adapter import DTYPES, MOMENTS, Adapter, Arrays, Parameter, State
from adamp_conformance.implementations import ORACLE
from adamp_conformance.judge import ALGORITHMS, Verdict, expected_outcomes, judge_step, worst_elements
from adamp_conformance.protocol import ProtocolError
from adamp_conformance.results import DRIFT_POINTS, Element
from adamp_conformance.vectors import PARTS, Refusal, Vector
from adamp_spec import Branch, Layout

Make = Callable[[], Adapter]

TRANSPLANT_STEPS = 3
RELAY_STEPS = 3  # of each leg
_LAST_BITS = 1 + 2.0**-8  # a margin at which the frozen interval may be right against the oracle's own arithmetic


class Problem(NamedTuple):
    """One case in one dtype, as a framework with such `weights` sees it."""

    case: Any
    dtype: str
    weights: str

    def parameters(self) -> dict[str, Parameter]:
        return self.case.parameters(self.dtype, self.weights)

    def initial(self) -> State:
        return self.case.initial(self.dtype, self.weights)

    def gradients(self, state: State) -> dict[str, np.ndarray]:
        return self.case.gradients(state.step - self.case.step, state.parameters, self.weights)

    def layouts(self) -> dict[str, Layout]:
        return self.case.layouts(self.weights)

    def judge(self, before: State, gradients: Arrays, after: State) -> Verdict:
        """The verdict on those parameters that `gradients` names."""
        return judge_step(
            self.case.algorithm, self.case.hyper, self.layouts(), before, gradients, after, self.case.exact
        )

    def elements(self, step: Step, name: str) -> dict[str, Element]:
        """The worst element of `p` and of each moment of one parameter, after a judged step; none for no elements."""
        case, layout = self.case, self.layouts()[name]
        before, after, gradient = step.before.tensors(name), step.after.tensors(name), step.gradients[name]
        outcomes = expected_outcomes(
            case.algorithm, case.hyper, layout, before, step.before.step, gradient, name in case.exact
        )
        branches = step.verdict.branches[name]
        digits = 17 if self.dtype == "float64" else 9
        elements = {}
        worst = worst_elements(after, outcomes, branches, layout.rows(gradient.shape))
        for tensor, (at, margin, bounded) in worst.items():
            value, error = bounded.value[at], bounded.error[at]
            was, slope, low, got, high = (
                f"{float(x):.{digits}g}"
                for x in (before[tensor][at], gradient[at], value - error, after[tensor][at], value + error)
            )
            taken = tuple(Branch(branch).name.lower() for branch in branches.ravel())
            elements[tensor] = Element(name, tensor, at, step.after.step, taken, was, slope, low, got, high, margin)
        return elements


class Step(NamedTuple):
    """One judged step, with what it was judged on."""

    verdict: Verdict
    before: State
    gradients: dict[str, np.ndarray]
    after: State


class Outcome(NamedTuple):
    """What a mode found: the worst step, in words what is wrong (None: nothing), and the drift of a run."""

    worst: Step | None
    problem: str | None
    ambiguous: bool = False
    drift: tuple[float, ...] = ()


class Bench(NamedTuple):
    """An implementation set up for one problem.

    Attributes:
      adapter: created for the problem, in any state; what is compiled stays compiled between modes.
      problem: the problem.
      make: makes a fresh adapter of the same implementation.
      sources: makes adapters of other implementations, by name, for states to be taken from.
      name: of the implementation, as messages give it.
    """

    adapter: Adapter
    problem: Problem
    make: Make
    sources: Mapping[str, Make]
    name: str = "this one"


def create(make: Make, problem: Problem) -> Adapter:
    """A fresh adapter for the problem."""
    adapter = make()
    make_hyper, _, _ = ALGORITHMS[problem.case.algorithm]
    adapter.create(problem.case.algorithm, asdict(make_hyper(**problem.case.hyper)), problem.parameters())
    return adapter


def _copied(state: State) -> State:
    """What is handed over or received must not change when either side goes on working in place."""
    return deepcopy(state)


def _held(adapter: Adapter) -> State:
    return _copied(adapter.dump())


def advance(adapter: Adapter, problem: Problem, steps: int) -> State:
    """Takes `steps` steps and returns the state after them."""
    for _ in range(steps):
        adapter.step(problem.gradients(_held(adapter)))
    return _held(adapter)


def walk(adapter: Adapter, problem: Problem, steps: int, path: list[Arrays] | None = None) -> Outcome:
    """Judges up to `steps` steps, each from the implementation's own state before it; stops at the first that fails.

    `path` gets the parameters after each step.
    """
    worst: Step | None = None
    ambiguous = False
    before = _held(adapter)
    for _ in range(steps):
        gradients = problem.gradients(before)
        adapter.step({name: gradient.copy() for name, gradient in gradients.items()})
        after = _held(adapter)
        step = Step(problem.judge(before, gradients, after), before, gradients, after)
        ambiguous |= step.verdict.ambiguous
        if worst is None or not step.verdict.conforms or step.verdict.margin > worst.verdict.margin:
            worst = step
        if not step.verdict.conforms:
            break
        if path is not None:
            path.append(after.parameters)
        before = after
    assert worst is not None
    return Outcome(worst, _describe(worst), ambiguous)


def judge_vectors(adapter: Adapter, problem: Problem) -> dict[str, Outcome]:
    """What each vector of a group finds, by id.

    A vector of one step starts from an injected state, one of several from the creation of the problem. Each step
    is judged twice: by the frozen interval, and by the oracle from the implementation's own state, which gives the
    margin. From an injected state both are the same bound, but for the last bits of longdouble, and the interval
    decides; in later steps the oracle's bound is the narrower one, and both must hold.
    """
    group = problem.case
    initial = problem.initial()
    if group.steps == 1:
        adapter.load(_copied(initial))
    outcomes: dict[str, Outcome] = {}
    before = _held(adapter)
    if found := _difference("injected" if group.steps == 1 else "created", initial, "held", before):
        return {vector.id: Outcome(None, found) for vector in group.vectors}
    for index in range(group.steps):
        gradients = group.gradients(index, before.parameters, problem.weights)
        adapter.step({name: gradient.copy() for name, gradient in gradients.items()})
        after = _held(adapter)
        for vector in group.vectors:
            outcome = _judge_vector(vector, index, problem, before, gradients, after)
            previous = outcomes.setdefault(vector.id, outcome)
            if not previous.problem and (outcome.problem or _margin(outcome) > _margin(previous)):
                outcomes[vector.id] = outcome
        before = after
    return outcomes


def _judge_vector(
    vector: Vector, index: int, problem: Problem, before: State, gradients: Arrays, after: State
) -> Outcome:
    gradient = {vector.name: gradients[vector.name]}
    step = Step(problem.judge(before, gradient, after), before, dict(gradient), after)
    found = _describe(step)
    if not step.verdict.problem:
        legal = vector.steps[index].outcomes
        reported = after.branches and tuple(Branch(b).name.lower() for b in after.branches[vector.name].ravel())
        outside = [x.outside(after.tensors(vector.name)) for x in legal if not reported or x.branch == reported]
        if not outside:
            found = found or f"the branch that it reports, {', '.join(reported or ())}, is not legal"
        elif min(outside):
            found = found or f"{min(outside)} elements lie outside the frozen intervals at step {after.step}"
        elif problem.case.steps == 1 and step.verdict.margin <= _LAST_BITS:
            found = None
    return Outcome(step, found, step.verdict.ambiguous)


def _margin(outcome: Outcome) -> float:
    return outcome.worst.verdict.margin if outcome.worst else 0.0


def judge_refusal(make: Make, refusal: Refusal) -> str | None:
    """What is wrong with how an implementation refuses; None for nothing.

    Raises:
      Exception: whatever the implementation raises on a problem that has nothing wrong.
    """
    _attempt(make(), refusals.valid(refusal.algorithm))
    adapter = make()
    held: list[State] = []
    try:
        _attempt(adapter, refusal, held)
    except (ProtocolError, _NoState):  # an adapter that breaks down does not refuse
        raise
    except Exception:
        return _difference("before", held[-1], "after the refusal", _held(adapter)) if held else None
    return f"{refusal.purpose}: accepted"


def _attempt(adapter: Adapter, refusal: Refusal, held: list[State] | None = None) -> None:
    """Creates, loads and steps; `held` gets the state before each call that may be refused."""
    kinds = {part: getattr(refusal, part) for part in PARTS}
    ones = {part: np.ones(shape, DTYPES.get(dtype, dtype)) for part, (dtype, shape) in kinds.items()}
    value, moments = ones["parameter"], {moment: {"w": ones["state"]} for moment in MOMENTS[refusal.algorithm]}

    def keep() -> None:
        try:
            state = _held(adapter)
        except Exception as error:
            raise _NoState(f"its state cannot be read: {type(error).__name__}: {error}") from error
        if held is not None:
            held.append(state)

    adapter.create(refusal.algorithm, refusal.hyper, {"w": Parameter(value, Layout(**refusal.layout))})
    keep()
    adapter.load(_copied(State(1, {"w": value}, moments)))
    keep()
    adapter.step({"w": ones["gradient"]})


class _NoState(RuntimeError):
    """An adapter took what it was given, and then had no state to show."""


def shadow(bench: Bench) -> Outcome:
    """Many steps; the oracle starts each from the implementation's own state."""
    problem = bench.problem
    initial = problem.initial()
    bench.adapter.load(_copied(initial))
    if found := _difference("injected", initial, "held after loading", _held(bench.adapter)):
        return Outcome(None, found)
    path: list[Arrays] = []
    return walk(bench.adapter, problem, problem.case.steps, path)._replace(drift=_drift(problem, path))


def _drift(problem: Problem, path: list[Arrays]) -> tuple[float, ...]:
    """|p - p*| / |p*| along a run, p* being the oracle's free run in float64."""
    if len(path) < problem.case.steps:  # it was stopped where it failed
        return ()
    thinned = np.unique(np.linspace(0, len(path) - 1, min(len(path), DRIFT_POINTS)).astype(int))
    reference = _free_run(problem)
    return tuple(_distance(path[index], reference[index]) for index in thinned)


def _distance(got: Arrays, wanted: Arrays) -> float:
    with np.errstate(all="ignore"):
        squares = [(np.sum((got[name].astype(np.float64) - x) ** 2), np.sum(x**2)) for name, x in wanted.items()]
    difference, size = np.sum(squares, axis=0)
    return float(np.sqrt(difference / size)) if np.isfinite(difference) else float("inf")


def _free_run(problem: Problem) -> list[Arrays]:
    """The parameters after each step of the oracle in float64, from the same start."""
    case = problem.case
    make_hyper, make_state, take_step = ALGORITHMS[case.algorithm]
    hyper, layouts, start = make_hyper(**case.hyper), problem.layouts(), problem.initial()
    values = {name: x.astype(np.float64) for name, x in start.parameters.items()}
    states = {name: make_state(0, *(np.zeros_like(x) for _ in start.moments)) for name, x in values.items()}
    path: list[Arrays] = []
    for index in range(case.steps):
        gradients = case.gradients(index, values, problem.weights)
        for name, gradient in gradients.items():
            values[name], states[name], _ = take_step(values[name], gradient, states[name], hyper, layouts[name])
        path.append(dict(values))
    return path


def resume(bench: Bench) -> Outcome:
    """Half the steps, then the other half twice: going on, and in a fresh instance loaded with the state."""
    adapter, problem = bench.adapter, bench.problem
    half = problem.case.steps // 2
    adapter.load(_copied(problem.initial()))
    saved = advance(adapter, problem, half)
    fresh = create(bench.make, problem)
    fresh.load(_copied(saved))
    ends = [advance(each, problem, problem.case.steps - half) for each in (adapter, fresh)]
    return Outcome(None, _difference("going on", ends[0], "resumed", ends[1]))


def purity(bench: Bench) -> Outcome:
    """A loaded state is kept bit for bit, gradients are not written to, and the same step twice gives the same bits."""
    adapter, problem = bench.adapter, bench.problem
    adapter.load(_copied(problem.initial()))
    state = advance(adapter, problem, 1)
    gradients = problem.gradients(state)
    given = {name: gradient.copy() for name, gradient in gradients.items()}
    results = []
    for _ in range(2):
        adapter.load(_copied(state))
        if found := _difference("loaded", state, "held after loading", _held(adapter)):
            return Outcome(None, found)
        adapter.step(given)
        results.append(_held(adapter))
    for name, gradient in given.items():
        if gradient.tobytes() != gradients[name].tobytes():
            return Outcome(None, f"the step wrote to the gradient of {name!r}")
    return Outcome(None, _difference("the first time", results[0], "the second time", results[1]))


def transplant(bench: Bench) -> Outcome:
    """State of each other implementation, mid-run, goes on in this one."""

    def legs() -> Iterator[Outcome]:
        for other in _others(bench):
            other.adapter.load(_copied(other.problem.initial()))
            advance(other.adapter, other.problem, min(other.problem.case.steps // 2, 10))
            yield _adopted(other, bench, TRANSPLANT_STEPS)

    return _worst(legs(), f"no source of a state in {bench.problem.dtype}")


def relay(bench: Bench) -> Outcome:
    """This one begins, each of the others goes on in turn, and this one ends: in every order of the others.

    A problem in any leg is one; the worst step is of this one's own. The oracle, which judges every leg, runs one only
    where there is nobody else.
    """
    others = list(_others(bench))
    others = [other for other in others if other.name != ORACLE.name] or others
    return _worst(_legs(bench, others), f"nobody to hand over to in {bench.problem.dtype}")


def _legs(bench: Bench, others: Sequence[Bench]) -> Iterator[Outcome]:
    """What is found in the first leg, in each way there and back without a step, and in each leg of each order."""
    if not others:
        return
    bench.adapter.load(_copied(bench.problem.initial()))
    yield walk(bench.adapter, bench.problem, RELAY_STEPS)
    start = _held(bench.adapter)
    for other in others:
        found = _handed_over(bench, other) or _handed_over(other, bench)
        back = f"held after the way to {other.name} and back"
        yield Outcome(None, found or _difference(f"held by {bench.name}", start, back, _held(bench.adapter)))
    for order in permutations(others):
        bench.adapter.load(_copied(start))
        for giver, taker in pairwise((bench, *order, bench)):
            outcome = _adopted(giver, taker, RELAY_STEPS)
            yield outcome if taker is bench else Outcome(None, outcome.problem)


def _others(bench: Bench) -> Iterator[Bench]:
    """The other implementations that support the dtype, set up for the same case."""
    for name, make in bench.sources.items():
        capabilities = make().capabilities()
        if bench.problem.dtype in capabilities.dtypes:
            problem = bench.problem._replace(weights=capabilities.weights)
            yield Bench(create(make, problem), problem, make, {}, name)


def _handed_over(giver: Bench, taker: Bench) -> str | None:
    """Gives the state of one to another; where what that one then holds differs in its bits."""
    state = giver.problem.case.carry(_held(giver.adapter), giver.problem.weights, taker.problem.weights)
    taker.adapter.load(_copied(state))
    return _difference(f"handed over by {giver.name}", state, f"held by {taker.name}", _held(taker.adapter))


def _adopted(giver: Bench, taker: Bench, steps: int) -> Outcome:
    """Gives the state of one to another, which takes judged steps from there."""
    if found := _handed_over(giver, taker):
        return Outcome(None, found)
    outcome = walk(taker.adapter, taker.problem, steps)
    if outcome.problem:
        return outcome._replace(problem=f"adopted from {giver.name} by {taker.name}: {outcome.problem}")
    return outcome


def _worst(outcomes: Iterable[Outcome], nothing: str) -> Outcome:
    """The first with a problem, after which no more are asked for, or else the widest margin; none is a problem too."""
    worst = Outcome(None, nothing)
    for outcome in outcomes:
        if outcome.problem:
            return outcome
        if worst.problem or _margin(outcome) > _margin(worst):
            worst = outcome
    return worst


# What a case is run in; `step` (vectors) and `refuse` are judged by the functions above.
RUNS: dict[str, Callable[[Bench], Outcome]] = {
    "shadow": shadow,
    "resume": resume,
    "purity": purity,
    "transplant": transplant,
    "relay": relay,
}
WITH_OTHERS = ("transplant", "relay")  # those that exchange states with other implementations


def _describe(step: Step) -> str | None:
    verdict = step.verdict
    if verdict.problem:
        return verdict.problem
    if verdict.conforms or verdict.place is None:
        return None
    place = verdict.place
    return (
        f"{place.tensor} of {place.parameter!r}{list(place.at)} is off by {verdict.margin:.3g} times the bound"
        f" at step {step.after.step}"
    )


def _difference(first_name: str, first: State, second_name: str, second: State) -> str | None:
    """Where two states differ in their bits."""
    if first.step != second.step:
        return f"step {first.step} {first_name}, {second.step} {second_name}"
    for name in first.parameters:
        for (tensor, one), two in zip(first.tensors(name).items(), second.tensors(name).values(), strict=True):
            if one.dtype != two.dtype or one.shape != two.shape or one.tobytes() != two.tobytes():
                return f"{tensor} of {name!r} differs: {first_name} and {second_name}"
    return None
