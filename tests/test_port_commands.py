"""`adamp-parity map` and `port`: every format to every framework and back, and what is refused."""

import filecmp
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import equinox as eqx
import haiku as hk
import jax
import keras
import numpy as np
import optax
import orbax.checkpoint
import pytest
import torch
from click.testing import CliRunner
from flax import linen, nnx, serialization
from rich.console import Console
from safetensors.numpy import load_file

import adamp_jax
import adamp_tf
import adamp_torch
from adamp_conformance import cli
from adamp_conformance.cli import main
from adamp_conformance.port.maps import Map, Pair, convert_snapshot
from adamp_conformance.port.trainings import CheckpointError, OptaxTraining, training_of
from adamp_spec import AdamPHyper, Layout, SGDPHyper, snapshot

HYPER = AdamPHyper(lr=0.0625, weight_decay=0.1, nesterov=True)  # a rate that float32 has, which Keras keeps it in
IMAGES = np.random.default_rng(0).standard_normal((8, 4, 4, 3), np.float32)


# ------------------------------------------------------------------------------------------------ setup functions


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.norm = torch.nn.BatchNorm2d(5, eps=1e-3)
        self.head = torch.nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def in_torch():
    torch.manual_seed(1)
    model = TorchNet()
    return model, adamp_torch.AdamP(model.parameters(), lr=HYPER.lr, weight_decay=0.1, nesterov=True)


def in_keras():
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(5, 3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    model.compile(adamp_tf.AdamP(HYPER.lr, weight_decay=0.1, nesterov=True), "mse")
    return model


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(5, (3, 3), padding="VALID", name="conv")(x)
        x = linen.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(x)
        return linen.Dense(2, name="head")(x.mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 5, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(5, use_running_average=True, epsilon=1e-3, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.conv(x)).mean((1, 2)))


def optax_training(model, params, others, inputs=()):
    tx = adamp_jax.adamp(HYPER.lr, weight_decay=0.1, nesterov=True)
    return OptaxTraining(model, params, tx.init(params), HYPER, inputs, others=others)


def in_linen():
    model = LinenNet()
    variables = model.init(jax.random.key(0), IMAGES)
    return optax_training(model, variables["params"], {"batch_stats": variables["batch_stats"]}, (IMAGES,))


def in_nnx():
    model = NnxNet(nnx.Rngs(0))
    return optax_training(model, nnx.state(model, nnx.Param), {"batch_stats": nnx.state(model, nnx.BatchStat)})


FORMATS = {  # file -> its setup function
    "torch.pt": in_torch,
    "keras.keras": in_keras,
    "linen.msgpack": in_linen,
    "nnx": in_nnx,
}


def predicted(training):
    if training.framework == "torch":
        with torch.no_grad():
            return training.model.eval()(torch.tensor(IMAGES).permute(0, 3, 1, 2)).numpy()
    if training.framework == "keras":
        return np.asarray(training.model(IMAGES, training=False))
    made = training.made
    if training.framework == "linen":
        return made.model.apply({"params": made.params, **made.others}, IMAGES)
    nnx.update(made.model, made.params, made.others["batch_stats"])
    return made.model(IMAGES)


# ------------------------------------------------------------------------------------------------ what tests share


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A checkpoint of each format after three steps, and its snapshot; statistics are what no fresh model has."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model, optimizer = in_torch()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor(IMAGES).permute(0, 3, 1, 2)).square().mean().backward()
        optimizer.step()
    training = training_of((model, optimizer))
    training.write(folder / "torch.pt")
    training.save_snapshot(folder / "torch.pt.safetensors")
    for name in ("keras.keras", "linen.msgpack", "nnx"):
        done = port(folder / "torch.pt", folder / name)
        assert done.exit_code == 0, done.output
        training = training_of(FORMATS[name]())
        training.read(folder / name)
        training.save_snapshot(folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def target(tmp_path):
    """A file that must stay what it is."""
    folder = tmp_path / "target"
    folder.mkdir()
    path = folder / "target.keras"
    path.write_text("what was there")
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(x) for x in arguments])


def setup_of(path):
    return f"{__name__}:{FORMATS[Path(path).name].__name__}"


def port(source, target, *more):
    return run("port", source, target, "--from", setup_of(source), "--to", setup_of(target), *more)


def refused(result, message, target=None):
    """Whether the command refused with a message, and left its target alone."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert message in result.output
    if target is not None:
        assert [x.name for x in target.parent.iterdir()] == [target.name]
        assert target.read_text() == "what was there"


def to_keras(source, target, *more, made=in_torch):
    made = f"{__name__}:{made.__name__}"
    return run("port", source, target, "--from", made, "--to", f"{__name__}:in_keras", "--force", *more)


def edited(source, target, edit):
    """A snapshot with another header."""
    data = source.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return target


# ------------------------------------------------------------------------------------------------ carried over


@pytest.mark.parametrize(("here", "there"), list(permutations(FORMATS, 2)))
def test_every_format_goes_over_and_back(here, there, checkpoints, tmp_path):
    assert port(checkpoints / here, tmp_path / there).exit_code == 0
    source, target = training_of(FORMATS[here]()), training_of(FORMATS[there]())
    source.read(checkpoints / here)
    target.read(tmp_path / there)
    np.testing.assert_allclose(predicted(target), predicted(source), rtol=1e-5, atol=1e-6)

    (tmp_path / "back").mkdir()
    assert port(tmp_path / there, tmp_path / "back" / here).exit_code == 0
    back = training_of(FORMATS[here]())
    back.read(tmp_path / "back" / here)
    back.save_snapshot(tmp_path / "back.safetensors")
    assert filecmp.cmp(tmp_path / "back.safetensors", checkpoints / f"{here}.safetensors", shallow=False)


def test_moments_go_where_their_parameters_go(checkpoints, tmp_path):
    assert port(checkpoints / "torch.pt", tmp_path / "keras.keras").exit_code == 0
    training = training_of(in_keras())
    training.read(tmp_path / "keras.keras")
    state = torch.load(checkpoints / "torch.pt")["optimizer"]["state"][0]  # of the convolution's kernel
    optimizer = training.model.optimizer
    for slots, name in ((optimizer._momentums, "exp_avg"), (optimizer._velocities, "exp_avg_sq")):
        assert np.any(slots[0])
        np.testing.assert_array_equal(slots[0], state[name].permute(2, 3, 1, 0))
    assert int(optimizer.iterations) == 3


def test_snapshots_and_a_map_need_no_setup_functions(checkpoints, tmp_path):
    written = run("map", f"{__name__}:in_torch", f"{__name__}:in_keras", "-o", tmp_path / "map.toml")
    assert written.exit_code == 0
    assert "conv.weight (5, 3, 3, 3)" in written.output
    assert "conv/kernel (3, 3, 3, 5)" in written.output
    source, there, back = checkpoints / "torch.pt.safetensors", tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run("port", source, there, "--map", tmp_path / "map.toml").exit_code == 0
    wanted = load_file(checkpoints / "keras.keras.safetensors")
    assert {x: y.tobytes() for x, y in load_file(there).items()} == {x: y.tobytes() for x, y in wanted.items()}
    convert_snapshot(source, back, Map.read(tmp_path / "map.toml"))
    assert filecmp.cmp(back, there, shallow=False)
    assert run("port", there, back, "--map", tmp_path / "map.toml", "--force").exit_code == 0  # the way back
    assert {x: y.tobytes() for x, y in load_file(back).items()} == {
        x: y.tobytes() for x, y in load_file(source).items()
    }
    done = run("port", there, tmp_path / "torch.pt", "--map", tmp_path / "map.toml", "--to", f"{__name__}:in_torch")
    assert done.exit_code == 0
    training = training_of(in_torch())
    training.read(tmp_path / "torch.pt")
    training.write(back)
    assert filecmp.cmp(back, source, shallow=False)
    training = training_of(in_torch())
    training.read(back)
    training.write(tmp_path / "c.safetensors")
    assert filecmp.cmp(tmp_path / "c.safetensors", source, shallow=False)


def test_a_dry_run_shows_all_and_writes_nothing(checkpoints, target):
    shown = to_keras(checkpoints / "torch.pt", target, "--dry-run")
    assert shown.exit_code == 0
    line = next(x for x in shown.output.splitlines() if "conv.weight" in x)
    assert [x.strip() for x in line.strip("│").split("│")] == [
        "conv.weight (5, 3, 3, 3)",
        "conv",
        "conv/kernel (3, 3, 3, 5)",
        "F32 F32 F32",
        "Layout(channel=3)",
        "3",
    ]
    assert "norm/moving_variance (5,)" in shown.output
    assert [x.name for x in target.parent.iterdir()] == [target.name]
    assert target.read_text() == "what was there"


def test_a_terminal_shows_how_much_is_carried_over(checkpoints, tmp_path, monkeypatch):
    terminal = Console(force_terminal=True, width=200, file=io.StringIO())
    monkeypatch.setattr(cli, "console", terminal)
    assert port(checkpoints / "torch.pt", tmp_path / "keras.keras").exit_code == 0
    shown = re.findall(
        r"carrying over .*?([\d.]+)/([\d.]+) (\w+)", re.sub(r"\x1b\[[\d;?]*\w", "", terminal.file.getvalue())
    )
    done, total, unit = shown[-1]
    assert done == total
    size = sum(x.nbytes for x in load_file(checkpoints / "keras.keras.safetensors").values())
    assert (float(total), unit) == (round(size / 1000, 1), "kB")


def test_a_checkpoint_is_replaced_with_force_only(checkpoints, tmp_path):
    for name in ("keras.keras", "nnx"):
        shutil.copytree(checkpoints, tmp_path / name)
        stays = tmp_path / name / name
        refused(port(checkpoints / "torch.pt", stays), "is there already; --force replaces it")
        before = sorted(stays.parent.iterdir())
        assert port(checkpoints / "torch.pt", stays, "--force").exit_code == 0
        assert sorted(stays.parent.iterdir()) == before  # nothing is left beside it
    (tmp_path / "other" / "nnx").mkdir(parents=True)
    (tmp_path / "other" / "nnx" / "precious").write_text("what was there")
    refused(port(checkpoints / "torch.pt", tmp_path / "other" / "nnx", "--force"), "no checkpoint of Orbax")
    assert (tmp_path / "other" / "nnx" / "precious").exists()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda model, optimizer: {"epoch": 3, "net": {"state_dict": model}, "optim": optimizer},
        lambda model, optimizer: {
            "state_dict": {f"model.{name}": x for name, x in model.items()},
            "optimizer_states": [optimizer],
            "lr_schedulers": [{"last_epoch": 3}],
        },  # as Lightning has it
    ],
)
def test_torch_checkpoints_are_known_by_their_structure(wrapped, checkpoints, tmp_path):
    saved = torch.load(checkpoints / "torch.pt")
    torch.save(wrapped(saved["model"], saved["optimizer"]), tmp_path / "x.ckpt")
    training = training_of(in_torch())
    training.read(tmp_path / "x.ckpt")
    training.save_snapshot(tmp_path / "x.safetensors")
    assert filecmp.cmp(tmp_path / "x.safetensors", checkpoints / "torch.pt.safetensors", shallow=False)


def test_flax_reads_what_is_written_and_the_other_way_round(checkpoints, tmp_path):
    made = in_linen()
    trees = {"params": made.params, "opt_state": made.opt_state, **made.others}
    trees = serialization.from_bytes(trees, (checkpoints / "linen.msgpack").read_bytes())
    (tmp_path / "x.msgpack").write_bytes(serialization.to_bytes({"step": 3, **trees}))
    training = training_of(made)
    training.read(tmp_path / "x.msgpack")
    training.save_snapshot(tmp_path / "x.safetensors")
    assert filecmp.cmp(tmp_path / "x.safetensors", checkpoints / "linen.msgpack.safetensors", shallow=False)


def in_equinox():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    return optax_training(model, eqx.filter(model, eqx.is_array), None)


def in_haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
    return optax_training(model, model.init(jax.random.key(0), IMAGES[0, 0]), None, (IMAGES[0, 0],))


@pytest.mark.parametrize("name", ["x.msgpack", "x"])
@pytest.mark.parametrize("setup", [in_linen, in_nnx, in_equinox, in_haiku])
def test_checkpoints_of_every_library_of_jax_come_back(setup, name, tmp_path):
    made = setup()
    numbers = iter(range(1000))
    others = made.others and jax.tree.map(lambda x: x + next(numbers), made.others)
    params, state = jax.tree.map(lambda x: x + next(numbers), (made.params, made.opt_state))
    training = training_of(made._replace(params=params, opt_state=state, others=others))
    training.write(tmp_path / name)
    training.write(tmp_path / name)  # in place of what is there
    training.save_snapshot(tmp_path / "before.safetensors")
    back = training_of(made)
    back.read(tmp_path / name)
    back.save_snapshot(tmp_path / "after.safetensors")
    assert filecmp.cmp(tmp_path / "after.safetensors", tmp_path / "before.safetensors", shallow=False)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["after.safetensors", "before.safetensors", name]


def test_a_step_of_a_checkpoint_manager_is_read(tmp_path, checkpoints):
    made = training_of(in_nnx())
    made.read(checkpoints / "nnx")
    with orbax.checkpoint.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            manager.save(step, args=orbax.checkpoint.args.StandardSave(made._trees()), metrics={"loss": 0.5})
    for folder in ("run/9", "run/10/default"):
        training = training_of(in_nnx())
        training.read(tmp_path / folder)
        training.save_snapshot(tmp_path / "x.safetensors")
        assert filecmp.cmp(tmp_path / "x.safetensors", checkpoints / "nnx.safetensors", shallow=False)
    with pytest.raises(CheckpointError, match=r"give one of the folders in it that are: 10; 9$"):
        training_of(in_nnx()).read(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"it has no _METADATA, and so is no checkpoint of Orbax$"):
        training_of(in_nnx()).read(tmp_path / "empty")


RATES = optax.exponential_decay(0.5, 1, 0.5)


def linen_scheduled():
    tx = adamp_jax.adamp(RATES, weight_decay=0.1, nesterov=True)
    made = in_linen()
    return made._replace(opt_state=tx.init(made.params), hyperparameters=replace(HYPER, lr=0.5))


def test_a_schedule_gives_the_learning_rate_of_a_snapshot(checkpoints, tmp_path):
    def rate():
        with snapshot.opened(tmp_path / "x.safetensors") as (header, _):
            return header.groups[0].lr

    source = checkpoints / "linen.msgpack.safetensors"
    training = training_of(linen_scheduled()._replace(schedule=RATES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.load_snapshot(source)
        training.save_snapshot(tmp_path / "x.safetensors")
    assert rate() == RATES(3) == 0.0625
    training.made = training.made._replace(schedule=lambda step: 0.1 * 0.5**step)
    training.save_snapshot(tmp_path / "x.safetensors")
    assert rate() == 0.1 * 0.5**3

    training = training_of(linen_scheduled())
    with pytest.warns(UserWarning, match=r"keeps its own, 0\.5: make it with the snapshot's"):
        training.load_snapshot(edited(source, tmp_path / "x.safetensors", with_rate))
    with pytest.warns(UserWarning, match=r"has a schedule, and the learning rate that is written is 0\.25, that of"):
        training.save_snapshot(tmp_path / "x.safetensors")
    assert rate() == 0.25


def with_rate(file):
    of_header(file, lambda header: header["groups"][0].update(lr=0.25))


def test_warnings_of_our_own_are_notes(checkpoints, tmp_path, monkeypatch):
    def serialized(tree, original=serialization.msgpack_serialize):
        warnings.warn("of another library", stacklevel=1)
        return original(tree)

    monkeypatch.setattr(serialization, "msgpack_serialize", serialized)
    source = edited(checkpoints / "torch.pt.safetensors", tmp_path / "x.safetensors", with_rate)
    setups = ("--from", f"{__name__}:in_torch", "--to", f"{__name__}:in_linen")
    with pytest.warns(UserWarning, match="of another library") as others:
        done = run("port", source, tmp_path / "x.msgpack", *setups)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("note: the snapshot's learning rate is 0.25, and a transformation keeps its own")
    assert [str(x.message) for x in others] == ["of another library"]


def test_what_no_terminal_shows_is_not_folded():
    code = "from rich.table import Table; from adamp_conformance.cli import console; console.print(Table('name' * 50))"
    environment = {name: x for name, x in os.environ.items() if name != "COLUMNS"}
    for given, width in ((environment, 204), (environment | {"COLUMNS": "100"}, 100)):
        shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=given)
        assert {len(line) for line in shown.stdout.splitlines()} == {width}


def test_no_framework_is_imported_before_it_is_needed():
    known = {"torch", "keras", "tensorflow", "jax", "flax", "orbax"}
    code = f"import sys, adamp_conformance.cli; print({known} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


# ------------------------------------------------------------------------------------------------ refused


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(zipped, checkpoints, target, tmp_path):
    saved = torch.load(checkpoints / "torch.pt")
    torch.save(
        {**saved, "extra": Malicious(tmp_path / "ran")}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped
    )
    refused(to_keras(tmp_path / "x.pt", target), "would run code from the file, and none was run", target)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("name", ["torch.pt", "keras.keras", "linen.msgpack", "torch.pt.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(name, kept, checkpoints, target, tmp_path):
    data = (checkpoints / name).read_bytes()
    path = tmp_path / f"x{Path(name).suffix}"
    path.write_bytes(data[: int(len(data) * kept)])
    made = in_torch if name == "torch.pt.safetensors" else FORMATS[name]
    # what comes from Keras is to go to another framework
    framework = f"{__name__}:{'in_linen' if made is in_keras else 'in_keras'}"
    if made is in_keras:
        target = target.rename(target.with_suffix(".msgpack"))
    result = run("port", path, target, "--from", f"{__name__}:{made.__name__}", "--to", framework, "--force")
    refused(result, "damaged", target)


def test_a_folder_that_lacks_a_file_is_refused(checkpoints, target, tmp_path):
    for lost in ("_METADATA", "manifest.ocdbt"):
        shutil.copytree(checkpoints / "nnx", tmp_path / lost)
        for path in tmp_path.joinpath(lost).rglob(lost):
            path.unlink()
        refused(to_keras(tmp_path / lost, target, made=in_nnx), "damaged", target)


def test_a_missing_parameter_is_refused(checkpoints, target, tmp_path):
    saved = torch.load(checkpoints / "torch.pt")
    del saved["model"]["head.bias"]
    torch.save(saved, tmp_path / "x.pt")
    refused(to_keras(tmp_path / "x.pt", target), "it lacks ['head.bias']", target)

    tree = serialization.msgpack_restore((checkpoints / "linen.msgpack").read_bytes())
    del tree["opt_state"]["0"]["mu"]["head"]["bias"]
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    refused(to_keras(tmp_path / "x.msgpack", target, made=in_linen), "lacks 'opt_state/0/mu/head/bias'", target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("optimizer"), "must hold the states of an optimizer once, and holds them 0 times"),
        (lambda x: x.update(ema=x["model"]), "must hold the tensors of the model once, and holds them 2 times"),
        (lambda x: x["optimizer"]["param_groups"].pop(), "different number of parameter groups"),
        (lambda x: x["model"].update({"head.bias": torch.zeros(3)}), "size mismatch for head.bias"),
    ],
)
def test_a_torch_checkpoint_that_does_not_fit_is_refused(change, message, checkpoints, target, tmp_path):
    saved = torch.load(checkpoints / "torch.pt")
    change(saved)
    torch.save(saved, tmp_path / "x.pt")
    refused(to_keras(tmp_path / "x.pt", target), message, target)


def keras_otherwise():
    model = in_keras()
    model.compile(adamp_tf.AdamP(HYPER.lr, weight_decay=0.2, nesterov=True), "mse")
    return model


def keras_as_sgdp():
    model = in_keras()
    model.compile(adamp_tf.SGDP(HYPER.lr, weight_decay=0.1), "mse")
    return model


def optax_otherwise():
    made = in_linen()
    return made._replace(hyperparameters=AdamPHyper(lr=HYPER.lr, weight_decay=0.1))  # no nesterov


def test_another_optimizer_is_refused(checkpoints, target, tmp_path):
    def to(made, name="torch.pt", source=in_torch, into=target):
        made, source = (f"{__name__}:{x.__name__}" for x in (made, source))
        return run("port", checkpoints / name, into, "--from", source, "--to", made, "--force")

    refused(to(keras_otherwise), "{'weight_decay': 0.1}: compile the model with these", target)
    refused(to(keras_as_sgdp), "the snapshot is of adamp, the optimizer is sgdp", target)
    target = target.rename(target.with_suffix(".msgpack"))
    refused(to(optax_otherwise, into=target), "{'nesterov': True}: make the transformation with these", target)
    for made in (keras_otherwise, keras_as_sgdp):  # the checkpoint's own framework
        refused(to(in_linen, "keras.keras", made, target), "compile the model of the setup function with these", target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.replace("head/*", "norm/*").replace("batch_norm", "dense"), "cannot have shape (5,)"),
        (lambda x: x.replace('source = "head.*"', 'source = "conv.*"'), "another pair took"),
        (lambda x: x.replace('"head/*"', '"conv/*"'), "is made by another pair"),
        (lambda x: x.replace('row = "dense"', 'row = "turned"') + TURNED, "the shape (2, 5)"),
        (lambda x: x.replace('row = "dense"', 'row = "no_row"'), "there is no row 'no_row'"),
        (lambda x: x.replace('target = "keras"', 'target = "linen"'), "the map is of torch and linen"),
        (lambda x: x.replace("head.*", "tail.*"), "tail.*"),
        (lambda x: x.replace("head/*", "tail/*"), "leaves out ['head/bias', 'head/kernel'] of the target"),
        (lambda x: x + "[", "map.toml"),
    ],
)
def test_a_wrong_map_is_refused(change, message, checkpoints, target, tmp_path):
    assert run("map", f"{__name__}:in_torch", f"{__name__}:in_keras", "-o", tmp_path / "map.toml").exit_code == 0
    text = (tmp_path / "map.toml").read_text()
    (tmp_path / "map.toml").write_text(change(text))
    refused(to_keras(checkpoints / "torch.pt", target, "--map", tmp_path / "map.toml"), message, target)


TURNED = """
[rows.turned]
title = "a dense layer that keeps PyTorch's axes"
[rows.turned.torch]
layer = "Linear"
weight = "OUT in"
bias = "out"
[rows.turned.keras]
layer = "Dense"
kernel = "weight: OUT in"
bias = "bias: out"
"""


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: x.update({"conv.weight": x.pop("parameter/conv.weight")}), "lacks ['parameter/conv.weight']"),
        (lambda x: x["parameter/conv.weight"].update(shape=[5, 3, 9]), "has shape"),
        (lambda x: x["parameter/conv.weight"].update(data_offsets=[0, 4]), "damaged"),
        (lambda x: x["__metadata__"].update({"adamp-parity": "{}"}), "header is not as SNAPSHOT.md has it"),
        (lambda x: x.update(__metadata__={}), "but no snapshot"),
        (lambda x: of_header(x, lambda header: header.update(spec="99.0")), "pip install --upgrade adamp-parity"),
        (lambda x: of_header(x, lambda header: header.update(format=2)), "pip install --upgrade adamp-parity"),
        (lambda x: of_header(x, lambda header: header["parameters"].pop("head.bias")), "head.bias"),
        (lambda x: of_header(x, lambda header: header["groups"][0].update(lr=-1)), "lr"),
        (
            lambda x: of_header(x, lambda header: header["parameters"]["conv.weight"]["layout"].update(channel=[1])),
            "weight decides by Layout(channel=1)",
        ),
    ],
)
def test_a_lying_header_is_refused(edit, message, checkpoints, target, tmp_path):
    path = edited(checkpoints / "torch.pt.safetensors", tmp_path / "x.safetensors", edit)
    refused(to_keras(path, target), message, target)


def of_header(file, edit):
    header = json.loads(file["__metadata__"]["adamp-parity"])
    edit(header)
    file["__metadata__"]["adamp-parity"] = json.dumps(header)


def square_in_torch():
    model = torch.nn.Linear(5, 5)
    return model, adamp_torch.AdamP(model.parameters(), lr=HYPER.lr)


def square_in_keras():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(5, name="dense")(inputs))
    model.compile(adamp_tf.AdamP(HYPER.lr), "mse")
    return model


def test_axes_that_are_confused_are_refused_though_their_sizes_fit(target, tmp_path):
    training_of(square_in_torch()).write(tmp_path / "x.pt")
    (tmp_path / "map.toml").write_text(
        """
        source = "torch"
        target = "keras"
        layer = [{ row = "turned", source = "*", target = "dense/*" }]
        """
        + TURNED
    )
    made = ("--from", f"{__name__}:square_in_torch", "--to", f"{__name__}:square_in_keras")
    for more in ("--force", "--dry-run"):
        result = run("port", tmp_path / "x.pt", target, *made, "--map", tmp_path / "map.toml", more)
        refused(result, "another optimizer", target)
        assert "'dense/kernel'" in result.output


def test_models_that_do_not_fit_are_refused_and_listed(checkpoints, target, tmp_path):
    models = f"{__name__}:in_torch", f"{__name__}:keras_with_more"
    shown = run("map", *models, "-o", tmp_path / "map.toml")
    assert shown.exit_code == 1
    assert "unmatched: target layer 'more' (Dense: more/kernel, more/bias)" in shown.output
    assert "\n# unmatched: target layer 'more'" in (tmp_path / "map.toml").read_text()
    assert len(Map.read(tmp_path / "map.toml").pairs) == 3
    refused(run("map", *models, "-o", tmp_path / "map.toml"), "is there already")
    made = ("--from", models[0], "--to", models[1], "--force")
    result = run("port", checkpoints / "torch.pt", target, *made)
    refused(result, "0 layers are matched by order alone, 1 not at all", target)
    assert "target layer 'more'" in result.output
    assert "conv/kernel" not in result.output  # nothing of what is matched


def test_what_order_alone_tells_must_be_checked_before(tmp_path, target):
    source = tmp_path / "torch.pt"
    training_of(torch_twins()).write(source)
    made = ("--from", f"{__name__}:torch_twins", "--to", f"{__name__}:keras_twins", "--force")
    result = run("port", source, target, *made)
    refused(result, "2 layers are matched by order alone", target)
    assert "one/kernel (4, 4)" in result.output
    assert "norm" not in result.output  # which its name tells
    shown = run("map", f"{__name__}:torch_twins", f"{__name__}:keras_twins", "-o", tmp_path / "map.toml")
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("by order ") == 3  # two rows, and what is to be done about them
    assert "2 layers are matched by order alone: check them, and then delete" in shown.output
    with_map = ("port", source, target, *made, "--map", tmp_path / "map.toml")
    message = (
        f"dense from 0.* to twins/one/*; dense from 1.* to twins/other/*; check them, and then delete their {NOTE} from"
    )
    refused(run(*with_map), message, target)
    text = (tmp_path / "map.toml").read_text()
    (tmp_path / "map.toml").write_text(text.replace(f"\n{NOTE}", ""))
    done = run(*with_map)
    assert done.exit_code == 0, done.output


NOTE = 'note = "by order"'


def test_many_layers_that_nobody_checked_are_counted(checkpoints, tmp_path):
    pairs = [Pair("same", (f"{i}",), (f"{i}",), note="by order" if i else "") for i in range(6)]
    Map("torch", "keras", tuple(pairs)).write(tmp_path / "map.toml")
    source, target = checkpoints / "torch.pt.safetensors", tmp_path / "x.safetensors"
    result = run("port", source, target, "--map", tmp_path / "map.toml")
    refused(result, "5 layers are matched by order alone: same from 1 to 1; same from 2")
    assert "; same from 3 to 3; and 2 more; check them" in result.output
    Map("torch", "keras", (pairs[1],)).write(tmp_path / "map.toml")
    refused(run("port", source, target, "--map", tmp_path / "map.toml"), "1 layer is matched by order alone")


def torch_twins():
    layers = {"0": torch.nn.Linear(4, 4), "1": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)}
    model = torch.nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model, adamp_torch.AdamP(model.parameters())


def keras_twins():
    twins = [keras.layers.Dense(4, name=name) for name in ("one", "other")]
    model = keras.Sequential([keras.Input((4,)), *twins, keras.layers.LayerNormalization(name="norm")], name="twins")
    model.compile(adamp_tf.AdamP(), "mse")
    return model


def keras_with_more():
    made = in_keras()
    model = keras.Model(made.input, keras.layers.Dense(7, name="more")(made.output))
    model.compile(adamp_tf.AdamP(HYPER.lr, weight_decay=0.1, nesterov=True), "mse")
    return model


def broken_setup():
    raise RuntimeError("no data here")


def not_a_training():
    return 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.pt", "y.keras"], "--from is needed"),
        (["x.safetensors", "y.safetensors"], "--from is needed"),
        (["x.pt", "y.keras", "--from", f"{__name__}:in_torch"], "--to is needed"),
        (["x.pt", "y.keras", "--from", f"{__name__}:broken_setup"], "RuntimeError: no data here"),
        (["x.pt", "y.keras", "--from", f"{__name__}:not_a_training"], "it must return (model, optimizer)"),
        (["x.pt", "y.keras", "--from", "no_such_module:setup"], "No module named 'no_such_module'"),
        (["z.pt", "y.keras"], "does not exist"),
    ],
)
def test_usage(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).touch()
    result = run("port", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_file_of_another_framework_is_refused(checkpoints, target):
    refused(to_keras(checkpoints / "linen.msgpack", target), "is no checkpoint of torch", target)
    target = target.rename(target.with_suffix(".h5"))
    refused(to_keras(checkpoints / "torch.pt", target), "is no checkpoint of keras", target)
    with pytest.raises(CheckpointError, match="any framework has snapshots"):
        training_of(in_nnx()).read(checkpoints / "torch.pt")


@pytest.mark.parametrize(("module", "name"), [("flax", "linen.msgpack"), ("orbax.checkpoint", "nnx")])
def test_a_library_that_is_missing_is_named(module, name, checkpoints, target, monkeypatch):
    made = FORMATS[name]
    monkeypatch.setitem(sys.modules, module, None)
    if module == "flax":  # and with it the setup function that needs it
        with pytest.raises(ModuleNotFoundError, match="pip install flax"):
            training_of(in_equinox()).read(checkpoints / name)
    else:
        refused(to_keras(checkpoints / name, target, made=made), "pip install orbax-checkpoint", target)


def test_a_checkpoint_that_holds_something_else_is_refused(checkpoints, tmp_path):
    def changed(change):
        tree = serialization.msgpack_restore((checkpoints / "linen.msgpack").read_bytes())
        change(tree)
        (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
        training_of(in_linen()).read(tmp_path / "x.msgpack")

    for change, message in (
        (lambda x: x["params"]["head"].update(extra=np.zeros(2)), r"it has \['params/head/extra'\]"),
        (lambda x: x["params"]["head"].update(bias=np.zeros(3, np.float32)), r"float32 \(3,\) in it, float32 \(2,\)"),
        (lambda x: x["params"]["head"].update(bias=np.zeros(2)), "float64"),
        (lambda x: x.pop("batch_stats"), r"it lacks \['batch_stats'\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            changed(change)


def torch_named(*order, dtype=torch.float32):
    """Two equal layers, whose parameters the optimizer has in an order; a step apart from zero."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).to(dtype)
    params = dict(model.named_parameters())
    optimizer = adamp_torch.AdamP(
        [(f"{i}.{name}", params[f"{i}.{name}"]) for i in order for name in ("weight", "bias")]
    )
    model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_torch_parameters_in_another_order_are_refused(tmp_path):
    training_of(torch_named(1, 0)).write(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"\['1.weight', '1.bias', '0.weight', '0.bias'\], in this order"):
        training_of(torch_named(0, 1)).read(tmp_path / "x.pt")
    model, optimizer = torch_named(1, 0)
    wrapped = torch.nn.DataParallel(model).state_dict()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [f"module.{name}" for name in group["param_names"]]
    torch.save({"model": wrapped, "optimizer": saved}, tmp_path / "x.pt")
    training = training_of(torch_named(1, 0))
    training.read(tmp_path / "x.pt")
    assert torch.equal(training.optimizer.state[training.model[0].weight]["exp_avg"], saved["state"][2]["exp_avg"])


def test_torch_dtypes_are_not_converted(tmp_path):
    training_of(torch_named(0, 1)).write(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"0\.weight is torch\.float32 in it, torch\.bfloat16 in the training"):
        training_of(torch_named(0, 1, dtype=torch.bfloat16)).read(tmp_path / "x.pt")
    model, optimizer = torch_named(0, 1, dtype=torch.bfloat16)
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].float()
    training_of((model, optimizer)).write(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"exp_avg_sq of parameter 0 is torch\.float32 in it, torch\.bfloat16"):
        training_of(torch_named(0, 1, dtype=torch.bfloat16)).read(tmp_path / "x.pt")


def keras_branches(*order, dtype="float32", rate=HYPER.lr, undecayed=(), trainable=True):
    """Two equal layers side by side, made and added in an order."""
    inputs = keras.Input((4,))
    outputs = [keras.layers.Dense(4, name=name, dtype=dtype, trainable=trainable)(inputs) for name in order]
    model = keras.Model(inputs, keras.layers.Dense(1, name="head", dtype=dtype)(keras.layers.Add()(outputs)))
    optimizer = adamp_tf.AdamP(rate, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=[*undecayed])
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    return model


def test_keras_dtypes_are_not_converted(tmp_path):
    for here, there in (("float32", "bfloat16"), ("bfloat16", "float32")):
        training_of(keras_branches("a", "b", dtype=here)).write(tmp_path / "x.keras")
        with pytest.raises(CheckpointError, match=f"is {here} in it, {there} in the training"):
            training_of(keras_branches("a", "b", dtype=there)).read(tmp_path / "x.keras")
        training_of(keras_branches("a", "b", dtype=here)).read(tmp_path / "x.keras")


@pytest.mark.parametrize("trainable", [True, False])
def test_keras_layers_in_another_order_are_refused(trainable, tmp_path):
    training_of(keras_branches("a", "b", trainable=trainable)).write(tmp_path / "x.keras")
    with pytest.raises(CheckpointError, match=r"its layers \['a', 'b'\] come in another order"):
        training_of(keras_branches("b", "a", trainable=trainable)).read(tmp_path / "x.keras")
    training_of(keras_branches("c", "d", trainable=trainable)).read(tmp_path / "x.keras")  # as names that Keras counts


def test_a_keras_setup_that_has_more_is_refused(tmp_path):
    training_of(keras_branches("a", "b")).write(tmp_path / "x.keras")
    with pytest.raises(CheckpointError, match="exclude_from_weight_decay"):
        training_of(keras_branches("a", "b", undecayed=["bias"])).read(tmp_path / "x.keras")
    scheduled, otherwise = (keras.optimizers.schedules.ExponentialDecay(x, 10, 0.5) for x in (0.1, 0.2))
    with pytest.raises(CheckpointError, match="learning_rate"):
        training_of(keras_branches("a", "b", rate=scheduled)).read(tmp_path / "x.keras")
    training_of(keras_branches("a", "b", rate=scheduled)).write(tmp_path / "x.keras")
    for rate in (0.1, otherwise):
        with pytest.raises(CheckpointError, match="learning_rate"):
            training_of(keras_branches("a", "b", rate=rate)).read(tmp_path / "x.keras")
    training_of(keras_branches("a", "b", rate=scheduled)).read(tmp_path / "x.keras")


def keras_counted(layouts):
    """A model whose layers Keras names, by how many there are already, and what `layouts` makes of it."""
    inputs = keras.Input((3,))
    x = keras.layers.Bidirectional(keras.layers.LSTM(2))(keras.layers.Embedding(7, 4)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(5)(x))
    model.compile(adamp_tf.AdamP(HYPER.lr, layouts=layouts(model)), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def test_keras_layouts_are_compared_by_what_they_do(tmp_path):
    fitting = {
        "layouts_for": adamp_tf.layouts_for,
        "rules": lambda model: None,
        "pattern": lambda model: {"embeddings$": Layout(0)},
    }
    for given in fitting.values():
        written = training_of(keras_counted(given))
        written.write(tmp_path / "x.keras")
        written.save_snapshot(tmp_path / "x.safetensors")
        for own in fitting.values():
            training = training_of(keras_counted(own))
            training.read(tmp_path / "x.keras")
            for ours, theirs in zip(training.model.get_weights(), written.model.get_weights(), strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_keras_layouts_that_do_something_else_are_refused(tmp_path):
    def turned(model):
        return {"embeddings$": Layout(-1)}

    def all_turned(model):
        return {"kernel$": Layout(0)}

    for given, own, message in (
        (
            adamp_tf.layouts_for,
            turned,
            r"'embedding_\d+/embeddings' by Layout\(channel=0\) and not by Layout\(channel=-1\)",
        ),
        (turned, lambda model: None, r"embeddings' by Layout\(channel=-1\) and not by Layout\(channel=0\)"),
        (adamp_tf.layouts_for, all_turned, r"lstm_cell/kernel' by .*; and 2 more"),
    ):
        training_of(keras_counted(given)).write(tmp_path / "x.keras")
        with pytest.raises(CheckpointError, match=f"{message}: compile .* layouts=layouts_for") as refusal:
            training_of(keras_counted(own)).read(tmp_path / "x.keras")
        assert len(str(refusal.value)) < 700


def test_keras_weights_without_a_state_are_refused(tmp_path):
    model = keras_counted(adamp_tf.layouts_for)
    model.compile(adamp_tf.AdamP(HYPER.lr, layouts=adamp_tf.layouts_for(model)), "mse")  # and nothing built
    model.save(tmp_path / "x.keras")
    with pytest.raises(CheckpointError, match="it belongs to another model or optimizer"):
        training_of(keras_counted(adamp_tf.layouts_for)).read(tmp_path / "x.keras")


def test_what_is_no_training_with_adamp_is_refused():
    model, optimizer = in_torch()
    plain = keras_branches("a", "b")
    uncompiled = keras.Model(plain.input, plain.output)
    plain.compile("adam", "mse")
    for made, message in (
        ((model, torch.optim.AdamW(model.parameters())), r"it returned \(TorchNet, AdamW\)"),
        ((optimizer, model), r"it returned \(AdamP, TorchNet\)"),
        (uncompiled, "whose optimizer is NoneType"),
        (plain, "whose optimizer is Adam$"),
        (keras.layers.Dense(3), "it returned Dense"),
    ):
        with pytest.raises(TypeError, match=message):
            training_of(made)


def optax_of_another():
    return in_linen()._replace(hyperparameters=SGDPHyper(lr=HYPER.lr))


def torch_partly_decayed():
    model, _ = in_torch()
    groups = [{"params": [x for x in model.parameters() if (x.ndim > 1) == decays]} for decays in (True, False)]
    groups[1]["weight_decay"] = 0.0
    return model, adamp_torch.AdamP(groups, lr=HYPER.lr, weight_decay=0.1, nesterov=True)


def linen_partly_decayed():
    return in_linen()._replace(weight_decay_mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))


def test_a_mask_that_an_optax_training_lacks_is_named(tmp_path):
    training_of(torch_partly_decayed()).write(tmp_path / "x.pt")
    arguments = (
        "port",
        tmp_path / "x.pt",
        tmp_path / "x.msgpack",
        "--from",
        f"{__name__}:torch_partly_decayed",
        "--to",
    )
    refused(
        run(*arguments, f"{__name__}:in_linen"),
        "if the transformation has such a mask, give it to the OptaxTraining, too, as weight_decay_mask",
    )
    done = run(*arguments, f"{__name__}:linen_partly_decayed")
    assert done.exit_code == 0, done.output


def linen_without_inputs():
    return in_linen()._replace(inputs=())


class NamedTwice(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="head")(x) + linen.Dense(2, name="head")(x)


def linen_named_twice():
    return in_linen()._replace(model=NamedTwice())


def test_an_optax_training_that_contradicts_itself_is_refused(checkpoints, target):
    target = target.rename(target.with_suffix(".msgpack"))
    for made, message in (
        (optax_of_another, "'algorithm': 'adamp'"),
        (linen_without_inputs, "the model cannot be called on `inputs`: TypeError"),
        (linen_named_twice, "the model cannot be called on `inputs`: NameInUseError"),
    ):
        setups = ("--from", f"{__name__}:in_torch", "--to", f"{__name__}:{made.__name__}")
        refused(run("port", checkpoints / "torch.pt", target, *setups, "--force"), message, target)


def test_a_snapshot_that_fits_both_sides_of_a_map_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    training_of(torch_twins()).save_snapshot(path)
    names = [f"{layer}.{name}" for layer in ("0", "1", "norm") for name in ("weight", "bias")]
    Map("torch", "linen", tuple(Pair("same", (name,), (name,)) for name in names)).write(tmp_path / "map.toml")
    arguments = ("port", path, tmp_path / "y.safetensors", "--map", tmp_path / "map.toml")
    refused(run(*arguments), "fits both sides of the map: give --from or --to")
    assert run(*arguments, "--from", f"{__name__}:torch_twins").exit_code == 0


def test_torch_that_cannot_write_is_refused(checkpoints, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", fails)
    path = tmp_path / "x.pt"
    refused(port(checkpoints / "keras.keras", path.with_name("torch.pt")), "PytorchStreamWriter failed")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_what_was_there(checkpoints, target, monkeypatch):
    def fails(self, path):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(keras.Model, "save", fails)
    refused(to_keras(checkpoints / "torch.pt", target), "no space left", target)


def test_the_page_does_what_it_says(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "porting.md").read_text()
    for code in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", page, re.DOTALL):
        (tmp_path / code[1]).write_text(code[0])
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    lines = re.findall(r"^adamp-parity (.*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    import keras_digits
    import torch_digits

    source, target = training_of(torch_digits.setup()), training_of(keras_digits.setup())
    images = np.random.default_rng(0).standard_normal((8, 8, 8, 1), np.float32)
    for _ in range(3):
        source.optimizer.zero_grad()
        source.model(torch.tensor(images).permute(0, 3, 1, 2)).square().mean().backward()
        source.optimizer.step()
    source.write("step_1000.pt")
    with torch.no_grad():
        wanted = source.model.eval()(torch.tensor(images).permute(0, 3, 1, 2)).numpy()

    def got():
        target.read("step_1000.keras")
        return np.asarray(target.model(images, training=False))

    for i, line in enumerate(lines):
        result = run(*line.split(), *(["--force"] if i == 2 else []))
        assert result.exit_code == (i == 0), (line, result.output)
        if i == 0:
            assert "unmatched: source layer '5' (Linear: 5.weight, 5.bias)" in result.output
            derived = Map.read("map.toml")
            doubtful = '# [[layer]]\n# row = "dense"\n# source = "5.*"\n# target = "head/*"\n'
            assert doubtful in Path("map.toml").read_text()
            with open("map.toml", "a") as file:
                file.write(toml[toml.rindex("[[layer]]") :])
            completed = Map.read("map.toml")
            Path("map.toml").write_text(toml)
            assert [replace(pair, note="") for pair in completed.pairs] == list(Map.read("map.toml").pairs)
    np.testing.assert_allclose(got(), wanted, rtol=1e-5, atol=1e-6)

    # Why the page has a row of its own, and why the plain one is not derived.
    Map("torch", "keras", (*derived.pairs, Pair("dense", ("5.*",), ("head/*",)))).write("map.toml")
    assert run(*lines[2].split(), "--force").exit_code == 0
    assert np.max(np.abs(got() - wanted)) > 0.1
