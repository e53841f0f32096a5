"""Train the digits network, written in Flax, with `adamp_jax`: python examples/digits_optax.py"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from adamp_conformance.digits import initial_weights, split
from adamp_jax import adamp

BATCH, EPOCHS, LEARNING_RATE = 64, 15, 1e-2


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for features, pool in ((16, 2), (32, 4)):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
            x = nn.avg_pool(nn.relu(x), (pool, pool), (pool, pool))
        return nn.Dense(10)(x[:, 0, 0])


def initial_params() -> dict[str, Any]:
    weights = {name: jnp.asarray(value, jnp.float32) for name, value in initial_weights("keras").items()}
    return {
        "Conv_0": {"kernel": weights["conv2d/kernel"]},
        "BatchNorm_0": {"scale": weights["batch_normalization/gamma"], "bias": weights["batch_normalization/beta"]},
        "Conv_1": {"kernel": weights["conv2d_1/kernel"]},
        "BatchNorm_1": {"scale": weights["batch_normalization_1/gamma"], "bias": weights["batch_normalization_1/beta"]},
        "Dense_0": {"kernel": weights["dense/kernel"], "bias": weights["dense/bias"]},
    }


def train(epochs: int = EPOCHS) -> float:
    """Returns the accuracy on the test images."""
    (images, labels), (test_images, test_labels) = split()
    images, test_images = images[..., None].astype("float32"), test_images[..., None].astype("float32")
    model = Network()
    params = initial_params()
    statistics = model.init(jax.random.key(0), images[:1], train=False)["batch_stats"]
    starts = range(0, len(images), BATCH)
    optimizer = adamp(optax.cosine_decay_schedule(LEARNING_RATE, epochs * len(starts)), weight_decay=1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, statistics: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": statistics}
            logits, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed["batch_stats"]

        gradients, new_statistics = jax.grad(loss, has_aux=True)(params)
        updates, new_state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), new_statistics, new_state

    for _ in range(epochs):
        for i in starts:
            params, statistics, state = step(params, statistics, state, images[i : i + BATCH], labels[i : i + BATCH])

    logits = model.apply({"params": params, "batch_stats": statistics}, test_images, train=False)
    return float((logits.argmax(1) == test_labels).mean())


if __name__ == "__main__":
    print(f"test accuracy {train():.4f}")
