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
        return judge_step(
            self.case.algorithm, self.case.hyper, self.layouts(), before, gradients, after, self.case.exact
        )


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


class Bench(NamedTuple):
    """An implementation set up for one problem.

    Attributes:
      adapter: created for the problem, in any state; what is compiled stays compiled between modes.
      problem: the problem.
      make: makes a fresh adapter of the same implementation.
      sources: makes adapters of other implementations, by name, for states to be taken from.
    """

    adapter: Adapter
    problem: Problem
    make: Make
    sources: Mapping[str, Make]


def create(make: Make, problem: Problem) -> Adapter:
    """A fresh adapter for the problem."""
    adapter = make()
    make_hyper, _, _ = ALGORITHMS[problem.case.algorithm]
    adapter.create(problem.case.algorithm, asdict(make_hyper(**problem.case.hyper)), problem.parameters())
    return adapter


def advance(adapter: Adapter, problem: Problem, steps: int) -> State:
    """Takes `steps` steps and returns the state after them."""
    for _ in range(steps):
        adapter.step(problem.gradients(adapter.dump()))
    return adapter.dump()


def walk(adapter: Adapter, problem: Problem, steps: int) -> Outcome:
    """Judges up to `steps` steps, each from the implementation's own state before it; stops at the first that fails."""
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


def step(bench: Bench) -> Outcome:
    """One step from an injected state."""
    return _walk_from_start(bench, 1)


def shadow(bench: Bench) -> Outcome:
    """Many steps; the oracle starts each from the implementation's own state."""
    return _walk_from_start(bench, bench.problem.case.steps)


def resume(bench: Bench) -> Outcome:
    """Half the steps, then the other half twice: going on, and in a fresh instance loaded with the state."""
    adapter, problem = bench.adapter, bench.problem
    half = problem.case.steps // 2
    adapter.load(problem.initial())
    saved = advance(adapter, problem, half)
    fresh = create(bench.make, problem)
    fresh.load(saved)
    ends = [advance(each, problem, problem.case.steps - half) for each in (adapter, fresh)]
    return Outcome(None, _difference("going on", ends[0], "resumed", ends[1]))


def purity(bench: Bench) -> Outcome:
    """A loaded state is kept bit for bit, gradients are not written to, and the same step twice gives the same bits."""
    adapter, problem = bench.adapter, bench.problem
    adapter.load(problem.initial())
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
            return Outcome(None, f"the step wrote to the gradient of {name!r}")
    return Outcome(None, _difference("the first time", results[0], "the second time", results[1]))


def transplant(bench: Bench) -> Outcome:
    """State of each other implementation, mid-run, goes on in this one."""
    target, problem = bench.adapter, bench.problem
    outcomes = []
    for name, make in bench.sources.items():
        capabilities = make().capabilities()
        if problem.dtype not in capabilities.dtypes:
            continue
        there = problem._replace(weights=capabilities.weights)
        source = create(make, there)
        source.load(there.initial())
        handed = advance(source, there, min(problem.case.steps // 2, 10))
        state = problem.case.carry(handed, there.weights, problem.weights)
        target.load(state)
        if found := _difference(f"handed over by {name}", state, "held", target.dump()):
            return Outcome(None, found)
        outcome = walk(target, problem, TRANSPLANT_STEPS)
        if outcome.problem:
            return outcome._replace(problem=f"state handed over by {name}: {outcome.problem}")
        outcomes.append(outcome)
    if not outcomes:
        return Outcome(None, f"no source of a state in {problem.dtype}")
    return max(outcomes, key=lambda outcome: outcome.worst.verdict.margin if outcome.worst else 0.0)


MODES: dict[str, Callable[[Bench], Outcome]] = {
    "step": step,
    "shadow": shadow,
    "resume": resume,
    "purity": purity,
    "transplant": transplant,
}


def _walk_from_start(bench: Bench, steps: int) -> Outcome:
    initial = bench.problem.initial()
    bench.adapter.load(initial)
    if found := _difference("injected", initial, "held after loading", bench.adapter.dump()):
        return Outcome(None, found)
    return walk(bench.adapter, bench.problem, steps)


def _describe(step: Step, problem: Problem) -> str | None:
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
