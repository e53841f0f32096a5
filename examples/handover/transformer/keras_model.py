"""The same transformer in Keras. GELU is exact in both; LayerNormalization's epsilon has to be given."""

from typing import Any

import keras
from keras import layers, ops
from keras.initializers import RandomNormal

from adamp_tf import AdamP, layouts_for

WIDTH, HEADS, LENGTH, TOKENS = 32, 4, 32, 128


@keras.saving.register_keras_serializable("handover")
class Block(layers.Layer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm1 = layers.LayerNormalization(epsilon=1e-5, name="norm1")
        self.attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name="attention")
        self.norm2 = layers.LayerNormalization(epsilon=1e-5, name="norm2")
        self.expand = layers.Dense(4 * WIDTH, "gelu", name="expand")
        self.contract = layers.Dense(WIDTH, name="contract")

    def call(self, x: Any) -> Any:
        y = self.norm1(x)
        x = x + self.attention(y, y, use_causal_mask=True)
        return x + self.contract(self.expand(self.norm2(x)))


@keras.saving.register_keras_serializable("handover")
class Transformer(keras.Model):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tokens = layers.Embedding(TOKENS, WIDTH, RandomNormal(stddev=0.1, seed=0), name="tokens")
        self.positions = layers.Embedding(LENGTH, WIDTH, RandomNormal(stddev=0.1, seed=1), name="positions")
        self.block1, self.block2 = Block(name="block1"), Block(name="block2")
        self.norm = layers.LayerNormalization(epsilon=1e-5, name="norm")

    def call(self, pieces: Any) -> Any:
        """(batch, LENGTH) -> (batch, LENGTH, TOKENS)."""
        x = self.tokens(pieces) + self.positions(ops.arange(LENGTH))
        x = self.norm(self.block2(self.block1(x)))
        return ops.matmul(x, ops.transpose(self.tokens.embeddings))


def setup() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = Transformer(name="transformer")
    model(ops.zeros((1, LENGTH), "int32"))
    optimizer = AdamP(3e-3, weight_decay=0.03, layouts=layouts_for(model))
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
