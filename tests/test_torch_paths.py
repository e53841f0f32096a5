"""The ways through adamp_torch, tensor by tensor, many at once and own kernels: one numerics, judged by the oracle."""

import copy
import inspect
import itertools
from dataclasses import asdict
from importlib import import_module

import numpy as np
import pytest
import torch

import adamp_torch._adamp
import adamp_torch._foreach
import adamp_torch._paths
import adamp_torch._projection
import adamp_torch._sgdp
from adamp_conformance.adapter import DTYPES, MOMENTS, Parameter, State
from adamp_conformance.adapters.torch import TorchAdapter
from adamp_conformance.judge import judge_step
from adamp_spec import AdamPHyper, Branch, Layout, Rows, SGDPHyper
from adamp_torch import SGDP, AdamP
from adamp_torch._paths import fused_kernels

CLASSES = {"adamp": AdamP, "sgdp": SGDP}
EXECUTIONS = ("eager", "foreach", "fused")
LOOP = {"foreach": False, "fused": False}
OTHERS = {"foreach": {"foreach": True}, "fused": {"fused": True}}

both = pytest.mark.parametrize("algorithm", CLASSES)
each = pytest.mark.parametrize("execution", EXECUTIONS)
other = pytest.mark.parametrize("path", OTHERS)

SHAPES = [  # shape, layout
    ((4, 8), Layout(0)),
    ((4, 8), Layout(1)),
    ((6, 4, 3, 3), Layout(0)),
    ((3, 3, 4, 6), Layout(-1)),
    ((2, 6, 5), Layout(2, batch=0)),
    ((12, 7), Layout(1, batch=0, view=(3, 4, 7))),
    ((6, 5), Layout((0, 1))),
    ((1, 16), Layout(0)),
    ((5, 4), Layout(None)),
    ((9,), Layout(0)),
    ((), Layout(0)),
    ((0, 3), Layout(0)),
    ((3, 0), Layout(0)),
]


def random_hyper(algorithm, rng):
    common = {
        "lr": float(10 ** rng.uniform(-4, -1)),
        "weight_decay": float(rng.choice([0.0, 0.1, 2.0])),
        "delta": float(rng.choice([0.0, 0.1, 1.0])),
        "wd_ratio": float(rng.choice([0.0, 0.3, 1.0])),
        "eps": float(rng.choice([1e-8, 1e-3])),
        "nesterov": bool(rng.integers(2)),
    }
    if algorithm == "adamp":
        return asdict(AdamPHyper(beta1=float(rng.choice([0.0, 0.9])), beta2=float(rng.choice([0.0, 0.999])), **common))
    own = {"momentum": float(rng.choice([0.5, 0.9])), "dampening": float(rng.choice([0.0, 0.3]))}
    return asdict(SGDPHyper(**own, **common, project_momentum=bool(rng.integers(2))))


def random_gradient(p, layout, rng):
    """Noise, or noise without its part along each row or along each slice of `p`."""
    rows = layout.rows(p.shape)
    x = p.astype(np.float64).reshape(rows.shape)
    g = rng.standard_normal(rows.shape) + 0.5 * x
    axes = [None, rows.row, rows.layer][rng.integers(3)]
    if axes and p.size:
        g = g - x * (g * x).sum(axes, keepdims=True) / (x * x).sum(axes, keepdims=True)
    return np.asarray(g.reshape(p.shape)).astype(p.dtype)


def random_tensors(rng, dtypes, copies=3):
    """Several tensors of every shape and layout, their dtypes drawn from `dtypes`."""
    return {
        f"{i}.{j}": Parameter(np.asarray(rng.standard_normal(shape)).astype(DTYPES[rng.choice(dtypes)]), layout)
        for i, (shape, layout) in enumerate(SHAPES)
        for j in range(copies)
    }


def run_judged(algorithm, tensors, hyper, rng, execution, steps=2, **spoil):
    """Steps from a random state; returns the verdicts."""
    adapter = TorchAdapter(execution)
    adapter.create(algorithm, hyper, tensors)
    layouts = {name: x.layout for name, x in tensors.items()}
    values = {name: x.value for name, x in tensors.items()}
    moments = {
        moment: {k: np.asarray(rng.random(x.shape) - 0.5 * (moment == "m")).astype(x.dtype) for k, x in values.items()}
        for moment in MOMENTS[algorithm]
    }
    adapter.load(State(5, values, moments))
    verdicts = []
    for _ in range(steps):
        before = adapter.dump()
        gradients = {name: random_gradient(x, layouts[name], rng) for name, x in before.parameters.items()}
        for name, element in spoil.items():
            gradients[name].reshape(-1)[0] = element
        adapter.step({name: g.copy() for name, g in gradients.items()})
        verdicts.append(judge_step(algorithm, hyper, layouts, before, gradients, adapter.dump()))
    return verdicts


def assert_conforms(verdicts):
    for verdict in verdicts:
        assert verdict.conforms, (verdict.problem, verdict.margin, verdict.place)


# --- one numerics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@each
@both
def test_random_settings_conform_in_mixed_dtypes_and_shapes(algorithm, execution, seed):
    rng = np.random.default_rng(seed)
    tensors = random_tensors(rng, list(DTYPES))
    verdicts = run_judged(algorithm, tensors, random_hyper(algorithm, rng), rng, execution)
    assert_conforms(verdicts)


@both
def test_the_settings_reach_every_branch_in_one_stack(algorithm):
    rng = np.random.default_rng(0)
    hyper = random_hyper(algorithm, rng) | {"delta": 0.2}
    tensors = {str(i): Parameter(rng.standard_normal((8, 32)).astype(np.float32), Layout(0)) for i in range(12)}
    verdicts = run_judged(algorithm, tensors, hyper, rng, "foreach")
    assert_conforms(verdicts)
    assert {int(b) for verdict in verdicts for x in verdict.branches.values() for b in x.ravel()} == set(Branch)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@other
@both
def test_what_is_not_finite_stays_in_its_tensor(algorithm, path, bad):
    rng = np.random.default_rng(1)
    hyper = random_hyper(algorithm, rng) | {"delta": 1.0, "nesterov": False}
    assert_conforms(run_judged(algorithm, random_tensors(rng, ["float32"]), hyper, rng, path, 1, **{"0.1": bad}))


@pytest.mark.parametrize("size", [1, 40, 100])
@both
def test_parts_of_any_size_conform(algorithm, size, monkeypatch):
    monkeypatch.setattr(adamp_torch._foreach, "PART", size)
    rng = np.random.default_rng(2)
    tensors = random_tensors(rng, list(DTYPES))
    assert_conforms(run_judged(algorithm, tensors, random_hyper(algorithm, rng), rng, "foreach"))


@both
def test_a_decision_over_the_whole_stack_is_found(algorithm, monkeypatch):
    """The fault: the axis of the stack is taken for one of the channel's."""

    def over_all(rows, n):
        own = adamp_torch._foreach.stack_rows(rows, n)
        return Rows(own.shape, own.batch[1:], (0, *own.channel), own.row, own.projects)

    monkeypatch.setattr(getattr(adamp_torch, f"_{algorithm}"), "stack_rows", over_all)
    rng = np.random.default_rng(0)
    tensors = {str(i): Parameter(rng.standard_normal((8, 32)).astype(np.float32), Layout(0)) for i in range(12)}
    hyper = random_hyper(algorithm, rng) | {"delta": 0.2}
    assert not all(v.conforms for v in run_judged(algorithm, tensors, hyper, rng, "foreach"))


@both
def test_a_computation_in_half_precision_is_found(algorithm, monkeypatch):
    """The fault: what is stored in half precision is not computed in float32."""
    monkeypatch.setattr(getattr(adamp_torch, f"_{algorithm}"), "load_all", lambda tensors, _: tensors)
    rng = np.random.default_rng(0)
    tensors = random_tensors(rng, ["bfloat16"])
    hyper = random_hyper(algorithm, rng) | ({"beta1": 0.9, "beta2": 0.99} if algorithm == "adamp" else {})
    assert not all(v.conforms for v in run_judged(algorithm, tensors, hyper, rng, "foreach"))


# --- the same citizen ------------------------------------------------------------------------------------------------


def parameters(seed=0, dtype=torch.float64, shapes=((4, 6), (4, 6), (3, 2, 3, 3), (5,), (5,), (), (0, 2))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def make(algorithm, params, **options):
    own = {} if algorithm == "adamp" else {"momentum": 0.9}
    return CLASSES[algorithm](params, **({"lr": 1e-2, "weight_decay": 0.1} | own | options))


def give_gradients(optimizer, seed, only=None):
    """Random gradients, every other one orthogonal to each row of its parameter."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        g, x = torch.randn(p.shape, generator=generator, dtype=torch.float64), p.detach().double()
        if p.ndim > 1 and i % 2 == 0:
            axes = tuple(range(1, p.ndim))
            g = g - x * (g * x).sum(axes, keepdim=True) / (x * x).sum(axes, keepdim=True)
        p.grad = g.to(p.dtype) if only is None or i in only else None


def step(optimizer, seed, only=None):
    give_gradients(optimizer, seed, only)
    optimizer.step()


def assert_close(a, b):
    """Parameters and state of two float64 optimizers, up to rounding."""
    for p, q in zip(a.param_groups, b.param_groups, strict=True):
        for x, y in zip(p["params"], q["params"], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
            assert a.state[x].keys() == b.state[y].keys()
            for key in a.state[x]:
                torch.testing.assert_close(a.state[x][key], b.state[y][key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), torch.tensor([1e-2], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@other
@both
def test_other_paths_follow_the_loop(algorithm, path, maximize, lr, capturable):
    loop, many = (
        make(algorithm, parameters(), lr=lr, maximize=maximize, capturable=capturable, **options)
        for options in (LOOP, OTHERS[path])
    )
    for t, only in enumerate([None, (0, 2, 3), None, (), None]):
        step(loop, t, only)
        step(many, t, only)
    assert_close(loop, many)
    assert [int(many.state[p]["step"]) for p in many.param_groups[0]["params"]] == [4, 3, 4, 4, 3, 3, 3]


@other
@both
def test_groups_have_options_of_their_own(algorithm, path):
    def groups():
        a, b, c = (parameters(seed) for seed in range(3))
        return [
            {"params": a, "lr": 1e-3, "delta": 0.5},
            {"params": b, "weight_decay": 0.3, "maximize": True, "layouts": {b[0]: Layout(1), b[1]: Layout(None)}},
            {"params": c, "nesterov": True, **LOOP},
            {"params": []},
        ]

    loop, many = make(algorithm, groups(), **LOOP), make(algorithm, groups(), **OTHERS[path])
    assert [group[path] for group in many.param_groups] == [True, True, False, True]
    for t in range(3):
        step(loop, t)
        step(many, t)
    assert_close(loop, many)


STRIDES = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", [Layout(0), Layout(1, batch=0, view=(2, 3, 4, 5))], ids=str)
@pytest.mark.parametrize(("of_p", "of_g"), [*itertools.product(list(STRIDES)[:3], STRIDES)])
@other
@both
def test_strides_change_nothing_but_are_kept(algorithm, path, of_p, of_g, layout):
    start = parameters(shapes=[(6, 4, 5, 1)] * 3)
    optimizers = []
    for options in (LOOP, OTHERS[path]):
        params = [torch.nn.Parameter(STRIDES[of_p](x.detach().clone())) for x in start]
        optimizer = make(algorithm, params, **options, layouts=dict.fromkeys(params, layout))
        for t in range(3):
            give_gradients(optimizer, t)
            for p in params:
                p.grad = STRIDES[of_g](p.grad)
            optimizer.step()
        optimizers.append(optimizer)
        for p, x in zip(params, start, strict=True):
            assert p.stride() == STRIDES[of_p](x).stride()
    assert_close(*optimizers)


@pytest.mark.parametrize("capturable", [False, True])
@other
@both
def test_a_state_goes_on_in_another_path(algorithm, path, capturable):
    reference = make(algorithm, parameters(), **LOOP, capturable=capturable)
    here = make(algorithm, parameters(), **OTHERS[path], capturable=capturable)
    for t in range(6):
        step(reference, t)
        step(here, t)
        options = OTHERS[path] if t % 2 else LOOP
        there = make(algorithm, copy.deepcopy(here.param_groups[0]["params"]), **options)
        there.load_state_dict(copy.deepcopy(here.state_dict()))
        assert there.param_groups[0][path] is options[path]
        here = there
    assert_close(reference, here)


@both
def test_the_path_is_the_one_asked_for_or_the_fastest(algorithm, monkeypatch):
    module = getattr(adamp_torch, f"_{algorithm}")
    taken = []
    for path in ("single", "multi"):
        monkeypatch.setattr(module, f"_{path}_tensor_{algorithm}", lambda *_, path=path, **__: taken.append(path))
    monkeypatch.setattr(fused_kernels("cpu"), algorithm, lambda *_: taken.append("fused"))

    def path(params=None, **options):
        optimizer = make(algorithm, params or parameters(), **options)
        step(optimizer, 0)
        (last,) = taken
        taken.clear()
        return last

    class Own(torch.Tensor):
        pass

    own = [torch.zeros(3, 2).as_subclass(Own)]
    assert path() == path(fused=True) == path(fused=True, foreach=False) == "fused"
    assert path(foreach=True) == path(foreach=True, fused=False) == "multi"
    assert path(foreach=False) == path(fused=False) == path(differentiable=True) == path(own) == "single"
    monkeypatch.setattr(adamp_torch._paths, "fused_kernels", lambda device_type: None)
    assert path() == path(own) == "single"
    monkeypatch.setattr(
        import_module("torch.optim.optimizer"), "_get_foreach_kernels_supported_devices", lambda: ["cpu"]
    )
    assert path() == "multi"
    assert path(own) == path(differentiable=True) == "single"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"foreach": True, "differentiable": True}, RuntimeError, "foreach=None"),
        ({"fused": True, "differentiable": True}, RuntimeError, "fused=None"),
        ({"fused": True, "foreach": True}, RuntimeError, "exclude each other"),
        ({"fused": 1}, TypeError, "fused"),
        ({"foreach": 1}, TypeError, "foreach"),
    ],
    ids=str,
)
@both
def test_paths_that_do_not_exist_are_refused(algorithm, options, error, words):
    with pytest.raises(error, match=words):
        make(algorithm, parameters(), **options)
    optimizer = make(algorithm, parameters())
    give_gradients(optimizer, 0)
    optimizer.param_groups[0].update(options)
    before = copy.deepcopy(optimizer.param_groups[0]["params"])
    with pytest.raises(error, match=words):
        optimizer.step()
    assert not optimizer.state
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], before))


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
@each
@both
def test_the_update_compiles_to_one_graph(algorithm, execution, capturable):
    torch._dynamo.reset()
    options = {name: execution == name for name in ("foreach", "fused")} | {"capturable": capturable}
    # None without axes: AOTAutograd of torch 2.13 loses what is written to such a tensor, torch.optim.AdamW's too.
    shapes = [(4, 6), (4, 6), (3, 2, 3, 3), (5,), (5,), (1,), (0, 2)]
    plain, compiled = (make(algorithm, parameters(shapes=shapes), **options) for _ in range(2))
    for optimizer in (plain, compiled):
        step(optimizer, 0, only=(0, 2, 3))
    # The decorator of `step` breaks the graph on purpose, in torch.optim too; what it wraps must be one graph.
    update = torch.compile(lambda: inspect.unwrap(type(compiled).step)(compiled), fullgraph=True, backend="aot_eager")
    for t in range(1, 4):
        step(plain, t)
        give_gradients(compiled, t)
        with torch.no_grad():
            update()
    assert_close(plain, compiled)
