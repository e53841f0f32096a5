"""What PyTorch's own tests ask of every optimizer, asked of AdamP and SGDP on every path.

AdamP and SGDP have an entry here as torch.optim's optimizers have one in PyTorch's database, and the tests run over
these entries. Each names the test of PyTorch (`TestOptimRenewed` in test/test_optim.py, unless another class is named)
whose demand it restates. What is asked of one path only, and most refusals, stand in test_torch_optimizer.py and
test_torch_paths.py.
"""

import copy
import importlib
import io
import pickle
import sys
from importlib import metadata
from types import ModuleType
from typing import NamedTuple

import adamp
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from adamp_spec import AdamPHyper, Layout, decide
from adamp_torch import SGDP, AdamP
from adamp_torch._paths import fused_kernels

# --- the entries -----------------------------------------------------------------------------------------------------


def adamp_inputs(device="cpu", dtype=None):
    return [
        OptimizerInput(None, {}, "default"),
        OptimizerInput(None, {"lr": 0.01}, "lr"),
        OptimizerInput(None, {"weight_decay": 0.1}, "weight_decay"),
        OptimizerInput(None, {"weight_decay": 0.1, "maximize": True}, "maximize"),
        OptimizerInput(None, {"weight_decay": 0.1, "nesterov": True}, "nesterov"),
        OptimizerInput(None, {"betas": (0.0, 0.5), "eps": 1e-3, "delta": 2.0, "wd_ratio": 0.5}, "constants"),
        OptimizerInput(None, {"lr": torch.tensor(0.01, dtype=torch.float64)}, "tensor_lr"),
        OptimizerInput(None, {"weight_decay": 0.1, "capturable": True}, "capturable"),
        OptimizerInput(
            None, {"lr": torch.tensor([0.01]), "maximize": True, "capturable": True}, "capturable_tensor_lr"
        ),
    ]


def sgdp_inputs(device="cpu", dtype=None):
    return [
        OptimizerInput(None, {"lr": 1e-3}, "plain"),
        OptimizerInput(None, {"lr": 1e-3, "momentum": 0.9}, "momentum"),
        OptimizerInput(None, {"lr": 1e-3, "momentum": 0.9, "dampening": 0.5}, "dampening"),
        OptimizerInput(None, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}, "weight_decay"),
        OptimizerInput(None, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}, "maximize"),
        OptimizerInput(None, {"lr": 1e-3, "momentum": 0.9, "nesterov": True}, "nesterov"),
        OptimizerInput(None, {"lr": 1e-3, "momentum": 0.9, "project_momentum": True, "delta": 2.0}, "project_momentum"),
        OptimizerInput(None, {"lr": torch.tensor(1e-3), "momentum": 0.9, "capturable": True}, "capturable_tensor_lr"),
    ]


def error_inputs(own, device, dtype):
    """PyTorch's inputs that every optimizer must refuse, with the words of ours where they differ, and our own."""
    inputs = get_error_inputs_for_all_optims(device, dtype)
    for x in inputs:
        x.optimizer_error_input.kwargs = {"lr": 1e-3} | x.optimizer_error_input.kwargs
        if x.error_regex == "Tensor lr must be 1-element":
            x.error_regex = "a tensor lr must hold one element"
    return inputs + [
        ErrorOptimizerInput(OptimizerInput(None, {"lr": 1e-3} | kwargs, words), error_type=error, error_regex=words)
        for kwargs, error, words in [*ERRORS, *own]
    ]


ERRORS = [
    ({"lr": -1e-2}, ValueError, "lr must be in"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be in"),
    ({"delta": -1}, ValueError, "delta must be in"),
    ({"foreach": True, "fused": True}, RuntimeError, "foreach=True and fused=True"),
    ({"foreach": True, "differentiable": True}, RuntimeError, "differentiable=True"),
    ({"fused": True, "differentiable": True}, RuntimeError, "differentiable=True"),
]
ADAMP_ERRORS = [
    ({"betas": (1.0, 0.0)}, ValueError, r"betas\[0\] must be in"),
    ({"betas": (0.9, torch.tensor(0.99))}, TypeError, r"betas\[1\]"),
]
SGDP_ERRORS = [
    ({"momentum": -0.5}, ValueError, "momentum must be in"),
    ({"momentum": 0, "nesterov": True}, ValueError, "nesterov"),
]

FUSED = fused_kernels("cpu") is not None
COMMON = {
    "supported_impls": ("foreach", "fused", "differentiable"),
    "supports_fused_on": ("cpu",) if FUSED else (),
    "has_capturable_arg": True,
    "supports_sparse": False,
    "supports_complex": False,
    "not_og_supported_flags": ("foreach", "fused", "differentiable", "maximize", "capturable"),
    "scheduler_inputs": (
        [
            lambda opt: schedulers.StepLR(opt, gamma=0.9, step_size=10),
            lambda opt: schedulers.LinearLR(opt, start_factor=0.4, total_iters=4),
        ],
        [lambda opt: schedulers.StepLR(opt, gamma=0.9, step_size=10), lambda opt: schedulers.ReduceLROnPlateau(opt)],
        [lambda opt: schedulers.PolynomialLR(opt, power=0.9, total_iters=4)],
    ),
}
ENTRIES = {
    "adamp": OptimizerInfo(
        AdamP,
        optim_inputs_func=adamp_inputs,
        optim_error_inputs_func=lambda device, dtype: error_inputs(ADAMP_ERRORS, device, dtype),
        **COMMON,
    ),
    "sgdp": OptimizerInfo(
        SGDP,
        optim_inputs_func=sgdp_inputs,
        optim_error_inputs_func=lambda device, dtype: error_inputs(SGDP_ERRORS, device, dtype),
        **COMMON,
    ),
}
PATHS = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}


class Setup(NamedTuple):
    """An entry, one of its inputs and a path."""

    entry: OptimizerInfo
    kwargs: dict
    path: str

    def make(self, params, **options):
        """The optimizer; a tensor learning rate is its own."""
        return self.entry.optim_cls(params, **copy.deepcopy(self.kwargs), **PATHS[self.path] | options)


def only_where_compiled(path):
    return [pytest.mark.skipif(path == "fused" and not FUSED, reason="no kernels for the CPU: numba is missing")]


def setups(*paths):
    return pytest.mark.parametrize(
        "setup",
        [
            pytest.param(Setup(entry, x.kwargs, path), id=f"{name}-{x.desc}-{path}", marks=only_where_compiled(path))
            for name, entry in ENTRIES.items()
            for x in entry.optim_inputs_func(device="cpu")
            for path in paths
        ],
    )


each_setup = setups(*PATHS)
each_path = pytest.mark.parametrize("path", [pytest.param(x, marks=only_where_compiled(x)) for x in PATHS])
both = pytest.mark.parametrize("algorithm", ENTRIES)


def make(algorithm, params, path=None, **options):
    """An optimizer with decay and momentum, on a path or on the default one."""
    own = {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if algorithm == "sgdp" else {})
    return ENTRIES[algorithm].optim_cls(params, **own | (PATHS[path] if path else {}) | options)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- what is stepped -------------------------------------------------------------------------------------------------

SHAPES = [(4, 6), (4, 6), (3, 2, 3, 3), (5,), (), (0, 2)]


def parameters(dtype=torch.float64, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def owned(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(optimizer, seed):
    """Random gradients; those of every other parameter are orthogonal to each of its rows."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(owned(optimizer)):
        g, x = torch.randn(p.shape, generator=generator, dtype=torch.float64), p.detach().double()
        if p.ndim > 1 and i % 2 == 0:
            axes = tuple(range(1, p.ndim))
            g = g - x * (g * x).sum(axes, keepdim=True) / (x * x).sum(axes, keepdim=True)
        p.grad = g.to(p.dtype)


def step(optimizer, seed=0):
    give_gradients(optimizer, seed)
    optimizer.step()


def contents(optimizer):
    """Copies of the parameters, and of the state of each that has one."""
    return [p.detach().clone() for p in owned(optimizer)], [
        {k: v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else {} for p in owned(optimizer)
    ]


def assert_same(a, b, rtol=0.0, atol=0.0):
    """Equality of what `contents` returns, bit for bit unless said otherwise."""
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def assert_equal_to_rounding(a, b):
    assert_same(a, b, rtol=1e-12, atol=1e-14)


class Regression:
    """A weight and a bias that `loss` pulls towards what maps an input to zero."""

    def __init__(self, contiguous=True):
        generator = torch.Generator().manual_seed(0)
        weight, bias, self.x = (torch.randn(s, generator=generator) for s in ((10, 5, 2), (10, 2), (5,)))
        self.weight, self.bias = (
            torch.nn.Parameter(x[..., 0].contiguous() if contiguous else x[..., 0]) for x in (weight, bias)
        )

    def loss(self):
        return (self.weight.mv(self.x) + self.bias).pow(2).sum()

    def goes_right(self, optimizer, after_a_step=lambda loss: None):
        """Whether 20 steps lower the loss, or raise it where they are to."""

        def closure():
            self.weight.grad = self.bias.grad = None
            loss = self.loss()
            loss.backward()
            return loss

        start = self.loss().item()
        for _ in range(20):
            after_a_step(optimizer.step(closure).item())
        end = self.loss().item()
        return end > start if optimizer.param_groups[0]["maximize"] else end < start


# --- the entries are good, and the paths are three ------------------------------------------------------------------


@both
def test_inputs_name_no_path(algorithm):
    """test_optim_infos_do_not_specify_global_cliquey_kwargs."""
    inputs = ENTRIES[algorithm].optim_inputs_func(device="cpu")
    assert not {"foreach", "fused", "differentiable"} & {name for x in inputs for name in x.kwargs}
    assert len({x.desc for x in inputs}) == len(inputs)


@each_path
@both
def test_a_path_is_the_one_that_is_taken(algorithm, path, monkeypatch):
    module = importlib.import_module(f"adamp_torch._{algorithm}")
    taken = []

    def spy(owner, name, label):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *x, **y: (taken.append(label) if x[0] else None, real(*x, **y))[1])

    spy(module, f"_single_tensor_{algorithm}", "single")
    spy(module, f"_multi_tensor_{algorithm}", "foreach")
    if FUSED:
        spy(fused_kernels("cpu"), algorithm, "fused")
    step(make(algorithm, parameters(), path))
    assert taken == [path]


@pytest.mark.parametrize(
    ("entry", "bad"),
    [
        pytest.param(entry, bad, id=f"{name}-{bad.optimizer_error_input.desc}")
        for name, entry in ENTRIES.items()
        for bad in entry.optim_error_inputs_func("cpu", torch.float32)
    ],
)
def test_bad_inputs_are_refused(entry, bad):
    """test_errors."""
    assert bad.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    expect = pytest.warns if issubclass(bad.error_type, Warning) else pytest.raises
    params = parameters() if bad.optimizer_error_input.params is None else bad.optimizer_error_input.params
    with expect(bad.error_type, match=bad.error_regex):
        entry.optim_cls(params, **bad.optimizer_error_input.kwargs)


@both
def test_fused_is_refused_on_the_meta_device(algorithm):
    """test_fused_error_on_params_on_meta."""
    with pytest.raises(RuntimeError, match="not on meta"):
        make(algorithm, [torch.nn.Parameter(torch.empty(4, 6, device="meta"))], fused=True)


@each_setup
def test_an_optimizer_can_be_printed(setup):
    """test_optimizer_can_be_printed."""
    text = repr(setup.make(parameters()))
    assert text.startswith(setup.entry.name)
    assert all(name in text for name in setup.kwargs)


# --- the right direction --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False])
@each_setup
def test_steps_go_in_the_right_direction(setup, contiguous):
    """test_forloop_goes_right_direction."""
    problem = Regression(contiguous)
    assert problem.weight.is_contiguous() == contiguous
    assert problem.goes_right(setup.make([problem.weight, problem.bias]))


@pytest.mark.parametrize("i", range(3))
@each_setup
def test_schedulers_keep_the_direction(setup, i):
    """test_forloop_goes_right_direction_with_lrsched."""
    problem = Regression()
    optimizer = setup.make([problem.weight, problem.bias])
    made = [make_scheduler(optimizer) for make_scheduler in setup.entry.scheduler_inputs[i]]
    before = float(optimizer.param_groups[0]["lr"])

    def schedule(loss):
        for scheduler in made:
            scheduler.step(*[loss] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else [])

    assert problem.goes_right(optimizer, schedule)
    assert float(optimizer.param_groups[0]["lr"]) != before


@each_setup
def test_a_group_has_its_own_weight_decay(setup):
    """test_param_groups_weight_decay."""
    problem = Regression()
    groups = [{"params": [problem.weight], "weight_decay": 0.5}, {"params": [problem.bias], "weight_decay": 0.0}]
    assert problem.goes_right(setup.make(groups))
    # With no gradient but zeros, what changes is what decays.
    params = parameters(shapes=[(4, 6), (5,), (4, 6), (5,)])
    optimizer = setup.make([{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:], "weight_decay": 0.0}])
    before = copy.deepcopy(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [False, False, True, True]


@each_setup
def test_a_group_has_its_own_learning_rate(setup):
    """test_param_groups_lr, test_param_group_with_lrscheduler_goes_right_direction."""
    problem = Regression()
    still = torch.nn.Parameter(torch.randn(3, 4))
    still.grad = torch.ones_like(still)
    before = still.detach().clone()
    optimizer = setup.make([{"params": [problem.weight, problem.bias]}, {"params": [still], "lr": 1e-28}])
    scheduler = schedulers.LambdaLR(optimizer, [lambda t: 0.9**t, lambda t: 1.0])
    assert problem.goes_right(optimizer, lambda loss: scheduler.step())
    assert optimizer.state[still]["step"] == 20
    assert torch.equal(still, before)


# --- learning rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@each_path
@both
def test_a_tensor_learning_rate_is_a_number(algorithm, path, shape):
    """test_tensor_lr."""
    lr = torch.full(shape, 1e-2, dtype=torch.float64)
    plain, tensor = make(algorithm, parameters(), path), make(algorithm, parameters(), path, lr=lr)
    assert tensor.param_groups[0]["lr"] is lr
    falling = [schedulers.StepLR(optimizer, step_size=2, gamma=0.5) for optimizer in (plain, tensor)]
    for t in range(6):
        step(plain, t)
        step(tensor, t)
        for scheduler in falling:
            scheduler.step()
    assert_equal_to_rounding(contents(plain), contents(tensor))
    assert tensor.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(1e-2 / 8)


SCHEDULERS = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda t: 0.7),
    "StepLR": lambda opt: schedulers.StepLR(opt, 2),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, total_iters=2),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, total_iters=4),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.5),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, total_iters=8),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 8),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 1e-3, 1e-1, step_size_up=3),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(opt, 0.9), schedulers.ConstantLR(opt, total_iters=2)]
    ),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.LinearLR(opt, 0.1, total_iters=2), schedulers.CosineAnnealingLR(opt, 6)], milestones=[2]
    ),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@each_path
@both
def test_every_scheduler_is_followed(algorithm, path, name):
    """TestLRScheduler: what a scheduler writes into a group is what the next step uses."""
    scheduled, by_hand = make(algorithm, parameters(), path), make(algorithm, parameters(), path)
    scheduler = SCHEDULERS[name](scheduled)
    seen = set()
    for t in range(5):
        values = {k: scheduled.param_groups[0].get(k) for k in ("lr", "betas", "momentum")}
        seen.add(tuple(values.values()))
        by_hand.param_groups[0].update({k: v for k, v in values.items() if v is not None})
        step(scheduled, t)
        step(by_hand, t)
        scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    assert len(seen) > 1
    assert_same(contents(scheduled), contents(by_hand))
    saved = copy.deepcopy(scheduler.state_dict())
    SCHEDULERS[name](make(algorithm, parameters(), path)).load_state_dict(saved)


# --- one optimizer on three paths -----------------------------------------------------------------------------------


@setups("foreach", "fused")
def test_paths_follow_the_loop(setup):
    """test_foreach_matches_forloop, test_fused_matches_forloop: with a step that has no gradients."""
    loop, other = setup._replace(path="single").make(parameters()), setup.make(parameters())
    for t in range(7):
        for optimizer in (loop, other):
            if t == 3:
                optimizer.zero_grad()
                optimizer.step()
            else:
                step(optimizer, t)
    assert_equal_to_rounding(contents(loop), contents(other))
    assert all(state["step"] == 6 for state in other.state.values())


def join_a_group(optimizer):
    optimizer.add_param_group({"params": parameters(seed=1), "weight_decay": 0.3})


def move_in_memory(optimizer):
    for p in owned(optimizer):
        p.data = p.data.clone()


def change_strides(optimizer):
    for p in owned(optimizer):
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def load_own_state(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def forget_the_state_of_one(optimizer):
    del optimizer.state[owned(optimizer)[0]]


def freeze_one(optimizer):
    group = optimizer.param_groups[0]
    group["params"] = group["params"][1:]


@setups("foreach", "fused")
def test_what_changes_between_steps_is_seen(setup):
    """What a path remembers of tensors, sizes and options must not outlive them; nothing of PyTorch's asks for it."""
    loop, other = setup._replace(path="single").make(parameters()), setup.make(parameters())
    changes = [join_a_group, move_in_memory, change_strides, load_own_state, forget_the_state_of_one, freeze_one]
    for t, change in enumerate(changes):
        for optimizer in (loop, other):
            step(optimizer, t)
            change(optimizer)
            step(optimizer, 10 + t)
            optimizer.param_groups[0]["delta"] *= 1.1
        assert_equal_to_rounding(contents(loop), contents(other))


@each_setup
def test_dtypes_beside_each_other_change_nothing(setup):
    """test_mixed_device_dtype."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    mixed = setup.make([p for dtype in dtypes for p in parameters(dtype)])
    alone = [setup.make(parameters(dtype)) for dtype in dtypes]
    for t in range(3):
        for optimizer in alone:
            give_gradients(optimizer, t)
        for p, q in zip(owned(mixed), [p for optimizer in alone for p in owned(optimizer)], strict=True):
            p.grad = q.grad.clone()
        for optimizer in (mixed, *alone):
            optimizer.step()
    params, states = contents(mixed)
    n = len(SHAPES)
    for i, optimizer in enumerate(alone):
        assert_same((params[n * i : n * (i + 1)], states[n * i : n * (i + 1)]), contents(optimizer))
        for state in optimizer.state.values():
            assert {state[name].dtype for name in optimizer.MOMENTS} == {dtypes[i]}


@pytest.mark.parametrize("default", [torch.float64, torch.float32, torch.float16], ids=str)
@each_path
@both
def test_counters_are_exact_whatever_the_default_dtype(algorithm, path, default):
    """test_set_default_dtype_works_with_foreach."""
    reference = make(algorithm, parameters(), path)
    torch.set_default_dtype(default)
    try:
        optimizer = make(algorithm, parameters(), path)
        for t in range(3):
            step(optimizer, t)
    finally:
        torch.set_default_dtype(torch.float32)
    for t in range(3):
        step(reference, t)
    wanted = torch.float64 if default == torch.float64 else torch.float32
    assert {state["step"].dtype for state in optimizer.state.values()} == {wanted}
    assert_same([p.detach() for p in owned(optimizer)], [p.detach() for p in owned(reference)])


# Two rows of three and a vector; delta=0.5 and these gradients take the branches channel, layer and none in turn.
WEIGHT = [[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]]
VECTOR = [0.5, -0.25]
GRADIENTS = [
    ([[2.0, 1.0, 0.25], [4.0, -0.25, 0.5]], [1.0, -1.0]),
    ([[1.0, -2.0, 0.25], [-0.5, -1.5, 0.75]], [-0.5, 2.0]),
    ([[1.0, -2.0, 0.5], [0.5, 3.0, -1.0]], [0.25, 0.125]),
]
BRANCHES = ["channel", "layer", "none"]
FROZEN = {  # settings: weight and vector after the three steps, as the named package left them
    "adamp": (  # adamp 0.3.0
        {},
        [[0.6868917307262663, -1.9359422382295735, 0.19078009504886437],
         [0.0290516973792387, 2.979418005030415, -1.1416206562296625]],
        [0.32672922008123745, -0.21263238434131934],
    ),
    "adamp-nesterov": (  # adamp 0.3.0
        {"nesterov": True},
        [[0.5441431095442755, -1.8936099618643922, 0.011630141954332311],
         [-0.055473014628588, 2.9581184042336357, -1.1926795611469612]],
        [0.26356844323436174, -0.18708290032960792],
    ),
    "sgdp": (  # timm 1.0.31
        {"momentum": 0.9},
        [[0.09199702120423232, -1.433174855078904, 0.2783756325026821],
         [-0.7424957140879642, 2.6346462732141713, -1.0273138254605938]],
        [0.18649999999999992, -0.31174999999999997],
    ),
    "sgdp-project_momentum": (  # adamp 0.3.0
        {"momentum": 0.9, "project_momentum": True},
        [[0.08688336737887013, -1.417286888484955, 0.27496970674851734],
         [-0.7417683924096415, 2.588748774551924, -1.0115429376612428]],
        [0.18649999999999992, -0.31174999999999997],
    ),
    "sgdp-nesterov": (  # adamp 0.3.0
        {"momentum": 0.9, "nesterov": True},
        [[-0.19775836917688622, -1.1618475030726532, 0.1977254516255207],
         [-1.000109733086477, 2.463248132727284, -1.013863064361297]],
        [0.14329999999999987, -0.41030000000000005],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
@each_path
def test_values_are_those_that_were_frozen(name, path):
    """TestMuon's frozen values: what other packages computed once, not to be computed anew from here."""
    options, *wanted = FROZEN[name]
    params = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (WEIGHT, VECTOR)]
    cls = ENTRIES[name.split("-")[0]].optim_cls
    optimizer = cls(params, lr=0.1, weight_decay=0.1, delta=0.5, **options, **PATHS[path])
    rows, hyper, taken = Layout().rows((2, 3)), AdamPHyper(delta=0.5), []
    for gradients in GRADIENTS:
        channel, layer = decide(params[0].detach().numpy(), np.array(gradients[0]), hyper, rows)
        taken.append("channel" if channel.all() else "layer" if layer.all() else "none")
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    assert taken == BRANCHES
    assert_same([p.detach() for p in params], [torch.tensor(x, dtype=torch.float64) for x in wanted], 1e-13, 1e-14)


# --- no gradient, and gradients of zeros ----------------------------------------------------------------------------


@each_setup
def test_without_a_gradient_nothing_happens(setup):
    """test_step_is_noop_when_params_have_no_grad."""
    params = parameters()
    before = copy.deepcopy(params)
    optimizer = setup.make(params)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert_same([p.detach() for p in params], [p.detach() for p in before])
    assert not optimizer.state


@each_setup
def test_gradients_of_zeros_only_let_weights_decay(setup):
    """test_step_is_noop_for_zero_grads: what is projected decays by `wd_ratio` of the decay (PROJ-7)."""
    weight, bias = parameters(shapes=[(4, 6), (5,)])
    before = copy.deepcopy([weight, bias])
    optimizer = setup.make([weight, bias])
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer.step()
    group = optimizer.param_groups[0]
    decay = float(group["lr"]) * group["weight_decay"] / (1 - group.get("momentum", 0.0))
    for p, start, factor in ((weight, before[0], group["wd_ratio"]), (bias, before[1], 1.0)):
        if decay:
            torch.testing.assert_close(p.detach(), start.detach() * (1 - decay * factor), rtol=1e-9, atol=0)
        else:
            assert torch.equal(p, start)
    assert all(state["step"] == 1 for state in optimizer.state.values())


# --- hooks ----------------------------------------------------------------------------------------------------------


@each_path
@both
def test_hooks_of_a_step_come_in_order_and_can_be_taken_off(algorithm, path):
    """test_step_pre_hook, test_step_post_hook, test_step_all_hooks."""
    optimizer = make(algorithm, parameters(), path)
    seen = []

    def note(word):
        def hook(opt, args, kwargs):
            assert opt is optimizer
            steps = {int(state["step"]) for state in opt.state.values()}
            seen.append((word, max(steps, default=0)))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("own pre")),
        optimizer.register_step_post_hook(note("own post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    step(optimizer)
    for handle in handles:
        handle.remove()
    step(optimizer)
    assert seen == [("global pre", 0), ("own pre", 0), ("own post", 1), ("global post", 1)]


@both
def test_a_hook_may_pass_another_closure(algorithm):
    """test_step_pre_hook: what the hook returns are the arguments of the step."""
    optimizer = make(algorithm, parameters())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
    assert optimizer.step(lambda: 3.0) == 7.0


@both
def test_hooks_of_a_checkpoint_come_in_order(algorithm):
    """test_state_dict_pre_post_hook, test_load_state_dict_pre_hook_and_prepend, test_load_state_dict_pre_post_hook."""
    optimizer = make(algorithm, parameters())
    step(optimizer)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "more": 1})
    optimizer.register_state_dict_post_hook(lambda opt, saved: seen.append(("saved", sorted(saved))))
    optimizer.register_load_state_dict_pre_hook(lambda opt, saved: seen.append(("loading", saved["more"])))
    optimizer.register_load_state_dict_pre_hook(lambda opt, saved: {**saved, "more": 2}, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    before = contents(optimizer)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert seen == ["saving", ("saved", ["more", "param_groups", "state"]), ("loading", 2), "loaded"]
    assert saved["more"] == 1
    assert_same(contents(optimizer), before)


# --- checkpoints and copies -----------------------------------------------------------------------------------------


def through_a_file(saved):
    """A state_dict as torch.load gives it back by default, with weights only."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_newer_flags(saved):
    for group in saved["param_groups"]:
        for flag in ("foreach", "fused", "differentiable", "maximize", "capturable", "layouts"):
            del group[flag]
    return saved


def with_steps_of(kind):
    def change(saved):
        for entry in saved["state"].values():
            entry["step"] = kind(entry["step"])
        return saved

    return change


CHECKPOINTS = {
    "weights_only": through_a_file,
    "older": without_newer_flags,
    "integer_steps": with_steps_of(int),
    "float_steps": with_steps_of(float),
}


@pytest.mark.parametrize("change", CHECKPOINTS)
@each_setup
def test_checkpoints_continue_bit_for_bit(setup, change):
    """test_save_load_equality_with_weights_only, test_can_load_older_state_dict, test_load_nontensor_step."""
    optimizer = setup.make(parameters())
    for t in range(3):
        step(optimizer, t)
    other = setup.make(copy.deepcopy(owned(optimizer)))
    saved = CHECKPOINTS[change](copy.deepcopy(optimizer.state_dict()))
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert_same(saved["state"], kept["state"])
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
    for t in range(3, 6):
        step(optimizer, t)
        step(other, t)
    assert_same(contents(other), contents(optimizer))
    for t in (state["step"] for state in other.state.values()):
        assert t.dtype == torch.float32
        assert t.shape == ()


@each_path
@both
def test_a_counter_of_one_element_becomes_a_scalar(algorithm, path):
    """As those of the state that a step makes."""
    optimizer = make(algorithm, parameters(), path)
    step(optimizer)
    optimizer.load_state_dict(with_steps_of(lambda t: t.reshape(1))(copy.deepcopy(optimizer.state_dict())))
    step(optimizer)
    assert {state["step"].shape for state in optimizer.state.values()} == {torch.Size([])}


@each_setup
def test_a_checkpoint_takes_the_dtype_of_the_parameters(setup):
    """test_state_dict_with_cuda_params, with another dtype for another device."""
    dtype = torch.bfloat16
    optimizer, other = setup.make(parameters()), setup.make(parameters(dtype))
    step(optimizer)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(owned(optimizer), owned(other), strict=True):
        wanted = {k: v if k == "step" else v.to(dtype) for k, v in optimizer.state[p].items()}
        assert_same(dict(other.state[q]), wanted)
    step(other, 1)
    assert all(p.isfinite().all() for p in owned(other))
    assert all(state["step"] == 2 and state["step"].dtype == torch.float32 for state in other.state.values())


@each_setup
def test_equal_optimizers_have_equal_checkpoints(setup):
    """test_state_dict_deterministic."""
    first, second = setup.make(parameters()), setup.make(parameters())
    for t in range(3):
        step(first, t)
        step(second, t)
    a, b = first.state_dict(), second.state_dict()
    assert_same(a["state"], b["state"])
    assert a["param_groups"] == b["param_groups"]
    second.param_groups.extend(second.param_groups)
    assert second.state_dict()["param_groups"][-1] == a["param_groups"][-1]


@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)], ids=str)
@each_path
@both
def test_names_may_come_and_go_with_a_checkpoint(algorithm, path, named):
    """test_can_load_from_to_named_state_dict."""

    def params(with_names, values):
        return [(f"p{i}", p) for i, p in enumerate(values)] if with_names else values

    saved, loaded = (make(algorithm, params(x, parameters()), path) for x in named)
    step(saved)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    with torch.no_grad():
        for p, q in zip(owned(loaded), owned(saved), strict=True):
            p.copy_(q)
    step(saved, 1)
    step(loaded, 1)
    assert_same(contents(loaded), contents(saved))
    assert "param_names" in loaded.param_groups[0], "a checkpoint brings the names that an optimizer lacks"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@each_setup
def test_copies_continue_bit_for_bit(setup, way):
    """test_deepcopy_copies_all_public_attrs; TestOptim's test of pickling."""
    optimizer = setup.make(parameters())
    step(optimizer)
    duplicate = way(optimizer)

    def public(x):
        return {name for name in vars(x) if not name.startswith("_")}

    assert public(duplicate) == public(optimizer)
    assert not {id(p) for p in owned(duplicate)} & {id(p) for p in owned(optimizer)}
    step(optimizer, 1)
    step(duplicate, 1)
    assert_same(contents(duplicate), contents(optimizer))


def timm_class(name):
    """A class of timm, whose own `__init__` needs a torchvision for the same torch; its optimizers do not."""
    if "timm_for_contract" not in sys.modules:
        package = ModuleType("timm_for_contract")
        package.__path__ = [str(metadata.distribution("timm").locate_file("timm/optim"))]
        sys.modules[package.__name__] = package
    return getattr(importlib.import_module(f"timm_for_contract.{name.lower()}"), name)


OTHERS = {
    ("official", "adamp"): (lambda: adamp.AdamP, {}),
    ("official", "sgdp"): (lambda: adamp.SGDP, {"project_momentum": True}),
    ("timm", "adamp"): (lambda: timm_class("AdamP"), {}),
    ("timm", "sgdp"): (lambda: timm_class("SGDP"), {}),
}
FULL = [(4, 6), (4, 6), (3, 2, 3, 3), (5,)]  # the others cannot step tensors without axes or elements


@pytest.mark.parametrize("nesterov", [False, True])
@each_path
@pytest.mark.parametrize("other", OTHERS, ids="-".join)
def test_checkpoints_of_others_continue_here_and_ours_there(other, path, nesterov):
    """Three steps there, three here, three there again, beside nine of theirs."""
    cls, own = OTHERS[other]
    options = {"lr": 1e-2, "weight_decay": 0.1, "nesterov": nesterov}
    options |= {"momentum": 0.9} if other[1] == "sgdp" else {}
    reference, start = cls()(parameters(shapes=FULL), **options), cls()(parameters(shapes=FULL), **options)
    for t in range(3):
        step(reference, t)
        step(start, t)
    ours = make(other[1], owned(start), path, lr=1.0, **own)
    ours.load_state_dict(through_a_file(start.state_dict()))
    for t in range(3, 6):
        step(reference, t)
        step(ours, t)
    assert_equal_to_rounding([p.detach() for p in owned(ours)], [p.detach() for p in owned(reference)])
    for name in ours.MOMENTS:
        assert_equal_to_rounding(*([x.state[p][name] for p in owned(x)] for x in (ours, reference)))
    back = cls()(owned(ours), lr=1.0)
    back.load_state_dict(through_a_file(ours.state_dict()))
    for t in range(6, 9):
        step(reference, t)
        step(back, t)
    # They correct the bias with our counter, a float32 tensor, hence in float32.
    assert_same([p.detach() for p in owned(back)], [p.detach() for p in owned(reference)], rtol=1e-4, atol=1e-5)


# --- mixed precision ------------------------------------------------------------------------------------------------


def scaled_step(optimizer, scaler, seed, spoil=None, clip=False):
    """A step from gradients that are scaled; `spoil` makes one of them infinite."""
    give_gradients(optimizer, seed)
    params = [p for p in owned(optimizer) if p.numel()]
    scale = float(scaler.scale(torch.ones(())))
    for p in owned(optimizer):
        p.grad.mul_(scale)
    if spoil is not None:
        params[spoil].grad.reshape(-1)[-1] = torch.inf
    if clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(owned(optimizer), 1.0)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64, torch.float32, torch.bfloat16]], ids=str)
@pytest.mark.parametrize("path", [None, *(pytest.param(x, marks=only_where_compiled(x)) for x in PATHS)])
@both
def test_scaled_gradients_give_the_steps_of_plain_ones(algorithm, path, dtypes, clip):
    """test_grad_scaling_autocast_fused_optimizers: a scale that is a power of two is exact."""
    plain, scaled = (make(algorithm, [p for x in dtypes for p in parameters(x)], path) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for t in range(5):
        give_gradients(plain, t)
        if clip:
            torch.nn.utils.clip_grad_norm_(owned(plain), 1.0)
        plain.step()
        scaled_step(scaled, scaler, t, clip=clip)
        assert_same(contents(scaled), contents(plain))
    assert scaler.get_scale() == 2.0**12, "it has grown twice"


@pytest.mark.parametrize("spoil", [0, 3, 4])
@pytest.mark.parametrize("path", [None, *(pytest.param(x, marks=only_where_compiled(x)) for x in PATHS)])
@both
def test_an_overflow_changes_nothing(algorithm, path, spoil):
    """test_fused_does_not_step_if_foundinf."""
    optimizer, reference = (make(algorithm, parameters(torch.float32), path) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = [p.detach().clone() for p in owned(optimizer)]
    scaled_step(optimizer, scaler, 0, spoil)
    assert_same([p.detach() for p in owned(optimizer)], start)
    for state in optimizer.state.values():
        assert not any(x.any() for x in state.values()), "as before a first step"
    assert scaler.get_scale() == 2.0**9
    scaled_step(optimizer, scaler, 1)
    before = contents(optimizer)
    scaled_step(optimizer, scaler, 2, spoil)
    assert_same(contents(optimizer), before)
    assert scaler.get_scale() == 2.0**8
    scaled_step(optimizer, scaler, 3)
    step(reference, 1)
    step(reference, 3)
    assert_same(contents(optimizer), contents(reference))
    assert not hasattr(optimizer, "found_inf")


@both
def test_only_the_fused_path_unscales(algorithm):
    """What GradScaler asks: with `fused=True` in every group the step unscales, else GradScaler does."""
    assert not make(algorithm, parameters())._step_supports_amp_scaling
    if FUSED:
        groups = [{"params": p, "fused": fused} for p, fused in zip(parameters(), (True, None), strict=False)]
        assert not make(algorithm, groups)._step_supports_amp_scaling
        assert make(algorithm, groups[:1])._step_supports_amp_scaling


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    )


def images(n=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_path
@both
def test_a_network_learns_under_autocast(algorithm, path, dtype):
    """test_grad_scaling_autocast_fused_optimizers."""
    model, (x, y) = network(), images()
    optimizer = make(algorithm, model.parameters(), path, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


# --- averages of weights --------------------------------------------------------------------------------------------


@each_path
@both
def test_weights_can_be_averaged(algorithm, path):
    """TestSWAUtils: a mean and an exponential average of what the steps leave, with the rate of SWALR."""
    model, (x, y) = network(), images()
    optimizer = make(algorithm, model.parameters(), path, lr=0.1)
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2, anneal_strategy="linear")
    history, rates = [], []
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        swa.update_parameters(model)
        ema.update_parameters(model)
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
        history.append([p.detach().clone() for p in model.parameters()])
    assert rates == pytest.approx([0.1, 0.055, 0.01, 0.01])
    means = [torch.stack(x).mean(0) for x in zip(*history, strict=True)]
    assert_same([p.detach() for p in swa.module.parameters()], means, rtol=1e-5, atol=1e-6)
    weights = torch.tensor([0.125, 0.125, 0.25, 0.5])
    decayed = [torch.tensordot(weights, torch.stack(x), 1) for x in zip(*history, strict=True)]
    assert_same([p.detach() for p in ema.module.parameters()], decayed, rtol=1e-5, atol=1e-6)
    update_bn([x], swa)
    assert not torch.equal(swa.module[1].running_mean, model[1].running_mean)


# --- compiled, and differentiated -----------------------------------------------------------------------------------


@each_path
@both
def test_a_compiled_step_is_one_graph(algorithm, path):
    """test_optimizers of test/inductor/test_compiled_optimizers.py; kernels of our own give way to the compiler."""
    torch._dynamo.reset()
    plain, other = (
        make(algorithm, parameters(), taken, lr=torch.tensor(0.01, dtype=torch.float64)) for taken in ("single", path)
    )
    falling = [schedulers.ExponentialLR(optimizer, 0.5) for optimizer in (plain, other)]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(other.step, backend=counter)
    for t in range(4):
        for optimizer in (plain, other):
            give_gradients(optimizer, t)
        plain.step()
        compiled()
        for scheduler in falling:
            scheduler.step()
        assert counter.frame_count == 1, "one graph, compiled once"
    assert_equal_to_rounding(contents(plain), contents(other))


@pytest.mark.skipif(not FUSED, reason="no kernels for the CPU: numba is missing")
@both
def test_a_compiled_step_of_the_fused_path_unscales_too(algorithm):
    """test_grad_scaling_autocast_fused_optimizers: GradScaler has been told that the step does it."""
    torch._dynamo.reset()
    plain, other = (make(algorithm, parameters(torch.float32), path) for path in ("single", "fused"))
    other.step = torch.compile(other.step, backend="eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled_step(other, scaler, 0, spoil=0)
    scaled_step(other, scaler, 1)
    step(plain, 1)
    assert_same(contents(other), contents(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@both
def test_autograd_runs_through_several_steps(algorithm, nesterov):
    """TestDifferentiableOptimizer: the end of a short run as a function of its start, learning rate and gradients."""

    def run(start, lr, *gradients):
        param = start.clone()
        optimizer = make(algorithm, [param], "single", lr=lr, differentiable=True, delta=0.5, nesterov=nesterov)
        for gradient in gradients:
            param.grad = gradient
            optimizer.step()
        return param, *(optimizer.state[param][name] for name in optimizer.MOMENTS)

    start, *gradients = (torch.tensor(x, dtype=torch.float64) for x in (WEIGHT, *(g for g, _ in GRADIENTS)))
    lr = torch.tensor(0.05, dtype=torch.float64)
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (start, lr, *gradients)])
