"""Says in words which rules an implementation follows, where it does not follow ours.

The one-step vectors are put to it once. Then changes of our rules are tried on its answers, those that
`spec/variants.toml` names before the other mutants, until no further change explains more of them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import adamp_spec
from adamp_conformance.adapter import DTYPES, Capabilities, State
from adamp_conformance.judge import judge_step
from adamp_conformance.modes import Make, Problem, create
from adamp_conformance.mutants import Mutant, mutants, rules
from adamp_conformance.spec_files import spec_file
from adamp_conformance.vectors import Group, Vector

SAMPLE = 16  # unexplained answers that every change is tried on
FINALISTS = 6  # changes that explain most of them and are tried on all answers
HALF_PRECISION = "PREC-1"  # the clause of the choice that only half-precision answers can tell
_AT_LEAST = 4  # answers that a change must explain for each one that it unexplains


class Option(NamedTuple):
    """One way to decide a choice point; ours has no mutant."""

    name: str
    rule: str
    mutant: Mutant | None


class ChoicePoint(NamedTuple):
    """A row of `variants.toml`; option 0 is ours."""

    name: str
    clause: str
    question: str
    options: tuple[Option, ...]

    def concerns(self, algorithm: str) -> bool:
        return any(option.mutant and algorithm in option.mutant.algorithms for option in self.options)


@cache
def choice_points() -> tuple[ChoicePoint, ...]:
    """The rows of `variants.toml`."""
    table = tomllib.loads(spec_file("variants.toml").read_text())
    return tuple(
        ChoicePoint(
            name,
            row["clause"],
            row["question"],
            tuple(
                Option(x["name"], x["rule"], mutants()[x["mutant"]] if "mutant" in x else None) for x in row["options"]
            ),
        )
        for name, row in table.items()
    )


@dataclass(frozen=True, eq=False)
class Answer:
    """What an implementation made of one vector; `after` is None where it raised."""

    group: Group
    vector: Vector
    before: State
    after: State | None

    @property
    def half(self) -> bool:
        return DTYPES[self.group.dtype].itemsize == 2

    def fits(self, changes: Sequence[Mutant], expected: Any) -> bool:
        """Whether it is what the oracle with some changes, made in the package `expected`, takes for the step."""
        if self.after is None:
            return False
        gradient = {self.vector.name: self.vector.steps[0].gradient}
        layouts = {self.vector.name: self.vector.layout}
        group = self.group
        # another cosine need not be exact where ours is
        exact = frozenset() if any(change.clause == "PROJ-1" for change in changes) else group.exact
        try:
            verdict = judge_step(
                group.algorithm, group.hyper, layouts, self.before, gradient, self.after, exact, expected
            )
        except Exception:  # these rules do not define this step
            return False
        return verdict.conforms


def ask(make: Make, capabilities: Capabilities, groups: Sequence[Group]) -> Iterator[Answer]:
    """The answers to all one-step vectors that an implementation supports, one vector at a time."""
    for group in groups:
        fixed = all(group.hyper.get(name, value) == value for name, value in capabilities.fixed.items())
        supported = group.algorithm in capabilities.algorithms and group.dtype in capabilities.dtypes and fixed
        for vector in group.vectors if supported and group.steps == 1 else ():
            if capabilities.layouts == "any" or vector.layout == adamp_spec.Layout():
                problem = Problem(group.only([vector.id]), group.dtype, capabilities.weights)
                yield Answer(group, vector, problem.initial(), _step(make, problem))


def _step(make: Make, problem: Problem) -> State | None:
    before = problem.initial()
    try:
        adapter = create(make, problem)
        adapter.load(before)
        adapter.step(problem.gradients(before))
        after = adapter.dump()
    except (Exception, SystemExit):
        return None
    return State(after.step, after.parameters, after.moments)  # its numbers decide, not the branch that it reports


class Finding(NamedTuple):
    """What was found out about one choice point.

    Attributes:
      option: the one that explains the answers.
      telling: answers to the vectors for this point that fit some option and not all.
      explained: those of them that fit `option`.
    """

    point: ChoicePoint
    option: Option
    telling: int
    explained: int


class Diagnosis(NamedTuple):
    """What was found out about one algorithm.

    Attributes:
      answers: how many there are in float64 and float32; `conforming`, how many of them fit our rules.
      findings: one per choice point.
      others: wrong optimizers, beside the options of the choice points, that explain further answers.
      unexplained: those answers that do not fit what was found.
      conforms: whether all answers, in half precision too, fit our rules.
    """

    algorithm: str
    answers: int
    conforming: int
    findings: tuple[Finding, ...]
    others: tuple[Mutant, ...]
    unexplained: tuple[Answer, ...]
    conforms: bool


def diagnose(algorithm: str, answers: Sequence[Answer]) -> Diagnosis:
    """Finds the changes of the rules that explain the answers, one after the other, what explains most first.

    The search goes by answers in float64 and float32: bounds in half precision are too wide to tell rules apart. Those
    answers say in which type it computes, given what was found.
    """
    points = [point for point in choice_points() if point.concerns(algorithm)]
    named = [option.mutant for point in points for option in point.options if option.mutant]
    candidates = [x for x in dict.fromkeys([*named, *mutants().values()]) if algorithm in x.algorithms]
    wide = _Tried([answer for answer in answers if not answer.half])
    changes: tuple[Mutant, ...] = ()
    while unexplained := set(wide.unexplained(changes)):
        asked = _thinned(sorted(unexplained))
        gains = {x: gain for x in candidates if (gain := wide.score((*changes, x), asked))}
        worth = {}  # by all answers, which the sample need not stand for
        for x in sorted(gains, key=lambda x: -gains[x])[:FINALISTS]:
            open_with_it = set(wide.unexplained((*changes, x)))
            worth[x] = len(unexplained - open_with_it) - _AT_LEAST * len(open_with_it - unexplained)
        best = max(worth, key=lambda x: worth[x], default=None)
        if best is None or worth[best] <= 0:
            break
        changes = (*changes, best)
    half = _Tried([answer for answer in answers if answer.half])
    found = tuple(_finding(half if point.clause == HALF_PRECISION else wide, changes, point) for point in points)
    left = tuple(wide.answers[index] for index in wide.unexplained(changes))
    others = tuple(change for change in changes if change not in named)
    conforming = wide.score((), range(len(wide.answers)))
    conforms = conforming == len(wide.answers) and not half.unexplained(())
    return Diagnosis(algorithm, len(wide.answers), conforming, found, others, left, conforms)


def _finding(tried: _Tried, changes: tuple[Mutant, ...], point: ChoicePoint) -> Finding:
    mine = {option.mutant for option in point.options if option.mutant}
    rest = tuple(change for change in changes if change not in mine)
    sets = [(*rest, option.mutant) if option.mutant else rest for option in point.options]
    fits = [[tried.fits(each, index) for each in sets] for index in tried.flagged({mutant.flag for mutant in mine})]
    telling = [each for each in fits if any(each) and not all(each)]
    explained = [sum(each[index] for each in telling) for index in range(len(sets))]
    chosen = next((index for index, option in enumerate(point.options) if option.mutant in changes), 0)
    if point.clause == HALF_PRECISION:
        chosen = max(range(len(sets)), key=lambda index: explained[index])
    return Finding(point, point.options[chosen], len(telling), explained[chosen])


def _thinned(items: Sequence[int]) -> list[int]:
    """At most `SAMPLE` of them, spread evenly."""
    return [items[i] for i in sorted({int(i) for i in np.linspace(0, len(items) - 1, min(SAMPLE, len(items)))})]


class _Tried:
    """Which answers fit which changes; each is tried once."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self.known: dict[tuple[frozenset[Mutant], int], bool] = {}
        self.packages: dict[frozenset[Mutant], Any] = {}

    def fits(self, changes: tuple[Mutant, ...], index: int) -> bool:
        key = frozenset(changes)
        if key not in self.packages:
            try:
                self.packages[key] = rules(*changes)
            except ValueError:  # they exclude each other
                self.packages[key] = None
        if (key, index) not in self.known:
            expected = self.packages[key]
            with np.errstate(all="ignore"):
                self.known[key, index] = bool(expected) and self.answers[index].fits(changes, expected)
        return self.known[key, index]

    def score(self, changes: tuple[Mutant, ...], asked: Iterable[int]) -> int:
        return sum(self.fits(changes, index) for index in asked)

    def unexplained(self, changes: tuple[Mutant, ...]) -> list[int]:
        return [index for index in range(len(self.answers)) if not self.fits(changes, index)]

    def flagged(self, flags: set[str]) -> list[int]:
        """The answers to vectors that are for one of these mistakes."""
        return [index for index, answer in enumerate(self.answers) if flags & {*answer.vector.flags}]
