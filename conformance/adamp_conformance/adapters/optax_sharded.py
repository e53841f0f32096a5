"""`adamp_jax` on parameters that are sharded over eight devices of a mesh, as an adapter."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adamp_conformance.adapter import Parameter, State
from adamp_conformance.adapters.optax import OptaxAdapter
from adamp_conformance.adapters.process import ProcessAdapter

DEVICES = {"x": 2, "y": 4}  # of the mesh
TIMEOUT = 600.0  # seconds for one reply; a first step is compiled

# How many devices the CPU pretends to have is settled when JAX starts, so that a process of its own is needed. JAX
# makes one thread per core; eight devices that wait for each other need more.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "32"}


class ShardedAdapter(ProcessAdapter):
    """A compiled step of `adamp_jax` on eight virtual devices of the CPU, in a process of its own."""

    def __init__(self, execution: str = "sharded", device: str = "cpu") -> None:
        if device != "cpu":
            raise RuntimeError(f"optax-{execution} runs on the CPU only, got the device {device!r}")
        settings = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        program = [sys.executable, "-m", "adamp_conformance.serve", f"{__name__}:Served"]
        super().__init__(shlex.join(["env", *settings, *program]), TIMEOUT)


def ways(shape: tuple[int, ...]) -> list[P]:
    """The ways to share out an array evenly, by one axis or by two, over the mesh; replicated if there is none."""
    found = []
    for axis, size in enumerate(shape):
        for names in (("x", "y"), ("y",), ("x",)):  # as many devices as can be
            if size and size % np.prod([DEVICES[name] for name in names]) == 0:
                found.append(P(*[None] * axis, names))
                break
    for i, j in permutations(range(len(shape)), 2):
        if shape[i] and shape[j] and shape[i] % DEVICES["x"] == shape[j] % DEVICES["y"] == 0:
            found.append(P(*({i: "x", j: "y"}.get(axis) for axis in range(len(shape)))))
    return found or [P()]


class Served(OptaxAdapter):
    """What the process serves: each parameter is shared out in one of its `ways`, by its position."""

    def __init__(self) -> None:
        super().__init__("sharded")
        self.mesh = jax.make_mesh(
            tuple(DEVICES.values()), tuple(DEVICES), axis_types=(jax.sharding.AxisType.Auto,) * len(DEVICES)
        )

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        self.shardings = {}
        for i, (name, x) in enumerate(parameters.items()):
            found = ways(x.value.shape)
            self.shardings[name] = NamedSharding(self.mesh, found[i % len(found)])
        super().create(algorithm, hyper, parameters)

    def load(self, state: State) -> None:
        """Loads, unless `update` would refuse the state, which the protocol could not dump."""
        kept = self.parameters, self.state
        try:
            super().load(state)
            with self._settings():
                jax.eval_shape(self.take_step, self.parameters, self.state, self.parameters)
        except Exception:
            self.parameters, self.state = kept
            raise

    def _array(self, name: str, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, self.shardings[name])

    def _compiled(self, step: Callable[..., Any], transform: optax.GradientTransformation) -> Callable[..., Any]:
        state = optax.tree_utils.tree_map_params(
            transform,
            lambda _, sharding: sharding,
            self.state,
            self.shardings,
            transform_non_params=lambda _: NamedSharding(self.mesh, P()),
        )
        return jax.jit(step, out_shardings=(self.shardings, state))
