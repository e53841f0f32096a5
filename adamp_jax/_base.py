"""What both transformations share: hyperparameters, the decay mask, and the walk over the tree of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.sparse import JAXSparse

from adamp_jax._layouts import Layouts, assign, path_name, spread
from adamp_spec import Rows, check_hyperparameter

Hyperparameter = float | jax.Array


def hyperparameter(name: str, value: jax.typing.ArrayLike, spelling: str) -> Hyperparameter:
    """A concrete number is checked and becomes a Python float, so that coefficients are exact (SPEC: PREC-2).

    A JAX array is what `optax.inject_hyperparams` passes; it stays an array, and is checked unless traced.
    """
    if isinstance(value, jax.Array):
        if value.shape != () or value.dtype.kind in "bc":
            raise TypeError(f"{spelling} must be one real number, got shape {value.shape} and dtype {value.dtype}")
        if not isinstance(value, jax.core.Tracer):
            check_hyperparameter(name, float(value), spelling)
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return check_hyperparameter(name, value[()] if isinstance(value, np.ndarray) else value, spelling)


def scheduled(name: str, value: optax.ScalarOrSchedule, spelling: str) -> Hyperparameter | optax.Schedule:
    """As `hyperparameter`; a schedule is returned as it is."""
    return value if callable(value) else hyperparameter(name, value, spelling)


def decayed(weight_decay: Hyperparameter, mask: Any, params: optax.Params) -> dict[str, bool]:
    """Which parameters decay, by path; none if `weight_decay` is known to be 0."""
    if isinstance(weight_decay, float) and weight_decay == 0:
        mask = False
    elif mask is None:
        mask = True
    elif (flags := jax.tree.leaves(mask)) and all(map(callable, flags)):  # an Equinox module of bools is callable, too
        mask = mask(params)
    decays = {path: flag for path, (_, flag) in spread(mask, params, "weight_decay_mask").items()}
    for path, flag in decays.items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"weight_decay_mask must hold True and False, got {flag!r} for {path!r}")
    return decays


def check_state(state: Any, kind: type) -> None:
    """Refuses what another transformation's `init` has made, or a checkpoint restored without a target."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that init returns, got {type(state).__name__}; start from init, and "
            "restore a checkpoint into it"
        )


def zeros_like(params: optax.Params, dtype: jax.typing.DTypeLike | None = None) -> optax.Params:
    """Zeros for a moment, in `dtype` or each parameter's own; refuses parameters of another kind than real floats."""

    def zeros(path: tuple[Any, ...], p: Any) -> jax.Array:
        _check_real("parameter", path_name(path), jnp.result_type(p))
        return jnp.zeros_like(p, dtype=dtype or jnp.result_type(p))

    return jax.tree_util.tree_map_with_path(zeros, params)


def map_leaves(
    rule: Callable[..., tuple[jax.Array, ...]],
    updates: optax.Updates,
    params: optax.Params | None,
    layouts: Layouts,
    decays: Mapping[str, bool],
    *moments: optax.Updates,
) -> list[Any]:
    """Applies `rule` to every parameter that has a gradient.

    Args:
      rule: `rule(p, g, *moments, rows, decay) -> (update, *moments)`; its arrays have the working
        dtype and the shape `rows.shape`.
      updates: the gradients; where one is None, so is the update, and the moments stay as they are.
      params: the parameters.
      layouts: see `adamp_jax.adamp`.
      decays: which parameters decay, by path.
      *moments: trees like `params`.

    Returns:
      A tree of updates in the working dtype (PREC-1: whoever adds them rounds once), then one tree
      for each of `moments`, rounded once to the dtypes they came in (PREC-6).
    """
    assigned = assign(params, layouts)
    structure: Any
    gradients, structure = jax.tree_util.tree_flatten_with_path(
        updates, is_leaf=lambda x: x is None or isinstance(x, JAXSparse)
    )
    columns = [_flatten(what, tree, structure) for what, tree in (("params", params), *(("state", m) for m in moments))]
    results = []
    for (path, g), p, *old in zip(gradients, *columns, strict=True):
        if g is None:
            results.append((None, *old))
            continue
        name = path_name(path)
        if isinstance(g, JAXSparse):
            raise TypeError(f"the gradient of {name!r} is sparse ({type(g).__name__}); make it dense with todense()")
        if name not in assigned:
            raise ValueError(f"updates hold a gradient at {name!r}, where params hold no parameter")
        p, g = jnp.asarray(p), jnp.asarray(g)
        _check_leaf(name, p, g, old)
        results.append(_apply(rule, p, g, old, assigned[name].layout.rows(p.shape), decays[name]))
    return [structure.unflatten([result[i] for result in results]) for i in range(1 + len(moments))]


def _flatten(what: str, tree: Any, structure: Any) -> list[Any]:
    try:
        return structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{what} is not a tree like the updates; init, gradients and update must be of the same parameters: {error}"
        ) from None


def _apply(
    rule: Callable, p: jax.Array, g: jax.Array, moments: list[jax.Array], rows: Rows, decay: bool
) -> tuple[jax.Array, ...]:
    dtype = jnp.float64 if p.dtype == jnp.float64 else jnp.float32  # PREC-1
    arrays = (jnp.asarray(x, dtype).reshape(rows.shape) for x in (p, g, *moments))
    update, *new = rule(*arrays, rows, decay)
    return update.reshape(p.shape), *(x.reshape(p.shape).astype(old.dtype) for x, old in zip(new, moments, strict=True))


def _check_leaf(name: str, p: jax.Array, g: jax.Array, moments: list[jax.Array]) -> None:
    for what, x in (("parameter", p), ("gradient of", g)):
        _check_real(what, name, x.dtype)
    for what, x in (("gradient", g), *(("state", m) for m in moments)):
        if x.shape != p.shape:
            raise ValueError(f"parameter {name!r} has shape {p.shape} but its {what} has shape {x.shape}")


def _check_real(what: str, name: str, dtype: np.dtype) -> None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{what} {name!r} is complex ({dtype}); wrap the optimizer in optax.contrib.split_real_and_imaginary"
        )
    if dtype not in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"{what} {name!r} is {dtype}, not a real floating-point type; hide it with optax.masked")
