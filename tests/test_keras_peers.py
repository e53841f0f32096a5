"""Keras's own optimizer tests, restated for AdamP and SGDP: on the backend that KERAS_BACKEND names, by the oracle.

Each test names those of keras/src/optimizers that it stands for. `test_keras_backends.py` runs them on JAX and torch.
"""

import json
import os
import pickle
from dataclasses import fields

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
from keras import ops

import adamp_tf
from adamp_conformance.adapter import State
from adamp_conformance.judge import ALGORITHMS, judge_step
from adamp_spec import Layout

BACKEND = keras.backend.backend()
LR = 0.125
OPTIMIZERS = {
    "AdamP": lambda **options: adamp_tf.AdamP(**{"learning_rate": LR} | options),
    "SGDP": lambda **options: adamp_tf.SGDP(**{"learning_rate": LR, "momentum": 0.75} | options),
}
SPELLING = {"learning_rate": "lr", "beta_1": "beta1", "beta_2": "beta2", "epsilon": "eps"}
both = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def variables_of(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [keras.Variable(rng.normal(size=shape), dtype="float32", name=f"v{i}") for i, shape in enumerate(shapes)]


def gradients_of(variables, seed=1):
    """Gradients of few bits, so that their sums, halves and multiples are exact."""
    rng = np.random.default_rng(seed)
    return [np.float32(rng.integers(-64, 64, tuple(v.shape)) / 16) for v in variables]


def value(variable):
    return np.array(ops.convert_to_numpy(variable))


def values(variables):
    return [value(variable) for variable in variables]


def apply(optimizer, gradients, variables):
    optimizer.apply([None if g is None else ops.convert_to_tensor(g) for g in gradients], variables)


def apply_stateless(optimizer, gradients, variables, stateless_apply=None):
    held = [[ops.copy(v.value) for v in group] for group in (optimizer.variables, variables)]
    gradients = [ops.convert_to_tensor(g) for g in gradients]
    new = (stateless_apply or optimizer.stateless_apply)(held[0], gradients, held[1])
    for variable, x in zip([*variables, *optimizer.variables], [*new[0], *new[1]], strict=True):
        variable.assign(x)


def state_of(optimizer, variables):
    slots = {"m": optimizer._momentums} | ({"v": optimizer._velocities} if hasattr(optimizer, "_velocities") else {})
    order = [optimizer._get_variable_index(v.value if BACKEND == "tensorflow" else v) for v in variables]
    moments = {m: {str(i): value(held[at]) for i, at in enumerate(order)} for m, held in slots.items()}
    return State(int(value(optimizer.iterations)), {str(i): value(v) for i, v in enumerate(variables)}, moments)


class Judged:
    """A step of `optimizer` on `variables` that must be the oracle's step on `gradients`, whatever Keras was given."""

    def __init__(self, optimizer, variables, gradients, **hyper):
        if not optimizer.built:
            optimizer.build(variables)
        self.optimizer, self.variables, self.hyper = optimizer, variables, hyper
        self.gradients = {str(i): gradient for i, gradient in enumerate(gradients)}

    def __enter__(self):
        self.before = state_of(self.optimizer, self.variables)

    def __exit__(self, error, *_):
        if error is None:
            algorithm = type(self.optimizer).__name__.lower()
            known = {field.name for field in fields(ALGORITHMS[algorithm].hyper)}
            config = {SPELLING.get(name, name): x for name, x in self.optimizer.get_config().items()}
            hyper = {name: x for name, x in config.items() if name in known} | self.hyper
            layouts = {str(i): Layout(-1) for i in range(len(self.variables))}
            after = state_of(self.optimizer, self.variables)
            verdict = judge_step(algorithm, hyper, layouts, self.before, self.gradients, after)
            assert verdict.conforms, verdict


# Correctness


@both
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.25, "nesterov": True}, {"delta": 0.0, "wd_ratio": 0.5}])
def test_correctness_with_golden(make, options):
    """adam_test: test_single_step, test_correctness_with_golden; the same in sgd_test."""
    variables = variables_of((10,), (6, 4), (3, 3, 2, 5), ())
    optimizer = make(**options)
    for seed in range(5):
        gradients = gradients_of(variables, seed)
        with Judged(optimizer, variables, gradients):
            apply(optimizer, gradients, variables)


@both
def test_the_judge_notices_another_gradient(make):
    variables = variables_of((6, 4))
    optimizer = make()
    with pytest.raises(AssertionError), Judged(optimizer, variables, gradients_of(variables, 1)):
        apply(optimizer, gradients_of(variables, 2), variables)


@both
def test_iterations_counter(make):
    """optimizer_test: test_iterations_counter."""
    (variable,) = variables_of((2, 2))
    optimizer = make()
    for count in range(3):
        assert value(optimizer.iterations) == count
        optimizer.apply_gradients([(ops.ones((2, 2)), variable)])


@both
def test_weight_decay(make):
    """adam_test: test_weight_decay, exclusion by name and by variable."""
    for excluded in ({}, {"var_names": ["v1"]}, {"var_list": True}):
        variables = variables_of((4, 3), (4, 3))
        optimizer = make(weight_decay=0.25)
        if "var_list" in excluded:
            excluded = {"var_list": [variables[1]]}
        optimizer.exclude_from_weight_decay(**excluded)
        optimizer.build(variables)
        gradients = gradients_of(variables)
        second = Judged(optimizer, variables[1:], gradients[1:], weight_decay=0.0 if excluded else 0.25)
        with Judged(optimizer, variables[:1], gradients[:1]), second:
            apply(optimizer, gradients, variables)


@both
def test_callable_learning_rate(make):
    """optimizer_test: test_callable_learning_rate."""
    variables = variables_of((4, 3))
    optimizer = make(learning_rate=lambda: 0.5)
    gradients = gradients_of(variables)
    with Judged(optimizer, variables, gradients, lr=0.5):
        apply(optimizer, gradients, variables)


def test_setting_the_learning_rate_to_a_schedule_untracks_its_variable():
    """optimizer_test: test_setting_lr_to_callable_untracks_lr_var."""
    optimizer = adamp_tf.AdamP(0.5)
    assert len(optimizer.variables) == 2
    optimizer.learning_rate = keras.optimizers.schedules.PolynomialDecay(0.5, 4)
    assert len(optimizer.variables) == 1


# Gradients


@both
def test_empty_gradients(make):
    """optimizer_test: test_empty_gradients."""
    variables = variables_of((4, 3), (4, 3))
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        apply(make(), [None], variables[:1])
    optimizer, before = make(), values(variables)
    optimizer.build(variables)
    gradients = gradients_of(variables)
    with pytest.warns(UserWarning, match="Gradients do not exist"), Judged(optimizer, variables[1:], gradients[1:]):
        apply(optimizer, [None, gradients[1]], variables)
    np.testing.assert_array_equal(value(variables[0]), before[0])


@both
def test_only_one_way_to_clip(make):
    """optimizer_test: test_clip_args."""
    for name in ("clipnorm", "clipvalue", "global_clipnorm"):
        assert getattr(make(**{name: 0.5}), name) == 0.5
    with pytest.raises(ValueError, match="Only one of `clipnorm`, `clipvalue` and `global_clipnorm`"):
        make(clipnorm=0.5, global_clipnorm=0.5)


@both
@pytest.mark.parametrize(
    ("clip", "scale"),
    [({"clipnorm": 2.0}, (0.5, 1)), ({"clipvalue": 1.0}, (0.5, 1)), ({"global_clipnorm": 2.5}, (0.5, 0.5))],
)
def test_clipping(make, clip, scale):
    """optimizer_test, adam_test: test_clip_norm, test_clip_value, test_global_clip_norm; norms 4, 3 and 5, exactly."""
    variables = variables_of((2, 2), (3, 3))
    gradients = [np.float32([[2, -2], [2, 2]]), np.ones((3, 3), "float32")]
    if clip != {"global_clipnorm": 2.5}:
        gradients[1] = gradients[1] / 2
    optimizer = make(**clip)
    with Judged(optimizer, variables, [np.float32(x * g) for x, g in zip(scale, gradients, strict=True)]):
        apply(optimizer, gradients, variables)


@both
def test_static_loss_scaling(make):
    """optimizer_test: test_static_loss_scaling."""
    variables = variables_of((4, 3))
    optimizer = make(loss_scale_factor=1024.0)
    assert optimizer.scale_loss(2.0) == 2048.0
    gradients = gradients_of(variables)
    with Judged(optimizer, variables, gradients):
        apply(optimizer, [1024 * g for g in gradients], variables)


@both
def test_dynamic_loss_scaling(make):
    """loss_scale_optimizer_test: test_finite_step, test_infinite_step, test_downscaling, test_upscaling."""
    variables, inner = variables_of((4, 3), (3,)), make(weight_decay=0.25)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0, dynamic_growth_steps=2)
    optimizer.build(variables)
    gradients = gradients_of(variables)
    step = apply_stateless if BACKEND == "jax" else apply  # Keras's own does no other way there
    for scale in (8, 8, 16):
        assert value(optimizer.dynamic_scale) == scale
        with Judged(inner, variables, gradients):
            step(optimizer, [scale * g for g in gradients], variables)
    before = values([*variables, *inner.variables])
    step(optimizer, [gradients[0], np.full(3, np.inf, "float32")], variables)
    for x, y in zip(before, values([*variables, *inner.variables]), strict=True):
        np.testing.assert_array_equal(x, y)
    assert value(optimizer.dynamic_scale) == 8


@both
def test_gradient_accumulation(make):
    """optimizer_test: test_gradient_accumulation, test_gradient_accumulation_with_weigth_decay."""
    variables = variables_of((4, 3), (3,))
    optimizer = make(gradient_accumulation_steps=4, weight_decay=0.25)
    optimizer.build(variables)
    for update in range(3):
        start, parts = values(variables), [gradients_of(variables, 4 * update + i) for i in range(4)]
        sums = [np.zeros_like(g) for g in parts[0]]
        for part in parts[:3]:
            apply(optimizer, part, variables)
            sums = [x + g for x, g in zip(sums, part, strict=True)]
            for held, wanted in zip(optimizer._accumulated_gradients, sums, strict=True):
                np.testing.assert_array_equal(value(held), wanted)
        for now, then in zip(values(variables), start, strict=True):
            np.testing.assert_array_equal(now, then)
        assert value(optimizer.iterations) == update
        with Judged(optimizer, variables, [(x + g) / 4 for x, g in zip(sums, parts[3], strict=True)]):
            apply(optimizer, parts[3], variables)
        assert not any(np.any(value(held)) for held in optimizer._accumulated_gradients)


@both
def test_overwrite_with_gradient(make):
    """optimizer_test: test_overwrite_with_gradient, test_overwrite_with_gradient_with_gradient_accumulation."""
    for steps in (None, 2):
        variables = variables_of((2, 3), (4, 3))
        variables[0].overwrite_with_gradient = True
        optimizer = make(gradient_accumulation_steps=steps)
        optimizer.build(variables)
        gradients, start = [np.abs(g) for g in gradients_of(variables)], value(variables[0])  # of two, the maximum
        if steps:
            apply(optimizer, gradients, variables)
            np.testing.assert_array_equal(value(variables[0]), start)
        with Judged(optimizer, variables[1:], gradients[1:]):
            apply(optimizer, gradients, variables)
        np.testing.assert_array_equal(value(variables[0]), gradients[0])


def sparse_and_dense(shape, seed):
    """A gradient with three rows, one of them twice, in the backend's sparse form; torch knows none in Keras."""
    rng = np.random.default_rng(seed)
    rows, picked = np.array([4, 1, 4]), rng.normal(size=(3, *shape[1:])).astype("float32")
    dense = np.zeros(shape, "float32")
    np.add.at(dense, rows, picked)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(picked), tf.constant(rows), tf.constant(shape)), dense
    import jax.experimental.sparse

    return jax.experimental.sparse.BCOO((picked, rows[:, None]), shape=shape), dense


if BACKEND != "torch":

    @both
    @pytest.mark.parametrize("options", [{}, {"clipnorm": 1.0}, {"weight_decay": 0.25}])
    def test_sparse_gradients(make, options):
        """optimizer_sparse_test: test_sparse_correctness; adam_test: test_clipnorm_indexed_slices."""
        sparse, dense, optimizers = variables_of((5, 3, 2)), variables_of((5, 3, 2)), (make(**options), make(**options))
        for seed in range(5):
            gradient, same = sparse_and_dense((5, 3, 2), seed)
            optimizers[0].apply([gradient], sparse)
            apply(optimizers[1], [same], dense)
            np.testing.assert_array_equal(value(sparse[0]), value(dense[0]))


# Averages, constraints


@both
def test_ema(make):
    """optimizer_test: test_ema; adam_test: test_ema, test_ema_overwrite_frequency."""
    variables, plain = variables_of((4, 3)), variables_of((4, 3))
    averaged = make(use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=3)
    free = make()
    average = None
    for step in range(1, 4):
        gradients = gradients_of(variables, step)
        apply(averaged, gradients, variables)
        apply(free, gradients, plain)
        now = value(plain[0])
        average = now if average is None else 0.75 * average + 0.25 * now
        np.testing.assert_allclose(value(averaged._model_variables_moving_average[0]), average, rtol=1e-6)
        np.testing.assert_allclose(value(variables[0]), average if step == 3 else now, rtol=1e-6)


@both
def test_ema_with_model_fit(make):
    """optimizer_test: test_ema_with_model_fit."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, kernel_initializer="ones", use_bias=False)])
    model.compile(make(use_ema=True, ema_momentum=0.5), loss="mse")
    model.fit(np.ones((1, 1)), np.zeros((1, 2)), epochs=2, verbose=0)
    (average,) = model.optimizer._model_variables_moving_average
    np.testing.assert_array_equal(value(model.trainable_variables[0]), value(average))
    assert np.all(value(average) != 1)


@both
def test_constraints_are_applied(make):
    """optimizer_test: test_constraints_are_applied."""
    variables = variables_of((4, 3))
    variables[0].constraint = keras.constraints.NonNeg()
    apply(make(), [np.zeros((4, 3), "float32")], variables)
    assert np.min(value(variables[0])) == 0


# Config, names, state


@both
def test_serialization(make):
    """testing/test_case: run_class_serialization_test, on an optimizer that is not built and one that is."""
    for built in (False, True):
        optimizer = make(weight_decay=0.25, epsilon=1e-5, nesterov=True, layouts={"v0": Layout(0)})
        optimizer.exclude_from_weight_decay(var_names=["v1"])
        if built:
            optimizer.build(variables_of((2, 3), (3,)))
        config = optimizer.get_config()
        revived = [
            type(optimizer).from_config(config),
            keras.saving.deserialize_keras_object(
                json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
            ),
            pickle.loads(pickle.dumps(optimizer)),  # optimizer_test: test_pickleable_optimizers
        ]
        for other in revived:
            assert json.dumps(other.get_config()) == json.dumps(config)
            assert built or set(dir(other)) == set(dir(optimizer))


def test_get_method():
    """optimizer_test: test_get_method; ours are found by their registered names."""
    for name, algorithm in {"AdamP": adamp_tf.AdamP, "SGDP": adamp_tf.SGDP}.items():
        config = {"learning_rate": 0.5, "weight_decay": 0.25}
        found = keras.optimizers.get({"class_name": f"adamp>{name}", "config": config})
        assert isinstance(found, algorithm)
        assert found.weight_decay == 0.25


def test_optimizer_auto_naming():
    """optimizer_test: test_optimizer_auto_naming."""
    keras.backend.clear_session()
    first, second, named = adamp_tf.AdamP(), adamp_tf.AdamP(), adamp_tf.SGDP(0.5, name="mine")
    assert [x.name for x in (first, second, named)] == ["adam_p", "adam_p_1", "mine"]
    assert keras.optimizers.deserialize(keras.optimizers.serialize(second)).name == "adam_p_1"
    assert keras.optimizers.deserialize(keras.optimizers.serialize(named)).name == "mine"


@both
def test_set_weights(make):
    """optimizer_test: test_set_weights."""
    variables = variables_of((2, 3))
    first, second = make(), make()
    apply(first, gradients_of(variables), variables)
    with pytest.raises(ValueError, match="not yet been built"):
        second.set_weights(first.variables)
    second.build(variables)
    second.set_weights(first.variables)
    for a, b in zip(values(first.variables), values(second.variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stateless_apply():
    """optimizer_distribute_test: test_stateless_not_supported; elsewhere, the oracle's step, compiled once on JAX."""
    variables = variables_of((4, 3), (3,))
    optimizer = adamp_tf.AdamP(LR, weight_decay=0.25)
    optimizer.build(variables)
    stateless_apply = optimizer.stateless_apply
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match="not supported with the TensorFlow backend"):
            stateless_apply(optimizer.variables, gradients_of(variables), variables)
        return
    if BACKEND == "jax":
        import jax

        stateless_apply = jax.jit(stateless_apply, donate_argnums=(0, 2))
    for seed in range(3):
        gradients = gradients_of(variables, seed)
        with Judged(optimizer, variables, gradients):
            apply_stateless(optimizer, gradients, variables, stateless_apply)
    assert BACKEND != "jax" or stateless_apply._cache_size() == 1


def test_multi_optimizer(tmp_path):
    """multi_optimizer_test: each variable's step is its optimizer's; saving and loading keeps both states."""

    def by_kind(variable):
        return adamp if len(variable.shape) > 1 else sgdp

    adamp, sgdp = adamp_tf.AdamP(LR, weight_decay=0.25), adamp_tf.SGDP(LR, momentum=0.75)
    variables = variables_of((4, 3), (3,), (5, 2))
    optimizer = keras.optimizers.MultiOptimizer(by_kind)
    optimizer.build(variables)
    kernels, vectors = variables[::2], variables[1:2]
    for seed in range(3):
        gradients = gradients_of(variables, seed)
        with Judged(adamp, kernels, gradients[::2]), Judged(sgdp, vectors, gradients[1:2]):
            apply(optimizer, gradients, variables)

    def trained():
        adamp, sgdp = adamp_tf.AdamP(LR, weight_decay=0.25), adamp_tf.SGDP(LR, momentum=0.75)
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2, name="head")])
        chosen = keras.optimizers.OptimizerMap(adamp, {".*bias": sgdp})
        model.compile(keras.optimizers.MultiOptimizer(chosen), loss="mse")
        return model

    model = trained()
    x, y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(x, y, epochs=1, verbose=0)
    state = [[*each.trainable_variables, *each.optimizer.variables] for each in (model, loaded)]
    for a, b in zip(*map(values, state), strict=True):
        np.testing.assert_array_equal(a, b)
