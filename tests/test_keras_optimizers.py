"""AdamP and SGDP as Keras optimizers on any backend: all that the base class offers, and errors that change nothing."""

import json
import pickle

import keras
import numpy as np
import pytest
from keras import ops
from keras_training import assert_same, both, data, fit, grads_of, model_of, values, variables_of

import adamp_tf
from adamp_spec import Layout

# Training


@both
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_low_precision(make, dtype):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = model_of()
    finally:
        keras.config.set_dtype_policy(policy)
    losses = fit(model, make(), epochs=5)
    assert losses[-1] < losses[0]
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (dtype == "mixed_float16")


def test_learning_rates():
    def trajectory(learning_rate):
        variables = variables_of((3, 4))
        optimizer = adamp_tf.AdamP(learning_rate)
        for seed in range(3):
            optimizer.apply(grads_of(*variables, seed=seed), variables)
        return values(variables)

    constant = trajectory(0.125)
    assert_same(constant, trajectory(keras.optimizers.schedules.PiecewiseConstantDecay([100], [0.125, 1.0])))
    assert_same(constant, trajectory(lambda: 0.125))
    assert np.any(constant[0] != trajectory(keras.optimizers.schedules.ExponentialDecay(0.125, 1, 0.5))[0])


def test_learning_rate_can_be_set():
    optimizer = adamp_tf.SGDP(0.5)
    optimizer.learning_rate = 0.25
    variables = variables_of((4,))
    start = values(variables)[0]
    optimizer.apply([ops.ones(4)], variables)
    np.testing.assert_array_equal(variables[0], start - np.float32(0.25))


@both
def test_update_step_takes_a_learning_rate_as_keras_documents(make):
    """Also where Keras should no longer go through the method in which we compute what a step shares."""
    here, there = variables_of((3, 4), (5,)), variables_of((3, 4), (5,))
    gradients = grads_of(*here)
    optimizer, other = make(), make()
    optimizer.apply(gradients, here)
    other.build(there)
    for gradient, variable in zip(gradients, there, strict=True):
        other.update_step(gradient, variable, other.learning_rate)
    assert_same(values(here), values(there))


@both
def test_accumulation_is_the_mean_gradient(make):
    first, second = variables_of((3, 4), (4,)), variables_of((3, 4), (4,))
    halves, optimizer = make(gradient_accumulation_steps=2), make()
    for seed in range(0, 6, 2):
        a, b = grads_of(*first, seed=seed), grads_of(*first, seed=seed + 1)
        halves.apply(a, first)
        halves.apply(b, first)
        optimizer.apply([(x + y) / 2 for x, y in zip(a, b, strict=True)], second)
    assert_same(values(first), values(second))
    assert int(halves.iterations) == 3


@both
def test_ema(make):
    variables = variables_of((3, 4))
    optimizer = make(use_ema=True, ema_momentum=0.5)
    seen = []
    for seed in range(3):
        optimizer.apply(grads_of(*variables, seed=seed), variables)
        seen.append(values(variables)[0])
    optimizer.finalize_variable_values(variables)
    np.testing.assert_allclose(variables[0], 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2], rtol=1e-6)


@both
def test_overwrite_with_gradient(make):
    variables = variables_of((3, 4), (2,), (4,))
    variables[1].overwrite_with_gradient = True
    optimizer = make()
    for seed in range(2):
        grads = grads_of(*variables, seed=seed)
        optimizer.apply(grads, variables)
        np.testing.assert_array_equal(variables[1], grads[1])
    assert optimizer._momentums[1] is None


@both
def test_missing_gradients_leave_variable_and_slots(make):
    variables = variables_of((3, 4), (4,))
    optimizer = make()
    optimizer.apply(grads_of(*variables), variables)
    before = values([variables[0], *(v for v in optimizer.variables if "v0" in v.path)])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, ops.ones(4)], variables)
    assert_same(before, values([variables[0], *(v for v in optimizer.variables if "v0" in v.path)]))


@both
def test_empty_variable_advances_the_step(make):
    variables = variables_of((0, 3), (0,))
    optimizer = make()
    optimizer.apply(grads_of(*variables), variables)
    assert int(optimizer.iterations) == 1


def test_adamp_without_projection_is_adamw():
    """Up to where Keras puts its epsilon, and its own float32 bias correction."""
    ours, theirs = model_of(), model_of()
    fit(ours, adamp_tf.AdamP(1e-2, weight_decay=1e-2, delta=0.0))
    fit(theirs, keras.optimizers.AdamW(1e-2, weight_decay=1e-2, epsilon=1e-8))
    for a, b in zip(values(ours.trainable_variables), values(theirs.trainable_variables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@both
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_slice_stays_alone(make, poison):
    """Each slice of a batch layout decides for itself, and a lane that is not taken changes nothing."""
    results = []
    for bad in (0.0, poison):
        variables = variables_of((3, 5, 4))
        (gradient,), (p,) = values(grads_of(*variables)), values(variables)
        gradient[1] -= p[1] * np.sum(gradient[1] * p[1], 0) / np.sum(p[1] ** 2, 0)
        gradient[0, 2, 2] += bad
        make(layouts={"v0": Layout(2, batch=0)}).apply([ops.convert_to_tensor(gradient)], variables)
        results += values(variables)
    clean, poisoned = results
    np.testing.assert_array_equal(clean[1:], poisoned[1:])
    hit = np.zeros((5, 4), bool)
    hit[2, 2] = True
    np.testing.assert_array_equal(np.isfinite(poisoned[0]), ~hit)  # its slice is not projected, so no other is hit


# Config and state


@both
def test_config_round_trip(make):
    options = {"delta": 0.2, "wd_ratio": 0.3, "epsilon": 1e-7, "nesterov": True, "clipnorm": 1.0, "name": "mine"}
    options |= {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 5, "loss_scale_factor": 2.0}
    options |= {"gradient_accumulation_steps": 3, "layouts": {"kernel": Layout(0)}}
    optimizer = make(**options)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    config = json.loads(json.dumps(optimizer.get_config()))
    assert type(optimizer).from_config(config).get_config() == config
    for name, value in options.items():
        assert config[name] == ({"kernel": Layout(0).to_dict()} if name == "layouts" else value)
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    assert serialized["registered_name"] == f"adamp>{type(optimizer).__name__}"
    assert keras.saving.deserialize_keras_object(serialized).get_config() == config
    assert keras.optimizers.get(serialized).get_config() == config


def test_every_argument_is_in_the_config():
    config = adamp_tf.SGDP(0.5, 0.9, 0.25, 0.125, True, 1e-6, 0.3, 0.4, project_momentum=True).get_config()
    wanted = {"learning_rate": 0.5, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.125, "nesterov": True}
    wanted |= {"epsilon": 1e-6, "delta": 0.3, "wd_ratio": 0.4, "project_momentum": True}
    assert wanted.items() <= config.items()
    config = adamp_tf.AdamP(0.5, 0.8, 0.9, 1e-6, 0.125, 0.3, 0.4, True).get_config()
    wanted = {"learning_rate": 0.5, "beta_1": 0.8, "beta_2": 0.9, "weight_decay": 0.125, "nesterov": True}
    wanted |= {"epsilon": 1e-6, "delta": 0.3, "wd_ratio": 0.4}
    assert wanted.items() <= config.items()


def test_schedule_in_the_config():
    optimizer = adamp_tf.AdamP(keras.optimizers.schedules.CosineDecay(0.1, 10))
    config = json.loads(json.dumps(optimizer.get_config()))
    assert adamp_tf.AdamP.from_config(config).get_config() == config


@both
def test_loading_renames_variables_but_not_their_layouts(make, tmp_path):
    """A Sequential loses its prefix on loading, and layers named by Keras are counted on."""
    model = model_of()
    optimizer = make(layouts={model.layers[-1].kernel.path: Layout(0)})
    optimizer.exclude_from_weight_decay(var_list=[model.layers[0].kernel])
    fit(model, optimizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.trainable_variables] != [v.path for v in model.trainable_variables]
    assert loaded.optimizer._rows == optimizer._rows
    assert loaded.optimizer._decays == optimizer._decays == [False] + [True] * 5
    again = type(optimizer).from_config(loaded.optimizer.get_config())
    assert again.get_config() == optimizer.get_config()


@both
def test_pickle(make):
    model = model_of()
    fit(model, make())
    copy = pickle.loads(pickle.dumps(model))
    for each in (model, copy):
        x, y = data()
        each.fit(x, y, epochs=1, shuffle=False, verbose=0)
    assert_same(values(model.optimizer.variables), values(copy.optimizer.variables))
    assert_same(values(model.trainable_variables), values(copy.trainable_variables))


# Errors


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("learning_rate", -0.1, ValueError),
        ("learning_rate", float("nan"), ValueError),
        ("learning_rate", float("inf"), ValueError),
        ("learning_rate", 1, ValueError),  # Keras wants a float
        ("learning_rate", True, TypeError),
        ("beta_1", 1.0, ValueError),
        ("beta_2", -0.1, ValueError),
        ("epsilon", 0.0, ValueError),
        ("weight_decay", -1e-2, ValueError),
        ("weight_decay", None, TypeError),
        ("delta", -1.0, ValueError),
        ("wd_ratio", "0.1", TypeError),
        ("momentum", 1.0, ValueError),
        ("dampening", 1.5, ValueError),
        ("nesterov", True, ValueError),
        ("amsgrad", True, ValueError),
    ],
)
def test_wrong_hyperparameters(name, value, error):
    algorithm = adamp_tf.SGDP if name in ("momentum", "dampening", "nesterov") else adamp_tf.AdamP
    with pytest.raises(error, match=name):
        algorithm(**({"learning_rate": 0.1} | {name: value}))


def bad_gradients(variables):
    good = grads_of(*variables)
    return {
        "shape": [good[0], ops.ones((3, 2)), good[2]],
        "broadcast": [good[0], ops.ones((1,)), good[2]],
        "rank": [good[0], good[1], ops.ones(())],
        "complex": [good[0], good[1], ops.cast(good[2], "complex64")],
        "integer": [good[0], good[1], ops.ones((2, 2), "int32")],
        "too few": good[:2],
        "too many": [*good, good[0]],
    }


@both
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("kind", ["shape", "broadcast", "rank", "complex", "integer", "too few", "too many"])
def test_bad_gradients_change_nothing(make, kind, built):
    variables = variables_of((3, 4), (4,), (2, 2))
    optimizer = make()
    if built:
        optimizer.apply(grads_of(*variables), variables)
    before = values([*variables, *optimizer.variables])
    with pytest.raises((TypeError, ValueError)) as error:
        optimizer.apply(bad_gradients(variables)[kind], variables)
    assert "gradient" in str(error.value)
    assert optimizer.built == built
    assert_same(before, values([*variables, *optimizer.variables]))
    if built and "too" not in kind:
        with pytest.raises((TypeError, ValueError)):
            optimizer.apply(bad_gradients(variables)[kind])
        assert_same(before, values([*variables, *optimizer.variables]))


@both
@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_only_real_floating_point_variables(make, dtype):
    variables = [*variables_of((3, 4)), keras.Variable(np.ones((2, 2)), dtype=dtype, trainable=False, name="odd")]
    optimizer = make()
    with pytest.raises(TypeError, match=f"odd has dtype {dtype}"):
        optimizer.build(variables)
    assert not optimizer.built
    assert len(optimizer.variables) == 2


@both
def test_exclusion_after_build_is_refused(make):
    optimizer = make()
    optimizer.build(variables_of((3, 4)))
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["v0"])


@both
@pytest.mark.parametrize("shapes", [((3, 4),), ((3, 4), (5,)), ((3, 4), (4,), (4,))])
def test_foreign_state_is_refused_and_changes_nothing(make, shapes):
    variables, others = variables_of((3, 4), (4,)), variables_of(*shapes)
    optimizer, other = make(), make()
    optimizer.apply(grads_of(*variables), variables)
    other.apply(grads_of(*others), others)
    before = values(optimizer.variables)
    store: dict = {}
    other.save_own_variables(store)
    with pytest.raises(ValueError, match="belongs to another model"):
        optimizer.load_own_variables(store)
    assert_same(before, values(optimizer.variables))
    with pytest.raises(ValueError, match="belongs to another model"):
        optimizer.set_weights(values(other.variables))
    assert_same(before, values(optimizer.variables))
    optimizer.save_own_variables(store := {})
    optimizer.load_own_variables(store)
    optimizer.set_weights(before)
    assert_same(before, values(optimizer.variables))


@both
def test_weights_load_into_a_model_whose_optimizer_is_not_built(make, tmp_path):
    trained, fresh = model_of(), model_of()
    fit(trained, make())
    trained.save_weights(tmp_path / "a.weights.h5")
    fresh.compile(make(), loss="mse")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        fresh.load_weights(tmp_path / "a.weights.h5")
    assert_same(values(trained.trainable_variables), values(fresh.trainable_variables))


@pytest.mark.parametrize(
    ("attempt", "error", "words"),
    [
        (lambda: adamp_tf.AdamP(nesterov="no"), TypeError, "nesterov must be True or False"),
        (lambda: adamp_tf.SGDP(0.1, 0.9, project_momentum=1), TypeError, "project_momentum must be True or False"),
        (
            lambda: adamp_tf.AdamP().exclude_from_weight_decay(var_names="bias"),
            TypeError,
            "list of regular expressions",
        ),
        (lambda: adamp_tf.AdamP().exclude_from_weight_decay(var_names=["("]), ValueError, "not a regular expression"),
    ],
)
def test_flags_and_exclusions_are_checked(attempt, error, words):
    with pytest.raises(error, match=words):
        attempt()


def test_a_model_trained_in_mixed_float16_loads_without_the_policy(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        model.compile(adamp_tf.AdamP(0.1), loss="mse")
        model.fit(np.ones((8, 3)), np.ones((8, 4)), verbose=0)
        model.save(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_the_config_of_one_model_does_not_lay_out_another():
    dense, embedding = keras.layers.Dense(4), keras.layers.Embedding(8, 4)
    dense.build((None, 8))
    embedding.build()
    first = adamp_tf.AdamP()
    first.build([dense.kernel])
    second = adamp_tf.AdamP.from_config(first.get_config())
    second.build([embedding.embeddings])
    assert second._rows[0].channel == (0,)
