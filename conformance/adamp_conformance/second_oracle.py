"""A second oracle: AdamP and SGDP written once more from SPEC.md, to check the first one and every frozen interval.

It shares nothing with `adamp_spec` but the record `Layout`. Where the first oracle evaluates arrays in a wider NumPy
type, this one evaluates one number after the other with mpmath: a number is a `Ball`, its exact value at 200 bits and a
radius that holds every value an implementation may compute by PREC-1 to PREC-6. The roundings of 200 bits are
2^-147 of the smallest radius and are left out.

How a radius grows, `u` being the unit roundoff of the working type, in every case with second-order terms:

- An operation on balls has the radius that interval arithmetic gives, plus one rounding of the largest value in
  the ball (PREC-3). Whether a rounding happens to be exact, as a multiplication by one is, is not asked; only an
  operation whose exact result is zero, like a product with an exact zero, is exact.
- A coefficient has 4 u (PREC-2), and a sum K(n) u times the sum of the largest absolute values of its terms (PREC-4).
  The products inside `<a, b>` are operations of their own.
- A result that may lie below the smallest normal number may become zero, or lose digits (PREC-5).
- A value that may exceed the largest number of its type may be infinite; nothing is known of it then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from mpmath import MPContext

from adamp_spec import Layout

mp = MPContext()
mp.prec = 200
ZERO, ONE, INFINITY = mp.mpf(0), mp.mpf(1), mp.mpf("inf")

CHANNEL, LAYER, NONE = "channel", "layer", "none"


class Ball(NamedTuple):
    """A finite number: every value that conforms lies within `rad` of the exact value `mid`.

    Both are mpf. An infinite `rad` says that nothing is known of what conforms.
    """

    mid: Any
    rad: Any


# A float is a number that is not finite: NaN, inf or -inf, without any error (EDGE-2).
Value = Ball | float

EXACT_ZERO, EXACT_ONE = Ball(ZERO, ZERO), Ball(ONE, ZERO)


class Arithmetic:
    """Operations on `Value`s, each with the error that an implementation may make in one floating-point type.

    Args:
      digits: significant binary digits.
      low, high: exponents of the smallest normal number and of the largest binade.
      flushes: whether results below the smallest normal number may be replaced by zero (PREC-5).
    """

    def __init__(self, digits: int, low: int, high: int, flushes: bool) -> None:
        self.digits, self.low, self.flushes = digits, low, flushes
        self.u = mp.ldexp(ONE, -digits)
        self.smallest_normal = mp.ldexp(ONE, low)
        self.largest = mp.ldexp(2 - 2 * self.u, high)

    def round(self, mid: Any, rad: Any, roundings: int = 1) -> Ball:
        """The result of an operation that gives the ball when done exactly (PREC-3, PREC-5)."""
        top = abs(mid) + rad
        if not top:
            return EXACT_ZERO
        if not top <= self.largest:  # nor where zero times an infinite radius is NaN
            return Ball(mid, INFINITY)
        error = roundings * self.u * top
        if abs(mid) - rad < self.smallest_normal:
            if self.flushes:
                error += min(top, self.smallest_normal)
            else:  # half the distance of subnormal numbers
                error = max(error, self.u * self.smallest_normal)
        return Ball(mid, rad + error)

    def coefficient(self, exact: Any) -> Ball:
        """What is computed from hyperparameters and the step count alone (PREC-2)."""
        return self.round(exact, ZERO, 4)

    def add(self, a: Value, b: Value) -> Value:
        if isinstance(a, float) or isinstance(b, float):
            return _ieee(lambda x, y: x + y, a, b)
        return self.round(a.mid + b.mid, a.rad + b.rad)

    def subtract(self, a: Value, b: Value) -> Value:
        return self.add(a, negative(b))

    def multiply(self, a: Value, b: Value) -> Value:
        if isinstance(a, float) or isinstance(b, float):
            return _ieee(lambda x, y: x * y, a, b)
        rad = a.rad * b.rad
        if a.rad:
            rad += a.rad * abs(b.mid)
        if b.rad:
            rad += b.rad * abs(a.mid)
        return self.round(a.mid * b.mid, rad)

    def divide(self, a: Value, b: Value) -> Value:
        """`a / b`; nothing is known where `b` may be zero, unless `a` is zero (EDGE-1)."""
        if isinstance(a, float) or isinstance(b, float):
            return _ieee(lambda x, y: x / y, a, b)
        nearest = abs(b.mid) - b.rad
        if not (a.mid or a.rad):
            return EXACT_ZERO
        quotient = a.mid / b.mid
        if nearest <= 0:
            return Ball(quotient, INFINITY)
        return self.round(quotient, (a.rad + abs(quotient) * b.rad) / nearest)

    def root(self, a: Value) -> Value:
        """The square root. What is never negative by its formula is not made negative by its radius."""
        if isinstance(a, float):
            return a if a > 0 else math.nan
        if a.mid < 0:
            return math.nan
        root = mp.sqrt(a.mid)
        if not a.rad:
            return self.round(root, ZERO)
        low, high = mp.sqrt(max(a.mid - a.rad, ZERO)), mp.sqrt(a.mid + a.rad)
        return self.round(root, max(root - low, high - root))

    def sum(self, terms: Sequence[Value]) -> Value:
        """The sum of `n` terms (PREC-4)."""
        mid = rad = size = ZERO
        for term in terms:
            if isinstance(term, float):
                return sum(x for x in terms if isinstance(x, float))
            mid += term.mid
            rad += term.rad
            size += abs(term.mid)
        roundings = 2 * (len(terms) - 1).bit_length() + 16
        return self.round(mid, rad + roundings * self.u * (size + rad), 0)

    def dot(self, a: Sequence[Value], b: Sequence[Value]) -> Value:
        """`<a, b>`."""
        return self.sum([self.multiply(x, y) for x, y in zip(a, b, strict=True)])


def _ieee(operation: Callable[[Any, Any], Any], a: Value, b: Value) -> Value:
    """An operation on at least one number that is not finite: of finite ones the sign of the exact value counts."""
    x, y = (np.float64(v if isinstance(v, float) else mp.sign(v.mid)) for v in (a, b))
    with np.errstate(all="ignore"):
        result = float(operation(x, y))
    return EXACT_ZERO if math.isfinite(result) else result  # finite only where something is divided by infinity


def negative(a: Value) -> Value:
    return -a if isinstance(a, float) else Ball(-a.mid, a.rad)


def larger(a: Value, b: Ball) -> Value:
    """The maximum, which rounds nothing."""
    if isinstance(a, float):
        return max(a, 0.0)  # any finite number stands for `b`; NaN is no smaller than it
    mid = max(a.mid, b.mid)
    low, high = max(a.mid - a.rad, b.mid - b.rad), max(a.mid + a.rad, b.mid + b.rad)
    return Ball(mid, max(high - mid, mid - low))


@dataclass(frozen=True)
class Format:
    """A dtype of the specification, and the arithmetic of its working type (PREC-1)."""

    dtype: np.dtype
    own: Arithmetic
    work: Arithmetic

    def store(self, a: Value) -> Value:
        """From the working type to the tensor's own, where that is another (PREC-6)."""
        return a if isinstance(a, float) or self.own is self.work else self.own.round(a.mid, a.rad)


_BINARY64 = Arithmetic(53, -1022, 1023, flushes=True)
_BINARY32 = Arithmetic(24, -126, 127, flushes=True)
FORMATS = {
    "float64": Format(np.dtype(np.float64), _BINARY64, _BINARY64),
    "float32": Format(np.dtype(np.float32), _BINARY32, _BINARY32),
    "float16": Format(np.dtype(np.float16), Arithmetic(11, -14, 15, flushes=False), _BINARY32),
    "bfloat16": Format(np.dtype(ml_dtypes.bfloat16), Arithmetic(8, -126, 127, flushes=True), _BINARY32),
}


def values(array: np.ndarray) -> list[Value]:
    """The elements of an array of any dtype of `FORMATS`, row-major, as exact values."""
    return [Ball(mp.mpf(x), ZERO) if math.isfinite(x) else x for x in array.astype(np.float64).ravel().tolist()]


# Layouts (section 6), as lists of indices into the row-major elements.


class SliceRows(NamedTuple):
    """The indices of one slice, and of each row of its channel view (None where nothing is ever projected)."""

    elements: list[int]
    rows: list[list[int]] | None


def slices_of(layout: Layout, shape: tuple[int, ...]) -> list[SliceRows]:
    """Cuts a tensor into slices, row-major along the batch axes, and each slice into rows (LAYOUT-1 to LAYOUT-5)."""
    shape = shape if layout.view is None else layout.view
    rank = len(shape)
    batch = sorted(axis % rank for axis in layout.batch)
    projects = layout.channel is not None and rank - len(batch) > 1
    channel = sorted(axis % rank for axis in layout.channel or ()) if projects else []

    def places(axes: list[int]) -> Iterable[tuple[int, ...]]:
        return itertools.product(*(range(shape[axis]) for axis in axes))

    cut: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]]
    cut = {where: {row: [] for row in places(channel)} for where in places(batch)}
    for index, place in enumerate(places(list(range(rank)))):
        cut[tuple(place[axis] for axis in batch)][tuple(place[axis] for axis in channel)].append(index)
    return [
        SliceRows(sorted(itertools.chain(*rows.values())), list(rows.values()) if projects else None)
        for rows in cut.values()
    ]


# One step (sections 3 to 5).


class Slice(NamedTuple):
    """What may become of one slice.

    Attributes:
      elements: row-major indices of its elements.
      outcomes: legal branch (`channel`, `layer`, `none`) -> `p`, `m`, `v` -> one value per index in `elements`.
        A slice without elements has the single branch `none`, which means nothing (EDGE-3).
    """

    elements: list[int]
    outcomes: dict[str, dict[str, list[Value]]]


class Update(NamedTuple):
    """The part of a step before the projection.

    Attributes:
      moments: `m`, `v`, unrounded (PREC-6), for every element of the tensor.
      direction: `q` likewise.
      step: what is multiplied by the projected direction.
      decay: the two factors before `w` (ADAMP-5, SGDP-4).
      projected_moment: whether the stored `m` is the projected direction (SGDP-3).
    """

    moments: dict[str, list[Value]]
    direction: list[Value]
    step: Value
    decay: tuple[Value, Value]
    projected_moment: bool


def step(
    algorithm: str,
    hyper: Mapping[str, Any],
    layout: Layout,
    shape: tuple[int, ...],
    dtype: str,
    before: Mapping[str, Sequence[Value]],
    gradient: Sequence[Value],
    taken: int,
    exact: bool = False,
) -> list[Slice]:
    """Every legal outcome of one step on one tensor, slice by slice.

    Args:
      algorithm: `adamp` or `sgdp`.
      hyper: a value for each hyperparameter under the specification's name: floats (taken as binary64) and booleans.
      layout, shape, dtype: of the tensor; `dtype` is a key of `FORMATS`.
      before: `p`, `m` and, for AdamP, `v` as `values` gives them, or with the radii that an earlier step left.
      gradient: likewise.
      taken: steps taken before this one.
      exact: every operation of the tests is exact in the working type, so that each has one outcome (PREC-8).
    """
    form = FORMATS[dtype]
    work = form.work
    p = list(before["p"])
    g = list(gradient)
    number = {name: mp.mpf(value) for name, value in hyper.items() if not isinstance(value, bool)}
    eps = work.coefficient(number["eps"])
    update = {"adamp": _adamp, "sgdp": _sgdp}[algorithm](work, hyper, number, eps, before, g, taken + 1)

    done = []
    for elements, rows in slices_of(layout, shape):
        views = {CHANNEL: rows, LAYER: [elements]} if rows is not None and elements else {}
        outcomes = {}
        for branch in _branches(work, number["delta"], eps, p, g, views, exact):
            q = {i: update.direction[i] for i in elements}
            for row in views.get(branch, []):
                q.update(_without_radial_part(work, eps, row, p, q))
            w = EXACT_ONE if branch == NONE else work.coefficient(number["wd_ratio"])
            keep = None
            if number["weight_decay"] > 0:
                keep = work.subtract(EXACT_ONE, work.multiply(work.multiply(*update.decay), w))
            moments = {name: [moment[i] for i in elements] for name, moment in update.moments.items()}
            if update.projected_moment:
                moments["m"] = list(q.values())
            kept = [p[i] if keep is None else work.multiply(p[i], keep) for i in elements]
            new = [work.subtract(x, work.multiply(update.step, q[i])) for x, i in zip(kept, elements, strict=True)]
            outcomes[branch] = {name: [form.store(x) for x in tensor] for name, tensor in {"p": new, **moments}.items()}
        done.append(Slice(elements, outcomes))
    return done


def _adamp(
    work: Arithmetic,
    hyper: Mapping[str, Any],
    number: Mapping[str, Any],
    eps: Ball,
    before: Mapping[str, Sequence[Value]],
    g: Sequence[Value],
    t: int,
) -> Update:
    beta1, rest1 = work.coefficient(number["beta1"]), work.coefficient(1 - number["beta1"])
    beta2, rest2 = work.coefficient(number["beta2"]), work.coefficient(1 - number["beta2"])
    correction = work.coefficient(mp.sqrt(1 - number["beta2"] ** t))
    m, v, q = [], [], []
    for old_m, old_v, x in zip(before["m"], before["v"], g, strict=True):
        new_m = work.add(work.multiply(beta1, old_m), work.multiply(rest1, x))  # ADAMP-1
        new_v = work.add(work.multiply(beta2, old_v), work.multiply(rest2, work.multiply(x, x)))  # ADAMP-2
        n = new_m
        if hyper["nesterov"]:
            n = work.add(work.multiply(beta1, new_m), work.multiply(rest1, x))  # ADAMP-3
        denominator = work.add(work.divide(work.root(new_v), correction), eps)
        m.append(new_m)
        v.append(new_v)
        q.append(work.divide(n, denominator))  # ADAMP-4
    size = work.coefficient(number["lr"] / (1 - number["beta1"] ** t))  # ADAMP-6
    decay = (work.coefficient(number["lr"]), work.coefficient(number["weight_decay"]))
    return Update({"m": m, "v": v}, q, size, decay, projected_moment=False)


def _sgdp(
    work: Arithmetic,
    hyper: Mapping[str, Any],
    number: Mapping[str, Any],
    eps: Ball,
    before: Mapping[str, Sequence[Value]],
    g: Sequence[Value],
    t: int,
) -> Update:
    momentum, rest = work.coefficient(number["momentum"]), work.coefficient(1 - number["dampening"])
    m, q = [], []
    for old_m, x in zip(before["m"], g, strict=True):
        new_m = work.add(work.multiply(momentum, old_m), work.multiply(rest, x))  # SGDP-1
        m.append(new_m)
        q.append(work.add(x, work.multiply(momentum, new_m)) if hyper["nesterov"] else new_m)  # SGDP-2
    lr = work.coefficient(number["lr"])
    decay = (lr, work.coefficient(number["weight_decay"] / (1 - number["momentum"])))
    return Update({"m": m}, q, lr, decay, hyper["project_momentum"] and not hyper["nesterov"])


def _branches(
    work: Arithmetic,
    delta: Any,
    eps: Ball,
    p: Sequence[Value],
    g: Sequence[Value],
    views: Mapping[str, list[list[int]]],
    exact: bool,
) -> list[str]:
    """The branches of one slice that PROJ-4 can reach, in its order."""
    reached = []
    for branch, rows in views.items():
        may_pass = must_pass = True
        for row in rows:  # PROJ-2: every row
            cosine = _cosine(work, eps, [g[i] for i in row], [p[i] for i in row])
            may, must = _below(cosine, delta / mp.sqrt(len(row)), work, exact)
            may_pass, must_pass = may_pass and may, must_pass and must
        if may_pass:
            reached.append(branch)
        if must_pass:
            return reached
    return [*reached, NONE]


def _cosine(work: Arithmetic, eps: Ball, g: Sequence[Value], p: Sequence[Value]) -> Value:
    """PROJ-1. The norms divide one after the other: their product underflows for small `eps` (EDGE-1)."""
    if any(isinstance(x, float) for x in (*g, *p)):
        return math.nan  # the numerator is NaN, or infinite like the denominator
    cosine = work.dot(g, p)
    for x in (g, p):
        cosine = work.divide(cosine, larger(work.root(work.dot(x, x)), eps))
    return cosine


def _below(cosine: Value, threshold: Any, work: Arithmetic, exact: bool) -> tuple[bool, bool]:
    """Whether the absolute value of the cosine may be below the threshold, and whether it must be (PROJ-2, PROJ-3)."""
    if isinstance(cosine, float):
        return False, False
    size = abs(cosine.mid)
    if exact:
        return (size < threshold,) * 2
    bound = work.coefficient(threshold)
    return max(size - cosine.rad, ZERO) < bound.mid + bound.rad, size + cosine.rad < bound.mid - bound.rad


def _without_radial_part(
    work: Arithmetic, eps: Ball, row: Sequence[int], p: Sequence[Value], q: Mapping[int, Value]
) -> dict[int, Value]:
    """PROJ-5 and PROJ-6 for one row."""
    of_row = [p[i] for i in row]
    norm = work.add(work.root(work.dot(of_row, of_row)), eps)
    u = [work.divide(x, norm) for x in of_row]
    along = work.dot(u, [q[i] for i in row])
    return {i: work.subtract(q[i], work.multiply(x, along)) for i, x in zip(row, u, strict=True)}


# Intervals, and the verdict on those of the first oracle.


def interval(numbers: Sequence[Value], dtype: str, factor: Any = ONE) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of the dtype within `factor` radii of each number.

    NaN and infinities are themselves; a number with an infinite radius has the interval from -inf to inf.

    Returns:
      two arrays of the dtype and of shape (len(numbers),); the first is above the second where the dtype
      has no value in between.
    """
    form = FORMATS[dtype]
    low = [_endpoint(form.own, x, -factor) for x in numbers]
    high = [_endpoint(form.own, x, factor) for x in numbers]
    return np.array(low, np.float64).astype(form.dtype), np.array(high, np.float64).astype(form.dtype)


def _endpoint(own: Arithmetic, x: Value, factor: Any) -> float:
    """`mid + factor * rad`, rounded towards `mid` to a value that the format has."""
    if isinstance(x, float):
        return x
    end = x.mid + factor * x.rad
    if not end or mp.isinf(end):
        return float(end)
    spacing = max(mp.frexp(end)[1] - 1, own.low) - own.digits + 1
    steps = mp.ldexp(end, -spacing)
    whole = mp.ldexp(mp.floor(steps) if factor > 0 else mp.ceil(steps), spacing)
    return float(whole) if abs(whole) <= own.largest else math.copysign(math.inf, whole)


def slack(dtype: str) -> Any:
    """How far an end of the first oracle's interval may be off, as a fraction of the radius.

    It rounds as well, in a reference type that is longer than the working type: binary64 for binary32, the 64 bits of
    x87 for binary64. So each of its roundings is at most 2^-29 or 2^-11 of the one that its bound allows for the same
    operation, and what they do to a value is at most that fraction of the radius. It adds as much to the bound, which
    makes two such fractions at an end; the roundings of the bound itself are nothing beside that. Four leave room for
    reference functions that are off by more than half a unit.
    """
    digits = FORMATS[dtype].work.digits
    return mp.ldexp(ONE, 2 + digits - (64 if digits == 53 else 53))


def compare(first_low: np.ndarray, first_high: np.ndarray, second: Sequence[Value]) -> list[str]:
    """What is wrong with intervals of the first oracle; empty when nothing is.

    Each end must lie between the end that (1 - `slack`) radii give and the one that (1 + `slack`) radii give, both
    rounded to the dtype as `interval` does. So an interval is sound (no narrower than the second oracle's, the exact
    value inside) and tight (no wider), up to the roundings of the first oracle itself.

    Args:
      first_low, first_high: arrays of one dtype of `FORMATS` and any shape.
      second: as many values, row-major.
    """
    dtype = first_low.dtype.name
    inner, outer = (interval(second, dtype, factor) for factor in (1 - slack(dtype), 1 + slack(dtype)))
    wide = np.float64
    low, high = first_low.astype(wide).ravel(), first_high.astype(wide).ravel()
    inner_low, inner_high, outer_low, outer_high = (x.astype(wide) for x in (*inner, *outer))
    problems = []
    for i, value in enumerate(second):
        got = f"element {i}: [{low[i]!r}, {high[i]!r}]"
        if isinstance(value, float):
            if not np.array_equal([low[i], high[i]], [value] * 2, equal_nan=True):
                problems.append(f"{got}: the value is {value}")
        elif value.rad == INFINITY:
            problems.append(f"{got}: nothing is known of the value, which may overflow")
        else:
            ends = f"the exact value is {mp.nstr(value.mid, 20)}, the radius {mp.nstr(value.rad, 6)}"
            if not (low[i] <= inner_low[i] and high[i] >= inner_high[i]):
                problems.append(f"{got} is too narrow for [{inner_low[i]!r}, {inner_high[i]!r}]: {ends}")
            if not (low[i] >= outer_low[i] and high[i] <= outer_high[i]):
                problems.append(f"{got} is too wide for [{outer_low[i]!r}, {outer_high[i]!r}]: {ends}")
    return problems


def branch_combinations(slices: Sequence[Slice]) -> set[tuple[str, ...]]:
    """Every choice of one legal branch per slice (PREC-8)."""
    return set(itertools.product(*(part.outcomes for part in slices)))


def assemble(slices: Sequence[Slice], branches: Sequence[str]) -> dict[str, list[Value]]:
    """`p` and each moment of one combination of branches, row-major."""
    whole: dict[str, dict[int, Value]] = {}
    for part, branch in zip(slices, branches, strict=True):
        for tensor, numbers in part.outcomes[branch].items():
            whole.setdefault(tensor, {}).update(zip(part.elements, numbers, strict=True))
    return {tensor: [numbers[i] for i in range(len(numbers))] for tensor, numbers in whole.items()}


def compare_step(first: Mapping[tuple[str, ...], Any], slices: Sequence[Slice]) -> list[str]:
    """What is wrong with the legal outcomes of one step: their branches, and the intervals of each.

    Args:
      first: branches, one per slice -> an outcome with `low` and `high`, tensor -> array. The branch of a slice without
        elements is not looked at.
      slices: as `step` gives them.
    """
    problems = []
    filled = [i for i, part in enumerate(slices) if part.elements]
    known = {tuple(branches[i] for i in filled): outcome for branches, outcome in first.items()}
    legal = branch_combinations([slices[i] for i in filled])
    for branches in sorted(known.keys() - legal):
        problems.append(f"branches {'/'.join(branches)}: not legal, only {sorted('/'.join(x) for x in legal)} are")
    for branches in sorted(legal - known.keys()):
        problems.append(f"branches {'/'.join(branches)}: legal but missing")
    for branches in sorted(known.keys() & legal):
        for tensor, numbers in assemble([slices[i] for i in filled], branches).items():
            found = compare(known[branches].low[tensor], known[branches].high[tensor], numbers)
            problems += [f"branches {'/'.join(branches)}: {tensor}, {problem}" for problem in found]
    return problems


def verify_vector(vector: Any, group: Any) -> list[str]:
    """What is wrong with a frozen vector, in words; empty when both oracles agree on all of it.

    The steps of a vector of several steps are chained: the balls after one are the balls before the next.

    Args:
      vector: a `vectors.Vector`. Its flag `comparison` says that every operation of its tests is exact.
      group: the `vectors.Group` that it stands in.
    """
    state: Mapping[str, Sequence[Value]] = {name: values(array) for name, array in vector.before.items()}
    problems = []
    for index, frozen in enumerate(vector.steps):
        slices = step(
            group.algorithm,
            group.hyper,
            vector.layout,
            tuple(vector.shape),
            group.dtype,
            state,
            values(frozen.gradient),
            group.step + index,
            exact="comparison" in vector.flags,
        )
        first = {tuple(outcome.branch): outcome for outcome in frozen.outcomes}
        found = compare_step(first, slices)
        if len(first) != len(frozen.outcomes):
            found.append("two outcomes have the same branches")
        problems += [f"{vector.id}, step {group.step + index + 1}: {problem}" for problem in found]
        combinations = branch_combinations(slices)
        if len(combinations) != 1:
            if index + 1 < len(vector.steps):
                problems.append(
                    f"{vector.id}: step {group.step + index + 1} is undecided, so what follows is undefined"
                )
            break
        state = assemble(slices, *combinations)
    return problems
