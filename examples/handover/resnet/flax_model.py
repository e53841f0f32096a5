"""The same ResNet in Flax Linen.

Modules have the names that the others have, as their order alone does not tell which is which: the norm of the
shortcut comes last here, where it is called, and before the second norm in Keras.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from adamp_conformance.port.trainings import OptaxTraining
from adamp_jax import sgdp
from adamp_spec import SGDPHyper

HYPER = SGDPHyper(lr=0.03, momentum=0.9, weight_decay=1e-3, nesterov=True)
OPTIMIZER = sgdp(HYPER.lr, HYPER.momentum, weight_decay=HYPER.weight_decay, nesterov=HYPER.nesterov)


class Block(nn.Module):
    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, self.channels, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        y = nn.relu(norm(name="norm1")(conv((3, 3), self.stride, padding=1, name="conv1")(x)))
        y = norm(name="norm2")(conv((3, 3), padding=1, name="conv2")(y))
        if self.stride > 1:
            x = norm(name="shortcut_1")(conv((1, 1), self.stride, name="shortcut_0")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """(batch, 8, 8) -> (batch, 10)."""
        x = nn.Conv(8, (3, 3), padding=1, use_bias=False, name="stem")(images[..., None])
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="norm")(x))
        x = Block(8, name="block1")(x, train)
        x = Block(16, stride=2, name="block2")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def setup() -> OptaxTraining:
    model, images = ResNet(), jnp.zeros((1, 8, 8))
    variables = model.init(jax.random.key(0), images)
    params, others = variables["params"], {"batch_stats": variables["batch_stats"]}
    return OptaxTraining(model, params, OPTIMIZER.init(params), HYPER, inputs=(images,), others=others)
