"""Times steps of Keras optimizers on one backend, for `keras_step.py`: a process has one backend.

Reads a request from standard input as JSON, tells of its progress on standard error, and answers with the last line of
standard output: the entries of the request, with what was measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras

from adamp_tf import SGDP, AdamP
from benchmarks.parameter_lists import Shape
from benchmarks.rounds import Entry, Work, copies_on_host, on_host, take_turns
from benchmarks.ways import (
    LEARNING_RATE,
    MOMENTUM,
    REHEARSAL,
    WEIGHT_DECAY,
    Contender,
    compiled_costs,
    make_arrays,
)

MAKERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "adamw": lambda: keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "lamb": lambda: keras.optimizers.Lamb(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "adamp": lambda: AdamP(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "sgd": lambda: keras.optimizers.SGD(LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY),
    "sgdp": lambda: SGDP(LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY),
}


class Steps:
    """Steps of contenders on the same variables and gradients. The ways of one optimizer share its state."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        params, grads = make_arrays(shapes)
        self.elements = sum(x.size for x in params.values())
        self._variables = [_variable(path, value) for path, value in params.items()]
        self._grads = [keras.ops.convert_to_tensor(x) for x in grads.values()]
        self._optimizers: dict[str, keras.optimizers.Optimizer] = {}
        self._params: list[Any] = []  # of the variables, on JAX

    def first(self, contender: Contender) -> tuple[Work, dict[str, float]]:
        """Builds what a contender needs and takes its first step.

        Returns:
          The step, and what is known of its costs.
        """
        if contender.optimizer not in self._optimizers:
            self._optimizers[contender.optimizer] = MAKERS[contender.optimizer]()
        optimizer = self._optimizers[contender.optimizer]
        optimizer.build(self._variables)
        make: Callable[..., tuple[Work, dict[str, float]]] = getattr(self, "_" + contender.way.replace("-", "_"))
        step, costs = make(optimizer)
        step()
        return step, costs

    def _tensorflow_eager(self, optimizer: Any) -> tuple[Work, dict[str, float]]:
        return self._tensorflow(lambda grads: optimizer.apply(grads, self._variables))

    def _tensorflow_graph(self, optimizer: Any) -> tuple[Work, dict[str, float]]:
        return self._function(optimizer, jit_compile=False)

    def _tensorflow_xla(self, optimizer: Any) -> tuple[Work, dict[str, float]]:
        return self._function(optimizer, jit_compile=True)

    def _function(self, optimizer: Any, jit_compile: bool) -> tuple[Work, dict[str, float]]:
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")  # it takes our many functions for one that is traced again and again
        return self._tensorflow(
            tf.function(lambda grads: optimizer.apply(grads, self._variables), jit_compile=jit_compile)
        )

    def _tensorflow(self, apply: Callable[[Any], None]) -> tuple[Work, dict[str, float]]:
        import tensorflow as tf

        def step() -> None:
            apply(self._grads)
            tf.test.experimental.sync_devices()

        return step, {}

    def _jax_jit(self, optimizer: Any) -> tuple[Work, dict[str, float]]:
        import jax

        def update(state: Any, params: Any, grads: Any) -> tuple[Any, Any]:
            return optimizer.stateless_apply(state, grads, params)

        if not self._params:
            self._params = [jax.numpy.array(x.value) for x in self._variables]  # a copy, as it is donated
        state = [x.value for x in optimizer.variables]
        compiled = jax.jit(update, donate_argnums=(0, 1)).lower(state, self._params, self._grads).compile()

        def step() -> None:
            nonlocal state
            self._params, state = jax.block_until_ready(compiled(state, self._params, self._grads))

        return step, compiled_costs(compiled, self.elements)

    def _torch_eager(self, optimizer: Any) -> tuple[Work, dict[str, float]]:
        import torch

        def step() -> None:
            with torch.no_grad():
                optimizer.apply(self._grads, self._variables)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return step, {}


def _variable(path: str, value: Any) -> keras.Variable:
    scope, _, name = path.rpartition("/")
    with keras.name_scope(scope):
        return keras.Variable(value, name=name)


def _sees_gpu() -> bool:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_physical_devices("GPU"))
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "gpu"
    import torch

    return torch.cuda.is_available()


def main() -> None:
    """Answers one request: `keras_step.ask`."""
    request = json.load(sys.stdin)
    if request["gpu"] and not _sees_gpu():
        raise SystemExit(f"Keras on {keras.backend.backend()} finds no GPU")
    steps, rehearsal = Steps(request["shapes"]), Steps(REHEARSAL)

    def start(kept: Entry) -> Work:
        print(f"{kept['name']} ...", file=sys.stderr, flush=True)
        contender, results = Contender(kept["optimizer"], kept["way"]), []
        rehearsal.first(contender)
        kept["first_seconds"] = on_host(lambda: results.append(steps.first(contender)))
        [(step, costs)] = results
        kept |= costs
        return step

    entries = request["entries"]
    take_turns(entries, start, request["rounds"], on_host, copies_on_host())
    print("\n" + json.dumps(entries))


if __name__ == "__main__":
    main()
