"""Real layers, converted between PyTorch, Keras and Flax: the same forward output, then the same step.

Weights and gradients are stated for the PyTorch layer; each framework's optimizer takes the step on its own layer's
weights with its own default layouts. Gradients are orthogonal to the rows of PyTorch's dim 0 and to no others, so that
another reading of the axes takes another branch.
"""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

import adamp_jax
import adamp_tf
import adamp_torch
from adamp_conformance.cases import Random, noise, orthogonal_rows
from adamp_conformance.judge import expected_outcomes, margins
from adamp_spec import Bounded, Branch, Layout

HYPER = {"lr": 0.05, "weight_decay": 2.0}
QKV = Layout(1, batch=0, view=(3, 8, 8))  # each of the three projections decides alone, as the separate kernels do


def hwio(w):
    return w.transpose(2, 3, 1, 0)


class Case:
    """A layer in three frameworks and the way from PyTorch's parameters to the others'."""

    def __init__(self, torch_layer, keras_layer, flax_layer, x, to_keras, to_flax, image=False, layouts=None):
        self.torch_layer, self.keras_layer, self.flax_layer = torch_layer, keras_layer, flax_layer
        self.x, self.to_keras, self.to_flax, self.image = x, to_keras, to_flax, image
        self.layouts = layouts or {}


def attention(params, heads=2):
    """Name in Keras and Flax -> array, from `torch.nn.MultiheadAttention`."""
    converted = {}
    for i, name in enumerate(("query", "key", "value")):
        weight, bias = (np.split(params[f"in_proj_{part}"], 3)[i] for part in ("weight", "bias"))
        converted[f"{name}/kernel"] = weight.T.reshape(8, heads, -1)
        converted[f"{name}/bias"] = bias.reshape(heads, -1)
    converted["out/kernel"] = params["out_proj.weight"].T.reshape(heads, -1, 8)
    converted["out/bias"] = params["out_proj.bias"]
    return converted


IMAGE = (2, 4, 6, 6)  # NCHW
CASES = {
    "dense": lambda: Case(
        torch.nn.Linear(5, 6),
        keras.layers.Dense(6),
        linen.Dense(6),
        (3, 5),
        lambda p: {"kernel": p["weight"].T, "bias": p["bias"]},
        lambda p: {"kernel": p["weight"].T, "bias": p["bias"]},
    ),
    "convolution": lambda: Case(
        torch.nn.Conv2d(4, 6, 3),
        keras.layers.Conv2D(6, 3),
        linen.Conv(6, (3, 3), padding="VALID"),
        IMAGE,
        lambda p: {"kernel": hwio(p["weight"]), "bias": p["bias"]},
        lambda p: {"kernel": hwio(p["weight"]), "bias": p["bias"]},
        image=True,
    ),
    "depthwise convolution": lambda: Case(
        torch.nn.Conv2d(4, 8, 3, groups=4),
        keras.layers.DepthwiseConv2D(3, depth_multiplier=2),
        linen.Conv(8, (3, 3), padding="VALID", feature_group_count=4),
        IMAGE,
        lambda p: {"kernel": p["weight"].reshape(4, 2, 3, 3).transpose(2, 3, 0, 1), "bias": p["bias"]},
        lambda p: {"kernel": hwio(p["weight"]), "bias": p["bias"]},
        image=True,
    ),
    "transposed convolution": lambda: Case(
        torch.nn.ConvTranspose2d(4, 6, 3, stride=2),
        keras.layers.Conv2DTranspose(6, 3, strides=2),
        linen.ConvTranspose(6, (3, 3), strides=(2, 2), padding="VALID"),
        IMAGE,
        lambda p: {"kernel": hwio(p["weight"]), "bias": p["bias"]},
        lambda p: {"kernel": p["weight"].transpose(2, 3, 0, 1)[::-1, ::-1], "bias": p["bias"]},
        image=True,
    ),
    "embedding": lambda: Case(
        torch.nn.Embedding(7, 5),
        keras.layers.Embedding(7, 5),
        linen.Embed(7, 5),
        None,
        lambda p: {"embeddings": p["weight"]},
        lambda p: {"embedding": p["weight"]},
    ),
    "attention": lambda: Case(
        torch.nn.MultiheadAttention(8, 2, batch_first=True),
        keras.layers.MultiHeadAttention(2, 4),
        linen.MultiHeadDotProductAttention(2),
        (3, 5, 8),
        lambda p: {name.replace("out/", "attention_output/"): x for name, x in attention(p).items()},
        attention,
        layouts={"in_proj_weight": QKV},
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    keras.utils.clear_session()
    return CASES[request.param]()


@pytest.fixture
def problem(case):
    """PyTorch's weights, gradients and, by the oracle, the parameters after the step with their bounds."""
    weights, gradients, expected = {}, {}, {}
    for name, parameter in case.torch_layer.named_parameters():
        shape = tuple(parameter.shape)
        layout = case.layouts.get(name, Layout())
        rows = layout.rows(shape)
        cells = (
            (*np.array(rows.shape)[list(rows.batch)], rows.count, rows.length)
            if rows.batch
            else (1, rows.count, rows.length)
        )
        p = noise(Random(f"{name}/p"), np.empty(cells))
        make = orthogonal_rows if rows.projects else noise
        weights[name], gradients[name] = (x.reshape(shape).astype(np.float32) for x in (p, make(Random(name), p)))
        before = {"p": weights[name]} | {moment: np.zeros(shape, np.float32) for moment in "mv"}
        (outcome,) = expected_outcomes("adamp", HYPER, layout, before, 0, gradients[name])
        assert outcome.branch == (Branch.CHANNEL if rows.projects else Branch.NONE)
        expected[name] = outcome.tensors["p"]
    return weights, gradients, expected


def inputs(case):
    """The layer's input in PyTorch's and in the others' form."""
    if case.x is None:
        tokens = np.arange(6).reshape(2, 3)
        return tokens, tokens
    x = noise(Random("x"), np.empty(case.x)).astype(np.float32)
    return x, np.moveaxis(x, 1, -1) if case.image else x


def torch_output(case, weights):
    for name, parameter in case.torch_layer.named_parameters():
        parameter.data = torch.from_numpy(weights[name].copy())
    x = torch.from_numpy(inputs(case)[0])
    is_attention = isinstance(case.torch_layer, torch.nn.MultiheadAttention)
    y = case.torch_layer(x, x, x)[0] if is_attention else case.torch_layer(x)
    y = y.detach().numpy()
    return np.moveaxis(y, 1, -1) if case.image else y


def assert_same_step(got, expected, convert):
    """`got` is within the bounds that the oracle gives for PyTorch's parameters, carried over by `convert`."""
    values = convert({name: bounded.value for name, bounded in expected.items()})
    errors = convert({name: np.asarray(bounded.error) for name, bounded in expected.items()})
    assert set(got) == set(values)
    for name, array in got.items():
        carried = Bounded(values[name], errors[name], array.dtype)
        assert margins("p", array, carried).max() <= 1, name


def test_torch(case, problem):
    weights, gradients, expected = problem
    torch_output(case, weights)
    parameters = dict(case.torch_layer.named_parameters())
    layouts = {parameters[name]: layout for name, layout in case.layouts.items()}
    optimizer = adamp_torch.AdamP(parameters.values(), **HYPER, layouts=layouts)
    for name, parameter in parameters.items():
        parameter.grad = torch.from_numpy(gradients[name])
    optimizer.step()
    assert_same_step({name: p.detach().numpy() for name, p in parameters.items()}, expected, dict)


def test_keras(case, problem):
    weights, gradients, expected = problem
    layer, x = case.keras_layer, inputs(case)[1]
    call = (lambda: layer(x, x)) if "attention" in layer.name else (lambda: layer(x))
    call()
    variables = {v.path.removeprefix(f"{layer.name}/"): v for v in layer.trainable_variables}
    converted = case.to_keras(weights)
    assert set(variables) == set(converted)
    for name, variable in variables.items():
        variable.assign(converted[name])
    np.testing.assert_allclose(call(), torch_output(case, weights), rtol=1e-4, atol=1e-5)

    optimizer = adamp_tf.AdamP(HYPER["lr"], weight_decay=HYPER["weight_decay"])
    given = case.to_keras(gradients)
    optimizer.apply([keras.ops.convert_to_tensor(given[name].copy()) for name in variables], list(variables.values()))
    assert_same_step({name: np.array(v) for name, v in variables.items()}, expected, case.to_keras)


def test_optax(case, problem):
    weights, gradients, expected = problem
    x = inputs(case)[1]
    name = type(case.flax_layer).__name__ + "_0"  # as inside a model

    def tree(arrays):
        return {name: unflatten_dict({tuple(k.split("/")): jnp.asarray(v.copy()) for k, v in arrays.items()})}

    params = tree(case.to_flax(weights))
    is_attention = isinstance(case.flax_layer, linen.MultiHeadDotProductAttention)
    expected_shapes = jax.eval_shape(case.flax_layer.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params[name]) == jax.tree.map(lambda s: s.shape, expected_shapes)
    y = case.flax_layer.apply({"params": params[name]}, *((x, x) if is_attention else (x,)))
    np.testing.assert_allclose(y, torch_output(case, weights), rtol=1e-4, atol=1e-5)

    optimizer = adamp_jax.adamp(HYPER["lr"], weight_decay=HYPER["weight_decay"])
    updates, _ = optimizer.update(tree(case.to_flax(gradients)), optimizer.init(params), params)
    stepped = flatten_dict(optax.apply_updates(params, updates)[name], sep="/")
    assert_same_step({key: np.array(value) for key, value in stepped.items()}, expected, case.to_flax)
