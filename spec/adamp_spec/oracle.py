"""The update, written to be read beside SPEC.md; comments name the clause that a line implements.

Written once for any array type that speaks NumPy's protocols. Evaluated on plain arrays it is the
reference implementation; evaluated on `adamp_spec.bounds.Bounded` arrays the same lines yield, beside
each value, how far a conforming implementation may be from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from adamp_spec.hyperparameters import AdamPHyper, SGDPHyper
from adamp_spec.layout import Layout, Rows

Array = Any  # a NumPy array of any float type, or anything that behaves like one


class Branch(IntEnum):
    """Which view the projection used."""

    NONE = 0
    CHANNEL = 1
    LAYER = 2


def first_that_passes(channel: Array, layer: Array) -> Array:
    """The branch of each slice, given whether its tests pass (PROJ-4)."""
    return np.where(channel, Branch.CHANNEL, np.where(layer, Branch.LAYER, Branch.NONE))


Choose = Callable[[Array, Array], Array]


class AdamPState(NamedTuple):
    """Steps taken, first and second moment (both shaped like the parameter)."""

    step: int
    m: Array
    v: Array


class SGDPState(NamedTuple):
    """Steps taken, momentum buffer (shaped like the parameter)."""

    step: int
    m: Array


def adamp_step(
    param: Array,
    grad: Array,
    state: AdamPState,
    hyper: AdamPHyper,
    layout: Layout,
    choose: Choose = first_that_passes,
) -> tuple[Array, AdamPState, Array]:
    """One step of AdamP on one tensor.

    Args:
      param, grad: arrays of one shape and of any real float type.
      state: the state before the step; zeros and step 0 at the start.
      hyper: the hyperparameters.
      layout: the rows of `param`.
      choose: takes, per slice, whether the channel test and the layer test pass, and gives the `Branch` to
        take (the judge's way to learn of the tests, and to see each outcome where several are legal).

    Returns:
      The new parameter and state, each rounded once to the dtype it came in, and the branch
      taken, an integer array with one entry per slice of the layout's batch axes.

    Raises:
      TypeError: an array is not of a real float type.
      ValueError: shapes differ, or the layout does not fit.
    """
    _check_arrays(param, grad, *state[1:])
    rows = layout.rows(param.shape)
    p, g, m, v = (_load(x, rows) for x in (param, grad, state.m, state.v))
    t = state.step + 1
    lr, b1, b2, eps = (_coefficient(x, p) for x in (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps))
    one_minus_b1, one_minus_b2 = (_coefficient(one_minus_power(b, 1), p) for b in (hyper.beta1, hyper.beta2))
    step = _coefficient(hyper.lr / one_minus_power(hyper.beta1, t), p)
    sqrt_bc2 = _coefficient(np.sqrt(one_minus_power(hyper.beta2, t)), p)

    m = b1 * m + one_minus_b1 * g  # ADAMP-1
    v = b2 * v + one_minus_b2 * (g * g)  # ADAMP-2
    n = b1 * m + one_minus_b1 * g if hyper.nesterov else m  # ADAMP-3
    q = n / (np.sqrt(v) / sqrt_bc2 + eps)  # ADAMP-4
    q, branch, ratio = _project(q, p, g, hyper, rows, choose)
    if hyper.weight_decay > 0:
        p = p * (1 - lr * _coefficient(hyper.weight_decay, p) * ratio)  # ADAMP-5
    p = p - step * q  # ADAMP-6
    return _store(p, param), AdamPState(t, _store(m, state.m), _store(v, state.v)), branch


def sgdp_step(
    param: Array,
    grad: Array,
    state: SGDPState,
    hyper: SGDPHyper,
    layout: Layout,
    choose: Choose = first_that_passes,
) -> tuple[Array, SGDPState, Array]:
    """One step of SGDP on one tensor; arguments, results and errors as for `adamp_step`."""
    _check_arrays(param, grad, *state[1:])
    rows = layout.rows(param.shape)
    p, g, m = (_load(x, rows) for x in (param, grad, state.m))
    t = state.step + 1
    lr, mu = _coefficient(hyper.lr, p), _coefficient(hyper.momentum, p)

    m = mu * m + _coefficient(1 - np.longdouble(hyper.dampening), p) * g  # SGDP-1
    q = g + mu * m if hyper.nesterov else m  # SGDP-2
    q, branch, ratio = _project(q, p, g, hyper, rows, choose)
    if hyper.project_momentum and not hyper.nesterov:
        m = q  # SGDP-3
    if hyper.weight_decay > 0:
        decay = hyper.weight_decay / one_minus_power(hyper.momentum, 1)
        p = p * (1 - lr * _coefficient(decay, p) * ratio)  # SGDP-4
    p = p - lr * q  # SGDP-5
    return _store(p, param), SGDPState(t, _store(m, state.m)), branch


def _project(
    q: Array, p: Array, g: Array, hyper: AdamPHyper | SGDPHyper, rows: Rows, choose: Choose
) -> tuple[Array, Array, Array]:
    """The projected direction; the branch and the decay multiplier of each slice."""
    eps = _coefficient(hyper.eps, p)

    def project(axes: tuple[int, ...]) -> Array:
        unit = p / (np.sqrt(np.sum(p * p, axis=axes, keepdims=True)) + eps)  # PROJ-5
        return q - unit * np.sum(unit * q, axis=axes, keepdims=True)  # PROJ-6

    branch = choose(*decide(p, g, hyper, rows))  # PROJ-4
    views = {Branch.CHANNEL: rows.row, Branch.LAYER: rows.layer} if rows.projects else {}
    projected = {view: project(axes) for view, axes in views.items() if np.any(branch == view)}
    for view, direction in projected.items():
        q = np.where(branch == view, direction, q)
    ratio = np.where(branch == Branch.NONE, np.ones_like(p, shape=()), _coefficient(hyper.wd_ratio, p))  # PROJ-7
    return q, branch, ratio


def decide(param: Array, grad: Array, hyper: AdamPHyper | SGDPHyper, rows: Rows) -> tuple[Array, Array]:
    """Whether each slice passes the channel test and whether it passes the layer test; shaped `rows.slices`."""
    if not rows.projects:
        nothing = np.zeros(rows.slices, bool)
        return nothing, nothing
    p, g = _load(param, rows), _load(grad, rows)
    eps = _coefficient(hyper.eps, p)

    def orthogonal(axes: tuple[int, ...]) -> Array:
        def norm(x: Array) -> Array:
            return np.maximum(np.sqrt(np.sum(x * x, axis=axes, keepdims=True)), eps)

        length = math.prod(rows.shape[axis] for axis in axes)
        threshold = _coefficient(hyper.delta / np.sqrt(np.longdouble(length)), p)
        cosine = np.abs(np.sum(g * p, axis=axes, keepdims=True)) / norm(g) / norm(p)  # PROJ-1
        return np.all(cosine < threshold, axis=rows.channel, keepdims=True)  # PROJ-2

    return orthogonal(rows.row), orthogonal(rows.layer)  # PROJ-2, PROJ-3


def one_minus_power(base: float, exponent: int) -> np.longdouble:
    """1 - base**exponent without cancellation (PREC-2), for base in [0, 1) and exponent >= 1."""
    if base == 0:
        return np.longdouble(1)
    return -np.expm1(exponent * np.log(np.longdouble(base)))


def working_dtype(dtype: np.dtype) -> np.dtype:
    """The type that a tensor of `dtype` is computed in (PREC-1)."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def _load(x: Array, rows: Rows) -> Array:
    return np.reshape(x.astype(working_dtype(x.dtype)), rows.shape)


def _store(x: Array, like: Array) -> Array:
    return np.reshape(x, like.shape).astype(like.dtype)  # the one rounding of PREC-6


def _coefficient(value: float | np.longdouble, like: Array) -> Array:
    """`value`, of at least binary64 precision, rounded to the type of `like` (PREC-2)."""
    return np.full_like(like, value, shape=())


def _check_arrays(param: Array, *others: Array) -> None:
    for x in (param, *others):
        if not _is_real_float(x.dtype):
            raise TypeError(f"AdamP and SGDP are defined for real floating-point tensors, got dtype {x.dtype}")
        if x.shape != param.shape:
            raise ValueError(f"gradient and state must have the parameter's shape {param.shape}, got {x.shape}")


def _is_real_float(dtype: np.dtype) -> bool:
    return (dtype.kind == "f" and dtype.itemsize >= 2) or dtype.name == "bfloat16"
