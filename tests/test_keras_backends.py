"""What must hold on every Keras backend: run as a script with KERAS_BACKEND set, or by pytest for all three."""

import os
import subprocess
import sys
import tempfile

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import ml_dtypes
import numpy as np

import adamp_tf
from adamp_spec import AdamPHyper, AdamPState, Bounded, Branch, Layout, SGDPHyper, SGDPState, adamp_step, sgdp_step

LR = 2.0**-7  # exact in every floatx
ADAMP = dict(beta_1=0.9, beta_2=0.99, epsilon=1e-8, weight_decay=0.1, delta=0.1, wd_ratio=0.2)
SGDP = dict(momentum=0.9, dampening=0.1, weight_decay=0.1, epsilon=1e-8, delta=0.1, wd_ratio=0.2)

# name: (shape, layout, the branch that its gradients are made for, per slice)
CASES = {
    "conv": ((3, 3, 2, 5), Layout(-1), [Branch.CHANNEL]),
    "dense": ((8, 6), Layout(-1), [Branch.LAYER]),
    "plain": ((8, 6), Layout(-1), [Branch.NONE]),
    "rows": ((6, 8), Layout(0), [Branch.CHANNEL]),
    "heads": ((6, 2, 3), Layout((1, 2)), [Branch.LAYER]),
    "stack": ((3, 7, 4), Layout(2, batch=0), [Branch.CHANNEL, Branch.LAYER, Branch.NONE]),
    "fused": ((12, 7), Layout(1, batch=0, view=(3, 4, 7)), [Branch.NONE, Branch.CHANNEL, Branch.LAYER]),
    "exempt": ((2, 9), Layout(channel=None), [Branch.NONE]),
    "vector": ((9,), Layout(-1), [Branch.NONE]),
    "scalar": ((), Layout(-1), [Branch.NONE]),
    "single": ((5, 6), Layout((0, 1)), [Branch.LAYER]),  # rows of one element
}


def gradient(p, layout, branches, rng):
    """A gradient that takes `branches`: orthogonal but for what keeps it out of the views before.

    For NONE one row alone is tilted, so far that its cosine is above the threshold where the mean
    over the rows is below, and the layer's is above its own threshold but below that of a row.
    """
    rows = layout.rows(p.shape)
    if not rows.projects:
        return rng.normal(size=p.shape)
    order = (*rows.batch, *rows.channel, *rows.row)
    view = np.transpose(p.astype(np.float64).reshape(rows.shape), order)
    x = view.reshape(-1, rows.count, rows.length)
    g = np.empty_like(x)
    for row, out, branch in zip(x, g, branches, strict=True):
        noise = rng.normal(size=row.shape)
        squares = np.sum(row * row, 1, keepdims=True)
        out[:] = noise - row * np.sum(noise * row, 1, keepdims=True) / squares
        if branch == Branch.LAYER:  # each row along the parameter, the sum over the rows zero
            sign = np.where(np.arange(rows.count) % 2, -1.0, 1.0)[:, None] / squares
            out += sign * row - row * np.sum(sign * squares) / np.sum(squares)
        elif branch == Branch.NONE:
            i = np.argmax(np.linalg.norm(row, axis=1) * np.linalg.norm(out, axis=1))
            tilt = ADAMP["delta"] / rows.length**0.5 * rows.count**0.75
            out[i] += tilt * np.linalg.norm(out[i]) / np.linalg.norm(row[i]) * row[i]
    return np.transpose(g.reshape(view.shape), np.argsort(order)).reshape(p.shape)


def numpy(variable):
    """Its value, in its own dtype (torch's bfloat16 comes out of Keras as float32)."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return variable.numpy().astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def margin(got, expected):
    """How much of the derived error bound is used up; conforming if at most 1."""
    off = np.abs(got.astype(expected.value.dtype) - expected.value)
    return np.max(np.where(off == 0, 0.0, off / np.maximum(expected.error, np.finfo(expected.value.dtype).tiny)))


def stepper(optimizer, variables):
    """One step of a built optimizer; on JAX as its trainer takes it, compiled."""
    if keras.backend.backend() != "jax":
        return lambda grads: optimizer.apply(grads, variables)
    import jax

    compiled = jax.jit(optimizer.stateless_apply)

    def step(grads):
        everything = [*variables, *optimizer.variables]
        new = compiled([v.value for v in optimizer.variables], grads, [v.value for v in variables])
        for variable, value in zip(everything, [*new[0], *new[1]], strict=True):
            variable.assign(value)

    return step


def check_oracle(algorithm, dtype, **options):
    """Three steps, each judged by the oracle's error bounds from the optimizer's own state before it."""
    rng = np.random.default_rng(7)
    layouts = {f"{name}_{dtype}": layout for name, (_, layout, _) in CASES.items()}
    variables = [
        keras.Variable(rng.normal(size=shape), dtype=dtype, name=f"{name}_{dtype}")
        for name, (shape, _, _) in CASES.items()
    ]
    settings = (ADAMP if algorithm == "AdamP" else SGDP) | options
    optimizer = getattr(adamp_tf, algorithm)(LR, **settings, layouts=layouts)
    optimizer.build(variables)
    apply = stepper(optimizer, variables)
    names = {"beta_1": "beta1", "beta_2": "beta2", "epsilon": "eps"}
    spelled = {names.get(name, name): value for name, value in settings.items()}
    hyper = (AdamPHyper if algorithm == "AdamP" else SGDPHyper)(lr=LR, **spelled)
    slots = [optimizer._momentums] + ([optimizer._velocities] if algorithm == "AdamP" else [])

    for t in range(3):
        before = [(numpy(v), *(numpy(slot[i]) for slot in slots)) for i, v in enumerate(variables)]
        wanted = list(CASES.values())
        grads = [
            gradient(p, layout, branches, rng).astype(p.dtype)
            for (p, *_), (_, layout, branches) in zip(before, wanted, strict=True)
        ]
        apply([keras.ops.convert_to_tensor(g, dtype) for g in grads])
        for i, (variable, (shape, layout, branches)) in enumerate(zip(variables, wanted, strict=True)):
            state, step = (AdamPState, adamp_step) if algorithm == "AdamP" else (SGDPState, sgdp_step)
            p, *moments = before[i]
            _, _, branch = step(p, grads[i], state(t, *moments), hyper, layout)
            assert hyper.delta == 0 or list(branch.ravel()) == branches, variable.path
            p, g, *moments = (Bounded.exact(x) for x in (p, grads[i], *moments))
            p, (_, *moments), _ = step(p, g, state(t, *moments), hyper, layout, lambda *tests, branch=branch: branch)
            got = [numpy(variable), *(numpy(slot[i]) for slot in slots)]
            assert got[0].shape == shape
            assert [x.dtype for x in got] == [before[i][0].dtype] * len(got)
            for name, value, expected in zip(("parameter", "momentum", "velocity"), got, [p, *moments], strict=False):
                assert margin(value, expected) <= 1, (variable.path, t, name)


def small_model(seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.DepthwiseConv2D(2, name="stem"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def data(seed=0, count=16):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 6, 6, 2)).astype("float32"), rng.normal(size=(count, 3)).astype("float32")


def check_resume(make):
    """fit; fit = save; fit == save; load; fit, bit for bit."""
    x, y = data()
    model = small_model()
    model.compile(make(adamp_tf.layouts_for(model)), loss="mse")
    losses = model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for each in (model, loaded):
        each.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    assert int(loaded.optimizer.iterations) == 8
    everything = ([*each.variables, *each.optimizer.variables] for each in (model, loaded))
    for a, b in zip(*everything, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b), err_msg=a.path)


def make_adamp(layouts):
    optimizer = adamp_tf.AdamP(1e-2, weight_decay=1e-2, layouts=layouts)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
    return optimizer


def make_sgdp(layouts):
    return adamp_tf.SGDP(1e-2, momentum=0.9, nesterov=True, weight_decay=1e-2, layouts=layouts)


def check_decay_exclusion():
    """By path and by variable, on whatever the backend hands to update_step."""
    layer = keras.layers.Dense(2, name="head")
    layer.build((3,))
    kernel, bias = layer.trainable_variables
    for excluded in ({"var_names": ["head/kernel"]}, {"var_names": ["^kernel"]}, {"var_list": [kernel]}):
        kernel.assign(np.ones((3, 2)))
        bias.assign(np.ones(2))
        optimizer = adamp_tf.SGDP(0.5, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(**excluded)
        optimizer.apply([keras.ops.zeros((3, 2)), keras.ops.zeros(2)], [kernel, bias])
        np.testing.assert_array_equal(numpy(kernel), np.ones((3, 2)))
        np.testing.assert_array_equal(numpy(bias), np.full(2, 0.75))


def check_everything():
    check_oracle("AdamP", "float64")
    check_oracle("AdamP", "bfloat16", nesterov=True)
    check_oracle("SGDP", "float32", project_momentum=True)
    check_decay_exclusion()
    check_resume(make_adamp)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("AdamP", {}),
        ("AdamP", {"nesterov": True, "beta_1": 0.0}),
        ("AdamP", {"delta": 0.0, "weight_decay": 0.0}),
        ("SGDP", {}),
        ("SGDP", {"project_momentum": True}),
        ("SGDP", {"momentum": 0.0, "dampening": 1.0}),
        ("SGDP", {"nesterov": True, "project_momentum": True}),
    ],
)
def test_steps_equal_the_oracle(algorithm, options, dtype):
    assert keras.backend.backend() == "tensorflow"
    check_oracle(algorithm, dtype, **options)


@pytest.mark.parametrize("make", [make_adamp, make_sgdp])
def test_training_resumes_bit_for_bit(make):
    check_resume(make)


def test_decay_exclusion():
    check_decay_exclusion()


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends(backend):
    environment = os.environ | {"KERAS_BACKEND": backend, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["ok", backend]


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("tests", ["test_keras_optimizers.py", "test_keras_peers.py"])
def test_what_holds_on_tensorflow_holds_on(backend, tests):
    environment = os.environ | {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    path = os.path.join(os.path.dirname(__file__), tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


if __name__ == "__main__":
    check_everything()
    print("ok", keras.backend.backend())
