"""Other people's implementations: their adapters change nothing, and where they depart is what docs/peers.md says."""

import hashlib
import inspect
from base64 import urlsafe_b64encode
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib import import_module, metadata

import numpy as np
import pytest
import torch

from adamp_conformance.adapter import DTYPES, MOMENTS, Parameter, State
from adamp_conformance.adapters.peers import AdampAdapter, PytorchOptimizerAdapter, TimmAdapter, TorchOptimizerAdapter
from adamp_conformance.adapters.torch import TorchAdapter
from adamp_conformance.cases import DESIGNED
from adamp_conformance.digits import DIGITS
from adamp_conformance.modes import RUNS, Bench, Problem, create, judge_refusal, judge_vectors, walk
from adamp_conformance.vectors import load
from adamp_spec import Layout

PEERS = {
    "adamp": AdampAdapter,
    "timm": TimmAdapter,
    "torch-optimizer": TorchOptimizerAdapter,
    "loop": partial(PytorchOptimizerAdapter, "loop"),
    "foreach": partial(PytorchOptimizerAdapter, "foreach"),
}
KOZISTR = ("loop", "foreach")

HYPER = {
    "adamp": {"lr": 0.05, "beta1": 0.8, "beta2": 0.97, "eps": 1e-5, "weight_decay": 0.3, "delta": 0.2, "wd_ratio": 0.4},
    "sgdp": {
        "lr": 0.05,
        "momentum": 0.8,
        "dampening": 0.25,
        "eps": 1e-5,
        "weight_decay": 0.3,
        "delta": 0.2,
        "wd_ratio": 0.4,
        "project_momentum": False,
    },
}


def package(peer):
    """What a user of the package imports."""
    if peer == "timm":
        return TimmAdapter()._package()
    return import_module("pytorch_optimizer" if peer in KOZISTR else peer.replace("-", "_"))


def by_hand(peer, algorithm, parameters, nesterov):
    """The package's optimizer, made as its own documentation says."""
    options = {name: x for name, x in HYPER[algorithm].items() if name not in ("beta1", "beta2", "project_momentum")}
    if peer in KOZISTR:
        options["foreach"] = peer == "foreach"
    if algorithm == "sgdp":
        return package(peer).SGDP(parameters, nesterov=nesterov, **options)
    return package(peer).AdamP(parameters, betas=(0.8, 0.97), nesterov=nesterov, **options)


# A kernel whose rows get orthogonal gradients and a bias.
START = {
    "w": np.array([[1.0, -2.0, 0.5], [0.5, 1.0, 3.0]]),
    "b": np.array([0.25, -0.5]),
}
GRADIENTS = [
    {"w": np.array([[2.0, 1.0, 0.0], [-2.0, 1.0, 0.0]]), "b": np.array([1.0, 0.5])},
    {"w": np.array([[1.0, 0.5, 3.0], [1.0, 1.0, 0.5]]), "b": np.array([-1.0, 2.0])},
    {"w": np.array([[1.5, 0.75, 0.25], [-2.0, 1.0, 0.25]]), "b": np.array([0.0, 1.0])},
]


def driven_by_hand(peer, algorithm, nesterov, steps):
    """Parameters and moments, as tensors, after `steps` steps without any adapter."""
    parameters = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in START.items()}
    optimizer = by_hand(peer, algorithm, parameters.values(), nesterov)
    for gradients in GRADIENTS[:steps]:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        optimizer.step()
    keys = {"m": "exp_avg", "v": "exp_avg_sq"} if algorithm == "adamp" else {"m": "momentum"}
    values = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    moments = {
        moment: {name: optimizer.state[parameter][key].numpy() for name, parameter in parameters.items()}
        for moment, key in keys.items()
    }
    return State(steps, values, moments)


def made(make, algorithm, nesterov=False):
    adapter = make()
    parameters = {name: Parameter(x.copy(), Layout()) for name, x in START.items()}
    adapter.create(algorithm, HYPER[algorithm] | {"nesterov": nesterov}, parameters)
    return adapter


def assert_same(got, wanted):
    assert got.step == wanted.step
    for name in wanted.parameters:
        for (tensor, one), two in zip(wanted.tensors(name).items(), got.tensors(name).values(), strict=True):
            assert one.dtype == two.dtype
            assert one.tobytes() == two.tobytes(), f"{tensor} of {name}"


def steps_as_by_hand(make, peer, algorithm, nesterov):
    """Three steps from creation, and the last of them from a loaded state, against the package driven by hand."""
    adapter = made(make, algorithm, nesterov)
    zeros = {moment: {name: np.zeros_like(x) for name, x in START.items()} for moment in MOMENTS[algorithm]}
    assert_same(adapter.dump(), State(0, START, zeros))
    for index, gradients in enumerate(GRADIENTS):
        adapter.step(gradients)
        assert_same(adapter.dump(), driven_by_hand(peer, algorithm, nesterov, index + 1))
    resumed = made(make, algorithm, nesterov)
    resumed.load(driven_by_hand(peer, algorithm, nesterov, 2))
    resumed.step(GRADIENTS[2])
    assert_same(resumed.dump(), adapter.dump())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("algorithm", HYPER)
@pytest.mark.parametrize("peer", PEERS)
def test_steps_are_those_of_the_package(peer, algorithm, nesterov):
    steps_as_by_hand(PEERS[peer], peer, algorithm, nesterov)


@pytest.mark.parametrize("lost", ["wd_ratio", "nesterov", "eps"])
def test_a_hyperparameter_that_is_not_passed_on_is_seen(lost):
    class Forgets(AdampAdapter):
        def _make(self, options, layouts):
            return super()._make({name: x for name, x in options.items() if name != lost}, layouts)

    with pytest.raises(AssertionError, match="p of w"):
        steps_as_by_hand(Forgets, "adamp", "adamp", nesterov=True)


def test_a_state_that_is_not_passed_on_is_seen():
    class Forgets(AdampAdapter):
        def _save_step(self, saved, step):
            super()._save_step(saved, 1)

    with pytest.raises(AssertionError, match="assert 2 == 3"):
        steps_as_by_hand(Forgets, "adamp", "adamp", nesterov=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", HYPER)
@pytest.mark.parametrize("peer", [*PEERS, "torch"])
def test_a_loaded_state_is_held(peer, algorithm, dtype):
    make = PEERS.get(peer, TorchAdapter)
    kind = DTYPES[dtype]
    start = {"w": np.ones((4, 3), kind), "b": np.ones(5, kind)}
    adapter = make()
    hyper = HYPER[algorithm] | {"nesterov": False}
    adapter.create(algorithm, hyper, {name: Parameter(x, Layout()) for name, x in start.items()})
    moments = {
        moment: {name: (np.arange(x.size).reshape(x.shape) / 7 + index).astype(kind) for name, x in start.items()}
        for index, moment in enumerate(MOMENTS[algorithm])
    }
    state = State(7, {name: (3 * x).astype(kind) for name, x in start.items()}, moments)
    adapter.load(state)
    assert_same(adapter.dump(), state)
    adapter.step(start)
    assert adapter.dump().step == 8


def test_capabilities():
    for make in PEERS.values():
        capabilities = make().capabilities()
        assert capabilities.layouts == "first"
        assert capabilities.fixed == {"project_momentum": False}
        assert capabilities.version == (
            f"{capabilities.name} {metadata.version(capabilities.name)}, torch {torch.__version__}"
        )
    assert {make().capabilities().execution for make in PEERS.values()} == {"eager", "loop", "foreach"}


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_timm_runs_the_files_of_the_installed_distribution(name):
    path = inspect.getfile(getattr(TimmAdapter()._package(), name))
    (entry,) = (x for x in metadata.files("timm") if str(x) == f"timm/optim/{name.lower()}.py")
    assert str(entry.locate()) == path
    with open(path, "rb") as file:
        digest = urlsafe_b64encode(hashlib.sha256(file.read()).digest()).decode().rstrip("=")
    assert entry.hash.value == digest


# What they compute: every frozen vector that a package can be put to.


def supported(vector, group):
    return vector.layout == Layout() and not group.hyper.get("project_momentum")


def judged(make, group, judge=judge_vectors):
    """What a group finds, by vector; None conforms. If a vector raises, each is judged alone."""
    problem = Problem(group, group.dtype, "torch")
    try:
        return {id: x.problem for id, x in judge(create(make, problem), problem).items()}
    except Exception as error:
        if len(group.vectors) == 1:
            return {group.vectors[0].id: f"raised {type(error).__name__}: {error}"}
        return {id: found for x in group.vectors for id, found in judged(make, group.only([x.id]), judge).items()}


def judge_by_the_oracle(adapter, problem):
    """As `judge_vectors` of a single vector, of a problem for which no intervals are frozen."""
    (vector,) = problem.case.vectors
    if problem.case.steps == 1:
        adapter.load(problem.initial())
    return {vector.id: walk(adapter, problem, problem.case.steps)}


@cache
def found(peer, dtype):
    """Vector -> what is wrong, SGDP without Nesterov being judged as what the package is known to compute."""
    results = {}
    for group in load().groups:
        mine = group.only([x.id for x in group.vectors if supported(x, group)])
        if group.dtype != dtype or not mine.vectors:
            continue
        if peer in PROJECT_THEIR_BUFFER and group.algorithm == "sgdp" and not group.hyper["nesterov"]:
            theirs = replace(mine, hyper=mine.hyper | {"project_momentum": True})
            for vector in mine.vectors:
                results |= judged(PEERS[peer], theirs.only([vector.id]), judge_by_the_oracle)
        else:
            results |= judged(PEERS[peer], mine)
    return results


def one(peer, id, dtype):
    (group,) = (group for group in load().groups if group.dtype == dtype and any(x.id == id for x in group.vectors))
    return judged(PEERS[peer], group.only([id]))[id]


EMPTY = ["*/empty/empty-rows", "*/empty/empty-columns"]
ADDED_EPS = ["*/eps/near-eps", "adamp/no-rate/*"]
EARLY_STEPS = ["adamp/beginning/*", "adamp/nesterov-beginning/*"]

# (peer, dtype) -> globs of the vectors that depart, and of those that may, being a few bounds off at most.
DEPARTURES = {
    ("adamp", "float32"): (EMPTY, []),
    ("adamp", "float64"): ([*EMPTY, "adamp/second-step/*"], EARLY_STEPS),
    ("timm", "float32"): (EMPTY, []),
    ("timm", "float64"): ([*EMPTY, "adamp/second-step/*"], EARLY_STEPS),
    ("torch-optimizer", "float32"): ([*EMPTY, *ADDED_EPS], []),
    ("torch-optimizer", "float64"): (
        [*EMPTY, *ADDED_EPS, "*/on-threshold", "*/on-both", "adamp/second-step/*"],
        EARLY_STEPS,
    ),
    ("loop", "float32"): ([*EMPTY, "*/full-decay/*", "adamp/eps/*"], ["adamp/first-step/*", *EARLY_STEPS]),
    ("foreach", "float32"): ([*EMPTY, "*/full-decay/*", "adamp/eps/*"], ["adamp/first-step/*", *EARLY_STEPS]),
}
PROJECT_THEIR_BUFFER = ("adamp", "torch-optimizer")


def matching(ids, globs):
    for glob in globs:
        assert any(fnmatchcase(id, glob) for id in ids), f"{glob} speaks of no vector"
    return {id for id in ids for glob in globs if fnmatchcase(id, glob)}


@pytest.mark.parametrize(("peer", "dtype"), DEPARTURES)
def test_departures_are_those_that_are_published(peer, dtype):
    """Of SGDP that projects its buffer, what remains when it is judged as the SGDP that does so."""
    surely, perhaps = DEPARTURES[peer, dtype]
    results = found(peer, dtype)
    assert len(results) > 180
    departs = {id for id, problem in results.items() if problem}
    assert matching(results, surely) <= departs <= matching(results, [*surely, *perhaps])


@pytest.mark.parametrize("peer", PROJECT_THEIR_BUFFER)
def test_the_momentum_buffer_is_projected(peer):
    """It is the stored momentum that departs, wherever there is something to project; not so with Nesterov."""
    for dtype in ("float64", "float32"):
        for name in ("channel", "layer"):
            assert one(peer, f"sgdp/views/{name}", dtype).startswith(f"m of {name!r}")
            assert one(peer, f"sgdp/nesterov/{name}", dtype) is None
        assert one(peer, "sgdp/views/none", dtype) is None
    (group,) = (group for group in load().groups if group.id == "core/sgdp-projected-momentum.float64")
    assert set(judged(PEERS[peer], group).values()) == {None}
    for other in ("timm", *KOZISTR):
        assert judged(PEERS[other], group)["sgdp/projected-momentum/channel"].startswith("m of 'channel'")


@pytest.mark.parametrize("peer", KOZISTR)
def test_eps_stands_before_the_bias_correction(peer):
    for id, problem in found(peer, "float64").items():
        case = id.rpartition("/")[0]
        if case in ("adamp/views", "adamp/nesterov", "adamp/shapes", "adamp/threshold", "adamp/eps"):
            assert "times the bound" in problem, id
        if case in ("adamp/millionth-step", "adamp/no-memory"):  # where the correction is 1
            assert problem is None, id


@pytest.mark.parametrize("peer", KOZISTR)
@pytest.mark.parametrize("id", ["adamp/full-decay/none", "sgdp/full-decay/none"])
def test_a_decay_ratio_of_1_is_refused(peer, id):
    assert "wd_ratio must be in the range [0.0, 1.0)" in one(peer, id, "float32")


def test_a_learning_rate_of_0_is_refused():
    assert "Invalid learning rate: 0.0" in one("torch-optimizer", "adamp/no-rate/none", "float32")


@pytest.mark.parametrize("peer", PEERS)
def test_tensors_without_elements_raise(peer):
    for algorithm in HYPER:
        assert "raised RuntimeError" in one(peer, f"{algorithm}/empty/empty-rows", "float32")
        assert "raised ZeroDivisionError" in one(peer, f"{algorithm}/empty/empty-columns", "float32")
        assert one(peer, f"{algorithm}/empty/empty-vector", "float32") is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("peer", PEERS)
def test_half_precision_is_computed_in_its_own_type(peer, dtype):
    for id in ("adamp/views/none", "adamp/first-step/none", "sgdp/views/antiparallel", "sgdp/zeros/zero-parameter"):
        assert one(peer, id, dtype).split()[0] in "pmv", id
    for id in ("adamp/views/scalar", "sgdp/views/scalar"):
        assert one(peer, id, dtype) is None


@pytest.mark.parametrize("peer", PEERS)
def test_eps_is_zero_in_float16(peer):
    ids = ["adamp/first-step/zero", "adamp/first-step/vector"]
    (group,) = (group for group in load().groups if group.id == "core/adamp-first-step.float16")
    for id in ids:
        problem = Problem(group.only([id]), "float16", "torch")
        adapter = create(PEERS[peer], problem)
        adapter.step(problem.gradients(adapter.dump()))
        (after,) = adapter.dump().parameters.values()
        assert np.all(np.isnan(after))
        assert one(peer, id, "float16").startswith("p of")
        assert one(peer, id, "bfloat16") is None


def test_foreach_rounds_its_coefficients_to_bfloat16():
    for id in ("sgdp/views/vector", "adamp/nesterov/vector"):
        assert one("loop", id, "bfloat16") is None
        assert "times the bound" in one("foreach", id, "bfloat16")


# What they refuse. Integer parameters and gradients of another kind or shape are PyTorch's own refusals.
BY_PYTORCH = {
    f"{algorithm}/invalid/{name}"
    for algorithm in HYPER
    for name in (
        "parameter-integer",
        "gradient-integer",
        "gradient-complex",
        "gradient-transposed",
        "gradient-flat",
        "gradient-one-row",
    )
}
BETAS = [f"adamp/invalid/{name}" for name in ("beta1-*", "beta2-*")]
NEGATIVE = [f"*/invalid/{name}-negative" for name in ("lr", "eps", "weight-decay", "wd-ratio")]
REFUSED = {
    "adamp": [],
    "timm": [],
    "torch-optimizer": [*BETAS, "*-negative"],
    "loop": [*BETAS, *NEGATIVE, "*/invalid/wd-ratio-nan"],
    "foreach": [*BETAS, *NEGATIVE, "*/invalid/wd-ratio-nan"],
}


@pytest.mark.parametrize("peer", PEERS)
def test_refusals_are_those_that_are_published(peer):
    put = [refusal for refusal in load().refusals if "layout-" not in refusal.id]
    refused = {refusal.id for refusal in put if judge_refusal(PEERS[peer], refusal) is None}
    listed = {refusal.id for refusal in put for glob in REFUSED[peer] if fnmatchcase(refusal.id, glob)}
    assert refused == listed | BY_PYTORCH


@pytest.mark.parametrize("peer", PEERS)
def test_a_state_of_another_shape_is_noticed_when_the_step_is_under_way(peer):
    (refusal,) = (x for x in load().refusals if x.id == "adamp/invalid/state-transposed")
    assert judge_refusal(PEERS[peer], refusal) == "step 1 before, 2 after the refusal"


# Runs, over the tensors whose rows are the first axis.


def bench(make, id, dtype="float32", sources=None):
    (case,) = (case for case in (*DESIGNED, *DIGITS) if case.id == id)
    case = replace(case, tensors={name: x for name, x in case.tensors.items() if x.layout == Layout()})
    problem = Problem(case, dtype, "torch")
    return Bench(create(make, problem), problem, make, sources or {})


@pytest.mark.parametrize("mode", ["resume", "purity"])
@pytest.mark.parametrize("id", ["adamp/run", "sgdp/run"])
@pytest.mark.parametrize("peer", PEERS)
def test_they_resume_and_are_pure(peer, id, mode):
    assert RUNS[mode](bench(PEERS[peer], id)).problem is None


def test_runs():
    for peer in PEERS:
        problems = {id: RUNS["shadow"](bench(PEERS[peer], id)).problem for id in ("adamp/nesterov-run", "sgdp/run")}
        assert bool(problems["adamp/nesterov-run"]) == (peer in KOZISTR)
        assert bool(problems["sgdp/run"]) == (peer in PROJECT_THEIR_BUFFER)


def relayed(peer, id):
    """What is found where the peer hands over to ours and takes back, and where ours does so to the peer."""
    theirs, ours = PEERS[peer], TorchAdapter
    there, back = bench(theirs, id, sources={"ours": ours}), bench(ours, id, sources={"theirs": theirs})
    return [RUNS["relay"](each).problem for each in (there._replace(name="theirs"), back._replace(name="ours"))]


@pytest.mark.parametrize("id", ["adamp/digits", "adamp/run", "adamp/nesterov-run", "sgdp/digits"])
@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer not in KOZISTR])
def test_they_relay_with_ours(peer, id):
    """A training goes from them to ours and back, and the other way round; that of `sgdp/digits` is with Nesterov."""
    assert relayed(peer, id) == [None, None]


@pytest.mark.parametrize("peer", PEERS)
def test_a_relay_without_nesterov_needs_the_same_momentum_buffer(peer):
    """Those that project it relay with our `project_momentum=True`, the others with our default."""
    projects = peer in PROJECT_THEIR_BUFFER
    together, apart = ("projected-run", "run") if projects else ("run", "projected-run")
    assert relayed(peer, f"sgdp/{together}") == [None, None]
    alone, adopted = relayed(peer, f"sgdp/{apart}")
    assert alone.startswith("m of 'dense'")  # their own first leg
    assert adopted.startswith("adopted from ours by theirs: m of 'dense'")


@pytest.mark.parametrize("peer", KOZISTR)
def test_a_relay_of_adamp_shows_where_eps_stands(peer):
    """The gradients of a real network are small enough for it. SGDP has no such eps."""
    alone, adopted = relayed(peer, "adamp/digits")
    assert alone.startswith("p of ")
    assert adopted.startswith("adopted from ours by theirs: p of ")
    assert relayed(peer, "sgdp/digits") == [None, None]


# Outside the vectors.


@pytest.mark.parametrize("peer", PEERS)
def test_the_first_step_of_a_parameter_that_joins_late(peer):
    """STATE-4: pytorch-optimizer counts the steps of the group, not of the parameter."""
    early, joins = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = package(peer).AdamP([early, joins], lr=1e-2)
    for step in range(11):
        early.grad = torch.ones(3)
        joins.grad = torch.ones(3) if step == 10 else None
        optimizer.step()
    assert 1 - joins[0].item() == pytest.approx(4.8e-3 if peer in KOZISTR else 1e-2, rel=0.01)


@pytest.mark.parametrize("peer", KOZISTR)
def test_coupled_decay_does_nothing(peer):
    ends = []
    for weight_decay in (0.0, 0.5):
        parameter = torch.nn.Parameter(torch.arange(1.0, 9.0).reshape(2, 4))
        options = {"weight_decay": weight_decay, "weight_decouple": False, "foreach": peer == "foreach"}
        optimizer = package(peer).AdamP([parameter], lr=0.1, **options)
        for _ in range(3):
            parameter.grad = torch.full((2, 4), 0.3)
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("peer", PEERS)
def test_strides(peer):
    """Only timm takes a parameter or a gradient that is not contiguous."""
    values, gradient = torch.arange(1.0, 25.0).reshape(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    strided = {
        "channels_last": (values.to(memory_format=torch.channels_last), gradient.to(memory_format=torch.channels_last)),
        "gradient": (values, gradient.transpose(2, 3)),
    }
    for value, grad in strided.values():
        parameter = torch.nn.Parameter(value.clone())
        parameter.grad = grad.clone(memory_format=torch.preserve_format)
        optimizer = package(peer).AdamP([parameter], lr=0.1)
        if peer == "timm":
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="view size is not compatible"):
                optimizer.step()
