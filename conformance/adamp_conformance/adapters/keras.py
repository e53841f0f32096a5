"""`adamp_tf` as an adapter, on the Keras of this process: with TensorFlow, JAX or torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from adamp_conformance.adapters._quiet import silenced_stderr

with silenced_stderr():  # TensorFlow's C++ start-up messages heed no setting
    import keras

import adamp_tf
from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities, Parameter, State
from adamp_spec import Layout

Apply = Callable[[Sequence[Any]], None]

_SPELLING = {"lr": "learning_rate", "beta1": "beta_1", "beta2": "beta_2", "eps": "epsilon"}
_SLOTS = {"adamp": {"m": "momentum", "v": "velocity"}, "sgdp": {"m": "momentum"}}


def _eager(optimizer: Any, variables: list[Any]) -> Apply:
    return lambda gradients: optimizer.apply(gradients, variables)


def _function(optimizer: Any, variables: list[Any], jit_compile: bool) -> Apply:
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # it warns of retracing where every case is a function of its own
    return tf.function(_eager(optimizer, variables), jit_compile=jit_compile)


def _stateless(optimizer: Any, variables: list[Any]) -> Apply:
    import jax

    stateless_apply = jax.jit(optimizer.stateless_apply)

    def apply(gradients: Sequence[Any]) -> None:
        state = [variable.value for variable in optimizer.variables]
        new = stateless_apply(state, gradients, [variable.value for variable in variables])
        for variable, value in zip([*variables, *optimizer.variables], [*new[0], *new[1]], strict=True):
            variable.assign(value)

    return apply


# execution -> the Keras backend that it needs, and how a step is taken
_EXECUTIONS: dict[str, tuple[str, Callable[[Any, list[Any]], Apply]]] = {
    "eager": ("tensorflow", _eager),
    "graph": ("tensorflow", partial(_function, jit_compile=False)),
    "xla": ("tensorflow", partial(_function, jit_compile=True)),
    "jax": ("jax", _stateless),
    "torch": ("torch", _eager),
}


class KerasAdapter:
    """`adamp_tf.AdamP` and `SGDP`.

    On TensorFlow through `apply`: `eager`, in a `tf.function` (`graph`), or compiled by XLA (`xla`). On `jax` through
    `stateless_apply` under `jax.jit`, as Keras's own training loop there. On `torch` through `apply`.
    """

    def __init__(self, execution: str = "eager", device: str = "cpu") -> None:
        self.execution = execution
        self.backend, self.stepper = _EXECUTIONS[execution]
        self.device = "gpu:0" if device == "cuda" else "cpu:0"
        if (device, self.backend) == ("cuda", "tensorflow") and not _tensorflow_sees_a_gpu():
            raise RuntimeError("TensorFlow sees no GPU; it would run on the CPU in silence")

    def capabilities(self) -> Capabilities:
        version = f"keras {keras.__version__}, {self.backend} {import_module(self.backend).__version__}"
        return Capabilities("keras", version, self.execution, tuple(MOMENTS), tuple(DTYPES), "keras")

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        if keras.backend.backend() != self.backend:
            raise RuntimeError(f"this adapter needs KERAS_BACKEND={self.backend}, got {keras.backend.backend()!r}")
        self.algorithm = algorithm
        self.dtype = next(iter(parameters.values())).value.dtype
        with self._settings(), _floatx("float64" if self.dtype == np.float64 else "float32"):
            self.variables = {name: _variable(name, x.value) for name, x in parameters.items()}
            options = {_SPELLING.get(name, name): value for name, value in hyper.items()}
            layouts: dict[str, Layout] = {name: x.layout for name, x in parameters.items() if x.layout is not None}
            make = adamp_tf.AdamP if algorithm == "adamp" else adamp_tf.SGDP
            self.optimizer = make(**options, layouts=layouts or None)
            self.optimizer.build(list(self.variables.values()))
        self.apply = self.stepper(self.optimizer, list(self.variables.values()))

    def load(self, state: State) -> None:
        with self._settings():
            saved: dict[str, Any] = {variable.path: _array(variable) for variable in self.optimizer.variables}
            saved[self.optimizer.iterations.path] = np.asarray(state.step)
            for moment, slots in self._slots().items():
                held = [_tensor(state.moments[moment][name]) for name in self.variables]
                saved.update((slot.path, x) for slot, x in zip(slots, held, strict=True))
            self.optimizer.load_own_variables({str(index): x for index, x in enumerate(saved.values())})
            for name, variable in self.variables.items():
                variable.assign(_tensor(state.parameters[name]))

    def step(self, gradients: Arrays) -> None:
        with self._settings():
            self.apply([_tensor(gradients[name]) for name in self.variables])

    def dump(self) -> State:
        moments = {
            moment: {name: _array(slots[index]) for index, name in enumerate(self.variables)}
            for moment, slots in self._slots().items()
        }
        parameters = {name: _array(variable) for name, variable in self.variables.items()}
        return State(int(_array(self.optimizer.iterations)), parameters, moments)

    def _slots(self) -> dict[str, list[Any]]:
        names = _SLOTS[self.algorithm]
        found: dict[str, list[Any]] = {moment: [] for moment in names}
        for variable in self.optimizer.variables:
            for moment, name in names.items():
                if variable.name.endswith(f"_{name}"):
                    found[moment].append(variable)
        return found

    @contextmanager
    def _settings(self) -> Iterator[None]:
        with keras.device(self.device), _x64(self.dtype == np.float64):
            yield


def _tensorflow_sees_a_gpu() -> bool:
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def _variable(name: str, value: np.ndarray) -> Any:
    scope, _, leaf = name.rpartition("/")
    trainable = not np.issubdtype(value.dtype, np.integer)  # on torch, Keras has no trainable integers to refuse
    with keras.name_scope(scope) if scope else nullcontext():
        return keras.Variable(_tensor(value), name=leaf, dtype=value.dtype.name, trainable=trainable)


def _tensor(x: np.ndarray) -> Any:
    if _through_float32(x.dtype.name):
        torch = import_module("torch")
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return keras.ops.convert_to_tensor(x, x.dtype.name)


def _array(variable: Any) -> np.ndarray:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    if _through_float32(dtype):
        return variable.value.detach().cpu().view(import_module("torch").int16).numpy().copy().view(DTYPES[dtype])
    return np.array(keras.ops.convert_to_numpy(variable))


def _through_float32(dtype: str) -> bool:
    """Whether Keras would convert it by way of float32, which changes the bits of NaN."""
    return dtype == "bfloat16" and keras.backend.backend() == "torch"


def _x64(on: bool) -> AbstractContextManager[None]:
    """JAX has float64 only where it is asked for."""
    return import_module("jax").enable_x64(on) if keras.backend.backend() == "jax" else nullcontext()


@contextmanager
def _floatx(dtype: str) -> Iterator[None]:
    """Keras keeps the learning rate in floatx, whatever the variables' dtype."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)
