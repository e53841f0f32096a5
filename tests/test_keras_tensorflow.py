"""What AdamP and SGDP do on TensorFlow alone: functions and XLA, sparse embeddings, bare variables, checkpoints."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_training import assert_same, both, fit, grads_of, model_of, values, variables_of

from adamp_spec import Layout


@both
def test_fit_is_the_same_compiled_and_not(make):
    """XLA contracts and reorders, so the same up to rounding."""
    results = []
    for options in ({"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}):
        model = model_of()
        losses = fit(model, make(), **options)
        assert losses[-1] < losses[0]
        results.append(np.concatenate([v.ravel() for v in values(model.trainable_variables)]))
    np.testing.assert_allclose(results[0], results[2], atol=3e-5)
    np.testing.assert_allclose(results[1], results[2], atol=3e-5)


@both
def test_no_retracing(make):
    variables = variables_of((3, 4), (4,))
    optimizer = make()
    optimizer.build(variables)
    traces = []

    @tf.function
    def step(*grads):
        traces.append(1)
        optimizer.apply(grads, variables)

    for seed in range(3):
        step(*grads_of(*variables, seed=seed))
    assert len(traces) == 1
    assert int(optimizer.iterations) == 3


@both
@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}, {"jit_compile": False}])
def test_embedding(make, options):
    model = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(7, 4), keras.layers.Flatten()])
    model.compile(make(), loss="mse", **options)
    x, y = np.arange(12).reshape(4, 3) % 7, np.ones((4, 12), "float32")
    losses = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@both
def test_bare_tf_variables(make):
    keras_variables = variables_of((3, 4), (4,))
    bare = [tf.Variable(v.value, name=v.name) for v in keras_variables]
    grads = grads_of(*keras_variables)
    make().apply_gradients(zip(grads, keras_variables, strict=True))
    make().apply_gradients(zip(grads, bare, strict=True))
    assert_same(values(keras_variables), values(bare))


@both
def test_tf_checkpoint(make, tmp_path):
    def fresh():
        variables = variables_of((3, 4), (4,))
        optimizer = make(layouts={"v0": Layout(0)})
        optimizer.build(variables)
        return variables, optimizer, tf.train.Checkpoint(optimizer=optimizer, variables=[v.value for v in variables])

    variables, optimizer, checkpoint = fresh()
    optimizer.apply(grads_of(*variables), variables)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    others, other, restored = fresh()
    restored.restore(path).assert_existing_objects_matched()
    assert_same(values(optimizer.variables), values(other.variables))
    assert_same(values(variables), values(others))


@both
def test_sparse_gradients_of_another_shape_are_refused(make):
    variables = variables_of((3, 4))
    optimizer = make()
    optimizer.build(variables)
    before = values([*variables, *optimizer.variables])
    gradient = tf.IndexedSlices(tf.ones((1, 4)), tf.constant([0]), tf.constant([7, 4]))
    with pytest.raises(ValueError, match="the gradient of 'v0' has shape"):
        optimizer.apply([gradient], variables)
    assert_same(before, values([*variables, *optimizer.variables]))
