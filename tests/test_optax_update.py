"""The update of the Optax backend against the oracle, and its numerics."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import adamp_jax
from adamp_jax._adamp import one_minus_power
from adamp_spec import (
    AdamPHyper,
    AdamPState,
    Bounded,
    Branch,
    Layout,
    SGDPHyper,
    SGDPState,
    adamp_step,
    decide,
    sgdp_step,
)

DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# name -> shape, layout, the branch that each slice shall take
TENSORS = {
    "dense_none": ((5, 8), Layout(-1), [Branch.NONE]),
    "dense_channel": ((5, 8), Layout(-1), [Branch.CHANNEL]),
    "dense_layer": ((5, 8), Layout(-1), [Branch.LAYER]),
    "embedding": ((5, 8), Layout(0), [Branch.CHANNEL]),
    "conv": ((3, 3, 4, 6), Layout(-1), [Branch.CHANNEL]),
    "transposed": ((3, 3, 4, 6), Layout(-2), [Branch.LAYER]),
    "heads": ((6, 2, 4), Layout((-2, -1)), [Branch.CHANNEL]),
    "stack": ((3, 5, 8), Layout(2, batch=0), [Branch.CHANNEL, Branch.NONE, Branch.LAYER]),
    "view": ((12, 5), Layout(1, batch=0, view=(3, 4, 5)), [Branch.LAYER, Branch.CHANNEL, Branch.NONE]),
    "exempt": ((5, 8), Layout(None), [Branch.NONE]),
    "vectors": ((3, 5), Layout(1, batch=0), [Branch.NONE] * 3),
    "vector": ((7,), Layout(-1), [Branch.NONE]),
    "scalar": ((), Layout(-1), [Branch.NONE]),
    "empty": ((0, 4), Layout(-1), [Branch.NONE]),
}
LAYOUTS = {name: layout for name, (_, layout, _) in TENSORS.items()}

ADAMP = {
    "plain": {},
    "decay": {"weight_decay": 0.3, "delta": 0.2, "wd_ratio": 0.4},
    "nesterov": {"nesterov": True, "b1": 0.7, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.1},
    "no momentum": {"b1": 0.0, "b2": 0.0},
}
SGDP = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "delta": 0.2, "wd_ratio": 0.4},
    "nesterov": {"momentum": 0.9, "dampening": 0.2, "nesterov": True, "weight_decay": 0.1, "project_momentum": True},
    "projected momentum": {"momentum": 0.9, "weight_decay": 0.1, "project_momentum": True},
}
SPELLINGS = {"b1": "beta1", "b2": "beta2"}


def x64(enabled):
    return (jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64)(enabled)


def gradient(rng, param, layout, branches):
    """A gradient for which the projection of `param` takes the wanted branch in every slice."""
    rows = layout.rows(param.shape)
    p = np.asarray(param, np.float64).reshape(rows.shape)
    noise = rng.standard_normal(rows.shape)

    def along(x, axes):  # the part of x along p
        return p * np.sum(x * p, axis=axes, keepdims=True) / np.sum(p * p, axis=axes, keepdims=True)

    if rows.projects:
        orthogonal = noise - along(noise, rows.row)
        tilted = p * rng.standard_normal(np.sum(p, axis=rows.row, keepdims=True).shape)
        one_row = np.zeros(rows.shape)  # a single row of the slice is enough against the channel view
        one_row[tuple(0 if axis in rows.channel else slice(None) for axis in range(p.ndim))] = 0.8
        choices = [orthogonal + one_row * p, orthogonal, orthogonal + tilted - along(tilted, rows.layer)]
        noise = np.select([np.reshape(branches, rows.slices) == branch for branch in Branch], choices)
    return noise.reshape(param.shape).astype(param.dtype)


def oracle(algorithm, hyper, param, grad, state, layout, branches):
    """One step of the specification with its error bounds."""
    step = adamp_step if algorithm == "adamp" else sgdp_step
    rows = layout.rows(param.shape)
    wide = [np.asarray(x, np.float64) for x in (param, grad)]
    channel, layer = decide(*(x.reshape(rows.shape) for x in wide), hyper, rows)
    taken = np.where(channel, Branch.CHANNEL, np.where(layer, Branch.LAYER, Branch.NONE))
    assert param.size == 0 or taken.ravel().tolist() == branches  # the designed case is what it claims to be
    bounded = type(state)(state.step, *(Bounded.exact(m) for m in state[1:]))
    return step(Bounded.exact(param), Bounded.exact(grad), bounded, hyper, layout, lambda *tests: taken)[:2]


def margin(got, reference):
    """Error over bound; at most 1 for an implementation that conforms."""
    error = np.abs(np.asarray(got).astype(reference.value.dtype) - reference.value)
    return np.max(error / np.maximum(reference.error, np.finfo(np.float64).tiny), initial=0)


@pytest.mark.parametrize(
    ("algorithm", "variant", "dtype", "execution"),
    [
        *[("adamp", variant, "float32", "jit") for variant in ADAMP],
        *[("sgdp", variant, "float32", "jit") for variant in SGDP],
        *[
            ("adamp", variant, dtype, "jit")
            for variant in ("decay", "nesterov")
            for dtype in DTYPES
            if dtype != "float32"
        ],
        *[("sgdp", "projected momentum", dtype, "jit") for dtype in DTYPES if dtype != "float32"],
        ("adamp", "decay", "float32", "eager"),
        ("sgdp", "momentum", "bfloat16", "eager"),
    ],
)
def test_steps_stay_within_the_bounds_of_the_oracle(algorithm, variant, dtype, execution):
    tensors = TENSORS if execution == "jit" else {name: TENSORS[name] for name in ("dense_channel", "view", "vector")}
    rng = np.random.default_rng(0)
    make, kind = (adamp_jax.adamp, AdamPHyper) if algorithm == "adamp" else (adamp_jax.sgdp, SGDPHyper)
    options = (ADAMP if algorithm == "adamp" else SGDP)[variant]
    hyper = kind(lr=0.03, **{SPELLINGS.get(name, name): value for name, value in options.items()})
    with x64(dtype == "float64"):
        params = {
            name: np.asarray(rng.standard_normal(shape)).astype(DTYPES[dtype])
            for name, (shape, _, _) in tensors.items()
        }
        tx = make(0.03, **options, layouts={name: LAYOUTS[name] for name in tensors})
        update = jax.jit(tx.update) if execution == "jit" else tx.update
        state = tx.init(params)
        for step in range(3):
            grads = {name: gradient(rng, params[name], *tensors[name][1:]) for name in tensors}
            updates, new_state = update(grads, state, params)
            working = "float64" if dtype == "float64" else "float32"
            assert {u.dtype.name for u in jax.tree.leaves(updates)} == {working}  # PREC-6
            new_params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
            assert new_state[0].count == step + 1
            for name, (_, layout, branches) in tensors.items():
                moments = [np.asarray(tree[name]) for tree in state[0][1:]]
                before = (AdamPState if algorithm == "adamp" else SGDPState)(step, *moments)
                param, after = oracle(algorithm, hyper, params[name], grads[name], before, layout, branches)
                assert margin(new_params[name], param) <= 1, name
                for tree, moment in zip(new_state[0][1:], after[1:], strict=True):
                    assert tree[name].dtype == DTYPES[dtype]
                    assert margin(tree[name], moment) <= 1, name
            params, state = new_params, new_state


@pytest.mark.parametrize("algorithm", ["adamp", "sgdp"])
def test_delta_0_is_decoupled_weight_decay(algorithm):
    rng = np.random.default_rng(0)
    with x64(True):
        params = {"w": rng.standard_normal((4, 6)), "b": rng.standard_normal(6)}
        if algorithm == "adamp":
            ours = adamp_jax.adamp(0.01, weight_decay=0.1, delta=0.0)
            theirs = optax.adamw(0.01, weight_decay=0.1)
        else:
            ours = adamp_jax.sgdp(0.01, 0.75, weight_decay=0.1, delta=0.0)
            theirs = optax.chain(optax.trace(0.75), optax.add_decayed_weights(0.4), optax.scale(-0.01))
        results = []
        for tx in (ours, theirs):
            p, state, update = params, tx.init(params), jax.jit(tx.update)
            for k in range(20):
                grads = {name: np.cos(k + np.arange(x.size)).reshape(x.shape) for name, x in params.items()}
                updates, state = update(grads, state, p)
                p = optax.apply_updates(p, updates)
            results.append(p)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *results)


@pytest.mark.parametrize("execution", ["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("base", [0.0, 0.1, 0.5, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9995, 0.9999, 0.99999])
def test_one_minus_power_is_within_four_roundings(base, dtype, execution):
    """`-jnp.expm1(t * log(base))` fails this for base 0.999 and above."""
    t = np.unique(np.concatenate([np.arange(1, 3000), np.logspace(0, 6, 3000).astype(int)]))
    compiled = jax.jit if execution == "jit" else lambda function: function
    with x64(dtype == "float64"):
        counts = jnp.asarray(t, jnp.int32).astype(dtype)  # as `update` has them
        got = np.asarray(compiled(lambda t: one_minus_power(base, t))(counts))
        root = np.asarray(compiled(lambda t: jnp.sqrt(one_minus_power(base, t)))(counts))
        traced = np.asarray(compiled(one_minus_power)(jnp.asarray(base, dtype), counts))
    exact = -np.expm1(t * np.log(np.longdouble(base))) if base else np.ones(len(t), np.longdouble)
    unit = np.finfo(dtype).eps / 2
    assert np.max(np.abs(got / exact - 1)) <= 4 * unit
    assert np.max(np.abs(root / np.sqrt(exact) - 1)) <= 4 * unit
    # An array for a base is rounded to its type, which moves 1 - base by base / (1 - base) units.
    assert np.max(np.abs(traced / exact - 1)) <= (6 + base / (1 - base)) * unit


@pytest.mark.parametrize("execution", ["eager", "jit"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.9999), (0.9999, 0.9)])
def test_corrections_reach_an_update_of_float32(betas, execution):
    """One step of one element with g = 0: both corrections, 4 u each, and at most a dozen roundings around them."""
    steps = [1, 2, 3, 10, 100, 1000, 10_000, 100_000, 1_000_000]
    b1, b2 = (np.longdouble(b) for b in betas)
    assert not jax.config.jax_enable_x64

    def error(correction):
        worst = 0.0
        for lr, nu, eps in ((0.5, 0.0, 0.5), (0.5, 1.0, 1e-30)):
            tx = adamp_jax.adamp(lr, *betas, eps=eps)
            one = jnp.ones(1)
            (state, *rest), update = tx.init(one), jax.jit(tx.update) if execution == "jit" else tx.update
            for t in steps:
                count = jnp.asarray(t - 1, jnp.int32)
                got, _ = update(0 * one, (state._replace(count=count, mu=one, nu=nu * one), *rest), one)
                bc1, bc2 = correction(b1, t), correction(b2, t)
                exact = -lr * b1 / (np.sqrt(b2 * nu / bc2) + np.longdouble(eps)) / bc1
                worst = max(worst, abs(float(np.longdouble(got[0]) / exact - 1)))
        return worst / 2.0**-24

    assert error(lambda b, t: -np.expm1(t * np.log(b))) <= 20
    assert error(lambda b, t: np.float32(1) - np.float32(b) ** np.float32(t)) > 100  # what a float32 power is off by


@pytest.mark.parametrize("make", [adamp_jax.adamp, adamp_jax.sgdp])
def test_a_non_finite_slice_neither_projects_nor_reaches_the_others(make):
    rng = np.random.default_rng(0)
    layout = Layout(2, batch=0)
    tx = make(0.1, weight_decay=0.1, layouts=layout)

    @jax.jit
    def update(p, g):
        return tx.update(g, tx.init(p), p)[0]

    clean = rng.standard_normal((4, 5, 8)).astype(np.float32)
    grad = gradient(rng, clean, layout, [Branch.CHANNEL, Branch.LAYER, Branch.NONE, Branch.CHANNEL])
    expected = np.asarray(update(clean, grad))
    for bad in (np.nan, np.inf):
        for where in ("param", "grad"):
            p, g = clean.copy(), grad.copy()
            (p if where == "param" else g)[1, 2, 3] = bad
            got = np.asarray(update(p, g))
            np.testing.assert_array_equal(got[[0, 2, 3]], expected[[0, 2, 3]])
            assert np.sum(~np.isfinite(got[1])) <= 1  # had the slice been projected, NaN would fill a row
