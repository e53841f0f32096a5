"""AdamP and SGDP as torch.optim.Optimizer: the arithmetic, citizenship, layouts, checkpoints, errors."""

import copy
import inspect
import io
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from adamp_spec import AdamPHyper, AdamPState, Bounded, Layout, SGDPHyper, SGDPState, adamp_step, decide, sgdp_step
from adamp_torch import SGDP, AdamP, describe

ALGORITHMS = {"adamp": (AdamP, {"lr": 1e-2}), "sgdp": (SGDP, {"lr": 1e-2, "momentum": 0.9})}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

both = pytest.mark.parametrize("algorithm", ALGORITHMS)


def make(algorithm, params, **options):
    cls, defaults = ALGORITHMS[algorithm]
    return cls(params, **{**defaults, **options})


def parameter(*shape, dtype=torch.float64, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def orthogonal_gradient(p, dim, seed=1):
    """A gradient without a component along `p`, summed over `dim`."""
    x = p.detach().double()
    g = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (g - x * (g * x).sum(dim, keepdim=True) / (x * x).sum(dim, keepdim=True)).to(p.dtype)


def step(optimizer, seed=1, only=None):
    """One step on random gradients; `only` gives the indices of the parameters that get one."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p)
        p.grad = grad if only is None or i in only else None
    optimizer.step()
    return params


def snapshot(optimizer):
    """Everything an optimizer owns, copied."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, copy.deepcopy(optimizer.state_dict())


def assert_same(a, b):
    """Equality of nested containers, bit for bit in tensors."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# --- the arithmetic: within the derived bounds of the oracle -----------------------------------------------------


def to_numpy(x):
    x = x.detach()
    return x.float().numpy().astype(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy().copy()


def assert_conforms(optimizer, param, grad, hyper, layout):
    """Steps `optimizer` and the oracle from the optimizer's own state; returns the branch of each slice."""
    names = optimizer.MOMENTS
    state = optimizer.state[param]
    moments = [to_numpy(state[name] if state else torch.zeros_like(param)) for name in names]
    before, gradient = (Bounded.exact(to_numpy(x)) for x in (param, grad))
    start = (AdamPState if len(names) == 2 else SGDPState)(
        int(state["step"]) if state else 0, *map(Bounded.exact, moments)
    )
    rows = layout.rows(tuple(param.shape))
    p, g = (np.reshape(x.astype(np.dtype(np.float64 if param.dtype == torch.float64 else np.float32)), rows.shape)
            for x in (before, gradient))  # fmt: skip
    branch = np.zeros(rows.slices, int)
    if rows.projects:
        channel, layer = decide(p, g, hyper, rows)
        assert all((x.certain == x.possible).all() for x in (channel, layer)), "the case must be decisive"
        branch = np.where(channel.certain, 1, np.where(layer.certain, 2, 0))
    oracle = adamp_step if len(names) == 2 else sgdp_step
    wanted_p, wanted, _ = oracle(before, gradient, start, hyper, layout, lambda channel, layer: branch)

    param.grad = grad
    optimizer.step()
    state = optimizer.state[param]
    assert int(state["step"]) == wanted.step
    for got, want in zip([param, *(state[name] for name in names)], [wanted_p, *wanted[1:]], strict=True):
        off = np.abs(to_numpy(got).astype(want.value.dtype) - want.value)
        assert (off <= want.error).all(), f"off by {(off / np.maximum(want.error, 1e-300)).max()} bounds"
    return branch


CASES = {  # shape, layout, axes that the gradient is orthogonal over, branch of each slice
    "channel": ((4, 3, 3, 3), Layout(0), (1, 2, 3), [1]),
    "layer": ((4, 3, 3, 3), Layout(0), (0, 1, 2, 3), [2]),
    "none": ((4, 3, 3, 3), Layout(0), None, [0]),
    "last axis": ((3, 3, 2, 8), Layout(-1), (0, 1, 2), [1]),
    "two channels": ((6, 2, 5), Layout((1, 2)), (0,), [1]),
    "rows of one": ((6, 5), Layout((0, 1)), (0, 1), [2]),
    "batch": ((2, 6, 5), Layout(2, batch=0), (1,), [1, 1]),
    "view": ((12, 7), Layout(1, batch=0, view=(3, 4, 7)), (2,), [1, 1, 1]),
    "exempt": ((4, 6), Layout(None), (1,), [0]),
    "vector": ((6,), Layout(0), (0,), [0]),
    "scalar": ((), Layout(0), None, [0]),
    "empty": ((0, 3), Layout(0), (1,), [0]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("case", CASES)
@both
def test_steps_within_the_bounds_of_the_oracle(algorithm, case, nesterov, dtype):
    shape, layout, axes, branches = CASES[case]
    torch.manual_seed(3)
    p = parameter(*shape, dtype=dtype)
    common = {"lr": 1e-2, "weight_decay": 0.1, "nesterov": nesterov, "wd_ratio": 0.3}
    if algorithm == "adamp":
        hyper = AdamPHyper(beta1=0.8, beta2=0.99, **common)
        optimizer = AdamP([p], betas=(0.8, 0.99), layouts={p: layout}, **common)
    else:
        common |= {"momentum": 0.8, "dampening": 0.1, "project_momentum": True}
        hyper = SGDPHyper(**common)
        optimizer = SGDP([p], layouts={p: layout}, **common)
    for _ in range(3):
        seen = p.detach().reshape(layout.rows(shape).shape)
        gradient = orthogonal_gradient(seen, axes) if axes else seen + torch.randn_like(seen)
        branch = assert_conforms(optimizer, p, gradient.reshape(shape), hyper, layout)
        assert branch.ravel().tolist() == branches


@both
def test_slices_of_a_batch_decide_alone(algorithm):
    p = parameter(2, 6, 5)
    gradient = torch.stack([orthogonal_gradient(p[0], (1,)), p[1].detach()])
    together, first, second = parameter(2, 6, 5), *(torch.nn.Parameter(x.detach().clone()) for x in p)
    fused = make(algorithm, [together], weight_decay=0.1, layouts={together: Layout(1, batch=0)})
    split = make(algorithm, [first, second], weight_decay=0.1)
    together.grad, first.grad, second.grad = gradient, *gradient
    fused.step()
    split.step()
    torch.testing.assert_close(together, torch.stack([first, second]), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@both
def test_what_is_not_finite_does_not_project_and_does_not_spread(algorithm, bad):
    p, q = parameter(4, 6), parameter(4, 6)
    gradient = orthogonal_gradient(p, (1,))
    gradient[2, 3] = bad
    ours, unprojected = make(algorithm, [p]), make(algorithm, [q], delta=0)
    p.grad, q.grad = gradient, gradient.clone()
    ours.step()
    unprojected.step()
    assert torch.equal(p.nan_to_num(), q.nan_to_num())
    assert (~p.isfinite()).sum() == 1


@both
def test_zeros_divide_nothing(algorithm):
    p = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = make(algorithm, [p], weight_decay=0.1)
    for gradient in (torch.zeros(3, 4), torch.ones(3, 4)):
        p.grad = gradient
        optimizer.step()
        assert p.isfinite().all()


def test_coefficients_keep_their_precision_in_float32():
    """1 - beta2**t in float32 would be off by thousands of roundings."""
    for capturable in (False, True):
        p = parameter(5, dtype=torch.float32)
        optimizer = AdamP([p], lr=1.0, betas=(0.9, 0.99999), capturable=capturable)
        step(optimizer)
        start = p.detach().double()
        state = {name: optimizer.state[p][name].double() for name in optimizer.MOMENTS}
        p.grad = torch.full((5,), 0.5)
        optimizer.step()
        m = 0.9 * state["exp_avg"] + (1 - 0.9) * 0.5
        v = 0.99999 * state["exp_avg_sq"] + (1 - 0.99999) * 0.25
        wanted = start - m / (1 - 0.9**2) / ((v / (1 - 0.99999**2)).sqrt() + 1e-8)
        torch.testing.assert_close(p.double(), wanted, rtol=1e-6, atol=1e-7)


# --- citizenship ------------------------------------------------------------------------------------------------


@both
def test_groups_have_options_of_their_own(algorithm):
    options = [{"lr": 1e-3, "delta": 0.0}, {"weight_decay": 0.2, "wd_ratio": 1.0, "maximize": True}, {"nesterov": True}]
    if algorithm == "sgdp":
        options[0] |= {"project_momentum": True, "dampening": 0.5}
    together = make(algorithm, [{"params": [parameter(4, 6, seed=i)], **option} for i, option in enumerate(options)])
    apart = [make(algorithm, [parameter(4, 6, seed=i)], **option) for i, option in enumerate(options)]
    for _ in range(3):
        gradients = [torch.randn(4, 6, dtype=torch.float64) for _ in options]
        for group, single, gradient in zip(together.param_groups, apart, gradients, strict=True):
            group["params"][0].grad, single.param_groups[0]["params"][0].grad = gradient, gradient.clone()
            single.step()
        together.step()
    for group, single in zip(together.param_groups, apart, strict=True):
        assert torch.equal(group["params"][0], single.param_groups[0]["params"][0])


@both
def test_closure_has_gradients_and_its_loss_comes_back(algorithm):
    p = parameter(3, 4)
    optimizer = make(algorithm, [p])
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for _ in range(5):
        losses.append(optimizer.step(closure).item())
    assert losses == sorted(losses, reverse=True)
    assert optimizer.step() is None


@pytest.mark.parametrize("shape_of_lr", [None, (), (1,)], ids=str)
@both
def test_learning_rate_schedules(algorithm, shape_of_lr):
    p, q = parameter(4, 6), parameter(4, 6)
    lr = 1e-2 if shape_of_lr is None else torch.full(shape_of_lr, 1e-2, dtype=torch.float64)
    scheduled, by_hand = make(algorithm, [p], lr=lr, weight_decay=0.1), make(algorithm, [q], weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)
    for t in range(4):
        by_hand.param_groups[0]["lr"] = 1e-2 * 0.5**t
        step(scheduled, seed=t)
        step(by_hand, seed=t)
        scheduler.step()
    assert (scheduled.param_groups[0]["lr"] is lr) == (shape_of_lr is not None)
    torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


@both
def test_momentum_schedules(algorithm):
    optimizer = make(algorithm, [parameter(4, 6)])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    p = optimizer.param_groups[0]["params"][0]
    q = copy.deepcopy(p)
    by_hand = make(algorithm, [q])
    seen = set()
    for t in range(5):
        for name in ("lr", "betas", "momentum"):
            if name in by_hand.param_groups[0]:
                by_hand.param_groups[0][name] = optimizer.param_groups[0][name]
        seen.add(by_hand.param_groups[0].get("betas") or by_hand.param_groups[0]["momentum"])
        step(optimizer, seed=t)
        step(by_hand, seed=t)
        scheduler.step()
    assert len(seen) == 5
    torch.testing.assert_close(p, q, rtol=0, atol=0)


@both
def test_a_tensor_learning_rate_is_never_read_on_the_host(algorithm):
    p = parameter(4, 6)
    optimizer = make(algorithm, [p], lr=torch.tensor(1e-2, requires_grad=True), differentiable=True)
    q = p.clone()
    optimizer.param_groups[0]["params"][0] = q
    q.grad = orthogonal_gradient(p, (1,))
    optimizer.step()
    (slope,) = torch.autograd.grad(q.sum(), optimizer.param_groups[0]["lr"])
    assert slope != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both
def test_maximize_leaves_the_gradient_alone(algorithm, dtype):
    p, q = parameter(4, 6, dtype=dtype), parameter(4, 6, dtype=dtype)
    up, down = make(algorithm, [p], maximize=True), make(algorithm, [q])
    for t in range(3):
        gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(t)).to(dtype)
        p.grad, q.grad = gradient.clone(), -gradient
        up.step()
        down.step()
        assert torch.equal(p.grad, gradient)
    assert torch.equal(p, q)


STRIDES = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("layout", [Layout(0), Layout(1, batch=0, view=(2, 3, 4, 5))], ids=str)
@both
def test_strides_change_nothing_but_are_kept(algorithm, layout, strides):
    plain = parameter(6, 4, 5, 1)
    strided = torch.nn.Parameter(STRIDES[strides](plain.detach().clone()))
    assert strided.stride() != plain.stride()
    a, b = (make(algorithm, [p], weight_decay=0.1, layouts={p: layout}) for p in (plain, strided))
    for t in range(3):
        gradient = orthogonal_gradient(plain, (1, 2, 3), seed=t)
        plain.grad = gradient if t else STRIDES[strides](gradient)
        strided.grad = STRIDES[strides](gradient) if t else gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(strided.detach(), plain.detach(), rtol=1e-13, atol=1e-15)
    moment = b.state[strided][b.MOMENTS[0]]
    assert moment.stride() == torch.zeros_like(strided).stride()


@both
def test_parameters_without_a_gradient_wait(algorithm):
    params = [parameter(4, 6, seed=i) for i in range(3)]
    optimizer = make(algorithm, [{"params": params}, {"params": []}])
    start = params[1].detach().clone()
    step(optimizer, only=(0, 2))
    assert torch.equal(params[1], start)
    assert params[1] not in optimizer.state
    step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1, 2]


@both
def test_a_group_can_join_later(algorithm):
    first, second, third = (parameter(4, 6, seed=i) for i in range(3))
    optimizer = make(algorithm, [first], layouts={first: Layout(1)})
    step(optimizer)
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    optimizer.add_param_group({"params": [third], "layouts": {third: Layout(None)}})
    step(optimizer)
    layouts = [group["layouts"] for group in optimizer.param_groups]
    assert layouts == [[Layout(1).to_dict()], None, [Layout(None).to_dict()]]


def through_state_dict(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [torch.nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    fresh = make("adamp" if isinstance(optimizer, AdamP) else "sgdp", params, lr=0.3)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


COPIES = {
    "state_dict": through_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@both
def test_copies_continue_bit_for_bit(algorithm, dtype, way):
    params = [parameter(4, 6, dtype=dtype), parameter(5, dtype=dtype)]
    optimizer = make(algorithm, params, weight_decay=0.1, wd_ratio=0.5, layouts={params[0]: Layout(1)})
    step(optimizer)
    duplicate = COPIES[way](optimizer)
    assert_same(duplicate.state_dict(), optimizer.state_dict())
    step(optimizer, seed=2)
    step(duplicate, seed=2)
    assert_same(snapshot(duplicate), snapshot(optimizer))
    assert describe(duplicate) == describe(optimizer)


@both
def test_hooks(algorithm):
    optimizer = make(algorithm, [parameter(4, 6)])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    step(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saving", "loaded"]


@both
def test_a_hook_may_repair_a_checkpoint(algorithm):
    optimizer, other = make(algorithm, [parameter(4, 6)]), make(algorithm, [parameter(6, 4)])
    step(other)

    def transpose(_, state_dict):
        entry = state_dict["state"][0]
        return {**state_dict, "state": {0: {k: v.T.clone() if v.ndim else v for k, v in entry.items()}}}

    optimizer.register_load_state_dict_pre_hook(transpose)
    optimizer.load_state_dict(other.state_dict())
    (loaded,), (saved,) = optimizer.state.values(), other.state.values()
    for name in optimizer.MOMENTS:
        torch.testing.assert_close(loaded[name], saved[name].T, rtol=0, atol=0)
    step(optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@both
def test_capturable_counts_on_the_device_and_steps_alike(algorithm, dtype):
    p, q = parameter(4, 6, dtype=dtype), parameter(4, 6, dtype=dtype)
    captured, plain = make(algorithm, [p], capturable=True, weight_decay=0.1), make(algorithm, [q], weight_decay=0.1)
    for t in range(5):
        step(captured, seed=t)
        step(plain, seed=t)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert captured.state[p]["step"].device == p.device


def test_capturable_never_reads_the_device():
    """Tensors on the meta device have no values to read."""
    for cls, options in ((AdamP, {}), (SGDP, {"momentum": 0.9})):
        p = torch.nn.Parameter(torch.empty(4, 6, device="meta"))
        optimizer = cls([p], lr=1e-2, weight_decay=0.1, capturable=True, layouts={p: Layout(1)}, **options)
        p.grad = torch.empty_like(p)
        optimizer.step()
        assert optimizer.state[p]["step"].device.type == "meta"


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("branch", ["channel", "layer", "none", "vector"])
@both
def test_autograd_runs_through_the_step(algorithm, branch, nesterov):
    p = parameter(6) if branch == "vector" else parameter(3, 4)
    gradient = {
        "channel": lambda: orthogonal_gradient(p, (1,)),
        "layer": lambda: orthogonal_gradient(p, (0, 1)),
        "none": lambda: p.detach() + 1,
        "vector": lambda: p.detach() + 1,
    }[branch]()

    def stepped(param, grad, lr, *moments):
        param = param.clone()
        param.grad = grad
        optimizer = make(algorithm, [param], lr=lr, weight_decay=0.3, delta=0.2, nesterov=nesterov, differentiable=True)
        state = optimizer.state[param]
        state["step"] = torch.tensor(3.0)
        state |= {name: moment.clone() for name, moment in zip(optimizer.MOMENTS, moments, strict=True)}
        optimizer.step()
        return (param, *(state[name] for name in optimizer.MOMENTS))

    moments = [torch.rand_like(p).requires_grad_() for _ in ALGORITHMS[algorithm][0].MOMENTS]
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (p, gradient.requires_grad_(), lr, *moments))


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["float", "tensor"])
@both
def test_the_update_compiles_to_one_graph(algorithm, lr):
    torch._dynamo.reset()
    plain, compiled = ([parameter(4, 3, 3, 3), parameter(5, 6), parameter(5)] for _ in range(2))
    a, b = (
        make(
            algorithm,
            [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.1}],
            lr=lr,
            weight_decay=0.1,
            layouts={ps[1]: Layout(1)},
        )
        for ps in (plain, compiled)
    )
    counter = CompileCounterWithBackend("aot_eager")
    # The decorator of `step` switches autograd off between two deliberate graph breaks, in torch.optim too;
    # what it wraps must be one graph.
    update = torch.compile(lambda: inspect.unwrap(type(b).step)(b), fullgraph=True, backend=counter)
    graphs = []
    for t in range(3):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(plain, compiled, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        with torch.no_grad():
            update()
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "compiled once"
    for p, q in zip(plain, compiled, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@both
def test_step_compiles_without_a_warning_of_ours(algorithm, recwarn):
    torch._dynamo.reset()
    p, q = parameter(4, 6), parameter(4, 6)
    plain, other = make(algorithm, [p]), make(algorithm, [q])
    compiled = torch.compile(other.step, backend="eager")
    for t in range(3):
        plain.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.1 / (t + 1)
        p.grad, q.grad = (torch.full((4, 6), t + 1.0, dtype=torch.float64) for _ in range(2))
        plain.step()
        compiled()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert not [str(w.message) for w in recwarn if "adamp" in str(w.message)]


# --- layouts ----------------------------------------------------------------------------------------------------


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(5, 6))


@both
def test_describe(algorithm):
    model = network()
    table = {"0.weight": Layout((0, 1)), r"1\.weight": Layout(1)}
    text = describe(make(algorithm, model.named_parameters(), layouts=table))
    assert [line.split("  ")[0].rstrip() for line in text.splitlines()] == [
        "parameter", "0.weight", "0.bias", "1.weight", "1.bias",
    ]  # fmt: skip
    assert [line.split()[-1] for line in text.splitlines()[1:]] == ["override", "default", "override", "default"]
    assert "12 x 9" in text
    assert "5 x 6" in text
    assert text.count("not projected") == 2
    weight = next(model.parameters())
    unnamed = describe(make(algorithm, model.parameters(), layouts={weight: Layout((0, 1))}))
    assert [line.split()[0] for line in unnamed.splitlines()[1:]] == ["0.0", "0.1", "0.2", "0.3"]
    assert "12 x 9" in unnamed


def test_describe_keeps_parameters_of_one_name_apart():
    groups = [{"params": list(torch.nn.Linear(3, 2).named_parameters())} for _ in range(2)]
    names = [line.split()[0] for line in describe(AdamP(groups)).splitlines()[1:]]
    assert names == ["0.0", "0.1", "1.0", "1.1"]


@both
def test_a_layout_decides_what_is_projected(algorithm):
    results = []
    for layouts in (None, "tensor", "name", "group"):
        p = parameter(6, 4)
        table = {"p": Layout(1)} if layouts == "name" else {p: Layout(1)}
        params = [("p", p)] if layouts == "name" else [{"params": [p], "layouts": table}] if layouts == "group" else [p]
        optimizer = make(algorithm, params, layouts=table if layouts in ("tensor", "name") else None, lr=0.1)
        p.grad = p.detach() * torch.arange(1.0, 5.0)
        optimizer.step()  # leaves a momentum along p
        p.grad = orthogonal_gradient(p, (0,))  # orthogonal column by column
        start = p.detach().clone()
        optimizer.step()
        results.append(((p.detach() - start) * start).sum(0).abs().max().item())
    assert results[0] > 1e-3
    assert max(results[1:]) < 1e-6


def test_a_group_brings_its_own_layouts():
    a, b = parameter(4, 6), parameter(4, 6)
    groups = [{"params": [a], "layouts": {a: Layout(None)}}, {"params": [b]}]
    optimizer = AdamP(groups, layouts={b: Layout(1)})
    assert [group["layouts"] for group in optimizer.param_groups] == [
        [Layout(None).to_dict()],
        [Layout(1).to_dict()],
    ]
    again = AdamP(optimizer.param_groups)
    assert describe(again) == describe(optimizer)


# --- errors, before anything changes ----------------------------------------------------------------------------

BAD_OPTIONS = [
    ("adamp", {"lr": -1.0}, ValueError, "lr"),
    ("adamp", {"lr": float("nan")}, ValueError, "lr"),
    ("adamp", {"lr": torch.tensor(float("nan"))}, ValueError, "lr"),
    ("adamp", {"lr": torch.ones(2)}, ValueError, "one element"),
    ("adamp", {"lr": "1e-3"}, TypeError, "lr"),
    ("adamp", {"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]"),
    ("adamp", {"betas": (0.9, float("nan"))}, ValueError, r"betas\[1\]"),
    ("adamp", {"betas": 0.9}, TypeError, "betas"),
    ("adamp", {"eps": 0}, ValueError, "eps"),
    ("adamp", {"weight_decay": -0.1}, ValueError, "weight_decay"),
    ("adamp", {"delta": -0.1}, ValueError, "delta"),
    ("adamp", {"wd_ratio": float("inf")}, ValueError, "wd_ratio"),
    ("adamp", {"nesterov": 1}, TypeError, "nesterov"),
    ("adamp", {"foreach": True, "differentiable": True}, RuntimeError, "foreach=None"),
    ("adamp", {"fused": True, "differentiable": True}, RuntimeError, "fused=None"),
    ("sgdp", {"momentum": 1.0}, ValueError, "momentum"),
    ("sgdp", {"dampening": 1.1}, ValueError, "dampening"),
    ("sgdp", {"momentum": 0, "nesterov": True}, ValueError, "nesterov"),
    ("sgdp", {"project_momentum": "no"}, TypeError, "project_momentum"),
    ("sgdp", {"foreach": True, "differentiable": True}, RuntimeError, "foreach=None"),
    ("sgdp", {"fused": True, "differentiable": True}, RuntimeError, "fused=None"),
    ("sgdp", {"layouts": Layout(1)}, TypeError, "mapping"),
]


@pytest.mark.parametrize(("algorithm", "options", "error", "message"), BAD_OPTIONS, ids=range(len(BAD_OPTIONS)))
def test_bad_options(algorithm, options, error, message):
    with pytest.raises(error, match=message):
        make(algorithm, [parameter(4, 6)], **options)
    if "layouts" in options:
        options, error = {"layouts": "dim 1"}, ValueError
    optimizer = make(algorithm, [parameter(4, 6)])
    step(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter(3, 2)], **options})
    assert_same(snapshot(optimizer), before)
    if {"foreach", "fused"} & set(options):
        return  # a checkpoint's choice of path is not taken over, see below
    saved = copy.deepcopy(before[1])
    saved["param_groups"][0].update(options)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)
    step(optimizer)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
@both
def test_bad_parameters(algorithm, dtype):
    bad = torch.zeros(4, 6).to(dtype)
    with pytest.raises(TypeError, match=rf"'0\.1'.*{dtype}"):
        make(algorithm, [parameter(4, 6), bad])
    optimizer = make(algorithm, [parameter(4, 6)])
    with pytest.raises(TypeError, match=rf"'1\.0'.*{dtype}"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_belongs_to_one_group():
    p = parameter(4, 6)
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamP([{"params": [p]}, {"params": [p]}])


def resized(p):
    p.data = torch.zeros(2, 2, dtype=p.dtype)


def resized_with_gradient(p):
    p.data = torch.zeros(2, 2, dtype=p.dtype)
    p.grad = torch.zeros_like(p)


def sparse(p):
    p.grad = p.grad.to_sparse()


def made_complex(p):
    p.grad = None
    p.data = p.data.to(torch.complex128)
    p.grad = torch.zeros_like(p)


BAD_GRADIENTS = [
    (sparse, RuntimeError, r"sparse.*'2\.weight'|'2\.weight'.*sparse"),
    (made_complex, TypeError, r"'2\.weight'.*complex"),
    (resized, ValueError, r"gradient of parameter '2\.weight' has shape \(6, 4\)"),
    (resized_with_gradient, ValueError, r"of parameter '2\.weight' has shape \(6, 4\)"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_GRADIENTS)
@both
def test_bad_gradients_change_nothing(algorithm, spoil, error, message):
    params = [(f"{i}.weight", parameter(6, 4, seed=i)) for i in range(3)]
    optimizer = make(algorithm, [{"params": params[:2]}, {"params": params[2:]}])
    step(optimizer, only=(0, 2))
    for _, p in params:
        p.grad = torch.ones_like(p)
    spoil(params[2][1])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


p0, p1 = parameter(4, 6), parameter(5)
BAD_LAYOUTS = [
    ({"0.weight": Layout(4)}, ValueError, r"'0\.weight'.*channel axis 4"),
    ({"0.weight": Layout(0, view=(5, 5))}, ValueError, r"'0\.weight'.*view"),
    ({"no such": Layout(1)}, ValueError, "match no parameter"),
    ({"0": Layout(1), "weight": Layout(0)}, ValueError, r"'0\.weight'.*several"),
    ({"(": Layout(1)}, ValueError, "regular expression"),
    ({"0.weight": 1}, TypeError, "Layout"),
    ({7: Layout(1)}, TypeError, "key"),
    ({p0: Layout(1), "0.weight": Layout(1)}, ValueError, r"'0\.weight'.*by name and by tensor"),
    ({p0: Layout(2)}, ValueError, r"'0\.weight'.*channel axis 2"),
    ({p0: "dim 1"}, TypeError, "Layout"),
    ({torch.zeros(3): Layout(1)}, ValueError, "not a parameter"),
]


@pytest.mark.parametrize(("layouts", "error", "message"), BAD_LAYOUTS, ids=range(len(BAD_LAYOUTS)))
def test_bad_layouts(layouts, error, message):
    named = [("0.weight", p0), ("0.bias", p1)]
    with pytest.raises(error, match=message):
        AdamP(named, layouts=layouts)
    optimizer = AdamP([("other", parameter(2, 2))])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": named, "layouts": layouts})
    assert len(optimizer.param_groups) == 1


def test_names_need_named_parameters():
    with pytest.raises(ValueError, match="named_parameters"):
        AdamP([p0, p1], layouts={"0.weight": Layout(1)})


def with_state_key(entry):
    entry["sum"] = torch.zeros(4, 6)


def without_state_key(entry):
    entry.pop("exp_avg" if "exp_avg" in entry else "momentum")


def of_another_shape(entry):
    name = "exp_avg" if "exp_avg" in entry else "momentum"
    entry[name] = entry[name].T.clone()


@pytest.mark.parametrize("spoil", [with_state_key, without_state_key, of_another_shape])
@both
def test_checkpoints_of_others_change_nothing(algorithm, spoil):
    optimizer = make(algorithm, [("a", parameter(5)), ("b", parameter(4, 6))])
    step(optimizer)
    before = snapshot(optimizer)
    foreign = copy.deepcopy(before[1])
    foreign["param_groups"][0]["lr"] = 7.0
    foreign["state"][0][optimizer.MOMENTS[0]].add_(1)
    spoil(foreign["state"][1])
    untouched = copy.deepcopy(foreign)
    with pytest.raises(ValueError, match="parameter 'b'"):
        optimizer.load_state_dict(foreign)
    assert_same(snapshot(optimizer), before)
    assert_same(foreign, untouched)


@pytest.mark.parametrize(
    ("cls", "algorithm"),
    [
        (torch.optim.Adagrad, "adamp"),
        (torch.optim.SGD, "adamp"),
        (torch.optim.Adagrad, "sgdp"),
        (torch.optim.AdamW, "sgdp"),
    ],
)
def test_checkpoints_of_other_optimizers_change_nothing(cls, algorithm):
    p = parameter(4, 6)
    other = cls([p], lr=1e-2, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
    step(other)
    optimizer = make(algorithm, [p])
    step(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="holds"):
        optimizer.load_state_dict(other.state_dict())
    assert_same(snapshot(optimizer), before)


@both
def test_checkpoints_of_other_models_change_nothing(algorithm):
    optimizer = make(algorithm, [parameter(4, 6), parameter(5)])
    step(optimizer)
    before = snapshot(optimizer)
    for params in ([parameter(4, 6)], [{"params": [parameter(4, 6)]}, {"params": [parameter(5)]}]):
        with pytest.raises(ValueError, match="group"):
            optimizer.load_state_dict(make(algorithm, params).state_dict())
    fitted = make(algorithm, [p0, p1], layouts={p0: Layout(1)}).state_dict()
    fitted["param_groups"][0]["layouts"][1] = Layout(3).to_dict()
    with pytest.raises(ValueError, match=r"parameter '0\.1'.*channel axis 3"):
        optimizer.load_state_dict(fitted)
    assert_same(snapshot(optimizer), before)


def test_a_checkpoint_brings_no_path_and_takes_no_layout():
    p = parameter(4, 6)
    saved = torch.optim.AdamW([p], fused=True)
    step(saved)
    optimizer = make("adamp", [p], layouts={p: Layout(1)})
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["fused"] is None
    assert "Layout(channel=1)" in describe(optimizer)
    assert int(optimizer.state[p]["step"]) == 1


def test_a_checkpoint_of_default_layouts_brings_these():
    p = parameter(4, 6)
    saved = make("adamp", [p])
    step(saved)
    optimizer = make("adamp", [p], layouts={p: Layout(1)})
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["layouts"] is None
    assert "Layout(channel=0)" in describe(optimizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": float("nan")}, "no count of steps"),
        ({"step": float("inf")}, "no count of steps"),
        ({"step": -3}, "no count of steps"),
        ({"step": torch.zeros(3)}, "no count of steps"),
        ({"exp_avg": None}, "no dense floating-point tensor"),
        ({"exp_avg": torch.zeros(4, 6).to_sparse()}, "no dense floating-point tensor"),
    ],
)
def test_a_state_that_is_none_is_refused(change, words):
    optimizer = make("adamp", [parameter(4, 6)])
    step(optimizer)
    before = snapshot(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(change)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


@both
def test_hyperparameters_set_by_hand_are_checked_before_the_step(algorithm):
    first, second = parameter(4, 6), parameter(3, 2)
    optimizer = make(algorithm, [{"params": [first]}, {"params": [second]}])
    step(optimizer)
    before = snapshot(optimizer)
    optimizer.param_groups[1]["delta"] = float("nan")
    with pytest.raises(ValueError, match="delta must be in"):
        step(optimizer)
    optimizer.param_groups[1]["delta"] = 0.1
    assert_same(snapshot(optimizer), before)
