"""The same recurrent network in Keras."""

import keras
from keras import layers

from adamp_tf import AdamP, layouts_for


def setup() -> keras.Model:
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8))
    x = layers.LayerNormalization(epsilon=1e-5, name="norm")(layers.Dense(16, use_bias=False, name="project")(images))
    model = keras.Model(images, layers.Dense(10, name="head")(layers.LSTM(32, name="lstm")(x)))
    optimizer = AdamP(1e-2, weight_decay=1e-2, nesterov=True, layouts=layouts_for(model))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
