"""AdamP in Flax linen: python examples/optax/flax_linen.py

A `TrainState` holds AdamP's state beside the parameters, and here the statistics of batch normalisation. Which axis of
a kernel is the channel follows from Flax's names; `adamp_jax.describe(state.params)` shows it.
"""

from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from jax import Array
from sklearn.datasets import load_digits

from adamp_jax import adamp

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 64, 1e-2, 1e-2


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class TrainState(train_state.TrainState):
    statistics: Any


@jax.jit
def train_step(state: TrainState, x: Array, y: Array) -> TrainState:
    def loss(params: Any) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": state.statistics}
        logits, changed = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed["batch_stats"]

    gradients, statistics = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, statistics=statistics)


def main() -> float:
    """Returns the accuracy on the test images."""
    pixels, y = load_digits(return_X_y=True)
    x = np.float32(pixels / 16).reshape(-1, 8, 8, 1)
    test = np.arange(len(x)) % 5 == 4
    train, rng = np.flatnonzero(~test), np.random.default_rng(0)

    model = Network()
    variables = model.init(jax.random.key(0), x[:1], train=False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=adamp(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        statistics=variables["batch_stats"],
    )
    for _ in range(EPOCHS):
        for batch in rng.permutation(train)[: len(train) // BATCH * BATCH].reshape(-1, BATCH):
            state = train_step(state, x[batch], y[batch])

    logits = model.apply({"params": state.params, "batch_stats": state.statistics}, x[test], train=False)
    return float((logits.argmax(1) == y[test]).mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
