"""The batches of all three examples: scikit-learn's digits, and the descriptions of its data sets as a text.

A batch follows from the number of the step alone, so that whoever goes on with a training goes on with its data.
"""

from functools import cache

import numpy as np
from sklearn import datasets

from adamp_conformance.digits import split

TOKENS = 128  # of ASCII
LENGTH = 32  # of a piece of text


def digits(step: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(size, 8, 8) images in [0, 1] to train on, float32, and their labels, (size,) int32."""
    (images, labels), _ = split()
    chosen = np.random.default_rng(step).choice(len(images), size, replace=False)
    return images[chosen].astype(np.float32), labels[chosen].astype(np.int32)


def text(step: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(size, LENGTH) pieces of the text, int32, and the same moved on by a character, which are to be predicted."""
    starts = np.random.default_rng(step).integers(len(_corpus()) - LENGTH, size=size)
    pieces = _corpus()[starts[:, None] + np.arange(LENGTH + 1)]
    return pieces[:, :-1], pieces[:, 1:]


@cache
def _corpus() -> np.ndarray:
    loaders = (datasets.load_breast_cancer, datasets.load_diabetes, datasets.load_iris, datasets.load_wine)
    words = "\n".join(load().DESCR for load in loaders)
    return np.frombuffer(words.encode("ascii", "replace"), np.uint8).astype(np.int32)
