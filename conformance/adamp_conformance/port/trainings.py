"""Trainings: a model and its optimizer as a setup function makes them, their checkpoints, and their snapshots.

A setup function takes no arguments and returns

- in PyTorch `(model, optimizer)`;
- in Keras a model that is built and compiled;
- in Optax an `OptaxTraining`.

```python
training = training_of(setup())
training.read("step_1000.pt")
training.save_snapshot("step_1000.safetensors")
```

No framework is imported before a training of it is there.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import shutil
import tempfile
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from adamp_conformance.port import inventory
from adamp_conformance.port.inventory import LIBRARIES, Inventory
from adamp_spec.snapshot import Hyper, SnapshotError

SNAPSHOT = ".safetensors"  # what a snapshot's name ends with, whatever the framework


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, might run code, or does not fit the training."""


class PortWarning(UserWarning):
    """What goes over otherwise than one might think."""


class OptaxTraining(NamedTuple):
    """What a setup function for Optax returns.

    Attributes:
      model: a module of Flax (Linen or NNX) or Equinox, or a transformed function of Haiku.
      params, opt_state: trees of the parameters and of the optimizer's state.
      hyperparameters: an :class:`adamp_spec.AdamPHyper` or `SGDPHyper` with what the transformation was made with.
      inputs: arguments to call the model with, for Linen and Haiku, whose layers are known only then.
      layouts, weight_decay_mask: as the transformation was given.
      others: what the model holds besides: name -> tree, such as `{"batch_stats": ...}`.
      schedule: the learning rate's schedule, from steps to rate, if the transformation has one. A snapshot's learning
        rate is then the schedule's at the state's step count, and without it that of `hyperparameters`.
    """

    model: Any
    params: Any
    opt_state: Any
    hyperparameters: Hyper
    inputs: tuple[Any, ...] = ()
    layouts: Any = None
    weight_decay_mask: Any = None
    others: Mapping[str, Any] | None = None
    schedule: Callable[[int], Any] | None = None


class Training(ABC):
    """A model and its optimizer.

    Attributes:
      made: what the setup function returned; in Optax, what is read or loaded replaces it.
      framework: one of `adamp_conformance.layers.FRAMEWORKS`.
      suffixes: what the framework's own checkpoints end with; "" is a folder.
    """

    made: Any
    framework: str
    suffixes: tuple[str, ...]

    @abstractmethod
    def inventory(self) -> Inventory:
        """The model's layers."""

    @abstractmethod
    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        """Writes a snapshot; raises as the backend's `save_snapshot`."""

    @abstractmethod
    def load_snapshot(self, path: str | os.PathLike[str]) -> None:
        """Loads a snapshot; raises as the backend's `load_snapshot`."""

    def read(self, path: str | os.PathLike[str]) -> None:
        """Loads a checkpoint or, by its suffix, a snapshot. Nothing in it is executed.

        A checkpoint that is refused may have been loaded in part: make the training anew.

        Raises:
          CheckpointError, SnapshotError: the file is none, is damaged, or does not fit.
          ModuleNotFoundError: a library that reads it is not installed.
          OSError: it cannot be read.
        """
        path = Path(path)
        if path.suffix == SNAPSHOT:
            self.load_snapshot(path)
            return
        self.check_suffix(path)
        if not path.exists():
            raise FileNotFoundError(f"there is no {os.fspath(path)!r}")
        self._read(path)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint or, by its suffix, a snapshot; it is there whole or not at all.

        Raises:
          CheckpointError: the framework has no checkpoints of this suffix.
          ModuleNotFoundError: a library that writes it is not installed.
          OSError: it cannot be written; what was there before stays.
        """
        path = Path(path)
        if path.suffix == SNAPSHOT:
            self.save_snapshot(path)
            return
        self.check_suffix(path)
        with _replacing(path) as temporary:
            self._write(temporary)

    @abstractmethod
    def _read(self, path: Path) -> None: ...

    @abstractmethod
    def _write(self, path: Path) -> None: ...

    def check_suffix(self, path: Path) -> None:
        """Raises CheckpointError unless the framework has checkpoints of this suffix."""
        if path.suffix not in (SNAPSHOT, *self.suffixes) and not ("" in self.suffixes and path.is_dir()):
            known = ", ".join([suffix or "a folder (Orbax)" for suffix in self.suffixes])
            raise CheckpointError(
                f"{os.fspath(path)!r} is no checkpoint of {self.framework}, which are {known}; any framework has "
                f"snapshots, {SNAPSHOT}"
            )


def training_of(made: Any) -> Training:
    """A training from what a setup function returned.

    Raises:
      TypeError: it is nothing that a setup function is to return, or its optimizer is neither AdamP nor SGDP.
    """
    if isinstance(made, OptaxTraining):
        return _Optax(made)
    if isinstance(made, tuple) and len(made) == 2 and any(_is_of("torch", x) for x in made):
        return _Torch(*made)
    if _is_of("keras", made):
        return _Keras(made)
    raise TypeError(
        f"the setup function returned {made!r:.100}; it must return (model, optimizer) in PyTorch, a compiled model in "
        "Keras, an adamp_conformance.port.trainings.OptaxTraining in Optax"
    )


class _Torch(Training):
    framework = "torch"
    suffixes = (".pt", ".pth", ".ckpt")

    def __init__(self, model: Any, optimizer: Any) -> None:
        import torch

        from adamp_torch import SGDP, AdamP

        if not isinstance(model, torch.nn.Module) or not isinstance(optimizer, AdamP | SGDP):
            raise TypeError(
                "the setup function must return (model, optimizer), a torch.nn.Module and an AdamP or SGDP of "
                f"adamp_torch; it returned ({type(model).__name__}, {type(optimizer).__name__})"
            )
        self.made = self.model, self.optimizer = model, optimizer

    def inventory(self) -> Inventory:
        optimized = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        trained = [name for name, param in self.model.named_parameters() if id(param) in optimized]
        return inventory.torch_inventory(self.model, trained)

    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        import adamp_torch

        adamp_torch.save_snapshot(path, self.model, self.optimizer)

    def load_snapshot(self, path: str | os.PathLike[str]) -> None:
        import adamp_torch

        adamp_torch.load_snapshot(path, self.model, self.optimizer)

    def _read(self, path: Path) -> None:
        with _refusing(path):
            parts = dict(_torch_parts(_torch_load(path)))
            states = {place: x for place, x in parts.items() if set(x) >= _OPTIMIZER}
            found = _of_model({place: x for place, x in parts.items() if place not in states}, self.model)
            prefix, weights = _only("tensors of the model", found)
            state = _only("states of an optimizer", states)
            self._check(prefix, weights, state)
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(state)

    def _check(self, prefix: str, weights: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Raises ValueError where loading would convert a dtype, or give a parameter the moments of another."""
        dtypes = [(name, weights[name].dtype, x.dtype) for name, x in self.model.state_dict().items()]
        for given, own in zip(state["param_groups"], self.optimizer.param_groups, strict=False):  # loading counts them
            names = [name.removeprefix(prefix) for name in given.get("param_names", ())]
            if names and names != (wanted := own.get("param_names", names)):
                raise ValueError(
                    f"a group of its optimizer has the parameters {names}, in this order, and the setup function's "
                    f"{wanted}: give the optimizer the file's"
                )
            for key, param in zip(given["params"], own["params"], strict=False):
                held = state["state"].get(key, {})
                dtypes += [
                    (f"{name} of parameter {key}", held[name].dtype, param.dtype)
                    for name in self.optimizer.MOMENTS
                    if name in held
                ]
        for name, given, own in dtypes:
            if given != own:
                raise ValueError(f"{name} is {given} in it, {own} in the training, and dtypes are not converted")

    def _write(self, path: Path) -> None:
        import torch

        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)


class _Keras(Training):
    framework = "keras"
    suffixes = (".keras",)

    def __init__(self, model: Any) -> None:
        import keras

        from adamp_tf import SGDP, AdamP

        optimizer = getattr(model, "optimizer", None)
        inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
        if not isinstance(model, keras.Model) or not isinstance(inner, AdamP | SGDP):
            raise TypeError(
                "the setup function must return a Keras model that is compiled with AdamP or SGDP of adamp_tf; it "
                f"returned {type(model).__name__}, whose optimizer is {type(optimizer).__name__}"
            )
        self.made = self.model = model

    def inventory(self) -> Inventory:
        return inventory.keras_inventory(self.model)

    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        import adamp_tf

        adamp_tf.save_snapshot(path, self.model)

    def load_snapshot(self, path: str | os.PathLike[str]) -> None:
        import adamp_tf

        adamp_tf.load_snapshot(path, self.model)

    def _read(self, path: Path) -> None:
        # Its weights alone, those of the optimizer among them: the file's own model would need its custom classes,
        # which are code, and would give its variables other paths.
        import keras

        with _refusing(path), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(path) as archive:
                compiled = json.loads(archive.read("config.json")).get("compile_config") or {}
                with archive.open("model.weights.h5") as weights:
                    stored = _stored(weights)
            saved, own = compiled.get("optimizer"), keras.saving.serialize_keras_object(self.model.optimizer)
            if saved is not None and (differing := _differing(saved, json.loads(json.dumps(own)))):
                raise ValueError(f"its optimizer has {differing}; compile the model of the setup function with these")
            if not self.model.optimizer.built:
                self.model.optimizer.build(self.model.trainable_variables)
            if saved is not None:
                _check_layouts(saved, self.model.optimizer)
            self.model.save_weights(ours := Path(folder) / "ours.weights.h5")
            _check_stored(stored, _stored(ours))
            warnings.filterwarnings("error", message="Skipping variable loading")
            self.model.load_weights(path)

    def _write(self, path: Path) -> None:
        self.model.save(path)


_WALKS: dict[str, Callable[..., Inventory]] = {
    "linen": inventory.linen_inventory,
    "nnx": inventory.nnx_inventory,
    "equinox": inventory.equinox_inventory,
    "haiku": inventory.haiku_inventory,
}
_CALLED = ("linen", "haiku")  # their layers are known when the model is called


class _Optax(Training):
    suffixes = (".msgpack", "")

    def __init__(self, made: OptaxTraining) -> None:
        self.made = made
        found = [framework for framework in _WALKS if _is_of(LIBRARIES[framework], made.model)]
        if not found:
            known = ", ".join(LIBRARIES[framework] for framework in _WALKS)
            raise TypeError(f"the model of an OptaxTraining is of one of {known}, and not {made.model!r:.100}")
        (self.framework,) = found

    def inventory(self) -> Inventory:
        walk, model, trees = _WALKS[self.framework], self.made.model, (self.made.params, self.made.others)
        if self.framework not in _CALLED:
            return walk(model, *trees)
        try:
            return walk(model, *trees, self.made.inputs)
        except Exception as error:  # whatever the model raises
            raise ValueError(f"the model cannot be called on `inputs`: {type(error).__name__}: {error}") from error

    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        import adamp_jax

        adamp_jax.save_snapshot(
            path,
            self.made.params,
            self.made.opt_state,
            self._hyperparameters(),
            weight_decay_mask=self.made.weight_decay_mask,
            layouts=self.made.layouts,
            others=self.made.others,
        )

    def load_snapshot(self, path: str | os.PathLike[str]) -> None:
        import adamp_jax

        try:
            restored = adamp_jax.load_snapshot(
                path,
                self.made.params,
                self.made.opt_state,
                weight_decay_mask=self.made.weight_decay_mask,
                layouts=self.made.layouts,
                others=self.made.others,
            )
        except SnapshotError as error:
            if self.made.weight_decay_mask is None and "weight_decay_mask" in str(error):
                raise SnapshotError(
                    f"{error}; if the transformation has such a mask, give it to the OptaxTraining, too, as "
                    "weight_decay_mask"
                ) from error
            raise
        given, own = (
            {"algorithm": x.algorithm, **asdict(x)} for x in (restored.hyperparameters, self.made.hyperparameters)
        )
        if differing := {name: x for name, x in given.items() if x != own.get(name) and name != "lr"}:
            raise SnapshotError(f"the snapshot's optimizer has {differing}: make the transformation with these")
        if given["lr"] != own["lr"] and self.made.schedule is None:
            warnings.warn(
                f"the snapshot's learning rate is {given['lr']}, and a transformation keeps its own, {own['lr']}: make "
                "it with the snapshot's, unless a schedule gives it (OptaxTraining's `schedule`)",
                PortWarning,
                stacklevel=2,
            )
        self.made = self.made._replace(**restored._asdict())

    def _hyperparameters(self) -> Hyper:
        """Those of the training, with the learning rate of the moment."""
        import jax
        import numpy as np
        import optax

        from adamp_jax._snapshot import _find

        made = self.made
        if made.schedule is not None:
            state, *_ = _find(made.params, made.opt_state)
            rate = np.asarray(made.schedule(int(state.count)))
            return replace(made.hyperparameters, lr=float(str(rate)))
        states = jax.tree.leaves(made.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
        if any(isinstance(x, optax.ScaleByScheduleState) for x in states):
            warnings.warn(
                f"the transformation has a schedule, and the learning rate that is written is {made.hyperparameters.lr}"
                ", that of the OptaxTraining's `hyperparameters`: give it `schedule`, too, and it is the schedule's",
                PortWarning,
                stacklevel=3,
            )
        return made.hyperparameters

    def _read(self, path: Path) -> None:
        with _refusing(path):
            stored = _orbax_restored(path) if path.is_dir() else _flax().msgpack_restore(path.read_bytes())
            trees = self._trees()
            if missing := [name for name in trees if name not in stored]:
                raise ValueError(f"it lacks {missing}; it must hold {list(trees)}, and holds {list(stored)}")
            params, state, *others = (_filled(name, tree, stored[name]) for name, tree in trees.items())
        kept = dict(zip(self.made.others or (), others, strict=True))
        self.made = self.made._replace(params=params, opt_state=state, others=kept or None)

    def _write(self, path: Path) -> None:
        if path.suffix == ".msgpack":
            path.write_bytes(_flax().msgpack_serialize(_nested(self._trees())))
        else:
            with _orbax().StandardCheckpointer() as checkpointer:
                checkpointer.save(path.absolute(), self._trees())

    def _trees(self) -> dict[str, Any]:
        """The parts of a checkpoint."""
        return {"params": self.made.params, "opt_state": self.made.opt_state} | dict(self.made.others or {})


# ------------------------------------------------------------------------------------------------ files


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever a library says of a file that it cannot load, in one error."""
    try:
        yield
    except (CheckpointError, ModuleNotFoundError):
        raise
    except Exception as error:
        detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{os.fspath(path)!r} is damaged or does not fit the training: {detail}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path`, of the same suffix; what is written there takes its place, unless an error comes.

    Raises:
      FileExistsError: `path` is a folder, and no checkpoint.
    """
    if path.is_dir() and not (path / "_METADATA").exists():
        raise FileExistsError(f"{os.fspath(path)!r} is a folder and no checkpoint of Orbax, and is not replaced")
    temporary, old = (path.with_name(f".{secrets.token_hex(8)}.{path.name}") for _ in range(2))
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        if path.is_dir():  # which nothing can replace in one move
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            leftover.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ PyTorch

_OPTIMIZER = {"state", "param_groups"}  # what an optimizer's state has


def _torch_load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{os.fspath(path)!r} holds {named[1] if named else 'something'} beside tensors and plain values; making "
            "it would run code from the file, and none was run. If you trust its origin, load it in your own code and "
            'save torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)'
        ) from error


def _torch_parts(found: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All dictionaries of tensors and all optimizers' states in a checkpoint, by where they are."""
    from torch import Tensor

    if isinstance(found, Mapping):
        if set(found) >= _OPTIMIZER or (found and all(isinstance(x, Tensor) for x in found.values())):
            yield place or "the file", found
        else:
            for key, x in found.items():
                yield from _torch_parts(x, f"{place}[{key!r}]")
    elif isinstance(found, list | tuple):
        for i, x in enumerate(found):
            yield from _torch_parts(x, f"{place}[{i}]")


def _of_model(parts: Mapping[str, Mapping[str, Any]], model: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those that have the model's tensors and no others, all under one prefix, such as DataParallel's `module.`."""
    names = set(model.state_dict())
    last = max(names)
    fitting = {}
    for place, tensors in parts.items():
        for prefix in {key.removesuffix(last) for key in tensors if key.endswith(last)}:
            if {prefix + name for name in names} == set(tensors):
                fitting[place] = prefix, {name: tensors[prefix + name] for name in names}
    if parts and not fitting:
        closest = max(parts.values(), key=lambda x: len(names & set(x)))
        raise ValueError(
            f"its tensors are not the model's: it lacks {sorted(names - set(closest))}, and has "
            f"{sorted(set(closest) - names)} that the model has not"
        )
    return fitting


def _only(what: str, found: Mapping[str, Any]) -> Any:
    if len(found) != 1:
        raise ValueError(
            f"it must hold the {what} once, and holds them {len(found)} times: {', '.join(found) or 'nowhere'}; save "
            'torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)'
        )
    (value,) = found.values()
    return value


# ------------------------------------------------------------------------------------------------ Keras


def _differing(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's configuration says otherwise than that of another, if it matters to a step."""
    saved, own = _innermost(saved), _innermost(own)
    given, ours = saved["config"], own["config"]
    apart = {"name", "variables", "layouts"}
    if not any(isinstance(x.get("learning_rate"), dict) for x in (given, ours)):
        apart.add("learning_rate")  # a number is among the weights; a schedule is not
    differing = {key: given.get(key) for key in sorted({*given, *ours} - apart) if given.get(key) != ours.get(key)}
    return differing | ({} if saved["class_name"] == own["class_name"] else {"class": saved["class_name"]})


def _innermost(saved: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an optimizer, without a LossScaleOptimizer around it."""
    while inner := saved["config"].get("inner_optimizer"):
        saved = inner
    return saved


def _check_layouts(saved: dict[str, Any], optimizer: Any) -> None:
    """Raises ValueError where an optimizer cuts a variable into other rows than the one that was saved did.

    What `layouts` says goes by paths, and in these Keras counts all layers that its process has made. So the saved
    optimizer's are applied to its own paths, which it keeps, and variables go together in their order, as moments do.
    """
    from adamp_tf._layouts import read_table, resolve

    config, own = _innermost(saved)["config"], getattr(optimizer, "inner_optimizer", optimizer)
    named = [(path, tuple(shape)) for path, shape in config.get("variables", ())]
    if [shape for _, shape in named] != [shape for _, shape in own._named]:
        return  # which loading refuses, and says more of
    given = resolve(named, read_table(config.get("layouts"))).values()
    differing = []
    for (path, shape), ours, theirs in zip(own._named, resolve(own._named, own._layouts).values(), given, strict=True):
        if not ours.layout.rows(shape).decides_as(theirs.layout.rows(shape)):
            differing.append(f"{path!r} by {theirs.layout} and not by {ours.layout}")
    if differing:
        raise ValueError(
            f"its optimizer decides on {few(differing)}: compile the model of the setup function with "
            "layouts=layouts_for(model), or with layouts={path: Layout} as in the file"
        )


class _Stored(NamedTuple):
    """What a file of Keras weights says of them, by their places in it.

    Attributes:
      dtypes: of each array.
      names: of the object that holds it.
    """

    dtypes: dict[str, str]
    names: dict[str, str]


def _stored(file: Any) -> _Stored:
    import h5py  # type: ignore[import-untyped]

    found = _Stored({}, {})

    def see(place: str, x: Any) -> None:
        if isinstance(x, h5py.Dataset):
            found.dtypes[place] = str(x.attrs.get("dtype", x.dtype))  # HDF5 has no bfloat16
        elif "name" in x.attrs:
            found.names[place.removesuffix("/vars")] = x.attrs["name"]

    with h5py.File(file) as opened:
        opened.visititems(see)
    return found


def _check_stored(saved: _Stored, own: _Stored) -> None:
    """Raises ValueError where loading would convert a dtype, or give a layer the weights of another.

    Keras goes by classes and the order of layers: the second Dense is `dense_1`, whatever its name.
    """
    for place, dtype in saved.dtypes.items():
        if "float" in dtype and dtype != (kept := own.dtypes.get(place, dtype)):
            raise ValueError(f"{place} is {dtype} in it, {kept} in the training, and dtypes are not converted")
    moved: dict[str, list[tuple[str, str]]] = {}
    for place in saved.names.keys() & own.names.keys():
        if saved.names[place] != own.names[place]:
            moved.setdefault(re.sub(r"_\d+$", "", place), []).append((saved.names[place], own.names[place]))
    for names in moved.values():
        given, ours = (sorted(each) for each in zip(*names, strict=True))
        if given == ours:  # names that differ otherwise, Keras may have counted
            raise ValueError(f"its layers {given} come in another order: make them in the file's")


# ------------------------------------------------------------------------------------------------ Optax


def _flax() -> Any:
    try:
        from flax import serialization
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"checkpoints of Flax (.msgpack) need flax: pip install flax ({error})") from error
    return serialization


def _orbax() -> Any:
    try:
        import orbax.checkpoint  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"checkpoints of Orbax need it: pip install orbax-checkpoint ({error})") from error
    return orbax.checkpoint


def _orbax_restored(path: Path) -> Any:
    """What a folder of Orbax holds, in NumPy arrays: not on the devices where it was saved."""
    import jax
    import numpy as np

    orbax, path = _orbax(), _orbax_item(path).absolute()
    with orbax.PyTreeCheckpointer() as checkpointer:
        known = checkpointer.metadata(path).item_metadata.tree
        how = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), known)
        return checkpointer.restore(path, restore_args=how)


def _orbax_item(path: Path) -> Path:
    """The checkpoint itself, which a CheckpointManager puts into the folder of its step as the item `default`."""
    for item in (path, path / "default"):
        if (item / "_METADATA").exists():
            return item
    found = [x.parent.relative_to(path) for x in (*path.glob("*/_METADATA"), *path.glob("*/*/_METADATA"))]
    names = {str(x.parent if x.name == "default" else x) for x in found}
    steps = few(sorted(names, key=_counted, reverse=True))
    inside = f"; give one of the folders in it that are: {steps}" if names else ""
    raise ValueError(f"it has no _METADATA, and so is no checkpoint of Orbax{inside}")


def _counted(name: str) -> tuple[Any, ...]:
    """A name as one counts: 9 before 10."""
    return tuple((int(x), "") if x.isdigit() else (0, x) for x in re.split(r"(\d+)", name))


def _nested(tree: Any) -> dict[str, Any]:
    """A tree of whatever nodes as dictionaries alone, as `flax.serialization.to_state_dict` has those that it knows."""
    import jax

    from adamp_jax._layouts import _keys

    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not jax.tree.leaves(x)):
        *outer, last = _keys(path)
        node = nested
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = leaf if leaf is None or jax.tree.leaves(leaf) else {}
    return nested


def _filled(name: str, tree: Any, stored: Any) -> Any:
    """A tree like `tree` of what a checkpoint holds under `name`."""
    import jax
    import numpy as np

    from adamp_jax._layouts import _keys

    held = {_keys(path): x for path, x in jax.tree_util.tree_leaves_with_path(stored)}

    def fill(path: Any, x: Any) -> Any:
        keys = _keys(path)
        place = "/".join((name, *keys))
        value = held.pop(keys, None)
        if value is None:
            value = held.pop((*keys, "value"), None)  # of Flax's box
        if value is None:
            raise ValueError(f"it lacks {place!r}")
        value, like = np.asarray(value), x if isinstance(x, jax.Array) else np.asarray(x)
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"{place!r} is {value.dtype} {value.shape} in it, {like.dtype} {like.shape} in the training"
            )
        return jax.device_put(value, x.sharding) if isinstance(x, jax.Array) else value

    filled = jax.tree_util.tree_map_with_path(fill, tree)
    if held:
        raise ValueError(f"it has {sorted('/'.join((name, *keys)) for keys in held)}, and the training has not")
    return filled


def _is_of(module: str, x: Any) -> bool:
    return any(f"{each.__module__}.".startswith(f"{module}.") for each in type(x).__mro__)


def few(texts: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")
