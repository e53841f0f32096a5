"""Arrays that carry a bound on the error of any implementation that keeps to SPEC: PREC.

`Bounded` holds the value in a wider type and, per element, how far a conforming implementation that
computes in `dtype` may be from it. Each operation propagates the bounds of its operands in full
(second-order terms included) and adds its own rounding: one for an elementwise operation, K(n) for a
sum of n terms, 4 for a coefficient (PREC-2 to PREC-5). It speaks NumPy's protocols, so that
`adamp_spec.oracle` runs on it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

ROUNDINGS_OF_A_COEFFICIENT = 4


def roundings_of_a_sum(terms: int) -> int:
    """K(n): roundings allowed to a sum of n terms, relative to the sum of absolute values (PREC-4)."""
    return 2 * math.ceil(math.log2(terms)) + 16 if terms > 0 else 0


class Limits(NamedTuple):
    """Of a floating-point type: unit roundoff, smallest normal and largest finite number.

    `flushes` says whether results below the smallest normal number may be replaced by zero (PREC-5).
    """

    unit: float
    normal: float
    largest: float
    flushes: bool


@cache
def limits(dtype: np.dtype) -> Limits:
    """`Limits` of any NumPy float type, bfloat16 from ml_dtypes included."""
    if dtype.name == "bfloat16":  # NumPy's finfo does not know it
        return Limits(2.0**-8, 2.0**-126, (2 - 2.0**-7) * 2.0**127, True)
    info = np.finfo(dtype)
    return Limits(float(info.eps) / 2, float(info.tiny), float(info.max), dtype.itemsize > 2)


class Possible(NamedTuple):
    """The truth of a comparison between bounded values: each entry may be certain, possible or neither."""

    certain: np.ndarray
    possible: np.ndarray

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Possible:
        if function is not np.all:
            return NotImplemented
        (truth,) = args
        return Possible(np.all(truth.certain, **kwargs), np.all(truth.possible, **kwargs))


class Bounded(np.lib.mixins.NDArrayOperatorsMixin):
    """Values with error bounds.

    Args:
      value: exact or reference values, any real float type.
      error: how far an implementation may be off, per element (0: it holds the value exactly).
      dtype: the type that the implementation holds the values in.
    """

    def __init__(self, value: np.ndarray, error: np.ndarray | float, dtype: np.dtype) -> None:
        self.value = value
        self.error: np.ndarray = np.broadcast_to(error, np.shape(value))
        self.dtype = dtype

    @classmethod
    def exact(cls, values: np.ndarray) -> Bounded:
        """What both sides hold: the inputs of a step."""
        wide = np.longdouble if values.dtype.itemsize >= 8 else np.float64
        return cls(values.astype(wide), 0.0, values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value)

    def astype(self, dtype: np.dtype) -> Bounded:
        """Rounding to `dtype`: exact when it is at least as precise."""
        if limits(dtype).unit <= limits(self.dtype).unit:
            return Bounded(self.value, self.error, dtype)
        rounded = _rounded(self.value, self.error, dtype, 1)
        rounded.error = np.where(np.isfinite(self.value), rounded.error, 0.0)
        return rounded

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs or ufunc not in _UFUNCS:
            return NotImplemented
        operands = [
            x if isinstance(x, Bounded) else Bounded(np.asarray(x, self.value.dtype), 0.0, self.dtype) for x in inputs
        ]
        with np.errstate(all="ignore"):
            result = _UFUNCS[ufunc](*operands)
            if isinstance(result, Bounded) and not np.all(np.isfinite(result.error)):
                finite = np.isfinite(sum(x.value for x in operands))  # EDGE-2: NaN and infinities propagate exactly
                result.error = np.where(finite, result.error, 0.0)
        return result

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        if function not in _FUNCTIONS:
            return NotImplemented
        with np.errstate(all="ignore"):
            return _FUNCTIONS[function](*args, **kwargs)


def _rounded(
    value: np.ndarray, error: np.ndarray, dtype: np.dtype, roundings: int, scale: np.ndarray | None = None
) -> Bounded:
    """`value` known to `error`, after `roundings` roundings relative to `scale` (by default |value| + error)."""
    unit, normal, largest, flushes = limits(dtype)
    allowed = roundings * (unit + float(np.finfo(value.dtype).eps) / 2)  # the reference rounds too
    if scale is not None:  # what a sum may come to is all that can be said of its last rounding
        error, allowed = error + allowed * scale, 0.0
    top = np.abs(value) + error
    bound = error + allowed * top
    lost = np.minimum(top, normal) if flushes else np.maximum(unit * normal - allowed * top, 0.0)
    bound = np.where((np.abs(value) - error < normal) & (top > 0), bound + lost, bound)  # PREC-5
    bound = np.where(np.abs(value) + bound > largest, np.inf, bound)  # may overflow: no statement
    return Bounded(value, bound, dtype)


def _add(a: Bounded, b: Bounded) -> Bounded:
    return _rounded(a.value + b.value, a.error + b.error, a.dtype, 1)


def _subtract(a: Bounded, b: Bounded) -> Bounded:
    return _rounded(a.value - b.value, a.error + b.error, a.dtype, 1)


def _multiply(a: Bounded, b: Bounded) -> Bounded:
    error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
    return _rounded(a.value * b.value, error, a.dtype, 1)


def _divide(a: Bounded, b: Bounded) -> Bounded:
    value = a.value / b.value
    room = np.abs(b.value) - b.error  # distance of the divisor from zero
    error = np.where(room > 0, (a.error + np.abs(value) * b.error) / room, np.inf)
    exact = (a.error + b.error == 0) | ((a.value == 0) & (a.error == 0))  # EDGE-1: zero divided by anything is zero
    return _rounded(value, np.where(exact, 0.0, error), a.dtype, 1)


def _sqrt(a: Bounded) -> Bounded:
    value = np.sqrt(a.value)
    low = np.sqrt(np.maximum(a.value - a.error, 0))
    high = np.sqrt(a.value + a.error)
    below = np.minimum(a.error, a.value) / (value + low)  # value - low without cancellation
    error = np.where(value > 0, np.maximum(below, high - value), high)
    return _rounded(value, np.where(a.error == 0, 0.0, error), a.dtype, 1)


def _absolute(a: Bounded) -> Bounded:
    return Bounded(np.abs(a.value), a.error, a.dtype)


def _maximum(a: Bounded, b: Bounded) -> Bounded:
    value = np.maximum(a.value, b.value)
    low, high = np.maximum(a.value - a.error, b.value - b.error), np.maximum(a.value + a.error, b.value + b.error)
    return Bounded(value, np.maximum(high - value, value - low), a.dtype)


def _less(a: Bounded, b: Bounded) -> Possible:
    """`a` is a cosine's absolute value, so no implementation gets it below 0."""
    return Possible(a.value + a.error < b.value - b.error, np.maximum(a.value - a.error, 0) < b.value + b.error)


def _less_equal(a: Bounded, b: Bounded) -> Possible:
    """As `_less`, for rules other than the oracle's."""
    return Possible(a.value + a.error <= b.value - b.error, np.maximum(a.value - a.error, 0) <= b.value + b.error)


def _sum(a: Bounded, axis: tuple[int, ...], keepdims: bool) -> Bounded:
    terms = math.prod(a.shape[i] for i in axis)
    value, error, scale = (
        np.sum(x, axis=axis, keepdims=keepdims) for x in (a.value, a.error, np.abs(a.value) + a.error)
    )
    total = _rounded(value, error, a.dtype, roundings_of_a_sum(terms), scale)
    total.error = np.where(np.isfinite(value), total.error, 0.0)
    return total


def _where(condition: np.ndarray, a: Bounded, b: Bounded) -> Bounded:
    return Bounded(np.where(condition, a.value, b.value), np.where(condition, a.error, b.error), a.dtype)


def _reshape(a: Bounded, shape: tuple[int, ...]) -> Bounded:
    return Bounded(np.reshape(a.value, shape), np.reshape(a.error, shape), a.dtype)


def _full_like(like: Bounded, value: float | np.longdouble, shape: tuple[int, ...]) -> Bounded:
    """A coefficient (PREC-2)."""
    wide = np.full(shape, value, like.value.dtype)
    return _rounded(wide, np.zeros(shape), like.dtype, ROUNDINGS_OF_A_COEFFICIENT)


def _ones_like(like: Bounded, shape: tuple[int, ...]) -> Bounded:
    """The number 1, no coefficient."""
    return Bounded(np.ones(shape, like.value.dtype), 0.0, like.dtype)


_UFUNCS: dict[np.ufunc, Callable[..., Any]] = {
    np.add: _add,
    np.subtract: _subtract,
    np.multiply: _multiply,
    np.divide: _divide,
    np.sqrt: _sqrt,
    np.absolute: _absolute,
    np.maximum: _maximum,
    np.less: _less,
    np.less_equal: _less_equal,
}
_FUNCTIONS: dict[Callable, Callable[..., Any]] = {
    np.sum: _sum,
    np.where: _where,
    np.reshape: _reshape,
    np.full_like: _full_like,
    np.ones_like: _ones_like,
}
