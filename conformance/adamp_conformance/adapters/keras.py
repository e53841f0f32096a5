"""`adamp_tf` as an adapter, on Keras with TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from adamp_conformance.adapters._quiet import silenced_stderr

with silenced_stderr():  # TensorFlow's C++ start-up messages heed no setting
    import keras
    import tensorflow as tf

import adamp_tf
from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities, Parameter, State
from adamp_spec import Layout

tf.get_logger().setLevel("ERROR")  # it warns of retracing where every case is a function of its own

_SPELLING = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
_SLOTS = {"adamp": {"m": "momentum", "v": "velocity"}, "sgdp": {"m": "momentum"}}


class KerasAdapter:
    """`adamp_tf.AdamP` and `SGDP` through `optimizer.apply`: eager, in a `tf.function`, or compiled by XLA."""

    def __init__(self, execution: str = "eager", device: str = "cpu") -> None:
        self.execution = execution
        if device == "cuda" and not tf.config.list_physical_devices("GPU"):
            raise RuntimeError("TensorFlow sees no GPU; it would run on the CPU in silence")
        self.device = "GPU:0" if device == "cuda" else device

    def capabilities(self) -> Capabilities:
        version = f"keras {keras.__version__}, tensorflow {tf.__version__}"
        return Capabilities("keras", version, self.execution, tuple(MOMENTS), tuple(DTYPES), "keras")

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(f"this adapter needs KERAS_BACKEND=tensorflow, got {keras.backend.backend()!r}")
        self.algorithm = algorithm
        dtype = next(iter(parameters.values())).value.dtype
        with _floatx("float64" if dtype == np.float64 else "float32"), tf.device(self.device):
            self.variables = {name: _variable(name, x.value) for name, x in parameters.items()}
            options = {_SPELLING.get(name, name): value for name, value in hyper.items()}
            layouts: dict[str, Layout] = {name: x.layout for name, x in parameters.items() if x.layout is not None}
            make = adamp_tf.AdamP if algorithm == "adamp" else adamp_tf.SGDP
            self.optimizer = make(**options, layouts=layouts or None)
            self.optimizer.build(list(self.variables.values()))

        def apply(*gradients: Any) -> None:
            self.optimizer.apply(gradients, list(self.variables.values()))

        compiled = {"graph": False, "xla": True}
        self.apply = tf.function(apply, jit_compile=compiled[self.execution]) if self.execution in compiled else apply

    def load(self, state: State) -> None:
        saved = {variable.path: variable.numpy() for variable in self.optimizer.variables}
        saved[self.optimizer.iterations.path] = np.asarray(state.step)
        for moment, slots in self._slots().items():
            saved.update(
                (slot.path, state.moments[moment][name]) for slot, name in zip(slots, self.variables, strict=True)
            )
        self.optimizer.load_own_variables({str(index): x for index, x in enumerate(saved.values())})
        for name, variable in self.variables.items():
            variable.assign(state.parameters[name])

    def step(self, gradients: Arrays) -> None:
        with tf.device(self.device):
            self.apply(*(tf.constant(gradients[name]) for name in self.variables))

    def dump(self) -> State:
        moments = {
            moment: {name: _array(slots[index]) for index, name in enumerate(self.variables)}
            for moment, slots in self._slots().items()
        }
        parameters = {name: _array(variable) for name, variable in self.variables.items()}
        return State(int(self.optimizer.iterations.numpy()), parameters, moments)

    def _slots(self) -> dict[str, list[Any]]:
        names = _SLOTS[self.algorithm]
        found: dict[str, list[Any]] = {moment: [] for moment in names}
        for variable in self.optimizer.variables:
            for moment, name in names.items():
                if variable.name.endswith(f"_{name}"):
                    found[moment].append(variable)
        return found


def _variable(name: str, value: np.ndarray) -> Any:
    scope, _, leaf = name.rpartition("/")
    if not scope:
        return keras.Variable(value, name=leaf, dtype=value.dtype.name)
    with keras.name_scope(scope):
        return keras.Variable(value, name=leaf, dtype=value.dtype.name)


def _array(variable: Any) -> np.ndarray:
    return np.array(variable.value.numpy())


@contextmanager
def _floatx(dtype: str) -> Iterator[None]:
    """Keras keeps the learning rate in floatx, whatever the variables' dtype."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)
