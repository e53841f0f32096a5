"""Layouts of the Optax backend: what real modules of Flax, Equinox and Haiku get, overrides, errors, examples."""

import doctest
import importlib

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import adamp_jax
from adamp_jax._layouts import assign
from adamp_spec import Layout

KEY = jax.random.key(0)


def chosen(params, layouts=None):
    """path -> channel axes, counted from 0, or None where nothing is projected."""
    rows = {path: each.layout.rows(each.shape) for path, each in assign(params, layouts).items()}
    return {path: each.channel if each.projects else None for path, each in rows.items()}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):  # (1, 8, 8, 2)
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.ConvTranspose(6, (3, 3))(x)
        x = nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))(x)
        x = nn.ConvLocal(3, (8, 8), padding="VALID")(x).reshape(1, 1, 3)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=6)(x, x)
        x = x + nn.Embed(5, 3)(jnp.zeros((1, 1), int))
        _, x = nn.OptimizedLSTMCell(4)(nn.OptimizedLSTMCell(4).initialize_carry(KEY, (1, 3)), x[:, 0])
        return nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x")))(x)


class NNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, 8, rngs=rngs)
        self.embed = nnx.Embed(5, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs)])


LINEN_AND_NNX_ATTENTION = {
    **{f"{part}/kernel": (1, 2) for part in ("query", "key", "value")},
    **{f"{part}/bias": None for part in ("query", "key", "value", "out")},
    "out/kernel": (2,),
}


def test_flax_linen():
    params = jax.eval_shape(Linen().init, KEY, jnp.ones((1, 8, 8, 2)))["params"]
    axes = chosen(params)
    expected = {
        "Conv_0/kernel": (3,),
        "Conv_0/bias": None,
        "BatchNorm_0/scale": None,
        "ConvTranspose_0/kernel": (2,),
        "LayerNorm_0/scale": (2,),  # (H, W, C)
        "LayerNorm_0/bias": (2,),
        "ConvLocal_0/bias": None,  # (H, W, C)
        "Embed_0/embedding": (0,),
        "OptimizedLSTMCell_0/ii/kernel": (1,),
        "OptimizedLSTMCell_0/hf/bias": None,
        "Dense_0/kernel": (1,),  # boxed
        **{f"MultiHeadDotProductAttention_0/{path}": axis for path, axis in LINEN_AND_NNX_ATTENTION.items()},
    }
    assert {path: axes[path] for path in expected} == expected
    assert "default" not in adamp_jax.describe(params)


@pytest.mark.parametrize("boxed", [True, False])
def test_flax_nnx(boxed):
    params = nnx.state(NNX(), nnx.Param)
    axes = chosen(params if boxed else nnx.to_pure_dict(params))
    assert axes == {
        "conv/kernel": (3,),
        "conv/bias": None,
        "embed/embedding": (0,),
        "norm/scale": None,
        "norm/bias": None,
        "layers/0/kernel": (1,),
        "layers/0/bias": None,
        **{f"attention/{path}": axis for path, axis in LINEN_AND_NNX_ATTENTION.items()},
    }


def test_equinox():
    modules = {
        "mlp": eqx.nn.MLP(3, 4, 5, 1, key=KEY),
        "conv": eqx.nn.Conv2d(2, 3, 3, key=KEY),
        "lstm": eqx.nn.LSTMCell(2, 3, key=KEY),
        "attention": eqx.nn.MultiheadAttention(2, 4, key=KEY),
        "embedding": eqx.nn.Embedding(5, 3, key=KEY),
        "norm": eqx.nn.LayerNorm((2, 3), use_bias=False),
    }
    params = eqx.filter(modules, eqx.is_inexact_array)
    assert chosen(params) == {
        **{f"attention/{part}_proj/weight": (0,) for part in ("query", "key", "value", "output")},
        "conv/weight": (0,),
        "conv/bias": None,  # (out, 1, 1)
        "embedding/weight": (0,),
        "lstm/weight_ih": (0,),
        "lstm/weight_hh": (0,),
        "lstm/bias": None,
        "mlp/layers/0/weight": (0,),
        "mlp/layers/0/bias": None,
        "mlp/layers/1/weight": (0,),
        "mlp/layers/1/bias": None,
        "norm/weight": (0,),
    }
    assert "default" not in adamp_jax.describe(params)


def test_haiku():
    import haiku as hk

    def network(x):  # (1, 8, 8, 2)
        x = hk.Conv2D(4, 3)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = hk.Conv2DTranspose(5, 3)(x)
        x = hk.DepthwiseConv2D(2, 3)(x)
        x = hk.LayerNorm((1, 2, 3), True, True, param_axis=(1, 2, 3))(x)
        x = hk.Conv2D(3, 3, data_format="NCHW")(x).mean((2, 3))
        x, _ = hk.GRU(4)(x, jnp.zeros((1, 4)))
        x, _ = hk.LSTM(4)(x, hk.LSTMState(jnp.zeros((1, 4)), jnp.zeros((1, 4))))
        x = x + hk.Embed(5, 4)(jnp.zeros((1,), int))
        return hk.MultiHeadAttention(2, 2, 1.0)(x[None], x[None], x[None])

    params, _ = jax.eval_shape(hk.transform_with_state(network).init, KEY, jnp.ones((1, 8, 8, 2)))
    attention = {f"multi_head_attention/{part}" for part in ("query", "key", "value", "linear")}
    assert chosen(params) == {
        "batch_norm/scale": None,  # (1, 1, 1, C)
        "batch_norm/offset": None,
        "conv2_d/w": (3,),
        "conv2_d/b": None,
        "conv2_d_1/w": (3,),
        "conv2_d_1/b": None,  # (C, 1, 1)
        "conv2_d_transpose/w": (3,),  # (k, k, out, in)
        "conv2_d_transpose/b": None,
        "depthwise_conv2_d/w": (3,),
        "depthwise_conv2_d/b": None,
        "embed/embeddings": (0,),
        "gru/w_i": (1,),
        "gru/w_h": (1,),
        "gru/b": None,
        "layer_norm/scale": (3,),  # (1, H, W, C)
        "layer_norm/offset": (3,),
        "lstm/linear/w": (1,),
        "lstm/linear/b": None,
        **{f"{part}/w": (1,) for part in attention},
        **{f"{part}/b": None for part in attention},
    }
    assert "default" not in adamp_jax.describe(params)


PARAMS = {
    "enc": {"kernel": jnp.ones((2, 3, 4)), "mix": jnp.ones((4, 3))},
    "dec": {"kernel": jnp.ones((3, 4)), "v": jnp.ones(3)},
}


def test_overrides_and_the_table():
    layouts = {"enc/kernel": Layout(2, batch=0), "^dec/k": Layout(0)}
    assert chosen(PARAMS, layouts) == {"enc/kernel": (2,), "enc/mix": (1,), "dec/kernel": (0,), "dec/v": None}
    table = adamp_jax.describe(jax.eval_shape(lambda: PARAMS), layouts)
    origins = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert origins["enc/kernel"].endswith("override 'enc/kernel'")
    assert origins["dec/kernel"].endswith("override '^dec/k'")
    assert origins["enc/mix"].endswith("3 x 4          default")


def test_one_layout_is_for_every_matrix_and_must_fit():
    assert chosen(PARAMS, Layout(1)) == {"enc/kernel": (1,), "enc/mix": (1,), "dec/kernel": (1,), "dec/v": None}
    with pytest.raises(ValueError, match=r"'dec/kernel'.*axis 2"):
        adamp_jax.adamp(1e-3, layouts=Layout(2)).init(PARAMS)


def test_an_array_alone_and_lists_have_paths():
    assert chosen(jnp.ones((2, 3)), Layout(0)) == {"": (0,)}
    assert chosen([jnp.ones((2, 3)), (jnp.ones((2, 3)),)], {"^1/0$": Layout(0)}) == {"0": (1,), "1/0": (0,)}
    with pytest.raises(ValueError, match="share a path"):
        assign({"a/b": jnp.ones(2), "a": {"b": jnp.ones((2, 2))}}, None)


@pytest.mark.parametrize("make", [adamp_jax.adamp, adamp_jax.sgdp])
@pytest.mark.parametrize(
    ("layouts", "error", "message"),
    [
        ({"encoder": Layout(0)}, ValueError, "encoder.*match no parameter"),
        ({"enc": Layout(0), "mix": Layout(0)}, ValueError, "'enc/mix' matches several"),
        ({"enc/mix": Layout(5)}, ValueError, "'enc/mix'.*axis 5"),
        ({"enc/mix": Layout(0, view=(5, 5))}, ValueError, "25 elements"),
        ({"(": Layout(0)}, ValueError, "not a regular expression"),
        ({"enc/mix": 0}, TypeError, "must be an adamp_spec.Layout"),
        (0, TypeError, "layouts must be"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_by_init(make, layouts, error, message):
    with pytest.raises(error, match=message):
        make(1e-3, layouts=layouts).init(PARAMS)


def test_keys_may_match_a_parameter_of_another_partition():
    tx = adamp_jax.adamp(1e-3, layouts={"enc/mix": Layout(0), "dec/kernel": Layout(0)})
    labels = {"enc": "a", "dec": "b"}
    state = optax.partition({"a": tx, "b": adamp_jax.sgdp(1e-3, layouts={"dec/kernel": Layout(0)})}, labels).init(
        PARAMS
    )
    assert state.inner_states["a"].inner_state[0].mu["dec"] == optax.MaskedNode()
    with pytest.raises(ValueError, match=r"dec/kernel.*match no parameter"):
        tx.init({"enc": PARAMS["enc"]})


@pytest.mark.parametrize("module", ["", "._adamp", "._layouts", "._sgdp"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"adamp_jax{module}"))
    assert result.attempted > 0
    assert result.failed == 0
