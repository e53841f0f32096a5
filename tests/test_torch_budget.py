"""What a step of adamp_torch costs: operations, reads by the host, memory moved and memory held."""

import pytest
import torch

import adamp_torch._foreach
import adamp_torch._projection
from adamp_spec import Layout
from adamp_torch import SGDP, AdamP
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import make_parameters
from benchmarks.operations import Operations
from benchmarks.parameter_lists import MODELS

CLASSES = {"adamp": AdamP, "sgdp": SGDP}
PATHS = {"single": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CPU = torch.device("cpu")
SHAPES = [(64, 32, 3, 3), (64,), (16, 64, 1, 1), (1, 512), (33, 65), (9,), ()]

both = pytest.mark.parametrize("algorithm", CLASSES)
each = pytest.mark.parametrize("path", PATHS)


def make(algorithm, path, params, **options):
    own = {} if algorithm == "adamp" else {"momentum": 0.9}
    return CLASSES[algorithm](params, **{"lr": 1e-2, "weight_decay": 0.1} | own | PATHS[path] | options)


def on_meta(shapes):
    """Parameters and gradients that have no values: nothing is computed, and nothing can be read."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def operations(optimizer):
    optimizer.step()
    with Operations() as seen:
        optimizer.step()
    return seen


def accesses(seen, params):
    """Bytes moved, in sizes of all parameters together."""
    return seen.moved / sum(p.numel() * p.element_size() for p in params)


def read_on_device(seen, optimizer):
    """What was read, without step counters on the host."""
    counters = {id(state["step"]) for state in optimizer.state.values() if state["step"].device == CPU}
    return [x for x in seen.read if id(x) not in counters]


# --- the meter -------------------------------------------------------------------------------------------------------

X, Y = torch.ones(8, 4), torch.ones(8, 4)


@pytest.mark.parametrize(
    ("work", "kernels", "moved"),
    [
        (lambda: X + Y, 1, 3),
        (lambda: X * X, 1, 2),
        (lambda: X.clone().add_(Y), 2, 2 + 3),
        (lambda: torch.empty(8, 4).copy_(X), 1, 2),
        (lambda: torch.empty(8, 4).zero_(), 1, 1),
        (lambda: X.t().reshape(2, 2, 8)[0].detach(), 0, 0),
        (lambda: X + Y[:, :1].expand(8, 4), 1, 2.25),
        (lambda: torch.add(X, Y, out=torch.empty(8, 4)), 1, 3),
        (lambda: torch._foreach_add([X, Y], [Y, X]), 1, 4),
        (lambda: X.sum(1), 1, 1.25),
    ],
    ids=range(10),
)
def test_inputs_are_read_and_outputs_written_once(work, kernels, moved):
    with Operations() as seen:
        work()
    assert (seen.kernels.total(), seen.moved) == (kernels, moved * X.nbytes)


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, torch.Tensor.nonzero, float], ids=range(4))
def test_reads_are_noticed(read):
    x = torch.ones(())
    with Operations() as seen:
        read(x)
    assert [id(y) for y in seen.read] == [id(x)]
    with Operations() as seen:
        torch.where(x > 0, x, -x)
    assert not seen.read


@pytest.mark.parametrize(("name", "moved"), [("adamw-fused", 7), ("sgd-fused", 5)])
def test_the_fused_optimizers_of_pytorch_move_what_they_must(name, moved):
    params = make_parameters(SHAPES, torch.float32, CPU)
    assert accesses(operations(CONTENDERS[name].make(params)), params) == pytest.approx(moved, rel=0.001)


# --- the budget ------------------------------------------------------------------------------------------------------

# What a step was measured to cost, rounded up: operations, and accesses per element.
BUDGET = {
    ("adamp", "single", "resnet50"): (5000, 57),
    ("adamp", "foreach", "resnet50"): (1500, 57),
    ("adamp", "single", "gpt2-small"): (4650, 57),
    ("adamp", "foreach", "gpt2-small"): (400, 57),
    ("sgdp", "single", "resnet50"): (3900, 41),
    ("sgdp", "foreach", "resnet50"): (1350, 43),
    ("sgdp", "single", "gpt2-small"): (3600, 41),
    ("sgdp", "foreach", "gpt2-small"): (360, 43),
}


def over_budget(algorithm, path, model):
    params = on_meta(MODELS[model]())
    seen = operations(make(algorithm, path, params))
    cost = (seen.kernels.total(), accesses(seen, params))
    return any(x > budget for x, budget in zip(cost, BUDGET[algorithm, path, model], strict=True))


@pytest.mark.parametrize(("algorithm", "path", "model"), BUDGET)
def test_a_step_stays_within_its_budget(algorithm, path, model):
    assert not over_budget(algorithm, path, model)


@pytest.mark.parametrize("path", ["single", "foreach"])
@both
def test_one_pass_more_is_over_budget(algorithm, path, monkeypatch):
    sums = adamp_torch._projection.row_sums
    monkeypatch.setattr(adamp_torch._projection, "row_sums", lambda q, *args: sums(q.clone(), *args))
    assert over_budget(algorithm, path, "resnet50")


@both
def test_own_kernels_are_all_that_a_fused_step_is_made_of(algorithm):
    params = make_parameters(SHAPES * 5, torch.float32, CPU)
    optimizer = make(algorithm, "fused", params)
    seen = operations(optimizer)
    assert seen.kernels.total() <= 2
    assert accesses(seen, params) < 0.01, "no pass by PyTorch beside them"
    assert seen.peak < 0.01 * sum(p.nbytes for p in params), "no copies"
    assert not read_on_device(seen, optimizer)


@pytest.mark.parametrize(("algorithm", "moved"), [("adamp", 40), ("sgdp", 28)])
def test_the_official_package_reads_its_decisions(algorithm, moved):
    """The contrast, and a sign that the meter measures."""
    params = make_parameters(SHAPES, torch.float32, CPU)
    seen = operations(CONTENDERS[f"{algorithm}-official"].make(params))
    matrices = sum(p.ndim > 1 for p in params)
    assert matrices <= len(seen.read) <= 2 * matrices
    assert accesses(seen, params) > moved


# --- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
@both
def test_launches_do_not_grow_with_the_number_of_tensors(algorithm, capturable, dtype):
    def kernels(n, path):
        params = make_parameters([(4, 6), (7,), (2, 3, 3, 3)] * n, dtype, CPU)
        return operations(make(algorithm, path, params, capturable=capturable)).kernels.total()

    for path in ("foreach", "fused"):
        assert kernels(10, path) == kernels(40, path)
        assert kernels(10, "single") > 2 * kernels(10, path)
    assert kernels(40, "single") > 3 * kernels(10, "single")


# --- reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("path", ["single", "foreach"])
@both
def test_nothing_on_the_device_is_read_on_the_host(algorithm, path, capturable, lr):
    params = make_parameters(SHAPES * 2, torch.float32, CPU)
    optimizer = make(algorithm, path, params, capturable=capturable, lr=lr)
    seen = operations(optimizer)
    assert not (seen.read if capturable else read_on_device(seen, optimizer))

    params = on_meta(SHAPES * 2)
    optimizer = make(algorithm, path, params, capturable=capturable, layouts={params[0]: Layout(1)})
    optimizer.step()  # tensors on the meta device have no values to read


@pytest.mark.parametrize("path", ["single", "foreach"])
@both
def test_a_host_read_is_noticed(algorithm, path, monkeypatch):
    decide = adamp_torch._projection.decide

    def with_a_branch(*args, **options):
        decision = decide(*args, **options)
        bool(decision.projected.any())
        return decision

    monkeypatch.setattr(adamp_torch._projection, "decide", with_a_branch)
    optimizer = make(algorithm, path, make_parameters(SHAPES, torch.float32, CPU))
    assert read_on_device(operations(optimizer), optimizer)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both
def test_intermediate_tensors_are_bounded(algorithm, dtype, nesterov, monkeypatch):
    size = 64 * 64
    monkeypatch.setattr(adamp_torch._foreach, "PART", 4 * size)
    peaks = []
    for n in (4, 16):
        params = make_parameters([(64, 64)] * n, dtype, CPU)
        peaks.append(operations(make(algorithm, "foreach", params, nesterov=nesterov)).peak / (4 * size * 4))
    assert max(peaks) <= 8.1, "numbers of the working type for each element of a part, and some for each row"
    assert peaks[1] <= peaks[0] + 0.1, "whatever the size of the model"
