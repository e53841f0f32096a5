"""The projection without a branch: four row sums, both decisions as values, the radial part of each row."""

from __future__ import annotations

import math
from typing import Any

from keras import ops

from adamp_spec import Rows


def project(q: Any, p: Any, g: Any, rows: Rows, *, epsilon: float, delta: float, wd_ratio: float) -> tuple[Any, Any]:
    """Removes from `q` the part along `p` wherever `g` is nearly orthogonal to `p` (SPEC: PROJ).

    Args:
      q: the direction, of shape `rows.shape`, float32 or float64.
      p: the parameter before its decay, of the same shape and dtype.
      g: the gradient, of the same shape and dtype.
      rows: the axes of the two views.
      epsilon: what keeps the norms off zero.
      delta: the threshold on the cosine, before its scaling by the row length.
      wd_ratio: the decay multiplier where projected.

    Returns:
      The projected direction, of the shape and dtype of `q`, and the decay multiplier of each
      slice, of shape `rows.slices`; 1.0 for a tensor that is never projected.
    """
    if not rows.projects:
        return q, 1.0
    # Keras may round a bare float to floatx
    eps, one, ratio = (ops.convert_to_tensor(x, p.dtype) for x in (epsilon, 1.0, wd_ratio))

    def sums(axes: tuple[int, ...], *terms: Any) -> list[Any]:
        return [ops.sum(term, axis=axes, keepdims=True) for term in terms]

    def norm(squares: Any) -> Any:
        root = ops.sqrt(squares)
        return ops.where(root < eps, eps, root)  # ops.maximum turns float64 into float32 on torch

    def orthogonal(pp: Any, gg: Any, gp: Any, length: int) -> Any:
        cosine = ops.abs(gp) / norm(gg) / norm(pp)  # PROJ-1
        return ops.all(cosine < delta / math.sqrt(length), axis=rows.channel, keepdims=True)  # false where NaN

    row_pp, row_gg, row_gp, row_pq = row_sums = sums(rows.row, p * p, g * g, g * p, p * q)
    all_pp, all_gg, all_gp, all_pq = sums(rows.channel, *row_sums)
    channel = orthogonal(row_pp, row_gg, row_gp, rows.length)  # PROJ-2
    layer = orthogonal(all_pp, all_gg, all_gp, rows.length * rows.count)  # PROJ-3
    projected = ops.logical_or(channel, layer)  # PROJ-4

    length = ops.sqrt(ops.where(channel, row_pp, all_pp)) + eps  # PROJ-5
    radial = ops.where(channel, row_pq, all_pq) / length  # dot / length**2 can overflow
    q = ops.where(projected, q - radial * (p / length), q)  # PROJ-6
    return q, ops.where(projected, ratio, one)  # PROJ-7
