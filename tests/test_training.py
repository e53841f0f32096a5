"""The training loops of `examples/optax` and `examples/keras`, every step of them judged.

The oracle starts each step from what the library itself holds, parameters, moments and count, and from the library's
own gradients.

The examples are run as they are; only the optimizer that they ask for is replaced by one that lets itself be watched.
Run by pytest for everything, or as a script, in a process of its own for each backend of Keras.
"""

import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from adamp_conformance.adapter import State
from adamp_conformance.judge import judge_step
from adamp_spec import Branch, Layout

EXAMPLES = Path(__file__).parent.parent / "examples"
SGDP = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}  # in place of AdamP, at ten times its learning rate
BATCHES = 22  # per epoch


def layouts_of(shapes, kernels):
    """The layout of each parameter, of which `kernels` says how the library stores weights, some by their name."""
    return {
        name: Layout(None) if np.prod(shape) == max(shape) else kernels.get(name, kernels["*"])
        for name, shape in shapes.items()
    }


class Judge:
    """Judges one step after the other of one training run."""

    def __init__(self, algorithm, kernels):
        self.algorithm, self.kernels = algorithm, kernels
        self.taken = {}

    def __call__(self, hyper, before, gradients, after):
        shapes = {name: x.shape for name, x in before.parameters.items()}
        assert gradients.keys() == shapes.keys()
        layouts = layouts_of(shapes, self.kernels)
        verdict = judge_step(self.algorithm, hyper, layouts, before, gradients, after)
        assert verdict.conforms, f"step {after.step}: {verdict.problem or verdict.place}, margin {verdict.margin:.3g}"
        for name, branches in verdict.branches.items():
            self.taken.setdefault(name, Counter()).update(Branch(branch) for branch in branches.ravel())

    def check_branches(self, steps, projected, head):
        """Mostly, weights in front of a norm were projected by channel, and the head's not at all."""
        assert {count.total() for count in self.taken.values()} == {steps}
        for name in projected:
            assert self.taken[name][Branch.CHANNEL] > 0.9 * steps, self.taken
        assert self.taken[head][Branch.NONE] > 0.9 * steps, self.taken


def run_example(name):
    """Runs it as a script; returns the accuracy that it prints."""
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return float(re.fullmatch(r"test accuracy (\d\.\d{4})\n", printed.getvalue())[1])


# --- Optax -----------------------------------------------------------------------------------------------------------

LAST, FIRST = {"*": Layout(-1)}, {"*": Layout(0)}
OPTAX = {  # how weights are stored; those in front of a norm; the one of the last layer
    "flax_nnx": (LAST, ["conv1/kernel", "conv2/kernel"], "head/kernel"),
    "flax_linen": (LAST, ["Conv_0/kernel", "Conv_1/kernel"], "Dense_0/kernel"),
    "equinox_module": (FIRST, ["convolutions/0/weight", "convolutions/1/weight"], "head/weight"),
    "haiku_transform": (LAST, ["conv2_d/w", "conv2_d_1/w"], "linear/w"),
}


def watched(transformation, seen):
    """The same transformation; `seen` gets what each update was given, as (state, gradients)."""
    import jax
    import optax

    def named(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    def note(*arrays):
        step, parameters, moments, gradients = jax.tree.map(np.array, arrays)
        seen.append((State(int(step), parameters, moments), gradients))

    def update(gradients, state, params=None, **extra):
        fields = {field: optax.tree_utils.tree_get(state, field) for field in ("count", "mu", "nu", "trace")}
        count, *moments = (x for x in fields.values() if x is not None)
        moments = dict(zip("mv", map(named, moments), strict=False))
        jax.debug.callback(note, count, named(params), moments, named(gradients), ordered=True)
        return transformation.update(gradients, state, params, **extra)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def train_with_optax(name, algorithm, **fault):
    """Runs an example with the AdamP that it asks for or SGDP in its place, perhaps with a fault, and judges its steps.

    All but the last one, as what that leaves is given to no update.

    Returns:
      The accuracy, the number of steps, and the judge.
    """
    import adamp_jax

    seen, asked = [], {}

    def make(learning_rate, **options):
        asked.update(options if algorithm == "adamp" else SGDP)
        asked["lr"] = learning_rate if algorithm == "adamp" else 10 * learning_rate
        options = {key: value for key, value in asked.items() if key != "lr"} | fault
        return watched(original[algorithm](asked["lr"], **options), seen)

    original = {"adamp": adamp_jax.adamp, "sgdp": adamp_jax.sgdp}
    with mock.patch.object(adamp_jax, "adamp", make):
        accuracy = run_example(f"optax/{name}")
    judge = Judge(algorithm, OPTAX[name][0])
    assert seen[0][0].step == 0
    for (before, gradients), (after, _) in pairwise(seen):
        judge(asked, before, gradients, after)
    return accuracy, len(seen), judge


@pytest.mark.parametrize("algorithm", ["adamp", "sgdp"])
@pytest.mark.parametrize("name", OPTAX)
def test_training_with_optax_takes_the_oracles_steps(name, algorithm):
    accuracy, steps, judge = train_with_optax(name, algorithm)
    assert accuracy > 0.9
    assert steps == 6 * BATCHES
    judge.check_branches(steps - 1, *OPTAX[name][1:])


@pytest.mark.parametrize(
    ("fault", "refused"),
    [
        ({"layouts": {"Conv": Layout(0)}}, "'Conv_0/kernel', tensor='p'"),  # the kernel's height for its channel
        ({"wd_ratio": 1.0}, "'Conv_[01]/kernel', tensor='p'"),
    ],
)
def test_a_fault_in_training_is_refused(fault, refused):
    with pytest.raises(AssertionError, match=f"^step 1: Place.parameter={refused}"):
        train_with_optax("flax_linen", "adamp", **fault)


# --- Keras -----------------------------------------------------------------------------------------------------------

KERNELS = ["stem/kernel", "spatial/kernel", "pointwise/kernel"]  # each in front of a norm
DEPTHWISE = {"spatial/kernel": Layout((2, 3))} | LAST  # (height, width, in, multiplier)


def train_with_keras(algorithm):
    """As `train_with_optax`, in `fit`; each step is judged when it has been taken, the last one too."""
    import keras

    import adamp_tf

    optimizer_class = {"adamp": adamp_tf.AdamP, "sgdp": adamp_tf.SGDP}[algorithm]
    judge = Judge(algorithm, DEPTHWISE)

    class Watched(optimizer_class):
        """Keeps the gradients of the last step in slots."""

        def build(self, variables):
            super().build(variables)
            self.seen = self.add_optimizer_variables(variables, "seen")

        def apply(self, grads, trainable_variables=None):
            for slot, gradient in zip(self.seen, grads, strict=True):
                self.assign(slot, gradient)
            super().apply(grads, trainable_variables)

    class Watch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.before = self.held()
            assert self.before.step == 0

        def on_train_batch_begin(self, batch, logs=None):
            self.lr = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

        def on_train_batch_end(self, batch, logs=None):
            after = self.held()
            judge({"lr": self.lr, **hyper}, self.before, self.arrays(self.model.optimizer.seen), after)
            self.before = after

        def held(self):
            optimizer = self.model.optimizer
            moments = {"m": self.arrays(optimizer._momentums)}
            if algorithm == "adamp":
                moments["v"] = self.arrays(optimizer._velocities)
            return State(int(optimizer.iterations), self.arrays(self.model.trainable_variables), moments)

        def arrays(self, variables):
            names = [variable.path.removeprefix(f"{self.model.name}/") for variable in self.model.trainable_variables]
            arrays = [keras.ops.convert_to_numpy(variable).copy() for variable in variables]
            return dict(zip(names, arrays, strict=True))

    def make(learning_rate, layouts, **options):
        hyper.update(options if algorithm == "adamp" else SGDP)
        return Watched(learning_rate if algorithm == "adamp" else 10 * learning_rate, layouts=layouts, **hyper)

    def fit(model, *args, callbacks, **options):
        model.optimizer.build(model.trainable_variables)
        return fit_itself(model, *args, callbacks=[*callbacks, Watch()], **options)

    hyper, fit_itself = {}, keras.Sequential.fit
    with mock.patch.object(adamp_tf, "AdamP", make), mock.patch.object(keras.Sequential, "fit", fit):
        accuracy = run_example("keras/fit")
    return accuracy, judge.taken["head/kernel"].total(), judge


def check_keras():
    """What must hold on every backend."""
    import adamp_tf

    for algorithm in ("adamp", "sgdp"):
        accuracy, steps, judge = train_with_keras(algorithm)
        assert accuracy > 0.9
        assert steps == 5 * (BATCHES + 1)
        judge.check_branches(steps, KERNELS, "head/kernel")
    with (
        mock.patch.object(adamp_tf, "layouts_for", return_value=None),  # so that paths alone decide
        pytest.raises(AssertionError, match=r"^step 1: Place.parameter='spatial/kernel', tensor='p'"),
    ):
        train_with_keras("adamp")
    assert run_example("keras/custom_loop") > 0.9


def test_every_example_is_run():
    assert {path.stem for path in (EXAMPLES / "optax").glob("*.py")} == set(OPTAX)
    assert {path.stem for path in (EXAMPLES / "keras").glob("*.py")} == {"fit", "custom_loop"}


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_training_with_keras_takes_the_oracles_steps(backend):
    # Threads gain nothing on arrays as small as these, and those of torch lose much on a machine that is busy.
    environment = os.environ | {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["ok", backend]


if __name__ == "__main__":
    check_keras()
    print("ok", os.environ["KERAS_BACKEND"])
