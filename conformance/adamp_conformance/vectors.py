"""The frozen vectors of `spec/vectors`: problems with, for every element, the smallest and the largest legal result.

A *group* is one file: vectors that share algorithm, hyperparameters, dtype and step, run as one problem with
several parameters. It has the interface of `adamp_conformance.cases.Case`. Numbers are bit patterns, so that
nothing depends on how a language reads decimals.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from adamp_conformance.adapter import DTYPES, MOMENTS, Parameter, State
from adamp_conformance.bits import float_from_hex, from_hex
from adamp_conformance.cases import EXACT
from adamp_conformance.spec_files import spec_file
from adamp_spec import SPEC_VERSION, Layout

MANIFEST = "MANIFEST.json"
NOTES = "notes.json"
FOLDERS = ("core", "edge", "ambiguous", "multistep", "large")
INVALID = "invalid"


class CorpusError(Exception):
    """The vectors are not what the manifest says: exit code 3."""


class Legal(NamedTuple):
    """One legal outcome: per slice the branch, per tensor (`p`, `m`, `v`) the smallest and the largest legal value."""

    branch: tuple[str, ...]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]

    def outside(self, got: Mapping[str, np.ndarray]) -> int:
        """How many elements of `got` lie outside.

        NaN lies inside where NaN is expected and, in `p`, where an infinity is (EDGE-2).
        """
        count = 0
        with np.errstate(invalid="ignore"):
            for tensor, low in self.low.items():
                high, x = self.high[tensor], got[tensor]
                nan_is_legal = ~np.isfinite(low) if tensor == "p" else np.isnan(low)
                count += int(np.sum(~(((low <= x) & (x <= high)) | (np.isnan(x) & nan_is_legal))))
        return count


class VectorStep(NamedTuple):
    """The gradient of a step, and its legal outcomes."""

    gradient: np.ndarray
    outcomes: tuple[Legal, ...]


@dataclass(frozen=True)
class Vector:
    """One tensor's problem.

    Attributes:
      id: permanent name; with the dtype of its group it is unique.
      purpose: what it is for, in words.
      clauses, flags: the clauses that it tests, and the mistakes that it is for (tables of `mutants.toml`).
      shape, layout: of the tensor.
      twin: (id, permutation of axes) of a vector that holds the same numbers in another physical layout, or None.
      before: `p`, `m`, `v` before the first step.
      steps: one, or several that follow each other without anything being injected between them.
    """

    id: str
    purpose: str
    clauses: tuple[str, ...]
    flags: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    twin: tuple[str, tuple[int, ...]] | None
    before: dict[str, np.ndarray]
    steps: tuple[VectorStep, ...]

    @property
    def name(self) -> str:
        """The name of the parameter in its group."""
        return self.id.rpartition("/")[2]


@dataclass(frozen=True)
class Group:
    """The vectors of one file, as a problem; see `adamp_conformance.cases.Case` for the methods.

    Attributes:
      id: path under `spec/vectors` without `.json`, such as `core/adamp-views.float32`.
      algorithm, hyper: complete hyperparameters, under the specification's names.
      dtype: key of `DTYPES`.
      step: steps taken before.
      vectors: in the order of the file.
    """

    id: str
    algorithm: str
    dtype: str
    hyper: dict[str, Any]
    step: int
    vectors: tuple[Vector, ...]

    @property
    def folder(self) -> str:
        return self.id.partition("/")[0]

    @property
    def steps(self) -> int:
        return len(self.vectors[0].steps)

    @property
    def exact(self) -> frozenset[str]:
        return frozenset(vector.name for vector in self.vectors if EXACT in vector.flags)

    def only(self, ids: Sequence[str]) -> Group:
        """The group with some of its vectors."""
        return replace(self, vectors=tuple(vector for vector in self.vectors if vector.id in ids))

    def layouts(self, weights: str) -> dict[str, Layout]:
        return {vector.name: vector.layout for vector in self.vectors}

    def parameters(self, dtype: str, weights: str) -> dict[str, Parameter]:
        return {vector.name: Parameter(vector.before["p"].copy(), vector.layout) for vector in self.vectors}

    def initial(self, dtype: str, weights: str) -> State:
        moments = {m: {x.name: x.before[m].copy() for x in self.vectors} for m in MOMENTS[self.algorithm]}
        return State(self.step, {x.name: x.before["p"].copy() for x in self.vectors}, moments)

    def gradients(self, index: int, parameters: Mapping[str, np.ndarray], weights: str) -> dict[str, np.ndarray]:
        return {vector.name: vector.steps[index].gradient.copy() for vector in self.vectors}

    def carry(self, state: State, source: str, target: str) -> State:
        return state


Kind = tuple[str, tuple[int, ...]]  # dtype and shape
PARTS = ("parameter", "state", "gradient")


@dataclass(frozen=True)
class Refusal:
    """Something that must be refused: a problem of ones with one thing wrong.

    Attributes:
      parameter, state, gradient: dtype and shape of the parameter, of its moments and of the gradient.
    """

    id: str
    purpose: str
    clauses: tuple[str, ...]
    flags: tuple[str, ...]
    algorithm: str
    hyper: dict[str, Any]
    layout: dict[str, Any]
    parameter: Kind
    state: Kind
    gradient: Kind


class Corpus(NamedTuple):
    """All vectors."""

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]


@cache
def load(root: Path | None = None) -> Corpus:
    """The vectors that lie in `root`, by default those of the installation, once every file is what it was frozen as.

    Raises:
      CorpusError: a file is missing, changed or not listed, the manifest is not the one that fits the files, or
        there is nothing.
    """
    root = root or vectors_root()
    try:
        listed = (root / MANIFEST).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{MANIFEST} cannot be read: {error}; reinstall adamp-parity") from error
    if listed != manifest(root):
        raise CorpusError(f"{_difference(listed, root)}; the vectors are not the ones that were frozen, reinstall them")
    groups = tuple(read_group(root, name) for name in group_names(root))
    refusals = tuple(refusal for path in sorted((root / INVALID).glob("*.json")) for refusal in _read_refusals(path))
    if not groups or not refusals:
        raise CorpusError(f"{root} holds no vectors; reinstall adamp-parity")
    return Corpus(groups, refusals)


def vectors_root() -> Path:
    """The folder of the installation's vectors."""
    try:
        return spec_file(f"vectors/{MANIFEST}").parent
    except FileNotFoundError as error:
        raise CorpusError(str(error)) from error


def group_names(root: Path) -> list[str]:
    """Ids of all groups."""
    return sorted(f"{folder}/{path.stem}" for folder in FOLDERS for path in (root / folder).glob("*.json"))


def manifest(root: Path) -> str:
    """The text of the manifest that fits the files in `root`: counts, and the SHA-256 of each file."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path != root / MANIFEST:
            content = path.read_bytes()
            files[path.relative_to(root).as_posix()] = {"sha256": hashlib.sha256(content).hexdigest()} | _count(path)
    total = sum(entry.get("vectors", 0) for entry in files.values())
    return json.dumps({"spec": SPEC_VERSION, "vectors": total, "files": files}, indent=1) + "\n"


def _count(path: Path) -> dict[str, int]:
    if path.suffix != ".json" or path.name == NOTES:
        return {}
    try:
        return {"vectors": len(json.loads(path.read_text())["vectors"])}
    except (ValueError, KeyError, TypeError):
        return {}  # its hash will not fit either


def _difference(listed: str, root: Path) -> str:
    try:
        old: dict[str, Any] = json.loads(listed)["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    new: dict[str, Any] = json.loads(manifest(root))["files"]
    for name in sorted({*old, *new}):
        if name not in new:
            return f"{name} is missing"
        if name not in old:
            return f"{name} is not in {MANIFEST}"
        if old[name] != new[name]:
            return f"{name} has changed"
    return f"{MANIFEST} is damaged"


def read_group(root: Path, name: str) -> Group:
    """One group.

    Raises:
      CorpusError: the file is not a group, as its schema defines it.
    """
    record = checked(root / f"{name}.json", "group")
    dtype = DTYPES[record["dtype"]]
    tensors: dict[str, np.ndarray] | None = None

    def array(text: str, shape: tuple[int, ...]) -> np.ndarray:
        x = from_hex(text, dtype, shape) if tensors is None else tensors[text]
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{text} is {x.dtype}{list(x.shape)}")
        return x

    try:
        if "data" in record:
            tensors = load_file(root / name.rpartition("/")[0] / record["data"])
        vectors = tuple(_read_vector(entry, array) for entry in record["vectors"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CorpusError(f"{name}: {error}") from error
    return Group(name, record["algorithm"], record["dtype"], _read_hyper(record["hyper"]), record["step"], vectors)


def _read_vector(entry: dict[str, Any], array: Any) -> Vector:
    shape = tuple(entry["shape"])

    def arrays(texts: Mapping[str, str]) -> dict[str, np.ndarray]:
        return {tensor: array(text, shape) for tensor, text in texts.items()}

    def legal(outcome: dict[str, Any]) -> Legal:
        low, high = (
            arrays({tensor: outcome[tensor][end] for tensor in outcome if tensor != "branch"}) for end in ("lo", "hi")
        )
        return Legal(tuple(outcome["branch"]), low, high)

    steps = (VectorStep(array(step["g"], shape), tuple(map(legal, step["outcomes"]))) for step in entry["steps"])
    return Vector(
        entry["id"],
        entry["purpose"],
        tuple(entry["clauses"]),
        tuple(entry["flags"]),
        shape,
        Layout(**entry["layout"]),
        (entry["twin"]["id"], tuple(entry["twin"]["axes"])) if "twin" in entry else None,
        arrays(entry["before"]),
        tuple(steps),
    )


def _read_refusals(path: Path) -> Iterator[Refusal]:
    for entry in checked(path, "refusals")["vectors"]:
        kinds = {key: (entry[key]["dtype"], tuple(entry[key]["shape"])) for key in PARTS}
        words = {key: tuple(entry[key]) for key in ("clauses", "flags")}
        yield Refusal(**entry | kinds | words | {"hyper": _read_hyper(entry["hyper"])})


def _read_hyper(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, bool) else float_from_hex(value) for name, value in record.items()}


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads(spec_file("schema/vectors.schema.json").read_text())
    return jsonschema.Draft202012Validator({"$defs": schema["$defs"], "$ref": f"#/$defs/{kind}"})


def checked(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object in a file of vectors.

    Args:
      kind: `group` or `refusals`.

    Raises:
      CorpusError: the file does not fit its schema.
    """
    try:
        record = json.loads(path.read_text())
        _validator(kind).validate(record)
    except (ValueError, jsonschema.ValidationError) as error:
        message = error.message if isinstance(error, jsonschema.ValidationError) else str(error)
        raise CorpusError(f"{path.name} is not a file of vectors: {message}") from error
    return record
