"""What tests of the Keras optimizers share: small models and variables, on the backend of the process."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.backend import standardize_dtype

import adamp_tf

OPTIMIZERS = {
    "AdamP": lambda **options: adamp_tf.AdamP(1e-2, weight_decay=1e-2, **options),
    "SGDP": lambda **options: adamp_tf.SGDP(1e-2, momentum=0.9, weight_decay=1e-2, **options),
}
both = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def data(count=16):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 4)).astype("float32"), rng.normal(size=(count, 2)).astype("float32")


def model_of():
    keras.utils.set_random_seed(3)
    stack = [keras.Input((4,)), keras.layers.Dense(8), keras.layers.LayerNormalization(), keras.layers.Dense(2)]
    return keras.Sequential(stack)


def fit(model, optimizer, epochs=3, **options):
    x, y = data()
    model.compile(optimizer, loss="mse", **options)
    return model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def variables_of(*shapes, dtype="float32"):
    rng = np.random.default_rng(1)
    return [keras.Variable(rng.normal(size=shape), dtype=dtype, name=f"v{i}") for i, shape in enumerate(shapes)]


def grads_of(*variables, seed=2):
    rng = np.random.default_rng(seed)
    return [ops.convert_to_tensor(rng.normal(size=tuple(v.shape)), standardize_dtype(v.dtype)) for v in variables]


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
