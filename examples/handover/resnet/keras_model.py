"""The same ResNet in Keras, with PyTorch's epsilon, and its padding: "same" pads a strided convolution otherwise."""

from typing import Any

import keras
from keras import layers

from adamp_tf import SGDP, layouts_for


def conv(x: Any, channels: int, name: str, size: int = 3, stride: int = 1) -> Any:
    if size > 1:
        x = layers.ZeroPadding2D(size // 2)(x)
    return layers.Conv2D(channels, size, stride, use_bias=False, name=name)(x)


def norm(x: Any, name: str) -> Any:
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)


def block(x: Any, channels: int, name: str, stride: int = 1) -> Any:
    y = layers.ReLU()(norm(conv(x, channels, f"{name}_conv1", stride=stride), f"{name}_norm1"))
    y = norm(conv(y, channels, f"{name}_conv2"), f"{name}_norm2")
    if stride > 1:
        x = norm(conv(x, channels, f"{name}_shortcut_0", 1, stride), f"{name}_shortcut_1")
    return layers.ReLU()(layers.add([x, y]))


def setup() -> keras.Model:
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8))
    x = layers.Reshape((8, 8, 1))(images)
    x = layers.ReLU()(norm(conv(x, 8, "stem"), "norm"))
    x = block(block(x, 8, "block1"), 16, "block2", stride=2)
    model = keras.Model(images, layers.Dense(10, name="head")(layers.GlobalAveragePooling2D()(x)))
    optimizer = SGDP(0.03, momentum=0.9, weight_decay=1e-3, nesterov=True, layouts=layouts_for(model))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
