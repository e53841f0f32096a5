"""The projection without a branch: row sums -> decision -> radial part of each row (SPEC: PROJ).

Four row sums carry everything. The layer's sums are sums of the row sums, and both views' projections
subtract a multiple of `p`, with a norm and a product that the decision selects. A stack of tensors, which is one
with a further batch axis, is decided and projected by the same operations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adamp_spec import Rows


def project(
    q: Tensor, p: Tensor, g: Tensor, rows: Rows, *, delta: float, wd_ratio: float, eps: float
) -> tuple[Tensor, Tensor | float]:
    """Takes the radial part out of `q` in every slice whose gradient is nearly orthogonal to its weights.

    Args:
      q: update direction, of shape `rows.shape` and of the working dtype.
      p: parameter before decay, likewise.
      g: gradient, likewise.
      rows: the rows of the parameter, or of a stack of parameters.
      delta: threshold of the cosine, relative to the square root of the row length.
      wd_ratio: decay multiplier of a projected slice.
      eps: floor of the norms in the cosine; added to the norm that the projection divides by.

    Returns:
      The projected direction; the decay multiplier of each slice, of shape `rows.slices` and of the
      working dtype, or 1.0 where the tensor can never be projected.
    """
    if not rows.projects:
        return q, 1.0
    projected, norm, dot = decide(row_sums(q, p, g, rows), rows, delta=delta, eps=eps)
    # PROJ-5, PROJ-6: divided apart, as dot / norm**2 can overflow; selected, as 0 * p would let NaN and inf through
    q = torch.where(projected, q - (dot / norm) * (p / norm), q)
    ratio = torch.ones_like(projected, dtype=q.dtype).masked_fill(projected, wd_ratio)  # PROJ-7
    return q, ratio


class Sums(NamedTuple):
    """The sums over each row, of `rows.shape` with the row axes of size 1: `|p|^2`, `|g|^2`, `<g, p>`, `<p, q>`."""

    pp: Tensor
    gg: Tensor
    gp: Tensor
    pq: Tensor


class Decision(NamedTuple):
    """What is projected, and along what.

    Attributes:
      projected: bool, of shape `rows.slices`.
      norm: `|p| + eps` of the row that each row of the channel view is projected along: itself, or the slice.
      dot: `<p, q>` of the same row.
    """

    projected: Tensor
    norm: Tensor
    dot: Tensor


def row_sums(q: Tensor, p: Tensor, g: Tensor, rows: Rows) -> Sums:
    """The sums that `decide` needs, of tensors of shape `rows.shape`."""
    return Sums(*(_sum(x * y, rows.row) for x, y in ((p, p), (g, g), (g, p), (p, q))))


def decide(sums: Sums, rows: Rows, *, delta: float, eps: float) -> Decision:
    """Chooses the view that each slice is projected in (PROJ-1 to PROJ-4). `norm` and `dot` mean nothing elsewhere."""
    layer_sums = Sums(*(_sum(x, rows.channel) for x in sums))

    def orthogonal(sums: Sums) -> Tensor:
        cosine = sums.gp.abs() / sums.gg.sqrt().clamp(min=eps) / sums.pp.sqrt().clamp(min=eps)  # PROJ-1
        threshold = delta / math.sqrt(math.prod(rows.shape) // sums.pp.numel())
        return (cosine < threshold).all(dim=rows.channel, keepdim=True)  # PROJ-2; NaN is not below

    channel = orthogonal(sums)  # PROJ-2
    layer = orthogonal(layer_sums)  # PROJ-3
    norm = torch.where(channel, sums.pp, layer_sums.pp).sqrt() + eps  # PROJ-4
    dot = torch.where(channel, sums.pq, layer_sums.pq)
    return Decision(channel | layer, norm, dot)


def _sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.sum(dim=axes, keepdim=True) if axes else x  # dim=() would sum over everything
