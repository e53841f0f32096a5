"""Inventories of real models in every framework, and the maps that are derived from two of them."""

import os
import subprocess
import sys

import torch._dynamo  # imports Triton, which aborts the process where TensorFlow was imported before it

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import linen, nnx
from keras import layers as kl
from torch import nn

import adamp_tf
import adamp_torch
from adamp_conformance.port.derive import IN_ORDER, ONLY_ONE, propose
from adamp_conformance.port.inventory import (
    Layer,
    equinox_inventory,
    haiku_inventory,
    keras_inventory,
    linen_inventory,
    nnx_inventory,
    torch_inventory,
)
from adamp_conformance.port.maps import convert_snapshot

KEY = jax.random.key(0)
IMAGES = jnp.zeros((2, 8, 8, 3))
TOKENS = jnp.zeros((2, 6), jnp.int32)
VECTORS = jnp.zeros((2, 6, 4))


def linen_of(module, *inputs):
    variables = dict(jax.eval_shape(lambda: module.init(KEY, *inputs)))
    return linen_inventory(module, variables.pop("params"), variables, inputs)


def nnx_of(model):
    stats = nnx.state(model, nnx.BatchStat)
    return nnx_inventory(model, nnx.state(model, nnx.Param), {"batch_stats": stats} if stats else None)


def equinox_of(model):
    return equinox_inventory(model, eqx.filter(model, eqx.is_inexact_array))


def haiku_of(function, *inputs):
    transformed = hk.transform_with_state(function)
    params, state = jax.eval_shape(transformed.init, KEY, *inputs)
    return haiku_inventory(transformed, params, state, inputs)


def complete(source, target):
    """The pairs of a map that leaves nothing over, and is the same in both directions."""
    there, back = propose(source, target), propose(target, source)
    assert not there.unmatched_source + there.unmatched_target
    assert sorted(map(repr, there.map.pairs)) == sorted(map(repr, back.map.reversed().pairs))
    return there.map.pairs


# ------------------------------------------------------------------------------------------------ residual networks


class TorchResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3)

        def two():
            yield nn.Conv2d(8, 8, 3, padding=1)
            yield nn.BatchNorm2d(8, eps=1e-3)

        self.blocks = nn.ModuleList(nn.Sequential(*two(), *two()) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def keras_residual():
    x = inputs = keras.Input((8, 8, 3))
    x = kl.BatchNormalization(name="bn")(kl.Conv2D(8, 3, use_bias=False, name="stem")(x))
    for i in range(2):
        y = kl.BatchNormalization(name=f"blocks_{i}_1")(kl.Conv2D(8, 3, padding="same", name=f"blocks_{i}_0")(x))
        y = kl.BatchNormalization(name=f"blocks_{i}_3")(kl.Conv2D(8, 3, padding="same", name=f"blocks_{i}_2")(y))
        x = x + y
    return keras.Model(inputs, kl.Dense(5, name="head")(kl.GlobalAveragePooling2D()(x)))


class LinenResidual(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(True)(linen.Conv(8, (3, 3), use_bias=False)(x))
        for _ in range(2):
            y = linen.BatchNorm(True)(linen.Conv(8, (3, 3))(x))
            x = x + linen.BatchNorm(True)(linen.Conv(8, (3, 3))(y))
        return linen.Dense(5)(x.mean((1, 2)))


class NnxResidual(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)

        def two():
            yield nnx.Conv(8, 8, (3, 3), rngs=rngs)
            yield nnx.BatchNorm(8, rngs=rngs)

        self.blocks = nnx.List(nnx.List([*two(), *two()]) for _ in range(2))
        self.head = nnx.Linear(8, 5, rngs=rngs)


def haiku_residual(x):
    norm = lambda: hk.BatchNorm(True, True, 0.9)  # noqa: E731
    x = norm()(hk.Conv2D(8, 3, with_bias=False)(x), is_training=True)
    for _ in range(2):
        y = norm()(hk.Conv2D(8, 3)(x), is_training=True)
        x = x + norm()(hk.Conv2D(8, 3)(y), is_training=True)
    return hk.Linear(5)(x.mean((1, 2)))


RESIDUAL = {
    "keras": lambda: keras_inventory(keras_residual()),
    "linen": lambda: linen_of(LinenResidual(), IMAGES),
    "nnx": lambda: nnx_of(NnxResidual()),
}


@pytest.mark.parametrize("framework", RESIDUAL)
def test_a_residual_network(framework):
    source, target = torch_inventory(TorchResidual()), RESIDUAL[framework]()
    found = complete(source, target)
    rows = ["conv", "batch_norm"] * 5 + ["dense"]
    assert [(pair.row, *pair.source) for pair in found] == [
        (row, f"{layer.path}.*") for row, layer in zip(rows, source.layers, strict=True)
    ]
    if framework != "linen":
        assert {pair.note for pair in found} == {""}
        return
    assert [pair.note for pair in found] == [ONLY_ONE, *[IN_ORDER] * 9, ONLY_ONE]
    assert found[3].target == (  # the statistics are in another tree
        {
            "scale": "BatchNorm_1/scale",
            "bias": "BatchNorm_1/bias",
            "mean": "batch_stats/BatchNorm_1/mean",
            "var": "batch_stats/BatchNorm_1/var",
        },
    )


def test_the_map_makes_the_same_model(tmp_path):
    torch.manual_seed(0)
    model, images = TorchResidual(), torch.randn(4, 3, 8, 8)
    optimizer = adamp_torch.AdamP(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
    target = keras_residual()
    target.compile(adamp_tf.AdamP())
    adamp_torch.save_snapshot(tmp_path / "torch", model, optimizer)
    found = propose(torch_inventory(model), keras_inventory(target)).map
    convert_snapshot(tmp_path / "torch", tmp_path / "keras", found)
    adamp_tf.load_snapshot(tmp_path / "keras", target)
    wanted = model.eval()(images).detach().numpy()
    got = np.asarray(target(images.numpy().transpose(0, 2, 3, 1), training=False))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    convert_snapshot(tmp_path / "keras", tmp_path / "back", found.reversed())
    again = TorchResidual()
    adamp_torch.load_snapshot(tmp_path / "back", again, resumed := adamp_torch.AdamP(again.parameters()))
    for name, x in model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        for name, x in optimizer.state[mine].items():
            assert torch.equal(x, resumed.state[other][name]), name


def test_statistics_without_a_counterpart_are_shown():
    found = propose(torch_inventory(TorchResidual()), haiku_of(haiku_residual, IMAGES))
    assert [pair.row for pair in found.map.pairs] == ["conv"] * 5 + ["dense"]
    assert {x.layer.kind for x in found.unmatched_source} == {"BatchNorm2d"}
    assert len(found.unmatched_target) == 5 * 7  # the layers, and two averages of three tensors each
    assert "'blocks.0.1'" in found.unmatched_target[0].why


# ------------------------------------------------------------------------------------------------ transformers


class TorchBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm_out = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)


class TorchTransformer(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 6, 8))
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(TorchBlock() for _ in range(2))
        self.head = nn.Linear(8, 11, **kw)
        self.head.weight = self.embed.weight


class KerasTransformer(keras.Model):
    def __init__(self):
        super().__init__(name="gpt")
        self.embed = kl.Embedding(11, 8)
        self.blocks = [KerasTransformerBlock(name=f"blocks_{i}") for i in range(2)]

    def build(self, shape):
        self.pos_embed = self.add_weight(name="pos_embed", shape=(1, 6, 8))
        super().build(shape)

    def call(self, x):
        x = self.embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x @ keras.ops.transpose(self.embed.embeddings)


class KerasTransformerBlock(keras.Layer):
    def __init__(self, **kw):
        super().__init__(**kw)
        self.norm, self.norm_out = kl.LayerNormalization(), kl.LayerNormalization()
        self.attention = kl.MultiHeadAttention(2, 4, dropout=0.5)  # which has a random state
        self.up, self.down = kl.Dense(16), kl.Dense(8)

    def call(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y)
        return x + self.down(self.up(self.norm_out(x)))


def keras_transformer():
    model = KerasTransformer()
    model(TOKENS)
    return model


class LinenTransformer(linen.Module):
    @linen.compact
    def __call__(self, x):
        embed = linen.Embed(11, 8, name="embed")
        x = embed(x) + self.param("pos_embed", linen.initializers.zeros, (1, 6, 8))
        for _ in range(2):
            y = linen.LayerNorm()(x)
            x = x + linen.MultiHeadDotProductAttention(2)(y, y)
            x = x + linen.Dense(8)(linen.Dense(16)(linen.LayerNorm()(x)))
        return embed.attend(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.norm_out = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)


class NnxTransformer(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.pos_embed = nnx.Param(jnp.zeros((1, 6, 8)))
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.blocks = nnx.List(NnxBlock(rngs) for _ in range(2))
        self.again = self.embed


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    norm_out: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self):
        self.norm = self.norm_out = eqx.nn.LayerNorm(8)
        biases = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(2, 8, **biases, key=KEY)
        self.up, self.down = eqx.nn.Linear(8, 16, key=KEY), eqx.nn.Linear(16, 8, key=KEY)


class EquinoxTransformer(eqx.Module):
    pos_embed: jax.Array
    embed: eqx.nn.Embedding
    blocks: list[EquinoxBlock]

    def __init__(self):
        self.pos_embed = jnp.zeros((1, 6, 8))
        self.embed = eqx.nn.Embedding(11, 8, key=KEY)
        self.blocks = [EquinoxBlock(), EquinoxBlock()]


def haiku_transformer(x):
    embed = hk.Embed(11, 8)
    x = embed(x) + hk.get_parameter("pos_embed", (1, 6, 8), init=jnp.zeros)
    for _ in range(2):
        y = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(2, 4, w_init=jnp.zeros)(y, y, y)
        x = x + hk.Linear(8)(hk.Linear(16)(hk.LayerNorm(-1, True, True)(x)))
    return x @ embed.embeddings.T


TRANSFORMERS = {
    "keras": lambda: keras_inventory(keras_transformer()),
    "linen": lambda: linen_of(LinenTransformer(), TOKENS),
    "nnx": lambda: nnx_of(NnxTransformer()),
    "equinox": lambda: equinox_of(EquinoxTransformer()),
    "haiku": lambda: haiku_of(haiku_transformer, TOKENS),
}


@pytest.mark.parametrize("framework", TRANSFORMERS)
def test_a_transformer_with_tied_embeddings(framework):
    source, target = torch_inventory(TorchTransformer(bias=False)), TRANSFORMERS[framework]()
    block = dict.fromkeys(("norm", "norm_out"), "layer_norm") | dict.fromkeys(("up", "down"), "dense")
    found = complete(source, target)
    assert {place: pair.row for pair in found for place in pair.source} == {
        "pos_embed": "same",
        "embed.*": "embedding",
        **{f"blocks.{i}.{name}.*": row for i in range(2) for name, row in (block | {"attention": "attention"}).items()},
    }
    named = framework in ("nnx", "equinox")
    for pair in found:
        assert pair.sizes == ({"heads": 2} if pair.row == "attention" else {})
        assert pair.note == ("" if named and pair.target != ("again/*",) else pair.note)
    for kind in ({"norm", "norm_out"}, {"up"}, {"down"}, {"attention"}):  # attributes and calls differ in the rest
        wanted = [f"blocks.{i}.{name}.*" for i in range(2) for name in (*block, "attention") if name in kind]
        assert [place for pair in found for place in pair.source if place in wanted] == wanted


def test_what_is_tied_is_there_once():
    tied = torch_inventory(TorchTransformer())
    assert "head.weight" not in tied.shapes
    assert tied.layers[-2] == Layer("head", "Linear", {"bias": "head.bias"}, {})
    model = NnxTransformer()
    assert nnx_of(model).layers[-1] == Layer("pos_embed", "Parameter", {"": "pos_embed"}, {})
    assert [x.path for x in nnx_of(model).layers if x.kind == "Embed"] == ["again"]  # where the state has it

    class Tied(linen.Module):
        @linen.compact
        def __call__(self, x):
            bias = self.param("head_bias", linen.initializers.zeros, 11)
            embed = linen.Embed(11, 8)
            return embed.attend(embed(x) + self.param("pos_embed", linen.initializers.zeros, (1, 6, 8))) + bias

    source = torch_inventory(nn.ModuleDict({"embed": nn.Embedding(11, 8), "head": nn.Linear(8, 11)}))
    assert [x.kind for x in source.layers] == ["Embedding", "Linear"]
    found = propose(tied, linen_of(Tied(), TOKENS))
    assert {pair.source: (pair.row, pair.target) for pair in found.map.pairs} == {
        ("embed.*",): ("embedding", ("Embed_0/*",)),
        ("pos_embed",): ("same", ("pos_embed",)),
        ("head.bias",): ("same", ("head_bias",)),
    }


# ------------------------------------------------------------------------------------------------ recurrent networks


def torch_recurrent(kind, frozen=True, **kw):
    model = nn.ModuleDict({"cell": kind(4, 5, **kw), "head": nn.Linear(5, 3)})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias_hh" not in name or not frozen)
    return torch_inventory(model)


def keras_recurrent(layer):
    model = keras.Sequential([keras.Input((6, 4)), layer, kl.Dense(3, name="head")])
    return keras_inventory(model)


class LinenRecurrent(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.RNN(linen.LSTMCell(5))(x))


def nnx_recurrent(cell):
    rngs = nnx.Rngs(0)
    return nnx_of(nnx.Dict(rnn=nnx.RNN(cell(4, 5, rngs=rngs)), head=nnx.Linear(5, 3, rngs=rngs)))


def haiku_recurrent(cell):
    def run(x):
        outputs, _ = hk.dynamic_unroll(core := cell(5), x, core.initial_state(2), time_major=False)
        return hk.Linear(3)(outputs)

    return haiku_of(run, VECTORS)


RECURRENT = {
    "keras": ("lstm", nn.LSTM, lambda: keras_recurrent(kl.LSTM(5, name="rnn"))),
    "linen": ("lstm_gates", nn.LSTM, lambda: linen_of(LinenRecurrent(), VECTORS)),
    "nnx": ("lstm", nn.LSTM, lambda: nnx_recurrent(nnx.OptimizedLSTMCell)),
    "equinox": (
        "lstm",
        nn.LSTM,
        lambda: equinox_of({"rnn": eqx.nn.LSTMCell(4, 5, key=KEY), "head": eqx.nn.Linear(5, 3, key=KEY)}),
    ),
    "haiku": ("rnn", nn.RNN, lambda: haiku_recurrent(hk.VanillaRNN)),
}


@pytest.mark.parametrize("framework", RECURRENT)
def test_a_recurrent_network(framework):
    row, kind, make = RECURRENT[framework]
    two_biases = framework == "haiku"
    cell, head = sorted(complete(torch_recurrent(kind, not two_biases), make()), key=lambda pair: pair.row == "dense")
    assert (cell.row, cell.source) == (row, ("cell.*_l0",))
    assert cell.zero == (() if two_biases else ("bias_hh",))
    assert (head.row, head.source) == ("dense", ("head.*",))


def test_two_trained_biases_and_another_optimizer_are_shown():
    left = propose(torch_recurrent(nn.LSTM, frozen=False), keras_recurrent(kl.LSTM(5, name="rnn")))
    assert [pair.row for pair in left.map.pairs] == ["dense"]
    for ((layer, why),) in (left.unmatched_source, left.unmatched_target):
        assert layer.kind == "LSTMCell"
        assert "bias is the sum of bias_ih and bias_hh" in why
        assert "requires_grad_(False)" in why
    left = propose(torch_recurrent(nn.LSTM), haiku_recurrent(hk.LSTM))
    assert "input and state share one matrix" in left.unmatched_source[0].why
    assert "input and state share one matrix" in left.unmatched_target[0].why


def test_layers_and_directions_of_one_module():
    model = nn.LSTM(4, 5, num_layers=2, bidirectional=True, bias=False)
    found = torch_inventory(model)
    assert [(x.path, x.tensors["weight_ih"]) for x in found.layers] == [
        ("l0", "weight_ih_l0"),
        ("l0_reverse", "weight_ih_l0_reverse"),
        ("l1", "weight_ih_l1"),
        ("l1_reverse", "weight_ih_l1_reverse"),
    ]
    inputs = keras.Input((6, 4))
    x = kl.Bidirectional(kl.LSTM(5, use_bias=False, return_sequences=True))(inputs)
    x = kl.Bidirectional(kl.LSTM(5, use_bias=False))(x)
    pairs = complete(found, keras_inventory(keras.Model(inputs, x)))
    assert [pair.source for pair in pairs] == [("*_l0",), ("*_l0_reverse",), ("*_l1",), ("*_l1_reverse",)]
    assert ["forward" in pair.target[0] for pair in pairs] == [True, False, True, False]


# ------------------------------------------------------------------------------------------------ stacks


class Body(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x = linen.Dense(4)(x)
        x = linen.Dense(4)(x)
        return linen.LayerNorm()(x), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x):
        stack = linen.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return linen.Dense(4)(stack()(x, None)[0])


def torch_deep(depth=3):
    blocks = (nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "n": nn.LayerNorm(4)}) for _ in range(depth))
    return torch_inventory(nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(4, 4)}))


def test_layers_that_a_scan_stacks():
    pairs = complete(torch_deep(), linen_of(Scanned(), VECTORS))
    assert {pair.target: (pair.source, pair.note) for pair in pairs} == {
        ("ScanBody_0/Dense_0/*",): (("blocks.0.a.*", "blocks.1.a.*", "blocks.2.a.*"), IN_ORDER),
        ("ScanBody_0/Dense_1/*",): (("blocks.0.b.*", "blocks.1.b.*", "blocks.2.b.*"), IN_ORDER),
        ("ScanBody_0/LayerNorm_0/*",): (("blocks.0.n.*", "blocks.1.n.*", "blocks.2.n.*"), ONLY_ONE),
        ("Dense_0/*",): (("head.*",), ONLY_ONE),
    }


def test_stacks_of_the_other_libraries():
    source = torch_inventory(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))

    def run(x):
        return hk.experimental.layer_stack(3)(lambda x: hk.Linear(4)(x))(x)

    stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(jax.random.split(KEY, 3))
    for target, place in (
        (equinox_of({"deep": stacked}), "deep/*"),
        (haiku_of(run, VECTORS), "__layer_stack_no_per_layer/linear/*"),
    ):
        (pair,) = complete(source, target)
        assert (pair.source, pair.target, pair.note) == (("0.*", "1.*", "2.*"), (place,), ONLY_ONE)


def test_layers_without_numbers_are_no_stack():
    """Which of them is the first of the stack, nothing tells."""
    source = torch_named(inner=nn.Linear(4, 4), outer=nn.Linear(4, 4), alpha=nn.Linear(4, 4))
    stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(jax.random.split(KEY, 3))
    found = propose(source, equinox_of({"deep": stacked}))
    assert found.map.pairs == ()
    assert len(found.unmatched_source + found.unmatched_target) == 4


def test_a_stack_of_another_depth_is_shown():
    found = propose(torch_deep(2), linen_of(Scanned(), VECTORS))
    assert found.map.pairs == ()
    assert len(found.unmatched_source) == 7
    why = {x.layer.path: x.why for x in found.unmatched_target}
    assert why["ScanBody_0/LayerNorm_0"].endswith("would be bias (4,), scale (4,), and is bias (3, 4), scale (3, 4)")
    assert "fits 'blocks.0.a', 'blocks.0.b', 'blocks.1.a' and 2 more" in why["Dense_0"]


# ------------------------------------------------------------------------------------------------ what is ambiguous


def torch_named(**layers):
    return torch_inventory(nn.ModuleDict(layers))


def keras_named(*layers, shape=(4,)):
    return keras_inventory(keras.Sequential([keras.Input(shape), *layers], name="m"))


def test_equal_layers_go_in_order_and_as_many_as_there_are():
    source = torch_named(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    pairs = complete(source, keras_named(kl.Dense(4, name="z"), kl.Dense(4, name="y")))
    assert [(pair.source, pair.target, pair.note) for pair in pairs] == [
        (("a.*",), ("m/z/*",), IN_ORDER),
        (("b.*",), ("m/y/*",), IN_ORDER),
    ]
    found = propose(source, keras_named(kl.Dense(4, name="z")))
    assert found.map.pairs == ()
    assert [x.layer.path for x in found.unmatched_source + found.unmatched_target] == ["a", "b", "m/z"]
    assert "fits 'm/z', as do 'b'; neither names nor order" in found.unmatched_source[0].why


class TorchScale(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(4)))


class LinenScale(linen.Module):
    names: tuple[str, ...]

    @linen.compact
    def __call__(self, x):
        for name in self.names:
            x = x * self.param(name, linen.initializers.ones, 4)
        return x


class LinenScales(linen.Module):
    names: tuple[str, ...]

    @linen.compact
    def __call__(self, x):
        for _ in range(11):  # of which the last is not the last by name
            x = LinenScale(self.names)(x)
        return x


def test_parameters_of_ones_own_go_by_their_names_and_then_in_order():
    source = torch_inventory(nn.ModuleList(TorchScale("gamma", "beta") for _ in range(11)))
    pairs = complete(source, linen_of(LinenScales(("beta", "gamma")), VECTORS))
    assert {pair.source: pair.target for pair in pairs} == {
        (f"{i}.{name}",): (f"LinenScale_{i}/{name}",) for i in range(11) for name in ("gamma", "beta")
    }
    found = propose(source, linen_of(LinenScales(("shift", "factor")), VECTORS))
    assert found.map.pairs == ()
    (pair,) = complete(torch_inventory(TorchScale("gamma")), linen_of(LinenScale(("factor",)), VECTORS))
    assert (pair.row, pair.note) == ("same", ONLY_ONE)


def test_nothing_is_taken_twice():
    """The vector of the same name fits both norms as well, which fit the one norm."""

    class Three(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = LinenScale(("scale",), name="b")(x)
            return linen.RMSNorm(name="c_scale")(linen.RMSNorm(name="d_scale")(x))

    source = torch_inventory(nn.ModuleDict({"a": TorchScale("scale"), "norm": nn.RMSNorm(4)}))
    found = propose(source, linen_of(Three(), VECTORS))
    assert found.map.pairs == ()
    assert len(found.unmatched_source + found.unmatched_target) == 5


def test_what_names_leave_of_layers_that_are_alike_is_not_the_only_one_that_fits():
    source = torch_named(inner=nn.Linear(4, 4), outer=nn.Linear(4, 4))
    pairs = complete(source, keras_named(kl.Dense(4, name="first"), kl.Dense(4, name="inner")))
    assert [(pair.source, pair.target, pair.note) for pair in pairs] == [
        (("outer.*",), ("m/first/*",), IN_ORDER),
        (("inner.*",), ("m/inner/*",), ""),
    ]


class Numbered(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="Dense_1")(linen.Dense(4)(x))


def test_numbers_that_a_library_gives_are_no_names():
    """Keras calls its first dense layer `dense` and its second `dense_1`, unless the process has made some before."""
    source = torch_named(dense_1=nn.Linear(4, 4), dense_2=nn.Linear(4, 4))
    x = np.zeros((1, 4), np.float32)
    numbered = linen_inventory(Numbered(), Numbered().init(jax.random.key(0), x)["params"], None, (x,))
    for target, first in (
        (keras_named(kl.Dense(4, name="dense"), kl.Dense(4, name="dense_1")), "m/dense/*"),
        (numbered, "Dense_0/*"),
    ):
        pairs = complete(source, target)
        assert [(pair.source, pair.note) for pair in pairs] == [(("dense_1.*",), IN_ORDER), (("dense_2.*",), IN_ORDER)]
        assert pairs[0].target == (first,)


class Block(kl.Layer):
    def __init__(self):
        super().__init__()
        self.fc = kl.Dense(4, name="fc")

    def call(self, x):
        return self.fc(x)


class Named(linen.Module):
    def setup(self):
        self.dense, self.dense_1 = linen.Dense(4), linen.Dense(4)

    def __call__(self, x):
        return self.dense(self.dense_1(x))


def test_numbers_of_what_contains_a_layer_are_no_names_and_those_that_somebody_gave_are():
    source = torch_named(**{f"block_{i}": nn.ModuleDict({"fc": nn.Linear(4, 4)}) for i in (1, 2, 3)})
    pairs = complete(source, keras_named(Block(), Block(), Block()))
    assert [(pair.source, pair.note) for pair in pairs] == [((f"block_{i}.fc.*",), IN_ORDER) for i in (1, 2, 3)]
    x = np.zeros((1, 4), np.float32)
    named = linen_inventory(Named(), Named().init(jax.random.key(0), x)["params"], None, (x,))
    pairs = complete(torch_named(dense=nn.Linear(4, 4), dense_1=nn.Linear(4, 4)), named)
    assert {(pair.source, pair.target, pair.note) for pair in pairs} == {
        (("dense.*",), ("dense/*",), ""),
        (("dense_1.*",), ("dense_1/*",), ""),
    }


def uncounted():
    layer = nn.BatchNorm1d(4)
    layer.num_batches_tracked = None  # which the way back would make
    return layer


@pytest.mark.parametrize(
    ("torch_layer", "keras_layer", "shape", "why"),
    [
        (lambda: nn.Linear(4, 5), lambda: kl.Dense(6), (4,), "would be bias (5,), kernel (4, 5), and is bias (6,), "),
        (lambda: nn.Linear(4, 5), lambda: kl.Dense(5, use_bias=False), (4,), "and is kernel (4, 5)"),
        (lambda: nn.Linear(4, 5), lambda: kl.Dense(5, trainable=False), (4,), "one model's optimizer has bias, kernel"),
        (lambda: nn.Linear(4, 5), lambda: kl.Conv1D(5, 1), (3, 4), "nothing of its kind"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False), kl.BatchNormalization, (4,), "moving_mean (4,) frozen"),
        (uncounted, kl.BatchNormalization, (4,), "num_batches_tracked () frozen, "),
    ],
)
def test_what_does_not_fit_is_shown(torch_layer, keras_layer, shape, why):
    found = propose(torch_named(one=torch_layer()), keras_named(keras_layer(), shape=shape))
    assert found.map.pairs == ()
    ((layer, text),) = found.unmatched_source
    assert layer.path == "one"
    assert why in text
    ((_, text),) = found.unmatched_target
    assert why in text


def test_other_heads_are_another_layer():
    heads = [eqx.nn.MultiheadAttention(n, 8, key=KEY) for n in (2, 4)]
    source = torch_named(attention=nn.MultiheadAttention(8, 2, bias=False))
    assert propose(source, equinox_of({"attention": heads[0]})).map.pairs[0].sizes == {"heads": 2}
    found = propose(source, equinox_of({"attention": heads[1]}))
    assert found.map.pairs == ()
    assert "one has {'heads': 2}, the other {'heads': 4}" in found.unmatched_source[0].why


# ------------------------------------------------------------------------------------------------ inventories


def nnx_one(layer, *args, **kw):
    return nnx_of(nnx.Dict(one=layer(*args, **kw, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("source", "target", "row", "sizes"),
    [
        (
            lambda: torch_named(one=nn.ConvTranspose2d(4, 4, 3)),
            lambda: nnx_one(nnx.ConvTranspose, 4, 4, (3, 3)),
            *("conv_transpose", {}),
        ),
        (  # the same shapes
            lambda: torch_named(one=nn.ConvTranspose2d(4, 4, 3)),
            lambda: linen_of(linen.ConvTranspose(4, (3, 3), transpose_kernel=True), jnp.zeros((2, 8, 8, 4))),
            *("conv_transpose_kernel", {}),
        ),
        (
            lambda: torch_named(one=nn.ConvTranspose2d(4, 6, 3, groups=2)),
            lambda: equinox_of([eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, key=KEY)]),
            *("conv_transpose_grouped", {"groups": 2}),
        ),
        (
            lambda: torch_named(one=nn.Conv2d(4, 8, 3, groups=4)),
            lambda: keras_named(kl.DepthwiseConv2D(3, depth_multiplier=2), shape=(8, 8, 4)),
            *("depthwise_conv", {"in": 4, "m": 2}),
        ),
        (
            lambda: torch_named(one=nn.PReLU(4)),
            lambda: keras_named(kl.PReLU(shared_axes=[1]), shape=(8, 4)),
            *("prelu", {"...": 1}),
        ),
        (
            lambda: torch_named(one=nn.Linear(8, 8, bias=False)),
            lambda: keras_named(kl.EinsumDense("ai,ihd->ahd", (2, 4)), shape=(8,)),
            *("dense_general_out", {"dim": 4, "heads": 2}),
        ),
        (  # the first and the last are both of one size
            lambda: keras_named(kl.EinsumDense("ahd,hdo->ao", (8,)), shape=(8, 2)),
            lambda: linen_of(linen.DenseGeneral(8, (-2, -1), use_bias=False), jnp.zeros((2, 8, 2))),
            *("dense_general_in", {}),
        ),
        (
            lambda: torch_named(one=nn.LayerNorm((3, 8, 8))),
            lambda: keras_named(kl.LayerNormalization((1, 2, 3)), shape=(8, 8, 3)),
            *("layer_norm_over_image", {}),
        ),
        (
            lambda: torch_named(one=nn.MultiheadAttention(8, 2, kdim=6, vdim=7)),
            lambda: equinox_of(
                [
                    eqx.nn.MultiheadAttention(
                        *(2, 8, 6, 7, 8),
                        **{f"use_{x}_bias": True for x in ("query", "key", "value", "output")},
                        key=KEY,
                    )
                ]
            ),
            *("attention_separate", {"heads": 2}),
        ),
    ],
)
def test_rows_that_class_and_shapes_leave_open(source, target, row, sizes):
    (pair,) = complete(source(), target())
    assert (pair.row, pair.sizes) == (row, sizes)


class KerasNested(keras.Model):
    """Layers in layers, whose order `_flatten_layers` turns around."""

    def __init__(self):
        super().__init__(name="outer")
        self.stem = kl.Dense(4, name="stem")
        self.body = keras.Sequential([kl.Dense(4, name="b"), kl.Dense(4, name="a"), kl.Dropout(0.5)], name="body")

    def call(self, x):
        return self.body(self.stem(x))


def test_layers_are_in_the_order_of_the_model():
    model = KerasNested()
    with pytest.raises(ValueError, match="'outer' is not built"):
        keras_inventory(model)
    model(np.zeros((2, 4)))
    found = keras_inventory(model)
    assert [x.path.rpartition("/")[2] for x in found.layers] == ["stem", "b", "a"]
    assert not [name for name in found.shapes if "seed" in name]


def test_what_the_optimizer_steps_and_what_is_no_layers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("mask", torch.ones(2, 2))
            self.linear = nn.Linear(4, 5)
            self.linear.bias.requires_grad_(False)

    found = torch_inventory(Own())
    assert found.trained == {"scale", "linear.weight"}
    assert found.layers == (
        Layer("linear", "Linear", {"weight": "linear.weight", "bias": "linear.bias"}, {}),
        Layer("scale", "Parameter", {"": "scale"}, {}),
        Layer("mask", "Parameter", {"": "mask"}, {}),
    )
    assert torch_inventory(Own(), ["scale"]).trained == {"scale"}
    with pytest.raises(ValueError, match=r"no parameters \['bias'\]"):
        torch_inventory(Own(), ["bias"])


def test_parameters_under_the_name_that_init_gives_them():
    module = LinenResidual()
    variables = jax.eval_shape(lambda: module.init(KEY, IMAGES))
    whole = linen_inventory(module, {"params": variables["params"]}, variables["batch_stats"], (IMAGES,))
    assert [(x.path, x.kind) for x in whole.layers] == [(x.path, x.kind) for x in linen_of(module, IMAGES).layers]
    assert whole.layers[1].tensors["scale"] == "params/BatchNorm_0/scale"
    assert whole.layers[1].tensors["mean"] == "BatchNorm_0/mean"


def test_no_framework_is_imported_before_it_is_needed():
    code = "import sys, adamp_conformance.port.derive\nprint([x for x in sys.argv[1:] if x in sys.modules])"
    libraries = ("torch", "keras", "tensorflow", "jax", "flax", "equinox", "haiku")
    done = subprocess.run([sys.executable, "-c", code, *libraries], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def flattening(pooled):
    pool = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), pool, nn.Flatten(), nn.Linear(4 if pooled else 16, 4))


def keras_flattening(pooled):
    inputs = keras.Input((4, 4, 1))
    x = kl.BatchNormalization()(kl.Conv2D(4, 3)(inputs))
    x = kl.GlobalAveragePooling2D()(x) if pooled else kl.Flatten()(x)
    return keras.Model(inputs, kl.Dense(4)(kl.Dense(12)(kl.Dense(4)(x))))


class LinenFlattening(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3), padding="VALID")(x)
        x = linen.BatchNorm(use_running_average=True)(x).reshape(len(x), -1)
        return linen.Dense(4)(linen.Dense(12)(linen.Dense(4)(x)))


def test_a_dense_layer_after_flattened_images_is_left_to_the_user():
    """Shapes agree, and the order of its inputs does not; dense layers after it are as elsewhere."""
    for pooled in (False, True):
        source = torch_inventory(nn.Sequential(*flattening(pooled), nn.Linear(4, 12), nn.Linear(12, 4)))
        found = propose(source, keras_inventory(keras_flattening(pooled)))
        left = [x.layer.path for x in found.unmatched_source if "after Flatten" in x.why]
        assert left == ([] if pooled else ["4"])
        assert len(found.unmatched_source) == len(left)
        assert [pair.row for pair in found.map.pairs] == ["conv", "batch_norm", *["dense"] * (2 + pooled)]
    inputs = np.zeros((1, 4, 4, 1), np.float32)
    variables = LinenFlattening().init(jax.random.key(0), inputs)
    statistics = {"batch_stats": variables["batch_stats"]}
    there = linen_inventory(LinenFlattening(), variables["params"], statistics, (inputs,))
    found = propose(keras_inventory(keras_flattening(False)), there)  # the order is the same
    assert not found.unmatched_source
    assert not found.unmatched_target


def nnx_like(**modules):
    """The same layers, channels last; NNX has no row for a norm over whole images."""
    rngs = nnx.Rngs(0)
    make = {
        nn.Conv2d: lambda x: nnx.Conv(
            *(x.in_channels, x.out_channels, x.kernel_size),
            use_bias=x.bias is not None,
            feature_group_count=x.groups,
            rngs=rngs,
        ),
        nn.ConvTranspose2d: lambda x: nnx.ConvTranspose(x.in_channels, x.out_channels, x.kernel_size, rngs=rngs),
        nn.Linear: lambda x: nnx.Linear(x.in_features, x.out_features, use_bias=x.bias is not None, rngs=rngs),
        nn.BatchNorm1d: lambda x: nnx.BatchNorm(x.num_features, rngs=rngs),
        nn.BatchNorm2d: lambda x: nnx.BatchNorm(x.num_features, rngs=rngs),
        nn.LayerNorm: lambda x: nnx.LayerNorm(*x.normalized_shape, rngs=rngs),
        nn.Embedding: lambda x: nnx.Embed(x.num_embeddings, x.embedding_dim, rngs=rngs),
        nn.MultiheadAttention: lambda x: nnx.MultiHeadAttention(x.num_heads, x.embed_dim, decode=False, rngs=rngs),
        nn.LSTM: lambda x: nnx.OptimizedLSTMCell(x.input_size, x.hidden_size, rngs=rngs),
    }
    return nnx_of(nnx.Dict({name: make[type(x)](x) for name, x in modules.items() if name != "image_norm"}))


@pytest.mark.parametrize(
    ("left", "modules"),
    [
        ("value policy", {"conv": nn.Conv2d(1, 8, 3), "value": nn.Linear(288, 1), "policy": nn.Linear(288, 4)}),
        ("head", {"conv": nn.Conv2d(1, 8, 3), "image_norm": nn.LayerNorm((8, 6, 6)), "head": nn.Linear(288, 4)}),
        ("fc", {"fc": nn.Linear(4, 32), "up": nn.ConvTranspose2d(8, 1, 2)}),
        ("head", {"conv": nn.Conv2d(32, 8, 3, bias=False), "head": nn.Linear(32, 4)}),
        ("head", {"conv": nn.Conv2d(1, 16, 3), "second": nn.Conv2d(16, 4, 3), "head": nn.Linear(16, 4)}),
        ("head", {"head": nn.Linear(288, 4), "conv": nn.Conv2d(1, 8, 3)}),
        ("rnn", {"conv": nn.Conv2d(1, 8, 3), "rnn": nn.LSTM(48, 5)}),
        ("attention", {"conv": nn.Conv2d(1, 8, 3), "attention": nn.MultiheadAttention(48, 2)}),
        ("norm head", {"conv": nn.Conv2d(1, 8, 3), "norm": nn.BatchNorm1d(32), "head": nn.Linear(32, 4)}),
        (
            "fc norm",
            {"fc": nn.Linear(4, 32, bias=False), "norm": nn.BatchNorm1d(32), "up": nn.ConvTranspose2d(8, 1, 2)},
        ),
        ("label", {"label": nn.Embedding(10, 32), "up": nn.ConvTranspose2d(8, 1, 2)}),
        (
            "mean spread fc",
            {
                **{"conv": nn.Conv2d(1, 8, 3), "mean": nn.Linear(32, 4), "spread": nn.Linear(32, 4)},
                **{"fc": nn.Linear(4, 32), "up": nn.ConvTranspose2d(8, 1, 2)},
            },
        ),
        (
            "a",
            {"conv": nn.Conv2d(1, 8, 3), "a": nn.Linear(288, 16), "b": nn.Linear(16, 32), "c": nn.Linear(32, 4)},
        ),
        (  # as many features as another layer gives
            "head",
            {
                **{"conv": nn.Conv2d(3, 64, 3), "second": nn.Conv2d(64, 16, 3)},
                **{"squeeze": nn.Linear(16, 4), "excite": nn.Linear(4, 16), "head": nn.Linear(64, 10)},
            },
        ),
        (
            "value policy out",
            {
                **{"conv": nn.Conv2d(1, 4, 3), "value": nn.Linear(64, 64), "policy": nn.Linear(64, 6)},
                "out": nn.Linear(64, 1),
            },
        ),
        (  # the count is suspicious before it is known to be, too
            "vector policy value",
            {
                **{"conv": nn.Conv2d(1, 4, 3), "vector": nn.Linear(10, 64), "policy": nn.Linear(64, 6)},
                **{"second": nn.Conv2d(4, 4, 3), "value": nn.Linear(64, 64)},
            },
        ),
        (
            "",
            {
                **{"conv": nn.Conv2d(1, 8, 3), "hidden": nn.Linear(8, 16)},
                **{"mean": nn.Linear(16, 4), "spread": nn.Linear(16, 4), "other": nn.Linear(16, 2)},
            },
        ),
        ("", {"conv": nn.Conv2d(1, 8, 3), "norm": nn.BatchNorm2d(8), "head": nn.Linear(8, 4)}),
        ("", {"conv": nn.Conv2d(1, 8, 3), "rnn": nn.LSTM(8, 5), "head": nn.Linear(5, 4)}),
        (
            "",
            {
                **{"patches": nn.Conv2d(3, 8, 4), "norm": nn.LayerNorm(8), "attention": nn.MultiheadAttention(8, 2)},
                **{"norm_out": nn.LayerNorm(8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)},
                **{"last": nn.LayerNorm(8), "head": nn.Linear(8, 4)},
            },
        ),
        (
            "",
            {
                **{"a": nn.Conv2d(1, 4, 3), "norm": nn.BatchNorm2d(4), "b": nn.Conv2d(4, 8, 3)},
                **{"up": nn.ConvTranspose2d(8, 4, 2), "both": nn.BatchNorm2d(8), "c": nn.Conv2d(8, 4, 3)},
                "out": nn.Conv2d(4, 1, 1),
            },
        ),
        (
            "",
            {
                **{"conv": nn.Conv2d(1, 8, 3), "squeeze": nn.Linear(8, 2), "excite": nn.Linear(2, 8)},
                **{"next": nn.Conv2d(8, 8, 3), "squeeze_2": nn.Conv2d(8, 2, 1), "excite_2": nn.Conv2d(2, 8, 1)},
                "head": nn.Linear(8, 4),
            },
        ),
        (
            "",
            {
                **{"stem": nn.Conv2d(3, 8, 4), "norm": nn.LayerNorm(8), "depthwise": nn.Conv2d(8, 8, 7, groups=8)},
                **{"inner": nn.LayerNorm(8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)},
                "again": nn.Conv2d(8, 8, 7, groups=8),
            },
        ),
    ],
)
def test_layers_around_which_images_may_be_flattened_or_made_are_left_to_the_user(left, modules):
    for name, x in modules.items():
        if name == "rnn":
            x.bias_hh_l0.requires_grad_(False)
    source = torch_named(**modules)
    for found in (propose(source, nnx_like(**modules)), propose(nnx_like(**modules), source)):
        for unmatched in (found.unmatched_source, found.unmatched_target):
            assert " ".join(x.layer.path for x in unmatched if x.layer.path != "image_norm") == left
            assert all("after Flatten" in x.why for x in unmatched if x.layer.path != "image_norm")
        assert len(found.map.pairs) == len(modules.keys() - {"image_norm"}) - len(left.split())


def test_a_model_of_images_without_convolutions_is_left_to_the_user_where_they_are_flattened():
    there = keras.Sequential([keras.Input((8, 8, 3)), kl.Flatten(), kl.Dense(32), kl.Dense(10)])
    dense = nn.Linear(192, 32), nn.Linear(32, 10)
    for here in (nn.Sequential(nn.Flatten(), *dense), nn.Sequential(*dense)):
        found = propose(torch_inventory(here), keras_inventory(there))
        assert ["after Flatten" in x.why for x in found.unmatched_source] == [True]
        assert [pair.source for pair in found.map.pairs] == [(f"{len(here) - 1}.*",)]
    on_vectors = keras.Sequential([keras.Input((192,)), kl.Dense(32), kl.Dense(10)])
    assert not propose(torch_inventory(nn.Sequential(*dense)), keras_inventory(on_vectors)).unmatched_source
    assert propose(torch_inventory(nn.Sequential(nn.Flatten(), *dense)), keras_inventory(on_vectors)).unmatched_source


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [kl.Flatten(), kl.Dense(32), kl.Dense(10)]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_a_subclassed_model_tells_by_its_layers_that_it_flattens():
    there = Subclassed()
    there(np.zeros((1, 8, 8, 3), np.float32))
    found = propose(torch_inventory(nn.Sequential(nn.Linear(192, 32), nn.Linear(32, 10))), keras_inventory(there))
    assert ["after Flatten" in x.why for x in found.unmatched_source] == [True]


@pytest.mark.parametrize("told", ["torch", "keras", "output"])
def test_what_makes_images_in_the_end_is_left_to_the_user(told):
    made = [nn.Unflatten(1, (3, 8, 8))] if told == "torch" else []
    here = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 192), *made)
    parts = [keras.Input((4,)), kl.Dense(32), kl.Dense(192)]
    if told != "torch":
        parts.append(kl.Reshape((8, 8, 3)))
    if told == "keras":
        parts += [kl.Flatten()]
    found = propose(torch_inventory(here), keras_inventory(keras.Sequential(parts)))
    assert [x.layer.path for x in found.unmatched_source] == ["0", "1"]  # what takes the inputs is not known, either


def test_inputs_may_be_no_arrays():
    class Switched(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.Dropout(0.5, deterministic=not train)(linen.Dense(3)(x))

    x = np.zeros((1, 4), np.float32)
    params = Switched().init(jax.random.key(0), x, False)["params"]
    assert [layer.kind for layer in linen_inventory(Switched(), params, None, (x, False)).layers] == ["Dense"]
