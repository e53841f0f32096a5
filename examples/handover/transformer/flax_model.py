"""The same transformer in Flax NNX. GELU is exact, and epsilon PyTorch's: both are otherwise in Flax."""

import jax
import jax.numpy as jnp
from flax import nnx

from adamp_conformance.port.trainings import OptaxTraining
from adamp_jax import adamp
from adamp_spec import AdamPHyper

WIDTH, HEADS, LENGTH, TOKENS = 32, 4, 32, 128
SMALL = nnx.initializers.normal(0.1)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.expand = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.contract = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.contract(nnx.gelu(self.expand(self.norm2(x)), approximate=False))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(TOKENS, WIDTH, embedding_init=SMALL, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, embedding_init=SMALL, rngs=rngs)
        self.block1, self.block2 = Block(rngs), Block(rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)

    def __call__(self, pieces: jax.Array) -> jax.Array:
        """(batch, LENGTH) -> (batch, LENGTH, TOKENS)."""
        x = self.tokens(pieces) + self.positions(jnp.arange(LENGTH))
        mask = nnx.make_causal_mask(pieces)
        return self.tokens.attend(self.norm(self.block2(self.block1(x, mask), mask)))


def decays(params: nnx.State) -> nnx.State:
    """Biases and norms do not."""
    return jax.tree.map_with_path(lambda path, _: "bias" not in str(path) and "scale" not in str(path), params)


HYPER = AdamPHyper(lr=3e-3, weight_decay=0.03)
OPTIMIZER = adamp(HYPER.lr, weight_decay=HYPER.weight_decay, weight_decay_mask=decays)


def setup() -> OptaxTraining:
    model = Transformer(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    return OptaxTraining(model, params, OPTIMIZER.init(params), HYPER, weight_decay_mask=decays)
