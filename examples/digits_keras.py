"""Train the digits network with `adamp_tf`: python examples/digits_keras.py"""

import keras

from adamp_conformance.digits import initial_weights, split
from adamp_tf import AdamP

BATCH, EPOCHS, LEARNING_RATE = 64, 15, 1e-2


def make_model() -> keras.Model:
    # The defaults of the three frameworks differ here; these are PyTorch's.
    normalisation = {"momentum": 0.9, "epsilon": 1e-5}
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv2d"),
            keras.layers.BatchNormalization(**normalisation, name="batch_normalization"),
            keras.layers.ReLU(),
            keras.layers.AveragePooling2D(2),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False, name="conv2d_1"),
            keras.layers.BatchNormalization(**normalisation, name="batch_normalization_1"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, name="dense"),
        ]
    )
    weights = initial_weights("keras")
    for variable in model.trainable_variables:
        variable.assign(weights[variable.path.removeprefix(f"{model.name}/")])
    return model


def train(epochs: int = EPOCHS) -> float:
    """Returns the accuracy on the test images."""
    (images, labels), (test_images, test_labels) = split()
    model = make_model()
    steps = epochs * -(-len(images) // BATCH)
    model.compile(
        optimizer=AdamP(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps), weight_decay=1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images[..., None], labels, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    _, accuracy = model.evaluate(test_images[..., None], test_labels, verbose=0)
    return float(accuracy)


if __name__ == "__main__":
    print(f"test accuracy {train():.4f}")
