"""Snapshots of parameters and optimizer state, which every backend reads (SNAPSHOT.md)."""

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamp_jax._adamp import ScaleByAdamPState
from adamp_jax._base import decayed
from adamp_jax._layouts import Layouts, assign, path_name
from adamp_jax._sgdp import ScaleBySGDPState
from adamp_spec import snapshot
from adamp_spec.snapshot import Entry, Hyper, Place, Snapshot, decay_groups, dtype_name, one_of_groups

_FIELDS: dict[type, tuple[str, dict[str, str]]] = {
    ScaleByAdamPState: ("adamp", {"m": "mu", "v": "nu"}),
    ScaleBySGDPState: ("sgdp", {"m": "trace"}),
}


class Restored(NamedTuple):
    """What `load_snapshot` gives back.

    Attributes:
      params: the parameters, a tree like the one given.
      opt_state: the optimizer's state, likewise.
      hyperparameters: those of the snapshot; the transformation has its own, which are to be the same.
      others: what the model holds besides, likewise.
    """

    params: optax.Params
    opt_state: optax.OptState
    hyperparameters: Hyper
    others: Any


def save_snapshot(
    path: str | os.PathLike[str],
    params: optax.Params,
    opt_state: optax.OptState,
    hyperparameters: Hyper,
    *,
    weight_decay_mask: Any = None,
    layouts: Layouts = None,
    others: Any = None,
) -> None:
    """Writes parameters and optimizer state to a file that the other backends read, too.

    Array after array goes through the host's memory; the file is there whole or not at all.

    Args:
      path: the file; one that is there is replaced.
      params: a tree of parameters.
      opt_state: the state of `adamp` or `sgdp`, alone or with other transformations around it.
      hyperparameters: an :class:`adamp_spec.AdamPHyper` or `SGDPHyper` with what the transformation was made with, the
        learning rate as it is now: a state does not hold them. Where it does hold that, by `optax.inject_hyperparams`,
        the state's is written.
      weight_decay_mask, layouts: as the transformation was given.
      others: a tree of what the model holds besides, such as Flax's `batch_stats`.

    Raises:
      ValueError: there is not one state of AdamP or SGDP that covers all parameters, or the hyperparameters are for the
        other one.
      TypeError: a dtype that a snapshot cannot hold.
      OSError: the file cannot be written.
    """
    state, algorithm, moments = _find(params, opt_state)
    if hyperparameters.algorithm != algorithm:
        raise ValueError(f"the state is one of {algorithm}, the hyperparameters are {hyperparameters}")
    for injected in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "hyperparams")):
        if "learning_rate" in getattr(injected, "hyperparams", {}):
            rate = np.asarray(injected.hyperparams["learning_rate"])
            hyperparameters = dataclasses.replace(hyperparameters, lr=float(str(rate)))
    places = _places(params, moments, hyperparameters.weight_decay, weight_decay_mask, layouts)
    last = max((place.group for place in places.values()), default=0)
    groups = decay_groups(hyperparameters)[: last + 1]
    entries = {name: Entry(place.group, int(state.count), place.layout) for name, place in places.items()}
    trees = {"parameter": params, **moments, "other": others}
    tensors = {
        f"{kind}/{name}": snapshot.Tensor(_dtype(name, x), x.shape, functools.partial(_on_host, x))
        for kind, tree in trees.items()
        for name, x in _named(tree).items()
    }
    snapshot.write(path, Snapshot(algorithm, groups, entries), tensors)


def load_snapshot(
    path: str | os.PathLike[str],
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    weight_decay_mask: Any = None,
    layouts: Layouts = None,
    others: Any = None,
) -> Restored:
    """Reads what `save_snapshot` of any backend has written.

    Every count in the state becomes the snapshot's step, so that schedules go on from there.

    Args:
      path: the file.
      params, opt_state, others: trees of the same names, shapes and dtypes, whose values do not matter:
        `jax.eval_shape` of what makes them will do, and then the model is not in memory twice. What comes back is
        sharded as they are.
      weight_decay_mask, layouts: as the transformation was given.

    Raises:
      adamp_spec.snapshot.SnapshotError: the file is no snapshot, is damaged, or does not fit.
      ValueError, TypeError: as `save_snapshot`.
    """
    state, algorithm, moments = _find(params, opt_state)
    places = _places(params, moments, 1.0, weight_decay_mask, layouts)
    kept = {name: (_dtype(name, x), x.shape) for name, x in _named(others).items()}
    with snapshot.opened(path) as (saved, tensors):
        groups = saved.check_target(tensors, algorithm, places, kept)
        hyper, step = one_of_groups(groups), saved.common_step("Optax")

        def filled(kind: str, tree: Any) -> Any:
            def fill(key: Any, x: Any) -> Any:
                value = tensors[f"{kind}/{path_name(key)}"].load()
                if isinstance(x, np.ndarray | np.generic):  # JAX might narrow it
                    return value
                return jax.device_put(value, getattr(x, "sharding", None))

            return jax.tree_util.tree_map_with_path(fill, tree)

        fields = _FIELDS[type(state)][1]
        new = state._replace(**{fields[kind]: filled(kind, tree) for kind, tree in moments.items()})
        opt_state = jax.tree.map(lambda x: new if x is state else x, opt_state, is_leaf=lambda x: x is state)
        opt_state = optax.tree_utils.tree_set(
            opt_state,
            lambda path, _: isinstance(path[-1], optax.tree_utils.NamedTupleKey),  # no parameter of this name
            count=jnp.asarray(step, jnp.int32),
        )
        return Restored(filled("parameter", params), opt_state, hyper, filled("other", others))


def _find(params: optax.Params, opt_state: optax.OptState) -> tuple[Any, str, dict[str, Any]]:
    """The one state of AdamP or SGDP, its algorithm, and its moments by their names in a snapshot."""
    kinds = (*_FIELDS, optax.MultiStepsState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]
    if any(isinstance(x, optax.MultiStepsState) for x in found):
        raise ValueError("a snapshot holds no accumulated gradients: save and load the inner state of MultiSteps")
    if len(found) != 1:
        raise ValueError(f"the state must hold one ScaleByAdamPState or ScaleBySGDPState, and holds {found!r:.200}")
    algorithm, fields = _FIELDS[type(found[0])]
    moments = {kind: getattr(found[0], field) for kind, field in fields.items()}
    for kind, tree in moments.items():
        if differing := set(_named(params)) ^ set(_named(tree)):
            raise ValueError(
                f"moment {kind!r} and the parameters do not both have {sorted(differing)}: save masked ones alone"
            )
    return found[0], algorithm, moments


def _places(
    params: optax.Params, moments: dict[str, Any], weight_decay: float, mask: Any, layouts: Layouts
) -> dict[str, Place]:
    """Where each parameter belongs; what does not decay is the second group."""
    named = _named(params)
    decays = decayed(weight_decay, mask, params) if weight_decay else dict.fromkeys(named, True)
    assigned = assign(params, layouts)
    kept = [_named(tree) for tree in moments.values()]
    return {
        name: Place(
            _dtype(name, x),
            x.shape,
            int(not decays[name]),
            assigned[name].layout,
            tuple(_dtype(name, tree[name]) for tree in kept),
        )
        for name, x in named.items()
    }


def _on_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array):  # another array of the same memory: one that is read keeps its elements on the host
        shards = [shard.data for shard in x.addressable_shards]
        x = jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
    return np.asarray(x)


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {path_name(path): x if hasattr(x, "dtype") else np.asarray(x) for path, x in leaves}
    if len(named) < len(leaves):
        raise ValueError(f"several leaves share a path; the paths are {[path_name(path) for path, _ in leaves]}")
    return named


def _dtype(name: str, x: Any) -> str:
    return dtype_name(name, str(x.dtype))
