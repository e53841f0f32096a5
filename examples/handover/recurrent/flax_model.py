"""The same recurrent network in Flax NNX."""

import jax
from flax import nnx

from adamp_conformance.port.trainings import OptaxTraining
from adamp_jax import adamp
from adamp_spec import AdamPHyper

HYPER = AdamPHyper(lr=1e-2, weight_decay=1e-2, nesterov=True)
OPTIMIZER = adamp(HYPER.lr, weight_decay=HYPER.weight_decay, nesterov=HYPER.nesterov)


class Reader(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.project = nnx.Linear(8, 16, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(16, epsilon=1e-5, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(16, 32, rngs=rngs))
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(batch, 8, 8) -> (batch, 10)."""
        return self.head(self.lstm(self.norm(self.project(images)))[:, -1])


def setup() -> OptaxTraining:
    model = Reader(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    return OptaxTraining(model, params, OPTIMIZER.init(params), HYPER)
