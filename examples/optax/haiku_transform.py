"""AdamP in Haiku: python examples/optax/haiku_transform.py

Parameters are dictionaries of arrays named after their modules, which Optax takes as they are. Which axis of a weight
is the channel follows from Haiku's names; `adamp_jax.describe(params)` shows it.
"""

from typing import Any

import haiku as hk
import jax
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_digits

from adamp_jax import adamp

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 64, 1e-2, 1e-2


@hk.without_apply_rng
@hk.transform_with_state
def network(x: Array, train: bool) -> Array:
    for channels in (16, 32):
        x = hk.Conv2D(channels, 3, with_bias=False)(x)
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=train)
        x = hk.max_pool(jax.nn.relu(x), (2, 2, 1), (2, 2, 1), "VALID")
    return hk.Linear(10)(x.mean((1, 2)))


def main() -> float:
    """Returns the accuracy on the test images."""
    pixels, y = load_digits(return_X_y=True)
    x = np.float32(pixels / 16).reshape(-1, 8, 8, 1)
    test = np.arange(len(x)) % 5 == 4
    train, rng = np.flatnonzero(~test), np.random.default_rng(0)
    optimizer = adamp(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    @jax.jit
    def train_step(params: Any, statistics: Any, state: Any, x: Array, y: Array) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[Array, Any]:
            logits, changed = network.apply(params, statistics, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

        gradients, changed = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), changed, state

    params, statistics = network.init(jax.random.key(0), x[:1], train=True)
    state = optimizer.init(params)
    for _ in range(EPOCHS):
        for batch in rng.permutation(train)[: len(train) // BATCH * BATCH].reshape(-1, BATCH):
            params, statistics, state = train_step(params, statistics, state, x[batch], y[batch])

    logits, _ = network.apply(params, statistics, x[test], train=False)
    return float((logits.argmax(1) == y[test]).mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
