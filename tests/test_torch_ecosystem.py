"""AdamP and SGDP where PyTorch's optimizers are used: the examples run, and what wraps an optimizer finds one.

No network is needed: the models are small and made from their configuration, the data are scikit-learn's digits.
"""

import contextlib
import copy
import importlib
import re
import runpy
import sys
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import lightning
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from adamp_spec import Layout
from adamp_torch import SGDP, AdamP, describe
from adamp_torch._paths import fused_kernels

EXAMPLES = Path(__file__).parent.parent / "examples" / "torch"
CLASSES = {"adamp": (AdamP, {"lr": 1e-2}), "sgdp": (SGDP, {"lr": 1e-2, "momentum": 0.9})}
both = pytest.mark.parametrize("algorithm", CLASSES)


@pytest.fixture(autouse=True)
def one_thread():
    """Small models gain nothing from more, and a run is repeated bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_accelerator_of_another_test():
    """Accelerate keeps its settings for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def timm(monkeypatch):
    """timm's optimizers and schedulers, which need no torchvision; the package itself needs one for the same torch."""
    if find_spec("torchvision") is None:
        for name in ("timm", "timm.layers", "timm.models"):
            package = ModuleType(name)
            package.__path__ = [str(metadata.distribution("timm").locate_file(name.replace(".", "/")))]
            monkeypatch.setitem(sys.modules, name, package)
        sys.modules["timm.layers"].use_reentrant_ckpt = None
        groups = importlib.import_module("timm.models._manipulate").group_parameters
        sys.modules["timm.models"].group_parameters = groups
    yield importlib.import_module("timm.optim")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)


# --- the examples ----------------------------------------------------------------------------------------------------

STEPS = {  # what steps, and how often
    "accelerate_loop": (AdamP, 6 * 23),
    "hf_trainer": (AdamP, 6 * 45),
    "lightning_module": (AdamP, 6 * 23),
    "mixed_precision": (AdamP, 6 * 23),
    "schedules": (SGDP, 6 * 23),
    "timm_factory": (AdamP, 6 * 23),
    "weight_averaging": (AdamP, 8 * 23),
}


def run_example(name, capsys):
    """Returns the accuracy that an example prints."""
    with warnings.catch_warnings(action="ignore"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return float(re.fullmatch(r"test accuracy (\d\.\d{4})", capsys.readouterr().out.splitlines()[-1])[1])


def test_every_example_is_run_and_linked():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(STEPS)
    page = (EXAMPLES.parents[1] / "docs" / "torch.md").read_text()
    assert set(re.findall(r"\(\.\./examples/torch/(\w+)\.py\)", page)) == set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_examples_learn_the_digits(name, capsys, timm):
    stepped = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(type(optimizer)))
    accuracy = run_example(name, capsys)
    handle.remove()
    assert accuracy > 0.93
    left_out = STEPS[name][1] - len(stepped)
    assert set(stepped) == {STEPS[name][0]}
    assert left_out == 0 or (name == "mixed_precision" and 0 < left_out < 8), "GradScaler finds its scale"


@pytest.mark.parametrize("name", ["accelerate_loop", "schedules"])
def test_an_example_whose_optimizer_does_nothing_is_found(name, capsys, monkeypatch):
    for cls in (AdamP, SGDP):
        for path in ("_step_plain", "_step_fused"):
            monkeypatch.setattr(cls, path, lambda *_, **__: None)
    assert run_example(name, capsys) < 0.5


# --- Hugging Face transformers --------------------------------------------------------------------------------------


class Noise(torch.utils.data.Dataset):
    """Random inputs and labels."""

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return {"x": torch.randn(8, generator=torch.Generator().manual_seed(i)), "labels": torch.tensor(i % 3)}


class Classifier(torch.nn.Module):
    """A model as the Trainer wants it, with dropout, whose masks a resumed run must draw again."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 3)

    def forward(self, x, labels):
        logits = self.head(torch.nn.functional.dropout(self.norm(self.body(x)).relu(), training=self.training))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(folder, algorithm, epochs, make=None):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    model = Classifier()
    given = {"optimizers": (make(model), None)} if make else {"optimizer_cls_and_kwargs": CLASSES[algorithm]}
    return Trainer(model, arguments, train_dataset=Noise(), **given)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")
@both
def test_the_trainer_resumes_bit_for_bit(algorithm, tmp_path):
    whole = trainer(tmp_path / "whole", algorithm, 2)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, CLASSES[algorithm][0])
    decays = [group["weight_decay"] for group in whole.optimizer.param_groups]
    assert decays == [0.1, 0.0]
    assert all(p.ndim <= 1 for p in whole.optimizer.param_groups[1]["params"]), "biases and norms do not decay"
    half = trainer(tmp_path / "half", algorithm, 2)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    torch.testing.assert_close(weights(half.model), weights(whole.model), rtol=0, atol=0)
    assert {int(state["step"]) for state in half.optimizer.state.values()} == {12}


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_takes_an_optimizer_with_layouts(tmp_path):
    def make(model):
        return AdamP(model.named_parameters(), lr=1e-2, layouts={"body.weight": Layout(1)})

    given = trainer(tmp_path, "adamp", 1, make=make)
    given.train()
    assert "Layout(channel=1)" in describe(given.optimizer.optimizer)
    (saved,) = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [x for x in saved["layouts"] if x] == [Layout(1).to_dict()]


# --- Lightning ------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """A regression, whose optimizer Lightning steps, or the module by hand."""

    def __init__(self, algorithm, manual=False):
        super().__init__()
        self.algorithm, self.automatic_optimization = algorithm, not manual
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

    def training_step(self, batch, index):
        x, y = batch
        loss = (self.network(x) - y).pow(2).mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        cls, options = CLASSES[self.algorithm]
        optimizer = cls(self.named_parameters(), weight_decay=0.1, **options)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def numbers():
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((32, 4), (32, 1)))
    return DataLoader(TensorDataset(x, y), 8)


def fit(module, epochs, folder, ckpt_path=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    made = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, **quiet, **options)
    made.fit(module, numbers(), ckpt_path=ckpt_path)
    return made


@pytest.mark.filterwarnings("ignore")
@both
def test_lightning_resumes_bit_for_bit(algorithm, tmp_path):
    whole, half, rest = (Module(algorithm) for _ in range(3))
    fit(whole, 4, tmp_path)
    fit(half, 2, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    made = fit(rest, 4, tmp_path, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(weights(rest), weights(whole), rtol=0, atol=0)
    (optimizer,) = made.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {16}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, {"manual": True}],
    ids=str,
)
@both
def test_lightning_clips_accumulates_and_casts(algorithm, options, tmp_path):
    options = dict(options)
    module = Module(algorithm, manual=options.pop("manual", False))
    before = weights(module)
    (optimizer,) = fit(module, 1, tmp_path, enable_checkpointing=False, **options).optimizers
    taken = 2 if "accumulate_grad_batches" in options else 4
    assert {int(state["step"]) for state in optimizer.state.values()} == {taken}
    assert not any(torch.equal(p, before[name]) for name, p in weights(module).items())
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.skipif(fused_kernels("cpu") is None, reason="no kernels for the CPU: numba is missing")
@both
def test_lightning_does_not_clip_what_the_fused_path_unscales(algorithm):
    cls, options = CLASSES[algorithm]
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    for fused in (None, True):
        optimizer = cls([torch.nn.Parameter(torch.ones(3, 2))], fused=fused, **options)
        with pytest.raises(RuntimeError, match="unscaling") if fused else contextlib.nullcontext():
            precision.clip_gradients(optimizer, 1.0)


# --- Accelerate -----------------------------------------------------------------------------------------------------


@both
def test_accelerate_saves_loads_and_keeps_layouts(algorithm, tmp_path):
    def prepared():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        cls, options = CLASSES[algorithm]
        optimizer = cls(model.named_parameters(), weight_decay=0.1, layouts={"0.weight": Layout(1)}, **options)
        return accelerator.prepare(model, optimizer)

    def run(model, optimizer, epochs):
        for _ in range(epochs):
            for x, y in numbers():
                optimizer.zero_grad()
                accelerator.backward((model(x) - y).pow(2).mean())
                optimizer.step()

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    whole = prepared()
    assert isinstance(whole[1], AcceleratedOptimizer)
    run(*whole, 2)
    accelerator.save_state(str(tmp_path))
    run(*whole, 2)
    accelerator.free_memory()
    rest = prepared()
    accelerator.load_state(str(tmp_path))
    run(*rest, 2)
    torch.testing.assert_close(weights(rest[0]), weights(whole[0]), rtol=0, atol=0)
    assert "Layout(channel=1)" in describe(rest[1].optimizer)


@pytest.mark.parametrize("path", [{}, {"foreach": True}], ids=str)
@both
def test_accelerate_sees_a_step_that_was_left_out(algorithm, path):
    Accelerator(cpu=True)  # makes the state that its optimizers share
    cls, options = CLASSES[algorithm]
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = AcceleratedOptimizer(cls([p], **options, **path), scaler=torch.amp.GradScaler("cpu"))
    for bad in (True, False):
        p.grad = torch.full_like(p, torch.inf if bad else 1.0)
        optimizer.scaler.scale(torch.ones(()))
        optimizer.step()
        assert optimizer.step_was_skipped == bad
    assert int(optimizer.state[p]["step"]) == 1


# --- timm -----------------------------------------------------------------------------------------------------------


def registered(timm):
    """The factory, with ours beside timm's own."""
    registry = importlib.import_module("timm.optim._optim_factory").default_registry
    registry.register(timm.OptimInfo("adamp-parity", AdamP, has_betas=True))
    registry.register(timm.OptimInfo("sgdp-parity", SGDP, has_eps=True, has_momentum=True, defaults={"nesterov": True}))
    return timm.create_optimizer_v2


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    )


def step(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize(("name", "cls"), [("adamp-parity", AdamP), ("sgdp-parity", SGDP)])
def test_timm_makes_ours_by_name(name, cls, timm):
    create, model = registered(timm), network()
    optimizer = create(model, name, lr=0.1, weight_decay=0.05, foreach=True, wd_ratio=0.5)
    assert type(optimizer) is cls
    by_decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert by_decay == {0.05: [4, 2], 0.0: [1, 1, 1, 1]}
    for group in optimizer.param_groups:
        assert (group["lr"], group["foreach"], group["wd_ratio"]) == (0.1, True, 0.5)
        assert cls is AdamP or (group["momentum"], group["nesterov"]) == (0.9, True)
    step(model, optimizer)


def test_timm_and_ours_take_the_same_steps(timm):
    """With the settings of timm's factory, ours is timm's "adamp"."""
    create, ours, theirs = registered(timm), network().double(), network().double()
    options = {"lr": 0.1, "weight_decay": 0.05}
    a = create(ours, "adamp-parity", nesterov=True, wd_ratio=0.01, **options)
    b = create(theirs, "adamp", **options)
    for t in range(5):
        step(ours, a, t)
        step(theirs, b, t)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-12, atol=1e-14)


@both
def test_timm_looks_ahead_and_schedules(algorithm, timm):
    model = network()
    optimizer = registered(timm)(model, f"lookahead_{algorithm}-parity", lr=0.1)
    schedule = importlib.import_module("timm.scheduler").CosineLRScheduler(
        optimizer, 10, warmup_t=2, warmup_lr_init=0.01
    )
    before, rates = copy.deepcopy(model.state_dict()), []
    for t in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer, t)
        schedule.step(t + 1)
    assert rates[:2] == pytest.approx([0.01, 0.055])
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in model.named_parameters())
