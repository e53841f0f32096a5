"""Snapshots of a model and its optimizer, which every backend reads (SNAPSHOT.md)."""

from __future__ import annotations

import ctypes
import os
from dataclasses import asdict, fields
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.backend import backend, standardize_dtype

from adamp_spec import AdamPHyper, SGDPHyper, snapshot
from adamp_spec.snapshot import Entry, Hyper, Place, Snapshot, SnapshotError, decay_groups, dtype_name, one_of_groups
from adamp_tf._adamp import AdamP
from adamp_tf._base import ProjectedOptimizer
from adamp_tf._layouts import path_of, resolve

_SPELLING = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}


def save_snapshot(path: str | os.PathLike[str], model: keras.Model) -> None:
    """Writes a compiled model's variables and its optimizer's state to a file that the other backends read, too.

    Variable after variable goes through the host's memory; the file is there whole or not at all. The learning rate is
    written as the shortest decimal that floatx rounds to what it is now.

    Args:
      path: the file; one that is there is replaced.
      model: built, and compiled with `AdamP` or `SGDP`.

    Raises:
      TypeError: the optimizer is another one; a variable has a dtype that a snapshot cannot hold.
      ValueError: variables share a path; the optimizer keeps averages (`use_ema`) or has accumulated gradients, which a
        snapshot does not hold.
      OSError: the file cannot be written.
    """
    optimizer, places, variables, others = _parts(model)
    algorithm, hyper = _hyperparameters(optimizer)
    step = int(ops.convert_to_numpy(optimizer.iterations))
    entries = {name: Entry(place.group, step, place.layout) for name, place in places.items()}
    tensors = {f"{kind}/{name}": _tensor(name, x) for kind, named in variables.items() for name, x in named.items()}
    tensors |= {f"other/{name}": _tensor(name, x) for name, x in others.items()}
    last = max(place.group for place in places.values())
    snapshot.write(path, Snapshot(algorithm, decay_groups(hyper)[: last + 1], entries), tensors)


def load_snapshot(path: str | os.PathLike[str], model: keras.Model) -> None:
    """Loads what `save_snapshot` of any backend has written: variables, moments and the step count.

    The learning rate, too, unless a schedule gives it.

    Args:
      path: the file.
      model: built, with variables of the same paths, shapes and dtypes, and compiled with an optimizer of the same
        hyperparameters, layouts and exclusions from weight decay (a compiled function may hold them already).

    Raises:
      adamp_spec.snapshot.SnapshotError: the file is no snapshot, is damaged, or does not fit. Nothing has changed then.
      TypeError, ValueError: as `save_snapshot`.
    """
    optimizer, places, variables, others = _parts(model)
    algorithm, hyper = _hyperparameters(optimizer)
    kept = {name: (_dtype(name, x), tuple(x.shape)) for name, x in others.items()}
    with snapshot.opened(path) as (saved, tensors):
        groups = saved.check_target(tensors, algorithm, places, kept)
        given, step = one_of_groups(groups), saved.common_step("Keras")
        own = asdict(hyper) | {"lr": given.lr}
        if 0 not in groups:  # nothing decays, whatever the rate
            own["weight_decay"] = given.weight_decay
        if differing := {_SPELLING.get(name, name): x for name, x in asdict(given).items() if x != own[name]}:
            raise SnapshotError(f"the snapshot's optimizer has {differing}: compile the model with these")
        for kind, named in variables.items():
            for name, variable in named.items():
                _assign(variable, tensors[f"{kind}/{name}"])
        for name, variable in others.items():
            _assign(variable, tensors[f"other/{name}"])
        optimizer.iterations.assign(step)
        if isinstance(optimizer._learning_rate, keras.Variable):  # not a schedule
            optimizer.learning_rate = given.lr


_Named = dict[str, Any]


def _parts(model: keras.Model) -> tuple[ProjectedOptimizer, dict[str, Place], dict[str, _Named], _Named]:
    """The optimizer; by path where each variable goes; variables and slots by kind and path; other variables."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not isinstance(optimizer, ProjectedOptimizer):
        raise TypeError(f"the model's optimizer is {type(optimizer).__name__}; compile it with adamp_tf.AdamP or SGDP")
    if optimizer.use_ema or optimizer.gradient_accumulation_steps:
        raise ValueError(
            "a snapshot holds no averages or accumulated gradients: do without use_ema and gradient_accumulation_steps"
        )
    if not model.built or not model.trainable_variables:
        raise ValueError(f"{model.name!r} is not built, or nothing of it is trainable: call it on data first")
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    trained = optimizer._trainable_variables
    names = [path_of(variable) for variable in trained]
    known = {id(variable) for variable in trained}
    held = [variable for variable in model.variables if variable.name != "seed_generator_state"]  # random states
    others = {path_of(variable): variable for variable in held if id(variable) not in known}
    if len(set(names) | set(others)) < len(held):
        raise ValueError(f"variables share a path; give the layers names of their own: {sorted(names + list(others))}")
    layouts = resolve(optimizer._named, optimizer._layouts).values()
    slots = [optimizer._momentums, *([optimizer._velocities] if isinstance(optimizer, AdamP) else [])]
    variables = {
        kind: dict(zip(names, x, strict=True))
        for kind, x in zip(("parameter", "m", "v"), [trained, *slots], strict=False)
    }
    places = {
        name: Place(
            _dtype(name, x),
            tuple(x.shape),
            int(optimizer.weight_decay > 0 and not decays),
            assigned.layout,
            tuple(_dtype(name, moment) for moment in moments),
        )
        for name, x, decays, assigned, *moments in zip(names, trained, optimizer._decays, layouts, *slots, strict=True)
    }
    return optimizer, places, variables, others


def _hyperparameters(optimizer: ProjectedOptimizer) -> tuple[str, Hyper]:
    hyper: type[Hyper] = AdamPHyper if isinstance(optimizer, AdamP) else SGDPHyper
    given = {x.name: getattr(optimizer, _SPELLING.get(x.name, x.name)) for x in fields(hyper)}
    given["lr"] = float(str(np.asarray(ops.convert_to_numpy(optimizer.learning_rate))))
    return hyper.algorithm, hyper(**given)


def _tensor(name: str, x: Any) -> snapshot.Tensor:
    def read() -> np.ndarray:
        # convert_to_numpy copies. It is needed on torch, where NumPy knows neither bfloat16 nor devices, and for
        # scalars, which NumPy does not take from TensorFlow in bfloat16.
        copied = backend() == "torch" or not x.ndim
        on_host = ops.convert_to_numpy(x) if copied else np.asarray(ops.stop_gradient(x.value))
        return on_host.astype(np.dtype(standardize_dtype(x.dtype)), copy=False)

    return snapshot.Tensor(_dtype(name, x), tuple(x.shape), read)


def _assign(variable: Any, tensor: snapshot.Tensor) -> None:
    if backend() != "tensorflow":
        return variable.assign(tensor.load())
    # TensorFlow copies what NumPy holds, in one thread. So the file is read into a tensor that nobody has seen yet, and
    # the variable takes that over. Python shows its memory (of bfloat16 only as integers), though to be read only.
    import tensorflow as tf

    dtype = tf.as_dtype(variable.dtype)
    shown = tf.uint16 if dtype == tf.bfloat16 else dtype
    with tf.device("CPU:0"):
        fresh = tf.raw_ops.Empty(shape=tensor.shape, dtype=shown, init=False)
    memory = np.asarray(memoryview(fresh))
    tensor.read(np.ctypeslib.as_array((ctypes.c_uint8 * memory.nbytes).from_address(memory.ctypes.data)))
    variable.assign(fresh if shown == dtype else tf.bitcast(fresh, dtype))


def _dtype(name: str, x: Any) -> str:
    return dtype_name(name, standardize_dtype(x.dtype))
