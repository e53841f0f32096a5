"""Snapshots in Optax: everything comes back, and PyTorch goes on from them as Optax would have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import adamp_jax
import adamp_torch
from adamp_jax import load_snapshot, save_snapshot
from adamp_spec import AdamPHyper, Layout, SGDPHyper
from adamp_spec.snapshot import SnapshotError

LAYOUTS = Layout(0)  # PyTorch's
MASK = {"net.bias": False, "net.weight": True, "out": True}  # paths as PyTorch has names, so that no map is needed
ADAMP = AdamPHyper(lr=1e-2, weight_decay=0.1, nesterov=True)
SGDP = SGDPHyper(lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1, project_momentum=True)
both = pytest.mark.parametrize("hyper", [ADAMP, SGDP], ids=["adamp", "sgdp"])


def transformation(hyper, learning_rate=None, mask=MASK):
    common = {"layouts": LAYOUTS, "weight_decay_mask": mask, "weight_decay": hyper.weight_decay}
    lr = hyper.lr if learning_rate is None else learning_rate
    if isinstance(hyper, AdamPHyper):
        return adamp_jax.adamp(lr, hyper.beta1, hyper.beta2, hyper.eps, nesterov=hyper.nesterov, **common)
    return adamp_jax.sgdp(lr, hyper.momentum, hyper.dampening, project_momentum=hyper.project_momentum, **common)


def start(dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = {"net.bias": (4,), "net.weight": (4, 6), "out": (3, 4)}
    return jax.tree.map(
        lambda s: jnp.asarray(random.standard_normal(s), dtype), shapes, is_leaf=lambda x: type(x) is tuple
    )


def gradients(i, like):
    random = np.random.default_rng(i)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), like)


def train(tx, params, state, steps=range(3)):
    for i in steps:
        updates, state = tx.update(gradients(i, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves
    )


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_comes_back_bit_for_bit(hyper, dtype, tmp_path):
    tx = transformation(hyper, optax.linear_schedule(1e-2, 0, 100))
    params = start(dtype)
    params, state = train(tx, params, tx.init(params))
    others = {"norm": {"mean": jnp.arange(3.0), "count": jnp.asarray(7, jnp.int32)}}
    given = {"weight_decay_mask": MASK, "layouts": LAYOUTS}
    save_snapshot(tmp_path / "x", params, state, hyper, others=others, **given)
    fresh = start(dtype)
    back = load_snapshot(tmp_path / "x", fresh, tx.init(fresh), others=jax.tree.map(jnp.zeros_like, others), **given)
    assert same((params, state, others), (back.params, back.opt_state, back.others))
    assert back.hyperparameters == hyper
    assert same(train(tx, params, state), train(tx, back.params, back.opt_state))


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(6, 4)
        self.out = torch.nn.Parameter(torch.zeros(3, 4))


def torch_optimizer(model, hyper):
    named = list(model.named_parameters())
    groups = [
        {"params": [x for x in named if x[0] != "net.bias"]},
        {"params": [x for x in named if x[0] == "net.bias"], "weight_decay": 0.0},
    ]
    if isinstance(hyper, AdamPHyper):
        return adamp_torch.AdamP(groups, lr=0.5)
    return adamp_torch.SGDP(groups, lr=0.5)


@both
def test_pytorch_goes_on_and_hands_back(hyper, tmp_path):
    tx = transformation(hyper)
    params = start()
    params, state = train(tx, params, tx.init(params))
    given = {"weight_decay_mask": MASK, "layouts": LAYOUTS}
    save_snapshot(tmp_path / "x", params, state, hyper, **given)

    model = Torch()
    optimizer = torch_optimizer(model, hyper)
    adamp_torch.load_snapshot(tmp_path / "x", model, optimizer)
    adamp_torch.save_snapshot(tmp_path / "y", model, optimizer)
    back = load_snapshot(tmp_path / "y", params, state, **given)
    assert same((params, state), (back.params, back.opt_state))

    g = gradients(3, params)
    for p, x in zip((model.net.bias, model.net.weight, model.out), jax.tree.leaves(g), strict=True):
        p.grad = torch.from_numpy(np.array(x))
    optimizer.step()
    updates, _ = tx.update(g, state, params)
    expected = optax.apply_updates(params, updates)
    for p, x in zip((model.net.bias, model.net.weight, model.out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(p.detach(), x, rtol=3e-6, atol=3e-8)
    wrong, _ = tx.update(gradients(4, params), state, params)
    assert not np.allclose(model.out.detach(), optax.apply_updates(params, wrong)["out"], rtol=3e-6, atol=3e-8)


def test_what_does_not_fit_is_refused(tmp_path):
    tx = transformation(ADAMP)
    params = start()
    state = tx.init(params)
    save = functools.partial(save_snapshot, tmp_path / "x", layouts=LAYOUTS, weight_decay_mask=MASK)
    load = functools.partial(load_snapshot, tmp_path / "x")
    save(params, state, ADAMP)
    with pytest.raises(SnapshotError, match="weight_decay_mask in Optax"):
        load(params, state, layouts=LAYOUTS)
    with pytest.raises(SnapshotError, match=r"layouts={.net.weight.: Layout\(channel=0\), .out.: Layout"):
        load(params, state, weight_decay_mask=MASK)
    with pytest.raises(SnapshotError, match="make the other one"):
        load(params, transformation(SGDP).init(params), layouts=LAYOUTS, weight_decay_mask=MASK)
    with pytest.raises(SnapshotError, match=r"only the model .'more'"):
        load(params | {"more": jnp.ones(3)}, tx.init(params | {"more": jnp.ones(3)}), layouts=LAYOUTS)
    save(params, state, ADAMP, weight_decay_mask=None)
    with pytest.raises(SnapshotError, match=r"exempts parameters from weight decay that decay by 0\.1"):
        load(params, state, layouts=LAYOUTS, weight_decay_mask=dict.fromkeys(MASK, False))
    save(params, state, ADAMP)
    halved = adamp_jax.adamp(1e-2, mu_dtype=jnp.bfloat16, layouts=LAYOUTS).init(params)
    with pytest.raises(SnapshotError, match=r"m of parameter 'net.bias' is F32 in the snapshot, BF16"):
        load(params, halved, layouts=LAYOUTS, weight_decay_mask=MASK)
    with pytest.raises(ValueError, match="accumulated gradients"):
        save(params, optax.MultiSteps(tx, 2).init(params), ADAMP)
    with pytest.raises(ValueError, match="hyperparameters are SGDPHyper"):
        save(params, state, SGDP)
    with pytest.raises(ValueError, match=r"holds \[\]"):
        save(params, optax.adam(1e-3).init(params), ADAMP)
    masked = optax.masked(transformation(ADAMP, mask=None), {"net.bias": True, "net.weight": True, "out": False})
    with pytest.raises(ValueError, match="do not both have"):
        save(params, masked.init(params), ADAMP)
    with pytest.raises(TypeError, match="complex64"):
        save(params, state, ADAMP, others={"phase": jnp.ones(2, jnp.complex64)})


def test_steps_that_optax_cannot_count_are_refused(tmp_path):
    model = Torch()
    optimizer = torch_optimizer(model, ADAMP)
    model.net.weight.grad = torch.ones(4, 6)
    optimizer.step()
    adamp_torch.save_snapshot(tmp_path / "x", model, optimizer)
    params = start()
    tx = transformation(ADAMP)
    with pytest.raises(SnapshotError, match=r"\['net.bias', 'out'\] have taken fewer steps"):
        load_snapshot(tmp_path / "x", params, tx.init(params), layouts=LAYOUTS, weight_decay_mask=MASK)


def test_a_parameter_may_be_called_count(tmp_path):
    params = {"count": jnp.ones((2, 3)), "lr": jnp.ones(3)}
    tx = adamp_jax.adamp(optax.constant_schedule(1e-2))
    params, state = train(tx, params, tx.init(params))
    save_snapshot(tmp_path / "x", params, state, AdamPHyper(lr=1e-2))
    back = load_snapshot(tmp_path / "x", params, tx.init(params))
    assert same((params, state), (back.params, back.opt_state))


def test_an_injected_learning_rate_is_written_as_it_is_now(tmp_path):
    make = optax.inject_hyperparams(adamp_jax.adamp, static_args=("layouts", "weight_decay_mask"))
    tx = make(optax.linear_schedule(1e-2, 1e-3, 10), layouts=LAYOUTS)
    params = start()
    params, state = train(tx, params, tx.init(params))
    save_snapshot(tmp_path / "x", params, state, AdamPHyper(lr=1e-2), layouts=LAYOUTS)
    found = load_snapshot(tmp_path / "x", params, state, layouts=LAYOUTS).hyperparameters
    assert np.float32(found.lr) == state.hyperparams["learning_rate"] != np.float32(1e-2)


def test_numbers_beside_the_model_stay_as_wide_as_they_are(tmp_path):
    params = start()
    tx = transformation(ADAMP)
    others = {"count": np.asarray(2**40 + 7), "mean": np.asarray(1 / 3)}
    keep = {"weight_decay_mask": MASK, "layouts": LAYOUTS}
    save_snapshot(tmp_path / "x", params, tx.init(params), ADAMP, others=others, **keep)
    found = load_snapshot(tmp_path / "x", params, tx.init(params), others=others, **keep).others
    assert found == others
    assert [x.dtype for x in found.values()] == [x.dtype for x in others.values()]
    with pytest.raises(ValueError, match="several leaves share a path"):
        save_snapshot(tmp_path / "x", params, tx.init(params), ADAMP, others={"a": {"b": 1}, "a/b": 0}, **keep)


def test_shapes_suffice_to_load(tmp_path):
    tx, params = transformation(ADAMP), start()
    params, state = train(tx, params, tx.init(params))
    given = {"weight_decay_mask": MASK, "layouts": LAYOUTS}
    save_snapshot(tmp_path / "x", params, state, ADAMP, **given)
    like = jax.eval_shape(lambda x: (x, tx.init(x)), params)
    back = load_snapshot(tmp_path / "x", *like, **given)
    assert same((params, state), (back.params, back.opt_state))
    donated = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(back.params)
    assert same(donated, jax.tree.map(lambda x: 2 * x, params))
    assert same(params, load_snapshot(tmp_path / "x", *like, **given).params)


def test_arrays_that_are_saved_keep_nothing_on_the_host(tmp_path):
    params = start()
    tx = transformation(ADAMP)
    save_snapshot(tmp_path / "x", params, tx.init(params), ADAMP, weight_decay_mask=MASK, layouts=LAYOUTS)
    assert all(x._npy_value is None for x in jax.tree.leaves(params))
