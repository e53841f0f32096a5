"""AdamP and SGDP on several devices: tf.distribute, and keras.distribution on JAX, on virtual devices of the CPU.

A backend's devices are settled when it starts, so each test runs this file as a script in a process of its own.
"""

import os
import subprocess
import sys

import pytest

SCRIPTS = {
    "mirrored": {"KERAS_BACKEND": "tensorflow"},
    "data_parallel": {"KERAS_BACKEND": "jax"},
    "model_parallel": {"KERAS_BACKEND": "jax"},
}
ON_JAX = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "NPROC": "32",  # threads: with fewer than devices, collectives can wait for each other for ever
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_on_several_devices(script):
    environment = os.environ | ON_JAX | SCRIPTS[script]
    done = subprocess.run(
        [sys.executable, __file__, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["ok", script]


def optimizers():
    import adamp_tf

    return {
        "AdamP": lambda **options: adamp_tf.AdamP(0.125, weight_decay=0.25, **options),
        "SGDP": lambda **options: adamp_tf.SGDP(0.125, momentum=0.75, weight_decay=0.25, **options),
    }


def mirrored():
    """MirroredStrategy on two devices: no skew, and the step of one device on the sum of the gradients.

    optimizer_distribute_test: test_config, test_single_step, test_weight_decay, test_correctness_with_golden, test_ema,
    test_gradient_accumulation. In a function, Keras itself has no accumulation and no averages under a strategy.
    """
    import keras
    import numpy as np
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    shapes = (6, 4), (3, 3, 2, 5), (4,)

    def variables_of():
        rng = np.random.default_rng(0)
        return [keras.Variable(rng.normal(size=x), dtype="float32", name=f"v{i}") for i, x in enumerate(shapes)]

    def part(step, replica, shape):  # few bits: sums and means are exact
        return np.float32(np.random.default_rng([step, replica]).integers(-64, 64, shape) / 16)

    for make in optimizers().values():
        averages = {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2}
        for options, in_function in (
            ({}, False),
            ({}, True),
            ({"gradient_accumulation_steps": 2}, False),
            (averages, False),
        ):
            with strategy.scope():
                variables, optimizer = variables_of(), make(**options)
                optimizer.exclude_from_weight_decay(var_names=["v0"])
                optimizer.build(variables)

            def step(*gradients, optimizer=optimizer, variables=variables):
                optimizer.apply(gradients, variables)

            def step_of_all(gradients, step=step):
                strategy.run(step, args=gradients)

            run = tf.function(step_of_all) if in_function else step_of_all
            plain, alone = variables_of(), make(**options)
            alone.exclude_from_weight_decay(var_names=["v0"])
            for t in range(4):
                per_replica = [
                    strategy.experimental_distribute_values_from_function(
                        lambda context, t=t, x=x: tf.constant(part(t, context.replica_id_in_sync_group, x))
                    )
                    for x in shapes
                ]
                run(tuple(per_replica))
                alone.apply([tf.constant(part(t, 0, x) + part(t, 1, x)) for x in shapes], plain)
            for variable, wanted in zip(variables, plain, strict=True):
                one, other = (x.numpy() for x in strategy.experimental_local_results(variable.value))
                np.testing.assert_array_equal(one, other)
                np.testing.assert_allclose(one, wanted.numpy(), rtol=1e-5, atol=1e-6)
                start = variables_of()[int(variable.name[1])]
                assert np.max(np.abs(one - start.numpy())) > 0.05


def train(distribution, make):
    """A small model trained under a keras.distribution; its weights, and the optimizer."""
    import keras
    import numpy as np

    import adamp_tf

    keras.backend.clear_session()  # forgets a distribution, too
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(1)
    stack = [keras.Input((8,)), keras.layers.Dense(16, name="first"), keras.layers.Dense(8, name="second")]
    model = keras.Sequential(stack)
    model.compile(make(layouts=adamp_tf.layouts_for(model)), loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 8)).astype("float32"), rng.normal(size=(32, 8)).astype("float32")
    before = [np.array(v.value) for v in model.trainable_variables]
    model.fit(x, y, batch_size=16, epochs=4, shuffle=False, verbose=0)
    after = [np.array(v.value) for v in model.trainable_variables]
    assert all(np.max(np.abs(a - b)) > 1e-3 for a, b in zip(after, before, strict=True))
    return after, model


def compare(distribution, check):
    import numpy as np

    for make in optimizers().values():
        alone, _ = train(None, make)
        together, model = train(distribution, make)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        check(model)


def data_parallel():
    """DataParallel on eight devices: every one holds all weights and slots."""
    import keras

    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == 8

    def check(model):
        assert all(slot.value.sharding.is_fully_replicated for slot in model.optimizer.variables)
        assert len(model.optimizer.variables[-1].value.sharding.device_set) == 8

    compare(keras.distribution.DataParallel(devices=devices), check)


def model_parallel():
    """ModelParallel: kernels split by output and by input channels, and their slots as they are."""
    import keras

    devices = keras.distribution.list_devices("cpu")
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*first/kernel"] = (None, "model")
    layout_map[".*second/kernel"] = ("model", None)

    def check(model):
        for variable in model.trainable_variables:
            split = variable.value.sharding
            assert split.is_fully_replicated != ("kernel" in variable.path)
            name = variable.path.replace("/", "_")
            slots = [slot for slot in model.optimizer.variables if slot.name.startswith(name)]
            assert slots
            for slot in slots:
                assert slot.value.sharding.is_equivalent_to(split, len(slot.shape))

    compare(keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch"), check)


if __name__ == "__main__":
    {"mirrored": mirrored, "data_parallel": data_parallel, "model_parallel": model_parallel}[sys.argv[1]]()
    print("ok", sys.argv[1])
