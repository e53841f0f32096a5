"""The projection, free of branches: row sums, a decision, the radial part of each row (SPEC: PROJ)."""

import math

import jax
import jax.numpy as jnp

from adamp_spec import Rows


def project(
    q: jax.Array,
    p: jax.Array,
    g: jax.Array,
    rows: Rows,
    eps: float | jax.Array,
    delta: float | jax.Array,
    wd_ratio: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Removes from direction `q` its part along `p` where `g` is nearly orthogonal to `p`.

    Args:
      q: direction, of shape `rows.shape`.
      p: parameter, of the same shape and dtype.
      g: gradient, of the same shape and dtype.
      rows: the axes of the two views.
      eps: least norm in the cosine; added to the norm of `p`.
      delta: threshold of the cosine times the square root of the row length.
      wd_ratio: multiplier of the weight decay where projected.

    Returns:
      The direction, shaped like `q`, and the multiplier of the weight decay, which broadcasts
      against `q` (one value per slice of the batch axes).
    """
    if not rows.projects:
        return q, jnp.ones((), p.dtype)
    eps, wd_ratio = (jnp.asarray(x, p.dtype) for x in (eps, wd_ratio))

    def row_sum(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=rows.row, keepdims=True)

    def orthogonal(pp: jax.Array, gg: jax.Array, gp: jax.Array, length: int) -> jax.Array:
        # Divided one by one, as the product of the norms can underflow.
        cosine = jnp.abs(gp) / jnp.maximum(jnp.sqrt(gg), eps) / jnp.maximum(jnp.sqrt(pp), eps)  # PROJ-1
        return cosine < jnp.asarray(delta / math.sqrt(length), p.dtype)  # PROJ-2; NaN is not below

    pp, gg, gp, pq = row_sum(p, p), row_sum(g, g), row_sum(g, p), row_sum(p, q)
    others = 1 - orthogonal(pp, gg, gp, rows.length).astype(p.dtype)
    # All in one reduction, which is several kernels, or a collective, whatever it adds up.
    along = tuple(1 + axis for axis in rows.channel)
    layer_pp, layer_gg, layer_gp, layer_pq, count = jnp.sum(
        jnp.stack([pp, gg, gp, pq, others]), axis=along, keepdims=True
    )
    channel = count == 0
    layer = orthogonal(layer_pp, layer_gg, layer_gp, rows.length * rows.count)  # PROJ-3

    projected = channel | layer
    norm = jnp.sqrt(jnp.where(channel, pp, layer_pp)) + eps  # PROJ-4, PROJ-5
    radial = jnp.where(channel, pq, layer_pq) / norm  # dot / norm**2 can overflow
    q = jnp.where(projected, q - radial * (p / norm), q)  # PROJ-6
    return q, jnp.where(projected, wd_ratio, jnp.ones((), p.dtype))  # PROJ-7
