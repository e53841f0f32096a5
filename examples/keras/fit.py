"""AdamP in Keras's `fit`: KERAS_BACKEND=jax python examples/keras/fit.py (or tensorflow, or torch)

`layouts_for` tells by the layers' classes which axes of a kernel are its channels. Here it matters: the optimizer alone
would take the kernel of a layer that is called "spatial" for an ordinary one, and AdamP would decide by other rows.
Normalisation makes weights scale-invariant as long as its epsilon is small beside the variance. Keras's default of 1e-3
is not always; where it is not, AdamP projects seldom.
"""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

from adamp_tf import AdamP, layouts_for

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 5, 64, 3e-2, 1e-2


def main() -> float:
    """Returns the accuracy on the test images."""
    pixels, y = load_digits(return_X_y=True)
    x = np.float32(pixels / 16).reshape(-1, 8, 8, 1)
    test = np.arange(len(x)) % 5 == 4

    keras.utils.set_random_seed(0)
    norm = {"momentum": 0.9, "epsilon": 1e-5}
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="stem"),
            layers.BatchNormalization(**norm),
            layers.ReLU(),
            layers.MaxPooling2D(2),
            layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="spatial"),
            layers.BatchNormalization(**norm),
            layers.Conv2D(32, 1, use_bias=False, name="pointwise"),
            layers.BatchNormalization(**norm),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, name="head"),
        ]
    )
    optimizer = AdamP(LEARNING_RATE, weight_decay=WEIGHT_DECAY, layouts=layouts_for(model))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    decay = keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 10 if epoch == EPOCHS - 2 else lr)
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(x[~test], y[~test], BATCH, EPOCHS, verbose=0, callbacks=[decay])
    return model.evaluate(x[test], y[test], verbose=0, return_dict=True)["accuracy"]


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
