"""Real layers prove `spec/layouts.toml`: carried between frameworks they compute the same, and take the same step.

Weights and gradients are stated for the PyTorch layer. Gradients are orthogonal to the rows of its layout and to no
others, so that another reading of the axes takes another branch. All of it in float64.
"""

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch._dynamo  # imports Triton, which aborts the process where TensorFlow was imported before it

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import jsonschema
import keras
import numpy as np
import optax
import pytest
from flax import linen, nnx
from keras import layers as kl

import adamp_jax
import adamp_tf
import adamp_torch
from adamp_conformance.cases import Random, noise, orthogonal_rows
from adamp_conformance.judge import expected_outcomes, margins
from adamp_conformance.layers import convert, layouts, read_row, rows
from adamp_conformance.publish.layers import markdown
from adamp_conformance.spec_files import spec_file
from adamp_jax._layouts import assign
from adamp_spec import Bounded, Branch, Layout
from adamp_tf._layouts import named_shapes, resolve

HYPER = {"lr": 2.0**-4, "weight_decay": 2.0}
KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def float64():
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()  # which follows floatx only until a layer asks
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    with jax.enable_x64(True):
        yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)
    for cached in (real, problem):
        cached.cache_clear()


# ------------------------------------------------------------------------------------------------ real layers


@dataclass
class Case:
    """A row of the table with real layers.

    Attributes:
      row: its name in the table.
      make: framework -> a function that makes the layer.
      inputs: of PyTorch's layer.
      call: framework -> how to call the layer on `inputs`, where it is not `layer(*inputs)`.
      image: whether inputs and outputs are images, with the channels first in PyTorch and Equinox.
      sizes: what PyTorch's shapes do not tell.
      tolerance: framework -> relative, where the layer does not compute in float64.
    """

    row: str
    make: dict
    inputs: tuple
    call: dict = field(default_factory=dict)
    image: bool = False
    sizes: dict = field(default_factory=dict)
    tolerance: dict = field(default_factory=dict)


def data(*shape):
    return noise(Random(f"x{shape}"), np.empty(shape))


def flax(linen_layer, nnx_layer):
    return {"linen": linen_layer, "nnx": partial(nnx_layer, rngs=nnx.Rngs(0))}


def image(n, channels=4):
    return (data(2, channels, *(7, 6, 5)[:n]),)


def convolution(n, groups=1):
    size, kw = (3,) * n, {"padding": "VALID", "feature_group_count": groups}
    return Case(
        "conv",
        {
            "torch": partial(getattr(torch.nn, f"Conv{n}d"), 4, 6, 3, groups=groups),
            "keras": partial(getattr(kl, f"Conv{n}D"), 6, 3, groups=groups),
            **flax(partial(linen.Conv, 6, size, **kw), partial(nnx.Conv, 4, 6, size, **kw)),
            "equinox": partial(getattr(eqx.nn, f"Conv{n}d"), 4, 6, 3, groups=groups, key=KEY),
            "haiku": partial(getattr(hk, f"Conv{n}D"), 6, 3, **kw),
        },
        image(n),
        image=True,
    )


def transposed(n):
    size, stride = (3,) * n, (2,) * n
    return Case(
        "conv_transpose",
        {
            "torch": partial(getattr(torch.nn, f"ConvTranspose{n}d"), 4, 6, 3, stride=2),
            "keras": partial(getattr(kl, f"Conv{n}DTranspose"), 6, 3, strides=2),
            **flax(
                partial(linen.ConvTranspose, 6, size, stride, padding="VALID"),
                partial(nnx.ConvTranspose, 4, 6, size, stride, padding="VALID"),
            ),
            "equinox": partial(getattr(eqx.nn, f"ConvTranspose{n}d"), 4, 6, 3, stride=2, key=KEY),
            "haiku": partial(getattr(hk, f"Conv{n}DTranspose"), 6, 3, stride=2, padding="VALID"),
        },
        image(n),
        image=True,
    )


def transposed_kernel(n):
    size, kw = (3,) * n, {"padding": "VALID", "transpose_kernel": True}
    flax_layers = flax(
        partial(linen.ConvTranspose, 6, size, (2,) * n, **kw), partial(nnx.ConvTranspose, 4, 6, size, (2,) * n, **kw)
    )
    return Case("conv_transpose_kernel", {"torch": transposed(n).make["torch"], **flax_layers}, image(n), image=True)


def transposed_groups(n):
    kw = {"stride": 2, "groups": 2}
    return Case(
        "conv_transpose_grouped",
        {
            "torch": partial(getattr(torch.nn, f"ConvTranspose{n}d"), 4, 6, 3, **kw),
            "equinox": partial(getattr(eqx.nn, f"ConvTranspose{n}d"), 4, 6, 3, **kw, key=KEY),
        },
        image(n),
        image=True,
        sizes={"groups": 2},
    )


def depthwise(n):
    size, kw = (3,) * n, {"padding": "VALID", "feature_group_count": 4}
    make = {
        "torch": partial(getattr(torch.nn, f"Conv{n}d"), 4, 8, 3, groups=4),
        **flax(partial(linen.Conv, 8, size, **kw), partial(nnx.Conv, 4, 8, size, **kw)),
        "equinox": partial(getattr(eqx.nn, f"Conv{n}d"), 4, 8, 3, groups=4, key=KEY),
        "haiku": partial(getattr(hk, f"DepthwiseConv{n}D"), 2, 3, padding="VALID"),
    }
    if n < 3:
        make["keras"] = partial(getattr(kl, f"DepthwiseConv{n}D"), 3, depth_multiplier=2)
    return Case("depthwise_conv", make, image(n), image=True, sizes={"in": 4})


def separable(n):
    conv = getattr(torch.nn, f"Conv{n}d")
    return Case(
        "separable_conv",
        {
            "torch": lambda: torch.nn.Sequential(conv(4, 8, 3, groups=4, bias=False), conv(8, 6, 1)),
            "keras": partial(getattr(kl, f"SeparableConv{n}D"), 6, 3, depth_multiplier=2),
        },
        image(n),
        image=True,
        sizes={"in": 4},
    )


def dense_general(one):
    """Dense with several axes, `one` of `DenseGeneral` and `Einsum` in Flax."""
    out, merge = ("...i,ihd->...hd", (3, 2, 4), (2, 4)), ("...hd,hdo->...o", (2, 4, 5), (5,))
    if one == "Einsum":
        flax_out, flax_in = (
            flax(partial(linen.Einsum, shape, equation), partial(nnx.Einsum, equation, shape, bias))
            for equation, shape, bias in (out, merge)
        )
    else:
        flax_out = flax(partial(linen.DenseGeneral, (2, 4)), partial(nnx.LinearGeneral, 3, (2, 4)))
        flax_in = flax(partial(linen.DenseGeneral, 5, (-2, -1)), partial(nnx.LinearGeneral, (2, 4), 5, axis=(-2, -1)))
    yield Case(
        "dense_general_out",
        {
            "torch": partial(torch.nn.Linear, 3, 8),
            "keras": partial(kl.EinsumDense, "abi,ihd->abhd", (None, 2, 4), bias_axes="hd"),
            **flax_out,
        },
        (data(2, 5, 3),),
        call={"torch": lambda layer, x: layer(x).unflatten(-1, (2, 4))},
        sizes={"heads": 2},
    )
    yield Case(
        "dense_general_in",
        {
            "torch": partial(torch.nn.Linear, 8, 5),
            "keras": partial(kl.EinsumDense, "abhd,hdo->abo", (None, 5), bias_axes="o"),
            **flax_in,
        },
        (data(2, 3, 2, 4),),
        call={"torch": lambda layer, x: layer(x.flatten(-2))},
        sizes={"heads": 2},
    )


class StackedLinear(torch.nn.Module):
    """Three linear layers; `calls` is how they are applied."""

    def __init__(self, inputs, outputs, one_after_the_other):
        super().__init__()
        self.one_after_the_other = one_after_the_other
        stack, _ = torch.func.stack_module_state([torch.nn.Linear(inputs, outputs) for _ in range(3)])
        for name, tensor in stack.items():
            self.register_parameter(name, torch.nn.Parameter(tensor.detach()))

    def forward(self, x):
        if self.one_after_the_other:
            for weight, bias in zip(self.weight, self.bias, strict=True):
                x = torch.nn.functional.linear(x, weight, bias)
            return x
        return torch.func.vmap(torch.nn.functional.linear, (1, 0, 0), 1)(x, self.weight, self.bias)


class LinenBody(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return linen.Dense(5)(x), None


def linen_scan(axis):
    return linen.scan(LinenBody, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)


def linen_vmap(axis):
    return linen.vmap(linen.Dense, in_axes=1, out_axes=1, variable_axes={"params": axis}, split_rngs={"params": True})


def nnx_stack(size, axis):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
    def make(rngs):
        return nnx.Linear(*size, rngs=rngs)

    return lambda: make(nnx.Rngs(0))


def nnx_parallel(axis):
    at = nnx.StateAxes({nnx.Param: axis, ...: 0})
    return lambda layer, x: nnx.vmap(lambda one, each: one(each), in_axes=(at, 1), out_axes=1)(layer, x)


def nnx_in_turn(layer, x):
    return nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layer)


def eqx_stack(size):
    return eqx.filter_vmap(lambda key: eqx.nn.Linear(*size, key=key))(jax.random.split(KEY, 3))


def eqx_in_turn(layer, x):
    params, static = eqx.partition(layer, eqx.is_array)
    return jax.lax.scan(lambda x, one: (eqx.combine(one, static)(x), None), x, params)[0]


class HaikuStack:
    def __call__(self, x):
        return hk.experimental.layer_stack(3)(lambda x: hk.Linear(5)(x))(x)


def stacks():
    yield Case(  # a layer for each
        "stacked",
        {
            "torch": partial(StackedLinear, 4, 5, False),
            "keras": partial(kl.EinsumDense, "nli,lio->nlo", (3, 5), bias_axes="lo"),
            **{"linen": partial(linen_vmap(0), 5), "nnx": nnx_stack((4, 5), 0)},
            "equinox": partial(eqx_stack, (4, 5)),
        },
        (data(2, 3, 4),),
        call={
            "nnx": nnx_parallel(0),
            "equinox": lambda layer, x: eqx.filter_vmap(lambda one, each: one(each))(layer, x),
        },
    )
    yield Case(  # one after the other
        "stacked",
        {
            "torch": partial(StackedLinear, 5, 5, True),
            **{"linen": linen_scan(0), "nnx": nnx_stack((5, 5), 0)},
            "equinox": partial(eqx_stack, (5, 5)),
            "haiku": HaikuStack,
        },
        (data(2, 5),),
        call={"linen": lambda layer, x: layer(x, None)[0], "nnx": nnx_in_turn, "equinox": eqx_in_turn},
    )
    yield Case(
        "stacked_on_axis_1",
        {
            "torch": partial(StackedLinear, 4, 5, False),
            **{"linen": partial(linen_vmap(1), 5), "nnx": nnx_stack((4, 5), 1)},
        },
        (data(2, 3, 4),),
        call={"nnx": nnx_parallel(1)},
    )
    yield Case(
        "stacked_on_axis_1",
        {"torch": partial(StackedLinear, 5, 5, True), "linen": linen_scan(1)},
        (data(2, 5),),
        call={"linen": lambda layer, x: layer(x, None)[0]},
    )


def attention():
    yield Case(
        "attention",
        {
            "torch": partial(torch.nn.MultiheadAttention, 8, 2, batch_first=True),
            "keras": partial(kl.MultiHeadAttention, 2, 4),
            **flax(partial(linen.MultiHeadDotProductAttention, 2), partial(nnx.MultiHeadAttention, 2, 8, decode=False)),
            "equinox": partial(eqx_attention, 8, 8, 8),
            "haiku": partial(hk.MultiHeadAttention, 2, 4, w_init=hk.initializers.Constant(0)),
        },
        (data(3, 5, 8),),
        call={
            "torch": lambda layer, x: layer(x, x, x)[0],
            "keras": lambda layer, x: layer(x, x),
            "equinox": lambda layer, x: layer(x, x, x),
            "haiku": lambda layer, x: layer(x, x, x),
        },
        sizes={"heads": 2},
        tolerance={"nnx": 1e-6},  # its softmax is in float32
    )
    yield Case(
        "attention_separate",
        {
            "torch": partial(torch.nn.MultiheadAttention, 8, 2, kdim=6, vdim=7, batch_first=True),
            "keras": partial(kl.MultiHeadAttention, 2, 4),
            "linen": partial(linen.MultiHeadDotProductAttention, 2),
            "equinox": partial(eqx_attention, 8, 6, 7),
            "haiku": partial(hk.MultiHeadAttention, 2, 4, w_init=hk.initializers.Constant(0)),
        },
        (data(3, 4, 8), data(3, 5, 6), data(3, 5, 7)),
        call={"torch": lambda layer, q, k, v: layer(q, k, v)[0], "keras": lambda layer, q, k, v: layer(q, v, k)},
        sizes={"heads": 2},
    )


def eqx_attention(query, key, value):
    biases = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
    return eqx.nn.MultiheadAttention(2, query, key_size=key, value_size=value, output_size=8, **biases, key=KEY)


def recurrent():
    x, h, c = data(3, 4), data(3, 5), data(3, 5)[::-1].copy()
    yield Case(
        "rnn",
        {
            "torch": partial(torch.nn.RNNCell, 4, 5, nonlinearity="relu"),
            "keras": partial(kl.SimpleRNNCell, 5, "relu"),
            **flax(
                partial(linen.SimpleCell, 5, jax.nn.relu),
                partial(nnx.SimpleCell, 4, 5, dtype=jnp.float64, activation_fn=jax.nn.relu),
            ),
            "haiku": partial(hk.VanillaRNN, 5),
        },
        (x, h),
        call={
            "keras": lambda layer, x, h: layer(x, [h])[0],
            **dict.fromkeys(("linen", "nnx"), lambda layer, x, h: layer(h, x)[1]),
            "haiku": lambda layer, x, h: layer(x, h)[0],
        },
    )
    lstm_calls = {
        "torch": lambda layer, x, h, c: layer(x, (h, c))[0],
        "keras": lambda layer, x, h, c: layer(x, [h, c])[0],
        **dict.fromkeys(("linen", "nnx"), lambda layer, x, h, c: layer((c, h), x)[1]),
        "equinox": lambda layer, x, h, c: layer(x, (h, c))[0],
        "haiku": lambda layer, x, h, c: layer(x, hk.LSTMState(h, c))[0],
    }
    shared = {
        "torch": partial(torch.nn.LSTMCell, 4, 5),
        "keras": partial(kl.LSTMCell, 5),
        "equinox": partial(eqx.nn.LSTMCell, 4, 5, key=KEY),
    }
    fused = {"nnx": flax(None, partial(nnx.OptimizedLSTMCell, 4, 5))["nnx"], "haiku": partial(hk.LSTM, 5)}
    yield Case("lstm", shared | fused, (x, h, c), call=lstm_calls)
    for cell in (linen.LSTMCell, linen.OptimizedLSTMCell):
        gates = flax(partial(cell, 5), partial(nnx.LSTMCell, 4, 5))
        yield Case("lstm_gates", shared | gates, (x, h, c), call=lstm_calls)
    gru_calls = {
        "keras": lambda layer, x, h: layer(x, [h])[0],
        **dict.fromkeys(("linen", "nnx"), lambda layer, x, h: layer(h, x)[1]),
    }
    shared = {
        "torch": partial(torch.nn.GRUCell, 4, 5),
        "keras": partial(kl.GRUCell, 5),
        "equinox": partial(eqx.nn.GRUCell, 4, 5, key=KEY),
    }
    gates = flax(partial(linen.GRUCell, 5), partial(nnx.GRUCell, 4, 5))
    yield Case("gru", shared | {"nnx": gates["nnx"]}, (x, h), call=gru_calls)
    yield Case("gru_gates", shared | {"linen": gates["linen"]}, (x, h), call=gru_calls)


def normalization():
    yield from (
        Case(
            "layer_norm",
            {
                "torch": partial(torch.nn.LayerNorm, 5),
                "keras": partial(kl.LayerNormalization, epsilon=1e-5),
                **flax(partial(linen.LayerNorm, 1e-5), partial(nnx.LayerNorm, 5, epsilon=1e-5)),
                "equinox": partial(eqx.nn.LayerNorm, 5),
                "haiku": partial(hk.LayerNorm, -1, True, True),
            },
            (data(3, 5),),
        ),
        Case(
            "rms_norm",
            {
                "torch": partial(torch.nn.RMSNorm, 5, 1e-5),
                "keras": partial(kl.RMSNormalization, epsilon=1e-5),
                **flax(partial(linen.RMSNorm, 1e-5), partial(nnx.RMSNorm, 5, epsilon=1e-5)),
                "equinox": partial(eqx.nn.RMSNorm, 5, 1e-5, use_bias=False),
                "haiku": partial(hk.RMSNorm, -1),
            },
            (data(3, 5),),
        ),
        Case(
            "layer_norm_over_image",
            {
                "torch": partial(torch.nn.LayerNorm, (4, 7, 6)),
                "keras": partial(kl.LayerNormalization, (1, 2, 3), 1e-5),
                "linen": partial(linen.LayerNorm, 1e-5, reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3)),
                "equinox": partial(eqx.nn.LayerNorm, (4, 7, 6)),
                "haiku": partial(hk.LayerNorm, (1, 2, 3), True, True, param_axis=(1, 2, 3)),
            },
            image(2),
            image=True,
        ),
    )
    with jax.enable_x64(True):
        eqx_batch_norm, eqx_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    for n in (1, 2, 3):
        yield Case(
            "batch_norm",
            {
                "torch": partial(getattr(torch.nn, f"BatchNorm{n}d"), 4),
                "keras": partial(kl.BatchNormalization, epsilon=1e-5),
                **flax(partial(linen.BatchNorm, False, epsilon=1e-5), partial(nnx.BatchNorm, 4, epsilon=1e-5)),
                "equinox": lambda: eqx_batch_norm,
                "haiku": partial(hk.BatchNorm, True, True, 0.9),
            },
            image(n),
            call={
                "keras": lambda layer, x: layer(x, training=True),
                "equinox": lambda layer, x: layer(x, jax.tree.map(lambda a: a, eqx_state))[0],  # a state is used once
                "haiku": lambda layer, x: layer(x, is_training=True),
            },
            image=True,
            sizes={"...": n},
        )
        yield Case(
            "group_norm",
            {
                "torch": partial(getattr(torch.nn, f"InstanceNorm{n}d"), 4, affine=True),
                "keras": partial(kl.GroupNormalization, -1, epsilon=1e-5),
                **flax(partial(linen.InstanceNorm, epsilon=1e-5), partial(nnx.InstanceNorm, 4, epsilon=1e-5)),
                "equinox": partial(eqx.nn.GroupNorm, 4, 4),
                "haiku": partial(hk.InstanceNorm, True, True),
            },
            image(n),
            image=True,
        )
    yield Case(
        "group_norm",
        {
            "torch": partial(torch.nn.GroupNorm, 2, 4),
            "keras": partial(kl.GroupNormalization, 2, epsilon=1e-5),
            **flax(partial(linen.GroupNorm, 2, epsilon=1e-5), partial(nnx.GroupNorm, 4, 2, epsilon=1e-5)),
            "equinox": partial(eqx.nn.GroupNorm, 2, 4),
            "haiku": partial(hk.GroupNorm, 2),
        },
        image(2),
        image=True,
    )
    yield Case(
        "prelu",
        {
            "torch": partial(torch.nn.PReLU, 4),
            "keras": partial(kl.PReLU, shared_axes=[1, 2]),
            "equinox": lambda: eqx.nn.PReLU(jnp.zeros(4)),
        },
        image(2),
        call={"equinox": lambda layer, x: layer(x.T).T},
        image=True,
        sizes={"...": 2},
    )


def tokens(row, name, shape):
    """A parameter of one's own, added to the input."""

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

        def forward(self, x):
            return x + getattr(self, name)

    class Keras(keras.Layer):
        def build(self, _):
            self.token = self.add_weight(name=name, shape=shape)

        def call(self, x):
            return x + self.token

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x + self.param(name, linen.initializers.zeros, shape)

    class Nnx(nnx.Module):
        def __init__(self):
            setattr(self, name, nnx.Param(jnp.zeros(shape)))

        def __call__(self, x):
            return x + getattr(self, name)

    class Equinox(eqx.Module):
        __annotations__ = {name: jax.Array}

        def __call__(self, x):
            return x + getattr(self, name)[0]

    class Haiku(hk.Module):
        def __call__(self, x):
            return x + hk.get_parameter(name, shape, init=jnp.zeros)

    make = {"torch": Torch, "keras": Keras, "linen": Linen, "nnx": Nnx, "haiku": Haiku}
    return Case(row, make | {"equinox": partial(Equinox, jnp.zeros(shape))}, (data(2, 5, 6),))


def all_cases():
    yield Case(
        "dense",
        {
            "torch": partial(torch.nn.Linear, 5, 6),
            "keras": partial(kl.Dense, 6),
            **flax(partial(linen.Dense, 6), partial(nnx.Linear, 5, 6)),
            "equinox": partial(eqx.nn.Linear, 5, 6, key=KEY),
            "haiku": partial(hk.Linear, 6),
        },
        (data(3, 5),),
    )
    yield Case(
        "embedding",
        {
            "torch": partial(torch.nn.Embedding, 7, 5),
            "keras": partial(kl.Embedding, 7, 5),
            **flax(partial(linen.Embed, 7, 5), partial(nnx.Embed, 7, 5, dtype=jnp.float64)),
            "equinox": partial(eqx.nn.Embedding, 7, 5, key=KEY),
            "haiku": partial(hk.Embed, 7, 5),
        },
        (np.arange(6),),
    )
    for n in (1, 2, 3):
        yield from (convolution(n), transposed(n), transposed_kernel(n), transposed_groups(n), depthwise(n))
    yield convolution(2, groups=2)
    yield from (separable(1), separable(2))
    for one in ("DenseGeneral", "Einsum"):
        yield from dense_general(one)
    yield from stacks()
    yield from attention()
    yield from recurrent()
    yield from normalization()
    yield tokens("class_token", "cls_token", (1, 1, 6))
    yield tokens("position_embedding", "pos_embed", (1, 5, 6))


CASES = {f"{case.row}-{i}": case for i, case in enumerate(all_cases())}


# ------------------------------------------------------------------------------------------------ what they do


@dataclass
class Real:
    """A layer of one framework.

    Attributes:
      layer: the layer, or what holds its parameters.
      shapes: of the parameters, by the names of the table.
      forward: output for given parameters, channels last.
      step: parameters after one step of AdamP with given gradients and layouts, by the names of the table.
      chosen: naming -> the layouts that the backend chooses by itself.
      gradient: of the sum of all outputs; in PyTorch and JAX.
    """

    layer: object
    shapes: dict
    forward: object
    step: object
    chosen: dict
    gradient: object = None


def names_of(case, framework, paths):
    """Path -> the name in the table that it ends with."""
    known = rows()[case.row].form(framework).pieces
    found = {path: max((n for n in known if f"/{path}".endswith(f"/{n}")), key=len, default=None) for path in paths}
    assert None not in found.values(), found
    assert set(found.values()) == set(known)
    return found


def renamed(path):
    return f"stem/{path.partition('/')[2]}"


def channels_last(case, framework, x):
    return np.moveaxis(x, 1, -1) if case.image and framework in ("torch", "equinox") else x


@cache
def real(key, framework):
    case = CASES[key]
    inputs = [np.moveaxis(x, 1, -1) if case.image and framework not in ("torch", "equinox") else x for x in case.inputs]
    call = case.call.get(framework, lambda layer, *xs: layer(*xs))
    make = real_torch if framework == "torch" else real_keras if framework == "keras" else real_jax
    return make(case, framework, inputs, call)


def real_torch(case, framework, inputs, call):
    layer = case.make[framework]().double()
    parameters = dict(layer.named_parameters())
    names_of(case, framework, parameters)
    xs = [torch.from_numpy(x.copy()) for x in inputs]

    def put(arrays):
        for name, array in arrays.items():
            parameters[name].data = torch.from_numpy(array.copy())

    def forward(arrays):
        put(arrays)
        return channels_last(case, framework, call(layer, *xs).detach().numpy())

    def step(arrays, gradients, declared):
        put(arrays)
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        table = {parameters[name]: layout for name, layout in declared.items()}
        adamp_torch.AdamP(parameters.values(), **HYPER, layouts=table).step()
        return {name: parameter.detach().numpy() for name, parameter in parameters.items()}

    def gradient(arrays):
        put(arrays)
        found = torch.autograd.grad(call(layer, *xs).sum(), list(parameters.values()))
        return {name: x.numpy() for name, x in zip(parameters, found, strict=True)}

    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return Real(layer, shapes, forward, step, {"default": dict.fromkeys(shapes, Layout())}, gradient)


def real_keras(case, framework, inputs, call):
    layer = case.make[framework]()
    call(layer, *inputs)
    variables = {variable.path: variable for variable in layer.trainable_variables}
    names = names_of(case, framework, variables)

    def put(arrays):
        for path, name in names.items():
            variables[path].assign(arrays[name])

    def forward(arrays):
        put(arrays)
        return np.asarray(call(layer, *inputs))

    def step(arrays, gradients, declared):
        put(arrays)
        own = {path: declared[name] for path, name in names.items() if name in declared}
        table = adamp_tf.layouts_for(layer) | own
        optimizer = adamp_tf.AdamP(HYPER["lr"], weight_decay=HYPER["weight_decay"], layouts=table)
        given = [keras.ops.convert_to_tensor(gradients[name].copy()) for name in names.values()]
        optimizer.apply(given, list(variables.values()))
        return {names[path]: np.array(variable) for path, variable in variables.items()}

    def by_path(rename=str):
        shapes = [(rename(path), shape) for path, shape in named_shapes(variables.values())]
        return dict(zip(names.values(), (x.layout for x in resolve(shapes, {}).values()), strict=True))

    by_class = adamp_tf.layouts_for(layer)
    class_or_path = {name: by_class.get(path, by_path(renamed)[name]) for path, name in names.items()}
    shapes = {names[path]: tuple(variable.shape) for path, variable in variables.items()}
    chosen = {"default": by_path(), "renamed": by_path(renamed), "by class": class_or_path}
    return Real(layer, shapes, forward, step, chosen)


def real_jax(case, framework, inputs, call):
    layer, params, apply = JAX[framework](case.make[framework], inputs, call)
    shapes = {path: x.shape for path, x in assign(params, None).items()}
    names = names_of(case, framework, shapes)

    def tree(arrays):
        return jax.tree.unflatten(jax.tree.structure(params), [jnp.asarray(arrays[name]) for name in names.values()])

    def step(arrays, gradients, declared):
        table = {path: declared[name] for path, name in names.items() if name in declared}
        optimizer = adamp_jax.adamp(HYPER["lr"], weight_decay=HYPER["weight_decay"], layouts=table)
        before = tree(arrays)

        @jax.jit
        def one(params, given):
            return optax.apply_updates(params, optimizer.update(given, optimizer.init(params), params)[0])

        after = jax.tree.leaves(one(before, tree(gradients)))
        return dict(zip(names.values(), map(np.asarray, after), strict=True))

    def by_path(rename=str):
        one = {rename(path): jax.ShapeDtypeStruct(shape, jnp.float64) for path, shape in shapes.items()}
        found = assign(one, None)
        return {name: found[rename(path)].layout for path, name in names.items()}

    chosen = {"default": {names[path]: x.layout for path, x in assign(params, None).items()}}
    if framework in ("linen", "haiku"):  # elsewhere a layer has no name but the attribute's
        chosen["renamed"] = by_path(renamed)
    own = {names[path]: shape for path, shape in shapes.items()}

    def forward(arrays):
        return channels_last(case, framework, np.asarray(jax.jit(apply)(tree(arrays))))

    def gradient(arrays):
        found = jax.tree.leaves(jax.jit(jax.grad(lambda params: apply(params).sum()))(tree(arrays)))
        return dict(zip(names.values(), map(np.asarray, found), strict=True))

    return Real(layer, own, forward, step, chosen, gradient)


def zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def linen_model(make, inputs, call):
    made = []

    class Model(linen.Module):
        @linen.compact
        def __call__(self, *xs):
            made.append(make())
            return call(made[-1], *xs)

    model = Model()
    variables = dict(jax.eval_shape(model.init, KEY, *inputs))
    params = variables.pop("params")
    rest = zeros(variables)

    def apply(params):
        y = model.apply({"params": params, **rest}, *inputs, mutable=list(rest))
        return y[0]

    return made[0], params, apply


def nnx_model(make, inputs, call):
    model = nnx.Dict(stem=make())
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return (
        model["stem"],
        params,
        lambda params: call(nnx.merge(graph, params, rest, copy=True)["stem"], *map(jnp.asarray, inputs)),
    )


def equinox_model(make, inputs, call):
    params, static = eqx.partition({"stem": make()}, eqx.is_inexact_array)

    def apply(params):
        layer = eqx.combine(params, static)["stem"]
        return jax.vmap(lambda *xs: call(layer, *xs), axis_name="batch")(*map(jnp.asarray, inputs))

    return eqx.combine(params, static)["stem"], params, apply


def haiku_model(make, inputs, call):
    made = []

    def run(*xs):
        made.append(make())
        return call(made[-1], *xs)

    model = hk.transform_with_state(run)
    params, state = jax.eval_shape(model.init, KEY, *inputs)
    return made[0], params, lambda params: model.apply(params, zeros(state), None, *map(jnp.asarray, inputs))[0]


JAX = {"linen": linen_model, "nnx": nnx_model, "equinox": equinox_model, "haiku": haiku_model}


# ------------------------------------------------------------------------------------------------ tests

PAIRS = [(key, framework) for key, case in CASES.items() for framework in case.make]
ELSEWHERE = [(key, framework) for key, framework in PAIRS if framework != "torch"]


@cache
def problem(key):
    """PyTorch's weights and gradients and, by the oracle, what the step makes of the weights."""
    case = CASES[key]
    shapes = real(key, "torch").shapes
    given = layouts(case.row, "torch", shapes, case.sizes)
    weights, gradients = {}, {}
    for name, shape in shapes.items():
        cut = given[name].rows(shape)
        slices = int(np.prod([cut.shape[axis] for axis in cut.batch]))
        cells = (slices, cut.count, cut.length) if cut.projects else (1, 1, int(np.prod(shape)))
        p = noise(Random(f"{key}/{name}/p"), np.empty(cells))
        g = (orthogonal_rows if cut.projects else noise)(Random(f"{key}/{name}/g"), p)
        weights[name], gradients[name] = p.reshape(shape), g.reshape(shape)
    for form in rows()[case.row].forms.values():  # as backpropagation gives them
        for piece in (piece for pieces in form.pieces.values() for piece in pieces):
            for term in piece.terms[1:]:
                gradients[term.parameter] = gradients[piece.terms[0].parameter]
    return weights, gradients


def stepped(layout, weight, gradient):
    before = {"p": weight} | {moment: np.zeros(weight.shape) for moment in "mv"}
    (outcome,) = expected_outcomes("adamp", HYPER, layout, before, 0, gradient)
    assert outcome.branch == (Branch.CHANNEL if layout.rows(weight.shape).projects else Branch.NONE)
    return outcome.tensors["p"]


def without_homeless(key, framework, arrays):
    """PyTorch's arrays, zero where the framework's layer has nothing."""
    row = rows()[CASES[key].row]
    arrays = dict(arrays)
    for term in row.homeless(framework):
        x = arrays[term.parameter].reshape(len(row.parts), -1).copy()
        x[row.parts.index(term.part)] = 0
        arrays[term.parameter] = x.reshape(arrays[term.parameter].shape)
    return arrays


def same_rows(a, b, shape):
    """Whether two layouts cut a tensor of `shape` into the same slices and rows."""

    def cells(layout):
        cut = layout.rows(shape)
        if not cut.projects:
            return None
        index = np.indices(cut.shape)
        keys = [
            index[list(axes)].reshape(len(axes), np.prod(cut.shape)).T for axes in (cut.batch, cut.batch + cut.channel)
        ]
        return [np.unique(key, axis=0, return_inverse=True)[1].ravel() for key in keys]

    a, b = cells(a), cells(b)
    if a is None or b is None:
        return a is b
    return all(len({*zip(x, y, strict=True)}) == len({*x}) == len({*y}) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("key", "framework"), ELSEWHERE, scope="module")
def test_the_converted_layer_computes_the_same(key, framework):
    case, layer = CASES[key], real(key, framework)
    weights = without_homeless(key, framework, problem(key)[0])
    converted = convert(case.row, weights, "torch", framework, sizes=case.sizes)
    assert {name: x.shape for name, x in converted.items()} == layer.shapes
    expected = real(key, "torch").forward(weights)
    tolerance = case.tolerance.get(framework, 1e-12)
    np.testing.assert_allclose(layer.forward(converted), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("key", "framework"), PAIRS, scope="module")
def test_the_backend_chooses_what_the_table_says(key, framework):
    case, layer = CASES[key], real(key, framework)
    form = rows()[case.row].form(framework)
    declared = layouts(case.row, framework, layer.shapes, case.sizes)
    other = {
        naming: {name for name, x in chosen.items() if not same_rows(x, declared[name], layer.shapes[name])}
        for naming, chosen in layer.chosen.items()
    }
    if "renamed" in other:
        assert other["default"] == form.declare | form.by_class
        assert form.by_name | form.by_class <= other["renamed"] <= form.by_name | form.by_class | form.declare
    else:
        assert other["default"] == form.declare | form.by_name
    assert other.get("by class", form.declare) == form.declare


@pytest.mark.parametrize(("key", "framework"), PAIRS, scope="module")
def test_the_step_is_the_same(key, framework):
    case, layer = CASES[key], real(key, framework)
    form = rows()[case.row].form(framework)
    weights, gradients = problem(key)
    weights = without_homeless(key, framework, weights)
    own = convert(case.row, weights, "torch", framework, sizes=case.sizes)
    own_gradients = convert(case.row, gradients, "torch", framework, sizes=case.sizes, moments=True)

    reference = layouts(case.row, "torch", real(key, "torch").shapes, case.sizes)
    after = {name: stepped(reference[name], weights[name], gradients[name]) for name in weights}
    values, errors = (
        convert(case.row, arrays, "torch", framework, sizes=case.sizes, moments=True)
        for arrays in (
            {name: x.value for name, x in after.items()},
            {name: np.asarray(x.error) for name, x in after.items()},
        )
    )
    expected = {name: Bounded(values[name], errors[name], np.dtype(np.float64)) for name in values}
    expected |= {name: stepped(Layout(None), own[name], own_gradients[name]) for name in form.sums()}

    given = layouts(case.row, framework, layer.shapes, case.sizes)
    told = form.declare | (form.by_name if framework in ("nnx", "equinox") else frozenset())
    got = layer.step(own, own_gradients, {name: given[name] for name in told})
    worst = {name: margins("p", got[name], expected[name]).max() for name in got}
    if form.apart:
        assert max(worst.values()) > 1
    else:
        assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize(("key", "framework"), ELSEWHERE, scope="module")
def test_the_way_back(key, framework):
    case = CASES[key]
    weights = without_homeless(key, framework, problem(key)[0])
    there = convert(case.row, weights, "torch", framework, sizes=case.sizes)
    back = convert(case.row, there, framework, "torch", sizes=case.sizes)
    again = convert(case.row, back, "torch", framework, sizes=case.sizes)
    summed = {
        term.parameter
        for name in rows()[case.row].form(framework).sums()
        for piece in rows()[case.row].form(framework).pieces[name]
        for term in piece.terms
    }
    for name in set(weights) - summed:
        np.testing.assert_array_equal(back[name], weights[name])
    for name in there:
        np.testing.assert_allclose(again[name], there[name], rtol=1e-15)


# Where parts and sums make moments another thing than weights; only what computes in float64.
GRADIENTS = [
    (key, framework)
    for key, framework in ELSEWHERE
    if rows()[CASES[key].row].parts and framework != "keras" and framework not in CASES[key].tolerance
]


@pytest.mark.parametrize(("key", "framework"), GRADIENTS)
def test_gradients_and_so_moments_are_carried_as_moments(key, framework):
    case = CASES[key]
    weights = without_homeless(key, framework, problem(key)[0])
    own = real(key, framework).gradient(convert(case.row, weights, "torch", framework, sizes=case.sizes))
    gradients = without_homeless(key, framework, real(key, "torch").gradient(weights))
    converted = convert(case.row, gradients, "torch", framework, sizes=case.sizes, moments=True)
    for name in own:
        np.testing.assert_allclose(own[name], converted[name], rtol=1e-12, atol=1e-12)
    back = convert(case.row, own, framework, "torch", sizes=case.sizes, moments=True)
    for name in gradients:
        np.testing.assert_allclose(back[name], gradients[name], rtol=1e-12, atol=1e-12)


def test_every_layer_of_the_table_is_here():
    here = defaultdict(set)
    for case in CASES.values():
        for framework, make in case.make.items():
            made = make.func if isinstance(make, partial) else make
            here[case.row, framework].add((made if isinstance(made, type) else type(make())).__name__)
    for row in rows().values():
        for framework, form in row.forms.items():
            other_flax = {"linen", "nnx"} - {framework}
            names = {name.split(".")[-1] for name in form.layer if name.split(".")[0] not in other_flax}
            assert here[row.name, framework], (row.name, framework)
            if row.name not in ("stacked", "stacked_on_axis_1", "class_token", "position_embedding"):  # no classes
                assert names == here[row.name, framework], (row.name, framework)


def test_statistics_carry_over():
    """What batch normalization has gathered gives the same outputs in every framework that the table has."""
    x = data(5, 4)
    torch_layer = torch.nn.BatchNorm1d(4).double()
    for _ in range(3):
        torch_layer(torch.from_numpy(2 * data(8, 4) + 3))
    held = {name: array.numpy() for name, array in torch_layer.named_buffers()}
    assert held.pop(rows()["batch_norm"].forms["torch"].counter) == 3
    statistics = rows()["batch_norm"].statistics
    carried = {framework: convert(statistics, held, "torch", framework) for framework in statistics.forms}
    keras_layer, nnx_layer = kl.BatchNormalization(epsilon=1e-5), nnx.BatchNorm(4, epsilon=1e-5, rngs=nnx.Rngs(0))
    keras_layer.build(x.shape)
    for variable in keras_layer.non_trainable_variables:
        variable.assign(carried["keras"][variable.name])
    nnx.update(nnx_layer, nnx.State({name: nnx.BatchStat(array) for name, array in carried["nnx"].items()}))
    linen_layer = linen.BatchNorm(use_running_average=True, epsilon=1e-5)
    params = {"scale": np.ones(4), "bias": np.zeros(4)}
    outputs = {
        "torch": torch_layer.eval()(torch.from_numpy(x)).detach().numpy(),
        "keras": np.asarray(keras_layer(x, training=False)),
        "nnx": nnx_layer(x, use_running_average=True),
        "linen": linen_layer.apply({"params": params, "batch_stats": carried["linen"]}, x),
    }
    assert outputs.keys() == statistics.forms.keys()
    for output in outputs.values():
        np.testing.assert_allclose(output, outputs["torch"], rtol=1e-12, atol=1e-12)


def test_the_page_for_readers_is_the_table():
    assert (Path(__file__).parent.parent / "docs" / "layouts.md").read_text() == markdown()


DENSE = {"title": "dense", "torch": {"layer": "Linear", "weight": "OUT in"}}


@pytest.mark.parametrize(
    ("keras_kernel", "message"),
    [
        ("weight: in HEADS", "has other axes"),
        ("weight: in out", "has other axes"),  # what indexes the rows here does so everywhere
        ("kernel: in OUT", "PyTorch's layer has no 'kernel'"),
        ("weight[q]: in OUT", "weight has no part 'q'"),
        ("weight: in in OUT", "an axis is named twice"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(keras_kernel, message):
    assert read_row("dense", DENSE | {"keras": {"layer": "Dense", "kernel": "weight: in OUT"}})
    with pytest.raises(ValueError, match=message):
        read_row("dense", DENSE | {"keras": {"layer": "Dense", "kernel": keras_kernel}})


@pytest.mark.parametrize("form", [{"order": "a b"}, {"declare": ["weight"]}])
def test_options_that_do_not_fit_a_row_are_refused(form):
    with pytest.raises(ValueError, match=r"is not a permutation|are no parameters"):
        read_row("dense", DENSE | {"keras": {"layer": "Dense", "kernel": "weight: in OUT"} | form})


@pytest.mark.parametrize(
    "change",
    [
        {"keras": {"layer": "Dense", "kernel": "in OUT"}},
        {"keras": {"kernel": "weight: in OUT"}},
        {"mxnet": {"layer": "Dense", "kernel": "weight: in OUT"}},
        {"torch": {"layer": "Linear"}},
        {"parts": {"gate": "i"}},
    ],
)
def test_the_schema_refuses(change):
    schema = jsonschema.Draft202012Validator(json.loads(spec_file("schema/layouts.schema.json").read_text()))
    assert schema.is_valid({"dense": DENSE})
    assert not schema.is_valid({"dense": DENSE | change})


KERNEL = np.zeros((3, 3, 4, 6))
IN_PROJ = {"in_proj_weight": np.zeros((24, 8))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dens", {}, "torch", "keras"), "there is no layer 'dens'"),
        (("gru", {}, "torch", "haiku"), "'gru' has no framework 'haiku'"),
        (("conv", {"weight": KERNEL}, "keras", "torch"), r"no \['weight'\] in keras; it has \['bias', 'kernel'\]"),
        (("dense", {"kernel": KERNEL}, "keras", "torch"), r"'in OUT' and cannot have shape \(3, 3, 4, 6\)"),
        (("conv", {"kernel": KERNEL, "bias": np.zeros(5)}, "keras", "torch"), r"'bias' is 'out' and cannot .* \(5,\)"),
        (("attention", IN_PROJ, "torch", "keras"), "size of axis 'heads'; give it in sizes"),
        (("attention", IN_PROJ, "torch", "keras", {"heads": 3}), "'in_proj_weight' .* cannot have shape"),
        (("attention", IN_PROJ, "torch", "keras", {"head": 2}), r"no axes \['head'\]"),
        (("attention", {"query/w": np.zeros((8, 8))}, "haiku", "torch"), r"\['key/w', 'value/w'\] of haiku missing"),
        (("lstm", {"bias_ih": np.zeros(8)}, "torch", "keras"), r"\['bias_hh'\] of torch missing"),
        (("batch_norm", {"weight": np.zeros(4)}, "torch", "haiku"), "number of spatial axes"),
        (("gru", {"bias_ih": np.ones(6), "bias_hh": np.ones(6)}, "torch", "nnx"), r"no place for bias_hh\[n\]"),
        (("rnn", {"weight_hh": np.zeros((3, 4))}, "torch", "keras"), "must be of one size"),
    ],
)
def test_what_cannot_be_converted_is_refused(arguments, message):
    *given, sizes = arguments if len(arguments) == 5 else (*arguments, None)
    with pytest.raises(ValueError, match=message):
        convert(*given, sizes=sizes)


def test_sums_and_constants_are_of_weights_and_not_of_moments():
    pair = {"bias_ih": np.arange(8.0), "bias_hh": np.arange(8.0)}
    (weights,) = convert("lstm", pair, "torch", "haiku").values()
    np.testing.assert_array_equal(weights, [0, 2, 8, 10, 3, 5, 12, 14])  # i g f o, and 1 less for f
    (moments,) = convert("lstm", pair, "torch", "haiku", moments=True).values()
    np.testing.assert_array_equal(moments, [0, 1, 4, 5, 2, 3, 6, 7])
    back = convert("lstm", {"linear/b": moments}, "haiku", "torch", moments=True)
    np.testing.assert_array_equal(back["bias_ih"], pair["bias_ih"])
    np.testing.assert_array_equal(back["bias_hh"], pair["bias_hh"])


def test_a_layer_without_a_bias_and_shapes_that_need_no_sizes():
    assert set(convert("conv", {"kernel": KERNEL}, "keras", "equinox")) == {"weight"}
    fused = {"weight": np.arange(24.0).reshape(8, 1, 3)}
    assert convert("depthwise_conv", fused, "torch", "haiku")["w"].shape == (3, 1, 8)  # how 8 is 4 * 2 does not matter
    assert convert("depthwise_conv", fused, "torch", "keras", sizes={"m": 2})["kernel"].shape == (3, 4, 2)
