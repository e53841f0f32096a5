"""What Optax asks of every optimizer of `optax.contrib`: its common tests and its sharding test, restated for ours.

Each test names its source, in `optax/contrib/_common_test.py` where nothing else is said.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamp_jax

OPTIMIZERS = {
    "adamp": (adamp_jax.adamp, {"learning_rate": 1e-2}),
    "sgdp": (adamp_jax.sgdp, {"learning_rate": 1e-3, "momentum": 0.9}),
}
WRAPPERS = {
    "": lambda optimizer: optimizer,
    "mechanized": lambda optimizer: optax.contrib.mechanize(optimizer, weight_decay=0.0),
    "schedule-free": lambda optimizer: optax.contrib.schedule_free(optimizer, 1e-2),
    "on a plateau": lambda optimizer: optax.chain(optimizer, optax.contrib.reduce_on_plateau()),
}


def make(name, wrapper="", **options):
    factory, defaults = OPTIMIZERS[name]
    if wrapper == "mechanized":
        options = {"learning_rate": 1.0} | options
    return WRAPPERS[wrapper](factory(**defaults | options))


each = pytest.mark.parametrize("name", OPTIMIZERS)


# --- objectives, with where they start and where their minimum is ----------------------------------------------------


def parabola(dtype):
    minimum = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), minimum, lambda p: jnp.sum((p - minimum) ** 2)


def rosenbrock(dtype):
    return jnp.zeros(2, dtype), jnp.ones(2, dtype), lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def matrix_parabola(dtype):
    minimum = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return jnp.zeros((2, 2), dtype), minimum, lambda p: jnp.sum((p - minimum) ** 2)


def vector_and_matrix(dtype):
    minimum = jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype)

    def objective(params):
        return sum(jnp.sum((p - m) ** 2) for p, m in zip(params, minimum, strict=True))

    return jax.tree.map(jnp.zeros_like, minimum), minimum, objective


def stepping(optimizer, objective):
    @jax.jit
    def step(params, state, **extra):
        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state, params, value=value, **extra)
        return optax.apply_updates(params, updates), state

    return step


def close(got, expected, **tolerances):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.float64(x), np.float64(y), **tolerances), got, expected)


# --- the tests -------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("target", [parabola, rosenbrock, matrix_parabola, vector_and_matrix])
def test_it_converges(name, wrapper, target):
    """Source: `test_optimizers`; its number of steps and its tolerances."""
    optimizer = make(name, wrapper)
    start, minimum, objective = target(jnp.float32)
    step = stepping(optimizer, objective)
    state = optax.tree_utils.tree_map_params(optimizer, lambda x: x, optimizer.init(start))
    (params, state), _ = jax.lax.scan(lambda carry, _: (step(*carry), None), (start, state), length=30_000)
    if wrapper == "schedule-free":
        params = optax.contrib.schedule_free_eval_params(state, params)
    close(params, minimum, rtol=3e-2, atol=3e-2)


@each
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_unknown_arguments_are_accepted_and_nothing_compiles_twice(name, wrapper):
    """Source: `test_optimizers_accept_extra_args`."""
    optimizer = make(name, wrapper)
    start, _, objective = rosenbrock(jnp.float32)
    step = stepping(optimizer, objective)
    params, state = start, optimizer.init(start)
    for _ in range(3):
        params, state = step(params, state, an_argument_of_another_optimizer=1)
    assert step._cache_size() == 1


@each
def test_it_is_the_same_with_injected_hyperparameters(name):
    """Source: `test_optimizers_can_be_wrapped_in_inject_hyperparams`; its tolerances, for every number of ours.

    But `b2`: as an array of float32, `1 - b2` is off by 1e-5 (see the notes of `adamp`).
    """
    factory, options = OPTIMIZERS[name]
    injected = optax.inject_hyperparams(factory, static_args=("b2",) if name == "adamp" else ())(**options)
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    gradients = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]

    def first(optimizer):
        state = jax.jit(optimizer.init)(params)
        return jax.jit(optimizer.update)(gradients, state, params)

    updates, state = first(factory(**options))
    updates_injected, state_injected = first(injected)
    close(updates_injected, updates, rtol=1e-5)
    close(state_injected.inner_state, state, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dtype_of_updates(name, dtype):
    """Source: `test_preserve_dtype`, which wants bfloat16 for bfloat16, so that a sum of updates keeps its dtype.

    Ours are float32 there, so that the parameter is rounded once (SPEC: PREC-1); `apply_updates` keeps its dtype.
    """
    optimizer = make(name)
    params = jnp.array([1.0, 2.0], dtype)
    state = jax.jit(optimizer.init)(params)
    updates, _ = jax.jit(optimizer.update)(jax.grad(lambda x: jnp.sum(x**2))(params), state, params)
    assert updates.dtype == "float32"
    assert optax.apply_updates(params, updates).dtype == dtype


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_accumulated_gradients_do_nothing_until_their_step(name, dtype):
    """Source: `test_gradient_accumulation`."""
    optimizer = optax.MultiSteps(make(name), every_k_schedule=4)
    params = jnp.array([1.0, 2.0], dtype)
    gradient = jax.grad(lambda x: jnp.sum(x**2))(params)
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for k in range(4):
        updates, state = update(gradient, state, params)
        assert bool(jnp.any(updates != 0)) is (k == 3)


@each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_state_keeps_its_types(name, dtype):
    """Source: `test_state_shape_dtype_shard_stability`: branches of a `cond` must agree on every type."""
    with jax.enable_x64(dtype == "float64"):
        optimizer = make(name)
        start, _, objective = parabola(dtype)
        step = stepping(optimizer, objective)

        @jax.jit
        def maybe(flag, params, state):
            return jax.lax.cond(flag, lambda: step(params, state), lambda: (params, state))

        params, state = start, optimizer.init(start)
        for flag in (True, False):
            params, new = maybe(flag, params, state)
            assert params.dtype == dtype
            assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
            state = new


@each
def test_a_constant_schedule_is_the_constant(name):
    """Source: `test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such`; without its skip."""
    factory, options = OPTIMIZERS[name]
    assert inspect.signature(factory).parameters["learning_rate"].annotation == optax.ScalarOrSchedule
    start, _, objective = parabola(jnp.float32)
    results = []
    for rate in (1e-3, optax.constant_schedule(1e-3)):
        optimizer = factory(**options | {"learning_rate": rate})
        step = stepping(optimizer, objective)
        params, state = start, optimizer.init(start)
        for _ in range(10):
            params, state = step(params, state)
        results.append(params)
    close(*results, rtol=1e-6)
