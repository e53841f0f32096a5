"""Layouts of the Optax backend: what real modules of Flax, Equinox and Haiku get, overrides, errors, examples."""

import doctest
import functools
import importlib
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

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


def test_names_that_are_given_by_hand():
    names = ("cls_token", "class_token", "pos_embed", "position_embeddings", "posembed_input/pos_embedding")
    assert chosen({name: jnp.ones((1, 5, 4)) for name in names}) == dict.fromkeys(names, (0,))
    assert chosen({"compose/kernel": jnp.ones((5, 4)), "composed": jnp.ones((5, 4))}) == {
        "compose/kernel": (1,),
        "composed": (1,),
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


BY_SUBTREE = {"enc": {"kernel": Layout(2, batch=0), "mix": Layout(0)}, "dec": Layout(0)}
BY_LEAF = {**BY_SUBTREE, "dec": {"kernel": Layout(0), "v": Layout(None)}}
ROWS = {"enc/kernel": (2,), "enc/mix": (0,), "dec/kernel": (0,), "dec/v": None}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: lambda params: x], ids=["tree", "function"])
@pytest.mark.parametrize("layouts", [BY_SUBTREE, BY_LEAF], ids=["prefix", "full"])
def test_a_tree_of_layouts(layouts, wrap):
    assert chosen(PARAMS, wrap(layouts)) == ROWS
    assert chosen(freeze(PARAMS), wrap(layouts)) == ROWS  # containers may differ in type
    assert chosen(PARAMS, wrap(freeze(layouts))) == ROWS


def test_a_function_may_give_any_form_and_sees_the_shapes():
    assert chosen(PARAMS, lambda params: None) == chosen(PARAMS)
    assert chosen(PARAMS, lambda params: {"mix": Layout(0)}) == chosen(PARAMS, {"mix": Layout(0)})
    by_rank = chosen(PARAMS, lambda params: jax.tree.map(lambda p: Layout(p.ndim - 2 if p.ndim > 1 else 0), params))
    assert by_rank == {"enc/kernel": (1,), "enc/mix": (0,), "dec/kernel": (0,), "dec/v": None}


def test_the_table_says_what_chose():
    table = adamp_jax.describe(PARAMS, {"enc": {"kernel": Layout(0), "mix": None}, "dec": Layout((0, 1))})
    chosen_by = {line.split()[0]: line.split("  ")[-1].strip() for line in table.splitlines()[1:]}
    assert chosen_by == {
        "enc/kernel": "override 'enc/kernel'",
        "enc/mix": "default",  # None stands for the rules
        "dec/kernel": "override 'dec'",
        "dec/v": "override 'dec'",  # a vector, which axis 1 is not meant for
    }
    assert adamp_jax.describe(PARAMS, Layout(0)).splitlines()[-1].endswith("  override")


class Callable(eqx.Module):
    """Holds layers, and is called itself, as most modules of Equinox are."""

    first: eqx.nn.Linear
    activation: Any
    norm: eqx.nn.LayerNorm

    def __call__(self, x):
        return self.norm(self.activation(self.first(x)))


def test_an_equinox_module_of_layouts_is_a_tree_not_a_function():
    module = Callable(eqx.nn.Linear(3, 2, key=KEY), jax.nn.relu, eqx.nn.LayerNorm((2, 3)))
    params = eqx.filter(module, eqx.is_inexact_array)
    spec = jax.tree.map(lambda p: Layout(p.ndim - 1), params)
    assert callable(spec)
    rows = {"first/weight": (1,), "first/bias": None, "norm/weight": (1,), "norm/bias": (1,)}
    assert chosen(params, spec) == rows
    assert chosen(params, jax.tree.map(lambda _: Layout(-1), module)) == rows  # also where params have None
    tx = optax.inject_hyperparams(adamp_jax.adamp, static_args=("layouts", "b1", "b2"))(0.1, layouts=spec)
    tx.update(params, tx.init(params), params)


FORMS = {
    "mapping": {"^enc/kernel": Layout(2, batch=0), "enc/mix": Layout(0), "dec/kernel": Layout(0)},
    "prefix": BY_SUBTREE,
    "full": BY_LEAF,
    "function": lambda params: BY_LEAF,
}
OVERRIDDEN = [("enc", "kernel"), ("enc", "mix"), ("dec", "kernel")]


@pytest.mark.parametrize("make", [adamp_jax.adamp, functools.partial(adamp_jax.sgdp, momentum=0.9)])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_under_the_wrappers_of_optax(make, form):
    rng = np.random.default_rng(0)
    params, before, grads = (
        jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), PARAMS) for _ in range(3)
    )
    for part, leaf in OVERRIDDEN:  # each row of the override becomes orthogonal to its gradient
        p, g = params[part][leaf], grads[part][leaf]
        row = 1 if p.ndim == 3 else tuple(range(1, p.ndim))
        grads[part][leaf] = g - p * jnp.sum(g * p, row, keepdims=True) / jnp.sum(p * p, row, keepdims=True)

    def update(tx):
        @jax.jit
        def steps():
            _, state = tx.update(before, tx.init(params), params)
            return tx.update(grads, state, params)[0]

        return steps()

    layouts = FORMS[form]
    tx = make(0.1, layouts=layouts)
    expected, ruled = update(tx), update(make(0.1))
    for part, leaf in OVERRIDDEN:
        assert jnp.max(jnp.abs(expected[part][leaf] - ruled[part][leaf])) > 1e-3

    def same(updates, hidden=()):
        wanted = {
            part: {leaf: (grads if (part, leaf) in hidden else expected)[part][leaf] for leaf in PARAMS[part]}
            for part in PARAMS
        }
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), updates, wanted)

    masked = optax.masked(tx, {"enc": True, "dec": False})
    same(update(masked), {("dec", "kernel"), ("dec", "v")})
    same(update(optax.masked(tx, {"enc": {"kernel": True, "mix": False}, "dec": True})), {("enc", "mix")})
    same(update(optax.partition({"a": tx, "b": make(0.1, layouts=layouts)}, {"enc": "a", "dec": "b"})))
    same(update(optax.inject_hyperparams(make, static_args="layouts")(0.1, layouts=layouts)))
    same(update(optax.MultiSteps(tx, 1).gradient_transformation()))
    for wrapped in (tx, masked):
        state = wrapped.init(params)
        ones = optax.tree_utils.tree_map_params(wrapped, jnp.ones_like, state)
        assert jax.tree.structure(ones) == jax.tree.structure(state)
        assert any(jnp.all(x == 1) for x in jax.tree.leaves(ones))


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
        (lambda params: lambda params: None, TypeError, "layouts must be .* got <function"),
        ({"enc": {"kernel": Layout(0), "mix": 0}, "dec": Layout(0)}, TypeError, "layouts must be .* got 0"),
        ({"enc": {"kernel": Layout(0)}, "dec": Layout(0)}, ValueError, "without a leaf for parameter 'enc/mix'"),
        ({"enc": Layout(0), "dec": {"kernel": Layout(0)}}, ValueError, "without a leaf for parameter 'dec/v'"),
        ({**BY_LEAF, "deck": Layout(0)}, ValueError, "leaf at 'deck', where there is no parameter"),
        ({**BY_SUBTREE, "dec": Layout(3)}, ValueError, r"'dec/kernel' .*axis 3"),
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
