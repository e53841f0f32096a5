"""The verdict on one step: how far a result is from the oracle's, in units of the derived bound (SPEC: PREC)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import adamp_spec
from adamp_conformance.adapter import MOMENTS, Arrays, State
from adamp_spec import Bounded, Branch, Layout, Possible, Rows


class Algorithm(NamedTuple):
    """One algorithm as a set of rules gives it: its hyperparameters, its state and its step."""

    hyper: Any
    state: Any
    step: Any


def algorithms(rules: Any = adamp_spec) -> dict[str, Algorithm]:
    """The algorithms of `rules`: a package like `adamp_spec`."""
    return {
        "adamp": Algorithm(rules.AdamPHyper, rules.AdamPState, rules.adamp_step),
        "sgdp": Algorithm(rules.SGDPHyper, rules.SGDPState, rules.sgdp_step),
    }


ALGORITHMS = algorithms()


class Undecidable(Exception):
    """The bound of some value is infinite, so no verdict is possible: the inputs overflow the working type."""


class Expected(NamedTuple):
    """One legal outcome of a step on one tensor: `p`, `m`, `v` with their bounds."""

    branch: Branch
    tensors: dict[str, Bounded]
    legal: np.ndarray  # per slice
    seen: tuple[int, ...]  # the tensor's shape with the layout's view applied, which `legal` broadcasts to


class Place(NamedTuple):
    """One element of one array of the state."""

    parameter: str
    tensor: str
    at: tuple[int, ...]


class Verdict(NamedTuple):
    """What the judge says of a step.

    Attributes:
      margin: largest |got - expected| / bound; the step conforms when it is at most 1.
      place: where the margin was found, None when everything is exact.
      branches: name -> branch taken, per slice.
      ambiguous: whether some slice had more than one legal outcome.
      problem: what is wrong beyond numbers (a dtype, a shape, the step count), or None.
    """

    margin: float
    place: Place | None
    branches: dict[str, np.ndarray]
    ambiguous: bool
    problem: str | None = None

    @property
    def conforms(self) -> bool:
        return self.problem is None and self.margin <= 1.0


def expected_outcomes(
    algorithm: str,
    hyper: Mapping[str, Any],
    layout: Layout,
    before: Mapping[str, np.ndarray | Bounded],
    step: int,
    gradient: np.ndarray,
    exact: bool = False,
    rules: Any = adamp_spec,
) -> list[Expected]:
    """Every outcome that is legal for some slice of one tensor.

    Args:
      algorithm, hyper, layout: the problem.
      before: `p`, `m`, `v` before the step; `Bounded` where an implementation may already differ.
      step: steps taken before it.
      gradient: of the step.
      exact: whether every operation of the decision is exact in any working type, so that a cosine
        on the threshold is decided although its interval straddles it.
      rules: what to expect, a package like `adamp_spec`.

    Raises:
      Undecidable: a bound is infinite.
    """
    make_hyper, make_state, take_step = algorithms(rules)[algorithm]
    checked = make_hyper(**hyper)
    own_layout = rules.Layout(**layout.to_dict())
    rows = layout.rows(gradient.shape)
    bounded = {name: x if isinstance(x, Bounded) else Bounded.exact(x) for name, x in before.items()}
    state = make_state(step, *(bounded[moment] for moment in MOMENTS[algorithm]))

    def outcome(choose: Any) -> tuple[Bounded, Any]:
        return take_step(bounded["p"], Bounded.exact(gradient), state, checked, own_layout, choose)[:2]

    seen: list[Possible] = []

    def record(*tests: Any) -> np.ndarray:
        seen[:] = (test if isinstance(test, Possible) else Possible(test, test) for test in tests)
        return np.full(rows.slices, Branch.NONE)

    unprojected = outcome(record)
    if exact:
        p, *moments = (x.value.astype(np.longdouble) for x in bounded.values())
        take_step(p, gradient.astype(np.longdouble), make_state(step, *moments), checked, own_layout, record)
    channel, layer = seen
    legal = {
        Branch.CHANNEL: channel.possible,
        Branch.LAYER: ~channel.certain & layer.possible,
        Branch.NONE: ~channel.certain & ~layer.certain,
    }
    outcomes = []
    for branch, where in legal.items():
        if np.any(where) or (branch is Branch.NONE and not where.size):  # nothing to do, for no slices
            forced = np.full(rows.slices, branch)
            new_p, new_state = outcome(lambda *tests, forced=forced: forced) if branch else unprojected
            tensors = {"p": new_p} | dict(zip(MOMENTS[algorithm], new_state[1:], strict=True))
            for name, value in tensors.items():
                if not np.all(np.isfinite(value.error)):
                    raise Undecidable(f"the bound of {name} is infinite on the branch {branch.name.lower()}")
            outcomes.append(Expected(branch, tensors, where, rows.shape))
    return outcomes


def margins(tensor: str, got: np.ndarray, expected: Bounded) -> np.ndarray:
    """|got - expected| / bound per element; 0 where equal or both NaN, infinite where only one is finite.

    Where the parameter `p` is to become infinite, NaN is legal too (EDGE-2).
    """
    value = got.astype(expected.value.dtype)
    nan_is_legal = ~np.isfinite(expected.value) if tensor == "p" else np.isnan(expected.value)
    same = (value == expected.value) | (np.isnan(value) & nan_is_legal)
    with np.errstate(all="ignore"):
        ratio = np.abs(value - expected.value) / expected.error
    return np.where(same, 0.0, np.where(np.isnan(ratio), np.inf, ratio)).astype(np.float64)


def judge_step(
    algorithm: str,
    hyper: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    before: State,
    gradients: Arrays,
    after: State,
    exact: frozenset[str] = frozenset(),
    rules: Any = adamp_spec,
) -> Verdict:
    """Judges one step of a whole problem, or of those of its parameters that `gradients` names.

    In every slice all tensors must match the same legal outcome (PREC-8); where the implementation
    reports its branch, that outcome.

    Raises:
      Undecidable: see `expected_outcomes`.
    """
    if problem := _mismatch(before, after, gradients):
        return Verdict(np.inf, None, {}, False, problem)
    worst, place, ambiguous = 0.0, None, False
    branches = {}
    for name, gradient in gradients.items():
        rows = layouts[name].rows(gradient.shape)
        outcomes = expected_outcomes(
            algorithm, hyper, layouts[name], before.tensors(name), before.step, gradient, name in exact, rules
        )
        got = after.tensors(name)
        scores = []  # per outcome: the worst margin of each slice, over all tensors jointly
        for outcome in outcomes:
            reported = after.branches is None or after.branches[name] == outcome.branch
            per_tensor = [
                _per_slice(margins(tensor, got[tensor], bounded), rows) for tensor, bounded in outcome.tensors.items()
            ]
            scores.append(np.where(outcome.legal & reported, np.max(per_tensor, axis=0), np.inf))
        chosen = np.argmin(scores, axis=0)
        branches[name] = np.choose(chosen, [outcome.branch for outcome in outcomes])
        ambiguous |= bool(np.any(np.sum([outcome.legal for outcome in outcomes], axis=0) > 1))
        margin = float(np.max(np.min(scores, axis=0), initial=0.0))
        if margin > worst or place is None:
            elements = worst_elements(got, outcomes, branches[name], rows)
            tensor = max(elements, key=lambda key: elements[key].margin, default="p")
            worst = margin
            place = Place(name, tensor, elements[tensor].at) if elements else None
    return Verdict(worst, place, branches, ambiguous)


class Worst(NamedTuple):
    """The worst element of one array, and the outcome that it was compared with."""

    at: tuple[int, ...]
    margin: float
    bounded: Bounded


def worst_elements(
    got: Mapping[str, np.ndarray], outcomes: Sequence[Expected], branches: np.ndarray, rows: Rows
) -> dict[str, Worst]:
    """Where `p` and each moment are worst, each slice beside the outcome of its branch; empty for no elements."""
    worst: dict[str, Worst] = {}
    for tensor, array in got.items():
        for outcome in outcomes:
            bounded = outcome.tensors[tensor]
            here = np.broadcast_to(branches == outcome.branch, rows.shape).reshape(array.shape)
            score = np.where(here, margins(tensor, array, bounded), -1.0)
            if array.size and (tensor not in worst or score.max() > worst[tensor].margin):
                index = tuple(int(i) for i in np.unravel_index(int(np.argmax(score)), array.shape))
                worst[tensor] = Worst(index, float(score[index]), bounded)
    return worst


def _mismatch(before: State, after: State, names: Iterable[str]) -> str | None:
    if after.step != before.step + 1:
        return f"the step count went from {before.step} to {after.step}"
    for name in names:
        for tensor, old in before.tensors(name).items():
            new = after.tensors(name)[tensor]
            if new.shape != old.shape or new.dtype != old.dtype:
                return f"{tensor} of {name} went from {old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}"
    return None


def _per_slice(x: np.ndarray, rows: Rows) -> np.ndarray:
    inner = tuple(axis for axis in range(len(rows.shape)) if axis not in rows.batch)
    return np.max(x.reshape(rows.shape), axis=inner, keepdims=True, initial=0.0)
