"""The projection without a branch: row sums -> decision -> radial part of each row (SPEC: PROJ).

Four row sums carry everything. The layer's sums are sums of the row sums, and both views' projections
subtract a multiple of `p`, with a norm and a product that the decision selects.
"""

from __future__ import annotations

import math

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
      rows: the rows of the parameter.
      delta: threshold of the cosine, relative to the square root of the row length.
      wd_ratio: decay multiplier of a projected slice.
      eps: floor of the norms in the cosine; added to the norm that the projection divides by.

    Returns:
      The projected direction; the decay multiplier of each slice, of shape `rows.slices` and of the
      working dtype, or 1.0 where the tensor can never be projected.
    """
    if not rows.projects:
        return q, 1.0
    pp, gg, gp, pq = (_sum(x * y, rows.row) for x, y in ((p, p), (g, g), (g, p), (p, q)))
    layer_pp, layer_gg, layer_gp, layer_pq = (_sum(x, rows.channel) for x in (pp, gg, gp, pq))

    def orthogonal(pp: Tensor, gg: Tensor, gp: Tensor) -> Tensor:
        cosine = gp.abs() / gg.sqrt().clamp(min=eps) / pp.sqrt().clamp(min=eps)  # PROJ-1
        threshold = delta / math.sqrt(p.numel() // pp.numel())
        return (cosine < threshold).all(dim=rows.channel, keepdim=True)  # PROJ-2; NaN is not below

    channel = orthogonal(pp, gg, gp)  # PROJ-2
    layer = orthogonal(layer_pp, layer_gg, layer_gp)  # PROJ-3
    projected = channel | layer
    norm = torch.where(channel, pp, layer_pp).sqrt() + eps  # PROJ-4
    radial = torch.where(channel, pq, layer_pq) / norm
    # PROJ-5, PROJ-6: divided apart, as dot / norm**2 can overflow; selected, as 0 * p would let NaN and inf through
    q = torch.where(projected, q - radial * (p / norm), q)
    ratio = torch.ones_like(layer_pp).masked_fill(projected, wd_ratio)  # PROJ-7
    return q, ratio


def _sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.sum(dim=axes, keepdim=True) if axes else x  # dim=() would sum over everything
