"""Snapshots: parameters and optimizer state in one safetensors file that every backend writes and reads (SNAPSHOT.md).

The backends bring the tensors; what the file must hold, and that it holds it, is checked here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from adamp_spec import SPEC_VERSION, AdamPHyper, Layout, SGDPHyper

FORMAT = 1
KEY = "adamp-parity"  # of the header, in the file's metadata
MOMENTS = {"adamp": ("m", "v"), "sgdp": ("m",)}
REAL = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of an element
SIZES = REAL | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}

Hyper = AdamPHyper | SGDPHyper
_HYPER: dict[str, type[Hyper]] = {"adamp": AdamPHyper, "sgdp": SGDPHyper}


class SnapshotError(ValueError):
    """A file that is no snapshot, is damaged, or does not fit what it is to be loaded into."""


@dataclass(frozen=True)
class Entry:
    """What a snapshot says of one optimized parameter.

    Attributes:
      group: index into the snapshot's groups.
      step: steps that it has taken.
      layout: its rows.
    """

    group: int
    step: int
    layout: Layout


@dataclass(frozen=True)
class Snapshot:
    """All of a snapshot but its tensors.

    These are `parameter/NAME`, `m/NAME` and, for AdamP, `v/NAME` of each parameter, and `other/NAME` of what the model
    holds besides, such as buffers and frozen weights.

    Attributes:
      algorithm: "adamp" or "sgdp".
      groups: the hyperparameters of each group.
      parameters: name -> entry.
      spec: the version of the specification.
    """

    algorithm: str
    groups: tuple[Hyper, ...]
    parameters: Mapping[str, Entry]
    spec: str = SPEC_VERSION

    def to_json(self) -> str:
        """The header as it stands in the file."""
        parameters = {
            name: {"group": entry.group, "step": entry.step, "layout": entry.layout.to_dict()}
            for name, entry in self.parameters.items()
        }
        return json.dumps(
            {
                "format": FORMAT,
                "spec": self.spec,
                "algorithm": self.algorithm,
                "groups": [asdict(group) for group in self.groups],
                "parameters": parameters,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """Reads a header.

        Raises:
          SnapshotError: it is none, or of a newer format or specification than this package knows.
        """
        try:
            header = json.loads(text)
            if header["format"] != FORMAT:
                raise SnapshotError(
                    f"the snapshot has format {header['format']!r}, this version reads {FORMAT}; {_NEWER}"
                )
            if _version(header["spec"]) > _version(SPEC_VERSION):
                raise SnapshotError(
                    f"the snapshot follows specification {header['spec']}, this version knows {SPEC_VERSION}; {_NEWER}"
                )
            groups = tuple(_HYPER[header["algorithm"]](**group) for group in header["groups"])
            parameters = {
                name: Entry(_count(entry["group"]), _count(entry["step"]), Layout(**entry["layout"]))
                for name, entry in header["parameters"].items()
            }
            for name, entry in parameters.items():
                if entry.group >= len(groups):
                    raise ValueError(f"parameter {name!r} is of group {entry.group}, and there are {len(groups)}")
        except SnapshotError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"the snapshot's header is not as SNAPSHOT.md has it: {_said(error)}") from error
        return cls(header["algorithm"], groups, parameters, header["spec"])

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises SnapshotError unless `tensors` are those that the header promises, in shapes and dtypes that fit."""
        missing = [name for name in self.names() if name not in tensors]
        foreign = [name for name in tensors if name not in set(self.names()) and not name.startswith("other/")]
        if missing or foreign:
            raise SnapshotError(f"the snapshot lacks {missing}, and holds {foreign} that its header does not know")
        for name, entry in self.parameters.items():
            shape = tensors[f"parameter/{name}"].shape
            for kind in ("parameter", *MOMENTS[self.algorithm]):
                found = tensors[f"{kind}/{name}"]
                if found.shape != shape:
                    raise SnapshotError(f"{kind}/{name} has shape {found.shape}, the parameter {shape}")
                if found.dtype not in REAL:
                    raise SnapshotError(f"{kind}/{name} has dtype {found.dtype}; it must be one of {', '.join(REAL)}")
            try:
                entry.layout.rows(shape)
            except ValueError as error:
                raise SnapshotError(f"the layout of parameter {name!r}: {error}") from error

    def check_target(
        self,
        tensors: Mapping[str, Tensor],
        algorithm: str,
        places: Mapping[str, Place],
        others: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> dict[int, Hyper]:
        """Checks that the snapshot can go, whole and unchanged, into a model and its optimizer.

        Args:
          tensors: those of the snapshot.
          algorithm: the optimizer's.
          places: its parameters.
          others: dtype and shape of what the model holds besides.

        Returns:
          What each of the optimizer's groups becomes, if it has parameters.

        Raises:
          SnapshotError: it cannot.
        """
        if algorithm != self.algorithm:
            raise SnapshotError(
                f"the snapshot is of {self.algorithm}, the optimizer is {algorithm}; make the other one"
            )
        found = {name.removeprefix("other/") for name in tensors if name.startswith("other/")}
        for what, wanted, given in (
            ("optimized parameters", set(places), set(self.parameters)),
            ("other tensors", set(others), found),
        ):
            if wanted != given:
                raise SnapshotError(
                    f"snapshot and model differ in their {what}: only the snapshot has {sorted(given - wanted)}, "
                    f"only the model {sorted(wanted - given)}; make both alike, or map their names"
                )
        become: dict[int, Hyper] = {}
        for name, place in places.items():
            entry, tensor = self.parameters[name], tensors[f"parameter/{name}"]
            if (tensor.dtype, tensor.shape) != (place.dtype, place.shape):
                raise SnapshotError(
                    f"parameter {name!r} is {tensor.dtype} {tensor.shape} in the snapshot, {place.dtype} {place.shape} "
                    "in the model"
                )
            if become.setdefault(place.group, self.groups[entry.group]) != self.groups[entry.group]:
                raise SnapshotError(
                    f"group {place.group} of the optimizer would have to be {become[place.group]} and, for parameter "
                    f"{name!r}, {self.groups[entry.group]}: make two groups of it "
                    "(weight_decay_mask in Optax, exclude_from_weight_decay in Keras)"
                )
            there, here = entry.layout.rows(place.shape), place.layout.rows(place.shape)
            if there != here and (there.projects or here.projects):
                raise SnapshotError(
                    f"parameter {name!r} has {entry.layout} in the snapshot, {place.layout} in the optimizer, which is "
                    "then another optimizer: give it the snapshot's in `layouts`"
                )
        for name, (dtype, shape) in others.items():
            tensor = tensors[f"other/{name}"]
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise SnapshotError(
                    f"{name!r} is {tensor.dtype} {tensor.shape} in the snapshot, {dtype} {shape} in the model"
                )
        return become

    def names(self) -> Iterator[str]:
        """The names of all tensors of optimized parameters."""
        for kind in ("parameter", *MOMENTS[self.algorithm]):
            yield from (f"{kind}/{name}" for name in self.parameters)


class Place(NamedTuple):
    """Where an optimized parameter goes: what its entry and its tensor must fit."""

    dtype: str
    shape: tuple[int, ...]
    group: int
    layout: Layout


class Tensor(NamedTuple):
    """A tensor of a snapshot.

    Attributes:
      dtype: as safetensors names it.
      shape: its shape.
      read: gives its elements on the host, in row-major order; called when its turn comes.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Any]


def write(path: str | os.PathLike[str], snapshot: Snapshot, tensors: Mapping[str, Tensor]) -> None:
    """Writes a snapshot, one tensor after the other; the file is there whole or not at all.

    Raises:
      SnapshotError: the tensors are not what the header promises; nothing is written.
      OSError: the file cannot be written; what was there before stays.
    """
    snapshot.check(tensors)
    header: dict[str, Any] = {"__metadata__": {KEY: snapshot.to_json()}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * SIZES[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(temporary, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors.items():
                data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8)
                start, end = header[name]["data_offsets"]
                if data.size != end - start:
                    raise SnapshotError(f"{name} has {data.size} bytes, and {end - start} were announced")
                file.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: str | os.PathLike[str], framework: str) -> Iterator[tuple[Snapshot, dict[str, Tensor]]]:
    """A snapshot and its tensors by name, each of which is read from the file when it is asked for.

    Args:
      path: the file.
      framework: whose tensors are wanted, as `safetensors.safe_open` names it: "pt", "flax", "np", ...

    Raises:
      SnapshotError: the file is no snapshot, or damaged.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        begin = file.read(2)
    if begin[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
        raise SnapshotError(
            f"{os.fspath(path)!r} is a pickle or an archive, as torch.save writes it, and may run code when loaded: "
            "read it with torch.load(..., weights_only=True), load that into model and optimizer, save a snapshot"
        )
    try:
        opened_file = safe_open(path, framework)
    except SafetensorError as error:
        raise SnapshotError(f"{os.fspath(path)!r} is damaged or no safetensors file: {error}") from error
    with opened_file as saved:
        header = (saved.metadata() or {}).get(KEY)
        if header is None:
            raise SnapshotError(
                f"{os.fspath(path)!r} is a safetensors file, but no snapshot: it lacks the header {KEY!r}"
            )
        slices = {name: saved.get_slice(name) for name in saved.keys()}  # noqa: SIM118 - no mapping
        tensors = {
            name: Tensor(x.get_dtype(), tuple(x.get_shape()), partial(saved.get_tensor, name))
            for name, x in slices.items()
        }
        snapshot = Snapshot.from_json(header)
        snapshot.check(tensors)
        yield snapshot, tensors


_NEWER = "it was written by a newer adamp-parity: pip install --upgrade adamp-parity"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _said(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
