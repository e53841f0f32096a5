"""`adamp_jax` as an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamp_jax
from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities, Parameter, State

_SPELLING = {"lr": "learning_rate", "beta1": "b1", "beta2": "b2"}
_FIELDS = {"adamp": {"m": "mu", "v": "nu"}, "sgdp": {"m": "trace"}}


class OptaxAdapter:
    """`adamp_jax.adamp` and `sgdp` with `optax.apply_updates`.

    Args:
      execution: `eager`; `jit`; `donated`, where a compiled step may write over parameters and state; or `x64`, which
        is `jit` with JAX's 64-bit mode on for every type, and not for float64 alone.
      device: where the arrays are.
    """

    def __init__(self, execution: str = "eager", device: str = "cpu") -> None:
        self.execution = execution
        self.device = jax.devices(device)[0]

    def capabilities(self) -> Capabilities:
        version = f"optax {optax.__version__}, jax {jax.__version__}"
        return Capabilities("optax", version, self.execution, tuple(MOMENTS), tuple(DTYPES), "keras")

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        self.algorithm = algorithm
        options = {_SPELLING.get(name, name): value for name, value in hyper.items()}
        layouts = {name: x.layout for name, x in parameters.items() if x.layout is not None}
        make = adamp_jax.adamp if algorithm == "adamp" else adamp_jax.sgdp
        transform = make(**options, layouts=layouts or None)
        self.x64 = self.execution == "x64" or any(x.value.dtype == np.float64 for x in parameters.values())

        def step(parameters: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = transform.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        with self._settings():
            self.parameters = {name: self._array(name, x.value) for name, x in parameters.items()}
            self.state = transform.init(self.parameters)
            self.take_step = self._compiled(step, transform)

    def load(self, state: State) -> None:
        with self._settings():
            self.parameters = {name: self._array(name, x) for name, x in state.parameters.items()}
            fields = {_FIELDS[self.algorithm][moment]: arrays for moment, arrays in state.moments.items()}
            moments = {
                field: {name: self._array(name, x) for name, x in arrays.items()} for field, arrays in fields.items()
            }
            self.state = optax.tree_utils.tree_set(self.state, count=jnp.asarray(state.step, jnp.int32), **moments)

    def step(self, gradients: Arrays) -> None:
        with self._settings():
            given = {name: self._array(name, gradients[name]) for name in self.parameters}
            self.parameters, self.state = self.take_step(self.parameters, self.state, given)

    def dump(self) -> State:
        def get(field: str) -> Any:
            return optax.tree_utils.tree_get(self.state, field)

        moments = {
            moment: {name: np.array(x) for name, x in get(field).items()}
            for moment, field in _FIELDS[self.algorithm].items()
        }
        return State(int(get("count")), {name: np.array(x) for name, x in self.parameters.items()}, moments)

    def _array(self, name: str, x: np.ndarray) -> jax.Array:
        return jnp.array(x)  # a copy, that a donated buffer be nobody else's

    def _compiled(self, step: Callable[..., Any], transform: optax.GradientTransformation) -> Callable[..., Any]:
        if self.execution == "eager":
            return step
        return jax.jit(step, donate_argnums=(0, 1) if self.execution == "donated" else ())

    @contextmanager
    def _settings(self) -> Iterator[None]:
        with jax.enable_x64(self.x64), jax.default_device(self.device):
            yield
