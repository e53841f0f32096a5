"""Snapshots: parameters and optimizer state in one safetensors file that every backend writes and reads (SNAPSHOT.md).

The backends bring the tensors; what the file must hold, and that it holds it, is checked here.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from adamp_spec import SPEC_VERSION, AdamPHyper, Layout, SGDPHyper

FORMAT = 1
KEY = "adamp-parity"  # of the header, in the file's metadata
MOMENTS = {"adamp": ("m", "v"), "sgdp": ("m",)}
REAL = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of an element
NUMPY = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"} | {
    f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}  # NumPy's names -> those of safetensors
SIZES = REAL | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}

Hyper = AdamPHyper | SGDPHyper
_BLOCK = 1 << 20  # bytes written or read at a time
_READERS = 4  # threads that read shares of one tensor
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
            _check_keys("the header", header, ("format", "spec", "algorithm", "groups", "parameters"))
            if header["format"] != FORMAT:
                raise SnapshotError(
                    f"the snapshot has format {header['format']!r}, this version reads {FORMAT}; {_NEWER}"
                )
            if _version(header["spec"]) > _version(SPEC_VERSION):
                raise SnapshotError(
                    f"the snapshot follows specification {header['spec']}, this version knows {SPEC_VERSION}; {_NEWER}"
                )
            if header["algorithm"] not in _HYPER:
                raise ValueError(f"the algorithm is {header['algorithm']!r}, and there are {list(_HYPER)}")
            hyper = _HYPER[header["algorithm"]]
            for i, group in enumerate(header["groups"]):
                _check_keys(f"group {i}", group, [field.name for field in fields(hyper)])
            groups = tuple(hyper(**group) for group in header["groups"])
            parameters = {}
            for name, given in header["parameters"].items():
                _check_keys(f"parameter {name!r}", given, ("group", "step", "layout"))
                _check_keys(f"the layout of parameter {name!r}", given["layout"], ("channel", "batch", "view"))
                entry = Entry(_count(given["group"]), _count(given["step"]), Layout(**given["layout"]))
                parameters[name] = entry
                if entry.group >= len(groups):
                    raise ValueError(f"parameter {name!r} is of group {entry.group}, and there are {len(groups)}")
        except SnapshotError:
            raise
        except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise SnapshotError(f"the snapshot's header is not as SNAPSHOT.md has it: {error}") from error
        return cls(header["algorithm"], groups, parameters, header["spec"])

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises SnapshotError unless `tensors` are those that the header promises, in shapes and dtypes that fit."""
        promised = set(self.names())
        missing = sorted(promised - set(tensors))
        foreign = [name for name in tensors if name not in promised and not name.startswith("other/")]
        if missing or foreign:
            raise SnapshotError(
                f"the snapshot lacks {missing}, and holds {foreign} that its header does not know; {_AGAIN}"
            )
        for name, tensor in tensors.items():
            if tensor.dtype not in SIZES:
                raise SnapshotError(f"{name} has dtype {tensor.dtype}, and a snapshot has {', '.join(SIZES)}; {_AGAIN}")
        for name, entry in self.parameters.items():
            shape = tensors[f"parameter/{name}"].shape
            for kind in ("parameter", *MOMENTS[self.algorithm]):
                found = tensors[f"{kind}/{name}"]
                if found.shape != shape:
                    raise SnapshotError(f"{kind}/{name} has shape {found.shape}, the parameter {shape}; {_AGAIN}")
                if found.dtype not in REAL:
                    raise SnapshotError(
                        f"{kind}/{name} has dtype {found.dtype}, and an optimizer steps {', '.join(REAL)}; {_AGAIN}"
                    )
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
                    f"only the model {sorted(wanted - given)}; make both alike"
                )
        become: dict[int, Hyper] = {}
        apart: dict[str, tuple[Layout, Layout]] = {}  # -> in the snapshot, in the optimizer
        for name, place in places.items():
            entry, tensor = self.parameters[name], tensors[f"parameter/{name}"]
            if (tensor.dtype, tensor.shape) != (place.dtype, place.shape):
                raise SnapshotError(
                    f"parameter {name!r} is {tensor.dtype} {tensor.shape} in the snapshot, {place.dtype} {place.shape} "
                    "in the model"
                )
            moments = [tensors[f"{kind}/{name}"].dtype for kind in MOMENTS[algorithm]]
            for kind, dtype, kept in zip(MOMENTS[algorithm], moments, place.moments or moments, strict=True):
                if dtype != kept:
                    raise SnapshotError(
                        f"{kind} of parameter {name!r} is {dtype} in the snapshot, {kept} in the optimizer"
                    )
            if become.setdefault(place.group, self.groups[entry.group]) != self.groups[entry.group]:
                raise SnapshotError(
                    f"group {place.group} of the optimizer would have to be {become[place.group]} and, for parameter "
                    f"{name!r}, {self.groups[entry.group]}: make two groups of it "
                    "(weight_decay_mask in Optax, exclude_from_weight_decay in Keras)"
                )
            if not entry.layout.rows(place.shape).decides_as(place.layout.rows(place.shape)):
                apart[name] = entry.layout, place.layout
        if apart:
            there, here = (", ".join(f"{name!r}: {x[i]}" for name, x in apart.items()) for i in (0, 1))
            raise SnapshotError(
                f"the optimizer decides by {{{here}}}, which is another optimizer than the snapshot's: make it with "
                f"layouts={{{there}}}"
            )
        for name, (kept, shape) in others.items():
            tensor = tensors[f"other/{name}"]
            if (tensor.dtype, tensor.shape) != (kept, shape):
                raise SnapshotError(
                    f"{name!r} is {tensor.dtype} {tensor.shape} in the snapshot, {kept} {shape} in the model"
                )
        return become

    def common_step(self, framework: str) -> int:
        """The steps that every parameter has taken, for a framework that counts for all of them.

        Raises:
          SnapshotError: some have taken fewer.
        """
        last = max(entry.step for entry in self.parameters.values())
        if late := sorted(name for name, entry in self.parameters.items() if entry.step < last):
            raise SnapshotError(
                f"parameters {late} have taken fewer steps than others, and {framework} counts for all: leave them out "
                "of the optimizer that you save"
            )
        return last

    def names(self) -> Iterator[str]:
        """The names of all tensors of optimized parameters."""
        for kind in ("parameter", *MOMENTS[self.algorithm]):
            yield from (f"{kind}/{name}" for name in self.parameters)


class Place(NamedTuple):
    """Where an optimized parameter goes: what its entry and its tensors must fit.

    Attributes:
      moments: their dtypes, or None where those of the snapshot are taken over.
    """

    dtype: str
    shape: tuple[int, ...]
    group: int
    layout: Layout
    moments: tuple[str, ...] | None = None


class Tensor(NamedTuple):
    """A tensor of a snapshot.

    Attributes:
      dtype: as safetensors names it.
      shape: its shape.
      read: gives its elements on the host, in row-major order; called when its turn comes. Of an opened file, they are
        pages of the file, or go into the array of bytes that it is given.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[..., Any]

    def load(self) -> np.ndarray:
        """The elements of a tensor of an opened file in memory of their own.

        It begins at a multiple of 64 bytes, so that JAX needs no copy.
        """
        size = math.prod(self.shape) * SIZES[self.dtype]
        data = np.empty(size + 64, np.uint8)
        data = data[(begin := -data.ctypes.data % 64) : begin + size]
        self.read(data)
        return data.view(numpy_dtype(self.dtype)).reshape(self.shape)


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
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    file = open(temporary, "xb")  # noqa: SIM115 - what exists already is not this call's to remove
    try:
        with file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors.items():
                data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8)
                start, end = header[name]["data_offsets"]
                if data.size != end - start:
                    raise SnapshotError(f"{name} has {data.size} bytes, and {end - start} were announced")
                for begin in range(0, data.size, _BLOCK):
                    file.write(data[begin : begin + _BLOCK].data)
                del data  # before the next one is made
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[Snapshot, dict[str, Tensor]]]:
    """A snapshot and its tensors by name, each of which is read from the file when it is asked for.

    Args:
      path: the file.

    Yields:
      The header and the tensors.

    Raises:
      SnapshotError: the file is no snapshot, or damaged.
      OSError: it cannot be read.
    """
    shown = repr(os.fspath(path))
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb", buffering=0)) for _ in range(_READERS)]
        try:
            opened_file = safe_open(path, "np")
        except SafetensorError as error:
            if files[0].read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
                raise SnapshotError(
                    f"{shown} is a pickle or an archive, as torch.save writes, and may run code when loaded: read "
                    "it with torch.load(..., weights_only=True), load that into model and optimizer, save a snapshot"
                ) from error
            raise SnapshotError(
                f"{shown} is damaged or no safetensors file ({error}): get it again from where it was written"
            ) from error
        with opened_file as saved:
            if any(not os.path.samestat(os.fstat(file.fileno()), os.stat(path)) for file in files):
                raise SnapshotError(f"{shown} was replaced while it was opened: open it again")
            header = (saved.metadata() or {}).get(KEY)
            if header is None:
                raise SnapshotError(f"{shown} is a safetensors file, but no snapshot: it lacks the header {KEY!r}")
            slices = {name: saved.get_slice(name) for name in saved.keys()}  # noqa: SIM118 - no mapping
            read = _reader(files, stack.enter_context(ThreadPoolExecutor(_READERS)))
            tensors = {
                name: Tensor(x.get_dtype(), tuple(x.get_shape()), partial(read, name)) for name, x in slices.items()
            }
            snapshot = Snapshot.from_json(header)
            snapshot.check(tensors)
            yield snapshot, tensors


def _reader(files: Sequence[FileIO], pool: ThreadPoolExecutor) -> Callable[..., np.ndarray]:
    """Reads tensors of a file that `safe_open` has found sound; each of `files` is that file, for one thread."""
    begin = 8 + int.from_bytes(files[0].read(8), "little")
    header = json.loads(files[0].read(begin - 8))
    pages = np.frombuffer(mmap.mmap(files[0].fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    def fill(file: FileIO, start: int, share: np.ndarray) -> None:
        file.seek(start)
        done = 0
        while done < share.size:
            count = file.readinto(share.data[done : done + _BLOCK])
            if not count:
                raise SnapshotError(f"{os.fspath(file.name)!r} has become shorter while it was read: get it again")
            done += count

    def read(name: str, into: np.ndarray | None = None) -> np.ndarray:
        start, end = (begin + offset for offset in header[name]["data_offsets"])
        if into is None:
            return pages[start:end].view(numpy_dtype(header[name]["dtype"])).reshape(header[name]["shape"])
        shares = np.array_split(into, max(1, min(len(files), into.size // _BLOCK)))
        starts = accumulate((share.size for share in shares), initial=start)
        for _ in pool.map(fill, files, starts, shares):  # raises what a thread has raised
            pass
        return into

    return read


_AGAIN = "a file that says so is damaged: get it again from where it was written"
_NEWER = "it was written by a newer adamp-parity: pip install --upgrade adamp-parity"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:  # frameworks count in int32
        raise ValueError(f"{value!r} is no count below 2**31")
    return value


def _check_keys(what: str, given: Mapping[str, Any], wanted: Sequence[str]) -> None:
    if set(given) != set(wanted):
        raise ValueError(f"{what} has the entries {sorted(given)}, and must have {sorted(wanted)}")


def dtype_name(name: str, dtype: str) -> str:
    """What safetensors calls a dtype of NumPy's.

    Raises:
      TypeError: a snapshot cannot hold it.
    """
    if dtype not in NUMPY:
        raise TypeError(f"{name!r} is {dtype}, which a snapshot cannot hold")
    return NUMPY[dtype]


def numpy_dtype(code: str) -> np.dtype[Any]:
    """NumPy's dtype of a name of safetensors; bfloat16 is one where JAX, TensorFlow or `ml_dtypes` is imported."""
    return np.dtype(next(name for name, x in NUMPY.items() if x == code))


def decay_groups(hyper: Hyper) -> tuple[Hyper, Hyper]:
    """The groups of an optimizer that exempts parameters from weight decay: those that decay, and those."""
    return hyper, replace(hyper, weight_decay=0.0)


def one_of_groups(groups: Mapping[int, Hyper]) -> Hyper:
    """The hyperparameters of which `groups`, as `check_target` gives them, are the `decay_groups`.

    Raises:
      SnapshotError: there are none.
    """
    exempt = groups.get(1)
    if exempt and exempt.weight_decay:
        raise SnapshotError(
            f"the optimizer exempts parameters from weight decay that decay by {exempt.weight_decay} in the snapshot"
        )
    hyper = groups.get(0, exempt)
    if hyper is None:
        raise SnapshotError("the optimizer has no parameters")
    if exempt not in (None, *decay_groups(hyper)):
        raise SnapshotError(
            f"the snapshot has groups that differ in more than their decay, {hyper} and {exempt}, and one optimizer "
            "cannot be both: make two, of which each saves and loads its own parameters"
        )
    return hyper
