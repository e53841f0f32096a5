"""Snapshots in PyTorch: everything comes back, bit for bit, and what does not fit changes nothing."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors import safe_open

from adamp_spec import Layout, snapshot
from adamp_spec.snapshot import KEY, SnapshotError
from adamp_torch import SGDP, AdamP, load_snapshot, save_snapshot

SPEC = Path(__file__).parent.parent / "spec"


class Network(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.out = torch.nn.Linear(6, 7)
        self.out.weight = self.embed.weight  # tied
        self.unused = torch.nn.Parameter(torch.ones(2, 2))
        self.to(dtype)

    def forward(self, x):
        return self.out(self.frozen(self.norm(self.embed(x))))


class Remembering(Network):
    def get_extra_state(self):
        return {"phase": 1}


def adamp(model, backwards=False, **options):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = {"params": [x for x in named if x[1].ndim > 1], "weight_decay": 0.1, "layouts": {"embed": Layout(1)}}
    groups = [matrices, {"params": [x for x in named if x[1].ndim < 2]}]
    return AdamP(groups[::-1] if backwards else groups, lr=1e-2, nesterov=True, **options)


def sgdp(model, **options):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    options = {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "project_momentum": True} | options
    return SGDP(named, lr=1e-2, **options)


both = pytest.mark.parametrize("make", [adamp, sgdp])


def train(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        x = torch.randint(0, 7, (5,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).float(), x).backward()
        optimizer.step()


def everything(model, optimizer):
    held = {name: x.clone() for name, x in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        if state["step"] == 0:  # as good as none
            assert not any(torch.as_tensor(x).any() for x in state.values())
            continue
        held |= {f"{i}.{name}": torch.as_tensor(x).clone() for name, x in state.items()}
    return held


def same(a, b):
    assert list(a) == list(b)
    return all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def trained(tmp_path):
    def make_one(make, dtype=torch.float32):
        torch.manual_seed(0)
        model = Network(dtype)
        optimizer = make(model)
        train(model, optimizer)
        path = tmp_path / "x.safetensors"
        save_snapshot(path, model, optimizer)
        return model, optimizer, path

    return make_one


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stepped", [False, True])
def test_all_comes_back_bit_for_bit_and_goes_on_alike(make, dtype, stepped, trained):
    model, optimizer, path = trained(make, dtype)
    copied = Network(dtype)
    loaded = make(copied, **({"eps": 1e-3, "weight_decay": 0.3, "wd_ratio": 0.2}))
    if stepped:
        train(copied, loaded, seed=1)
    load_snapshot(path, copied, loaded)
    assert same(everything(model, optimizer), everything(copied, loaded))
    for a, b in zip(optimizer.param_groups, loaded.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    train(model, optimizer)
    train(copied, loaded)
    assert same(everything(model, optimizer), everything(copied, loaded))


def test_groups_need_not_be_numbered_alike(trained):
    model, optimizer, path = trained(adamp)
    other = Network()
    loaded = adamp(other, backwards=True)
    load_snapshot(path, other, loaded)
    train(model, optimizer)
    train(other, loaded)
    assert same(model.state_dict(), other.state_dict())


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor(trained):
    _, _, path = trained(sgdp)
    model, lr = Network(), torch.tensor(0.5)
    optimizer = sgdp(model)
    optimizer.param_groups[0]["lr"] = lr
    load_snapshot(path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(1e-2)


def test_groups_that_share_a_tensor_for_their_learning_rate_get_their_own(trained):
    model, optimizer, path = trained(adamp)
    optimizer.param_groups[1]["lr"] = 1e-4
    save_snapshot(path, model, optimizer)
    other = Network()
    rate = torch.tensor(0.5)
    target = adamp(other)
    for group in target.param_groups:
        group["lr"] = rate
    load_snapshot(path, other, target)
    assert [float(group["lr"]) for group in target.param_groups] == pytest.approx([1e-2, 1e-4])
    assert target.param_groups[0]["lr"] is rate


def test_other_optimizers_are_refused(trained):
    model, _, path = trained(adamp)
    for call in (save_snapshot, load_snapshot):
        with pytest.raises(TypeError, match="the optimizer is AdamW; make it adamp_torch"):
            call(path, model, torch.optim.AdamW(model.parameters()))


def test_the_file_says_what_it_holds(trained):
    model, optimizer, path = trained(adamp)
    with safe_open(path, "np") as file:
        header, names = json.loads(file.metadata()[KEY]), set(file.keys())
        assert np.array_equal(file.get_tensor("m/embed.weight"), optimizer.state[model.embed.weight]["exp_avg"])
    schema = json.loads((SPEC / "schema" / "snapshot.schema.json").read_text())
    jsonschema.validate(header, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(header | {"step": 3}, schema)
    assert header["parameters"]["embed.weight"] == {"group": 0, "step": 3, "layout": Layout(1).to_dict()}
    assert header["parameters"]["unused"]["step"] == 0
    assert header["groups"][0] == {
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "delta": 0.1,
        "wd_ratio": 0.1,
        "nesterov": True,
    }
    assert {"other/norm.running_mean", "other/norm.num_batches_tracked", "other/frozen.weight"} < names
    assert not any("out.weight" in name for name in names)


@pytest.mark.parametrize("extra", range(0, 1200, 100))
def test_a_header_of_any_length_is_read(extra, tmp_path):
    """Its length stands in the first bytes of the file, where a pickle has its own."""
    model = torch.nn.ParameterDict({"x" * (1 + n): torch.ones(2, 2) for n in range(extra, extra + 100, 8)})
    for n in range(extra, extra + 100, 8):
        one = torch.nn.ParameterDict({"x" * (1 + n): model["x" * (1 + n)]})
        optimizer = AdamP(one.named_parameters())
        save_snapshot(tmp_path / "x", one, optimizer)
        load_snapshot(tmp_path / "x", one, optimizer)


def test_tensors_lie_in_memory_and_file_as_they_like(tmp_path):
    """Odd sizes put the next ones at odd places of the file; strides and shared memory stay as they are."""
    model = torch.nn.ParameterDict({"a": torch.randn(3, 1).bfloat16(), "b": torch.randn(5, 4).t(), "c": torch.randn(2)})
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.register_buffer("last", torch.tensor(7))
    save_snapshot(tmp_path / "x", model, AdamP(model.named_parameters()))
    fresh = copy.deepcopy(model)
    optimizer = AdamP(fresh.named_parameters())
    strides, whole = fresh["b"].stride(), torch.zeros(4)
    fresh["c"].data = whole[1:3]
    for x in fresh.state_dict().values():
        x.zero_()
    version = fresh["c"]._version
    load_snapshot(tmp_path / "x", fresh, optimizer)
    assert same(model.state_dict(), fresh.state_dict())
    assert fresh["b"].stride() == strides != fresh["b"].contiguous().stride()
    assert torch.equal(whole, torch.tensor([0, *model["c"].tolist(), 0]))
    assert fresh["c"]._version > version  # autograd notices
    with snapshot.opened(tmp_path / "x") as (_, tensors):
        read = {name: x.read() for name, x in tensors.items() if x.dtype != "BF16"}
    assert np.array_equal(read["parameter/b"], model["b"].detach())
    assert (read["other/last"], *read["other/mask"]) == (7, True, False, True)


# --- what is refused -------------------------------------------------------------------------------------------------


def rewritten(path, change):
    """The file with its JSON header changed, and its tensors as they are."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    ours = json.loads(header["__metadata__"][KEY])
    change(header, ours)
    header["__metadata__"][KEY] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def pickled(path):
    torch.save({"weight": torch.ones(2)}, path)


def executing(path):
    path.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


def foreign(path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, path)


def shape_lies(header, ours):
    header["m/embed.weight"]["shape"].reverse()


def size_lies(header, ours):
    header["m/embed.weight"]["shape"] = [1, 1]


def renamed(header, ours):
    header["parameter/other"] = header.pop("parameter/embed.weight")


def unknown_dtype(header, ours):
    header["other/norm.num_batches_tracked"]["dtype"] = "C64"


def many_steps(header, ours):
    for entry in ours["parameters"].values():
        entry["step"] = 2**24 + 1


def without_moment(header, ours):
    header["other/x"] = header.pop("v/embed.weight")


DAMAGED = {
    "truncated": (cut, "damaged.*get it again"),
    "zip": (pickled, "weights_only=True"),
    "pickle": (executing, "damaged or no safetensors"),
    "of another kind": (foreign, "no snapshot"),
    "shape": (lambda path: rewritten(path, shape_lies), r"m/embed.weight has shape \(6, 7\).*get it again"),
    "dtype": (lambda path: rewritten(path, unknown_dtype), "has dtype C64.*get it again"),
    "steps": (lambda path: rewritten(path, many_steps), "over 16777216 steps|more than 16777216 steps"),
    "size": (lambda path: rewritten(path, size_lies), "damaged"),
    "name": (lambda path: rewritten(path, renamed), "lacks.*get it again"),
    "moment": (lambda path: rewritten(path, without_moment), "lacks.*get it again"),
    "step": (
        lambda path: rewritten(path, lambda _, ours: ours["parameters"]["unused"].update(step=2**31)),
        "2147483648",
    ),
    "entry": (lambda path: rewritten(path, lambda _, ours: ours["parameters"]["unused"].update(more=1)), "'more'"),
    "no number": (lambda path: rewritten(path, lambda _, ours: ours["groups"][0].pop("beta1")), "must have .'beta1'"),
    "newer": (lambda path: rewritten(path, lambda _, ours: ours.update(spec="1.1")), "pip install --upgrade"),
    "format": (lambda path: rewritten(path, lambda _, ours: ours.update(format=2)), "pip install --upgrade"),
    "algorithm": (
        lambda path: rewritten(path, lambda _, ours: ours.update(algorithm="adamw")),
        "the algorithm is 'adamw'",
    ),
    "number": (lambda path: rewritten(path, lambda _, ours: ours["groups"][0].update(beta1=1.0)), "beta1"),
    "count": (lambda path: rewritten(path, lambda _, ours: ours["parameters"]["embed.weight"].update(step=-1)), "-1"),
    "group": (
        lambda path: rewritten(path, lambda _, ours: ours["parameters"]["embed.weight"].update(group=2)),
        "group 2",
    ),
    "layout": (
        lambda path: rewritten(
            path, lambda _, ours: ours["parameters"]["embed.weight"].update(layout=Layout(2).to_dict())
        ),
        "channel axis 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_changes_nothing(damage, trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, _, path = trained(adamp)
    damaging, message = DAMAGED[damage]
    damaging(path)
    refused(path, Network(), adamp, message)
    assert not os.path.exists("executed")


def test_a_file_that_changes_while_it_is_read_is_noticed(trained, monkeypatch):
    _, _, path = trained(adamp)
    with snapshot.opened(path) as (_, tensors):
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(SnapshotError, match="shorter"):
            [x.load() for x in tensors.values()]
    _, _, path = trained(adamp)
    opening = snapshot.safe_open

    def replaced(*arguments):
        opened = opening(*arguments)
        path.rename(path.with_name("old"))
        path.write_bytes(path.with_name("old").read_bytes())
        return opened

    monkeypatch.setattr(snapshot, "safe_open", replaced)
    refused(path, Network(), adamp, "was replaced")


def refused(path, model, make, message):
    optimizer = make(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    before, groups = everything(model, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(SnapshotError, match=message):
        load_snapshot(path, model, optimizer)
    assert same(before, everything(model, optimizer))
    assert groups == optimizer.state_dict()["param_groups"]


def wider(dtype=torch.float32):
    model = Network(dtype)
    model.norm.bias = torch.nn.Parameter(torch.ones(8))
    return model


def larger():
    model = Network()
    model.more = torch.nn.Parameter(torch.ones(8))
    return model


def barer():
    model = Network()
    del model.norm.running_mean
    return model


def one_group(model):
    return AdamP((x for x in model.named_parameters() if x[1].requires_grad), layouts={"embed": Layout(1)})


def plain_layouts(model):
    optimizer = adamp(model)
    optimizer.param_groups[0]["layouts"] = None
    return optimizer


@pytest.mark.parametrize(
    ("model", "make", "message"),
    [
        (Network, sgdp, "make the other one"),
        (wider, adamp, r"'norm.bias' is F32 \(6,\) in the snapshot, F32 \(8,\)"),
        (lambda: Network(torch.float64), adamp, "F64"),
        (larger, adamp, "only the model .'more'"),
        (barer, adamp, "other tensors: only the snapshot has .'norm.running_mean'"),
        (Network, one_group, "make two groups"),
        (Network, plain_layouts, r"make it with layouts={'embed.weight': Layout\(channel=1\)}"),
    ],
)
def test_another_model_is_refused_and_stays_as_it_was(model, make, message, trained):
    _, _, path = trained(adamp)
    refused(path, model(), make, message)


def test_what_cannot_be_saved_leaves_the_old_file(trained):
    model, optimizer, path = trained(adamp)
    old = path.read_bytes()
    model.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"'phase' is torch\.complex64"):
        save_snapshot(path, model, optimizer)
    del model.phase
    remembering = Remembering()
    with pytest.raises(TypeError, match="'_extra_state' of the model's state is dict"):
        save_snapshot(path, remembering, adamp(remembering))
    with pytest.raises(ValueError, match="not in the model"):
        save_snapshot(path, model.norm, optimizer)
    with pytest.raises(ValueError, match="maximize"):
        save_snapshot(path, model, adamp(model, maximize=True))
    assert path.read_bytes() == old


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(trained, monkeypatch):
    model, optimizer, path = trained(adamp)
    old = path.read_bytes()

    def fail():
        raise OSError("no space left on device")

    write = snapshot.write
    monkeypatch.setattr(
        snapshot,
        "write",
        lambda path, head, tensors: write(path, head, {k: x._replace(read=fail) for k, x in tensors.items()}),
    )
    with pytest.raises(OSError, match="no space"):
        save_snapshot(path, model, optimizer)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


PEAK = """
import sys, threading, torch
from adamp_torch import AdamP, load_snapshot, save_snapshot

def anonymous():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("RssAnon")) * 1024

model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1 << 22)) for _ in range(16)])
optimizer = AdamP(model.named_parameters())
for p in model:
    p.grad = torch.ones_like(p)
optimizer.step()
model.zero_grad()
peaks = []
for work in (save_snapshot, load_snapshot):
    before = anonymous()
    most, done = [before], threading.Event()
    def watch():
        while not done.is_set():
            most[0] = max(most[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    work(sys.argv[1], model, optimizer)
    done.set()
    watcher.join()
    peaks.append((most[0] - before) / (4 << 22))
print(*peaks)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_memory_peaks_at_a_tensor_above_the_model(tmp_path):
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert all(float(peak) < 1.5 for peak in run.stdout.split()), run.stdout
