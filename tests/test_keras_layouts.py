"""Which axes the Keras backend takes for channels: by path, by layer class, by override."""

import json
import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import adamp_tf
from adamp_spec import AdamPHyper, AdamPState, Layout, adamp_step
from adamp_tf._layouts import named_shapes, read_table, resolve

IMAGE, VOLUME, SEQUENCE = (6, 6, 4), (5, 5, 5, 4), (6, 4)


def attention(name=None):
    x = keras.Input((5, 6))
    return keras.Model(x, layers.MultiHeadAttention(2, 3, name=name)(x, x))


def model_of(layer, shape, dtype="float32"):
    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, layer(x))


# layer class, arguments, input shape, {variable: expected channel axes, None where never projected}
LAYERS = [
    (layers.Dense, (3,), (4,), {"kernel": (1,), "bias": None}),
    (layers.Conv1D, (5, 3), SEQUENCE, {"kernel": (2,), "bias": None}),
    (layers.Conv2D, (5, 3), IMAGE, {"kernel": (3,), "bias": None}),
    (layers.Conv3D, (5, 3), VOLUME, {"kernel": (4,), "bias": None}),
    (layers.Conv1DTranspose, (5, 3), SEQUENCE, {"kernel": (2,), "bias": None}),
    (layers.Conv2DTranspose, (5, 3), IMAGE, {"kernel": (3,), "bias": None}),
    (layers.Conv3DTranspose, (5, 3), VOLUME, {"kernel": (4,), "bias": None}),
    (layers.DepthwiseConv1D, (3,), SEQUENCE, {"kernel": (1, 2), "bias": None}),
    (layers.DepthwiseConv2D, (3,), IMAGE, {"kernel": (2, 3), "bias": None}),
    (layers.SeparableConv1D, (5, 3), SEQUENCE, {"depthwise_kernel": (1, 2), "pointwise_kernel": (2,), "bias": None}),
    (layers.SeparableConv2D, (5, 3), IMAGE, {"depthwise_kernel": (2, 3), "pointwise_kernel": (3,), "bias": None}),
    (layers.Embedding, (9, 4), (5,), {"embeddings": (0,)}),
    (layers.SimpleRNN, (5,), SEQUENCE, {"kernel": (1,), "recurrent_kernel": (1,), "bias": None}),
    (layers.LSTM, (5,), SEQUENCE, {"kernel": (1,), "recurrent_kernel": (1,), "bias": None}),
    (layers.GRU, (5,), SEQUENCE, {"kernel": (1,), "recurrent_kernel": (1,), "bias": None}),
    (layers.PReLU, ("zeros", None, None, [1, 2]), IMAGE, {"alpha": None}),
    (layers.LayerNormalization, (), SEQUENCE, {"gamma": None, "beta": None}),
    (layers.BatchNormalization, (), IMAGE, {"gamma": None, "beta": None}),
]
HEADS = {
    "query/kernel": (1, 2),
    "key/kernel": (1, 2),
    "value/kernel": (1, 2),
    "attention_output/kernel": (2,),
    "query/bias": None,
    "key/bias": None,
    "value/bias": None,
    "attention_output/bias": None,
}


def channels(variables, layouts=None, levels=1):
    """Last part(s) of each path -> channel axes of its layout, None where never projected."""
    resolved = resolve(named_shapes(variables), read_table(layouts))
    rows = {path: layout.rows(shape) for path, (shape, layout, _) in resolved.items()}
    return {"/".join(path.split("/")[-levels:]): row.channel if row.projects else None for path, row in rows.items()}


@pytest.mark.parametrize(("layer", "arguments", "shape", "expected"), LAYERS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("name", [None, "stem", "depthwise_conv2d", "query"])
def test_layers(layer, arguments, shape, expected, name):
    model = model_of(layer(*arguments, name=name), shape, "int32" if layer is layers.Embedding else "float32")
    if name is None:
        assert channels(model.trainable_variables) == expected
    assert channels(model.trainable_variables, adamp_tf.layouts_for(model)) == expected


@pytest.mark.parametrize("name", [None, "stem"])
def test_multi_head_attention(name):
    model = attention(name)
    assert channels(model.trainable_variables, levels=2) == HEADS
    assert channels(model.trainable_variables, adamp_tf.layouts_for(model), levels=2) == HEADS


def test_second_layer_of_a_class_and_a_nested_model():
    x = keras.Input(IMAGE)
    inner = keras.Sequential(
        [layers.DepthwiseConv2D(2), layers.DepthwiseConv2D(2), layers.DepthwiseConv2D(2, name="dw")]
    )
    model = keras.Model(x, layers.Flatten()(inner(x)))
    by_rule = [layout.channel for _, layout, _ in resolve(named_shapes(model.trainable_variables), {}).values()]
    by_class = [layout.channel for layout in adamp_tf.layouts_for(model).values()]
    assert by_rule[::2] == [(-2, -1), (-2, -1), (-1,)]
    assert by_class == [(-2, -1)] * 3


@pytest.mark.parametrize(
    ("equation", "output", "shape", "expected"),
    [
        ("ab,bc->ac", (7,), (4,), Layout(1)),
        ("abc,cde->abde", (None, 2, 3), SEQUENCE, Layout((1, 2))),
        ("abcd,cde->abe", (None, 6), (5, 2, 3), Layout(2)),
        ("...x,yx->...y", (7,), (4,), Layout(0)),
        ("abc,bcd->abd", (6, 7), SEQUENCE, Layout(2, batch=0)),  # one matrix for each b
        ("abc,c->ab", (6,), SEQUENCE, Layout(0, view=(1, 4))),  # one unit, as PyTorch's weight (1, 4)
        ("abc,bc->ab", (6,), SEQUENCE, Layout(0, batch=1, view=(1, 6, 4))),
        ("abc,c->abc", (6, 4), SEQUENCE, Layout(0, batch=1, view=(1, 4))),
    ],
)
def test_einsum_dense(equation, output, shape, expected):
    model = model_of(layers.EinsumDense(equation, output, name="mix"), shape)
    ((path, layout),) = adamp_tf.layouts_for(model).items()
    assert (path, layout) == ("mix/kernel", expected)


@pytest.mark.skipif(not hasattr(layers, "ReversibleEmbedding"), reason="this Keras has no ReversibleEmbedding")
def test_reversible_embedding():
    model = model_of(layers.ReversibleEmbedding(9, 4, tie_weights=False), (5,), "int32")
    assert channels(model.trainable_variables, adamp_tf.layouts_for(model)) == {
        "embeddings": (0,),
        "reverse_embeddings": (1,),
    }


def test_describe():
    model = model_of(layers.Conv2D(5, 3, name="first"), IMAGE)
    lines = adamp_tf.describe(model).splitlines()
    assert lines[0].split() == ["parameter", "shape", "layout", "rows", "chosen", "by"]
    assert lines[1].startswith("first/kernel")
    assert "5 x 36" in lines[1]
    assert lines[1].endswith("default")
    assert "not projected" in lines[2]
    assert lines[2].endswith("rule '(^|/)bias$'")
    override = adamp_tf.describe(model.trainable_variables, {"first/kernel": {"channel": [-2, -1]}})
    assert "20 x 9" in override
    assert "override 'first/kernel'" in override


def test_bare_variables_are_known_by_name_and_may_share_it():
    same = [keras.Variable(np.ones(shape), name="w") for shape in ((2, 3), (4, 5), (2, 3))]
    assert adamp_tf.describe(same).count("default") == 3
    bare = [
        tf.Variable(np.ones((2, 3), "float32"), name="layer/bias"),
        tf.Variable(np.ones((2, 3), "float32"), name="w"),
    ]
    assert channels(bare) == {"bias": None, "w": (1,)}
    with pytest.raises(ValueError, match="does not exist"):
        adamp_tf.describe([keras.Variable(np.ones((2, 3, 4)), name="w"), *same], {"w": Layout(2)})


@pytest.mark.parametrize(
    ("path", "channel"),
    [
        ("vit/cls_token", 0),
        ("vit/pos_embed", 0),
        ("position_embeddings", 0),
        ("vit/token", -1),
        ("vit/pos_emb/scale", -1),
    ],
)
def test_tokens_and_positions_by_name(path, channel):
    assert resolve([(path, (1, 5, 4))], {})[path].layout == Layout(channel)


def test_layouts_for_needs_a_built_model():
    with pytest.raises(ValueError, match="not built"):
        adamp_tf.layouts_for(keras.Sequential([layers.Dense(2)]))


@pytest.mark.parametrize(
    ("layouts", "error", "message"),
    [
        ({"dense": Layout(0)}, ValueError, "match no parameter"),
        ({"b/": Layout(0), "kernel": Layout(0)}, ValueError, "several layouts keys"),
        ({"b/kernel": Layout(2)}, ValueError, "does not exist"),
        ({"b/(": Layout(0)}, ValueError, "not a regular expression"),
    ],
)
def test_wrong_layouts_are_refused_when_built(layouts, error, message):
    variables = []
    for name in "ab":
        layer = layers.Dense(2, name=name, use_bias=False)
        layer.build((3,))
        variables += layer.trainable_variables
    optimizer = adamp_tf.AdamP(layouts=layouts)
    with pytest.raises(error, match=message):
        optimizer.apply([np.ones((3, 2), "float32")] * 2, variables)
    assert not optimizer.built
    assert len(optimizer.variables) == 2  # iteration, learning rate


@pytest.mark.parametrize("value", [0, (-2, -1), {"axis": 0}, "channel"])
def test_wrong_layout_values_are_refused_at_once(value):
    with pytest.raises(TypeError):
        adamp_tf.SGDP(0.1, layouts={"kernel": value})


def test_layouts_survive_json():
    table = {"a": Layout((1, 2), batch=0), "b": Layout(None), "c": Layout(1, batch=0, view=(3, 4, 5))}
    config = json.loads(json.dumps(adamp_tf.AdamP(layouts=table).get_config()))
    assert adamp_tf.AdamP.from_config(config).get_config()["layouts"] == config["layouts"]
    assert read_table(config["layouts"]) == table
    assert adamp_tf.AdamP().get_config()["layouts"] is None


def test_kernel_height_is_not_the_channel():
    """The old TensorFlow port reads rows along axis 0 of HWIO; on a convolution that is another optimizer."""
    rng = np.random.default_rng(0)
    p = rng.normal(size=(3, 3, 4, 8))
    g = rng.normal(size=p.shape)
    g -= p * np.sum(g * p, (0, 1, 2)) / np.sum(p * p, (0, 1, 2))  # orthogonal per output channel
    layer = layers.Conv2D(8, 3, dtype="float64", use_bias=False)
    layer.build((None, 5, 5, 4))
    layer.kernel.assign(p)
    lr = 2.0**-7
    adamp_tf.AdamP(lr, weight_decay=0.1).apply([tf.constant(g)], [layer.kernel])

    def oracle(channel):
        zeros = AdamPState(0, np.zeros_like(p), np.zeros_like(p))
        return adamp_step(p, g, zeros, AdamPHyper(lr=lr, weight_decay=0.1), Layout(channel))[0]

    np.testing.assert_allclose(layer.kernel, oracle(3), rtol=1e-12)
    assert np.max(np.abs(layer.kernel - oracle(0))) > 0.1 * lr
