"""The kernels for the CPU, where they do what the other paths have not: tiles, threads, bits, caches."""

import copy
import subprocess
import sys
import threading
from dataclasses import asdict

import numpy as np
import pytest
import torch

import adamp_torch._paths
from adamp_conformance.adapter import DTYPES, MOMENTS, Parameter, State
from adamp_conformance.adapters.torch import TorchAdapter
from adamp_conformance.judge import judge_step
from adamp_spec import AdamPHyper, Branch, Layout, Rows, SGDPHyper
from adamp_torch import SGDP, AdamP
from adamp_torch import _fused_cpu as fused

CLASSES = {"adamp": AdamP, "sgdp": SGDP}
both = pytest.mark.parametrize("algorithm", CLASSES)


def hyper(algorithm, **options):
    common = {"lr": 1e-2, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.3, "eps": 1e-8, "nesterov": False} | options
    return asdict(AdamPHyper(**common) if algorithm == "adamp" else SGDPHyper(momentum=0.9, **common))


def make(algorithm, params, **options):
    own = {} if algorithm == "adamp" else {"momentum": 0.9}
    return CLASSES[algorithm](params, **({"lr": 1e-2, "weight_decay": 0.1} | own | options))


def parameters(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


# --- tiles -----------------------------------------------------------------------------------------------------------

# What makes each branch: a gradient without its part along each row, along the slice, or with both.
GRADIENTS = {Branch.CHANNEL: "row", Branch.LAYER: "layer", Branch.NONE: None}
LARGE = {
    "rows of one tile": ((300, 500), Layout(0)),
    "rows longer than a tile": ((3, fused.TILE + 1000), Layout(0)),
    "a row that is a tile": ((4, fused.TILE), Layout(0)),
    "one row": ((1, 2 * fused.TILE + 5), Layout(0)),
    "rows of one element": ((2 * fused.TILE, 1), Layout(0)),
    "slices of several tiles": ((3, 50, 1000), Layout(1, batch=0)),
    "many small slices": ((500, 3, 40), Layout(1, batch=0)),
}
# The first passes both views or none, the second is orthogonal to nothing, of the third noise passes here and there.
EXCEPTIONS = ("one row", "rows of one element", "many small slices")


def gradient(p, rows, axes, rng):
    x = p.astype(np.float64).reshape(rows.shape)
    g = rng.standard_normal(rows.shape) + 0.5 * x
    if axes is not None:
        axes = getattr(rows, axes)
        g = g - x * (g * x).sum(axes, keepdims=True) / (x * x).sum(axes, keepdims=True)
    return g.reshape(p.shape).astype(p.dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
@both
def test_slices_of_all_sizes_conform_in_every_branch(algorithm, name, dtype):
    shape, layout = LARGE[name]
    rng = np.random.default_rng(0)
    rows = layout.rows(shape)
    p = rng.standard_normal(shape).astype(DTYPES[dtype])
    tensors = {branch.name: Parameter(p, layout) for branch in GRADIENTS}
    numbers = hyper(algorithm, nesterov=dtype == "float32")
    adapter = TorchAdapter("fused")
    adapter.create(algorithm, numbers, tensors)
    moments = {moment: {k: np.abs(x.value * x.value) for k, x in tensors.items()} for moment in MOMENTS[algorithm]}
    before = State(5, {k: x.value for k, x in tensors.items()}, moments)
    adapter.load(before)
    gradients = {branch.name: gradient(p, rows, axes, rng) for branch, axes in GRADIENTS.items()}
    adapter.step(gradients)
    verdict = judge_step(algorithm, numbers, {k: layout for k in tensors}, before, gradients, adapter.dump())
    assert verdict.conforms, (verdict.problem, verdict.margin, verdict.place)
    if name not in EXCEPTIONS:
        for branch in GRADIENTS:
            assert {Branch(int(b)) for b in verdict.branches[branch.name].ravel()} == {branch}


@pytest.mark.parametrize("threads", [1, 5])
def test_a_plan_covers_every_element_once(threads):
    n = fused.WAVE
    sizes = ((1, 0, 100_000), (1, 300, 500), (1, 3, fused.TILE + 1), (7, 2, 9), (2, 40, 3000), (1, 0, 0), (1, 40, n))
    plan = fused._plan(sizes, threads)
    for tensor, (count, rows, length) in enumerate(sizes):
        own = sorted(plan.tiles[plan.tiles[:, 0] == tensor, 1:].tolist())
        assert [start for start, _ in own] == [0, *(end for _, end in own[:-1])][: len(own)]
        assert (own[-1][1] if own else 0) == count * max(rows, 1) * length
        assert all(0 < end - start <= fused.TILE for start, end in own)
    assert plan.slices.ravel().tolist() == sorted(plan.slices.ravel().tolist())
    assert len(plan.slices) == 1 + 1 + 2 + 1
    assert len(plan.waves) > 1
    assert plan.waves[0, 0] == 0
    assert (plan.waves[1:, 0] == plan.waves[:-1, 1]).all()
    assert plan.waves[-1, 1] == len(plan.slices)
    assert sorted(tile for a, b, _ in plan.jobs.tolist() for tile in range(a, b)) == list(range(len(plan.tiles)))
    of_job = plan.jobs[:, 2].tolist()
    assert of_job == sorted(of_job)
    assert [of_job.count(wave) for wave in range(len(plan.waves))] == plan.waves[:, 2].tolist()
    assert all(wave == len(plan.waves) for a, _, wave in plan.jobs.tolist() if a < plan.whole)


# --- which tensors ---------------------------------------------------------------------------------------------------


def rows_of(shape, layout=None):
    return (layout or Layout(0)).rows(shape)


@pytest.mark.parametrize(
    ("x", "layout", "sizes"),
    [
        (torch.zeros(4, 6), Layout(0), (1, 4, 6)),
        (torch.zeros(4, 6), Layout(1), None),
        (torch.zeros(4, 6).t(), Layout(1), (1, 4, 6)),
        (torch.zeros(4, 6), Layout(None), (1, 0, 24)),
        (torch.zeros(4, 6).t(), Layout(None), (1, 0, 24)),
        (torch.zeros(4, 6, 3, 3).to(memory_format=torch.channels_last), Layout(0), (1, 4, 54)),
        (torch.zeros(4, 1, 3, 3).to(memory_format=torch.channels_last), Layout(0), (1, 4, 9)),
        (torch.zeros(4, 6, 5), Layout(1, batch=0), (4, 6, 5)),
        (torch.zeros(4, 6, 5), Layout(0, batch=1), None),
        (torch.zeros(12, 7), Layout(1, batch=0, view=(3, 4, 7)), (3, 4, 7)),
        (torch.zeros(7, 12).t(), Layout(1, batch=0, view=(3, 4, 7)), None),
        (torch.zeros(4, 6, 2)[..., 0], Layout(0), None),
        (torch.zeros(5, 2)[:, 0], Layout(0), None),
        (torch.zeros(()), Layout(0), (1, 0, 1)),
        (torch.zeros(0, 3), Layout(0), (1, 0, 0)),
        (torch.zeros(6, 5), Layout((0, 1)), (1, 30, 1)),
        (torch.zeros(1, 16), Layout(0), (1, 1, 16)),
    ],
    ids=str,
)
def test_memory_is_read_as_slices_rows_and_elements(x, layout, sizes):
    rows = layout.rows(x.shape)
    assert fused._sizes(x.shape, x.stride(), rows) == sizes
    assert fused.knows((x, x, x, rows)) is (sizes is not None)


@pytest.mark.parametrize(
    "others",
    [
        (torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 6)),
        (torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.bfloat16)),
        (torch.zeros(4, 6), torch.zeros(6, 4).t()),
    ],
)
def test_tensors_that_differ_go_the_reference_way(others):
    assert not fused.knows((torch.zeros(4, 6), *others, rows_of((4, 6))))
    assert fused.knows((torch.zeros(4, 6), torch.zeros(6, 4).t(), torch.zeros(4, 6), rows_of((4, 6))))


@both
def test_what_the_kernels_do_not_know_is_stepped_all_the_same(algorithm):
    params = parameters([(4, 6), (5, 3), (7,)])
    layouts = {params[1]: Layout(1)}
    reference = copy.deepcopy(params)
    for p, q in zip(params, reference, strict=True):
        q.grad = p.grad.clone()
    here = make(algorithm, params, layouts=layouts, fused=True)
    there = make(algorithm, reference, layouts={reference[1]: Layout(1)}, foreach=False, fused=False)
    for _ in range(2):
        here.step()
        there.step()
    assert torch.equal(params[1], reference[1])
    torch.testing.assert_close(params, reference)
    assert {int(here.state[p]["step"]) for p in params} == {2}


# --- threads ---------------------------------------------------------------------------------------------------------

SHAPES = [(600, 400), (50,), (3, 100_000), (40, 30, 3, 3), (256, 1000), (7, 5)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(algorithm, steps=3):
    params = parameters(SHAPES)
    optimizer = make(algorithm, params)
    for _ in range(steps):
        optimizer.step()
    return params


@pytest.fixture(params=["OpenMP's", "our own"])
def team(request, monkeypatch):
    if request.param == "our own":
        monkeypatch.setattr(fused, "_OPENMP", None)
    elif fused._OPENMP is None:
        pytest.skip("PyTorch has not brought GCC's OpenMP here")


@both
def test_the_number_of_threads_changes_no_bit(algorithm, threads, team):
    threads(1)
    expected = run(algorithm)
    for n in (2, 3, 7):
        threads(n)
        assert all(map(torch.equal, run(algorithm), expected))


def test_as_many_threads_work_as_pytorch_has(threads, team, monkeypatch):
    seen = set()
    kernel = fused._take_jobs
    monkeypatch.setattr(fused, "_take_jobs", lambda *x: (seen.add(threading.get_ident()), kernel(*x))[1])
    threads(1)
    run("adamp", steps=10)
    assert seen == {threading.get_ident()}
    threads(3)
    run("adamp", steps=10)
    assert len(seen) == 3


def test_pytorch_on_linux_brings_its_threads():
    assert fused._OPENMP is not None or sys.platform != "linux"


def test_what_goes_wrong_in_a_thread_is_raised(threads, team, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(fused, "_take_jobs", fail)
    threads(2)
    with pytest.raises(MemoryError, match="no room"):
        run("adamp")


def test_optimizers_step_at_the_same_time(team):
    expected = run("adamp")
    results = {}
    workers = [threading.Thread(target=lambda i=i: results.update({i: run("adamp")})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        assert all(map(torch.equal, results[i], expected))


FORK = """
import os, torch
from adamp_torch import AdamP

torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.ones(500, 1000)) for _ in range(2)]
for p in params:
    p.grad = torch.ones(500, 1000)
here, there = (AdamP([p]) for p in params)
here.step()
there.step()
here.step()
child = os.fork()
if child == 0:
    there.step()
    os._exit(int(params[0].detach().numpy().tobytes() != params[1].detach().numpy().tobytes()))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


FORK_FIRST = """
import os, torch
from adamp_torch import AdamP

torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(4, 4))  # PyTorch's own operations hang in a child where they would be parallel
p.grad = torch.ones(4, 4)
torch.ones(500, 1000).sum()  # OpenMP's threads are there
child = os.fork()
if child == 0:
    AdamP([p]).step()
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("code", [FORK, FORK_FIRST], ids=["after a step", "before any"])
def test_a_fork_steps_too(code):
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_default_device_does_not_matter():
    expected = run("adamp")
    params = parameters(SHAPES)
    optimizer = make("adamp", params)
    with torch.device("meta"):
        for _ in range(3):
            optimizer.step()
    assert all(map(torch.equal, params, expected))


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_rounded_as_pytorch_does(dtype):
    p = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).repeat(8)
    generator = torch.Generator().manual_seed(0)
    g = (p.float().nan_to_num(1, 1, 1) * torch.randn(p.shape, generator=generator)).to(dtype)
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = g
    SGDP([parameter], lr=1e-2, fused=True).step()
    expected = (p.float() - torch.tensor(1e-2) * (0 + g.float())).to(dtype)  # the momentum was 0, not -0
    nan = expected.isnan()
    assert torch.equal(parameter.isnan(), nan)
    assert torch.equal(parameter.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@both
def test_gradients_are_unscaled_and_left_alone(algorithm, dtype):
    scale = torch.tensor(3.0)
    params, expected = parameters(SHAPES, dtype), parameters(SHAPES, torch.float32)
    for p, q in zip(params, expected, strict=True):
        q.data.copy_(p.float())
        q.grad = p.grad.float() * (1 / scale)
    gradients = [p.grad.clone() for p in params]
    scaled, plain = make(algorithm, params, fused=True), make(algorithm, expected, fused=True)
    scaled.grad_scale, scaled.found_inf = scale, torch.tensor(0.0)
    scaled.step()
    plain.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q.to(dtype))


@both
def test_a_step_with_an_overflow_does_nothing(algorithm):
    params = parameters(SHAPES)
    optimizer = make(algorithm, params, fused=True)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    after = (params, optimizer.state_dict()["state"])
    assert all(map(torch.equal, after[0], before[0]))
    for i, entry in after[1].items():
        assert all(torch.equal(entry[key], before[1][i][key]) for key in entry)


# --- without numba, without a cache ----------------------------------------------------------------------------------

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import torch
from adamp_torch import AdamP
p = torch.nn.Parameter(torch.ones(3, 2))
p.grad = torch.ones(3, 2)
AdamP([p]).step()
try:
    AdamP([p], fused=True)
except RuntimeError as error:
    print(error)
"""


def test_without_numba_the_default_steps_and_fused_says_what_to_install():
    run = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (
        "fused=True on cpu needs numba, which cannot be imported: pip install numba, or pass fused=None\n"
    )


def test_kernels_are_compiled_at_the_first_step_and_not_on_import():
    code = "import sys, adamp_torch; assert 'numba' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_kernels_work_where_no_cache_can_be_written(monkeypatch):
    def njit(cache=False, **_):
        def decorate(function):
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return "compiled"

        return decorate

    monkeypatch.setattr(fused, "njit", njit)
    assert fused._compiled()(len) == "compiled"


def test_the_device_types_with_kernels_are_named():
    with pytest.raises(RuntimeError, match="fused=True is for parameters on cpu and cuda, not on meta"):
        AdamP([torch.nn.Parameter(torch.zeros(2, 2, device="meta"))], fused=True)
    assert adamp_torch._paths.fused_kernels("meta") is None
    assert isinstance(rows_of((2, 2)), Rows)
