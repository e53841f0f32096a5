"""Wrong optimizers: the oracle with a piece of its text exchanged, as `spec/mutants.toml` lists them.

They are the measure of the vectors: every one must be killed by at least two.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import adamp_spec
from adamp_conformance.adapter import MOMENTS
from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.cases import Random
from adamp_conformance.judge import ALGORITHMS, algorithms
from adamp_conformance.modes import Problem, create, judge_refusal
from adamp_conformance.spec_files import spec_file
from adamp_conformance.vectors import Group, Refusal, Vector, load

MODULES = ("layout", "hyperparameters", "oracle")  # of adamp_spec, in the order of their imports
ENOUGH = 2  # vectors that must kill a mutant


@dataclass(frozen=True)
class Mutant:
    """A wrong optimizer.

    Attributes:
      flag: the table of `mutants.toml` that it stands in.
      name: unique in its table.
      clause: the label that it violates.
      module: the module of `adamp_spec` that is changed.
      replacements: (old, new) texts.
      algorithms: those that it makes wrong.
    """

    flag: str
    name: str
    clause: str
    module: str
    replacements: tuple[tuple[str, str], ...]
    algorithms: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.flag}/{self.name}"


@cache
def mutants() -> dict[str, Mutant]:
    """All mutants by id."""
    found = {}
    for flag, entry in tomllib.loads(spec_file("mutants.toml").read_text()).items():
        for x in entry["mutants"]:
            pairs = tuple(zip(x["replace"][::2], x["replace"][1::2], strict=True))
            module, which = x.get("module", "oracle"), tuple(x.get("algorithms", ALGORITHMS))
            mutant = Mutant(flag, x["name"], x["clause"], module, pairs, which)
            found[mutant.id] = mutant
    return found


_numbers = itertools.count()


@cache
def rules(*changes: Mutant) -> ModuleType:
    """A package like `adamp_spec` with the changes of all these mutants made.

    Raises:
      ValueError: a text to be replaced does not occur, because the oracle or another mutant changed it.
    """
    package = ModuleType(f"adamp_mutant_{next(_numbers)}")
    package.__path__ = []
    sys.modules[package.__name__] = package
    for name in MODULES:
        original = importlib.import_module(f"adamp_spec.{name}")
        assert original.__file__
        text = Path(original.__file__).read_text()
        for change in changes:
            for old, new in change.replacements if change.module == name else ():
                if old not in text:
                    raise ValueError(f"mutant {change.id}: {old!r} does not occur in adamp_spec/{name}.py")
                text = text.replace(old, new)
        module = ModuleType(f"{package.__name__}.{name}")
        sys.modules[module.__name__] = module
        exec(
            compile(text.replace("from adamp_spec.", f"from {package.__name__}."), module.__name__, "exec"),
            vars(module),
        )
        vars(package).update((key, value) for key, value in vars(module).items() if not key.startswith("_"))
    return package


class Kills(NamedTuple):
    """What became of one mutant of one algorithm.

    Attributes:
      vectors: (id, dtype) of those that kill it.
      flagged: how many of them bear its flag.
      random: whether the random-data test kills it.
    """

    mutant: Mutant
    algorithm: str
    vectors: tuple[tuple[str, str], ...]
    flagged: int
    random: bool


def hunt(mutant: Mutant) -> list[Kills]:
    """Puts a mutant to every vector, and to the random-data test."""
    changed = rules(mutant)
    corpus = load()
    found = []
    for algorithm in mutant.algorithms:
        killers: list[tuple[Vector | Refusal, str]] = []
        for group in corpus.groups:
            if group.algorithm == algorithm:
                killers += [(vector, group.dtype) for vector in group.vectors if _kills(changed, group, vector)]
        for refusal in corpus.refusals:
            if refusal.algorithm == algorithm and _accepts(changed, refusal):
                killers.append((refusal, "float32"))
        flagged = sum(mutant.flag in x.flags for x, _ in killers)
        names = tuple((x.id, dtype) for x, dtype in sorted(killers, key=lambda pair: mutant.flag not in pair[0].flags))
        found.append(Kills(mutant, algorithm, names, flagged, random_test_fails(changed, algorithm)))
    return found


def _kills(changed: Any, group: Group, vector: Vector) -> bool:
    """Whether a vector notices, from parameter and moments alone."""
    alone = group.only([vector.id])
    problem = Problem(alone, group.dtype, "torch")
    try:
        with np.errstate(all="ignore"):
            adapter = create(partial(OracleAdapter, rules=changed), problem)
            if group.steps == 1:
                adapter.load(problem.initial())
            for index, step in enumerate(vector.steps):
                adapter.step({vector.name: step.gradient})
                after = adapter.dump()
                got = after.tensors(vector.name)
                if after.step != group.step + index + 1:
                    return True
                if any(x.shape != vector.shape or x.dtype != step.gradient.dtype for x in got.values()):
                    return True
                if all(outcome.outside(got) for outcome in step.outcomes):
                    return True
    except Exception:  # whatever a wrong optimizer raises, it does not take the step
        return True
    return False


def _accepts(changed: Any, refusal: Refusal) -> bool:
    try:
        return judge_refusal(partial(OracleAdapter, rules=changed), refusal) is not None
    except Exception:  # it refuses what it should take
        return True


# What an optimizer's tests usually are: standard normal data, default hyperparameters, a tolerance from a library.
_SHAPES = ((64, 32), (16, 3, 3, 3), (32,))
_SETTINGS: dict[str, Sequence[dict[str, Any]]] = {
    "adamp": ({}, {"weight_decay": 0.01}, {"nesterov": True}),
    "sgdp": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
}
_STEPS = 10


def random_test_fails(changed: Any, algorithm: str) -> bool:
    """Whether ten steps on random float32 data differ from the oracle's by more than `np.allclose` allows."""
    try:
        with np.errstate(all="ignore"):
            pairs = zip(_random_run(changed, algorithm), _random_run(adamp_spec, algorithm), strict=True)
            return not all(np.allclose(got, wanted) for got, wanted in pairs)
    except Exception:
        return True


def _random_run(rules: Any, algorithm: str) -> Iterator[np.ndarray]:
    make_hyper, make_state, take_step = algorithms(rules)[algorithm]
    for settings in _SETTINGS[algorithm]:
        for shape in _SHAPES:
            random = Random(f"random/{shape}")
            p = _normal(random, shape)
            state = make_state(0, *(np.zeros_like(p) for _ in MOMENTS[algorithm]))
            for _ in range(_STEPS):
                p, state, _ = take_step(p, _normal(random, shape), state, make_hyper(**settings), rules.Layout())
            yield p


def _normal(random: Random, shape: tuple[int, ...]) -> np.ndarray:
    """Close to standard normal: sums of twelve uniform numbers."""
    return (random.uniform(12, *shape).sum(axis=0) / 2).astype(np.float32)
