"""The Optax backend as a citizen: jit, transformations of JAX, wrappers of Optax, trees, errors."""

import functools
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.experimental.sparse import BCOO

import adamp_jax
from adamp_conformance.adapter import Parameter
from adamp_conformance.adapters.optax import OptaxAdapter
from adamp_conformance.implementations import select
from adamp_jax._layouts import path_name
from adamp_spec import Layout

MAKERS = {
    "adamp": lambda lr=0.1, **options: adamp_jax.adamp(lr, **{"weight_decay": 0.1} | options),
    "sgdp": lambda lr=0.1, **options: adamp_jax.sgdp(lr, 0.9, **{"weight_decay": 0.1} | options),
}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def tree(dtype=jnp.float32, seed=0):
    """Parameters of which `turn` is projected by `gradients`, and the others are not."""
    rng = np.random.default_rng(seed)
    shapes = {"turn": (3, 2), "grow": (4, 3), "bias": (3,)}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def gradients(params):
    a, b = params["turn"][0], params["turn"][1]
    turn = jnp.stack([b, -a, jnp.zeros_like(a)]) * jnp.asarray(0.5, a.dtype)  # orthogonal to each column
    return {"turn": turn, "grow": params["grow"] + 1, "bias": params["bias"] + 1}


def run(tx, params, steps=3, grads=gradients):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    assert step._cache_size() == 1  # one compilation for all steps
    return params, state


def same(a, b, rtol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=rtol, atol=rtol), a, b)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# JAX


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_are_stable_and_scan_equals_a_loop(make, dtype):
    tx, params = make(), tree(dtype)
    looped, state = run(tx, params)
    assert types(state) == types(tx.init(params)) == types(jax.eval_shape(tx.init, params))

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(gradients(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(body, (params, tx.init(params)), length=3)
    same(scanned, (looped, state), rtol=2 * float(jnp.finfo(dtype).eps))


@both
def test_weakly_typed_parameters_do_not_compile_twice(make):
    weak = jnp.full((3, 2), 1.0)
    assert weak.weak_type
    tx = make()
    _, state = tx.update(weak, tx.init(weak), weak)
    assert types(state) == types(tx.init(weak))


@both
def test_cond_donated_buffers_and_extra_arguments(make):
    tx, params = make(), tree()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    expected, expected_state = run(tx, params, steps=1)

    def step(params, state):
        updates, state = jax.lax.cond(
            state[0].count < 1,
            lambda: tx.update(gradients(params), state, params, value=1.0),
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
        )
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    once = jitted(jax.tree.map(jnp.copy, params), tx.init(params))
    same(jax.tree.map(np.asarray, once), (expected, expected_state), rtol=1e-6)
    twice = jitted(*jax.tree.map(jnp.copy, once))
    same(twice, once)


@both
def test_vmap_over_optimizers_equals_a_batch_axis_equals_a_loop(make):
    rng = np.random.default_rng(1)
    p = jnp.asarray(rng.standard_normal((4, 6, 5)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((4, 6, 5)), jnp.float32)
    along = jnp.sum(g * p, 1, keepdims=True) / jnp.sum(p * p, 1, keepdims=True) * p
    g = jnp.where(jnp.arange(4)[:, None, None] % 2 == 0, g - along, g)  # every other layer is projected
    each, stacked = make(layouts=Layout(1)), make(layouts=Layout(2, batch=0))

    @functools.partial(jax.jit, static_argnums=0)
    def steps(tx, p, g):
        state = tx.init(p)
        for _ in range(2):
            updates, state = tx.update(g, state, p)
        return updates

    looped = jnp.stack([steps(each, *pair) for pair in zip(p, g, strict=True)])
    same(steps(stacked, p, g), looped, rtol=1e-6)
    same(jax.vmap(lambda p, g: steps(each, p, g))(p, g), looped, rtol=1e-6)
    ignored = steps(make(layouts=Layout(2)), p, g)
    assert np.max(np.abs(ignored - looped)) > 0.01  # the batch axis matters


def test_vmap_over_hyperparameters():
    params = tree()
    grads = gradients(params)

    @jax.jit
    def update(lr, wd):
        tx = adamp_jax.adamp(lr, weight_decay=wd)
        return tx.update(grads, tx.init(params), params)[0]

    together = jax.vmap(update)(jnp.array([0.1, 0.2]), jnp.array([0.0, 0.1]))
    for i, (lr, wd) in enumerate([(0.1, 0.0), (0.2, 0.1)]):
        same(jax.tree.map(lambda x, i=i: x[i], together), update(lr, wd), rtol=1e-6)


@both
def test_explicit_sharding_keeps_the_types(make):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
        params = {"kernel": jax.device_put(jnp.ones((4, 6)), sharding)}
        tx = make()
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(params, state, params)
        assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)


# Optax


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_multi_steps(make, dtype):
    params = tree(dtype)
    grads = gradients(params)
    accumulated = optax.MultiSteps(make(), 2).gradient_transformation()
    got, state = run(accumulated, params, 4, lambda _: grads)
    expected, inner = run(make(), params, 2, lambda _: grads)
    same(got, expected, rtol=1e-6)
    same(state.inner_opt_state, inner, rtol=1e-6)


@both
def test_chain_masked_and_partition(make):
    params = tree()
    expected, _ = run(make(), params)
    clipped, _ = run(optax.chain(optax.clip(0.1), make()), params)
    same(
        clipped,
        run(make(), params, grads=lambda p: jax.tree.map(lambda g: g.clip(-0.1, 0.1), gradients(p)))[0],
        rtol=1e-6,
    )
    assert jnp.max(jnp.abs(clipped["turn"] - expected["turn"])) > 1e-3

    masked, state = run(optax.masked(make(), {"turn": True, "grow": True, "bias": False}), params, 1)
    assert state.inner_state[0][1]["bias"] == optax.MaskedNode()
    once, _ = run(make(), params, 1)
    same({**masked, "bias": 0.0}, {**once, "bias": 0.0}, rtol=1e-6)

    labels = {"turn": "a", "grow": "b", "bias": "b"}
    transforms = {"a": make(layouts={"turn": Layout(-1)}), "b": make()}
    same(run(optax.partition(transforms, labels), params)[0], expected, rtol=1e-6)
    same(run(optax.multi_transform(transforms, lambda _: labels), params)[0], expected, rtol=1e-6)


@both
def test_conditional_wrappers(make):
    """These three of Optax demand updates of the gradients' dtype: float32 gradients do for 16-bit parameters."""
    upcast = optax.stateless(lambda updates, _: jax.tree.map(lambda g: g.astype(jnp.float32), updates))
    params = tree(jnp.bfloat16)
    expected, _ = run(make(), params)
    for wrapped in (
        optax.apply_if_finite(make(), 2),
        optax.conditionally_transform(make(), lambda step: step < 3),
        optax.conditionally_mask(make(), lambda step: step < 3),
    ):
        same(run(optax.chain(upcast, wrapped), params)[0], expected, rtol=2.0**-7)
    tx = optax.apply_if_finite(make(), 2)
    params = tree()
    updates, state = tx.update(jax.tree.map(lambda p: p * jnp.nan, params), tx.init(params), params)
    same(updates, jax.tree.map(jnp.zeros_like, params))
    assert state.inner_state[0].count == 0


@pytest.mark.parametrize("static", [(), ("b1", "b2")])
def test_inject_hyperparams_adamp(static):
    options = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "delta": 0.2, "wd_ratio": 0.5}
    layouts = {"turn": Layout(1)}
    injected = optax.inject_hyperparams(adamp_jax.adamp, static_args=static)
    got, state = run(injected(0.1, **options, layouts=layouts), tree())
    assert state.hyperparams.keys() == {"learning_rate", *options} - set(static)
    expected, _ = run(adamp_jax.adamp(0.1, **options, layouts=layouts), tree())
    same(got, expected, rtol=1e-6 if static else 1e-4)  # float32 1 - b2 is off by 1e-5

    other, _ = run(injected(lambda count: 0.1 / (1 + count), weight_decay=lambda count: 0.1), tree())
    expected, _ = run(adamp_jax.adamp(lambda count: 0.1 / (1 + count), weight_decay=0.1), tree())
    same(other, expected, rtol=1e-4)


def test_inject_hyperparams_sgdp():
    options = {"momentum": 0.8, "dampening": 0.1, "eps": 1e-6, "weight_decay": 0.1, "delta": 0.2, "wd_ratio": 0.5}
    for flags in ({"nesterov": True}, {"project_momentum": True}):
        got, _ = run(optax.inject_hyperparams(adamp_jax.sgdp)(0.1, **options, **flags), tree())
        expected, _ = run(adamp_jax.sgdp(0.1, **options, **flags), tree())
        same(got, expected, rtol=1e-5)


def test_inject_hyperparams_with_16_bit_parameters():
    injected = optax.inject_hyperparams(adamp_jax.adamp, hyperparam_dtype=jnp.float32)
    got, _ = run(injected(0.1, weight_decay=0.1), tree(jnp.bfloat16))
    same(got, run(adamp_jax.adamp(0.1, weight_decay=0.1), tree(jnp.bfloat16))[0], rtol=2.0**-7)


@both
def test_schedules(make):
    constant, _ = run(make(), tree())
    scheduled, state = run(make(lambda count: 0.1, weight_decay=lambda count: 0.1), tree())
    same(scheduled, constant, rtol=1e-6)
    assert state[1].count == 3
    switched, _ = run(make(weight_decay=lambda count: jnp.where(count == 0, 0.1, 0.0)), tree(), 1)
    same(switched, run(make(), tree(), 1)[0], rtol=1e-6)  # a schedule starts at 0


@both
def test_masks_of_the_weight_decay(make):
    params = tree()
    grads = gradients(params)

    def update(**options):
        tx = make(**options)
        return tx.update(grads, tx.init(params), params)[0]

    decayed, plain = update(), update(weight_decay=0.0)
    mixed = {"turn": decayed["turn"], "grow": plain["grow"], "bias": plain["bias"]}
    mask = {"turn": True, "grow": False, "bias": np.bool_(False)}
    same(update(weight_decay_mask=mask), mixed)
    same(update(weight_decay_mask=lambda p: {name: name == "turn" for name in p}), mixed)
    same(update(weight_decay_mask=False), plain)
    same(update(weight_decay_mask=True), decayed)
    same(update(weight_decay=jnp.float32(0.1), weight_decay_mask=mask), mixed)
    assert np.max(np.abs(decayed["grow"] - plain["grow"])) > 1e-3


@both
def test_masked_hides_parameters_from_a_full_decay_mask(make):
    mask = {"turn": False, "grow": True, "bias": False}
    for hidden in ("turn", "grow"):
        tx = optax.masked(make(weight_decay_mask=mask), {name: name != hidden for name in mask})
        updates, _ = tx.update(tree(), tx.init(tree()), tree())
        whole = make(weight_decay_mask=mask)
        expected, _ = whole.update(tree(), whole.init(tree()), tree())
        for name in mask:
            np.testing.assert_array_equal(updates[name], tree()[name] if name == hidden else expected[name])


def test_mu_dtype_is_for_the_first_moment():
    tx = adamp_jax.adamp(0.1, mu_dtype="float32")
    params, state = run(tx, tree(jnp.bfloat16))
    assert {x.dtype.name for x in jax.tree.leaves(state[0].mu)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves((state[0].nu, params))} == {"bfloat16"}
    with pytest.raises(TypeError, match="mu_dtype"):
        adamp_jax.adamp(0.1, mu_dtype="int32")


@both
def test_map_params_and_get(make):
    params = tree()
    tx = make(layouts={"turn": Layout(0)})
    ones = optax.tree_utils.tree_map_params(tx, jnp.ones_like, tx.init(params))
    assert ones[0].count == 0
    assert all(leaf.min() == 1 for leaf in jax.tree.leaves(ones[0][1:]))
    assert optax.tree_utils.tree_get(ones, "count") == 0


# Trees


@both
def test_no_gradient_leaves_the_moments_alone(make):
    params = {"a": tree(), "b": jnp.ones((2, 2))}
    tx = make()
    _, state = tx.update(params, tx.init(params), params)
    partial = {"a": None, "b": jnp.ones((2, 2))}
    updates, after = tx.update(partial, state, params)
    assert updates["a"] is None
    same([moment["a"] for moment in after[0][1:]], [moment["a"] for moment in state[0][1:]])
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert np.max(np.abs(updates["b"])) > 0


class Pair(NamedTuple):
    kernel: jax.Array
    rest: list


@both
def test_any_tree_gives_the_same_update(make):
    params = tree()
    grads = gradients(params)
    tx = make()
    expected, _ = tx.update(grads, tx.init(params), params)
    for shape in (
        lambda t: Pair(t["turn"], [t["grow"], (t["bias"], None)]),
        lambda t: [t["turn"], t["grow"], t["bias"]],
    ):
        p, g = shape(params), shape(grads)
        same(tx.update(g, tx.init(p), p)[0], shape(expected))
    only, _ = tx.update(grads["turn"], tx.init(params["turn"]), params["turn"])
    same(only, expected["turn"])
    assert tx.update({}, tx.init({}), {})[0] == {}


@both
def test_an_equinox_module_of_bools_is_a_mask(make):
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    mask = jax.tree.map(lambda x: x.ndim > 1, linear)
    assert callable(mask)
    zeros = jax.tree.map(jnp.zeros_like, linear)
    tx = make(weight_decay_mask=mask)
    updates, _ = tx.update(zeros, tx.init(linear), linear)
    assert np.all(updates.bias == 0)
    assert np.all(updates.weight != 0)


@both
def test_boxed_parameters_stay_boxed(make):
    x = jnp.ones((1, 3))
    module = nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x")))
    boxed = module.init(jax.random.key(0), x)["params"]
    after, state = run(make(), boxed, 2, lambda params: params)
    assert isinstance(after["kernel"], nn.Partitioned)
    assert isinstance(state[0][1]["kernel"], nn.Partitioned)
    plain, _ = run(make(), nn.unbox(boxed), 2, lambda params: params)
    same(nn.unbox(after), plain, rtol=1e-6)


# Libraries of layers: their own loops, against `update` on a flat dict whose layouts are written out


IMAGES, TARGET = jax.random.normal(jax.random.key(1), (8, 6, 6, 2)), jax.random.normal(jax.random.key(2), (8, 3))


def normalized(x, axes=0):
    """Makes the weights before it scale-invariant, so that they are projected."""
    return (x - jnp.mean(x, axes, keepdims=True)) / jnp.std(x, axes, keepdims=True)


def pooled(x, channel=-1):
    rest = tuple({0, 1, 2, 3} - {channel % 4})
    return jnp.mean(jax.nn.relu(normalized(x, rest)), rest[1:])


def loss(y):
    return jnp.sum((normalized(y) - TARGET) ** 2)


def flax_linen(make, steps):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(pooled(nn.Conv(4, (3, 3))(x)))

    net = Net()
    params = net.init(jax.random.key(0), IMAGES)["params"]
    trained = TrainState.create(apply_fn=net.apply, params=params, tx=make())

    @jax.jit
    def step(trained):
        return trained.apply_gradients(grads=grad(trained.params))

    def grad(params):
        return jax.grad(lambda p: loss(net.apply({"params": p}, IMAGES)))(params)

    for _ in range(steps):
        trained = step(trained)
    return params, trained.params, grad


def flax_nnx(make, steps):
    class Net(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0))
            self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.dense(pooled(self.conv(x)))

    net = Net()
    graph, params = nnx.split(net)
    params = jax.tree.map(jnp.copy, params)
    optimizer = nnx.Optimizer(net, make(), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(lambda m: loss(m(IMAGES)))(net))

    for _ in range(steps):
        step(net, optimizer)
    return params, nnx.state(net), jax.grad(lambda p: loss(nnx.merge(graph, p)(IMAGES)))


def equinox(make, steps):
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        dense: eqx.nn.Linear

        def __call__(self, x):
            return jax.vmap(self.dense)(pooled(jax.vmap(self.conv)(jnp.moveaxis(x, -1, 1)), channel=1))

    keys = jax.random.split(jax.random.key(0))
    net = Net(eqx.nn.Conv2d(2, 4, 3, key=keys[0]), eqx.nn.Linear(4, 3, key=keys[1]))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    optimizer = make()
    state = optimizer.init(params)

    @eqx.filter_jit
    def step(net, state):
        grads = eqx.filter_grad(lambda m: loss(m(IMAGES)))(net)
        updates, state = optimizer.update(grads, state, eqx.filter(net, eqx.is_inexact_array))
        return eqx.apply_updates(net, updates), state

    for _ in range(steps):
        net, state = step(net, state)
    after = eqx.filter(net, eqx.is_inexact_array)
    return params, after, jax.grad(lambda p: loss(eqx.combine(p, static)(IMAGES)))


def haiku(make, steps):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(pooled(hk.Conv2D(4, 3)(x)))))
    params = net.init(jax.random.key(0), IMAGES)
    grad = jax.grad(lambda p: loss(net.apply(p, IMAGES)))
    after, _ = run(make(), params, steps, grad)
    return params, after, grad


@both
@pytest.mark.parametrize(
    ("train", "layouts"),
    [
        (flax_linen, {"Conv_0/kernel": Layout(3), "Dense_0/kernel": Layout(1)}),
        (flax_nnx, {"conv/kernel": Layout(3), "dense/kernel": Layout(1)}),
        (equinox, {"conv/weight": Layout(0), "conv/bias": Layout(None), "dense/weight": Layout(0)}),
        (haiku, {"conv2_d/w": Layout(3), "linear/w": Layout(1)}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_library_in_its_own_loop_takes_the_same_steps(make, train, layouts):
    def by_path(params):
        return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    small = functools.partial(make, lr=0.01)
    params, after, grad = train(small, 3)
    structure, names = jax.tree.structure(params), list(by_path(params))

    def steps(layouts):
        def gradient(flat):
            return by_path(grad(structure.unflatten([flat[name] for name in names])))

        return run(small(layouts=layouts), by_path(params), 3, gradient)[0]

    expected, unprojected = steps(layouts), steps(dict.fromkeys(layouts, Layout(None)))
    same(by_path(after), expected, rtol=1e-5)
    for name in layouts.keys() - {"conv/bias"}:
        assert jnp.max(jnp.abs(expected[name] - unprojected[name])) > 1e-4


@both
def test_an_orbax_checkpoint_goes_on_bit_for_bit(make, tmp_path):
    tx = make()
    params, state = run(tx, tree(), 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: (params, state)))
        shapeless = checkpointer.restore(tmp_path / "checkpoint")
    same(restored, (params, state))
    update = jax.jit(tx.update)
    same(update(gradients(restored[0]), restored[1], restored[0]), update(gradients(params), state, params))
    with pytest.raises(TypeError, match=r"state must be the ScaleBy\w+State .*restore a checkpoint into it"):
        tx.update(gradients(params), shapeless[1], params)  # NamedTuples have become dicts


# Errors


@both
def test_parameters_are_needed(make):
    tx = make()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(tree(), tx.init(tree()))


@both
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (jnp.ones(3, jnp.complex64), TypeError, r"'z' is complex.*split_real_and_imaginary"),
        (jnp.ones(3, jnp.int32), TypeError, r"'z' is int32"),
        (jnp.ones(3, bool), TypeError, r"'z' is bool"),
    ],
)
def test_only_real_floats(make, bad, error, message):
    tx = make()
    with pytest.raises(error, match=f"parameter {message}"):
        tx.init({"a": jnp.ones(3), "z": bad})
    params = {"a": jnp.ones(3), "z": jnp.ones(3)}
    with pytest.raises(error, match=f"gradient of {message}"):
        jax.jit(tx.update)({"a": jnp.ones(3), "z": bad}, tx.init(params), params)


@both
def test_sparse_gradients_are_refused(make):
    tx = make()
    params = {"a": jnp.ones(3), "z": jnp.ones((2, 3))}
    with pytest.raises(TypeError, match=r"gradient of 'z' is sparse \(BCOO\); make it dense"):
        tx.update({**params, "z": BCOO.fromdense(params["z"])}, tx.init(params), params)


@both
def test_shapes_must_agree(make):
    tx = make()
    params = {"a": jnp.ones((2, 3)), "z": jnp.ones((3, 2))}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"'z' has shape \(3, 2\) but its gradient has shape \(2,\)"):
        tx.update({"a": params["a"], "z": jnp.ones(2)}, state, params)  # would broadcast
    with pytest.raises(ValueError, match=r"'z' has shape \(3, 2\) but its state has shape \(2, 3\)"):
        tx.update(params, tx.init({"a": params["a"], "z": jnp.ones((2, 3))}), params)
    with pytest.raises(ValueError, match="gradient at 'z'"):
        tx.update(params, tx.init({**params, "z": None}), {**params, "z": None})


@both
def test_a_state_of_something_else_is_refused(make):
    params = tree()
    tx = make()
    with pytest.raises(TypeError, match="got ScaleByAdamState; start from init"):
        tx.update(params, optax.adam(0.1).init(params), params)
    for other in ({"turn": params["turn"]}, list(params.values())):
        with pytest.raises(ValueError, match=r"state is not a tree like the updates; .*the same parameters"):
            tx.update(params, tx.init(other), params)
        with pytest.raises(ValueError, match=r"params is not a tree like the updates"):
            tx.update(params, tx.init(params), other)


@both
def test_a_mask_or_a_gradient_that_does_not_fit_is_named(make):
    params = tree()
    with pytest.raises(ValueError, match="weight_decay_mask is a tree without a leaf for parameter 'bias'"):
        make(weight_decay_mask={"turn": True, "grow": True}).update(params, make().init(params), params)
    with pytest.raises(ValueError, match="weight_decay_mask is a tree with a leaf at 'gone'"):
        make(weight_decay_mask={**dict.fromkeys(params, True), "gone": False}).update(
            params, make().init(params), params
        )


@both
def test_complex_parameters_through_the_wrapper(make):
    tx = optax.contrib.split_real_and_imaginary(make())
    params = {"w": jnp.ones((2, 3), jnp.complex64)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.complex64


@pytest.mark.parametrize(
    ("maker", "arguments", "error", "message"),
    [
        (adamp_jax.adamp, {"learning_rate": -1.0}, ValueError, "learning_rate must be in .*got -1.0"),
        (adamp_jax.adamp, {"learning_rate": None}, TypeError, "learning_rate must be a real number"),
        (adamp_jax.adamp, {"b1": 1.0}, ValueError, "b1 must be in"),
        (adamp_jax.adamp, {"b2": np.float64(-0.1)}, ValueError, "b2 must be in"),
        (adamp_jax.adamp, {"eps": np.array(0.0)}, ValueError, "eps must be in"),
        (adamp_jax.adamp, {"eps": np.array([0.1])}, TypeError, "eps must be a real number"),
        (adamp_jax.adamp, {"weight_decay": float("nan")}, ValueError, "weight_decay must be in"),
        (adamp_jax.adamp, {"delta": "0.1"}, TypeError, "delta must be a real number"),
        (adamp_jax.adamp, {"wd_ratio": float("inf")}, ValueError, "wd_ratio must be in"),
        (adamp_jax.sgdp, {"momentum": 1.0}, ValueError, "momentum must be in"),
        (adamp_jax.sgdp, {"dampening": 1.5}, ValueError, "dampening must be in"),
        (adamp_jax.sgdp, {"nesterov": True}, ValueError, "nesterov=True needs a momentum"),
    ],
)
def test_hyperparameters_outside_their_domain(maker, arguments, error, message):
    with pytest.raises(error, match=message):
        maker(**{"learning_rate": 0.1} | arguments)


@pytest.mark.parametrize(
    ("attempt", "error", "words"),
    [
        (lambda: adamp_jax.adamp(jnp.float32(-1)), ValueError, "learning_rate must be in"),
        (lambda: adamp_jax.adamp(0.1, b1=jnp.float32(1.5)), ValueError, "b1 must be in"),
        (lambda: adamp_jax.adamp(0.1, b2=jnp.array([0.9, 0.99])), TypeError, "b2 must be one real number"),
        (lambda: adamp_jax.adamp(jnp.complex64(0.1)), TypeError, "learning_rate must be one real number"),
        (lambda: adamp_jax.sgdp(0.1, jnp.float32(0), nesterov=True), ValueError, "momentum above 0"),
        (lambda: optax.inject_hyperparams(adamp_jax.adamp)(0.1, b1=1.5).init(tree()), ValueError, "b1 must be in"),
        (lambda: adamp_jax.adamp(0.1, nesterov="no"), TypeError, "nesterov must be True or False"),
        (lambda: adamp_jax.sgdp(0.1, 0.9, project_momentum=1), TypeError, "project_momentum must be True or False"),
    ],
)
def test_arrays_and_flags_are_checked_too(attempt, error, words):
    with pytest.raises(error, match=words):
        attempt()


def test_a_decay_mask_holds_bools():
    params = tree()
    tx = adamp_jax.adamp(0.1, weight_decay=0.1, weight_decay_mask=dict.fromkeys(params, "no"))
    with pytest.raises(TypeError, match="weight_decay_mask must hold True and False"):
        tx.update(params, tx.init(params), params)


# The rows of the suite


def test_rows_of_the_suite_execute_as_they_are_named():
    parameters = {name: Parameter(np.array(x), None) for name, x in tree().items()}
    grads = {name: np.array(x) for name, x in gradients(tree()).items()}
    wide, deleted = {}, {}
    for execution in ("eager", "jit", "donated", "x64"):
        adapter = OptaxAdapter(execution)
        adapter.create("adamp", {"lr": 0.1}, parameters)
        with adapter._settings():
            wide[execution] = jax.config.jax_enable_x64
        before = [*adapter.parameters.values(), *jax.tree.leaves(adapter.state)]
        adapter.step(grads)
        deleted[execution] = {x.is_deleted() for x in before}
    assert wide == {"eager": False, "jit": False, "donated": False, "x64": True}
    assert deleted == {"eager": {False}, "jit": {False}, "donated": {True}, "x64": {False}}


def test_rows_of_the_suite_are_run_where_they_are_asked_for():
    names = [x.name for x in select(["optax"])]
    assert names == [f"optax-{x}" for x in ("eager", "jit", "donated", "x64", "sharded")]
    assert [x.name for x in select([]) if x.backend == "optax"] == names[:2]
