"""Snapshots in Keras: everything comes back, and goes through Optax and PyTorch and back without a changed bit."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
from keras import layers

import adamp_jax
import adamp_tf
import adamp_torch
from adamp_spec import AdamPHyper, Layout, SGDPHyper
from adamp_spec.snapshot import SnapshotError
from adamp_tf import load_snapshot, save_snapshot

MAKERS = {
    "adamp": lambda **options: adamp_tf.AdamP(
        **{"learning_rate": 0.01, "weight_decay": 0.1, "nesterov": True} | options
    ),
    "sgdp": lambda **options: adamp_tf.SGDP(
        **{"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.1, "project_momentum": True} | options
    ),
}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def network(optimizer, dtype="float32"):
    inputs = keras.Input((6,))
    x = layers.Dense(4, name="first", dtype=dtype)(inputs)
    x = layers.BatchNormalization(name="norm", dtype=dtype)(x)
    model = keras.Model(inputs, layers.Dense(3, name="last", dtype=dtype)(x))
    if optimizer is not None:
        optimizer.exclude_from_weight_decay(var_names=["bias$", "gamma", "beta"])
        model.compile(optimizer, "mse")
    return model


def compiled(model, optimizer):
    model.compile(optimizer, "mse")
    return model


def train(model, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(3):
        model.train_on_batch(random.standard_normal((8, 6)), random.standard_normal((8, 3)))


def everything(model):
    held = [*model.variables, *model.optimizer.variables]
    return [np.asarray(keras.ops.convert_to_numpy(x)).astype("float64") for x in held]


def same(a, b):
    return len(a) == len(b) and all(map(np.array_equal, a, b))


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stepped", [False, True])
def test_all_comes_back_bit_for_bit_and_goes_on_alike(make, dtype, stepped, tmp_path):
    model = network(make(), dtype)
    train(model)
    save_snapshot(tmp_path / "x", model)
    other = network(make(learning_rate=0.5), dtype)
    if stepped:
        train(other, seed=1)
    load_snapshot(tmp_path / "x", other)
    assert same(everything(model), everything(other))
    train(model, seed=2)
    train(other, seed=2)
    assert same(everything(model), everything(other))


class Odd(layers.Layer):
    """Variables of every dtype, some of them empty, without axes or of a size that threads share unevenly."""

    def build(self, _):
        trained = [("float32", (257, 3077)), ("bfloat16", ()), ("float16", (0, 3)), ("float64", (3, 1, 5))]
        kept = [(x, (3, 5)) for x in ("bool", "int8", "uint8", "int16", "int64", "uint32", "bfloat16")]
        for i, (dtype, shape) in enumerate(trained + kept):
            self.add_weight(name=f"w{i}", shape=shape, dtype=dtype, initializer="zeros", trainable=i < len(trained))

    def call(self, x):
        return x


def test_every_dtype_and_shape_comes_back(tmp_path):
    random = np.random.default_rng(0)
    models = []
    for _ in range(2):
        models.append(compiled(keras.Sequential([keras.Input((1,)), Odd(name="odd")], name="all"), MAKERS["adamp"]()))
        models[-1].optimizer.build(models[-1].trainable_variables)
        for variable in [*models[-1].variables, *models[-1].optimizer._momentums, *models[-1].optimizer._velocities]:
            numbers = random.integers(0, 2 if variable.dtype == "bool" else 100, variable.shape)
            variable.assign(keras.ops.cast(numbers, variable.dtype))
    assert not any(same([a], [b]) for a, b in zip(*map(everything, models), strict=True) if a.size > 1)
    save_snapshot(tmp_path / "x", models[0])
    load_snapshot(tmp_path / "x", models[1])
    assert same(*map(everything, models))


def test_an_optimizer_that_exempts_everything_from_decay(tmp_path):
    models = []
    for _ in range(2):
        optimizer = MAKERS["adamp"]()
        optimizer.exclude_from_weight_decay(var_names=["kernel", "bias", "gamma", "beta"])
        models.append(compiled(network(None), optimizer))
    train(models[0])
    save_snapshot(tmp_path / "x", models[0])
    load_snapshot(tmp_path / "x", models[1])
    assert same(*map(everything, models))


def test_random_states_stay_what_they_are(tmp_path):
    models = []
    for _ in range(2):
        stack = [keras.Input((6,)), layers.Dropout(0.5), layers.Dense(3, name="last")]
        models.append(compiled(keras.Sequential(stack, name="stack"), MAKERS["adamp"]()))
    train(models[0])
    save_snapshot(tmp_path / "x", models[0])
    load_snapshot(tmp_path / "x", models[1])
    assert same(*[[np.asarray(x) for x in model.trainable_variables] for model in models])


def test_a_forged_step_changes_nothing(tmp_path):
    model = network(MAKERS["adamp"]())
    train(model)
    save_snapshot(tmp_path / "x", model)
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data.replace(b'\\"step\\": 3', b'\\"step\\":-3'))
    assert (tmp_path / "x").read_bytes() != data
    before = everything(model)
    with pytest.raises(SnapshotError, match="-3 is no count"):
        load_snapshot(tmp_path / "x", model)
    assert same(before, everything(model))


def test_a_schedule_goes_on_from_the_step(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    model = network(MAKERS["adamp"](learning_rate=schedule))
    train(model)
    save_snapshot(tmp_path / "x", model)
    other = network(MAKERS["adamp"](learning_rate=schedule))
    load_snapshot(tmp_path / "x", other)
    assert float(other.optimizer.learning_rate) == float(model.optimizer.learning_rate) == pytest.approx(0.1 * 0.5**1.5)


@both
def test_all_three_frameworks_hand_it_on(make, tmp_path):
    """The same names in each, so that no map is needed; kernels stay (in, out), and PyTorch is told so."""
    model = network(make())
    train(model)
    save_snapshot(tmp_path / "keras", model)

    adamp = isinstance(model.optimizer, adamp_tf.AdamP)
    hyper = (
        AdamPHyper(lr=0.01, weight_decay=0.1, nesterov=True)
        if adamp
        else SGDPHyper(lr=0.01, momentum=0.9, weight_decay=0.1, project_momentum=True)
    )
    shapes = {x.path: tuple(x.shape) for x in model.trainable_variables}
    rest = {x.path: tuple(x.shape) for x in model.variables if x.path not in shapes}

    def tree(of):
        nested = {}
        for name, shape in of.items():
            layer, leaf = name.split("/")
            nested.setdefault(layer, {})[leaf] = jnp.ones(shape)
        return nested

    tx = adamp_jax.adamp(0.5) if adamp else adamp_jax.sgdp(0.5, 0.9)
    params = tree(shapes)
    given = {"weight_decay_mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params)}
    back = adamp_jax.load_snapshot(tmp_path / "keras", params, tx.init(params), others=tree(rest), **given)
    assert back.hyperparameters == hyper
    adamp_jax.save_snapshot(tmp_path / "optax", *back[:3], others=back.others, **given)

    module = torch.nn.ParameterDict({name: torch.ones(shape) for name, shape in shapes.items()})
    for name, shape in rest.items():
        module.register_buffer(name, torch.ones(shape))
    named = list(module.named_parameters())
    groups = [{"params": [x for x in named if (x[1].ndim > 1) is matrix]} for matrix in (True, False)]
    kernels = {"kernel$": Layout(-1)}
    groups[0]["layouts"] = kernels
    optimizer = adamp_torch.AdamP(groups) if adamp else adamp_torch.SGDP(groups, lr=0.5)
    adamp_torch.load_snapshot(tmp_path / "optax", module, optimizer)
    adamp_torch.save_snapshot(tmp_path / "torch", module, optimizer)

    other = network(make())
    load_snapshot(tmp_path / "torch", other)
    assert same(everything(model), everything(other))


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    make = MAKERS["adamp"]
    model = network(make())
    train(model)
    save_snapshot(tmp_path / "x", model)
    for optimizer, message in (
        (make(beta_1=0.8), r"\{'beta_1': 0.9\}: compile the model with these"),
        (make(weight_decay=0.0), "make two groups"),
        (make(layouts={"first/kernel": Layout(0)}), r"make it with layouts={.first/kernel.: Layout\(channel=-1\)}"),
        (MAKERS["sgdp"](), "make the other one"),
    ):
        other = network(optimizer)
        train(other, seed=1)
        before = everything(other)
        with pytest.raises(SnapshotError, match=message):
            load_snapshot(tmp_path / "x", other)
        assert same(before, everything(other))
    with pytest.raises(ValueError, match="not built"):
        save_snapshot(tmp_path / "y", compiled(keras.Sequential([layers.Dense(3)]), make()))
    with pytest.raises(TypeError, match="optimizer is Adam;"):
        save_snapshot(tmp_path / "y", network(keras.optimizers.Adam()))
    with pytest.raises(ValueError, match="use_ema"):
        save_snapshot(tmp_path / "y", network(make(use_ema=True)))
    assert not (tmp_path / "y").exists()
