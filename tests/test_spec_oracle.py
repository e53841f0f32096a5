"""The oracle against the official package, against arithmetic done by hand, and its independence."""

import subprocess
import sys
from pathlib import Path

import adamp
import numpy as np
import pytest
import torch

import adamp_spec
from adamp_conformance.cases import Random, noise, oblique_rows, orthogonal_layer, orthogonal_rows
from adamp_spec import (
    AdamPHyper,
    AdamPState,
    Branch,
    Layout,
    SGDPHyper,
    SGDPState,
    adamp_step,
    one_minus_power,
    sgdp_step,
)

SHAPES = [(), (5,), (4, 6), (3, 4, 5), (8, 3, 3, 3), (2, 3, 4, 2, 3)]
GRADIENTS = {Branch.NONE: oblique_rows, Branch.CHANNEL: orthogonal_rows, Branch.LAYER: orthogonal_layer}


def gradient_for(branch, parameter, name):
    if parameter.ndim < 2:
        return noise(Random(name), parameter)
    cells = parameter.reshape(1, parameter.shape[0], -1)
    return GRADIENTS[branch](Random(name), cells).reshape(parameter.shape)


@pytest.mark.parametrize("branch", Branch, ids=lambda branch: branch.name.lower())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_beside_the_official_package(branch, shape, nesterov, weight_decay):
    shared = {"lr": 0.01, "weight_decay": weight_decay, "nesterov": nesterov}
    sgd = {"momentum": 0.9, "dampening": 0.2}
    start = noise(Random("start"), np.empty(shape))
    theirs = [torch.nn.Parameter(torch.tensor(start)) for _ in range(2)]
    official = [adamp.AdamP(theirs[:1], **shared), adamp.SGDP(theirs[1:], **shared, **sgd)]
    ours = [start, start]
    states = [AdamPState(0, 0 * start, 0 * start), SGDPState(0, 0 * start)]
    hypers = [AdamPHyper(**shared), SGDPHyper(**shared, **sgd, project_momentum=True)]
    taken = set()
    for t in range(50):
        for i, step in enumerate((adamp_step, sgdp_step)):
            gradient = gradient_for(branch, ours[i], f"gradient {t}")
            theirs[i].grad = torch.tensor(gradient)
            official[i].step()
            ours[i], states[i], decision = step(ours[i], gradient, states[i], hypers[i], Layout())
            taken.add(int(decision.max()))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other.detach().numpy(), rtol=1e-12, atol=1e-12 * np.abs(mine).max())
    assert taken == {branch if len(shape) > 1 else Branch.NONE}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_any_float_type_keeps_its_type(dtype):
    p = np.ones((2, 3), dtype)
    new, state, branch = adamp_step(p, p, AdamPState(0, 0 * p, 0 * p), AdamPHyper(lr=0.5), Layout())
    assert {x.dtype for x in (new, state.m, state.v)} == {np.dtype(dtype)}
    assert state.step == 1
    assert branch.shape == (1, 1)
    np.testing.assert_allclose(new.astype(float), 0.5, rtol=1e-3)


def test_one_step_by_hand():
    """p = (3, 4), g = (-4, 3): orthogonal; q = sign(g); <q, p> / |p|^2 = 1/25; w = 0.1."""
    p, g = np.array([[3.0, 4.0]]), np.array([[-4.0, 3.0]])
    hyper = AdamPHyper(lr=0.25, weight_decay=0.4, eps=1e-30)
    new, state, branch = adamp_step(p, g, AdamPState(0, 0 * p, 0 * p), hyper, Layout())
    projected = np.array([[-1.0, 1.0]]) - p / 25
    np.testing.assert_allclose(new, p * (1 - 0.25 * 0.4 * 0.1) - 0.25 * projected, rtol=1e-15)
    np.testing.assert_allclose(state.m, 0.1 * g, rtol=1e-15)
    assert branch == Branch.CHANNEL


def test_layouts_are_permutations_of_each_other():
    rng = np.random.default_rng(1)
    p, g = rng.standard_normal((2, 4, 3, 5))
    for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        moved_p, moved_g = p.transpose(axes), g.transpose(axes)
        layout = Layout(axes.index(0), batch=axes.index(1))
        hyper = SGDPHyper(0.1, momentum=0.9, weight_decay=0.1, delta=1.0)
        new, _, branch = sgdp_step(moved_p, moved_g, SGDPState(0, 0 * moved_p), hyper, layout)
        rows = [sgdp_step(p[:, i], g[:, i], SGDPState(0, 0 * p[:, i]), hyper, Layout()) for i in range(3)]
        np.testing.assert_allclose(new, np.stack([r[0] for r in rows], axis=1).transpose(axes), rtol=1e-14)
        assert branch.ravel().tolist() == [int(r[2].max()) for r in rows]


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("exponent", [1, 2, 7, 1000, 10**6])
def test_one_minus_power(base, exponent):
    from fractions import Fraction

    if exponent > 1000:
        assert one_minus_power(base, exponent) == pytest.approx(1.0)
        return
    exact = 1 - Fraction(base) ** exponent
    assert abs(Fraction(*one_minus_power(base, exponent).as_integer_ratio()) / exact - 1) < Fraction(1, 2**60)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grad": np.ones((3, 2))}, ValueError, "shape"),
        ({"grad": np.ones((2, 3), complex)}, TypeError, "complex128"),
        ({"param": np.ones((2, 3), int)}, TypeError, "int64"),
        ({"layout": Layout(2)}, ValueError, "channel axis 2"),
    ],
)
def test_refuses(change, error, words):
    p = np.ones((2, 3))
    arguments = {"param": p, "grad": p, "layout": Layout()} | change
    with pytest.raises(error, match=words):
        adamp_step(arguments["param"], arguments["grad"], AdamPState(0, p, p), AdamPHyper(), arguments["layout"])


def loaded_by(package):
    """Top-level modules that importing `package` brings into a fresh interpreter."""
    code = f"import sys; old = set(sys.modules); import {package}; print(*set(sys.modules) - old)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_the_oracle_imports_numpy_only():
    assert loaded_by("adamp_spec") - set(sys.stdlib_module_names) - {"adamp_spec", "_distutils_hack"} == loaded_by(
        "numpy"
    ) - set(sys.stdlib_module_names) - {"_distutils_hack"}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("adamp_spec", {"safetensors"}),  # in its snapshot module, which the oracle does not import
        ("adamp_torch", {"adamp_spec", "torch", "numba", "llvmlite", "triton"}),
        ("adamp_tf", {"adamp_spec", "keras", "tensorflow"}),  # the latter where Keras runs on it
        ("adamp_jax", {"adamp_spec", "jax", "optax"}),
    ],
)
def test_source_imports_run_one_way(package, allowed):
    import ast
    import importlib.util

    folder = Path(importlib.util.find_spec(package).origin).parent
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"relative import in {path}"
                found.add(node.module.partition(".")[0])
    assert found - set(sys.stdlib_module_names) - {"numpy", package} <= allowed


@pytest.mark.parametrize(
    ("package", "framework"), [("adamp_torch", "torch"), ("adamp_jax", "optax"), ("adamp_tf", "keras")]
)
def test_a_backend_loads_its_own_framework_only(package, framework):
    frameworks = {"torch", "jax", "optax", "tensorflow", "keras", "flax"}
    assert loaded_by(package) & frameworks == loaded_by(framework) & frameworks


def test_everything_public_has_a_docstring():
    for name in adamp_spec.__all__:
        value = getattr(adamp_spec, name)
        if callable(value):
            assert value.__doc__, name
