"""What each of several processes does in the tests of sharded parameters: all are given the same calls."""

import copy
import itertools
import math
import random
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import adamp
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import adamp_torch._sharding as sharding
from adamp_conformance.adapters.torch_sharded import mesh
from adamp_spec import Layout
from adamp_torch import SGDP, AdamP

CLASSES = {"adamp": AdamP, "sgdp": SGDP}


def make(algorithm, params, **options):
    own = {} if algorithm == "adamp" else {"momentum": 0.9}
    # What is fused is compiled in every process, which takes its time.
    return CLASSES[algorithm](params, **({"lr": 1e-2, "weight_decay": 0.1, "fused": False} | own | options))


def raised(function, *arguments):
    """The type and text of what `function` raises."""
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


# --- faults ----------------------------------------------------------------------------------------------------------

_whole = {}


def plant(fault):
    """Puts a fault into the sharded step, until `uproot`."""
    _whole.update({name: getattr(sharding, name) for name in ("_add_up", "read_axes", "tally")})
    if fault == "each process for itself":
        sharding._add_up = lambda terms, across, shards: terms
    elif fault == "rows are not completed":
        sharding._add_up = lambda terms, across, shards: (
            terms if isinstance(terms[0], sharding.Sums) else _whole["_add_up"](terms, across, shards)
        )
    elif fault == "thresholds of the local part":
        sharding.tally = lambda sums, rows, **options: _whole["tally"](
            sums, replace(rows, shape=tuple(size // 2 or 1 for size in rows.shape)), **options
        )
    elif fault == "a view is not looked through":
        sharding.read_axes = lambda shape, rows: _whole["read_axes"](shape, Layout().rows(shape))


def uproot():
    for name, function in _whole.items():
        setattr(sharding, name, function)


# --- tensors ---------------------------------------------------------------------------------------------------------

SHAPES = [((6, 5), None), ((7, 4, 3), None), ((3, 8), Layout(1)), ((2, 6, 5), Layout(2, batch=0)), ((9,), None)]
SHAPES += [((12, 4), Layout(1, batch=0, view=(3, 4, 4))), ((2, 3), None), ((1, 6), None)]


def values(seed, dtype=torch.float64):
    """Random tensors of all shapes, the same in all processes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape, _ in SHAPES]


def gradients(params, seed):
    """Random gradients, every other one without its part along each row, the others at times along each slice."""
    made = []
    for i, (p, g, (_, layout)) in enumerate(zip(params, values(seed), SHAPES, strict=True)):
        rows = (layout or Layout()).rows(tuple(p.shape))
        axes = rows.row if i % 2 else rows.layer
        if rows.projects and (seed + i) % 4 < 3:
            x, y = (t.detach().double().reshape(rows.shape) for t in (p, g))
            g = (y - x * (y * x).sum(axes, keepdim=True) / (x * x).sum(axes, keepdim=True)).reshape(p.shape)
        made.append(g.to(p.dtype))
    return made


def layouts(params):
    return {p: layout for p, (_, layout) in zip(params, SHAPES, strict=True) if layout}


def placed(x, shape, placements):
    """`x` on a mesh of such a shape; an axis that it does not have is not cut."""
    fit = [p if not isinstance(p, Shard) or p.dim < x.ndim else Replicate() for p in placements]
    return distribute_tensor(x.clone(), mesh(shape), fit, src_data_rank=None)


def pair(algorithm, shape, placements, mixed=False, **options):
    """The same tensors in two optimizers, one plain and one of DTensors (`mixed`: every other one is plain)."""
    plain = [nn.Parameter(x) for x in values(0)]
    parts = [
        nn.Parameter(x.detach().clone() if mixed and i % 2 else placed(x.detach(), shape, placements))
        for i, x in enumerate(plain)
    ]
    return (
        make(algorithm, plain, layouts=layouts(plain)),
        make(algorithm, parts, layouts=layouts(parts), **options),
    )


def give(optimizer, plain, seed, only=None):
    """The gradients that belong to the plain parameters, placed as those of `optimizer` are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, (p, g) in enumerate(zip(params, gradients(plain, seed), strict=True)):
        g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else g
        p.grad = g if only is None or i in only else None


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_follows(sharded, plain):
    """That parameters and state are those of `plain`, up to rounding, and placed as the parameters are."""
    pairs = zip(*([p for group in x.param_groups for p in group["params"]] for x in (sharded, plain)), strict=True)
    for i, (p, q) in enumerate(pairs):
        torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-11, atol=1e-13, msg=lambda m, i=i: f"{i}: {m}")
        assert sharded.state[p].keys() == plain.state[q].keys()
        for key, x in sharded.state[p].items():
            torch.testing.assert_close(full(x), plain.state[q][key], rtol=1e-11, atol=1e-13)
            if key == "step":
                assert type(x) is torch.Tensor
            elif isinstance(p, DTensor):
                assert (x.placements, x.device_mesh) == (p.placements, p.device_mesh)


def follows(algorithm, shape, placements, mixed=False, only=((None,) * 3), **options):
    plain, sharded = pair(algorithm, shape, placements, mixed, **options)
    params = plain.param_groups[0]["params"]
    for t, which in enumerate(only):
        for optimizer in (sharded, plain):  # the plain one moves last: gradients follow its parameters
            give(optimizer, params, t, which)
            optimizer.step()
    assert_follows(sharded, plain)


def flags(algorithm, options):
    """Whether a flag leaves results as they are, and the gradient scaler and `step` agree on who unscales."""
    follows(algorithm, (2, 2), (Shard(0), Shard(1)), mixed=True, **options)
    _, sharded = pair(algorithm, (4,), (Shard(0),), **options)
    return sharded._step_supports_amp_scaling


def one_follows(algorithm, x, layout, over, placements):
    """Whether two steps of one tensor follow the plain ones: a random gradient, then one without some radial part."""
    plain = nn.Parameter(x.clone())
    part = nn.Parameter(distribute_tensor(x.clone(), over, placements, src_data_rank=None))
    own, theirs = (make(algorithm, [p], layouts={p: layout}, delta=0.7) for p in (plain, part))
    rows = layout.rows(tuple(x.shape))
    for axes in ((), rows.row if x.numel() % 2 else rows.layer):
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()), dtype=x.dtype)
        if axes:
            y, z = (t.detach().reshape(rows.shape) for t in (plain, g))
            g = (z - y * (z * y).sum(axes, keepdim=True) / (y * y).sum(axes, keepdim=True)).reshape(x.shape)
        plain.grad, part.grad = g, distribute_tensor(g.clone(), over, placements, src_data_rank=None)
        theirs.step()
        own.step()
    assert_follows(theirs, own)


def random_layouts(algorithm, seed, count):
    """Views that merge and split axes, cut along two dimensions of a mesh; the roles of the axes that occurred."""
    rng = random.Random(seed)
    roles = set()
    for i in range(count):
        factors = [rng.choice([1, 2, 2, 3, 4]) for _ in range(rng.randint(2, 5))]
        shape, view = (merged(factors, rng) for _ in range(2))
        axes = rng.sample(range(len(view)), len(view))
        channel = rng.randint(1, max(1, len(axes) - 1))
        layout = Layout(axes[:channel], axes[channel : channel + rng.randint(0, 1)], view)
        placements = rng.choices([Replicate(), *map(Shard, range(len(shape)))], k=2)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        try:
            one_follows(algorithm, x, layout, mesh((2, 2)), placements)
        except AssertionError as error:
            raise AssertionError(f"{shape} as {layout} on {placements}: {error}") from error
        if layout.rows(shape).projects:
            roles.update(sharding.read_axes(shape, layout.rows(shape)).roles)
    return sorted(roles)


def merged(factors, rng):
    """A shape whose axes are products of one or two factors."""
    shape, rest = [], list(factors)
    while rest:
        n = rng.randint(1, 2)
        shape.append(math.prod(rest[:n]))
        rest = rest[n:]
    return tuple(shape)


def three_dimensions(algorithm):
    """All placements on a mesh of three dimensions, one of a single process."""
    over = init_device_mesh("cpu", (2, 1, 2))
    for placements in itertools.product([Shard(0), Shard(1), Replicate()], repeat=3):
        one_follows(algorithm, values(0)[0], Layout(), over, placements)


# --- what a step costs -----------------------------------------------------------------------------------------------


@contextmanager
def counted():
    """Every all-reduce with its size, and all other collectives by name."""
    seen, plain = [], dist.all_reduce

    def all_reduce(x, *arguments, **options):
        seen.append(x.numel())
        return plain(x, *arguments, **options)

    dist.all_reduce = all_reduce
    others = {}
    try:
        with CommDebugMode() as debug:
            yield seen, others
        others.update({str(name): n for name, n in debug.get_comm_counts().items() if "allreduce_" not in str(name)})
    finally:
        dist.all_reduce = plain


def collectives(algorithm, shape, placements, tensors, layout, size):
    """The sizes of the all-reduces of a step, of several groups of tensors of one shape."""
    params = [nn.Parameter(placed(torch.randn(size), shape, placements)) for _ in range(tensors)]
    groups = [{"params": params[i::3], "lr": 0.1 * (i + 1)} for i in range(3) if params[i::3]]
    optimizer = make(algorithm, groups, layouts=dict.fromkeys(params, layout) if layout else None)
    for p in params:
        p.grad = torch.ones_like(p)
    with counted() as (seen, others):
        optimizer.step()
    return seen, others


def without_gradients(algorithm):
    """All-reduces of a step with gradients in one group of two, in the other, and in none."""
    first, second = ([nn.Parameter(placed(x, (4,), (Shard(0),))) for x in values(i)] for i in range(2))
    optimizer = make(algorithm, [{"params": first}, {"params": second}])
    found = []
    for some in (first, second, []):
        for p in (*first, *second):
            p.grad = None
        for p in some:
            p.grad = torch.ones_like(p)
        with counted() as (seen, _):
            optimizer.step()
        found.append(len(seen))
    return found


class Operations(TorchDispatchMode):
    """What a step reads on the host, and the bytes of the tensors that it makes, while they live."""

    def __init__(self):
        super().__init__()
        self.read, self.bytes, self.peak = [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            self.read.append(func)
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor) and not func.is_view and all(x is not y for y in args):
                self.bytes += x.untyped_storage().nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(x, self.forget, x.untyped_storage().nbytes())
        return result

    def forget(self, size):
        self.bytes -= size


def host_reads(algorithm, capturable):
    """How many values a step reads on the host."""
    plain, sharded = pair(algorithm, (2, 2), (Shard(0), Shard(1)), capturable=capturable)
    for t in range(2):
        give(sharded, plain.param_groups[0]["params"], t)
        with Operations() as seen:
            sharded.step()
    return len(seen.read)


def memory(algorithm, tensors):
    """Bytes of intermediate tensors at the peak of a step, in units of one local tensor."""
    params = [nn.Parameter(placed(torch.randn(64, 256), (4,), (Shard(0),))) for _ in range(tensors)]
    optimizer = make(algorithm, params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with Operations() as seen:
        optimizer.step()
    return seen.peak / (16 * 256 * 4)


# --- models ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Axes that four processes cannot share evenly, or not at all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.second = nn.Linear(10, 3, bias=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


def model(seed=0):
    torch.manual_seed(seed)
    return Model().double()


def train(module, optimizer, steps, start=0, rank=None):
    """Steps on random data: the same in all processes, or the share of `rank`."""
    for t in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        if rank is not None:
            x = x.chunk(dist.get_world_size())[rank]
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def sharded_model(shape, seed=0):
    sharded = model(seed)
    for layer in sharded.children():
        fully_shard(layer, mesh=mesh(shape))
    return fully_shard(sharded, mesh=mesh(shape))


def fsdp2(algorithm, shape):
    plain, sharded = model(), sharded_model(shape)
    own, theirs = (make(algorithm, m.parameters(), delta=0.5) for m in (plain, sharded))
    train(plain, own, 4)
    train(sharded, theirs, 4, rank=dist.get_rank())
    assert_follows(theirs, own)
    return [tuple(p.to_local().shape) for p in sharded.parameters()]


def tensor_parallel(algorithm):
    """FSDP2 over tensor parallelism; the norm's gradients are sums to be formed."""
    whole = mesh_of_two()
    plain, sharded = model(), model()
    plan = {"first": ColwiseParallel(output_layouts=Shard(0)), "norm": SequenceParallel(sequence_dim=0)}
    plan["second"] = RowwiseParallel(input_layouts=Shard(0), output_layouts=Replicate())
    parallelize_module(sharded, whole["tp"], plan)
    fully_shard(sharded, mesh=whole["dp"])
    own, theirs = (make(algorithm, m.parameters(), delta=0.5) for m in (plain, sharded))
    train(plain, own, 3)
    train(sharded, theirs, 3)
    assert_follows(theirs, own)
    return [str(p.placements) for p in sharded.parameters()]


@cache
def mesh_of_two():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def partial_gradients(algorithm, under_way):
    """A gradient whose sum has not been formed is summed, as operations on DTensors do; or is about to be."""
    plain, sharded = (nn.Parameter(x) for x in (values(0)[0], placed(values(0)[0], (4,), (Shard(1),))))
    own, theirs = make(algorithm, [plain]), make(algorithm, [sharded])
    plain.grad = values(1)[0]
    share = plain.grad * (dist.get_rank() + 1) / 10
    sharded.grad = DTensor.from_local(share, mesh((4,)), [Partial()])
    if under_way:
        sharded.grad = sharded.grad.redistribute(placements=[Shard(1)], async_op=True)
        assert type(sharded.grad.to_local()) is not torch.Tensor
    own.step()
    theirs.step()
    assert_follows(theirs, own)


def ddp(algorithm):
    plain, replica = model(), model()
    own, theirs = (make(algorithm, m.parameters(), delta=0.5) for m in (plain, replica))
    train(plain, own, 4)
    train(DistributedDataParallel(replica), theirs, 4, rank=dist.get_rank())
    assert_follows(theirs, own)
    return [p.detach().numpy().tobytes() for p in replica.parameters()]


def zero(algorithm, buckets):
    plain, replica = model(), model()
    own = make(algorithm, plain.parameters(), delta=0.5)
    options = {key: own.defaults[key] for key in ("lr", "weight_decay", "delta", "fused")}
    options |= {"momentum": 0.9} if algorithm == "sgdp" else {}
    theirs = ZeroRedundancyOptimizer(
        replica.parameters(), CLASSES[algorithm], parameters_as_bucket_view=buckets, **options
    )
    train(plain, own, 4)
    train(DistributedDataParallel(replica), theirs, 4, rank=dist.get_rank())
    for p, q in zip(replica.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    return len(theirs.optim.state)


def checkpoint(algorithm, folder, shape):
    """Saved by two steps, loaded into other numbers, and on: the bits of one that was not stopped."""
    going = sharded_model(shape)
    optimizer = make(algorithm, going.parameters(), delta=0.5, weight_decay=0.2)
    train(going, optimizer, 2)
    dcp.save(
        {"model": get_model_state_dict(going), "optim": get_optimizer_state_dict(going, optimizer)},
        checkpoint_id=folder,
    )
    fresh = sharded_model(shape, seed=1)
    restored = make(algorithm, fresh.parameters(), lr=0.5)
    state = {"model": get_model_state_dict(fresh), "optim": get_optimizer_state_dict(fresh, restored)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state["model"])
    set_optimizer_state_dict(fresh, restored, state["optim"])
    for m, o in ((going, optimizer), (fresh, restored)):
        train(m, o, 2, start=2)
    for p, q in zip(going.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        assert optimizer.state[p].keys() == restored.state[q].keys()
        for key, x in optimizer.state[p].items():
            y = restored.state[q][key]
            assert type(x) is type(y)
            if isinstance(x, DTensor):
                assert (y.placements, y.device_mesh) == (q.placements, q.device_mesh)
                x, y = x.to_local(), y.to_local()
            assert torch.equal(x, y)
            assert key != "step" or int(y) == 4
    return restored.param_groups[0]["weight_decay"]


def checkpoint_of_the_whole(algorithm):
    """A complete state goes from sharded to plain and back."""
    sharded, plain, again = sharded_model((4,)), model(seed=1), sharded_model((4,), seed=2)
    optimizers = [make(algorithm, m.parameters(), delta=0.5) for m in (sharded, plain, again)]
    train(sharded, optimizers[0], 2)
    whole = StateDictOptions(full_state_dict=True)
    for source, target in ((0, 1), (1, 2)):
        a, b = (sharded, plain, again)[source], (sharded, plain, again)[target]
        set_model_state_dict(b, get_model_state_dict(a, options=whole), options=whole)
        states = copy.deepcopy(get_optimizer_state_dict(a, optimizers[source], options=whole))
        set_optimizer_state_dict(b, optimizers[target], states, options=whole)
    for m, o in zip((sharded, plain, again), optimizers, strict=True):
        train(m, o, 2, start=2)
    assert_follows(optimizers[0], optimizers[1])
    assert_follows(optimizers[2], optimizers[1])
    return [raised(optimizers[0].load_state_dict, optimizers[1].state_dict())]


def scaled(algorithm, fused):
    """With torch.amp.GradScaler: the second of three steps overflows."""
    plain, sharded = model(), sharded_model((4,))
    own, theirs = make(algorithm, plain.parameters()), make(algorithm, sharded.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        theirs.zero_grad()
        scaler.scale(sharded(x).square().mean()).backward()
        if t == 1 and dist.get_rank() == 0:
            sharded.first.weight.grad.to_local()[0, 0] = float("inf")
        scaler.step(theirs)
        scaler.update()
        if t != 1:
            own.zero_grad()
            plain(x).square().mean().backward()
            own.step()
    assert_follows(theirs, own)


# --- what is refused -------------------------------------------------------------------------------------------------


def refusals(algorithm):
    """What is said to parameters that cannot be stepped."""
    found = {}
    terms = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh((4,)), [Partial()]))
    found["partial"] = raised(make, algorithm, [terms])
    part = nn.Parameter(placed(torch.ones(4, 3), (4,), (Shard(0),)))
    found["differentiable"] = raised(lambda: make(algorithm, [part], differentiable=True))
    for original in (False, True):
        flat = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=original)
        found[f"fsdp1 {original}"] = raised(make, algorithm, flat.parameters())

    optimizer = make(algorithm, [part])
    before = part.to_local().clone()
    plain = nn.Parameter(torch.ones(4, 3))
    plain.grad = placed(torch.ones(4, 3), (4,), (Shard(0),))
    found["sharded gradient"] = raised(make(algorithm, [plain]).step)
    part.grad = torch.ones_like(part)
    optimizer.step()
    saved = optimizer.state_dict()
    for name in optimizer.MOMENTS:
        saved["state"][0][name] = torch.zeros(4, 3)
    found["plain state"] = raised(optimizer.load_state_dict, copy.deepcopy(saved))
    for name in optimizer.MOMENTS:
        saved["state"][0][name] = placed(torch.zeros(4, 3), (4,), (Shard(1),))
    found["other state"] = raised(optimizer.load_state_dict, saved)
    assert not torch.equal(part.to_local(), before)
    return found


# --- the package of the authors --------------------------------------------------------------------------------------


def official(algorithm, placements):
    """What the package `adamp` does with DTensors on all processes: raises, or steps."""
    cls = {"adamp": adamp.AdamP, "sgdp": adamp.SGDP}[algorithm]
    x, g = values(0)[0], gradients([values(0)[0], *values(0)[1:]], 3)[0]
    part = nn.Parameter(placed(x, (4,), placements))
    part.grad = placed(g, (4,), placements)
    return raised(cls([part], lr=0.1).step)


def official_on_parts(algorithm):
    """How far the package `adamp` is from itself when each process steps its part; and how far ours is."""
    cls = {"adamp": adamp.AdamP, "sgdp": adamp.SGDP}[algorithm]
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    orthogonal = g - x * (g * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True)
    g = torch.cat([orthogonal[:6], x[6:]])  # the last rows are along their weights: nothing is to be projected
    errors = []
    for make_one, place in ((cls, lambda t: t.chunk(4)[dist.get_rank()].clone()), (CLASSES[algorithm], None)):
        whole = nn.Parameter(x.clone())
        part = nn.Parameter(place(x) if place else placed(x, (4,), (Shard(0),)))
        for p, gradient in ((whole, g), (part, place(g) if place else placed(g, (4,), (Shard(0),)))):
            p.grad = gradient.clone()
            make_one([p], lr=0.1, weight_decay=0.1).step()
        here = part if place else part.to_local()
        errors.append(float((here - whole.detach().chunk(4)[dist.get_rank()]).abs().max()))
    return errors


def wait_in_vain():
    """One process calls a collective that the others do not."""
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(1))
