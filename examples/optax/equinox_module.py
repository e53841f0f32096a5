"""AdamP in Equinox: python examples/optax/equinox_module.py

The optimizer is given the arrays of the model (`eqx.filter`). Equinox stores weights as PyTorch does, so that axis 0 is
the channel; `adamp_jax.describe(eqx.filter(model, eqx.is_inexact_array))` shows it.
"""

from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_digits

from adamp_jax import adamp

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 64, 1e-2, 1e-2


class Network(eqx.Module):
    convolutions: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]
    head: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        keys, sizes = jax.random.split(key, 3), ((1, 16), (16, 32))
        self.convolutions = [
            eqx.nn.Conv2d(*size, 3, padding=1, use_bias=False, key=k) for size, k in zip(sizes, keys[:2], strict=True)
        ]
        self.norms = [eqx.nn.BatchNorm(size, "batch", momentum=0.9, mode="batch") for _, size in sizes]
        self.head = eqx.nn.Linear(32, 10, key=keys[2])

    def __call__(self, x: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x, state = norm(convolution(x), state)
            x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(x))
        return self.head(x.mean((1, 2))), state


def predict(model: Network, state: eqx.nn.State, x: Array) -> tuple[Array, eqx.nn.State]:
    return jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)


def main() -> float:
    """Returns the accuracy on the test images."""
    pixels, y = load_digits(return_X_y=True)
    x = np.float32(pixels / 16).reshape(-1, 1, 8, 8)
    test = np.arange(len(x)) % 5 == 4
    train, rng = np.flatnonzero(~test), np.random.default_rng(0)
    optimizer = adamp(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    @eqx.filter_jit
    def train_step(model: Network, state: eqx.nn.State, moments: Any, x: Array, y: Array) -> tuple[Any, Any, Any]:
        def loss(model: Network) -> tuple[Array, eqx.nn.State]:
            logits, changed = predict(model, state, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

        gradients, state = eqx.filter_grad(loss, has_aux=True)(model)
        updates, moments = optimizer.update(gradients, moments, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, moments

    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    moments = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(EPOCHS):
        for batch in rng.permutation(train)[: len(train) // BATCH * BATCH].reshape(-1, BATCH):
            model, state, moments = train_step(model, state, moments, x[batch], y[batch])

    logits, _ = predict(eqx.nn.inference_mode(model), state, x[test])
    return float((logits.argmax(1) == y[test]).mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
