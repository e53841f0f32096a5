"""AdamP in a loop of one's own: KERAS_BACKEND=jax python examples/keras/custom_loop.py (or tensorflow, or torch)

With TensorFlow and torch the gradients go to `optimizer.apply`; with JAX, whose compiled functions change nothing, to
`optimizer.stateless_apply`, which returns the new values.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

from adamp_tf import AdamP, layouts_for

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 4, 64, 1e-2, 1e-2
Step = Callable[[np.ndarray, np.ndarray], Any]


def step_tensorflow(model: keras.Model, loss: keras.Loss, optimizer: keras.Optimizer) -> Step:
    import tensorflow as tf

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_weights), model.trainable_weights)

    return step


def step_torch(model: keras.Model, loss: keras.Loss, optimizer: keras.Optimizer) -> Step:
    import torch

    def step(x: np.ndarray, y: np.ndarray) -> None:
        model.zero_grad()
        loss(y, model(x, training=True)).backward()
        with torch.no_grad():
            optimizer.apply([weight.value.grad for weight in model.trainable_weights], model.trainable_weights)

    return step


def step_jax(model: keras.Model, loss: keras.Loss, optimizer: keras.Optimizer) -> Step:
    import jax

    def forward(weights: Any, statistics: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        outputs, statistics = model.stateless_call(weights, statistics, x, training=True)
        return loss(y, outputs), statistics

    @jax.jit
    def new_values(weights: Any, statistics: Any, slots: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, Any]:
        gradients, statistics = jax.grad(forward, has_aux=True)(weights, statistics, x, y)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return weights, statistics, slots

    def step(x: np.ndarray, y: np.ndarray) -> None:
        groups = model.trainable_variables, model.non_trainable_variables, optimizer.variables
        values = new_values(*([variable.value for variable in group] for group in groups), x, y)
        for variable, value in zip(chain(*groups), chain(*values), strict=True):
            variable.assign(value)

    return step


def main() -> float:
    """Returns the accuracy on the test images."""
    pixels, y = load_digits(return_X_y=True)
    x = np.float32(pixels / 16).reshape(-1, 8, 8, 1)
    test = np.arange(len(x)) % 5 == 4
    train, rng = np.flatnonzero(~test), np.random.default_rng(0)

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for channels in (16, 32):
        model.add(layers.Conv2D(channels, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
        model.add(layers.MaxPooling2D(2))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    optimizer = AdamP(LEARNING_RATE, weight_decay=WEIGHT_DECAY, layouts=layouts_for(model))
    optimizer.build(model.trainable_variables)

    make_step = {"tensorflow": step_tensorflow, "torch": step_torch, "jax": step_jax}[keras.backend.backend()]
    step = make_step(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer)
    for _ in range(EPOCHS):
        for batch in rng.permutation(train)[: len(train) // BATCH * BATCH].reshape(-1, BATCH):
            step(x[batch], y[batch])
    return float((model.predict(x[test], verbose=0).argmax(1) == y[test]).mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
