"""Against the official package (adamp 0.3.0) and torch.optim.AdamW, in float64 along 50-step trajectories."""

import io

import adamp
import pytest
import torch

from adamp_spec import AdamPHyper, Layout, decide
from adamp_torch import SGDP, AdamP

SHAPES = [(), (5,), (4, 6), (3, 4, 5), (8, 3, 3, 3), (2, 3, 4, 5, 6)]
BRANCHES = ["channel", "layer", "none"]
STEPS = 50


def gradient(param, branch, generator):
    """A random gradient, orthogonal to each row, to the whole tensor, or to neither."""
    p = param.detach()
    grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
    if branch == "none" or p.ndim < 2:
        return grad + 0.5 * p
    dim = tuple(range(1 if branch == "channel" else 0, p.ndim))
    return grad - p * (grad * p).sum(dim, keepdim=True) / (p * p).sum(dim, keepdim=True)


def branch_of(param, grad):
    rows = Layout().rows(tuple(param.shape))
    channel, layer = decide(param.detach().numpy(), grad.numpy(), AdamPHyper(), rows)
    return "channel" if channel.all() else "layer" if layer.all() else "none"


def run(ours, theirs, branch, steps=STEPS, seed=0):
    """Steps two optimizers on equal gradients; returns how often the wanted branch was taken."""
    generator = torch.Generator().manual_seed(seed)
    (p,), (q,) = (optimizer.param_groups[0]["params"] for optimizer in (ours, theirs))
    taken = 0
    for _ in range(steps):
        grad = gradient(q, branch, generator)
        taken += branch_of(q, grad) == branch
        p.grad, q.grad = grad, grad.clone()
        ours.step()
        theirs.step()
    return taken


def twins(shape, seed=1):
    start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(start), torch.nn.Parameter(start.clone())


def assert_equal_to_rounding(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adamp_equals_official(shape, branch, weight_decay, nesterov):
    options = {"lr": 1e-2, "weight_decay": weight_decay, "nesterov": nesterov}
    p, q = twins(shape)
    ours, theirs = AdamP([p], **options), adamp.AdamP([q], **options)
    taken = run(ours, theirs, branch)
    assert len(shape) < 2 or taken >= 0.8 * STEPS
    assert_equal_to_rounding(p, q)
    for name in ("exp_avg", "exp_avg_sq"):
        assert_equal_to_rounding(ours.state[p][name], theirs.state[q][name])


@pytest.mark.parametrize(
    "momentum_dampening_nesterov", [(0, 0, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0.3, True)]
)
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sgdp_equals_official(shape, branch, weight_decay, momentum_dampening_nesterov):
    momentum, dampening, nesterov = momentum_dampening_nesterov
    options = {
        "lr": 1e-2,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
    }
    p, q = twins(shape)
    ours, theirs = SGDP([p], project_momentum=True, **options), adamp.SGDP([q], **options)
    taken = run(ours, theirs, branch)
    assert len(shape) < 2 or taken >= 0.8 * STEPS
    assert_equal_to_rounding(p, q)
    assert_equal_to_rounding(ours.state[p]["momentum"], theirs.state[q]["momentum"])


def test_sgdp_with_a_clean_buffer_is_another_optimizer():
    """The official buffer is projected along with the update; ours is so only on request."""
    p, q = twins((4, 6))
    run(SGDP([p], 0.1, 0.9), adamp.SGDP([q], 0.1, 0.9), "channel", steps=5)
    assert (p - q).abs().max() > 1e-4


def test_positional_arguments_are_the_official_ones():
    p, q = twins((4, 6))
    arguments = (1e-2, (0.8, 0.99), 1e-7, 0.1, 0.2, 0.3, True)
    run(AdamP([p], *arguments), adamp.AdamP([q], *arguments), "channel", steps=5)
    assert_equal_to_rounding(p, q)
    p, q = twins((4, 6))
    arguments = (1e-2, 0.8, 0.1, 0.1, True, 1e-7, 0.2, 0.3)
    run(SGDP([p], *arguments), adamp.SGDP([q], *arguments), "channel", steps=5)
    assert_equal_to_rounding(p, q)


OPTIMIZERS = {
    "adamp": (AdamP, adamp.AdamP, {}, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgdp": (SGDP, adamp.SGDP, {"project_momentum": True}, {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("extra_group_flags", [{}, {"caution": False}], ids=["official", "timm"])
@pytest.mark.parametrize("algorithm", OPTIMIZERS)
def test_official_checkpoints_continue(algorithm, extra_group_flags, capturable):
    ours, theirs, own, options = OPTIMIZERS[algorithm]
    p, q = twins((4, 3, 3, 3))
    before, official = theirs([p], **options), theirs([q], **options)
    run(before, official, "channel", steps=10)

    file = io.BytesIO()
    checkpoint = before.state_dict()
    checkpoint["param_groups"][0].update(extra_group_flags)
    torch.save(checkpoint, file)
    file.seek(0)
    layouts = {p: Layout((0, 1))}
    optimizer = ours([p], lr=1.0, layouts=layouts, capturable=capturable, **own)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups[0]["layouts"] == [Layout((0, 1)).to_dict()], "kept: the checkpoint has none"
    assert optimizer.param_groups[0]["capturable"] is capturable
    assert optimizer.param_groups[0]["lr"] == 1e-2
    step = optimizer.state[p]["step"]
    assert isinstance(step, torch.Tensor)
    assert step == (10 if algorithm == "adamp" else 0)

    optimizer = ours([p], lr=1.0, capturable=capturable, **own)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, official, "layer", steps=10)
    assert_equal_to_rounding(p, q)


@pytest.mark.parametrize("algorithm", OPTIMIZERS)
def test_official_package_continues_our_checkpoints(algorithm):
    ours, theirs, own, options = OPTIMIZERS[algorithm]
    p, q = twins((4, 6))
    optimizer, twin = ours([p], **own, **options), ours([q], **own, **options)
    run(optimizer, twin, "channel", steps=10)
    official = theirs([p], lr=1.0)
    official.load_state_dict(optimizer.state_dict())
    run(official, twin, "none", steps=10)
    # It corrects the bias with our counter, a float32 tensor, hence in float32.
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_projection_it_is_adamw(shape, branch):
    p, q = twins(shape)
    ours = AdamP([p], lr=1e-2, weight_decay=0.1, delta=0)
    run(ours, torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1), branch)
    assert_equal_to_rounding(p, q)


def test_adamw_checkpoints_continue():
    p, q = twins((4, 6))
    adamw, twin = (torch.optim.AdamW([x], lr=1e-2, weight_decay=0.1) for x in (p, q))
    run(adamw, twin, "none", steps=10)
    ours = AdamP([p], delta=0)
    ours.load_state_dict(adamw.state_dict())
    run(ours, twin, "channel", steps=10)
    assert_equal_to_rounding(p, q)
