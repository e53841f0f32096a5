"""The five ways to examine an implementation on one case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from adamp_conformance.adapter import Adapter, Arrays, Parameter, State
from adamp_conformance.judge import ALGORITHMS, Verdict, judge_step
from adamp_spec import Layout

Make = Callable[[], Adapter]

TRANSPLANT_STEPS = 3


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
        return judge_step(self.case.algorithm, self.case.hyper, self.layouts(), before, gradients, after, self.case.exact)


class Step(NamedTuple):
    """One judged step, with what it was judged on."""

    verdict: Verdict
    before: State
    gradients: dict[str, np.ndarray]
    after: State


class Outcome(NamedTuple):
    """What a mode found: the worst step, and in words what is wrong (None: nothing)."""

    worst: Step | None
    problem: str | None
    ambiguous: bool = False


def start(make: Make, problem: Problem) -> Adapter:
    """An adapter in the case's initial state."""
    adapter = make()
    make_hyper, _, _ = ALGORITHMS[problem.case.algorithm]
    adapter.create(problem.case.algorithm, asdict(make_hyper(**problem.case.hyper)), problem.parameters())
    adapter.load(problem.initial())
    return adapter


def advance(adapter: Adapter, problem: Problem, steps: int) -> State:
    """Takes `steps` steps and returns the state after them."""
    for _ in range(steps):
        adapter.step(problem.gradients(adapter.dump()))
    return adapter.dump()


def walk(adapter: Adapter, problem: Problem, steps: int) -> Outcome:
    """Judges every one of `steps` steps from the implementation's own state before it."""
    worst: Step | None = None
    ambiguous = False
    before = adapter.dump()
    for _ in range(steps):
        gradients = problem.gradients(before)
        adapter.step({name: gradient.copy() for name, gradient in gradients.items()})
        after = adapter.dump()
        step = Step(problem.judge(before, gradients, after), before, gradients, after)
        ambiguous |= step.verdict.ambiguous
        if worst is None or not step.verdict.conforms or step.verdict.margin > worst.verdict.margin:
            worst = step
        if not step.verdict.conforms:
            break
        before = after
    assert worst is not None
    return Outcome(worst, _describe(worst, problem), ambiguous)


def step(make: Make, problem: Problem, sources: Mapping[str, Make]) -> Outcome:
    """One step from an injected state."""
    return walk(start(make, problem), problem, 1)


def shadow(make: Make, problem: Problem, sources: Mapping[str, Make]) -> Outcome:
    """Many steps; the oracle starts each from the implementation's own state."""
    return walk(start(make, problem), problem, problem.case.steps)


def resume(make: Make, problem: Problem, sources: Mapping[str, Make]) -> Outcome:
    """Half the steps, then the other half twice: going on, and in a fresh instance loaded with the state."""
    first = start(make, problem)
    saved = advance(first, problem, problem.case.steps // 2)
    second = start(make, problem)
    second.load(saved)
    rest = problem.case.steps - problem.case.steps // 2
    return Outcome(None, _difference("going on", advance(first, problem, rest), "resumed", advance(second, problem, rest)))


def purity(make: Make, problem: Problem, sources: Mapping[str, Make]) -> Outcome:
    """A loaded state is kept bit for bit, gradients are not written to, and the same step twice gives the same bits."""
    adapter = start(make, problem)
    state = advance(adapter, problem, 1)
    gradients = problem.gradients(state)
    given = {name: gradient.copy() for name, gradient in gradients.items()}
    results = []
    for _ in range(2):
        adapter.load(state)
        if found := _difference("loaded", state, "held after loading", adapter.dump()):
            return Outcome(None, found)
        adapter.step(given)
        results.append(adapter.dump())
    for name, gradient in given.items():
        if gradient.tobytes() != gradients[name].tobytes():
            return Outcome(None, f"the step wrote to the gradient of {name}")
    return Outcome(None, _difference("the first time", results[0], "the second time", results[1]))


def transplant(make: Make, problem: Problem, sources: Mapping[str, Make]) -> Outcome:
    """State of each other implementation, mid-run, goes on in this one."""
    target = start(make, problem)
    worst: Outcome | None = None
    for name, make_source in sources.items():
        source = make_source()
        there = problem._replace(weights=source.capabilities().weights)
        if problem.dtype not in source.capabilities().dtypes:
            continue
        handed = advance(start(make_source, there), there, problem.case.steps // 2)
        state = problem.case.carry(handed, there.weights, problem.weights)
        target.load(state)
        if found := _difference(f"handed over by {name}", state, "held", target.dump()):
            return Outcome(None, found)
        outcome = walk(target, problem, TRANSPLANT_STEPS)
        if outcome.problem:
            return outcome._replace(problem=f"state handed over by {name}: {outcome.problem}")
        if worst is None or outcome.worst.verdict.margin > worst.worst.verdict.margin:  # type: ignore[union-attr]
            worst = outcome
    return worst or Outcome(None, "no other implementation to take a state from")


MODES: dict[str, Callable[[Make, Problem, Mapping[str, Make]], Outcome]] = {
    "step": step,
    "shadow": shadow,
    "resume": resume,
    "purity": purity,
    "transplant": transplant,
}


def _describe(step: Step, problem: Problem) -> str | None:
    verdict = step.verdict
    if verdict.problem:
        return verdict.problem
    if verdict.conforms or verdict.place is None:
        return None
    place = verdict.place
    return (
        f"{place.tensor} of {place.parameter!r}{list(place.index)} is off by {verdict.margin:.3g} times the bound"
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
