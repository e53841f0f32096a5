"""What `adamp_torch._fused_cuda` does to tensors. `test_torch_triton.py` runs this file, by itself it is not collected.

On a machine with CUDA everything runs there; elsewhere Triton's interpreter (TRITON_INTERPRET=1) runs the kernels.
"""

import copy
import importlib.util
import itertools
import sys
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import adamp_torch._base
import adamp_torch._paths
from adamp_conformance import vectors
from adamp_conformance.adapter import DTYPES, MOMENTS, Parameter, State
from adamp_conformance.adapters.torch import TorchAdapter
from adamp_conformance.judge import judge_step
from adamp_conformance.modes import Problem, create, judge_vectors
from adamp_spec import AdamPHyper, Branch, Layout, SGDPHyper
from adamp_torch import SGDP, AdamP, _fused_cuda

CLASSES = {"adamp": AdamP, "sgdp": SGDP}
FULL_TILE = _fused_cuda.TILE
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

both = pytest.mark.parametrize("algorithm", CLASSES)

if triton.knobs.runtime.interpret:
    from triton.runtime import interpreter

    def _cast(builder, source, target, cast=interpreter.InterpreterBuilder.cast_impl):
        """The interpreter truncates to bfloat16, where hardware rounds, and errs on its subnormal numbers."""
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return cast(builder, source, target)

    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_fp_trunc = _cast
    interpreter.InterpreterBuilder.create_fp_ext = _cast

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )  # a quarter of the time

    class _Patched:
        def restore(self):
            pass

    # It patches the language at each call of each function, which takes half of the time; once is enough.
    _patch = interpreter._patch_lang
    _seen = set()

    def _patch_once(fn):
        if fn.__module__ not in _seen:
            _seen.add(fn.__module__)
            _patch(fn)
        return _Patched()

    interpreter._patch_lang = _patch_once


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The module under test, whatever the device, with tiles so small that little is enough to span several."""
    use(_fused_cuda, monkeypatch)
    return _fused_cuda


def use(module, monkeypatch):
    monkeypatch.setattr(module, "TILE", 1024)
    monkeypatch.setattr(adamp_torch._base, "fused_kernels", lambda device_type: module)
    monkeypatch.setattr(adamp_torch._paths, "fused_kernels", lambda device_type: module)


def make_adapter():
    return TorchAdapter("fused", DEVICE.type)


# --- conformance -----------------------------------------------------------------------------------------------------


def failing(groups):
    """The vectors of some groups that fail, and how many there are."""
    found, judged = {}, 0
    for group in groups:
        problem = Problem(group, group.dtype, "torch")
        outcomes = judge_vectors(create(make_adapter, problem), problem)
        found |= {f"{group.dtype} {id}": x.problem for id, x in outcomes.items() if x.problem}
        judged += len(outcomes)
    return found, judged


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_vectors_pass(dtype):
    groups = [group for group in vectors.load().groups if group.dtype == dtype]
    assert failing(groups) == ({}, sum(len(group.vectors) for group in groups))


def test_vectors_pass_with_tiles_of_full_size(monkeypatch, kernels):
    monkeypatch.setattr(kernels, "TILE", FULL_TILE)
    names = ("core/adamp-views.float32", "large/adamp-long-rows.float32", "core/sgdp-shapes.float64")
    found, judged = failing([group for group in vectors.load().groups if group.id in names])
    assert found == {}
    assert judged > 10


# fault -> what stands in the module, what is planted, the group of vectors that must find it
FAULTS = {
    "half of the rows for all": ("failures == 0,", "failures * 2 < 8,", "core/adamp-views.float32"),
    "NaN passes": ("return cosine < threshold", "return (cosine >= threshold) == 0", "edge/adamp-non-finite.float32"),
    "<= for <": ("return cosine < threshold", "return cosine <= threshold", "core/adamp-threshold.float32"),
    "no layer view": ("tl.where(layer, LAYER, NEITHER)", "NEITHER", "core/sgdp-views.float32"),
    "lost wd_ratio": ("tl.where(view == NEITHER, 1.0,", "tl.where(view == view, 1.0,", "core/adamp-views.float32"),
    "layer tiles left as they are": (
        "projected = view != NEITHER",
        "projected = view == CHANNEL",
        "core/adamp-views.float32",
    ),
    "the first row for all": (
        "of_row = tl.load(tile + ROW) * segments",
        "of_row = segments * 0",
        "large/adamp-long-rows.float32",
    ),
    "long rows never fail": ("failures += 1 - passes", "failures += 0 * passes", "large/adamp-long-rows.float32"),
    "wrong part of g in Nesterov": ("NESTEROV_OF_G: 1 - beta1", "NESTEROV_OF_G: beta1", "core/adamp-nesterov.float32"),
    "momentum never projected": ("tl.where(keep, q, m)", "m", "core/sgdp-projected-momentum.float32"),
    "rounded moments": ('"EXACT": all(x == work for x in dtypes[2:])', '"EXACT": True', "core/sgdp-views.float16"),
    "undivided decay": ('options["weight_decay"] / (1 - mu)', 'options["weight_decay"]', "core/sgdp-views.float32"),
    "a column too few": ("(columns < columns_left)", "(columns < columns_left - 1)", "core/adamp-shapes.float32"),
    "strides of p for all": ("set(axes[0][1:]) == {stride}", "axes[0][1] == stride", None),
}


@pytest.fixture
def planted(request, tmp_path, monkeypatch):
    """The module with a fault."""
    before, after, _ = FAULTS[request.param]
    source = Path(_fused_cuda.__file__).read_text()
    assert source.count(before) == 1, f"{before!r} must stand once"
    path = tmp_path / f"planted_{abs(hash(request.param))}.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    use(module, monkeypatch)
    return request.param


@pytest.mark.parametrize("planted", [name for name, fault in FAULTS.items() if fault[2]], indirect=True)
def test_a_planted_fault_is_found_by_the_vectors(planted):
    groups = [group for group in vectors.load().groups if group.id == FAULTS[planted][2]]
    found, judged = failing(groups)
    assert judged
    assert found


# --- all that tensors can be ------------------------------------------------------------------------------------------

SHAPES = [  # shape, layout
    ((4, 8), Layout(0)),
    ((80, 24), Layout(0)),  # several tiles of several rows
    ((6, 3, 3, 3), Layout(0)),
    ((3, 40), Layout(1)),
    ((2, 530), Layout(0)),  # rows longer than a tile
    ((2, 2052), Layout(0)),  # the same in steps of 16 bytes
    ((20, 1), Layout(0)),  # rows of one element
    ((4, 8), Layout(1)),
    ((3, 3, 4, 6), Layout(-1)),
    ((2, 6, 5), Layout(2, batch=0)),
    ((3, 6, 8), Layout(1, batch=0)),
    ((12, 7), Layout(1, batch=0, view=(3, 4, 7))),
    ((6, 5), Layout((0, 1))),
    ((3, 2, 4, 2, 3), Layout((1, 3))),
    ((1, 16), Layout(0)),
    ((5, 4), Layout(None)),
    ((1500,), Layout(0)),
    ((9,), Layout(0)),
    ((), Layout(0)),
    ((0, 3), Layout(0)),
    ((3, 0), Layout(0)),
]


def random_hyper(algorithm, rng):
    common = {
        "lr": float(10 ** rng.uniform(-4, -1)),
        "weight_decay": float(rng.choice([0.0, 0.1, 2.0])),
        "delta": float(rng.choice([0.1, 1.0])),
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


@pytest.mark.parametrize("seed", range(2))
@both
def test_any_shape_layout_dtype_and_setting_conforms(algorithm, seed):
    rng = np.random.default_rng(seed)
    hyper = random_hyper(algorithm, rng)
    layouts = {str(i): layout for i, (_, layout) in enumerate(SHAPES)}
    values = {
        str(i): np.asarray(rng.standard_normal(shape)).astype(DTYPES[rng.choice(list(DTYPES))])
        for i, (shape, _) in enumerate(SHAPES)
    }
    adapter = make_adapter()
    adapter.create(algorithm, hyper, {name: Parameter(x, layouts[name]) for name, x in values.items()})
    moments = {
        moment: {k: np.asarray(rng.random(x.shape) - 0.5 * (moment == "m")).astype(x.dtype) for k, x in values.items()}
        for moment in MOMENTS[algorithm]
    }
    adapter.load(State(5, values, moments))
    before = adapter.dump()
    gradients = {name: random_gradient(x, layouts[name], rng) for name, x in before.parameters.items()}
    adapter.step({name: g.copy() for name, g in gradients.items()})
    verdict = judge_step(algorithm, hyper, layouts, before, gradients, adapter.dump())
    assert verdict.conforms, (verdict.problem, verdict.margin, verdict.place)
    assert {int(branch) for x in verdict.branches.values() for branch in x.ravel()} == set(Branch)


STRIDES = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
}


def parameters(seed=0, dtype=torch.float64, shapes=((4, 6), (4, 6), (3, 2, 3, 3), (5,), (3, 1100), (), (0, 2))):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
    return [torch.nn.Parameter(x) for x in drawn]


def make(algorithm, params, **options):
    own = {} if algorithm == "adamp" else {"momentum": 0.9}
    return CLASSES[algorithm](params, **({"lr": 1e-2, "weight_decay": 0.1} | own | options))


def give_gradients(optimizer, seed, only=None):
    """Random gradients, every other one orthogonal to each row of its parameter."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        x = p.detach().double()
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        if p.ndim > 1 and i % 2 == 0:
            axes = tuple(range(1, p.ndim))
            g = g - x * (g * x).sum(axes, keepdim=True) / (x * x).sum(axes, keepdim=True)
        p.grad = g.to(p.dtype) if only is None or i in only else None


def step(optimizer, seed, only=None):
    give_gradients(optimizer, seed, only)
    optimizer.step()


def all_tensors(optimizer):
    """Parameters and state, as tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach() for p in params] + [x for p in params for _, x in sorted(optimizer.state[p].items())]


def assert_close(a, b):
    for x, y in zip(all_tensors(a), all_tensors(b), strict=True):
        torch.testing.assert_close(x, y.to(x.device, x.dtype), rtol=1e-12, atol=1e-14)


LAYOUTS = (Layout(0), Layout((1, 3), batch=2), Layout(1, batch=0, view=(2, 3, 4, 4)))


def run_strides(algorithm):
    """The reference and the kernels, after a step of tensors with all strides that go together."""
    cases = list(itertools.product(list(STRIDES)[:-1], STRIDES, LAYOUTS))
    optimizers = []
    for fused in (False, True):
        start = parameters(shapes=[(6, 4, 2, 2)] * len(cases))
        params = [torch.nn.Parameter(STRIDES[of_p](x.detach())) for x, (of_p, _, _) in zip(start, cases, strict=True)]
        layouts = {p: layout for p, (_, _, layout) in zip(params, cases, strict=True)}
        optimizer = make(algorithm, params, fused=fused, layouts=layouts)
        give_gradients(optimizer, 0)
        for p, (_, of_g, _) in zip(params, cases, strict=True):
            p.grad = STRIDES[of_g](p.grad)
        optimizer.step()
        optimizers.append(optimizer)
    return optimizers


@both
def test_strides_change_nothing(algorithm):
    assert_close(*run_strides(algorithm))


@pytest.mark.parametrize("planted", ["strides of p for all"], indirect=True)
def test_strides_mixed_up_are_found(planted):
    with pytest.raises(AssertionError):
        assert_close(*run_strides("adamp"))


@both
def test_groups_have_options_and_steps_of_their_own(algorithm):
    def groups():
        a, b, c = (parameters(seed) for seed in range(3))
        return [
            {"params": a, "lr": 1e-3, "delta": 0.5},
            {"params": b, "weight_decay": 0.3, "maximize": True, "layouts": {b[0]: Layout(1), b[1]: Layout(None)}},
            {"params": c, "nesterov": True, "capturable": True},
            {"params": []},
        ]

    loop, fused = make(algorithm, groups(), fused=False), make(algorithm, groups(), fused=True)
    for t, only in enumerate([None, (0, 2, 9, 11, 15), None]):
        step(loop, t, only)
        step(fused, t, only)
    assert_close(loop, fused)


@pytest.mark.parametrize("lr", [torch.tensor(1e-2), torch.tensor([1e-2], dtype=torch.float64)], ids=str)
@both
def test_what_only_the_device_knows_is_computed_there(algorithm, lr):
    """The step counters and the learning rate; the reference reads them, so that it is told before."""
    loop = make(algorithm, parameters(), lr=float(lr), fused=False)
    fused = make(algorithm, parameters(), lr=lr.to(DEVICE), capturable=True, fused=True)
    for t in range(4):
        if t == 2:
            loop.param_groups[0]["lr"] = 5e-3
            lr.fill_(5e-3)
            fused.param_groups[0]["lr"].fill_(5e-3)
        loop.param_groups[0]["lr"] = float(lr)
        step(loop, t)
        step(fused, t)
    assert_close(loop, fused)


@both
def test_counters_on_the_device_conform(algorithm, monkeypatch):
    make_optimizer = TorchAdapter._make
    monkeypatch.setattr(
        TorchAdapter,
        "_make",
        lambda self, options, layouts: make_optimizer(self, options | {"capturable": True}, layouts),
    )
    groups = [x for x in vectors.load().groups if x.algorithm == algorithm and x.dtype in ("float64", "float32")]
    steps = ("first-step", "second-step", "millionth-step", "beginning", "no-memory")
    found, judged = failing([x for x in groups if x.id.partition(".")[0].endswith(steps)])
    assert found == {}
    assert judged > 10


# --- loss scaling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capturable", "eps"), [(False, 1e-8), (True, 30.0)])  # the larger decides by the scale
@both
def test_gradients_are_unscaled_and_overflows_skipped_on_the_device(algorithm, capturable, eps, kernels):
    plain, scaled = (make(algorithm, parameters(), fused=True, capturable=capturable, eps=eps) for _ in range(2))
    scale = torch.tensor(1024.0, device=DEVICE)
    for t, overflow in enumerate([0.0, 1.0, 0.0]):
        give_gradients(scaled, t)
        params = scaled.param_groups[0]["params"]
        for p in params:
            p.grad *= 1024
        gradients = [p.grad.clone() for p in params]
        batch = scaled._batch(scaled.param_groups[0], scaled._check_gradients(0))
        before = copy.deepcopy(all_tensors(scaled))
        getattr(kernels, algorithm)([batch], scale, torch.tensor(overflow, device=DEVICE))
        assert all(map(torch.equal, gradients, [p.grad for p in params]))
        if overflow:
            assert all(map(torch.equal, before, all_tensors(scaled)))
        else:
            step(plain, t)
    assert_close(plain, scaled)


# --- what it costs, and what it must not do ---------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch, kernels):
    """The names of the kernels that are launched, in place of what they do."""
    seen = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(self.name)

    for name in ("statistics", "decide", "update"):
        monkeypatch.setattr(kernels, name, Recorder(name))
    return seen


@both
def test_a_step_is_four_launches_for_any_number_of_tensors_and_groups(algorithm, launches):
    params = parameters(dtype=torch.float32, shapes=[(4, 6), (7,), (2, 3, 3, 3), ()] * 50)
    optimizer = make(algorithm, [{"params": params[i::3], "lr": 0.1 * (i + 1)} for i in range(3)], fused=True)
    step(optimizer, 0)
    assert launches == ["statistics", "decide", "update", "update"]
    launches.clear()
    step(make(algorithm, parameters(dtype=torch.float32, shapes=[(5,), (), (1200,)]), fused=True), 0)
    assert launches == ["decide", "update"]


@both
def test_the_same_step_gives_the_same_bits_whatever_went_before(algorithm):
    ends = []
    for t in range(2):
        optimizer = make(algorithm, parameters(dtype=torch.float32), fused=True)
        step(make(algorithm, parameters(t, torch.float32), fused=True), t)
        for seed in range(2):
            step(optimizer, seed)
        ends.append(all_tensors(optimizer))
    assert all(map(torch.equal, *ends))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="only the interpreter can count")
@pytest.mark.parametrize(
    ("nesterov", "expected"),
    [(False, {"channel": 9, "neither": 9, "layer": 12}), (True, {"channel": 9, "neither": 9, "layer": 13})],
)
def test_an_element_is_accessed_nine_times_or_twelve_in_a_layer(nesterov, expected, monkeypatch):
    counted = []
    for name, mask in (("load", 1), ("store", 2)):
        operation = getattr(interpreter.InterpreterBuilder, f"create_masked_{name}")

        def count(self, *args, operation=operation, mask=mask):
            if args[0].data.ndim == 2 and args[0].dtype.element_ty == tl.float32:
                counted.append(int(args[mask].data.sum()))
            return operation(self, *args)

        monkeypatch.setattr(interpreter.InterpreterBuilder, f"create_masked_{name}", count)
    start = torch.ones(64, 128, device=DEVICE) + torch.arange(128, device=DEVICE) % 2
    sign = (-1.0) ** torch.arange(64, device=DEVICE)[:, None]
    gradients = {"channel": torch.zeros_like(start), "layer": sign * start, "neither": start}
    found = {}
    for name, gradient in gradients.items():
        p = torch.nn.Parameter(start.clone())
        p.grad = gradient.clone()
        counted.clear()
        make("adamp", [p], fused=True, nesterov=nesterov).step()
        found[name] = sum(counted) / p.numel()
    assert found == expected


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a device has graphs")
@both
def test_a_captured_step_replays_without_a_word_from_the_host(algorithm):
    eager, captured = (make(algorithm, parameters(), fused=True, capturable=True) for _ in range(2))
    for optimizer in (eager, captured):
        step(optimizer, 0)
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(100):
        graph.replay()
        eager.step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, all_tensors(eager), all_tensors(captured)))


@both
def test_a_graph_capture_refuses_what_it_has_not_seen(algorithm, monkeypatch, kernels):
    optimizer = make(algorithm, parameters(), fused=True, capturable=True)
    step(optimizer, 0)
    optimizer.step()
    monkeypatch.setattr(kernels, "_is_capturing", lambda device: True)
    optimizer.step()  # the same tensors again
    before = copy.deepcopy(all_tensors(optimizer))
    held = [p.grad for p in optimizer.param_groups[0]["params"]]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = p.grad.clone()
    with pytest.raises(RuntimeError, match="set_to_none=False"):
        optimizer.step()
    assert all(map(torch.equal, before, all_tensors(optimizer)))
    del held
