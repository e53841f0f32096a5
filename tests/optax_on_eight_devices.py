"""Steps of the Optax backend on eight devices; prints as JSON what `test_optax_sharding.py` asserts.

Runs in a process of its own, because how many devices the CPU pretends to have is settled when JAX starts.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamp_jax
from adamp_conformance.adapter import State
from adamp_conformance.judge import ALGORITHMS, judge_step
from adamp_jax._layouts import assign
from adamp_spec import Layout

STEPS = 2
HYPER = {
    "adamp": {"lr": 0.01, "weight_decay": 0.1},
    "sgdp": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
}
MOMENTS = {"adamp": {"m": "mu", "v": "nu"}, "sgdp": {"m": "trace"}}
SHAPES = {"conv/kernel": (3, 3, 8, 16), "dense/kernel": (16, 24), "dense/bias": (24,), "stack/kernel": (8, 16, 24)}
LAYOUTS = {"stack/kernel": Layout(2, batch=0)}
BY_CHANNEL = {
    "conv/kernel": P(None, None, None, "x"),
    "dense/kernel": P(None, "x"),
    "dense/bias": P("x"),
    "stack/kernel": P(None, None, "x"),
}
BY_INPUT = {"conv/kernel": P(None, None, "x"), "dense/kernel": P("x"), "dense/bias": P(), "stack/kernel": P(None, "x")}
WAYS = {
    "channel": BY_CHANNEL,
    "input": BY_INPUT,
    "stacked axis": {**BY_CHANNEL, "stack/kernel": P("x")},
    "stack alone": {"conv/kernel": P(), "dense/kernel": P(), "dense/bias": P(), "stack/kernel": P("x")},
    "replicated": dict.fromkeys(SHAPES, P()),
}


def make(algorithm):
    options = {"learning_rate" if name == "lr" else name: x for name, x in HYPER[algorithm].items()}
    return getattr(adamp_jax, algorithm)(**options, layouts=LAYOUTS)


def problem():
    """Parameters, and a gradient for each step; of `dense/kernel` and every other stacked layer, orthogonal to it."""
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    gradients = []
    for _ in range(STEPS):
        g = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        gradients.append(g)
    return params, gradients


def turned(gradients, params):
    """The gradients without their part along the columns of some parameters, so that these are projected."""
    out = dict(gradients)
    for name, where in (("dense/kernel", ...), ("stack/kernel", slice(None, None, 2))):
        p, g = (np.float64(x[name][where]) for x in (params, gradients))
        g = g - p * np.sum(g * p, -2, keepdims=True) / np.sum(p * p, -2, keepdims=True)
        out[name] = gradients[name].copy()
        out[name][where] = g
    return out


def held(algorithm, params, state):
    moments = {m: {k: np.array(x) for k, x in getattr(state[0], f).items()} for m, f in MOMENTS[algorithm].items()}
    return State(int(state[0].count), {name: np.array(x) for name, x in params.items()}, moments)


def literal():
    """AdamP's projection as PyTorch code has it, row by row: what the collectives of a step are compared with."""

    def project(p, g):
        rows, grads = (jnp.moveaxis(x, -1, 0).reshape(x.shape[-1], -1) for x in (p, g))
        unit, direction = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (rows, grads))
        orthogonal = jnp.max(jnp.abs(jnp.sum(unit * direction, 1))) < 0.1 / rows.shape[1] ** 0.5
        radial = unit * jnp.sum(unit * grads, 1, keepdims=True)
        return g - jnp.where(orthogonal, radial.T.reshape(p.shape), 0)

    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda g, p: project(p, g) if p.ndim > 1 else g, updates, params)
    )


def each_for_itself(transform, specs, mesh):
    """The same transformation, but every device decides by what it holds."""

    def update(updates, state, params):
        of_state = (type(state[0])(P(), *[specs] * (len(state[0]) - 1)), *state[1:])
        alone = jax.shard_map(
            transform.update, mesh=mesh, in_specs=(specs, of_state, specs), out_specs=(specs, of_state), check_vma=False
        )
        return alone(updates, state, params)

    return optax.GradientTransformation(transform.init, update)


def compiled(transform, *arguments):
    """A step for arguments that are placed as these are, and refuses others; and its collective operations, counted."""

    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    operations = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    names = re.findall(rf"\b({operations})(?:-start)?\(", step.as_text())
    return step, {name: names.count(name) for name in sorted(set(names))}


def run(algorithm, specs, mesh, change=lambda transform, *_: transform):
    """Some steps: the worst margin of them, the branches taken, whether placements stay, and the collectives of one."""
    transform = change(make(algorithm), specs, mesh)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params, gradients = problem()
    layouts = {name: x.layout for name, x in assign(params, LAYOUTS).items()}
    kind, _, _ = ALGORITHMS[algorithm]
    hyper = dataclasses.asdict(kind(**HYPER[algorithm]))

    params = jax.device_put(params, shardings)
    state = transform.init(params)
    state = (state[0]._replace(count=jax.device_put(state[0].count, NamedSharding(mesh, P()))), *state[1:])

    def stays():
        placed = (params, *state[0][1:])
        return all(x.sharding.is_equivalent_to(shardings[name], x.ndim) for tree in placed for name, x in tree.items())

    step, found = compiled(transform, params, state, jax.device_put(gradients[0], shardings))
    kept, margins, branches = stays(), [], {}
    for g in gradients:
        before = held(algorithm, params, state)
        g = turned(g, before.parameters)
        params, state = step(params, state, jax.device_put(g, shardings))
        verdict = judge_step(algorithm, hyper, layouts, before, g, held(algorithm, params, state))
        assert verdict.problem is None, verdict.problem
        margins.append(verdict.margin)
        branches = {name: sorted({int(b) for b in np.ravel(x)}) for name, x in verdict.branches.items()}
        kept = kept and stays()
    return {"margin": max(margins), "branches": branches, "kept": kept, "collectives": found}


def explicit(algorithm):
    """Types before and after a compiled update, where shardings are part of the types."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    found = {}
    for way, spec in {"channel": P(None, None, "x"), "input": P(None, "x"), "stacked": P("x")}.items():
        with jax.set_mesh(mesh):
            kernel = jnp.zeros((8, 16, 24), jnp.float16, out_sharding=NamedSharding(mesh, spec))
            params = {"stack/kernel": kernel}
            transform = make(algorithm)
            state = jax.jit(transform.init)(params)
            updates, after = jax.jit(transform.update)(params, state, params)
            found[way] = {
                "state": str(jax.tree.map(jax.typeof, state)),
                "after": str(jax.tree.map(jax.typeof, after)),
                "params": str(kernel.sharding.spec),
                "updates": str(updates["stack/kernel"].sharding.spec),
            }
    return found


def main():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    report = {}
    for algorithm in HYPER:
        runs = {way: run(algorithm, specs, mesh) for way, specs in WAYS.items()}
        alone = run(algorithm, WAYS["input"], mesh, each_for_itself)
        report[algorithm] = {"runs": runs, "alone": alone, "explicit": explicit(algorithm)}
    params = jax.device_put(problem()[0], {name: NamedSharding(mesh, spec) for name, spec in BY_INPUT.items()})
    _, report["literal"] = compiled(literal(), params, optax.EmptyState(), params)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
