"""Gradients of a real training run: a small convolutional network with batch normalisation on scikit-learn's digits.

The network is written once, in NumPy under autograd, and trained by the implementation under test: at every
step the gradient is taken at the parameters that the implementation holds, in the form in which its
framework stores them. Nothing tells the implementation which axis is which: its own defaults decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import grad
from sklearn.datasets import load_digits

from adamp_conformance.adapter import DTYPES, MOMENTS, Parameter, State
from adamp_conformance.cases import Random
from adamp_spec import Layout

BATCH = 32

# name in a torch model, name in a Keras or Flax model, shape (out, in, ...) in torch
PARAMETERS = (
    ("conv1.weight", "conv2d/kernel", (16, 1, 3, 3)),
    ("bn1.weight", "batch_normalization/gamma", (16,)),
    ("bn1.bias", "batch_normalization/beta", (16,)),
    ("conv2.weight", "conv2d_1/kernel", (32, 16, 3, 3)),
    ("bn2.weight", "batch_normalization_1/gamma", (32,)),
    ("bn2.bias", "batch_normalization_1/beta", (32,)),
    ("fc.weight", "dense/kernel", (10, 32)),
    ("fc.bias", "dense/bias", (10,)),
)


@cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """1797 images, (8, 8) in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 8, 8) / 16.0, labels


def split() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(images, labels) to train on, four fifths, and to test on; dealt out in turn."""
    images, labels = data()
    test = np.arange(len(images)) % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test])


def to_keras(weight: np.ndarray) -> np.ndarray:
    """(out, in, ...) -> (..., in, out)."""
    return np.ascontiguousarray(np.moveaxis(weight, (0, 1), (-1, -2)) if weight.ndim > 1 else weight)


def to_torch(weight: np.ndarray) -> np.ndarray:
    """(..., in, out) -> (out, in, ...)."""
    return np.ascontiguousarray(np.moveaxis(weight, (-1, -2), (0, 1)) if weight.ndim > 1 else weight)


Convert = Callable[[np.ndarray], np.ndarray]
_TO_TORCH: dict[str, Convert] = {"torch": np.asarray, "keras": to_torch}
_FROM_TORCH: dict[str, Convert] = {"torch": np.asarray, "keras": to_keras}


def loss(weights: list[Any], images: np.ndarray, labels: np.ndarray) -> Any:
    """Mean cross-entropy of twice convolution, normalisation, ReLU and mean pooling, then a linear layer.

    Args:
      weights: the tensors of `PARAMETERS` in torch's form.
      images: (n, 8, 8).
      labels: (n, 10), one-hot.
    """
    conv1, scale1, shift1, conv2, scale2, shift2, dense, bias = weights
    x = images[:, None]
    for kernel, scale, shift, pool in ((conv1, scale1, shift1, 2), (conv2, scale2, shift2, 4)):
        x = _convolve(x, kernel)
        mean = anp.mean(x, axis=(0, 2, 3), keepdims=True)
        variance = anp.mean((x - mean) ** 2, axis=(0, 2, 3), keepdims=True)
        x = (x - mean) / anp.sqrt(variance + 1e-5) * scale[None, :, None, None] + shift[None, :, None, None]
        x = anp.maximum(x, 0)
        n, c, h, w = x.shape
        x = anp.mean(anp.reshape(x, (n, c, h // pool, pool, w // pool, pool)), axis=(3, 5))
    logits = anp.dot(x[:, :, 0, 0], dense.T) + bias
    logits = logits - anp.max(logits, axis=1, keepdims=True)
    return anp.mean(anp.log(anp.sum(anp.exp(logits), axis=1)) - anp.sum(logits * labels, axis=1))


def _convolve(x: Any, kernel: Any) -> Any:
    """3 x 3, padding 1, stride 1."""
    n, _, h, w = x.shape
    padded = anp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="constant")
    patches = [padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    columns = anp.concatenate(
        [anp.reshape(anp.transpose(patch, (0, 2, 3, 1)), (n * h * w, -1)) for patch in patches], axis=1
    )
    matrix = anp.reshape(anp.transpose(kernel, (2, 3, 1, 0)), (-1, kernel.shape[0]))
    return anp.transpose(anp.reshape(anp.dot(columns, matrix), (n, h, w, kernel.shape[0])), (0, 3, 1, 2))


@dataclass(frozen=True)
class DigitsCase:
    """A training run on the digits; the same interface as `adamp_conformance.cases.Case`."""

    id: str
    algorithm: str
    hyper: dict[str, Any]
    steps: int = 300
    purpose: str = "gradients of a real training run, weights in the framework's own form, layouts by its own defaults"
    clauses: tuple[str, ...] = ("LAYOUT-6", "LAYOUT-7", "STATE-1")
    dtypes: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = ("shadow", "transplant", "relay")
    tensors: Mapping[str, Any] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()
    step: int = 0

    def layouts(self, weights: str) -> dict[str, Layout]:
        return {name: Layout(0 if weights == "torch" else -1) for name in _names(weights)}

    def parameters(self, dtype: str, weights: str) -> dict[str, Parameter]:
        return {name: Parameter(x.astype(DTYPES[dtype]), None) for name, x in initial_weights(weights).items()}

    def initial(self, dtype: str, weights: str) -> State:
        values = {name: parameter.value for name, parameter in self.parameters(dtype, weights).items()}
        return State(0, values, {m: {n: np.zeros_like(x) for n, x in values.items()} for m in MOMENTS[self.algorithm]})

    def carry(self, state: State, source: str, target: str) -> State:
        def convert(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            torch_form = (_TO_TORCH[source](arrays[name]) for name in _names(source))
            return {name: _FROM_TORCH[target](x) for name, x in zip(_names(target), torch_form, strict=True)}

        moments = {moment: convert(arrays) for moment, arrays in state.moments.items()}
        return State(state.step, convert(state.parameters), moments)

    def gradients(self, index: int, parameters: Mapping[str, np.ndarray], weights: str) -> dict[str, np.ndarray]:
        images, labels = data()
        chosen = (np.arange(BATCH) + index * BATCH) * 7 % len(images)
        names = _names(weights)
        torch_form = [_TO_TORCH[weights](parameters[name].astype(np.float64)) for name in names]
        gradients = grad(loss)(torch_form, images[chosen], np.eye(10)[labels[chosen]])
        return {
            name: _FROM_TORCH[weights](gradient).astype(parameters[name].dtype)
            for name, gradient in zip(names, gradients, strict=True)
        }


def _names(weights: str) -> list[str]:
    return [torch_name if weights == "torch" else keras_name for torch_name, keras_name, _ in PARAMETERS]


def initial_weights(weights: str) -> dict[str, np.ndarray]:
    """Name -> initial value (float64) of each parameter, in `torch` or `keras` form."""
    values = (_initial(name, shape) for name, _, shape in PARAMETERS)
    return {name: _FROM_TORCH[weights](x) for name, x in zip(_names(weights), values, strict=True)}


def _initial(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """He's uniform initialisation for kernels, 1 for scales, 0 for shifts."""
    if len(shape) == 1:
        return np.ones(shape) if name.startswith("bn") and name.endswith("weight") else np.zeros(shape)
    fan_in = int(np.prod(shape[1:]))
    return Random(f"digits/{name}").uniform(*shape) * np.sqrt(6 / fan_in)


DIGITS = [
    DigitsCase("adamp/digits", "adamp", {"lr": 3e-3, "weight_decay": 0.01}),
    DigitsCase("sgdp/digits", "sgdp", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
]
