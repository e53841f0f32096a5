"""AdamP and SGDP as Optax gradient transformations.

>>> import jax.numpy as jnp, optax, adamp_jax
>>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
>>> tx = adamp_jax.adamp(learning_rate=1e-3, weight_decay=1e-2)
>>> state = tx.init(params)
>>> updates, state = tx.update(params, state, params)  # the gradient of |params|^2 / 2
>>> params = optax.apply_updates(params, updates)
"""

from adamp_jax._adamp import ScaleByAdamPState, adamp, scale_by_adamp
from adamp_jax._layouts import describe
from adamp_jax._sgdp import ScaleBySGDPState, scale_by_sgdp, sgdp
from adamp_jax._snapshot import Restored, load_snapshot, save_snapshot

__all__ = [
    "Restored",
    "ScaleByAdamPState",
    "ScaleBySGDPState",
    "adamp",
    "describe",
    "load_snapshot",
    "save_snapshot",
    "scale_by_adamp",
    "scale_by_sgdp",
    "sgdp",
]
