"""AdamP in Flax NNX: python examples/optax/flax_nnx.py

`nnx.Optimizer` is given the parameters alone (`wrt=nnx.Param`), without the statistics of batch normalisation. Which
axis of a kernel is the channel follows from Flax's names; `adamp_jax.describe(nnx.state(model, nnx.Param))` shows it.
"""

import numpy as np
import optax
from flax import nnx
from jax import Array
from sklearn.datasets import load_digits

from adamp_jax import adamp

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 64, 1e-2, 1e-2


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        return self.head(nnx.relu(self.norm2(self.conv2(x))).mean((1, 2)))


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, x: Array, y: Array) -> None:
    def loss(model: Network) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main() -> float:
    """Returns the accuracy on the test images."""
    pixels, y = load_digits(return_X_y=True)
    x = np.float32(pixels / 16).reshape(-1, 8, 8, 1)
    test = np.arange(len(x)) % 5 == 4
    train, rng = np.flatnonzero(~test), np.random.default_rng(0)

    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamp(LEARNING_RATE, weight_decay=WEIGHT_DECAY), wrt=nnx.Param)
    for _ in range(EPOCHS):
        for batch in rng.permutation(train)[: len(train) // BATCH * BATCH].reshape(-1, BATCH):
            train_step(model, optimizer, x[batch], y[batch])

    model.eval()
    return float((model(x[test]).argmax(1) == y[test]).mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
