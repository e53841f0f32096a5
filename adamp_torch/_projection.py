"""The projection without a branch: row sums -> decision -> radial part of each row (SPEC: PROJ).

Four row sums carry everything. The layer's sums are sums of the row sums, and both views' projections
subtract a multiple of `p`, with a norm and a product that the decision selects. A stack of tensors, which is one
with a further batch axis, is decided and projected by the same operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adamp_spec import Rows

Directions = tuple[Tensor, Tensor, Tensor]  # `q`, `p` and `g`, which `project` is about
Project = Callable[..., tuple[Tensor, Tensor | float]]  # `project`, or what stands in for it


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
    sums = row_sums(q, p, g, rows)
    decision = decide(sums, tally(sums, rows, delta=delta, eps=eps), rows, delta=delta, eps=eps)
    return subtract(q, p, decision, wd_ratio)


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


class Tally(NamedTuple):
    """What a slice is decided by, of shape `rows.slices`: the sums over all rows, and how many rows fail the test."""

    pp: Tensor
    gg: Tensor
    gp: Tensor
    pq: Tensor
    failures: Tensor


def row_sums(q: Tensor, p: Tensor, g: Tensor, rows: Rows) -> Sums:
    """The sums that all else follows from, of tensors of shape `rows.shape`."""
    return Sums(*(_sum(x * y, rows.row) for x, y in ((p, p), (g, g), (g, p), (p, q))))


def tally(sums: Sums, rows: Rows, *, delta: float, eps: float) -> Tally:
    """Tests each row and adds up the rows of each slice."""
    failed = ~(_cosine(sums, eps) < _threshold(rows, rows.row, delta))  # PROJ-2: NaN is not below
    return Tally(*(_sum(x, rows.channel) for x in (*sums, failed.to(sums.pp.dtype))))


def decide(sums: Sums, tally: Tally, rows: Rows, *, delta: float, eps: float) -> Decision:
    """Chooses the view that each slice is projected in (PROJ-1 to PROJ-4). `norm` and `dot` mean nothing elsewhere."""
    channel = tally.failures == 0  # PROJ-2
    layer = _cosine(tally, eps) < _threshold(rows, rows.channel + rows.row, delta)  # PROJ-3
    norm = torch.where(channel, sums.pp, tally.pp).sqrt() + eps  # PROJ-4
    dot = torch.where(channel, sums.pq, tally.pq)
    return Decision(channel | layer, norm, dot)


def subtract(q: Tensor, p: Tensor, decision: Decision, wd_ratio: float) -> tuple[Tensor, Tensor]:
    """Takes the radial part out of `q` where that was decided; returns it and the decay multiplier of each slice."""
    projected, norm, dot = decision
    # PROJ-5, PROJ-6: divided apart, as dot / norm**2 can overflow; selected, as 0 * p would let NaN and inf through
    q = torch.where(projected, q - (dot / norm) * (p / norm), q)
    return q, torch.ones_like(projected, dtype=q.dtype).masked_fill(projected, wd_ratio)  # PROJ-7


def _cosine(sums: Sums | Tally, eps: float) -> Tensor:
    return sums.gp.abs() / sums.gg.sqrt().clamp(min=eps) / sums.pp.sqrt().clamp(min=eps)  # PROJ-1


def _threshold(rows: Rows, axes: tuple[int, ...], delta: float) -> float:
    return delta / math.sqrt(math.prod([rows.shape[axis] for axis in axes]))


def _sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.sum(dim=axes, keepdim=True) if axes else x  # dim=() would sum over everything
