"""Freezes the designed cases: their inputs, and from the oracle's bounds the smallest and the largest legal result.

The intervals of float64 vectors need a reference of more than 53 bits, so they are generated where NumPy's
longdouble has 64 (x86-64). They hold everywhere.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from adamp_conformance import refusals
from adamp_conformance.adapter import DTYPES
from adamp_conformance.bits import float_to_hex, to_hex
from adamp_conformance.cases import DESIGNED, Case
from adamp_conformance.judge import ALGORITHMS, Expected, expected_outcomes
from adamp_conformance.spec_files import spec_file
from adamp_conformance.vectors import INVALID, MANIFEST, NOTES, PARTS, Refusal, manifest
from adamp_spec import SPEC_VERSION, Bounded, Branch


def generate(root: Path) -> None:
    """Writes all vectors, notes and the manifest into the empty or absent folder `root`.

    Raises:
      FileExistsError: `root` is not empty: frozen vectors are never overwritten.
      RuntimeError: longdouble is too short on this platform.
    """
    if np.finfo(np.longdouble).nmant < 63:
        raise RuntimeError("longdouble has fewer than 64 bits here; generate the vectors on x86-64")
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; vectors are never overwritten, give an empty folder")
    for name, content in files():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / MANIFEST).write_text(manifest(root))


def files() -> Iterator[tuple[str, bytes]]:
    """Path under `spec/vectors` and content of every file but the manifest."""
    for case in DESIGNED:
        for dtype in case.dtypes if case.folder else ():
            yield from _group_files(case, dtype)
    for name in ("hyperparameters", "inputs"):
        entries = [_refusal(refusal) for refusal in refusals.designed(name)]
        yield f"{INVALID}/{name}.json", _json({"spec": SPEC_VERSION, "vectors": entries})
    yield NOTES, _json(notes())


def notes() -> dict[str, dict[str, Any]]:
    """Flag -> what kind of mistake it stands for, what the mistake does, and where it was seen."""
    flags = tomllib.loads(spec_file("mutants.toml").read_text())
    return {flag: {key: entry[key] for key in ("kind", "effect", "links")} for flag, entry in flags.items()}


def _group_files(case: Case, dtype: str) -> Iterator[tuple[str, bytes]]:
    name = f"{case.folder}/{case.id.replace('/', '-')}.{dtype}"
    large: dict[str, np.ndarray] = {}

    def text(key: str, array: np.ndarray) -> str:
        if case.folder != "large":
            return to_hex(array)
        large[key] = array
        return key

    hyper = asdict(ALGORITHMS[case.algorithm].hyper(**case.hyper))
    record: dict[str, Any] = {
        "spec": SPEC_VERSION,
        "algorithm": case.algorithm,
        "dtype": dtype,
        "hyper": _hyper(hyper),
        "step": case.step,
        "vectors": [_vector(case, name, hyper, dtype, text) for name in case.tensors],
    }
    if large:
        data = f"{name}.safetensors"
        record["data"] = data.rpartition("/")[2]
        yield data, save({key: np.ascontiguousarray(array) for key, array in large.items()})
    yield f"{name}.json", _json(record)


def _vector(case: Case, name: str, hyper: dict[str, Any], dtype: str, text: Any) -> dict[str, Any]:
    tensor = case.tensors[name]
    id = f"{case.id}/{name}"
    before = case.initial(dtype, "torch").tensors(name)
    entry: dict[str, Any] = {
        "id": id,
        "purpose": tensor.purpose,
        "clauses": sorted({*case.labels, *tensor.clauses}),
        "flags": sorted({*case.flags, *tensor.flags}),
        "shape": list(tensor.shape),
        "layout": tensor.layout.to_dict(),
    }
    if tensor.twin:
        entry["twin"] = {"id": f"{case.id}/{tensor.twin[0]}", "axes": list(tensor.twin[1])}
    entry["before"] = {key: text(f"{id}/before/{key}", array) for key, array in before.items()}
    entry["steps"] = [
        {
            "g": text(f"{id}/{index}/g", gradient),
            "outcomes": [
                {"branch": branch}
                | {
                    tensor: {end: text(f"{id}/{index}/{number}/{tensor}/{end}", x) for end, x in ends.items()}
                    for tensor, ends in intervals.items()
                }
                for number, (branch, intervals) in enumerate(outcomes)
            ],
        }
        for index, (gradient, outcomes) in enumerate(_steps(case, name, hyper, dtype))
    ]
    return entry


Intervals = dict[str, dict[str, np.ndarray]]  # tensor -> `lo` and `hi`


def _steps(
    case: Case, name: str, hyper: dict[str, Any], dtype: str
) -> Iterator[tuple[np.ndarray, list[tuple[list[str], Intervals]]]]:
    """The gradient and the outcomes of each step: branches and intervals."""
    tensor = case.tensors[name]
    if tensor.twin:
        for gradient, outcomes in _steps(case, tensor.twin[0], hyper, dtype):
            yield _transposed(gradient, tensor.twin[1]), _transposed(outcomes, tensor.twin[1])
        return
    state: Mapping[str, np.ndarray | Bounded] = case.initial(dtype, "torch").tensors(name)
    for index in range(case.steps):
        p = state["p"]
        value = p.value.astype(DTYPES[dtype]) if isinstance(p, Bounded) else p
        gradient = case.gradients(index, {name: value}, "torch")[name]
        expected = expected_outcomes(
            case.algorithm, hyper, tensor.layout, state, case.step + index, gradient, name in case.exact
        )
        joint = list(joint_outcomes(expected))
        if not tensor.undecided and len(joint) > 1:
            raise AssertionError(f"{case.id}/{name} in {dtype} is within rounding of a threshold, and not meant to be")
        yield (
            gradient,
            [(branch, {key: dict(interval(x, dtype)) for key, x in tensors.items()}) for branch, tensors in joint],
        )
        state = joint[0][1]


def _transposed(x: Any, axes: tuple[int, ...]) -> Any:
    """Every array in `x` transposed."""
    if isinstance(x, dict):
        return {key: _transposed(value, axes) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_transposed(value, axes) for value in x)
    return np.transpose(x, axes).copy() if isinstance(x, np.ndarray) else x


def joint_outcomes(outcomes: list[Expected]) -> Iterator[tuple[list[str], dict[str, Bounded]]]:
    """Every legal combination of the slices' outcomes: the branch of each slice, and all tensors."""
    by_branch = {outcome.branch: outcome for outcome in outcomes}
    slices = outcomes[0].legal.shape
    choices = [
        [branch for branch, outcome in by_branch.items() if outcome.legal.ravel()[index]]
        for index in range(outcomes[0].legal.size)
    ]
    for combination in product(*choices):
        taken = np.array(combination, int).reshape(slices)
        tensors = dict(outcomes[0].tensors)
        for key, first in tensors.items():
            value, error = first.value, first.error
            for branch, outcome in by_branch.items():
                here = outcome.tensors[key]
                mine = _of_slices(taken == branch, outcome, value.shape)
                value, error = np.where(mine, here.value, value), np.where(mine, here.error, error)
            tensors[key] = Bounded(value, error, first.dtype)
        yield [Branch(branch).name.lower() for branch in combination], tensors


def _of_slices(slices: np.ndarray, outcome: Expected, shape: tuple[int, ...]) -> np.ndarray:
    """`slices` for each element of the tensor."""
    return np.broadcast_to(slices, outcome.seen).reshape(shape)


def interval(bounded: Bounded, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """`lo` and `hi`: the smallest and the largest number of `dtype` within the bound."""
    kind = DTYPES[dtype]
    for end, limit, towards in (
        ("lo", bounded.value - bounded.error, np.inf),
        ("hi", bounded.value + bounded.error, -np.inf),
    ):
        x = limit.astype(kind)
        wide = x.astype(limit.dtype)
        outside = wide < limit if end == "lo" else wide > limit
        yield end, np.where(outside, np.nextafter(x, kind.type(towards)), x).astype(kind)


def _refusal(refusal: Refusal) -> dict[str, Any]:
    kinds = {key: dict(zip(("dtype", "shape"), getattr(refusal, key), strict=True)) for key in PARTS}
    return asdict(refusal) | kinds | {"hyper": _hyper(refusal.hyper)}


def _hyper(hyper: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, bool) else float_to_hex(value) for name, value in hyper.items()}


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()
