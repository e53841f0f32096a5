"""What must be true of the vectors as a whole."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from adamp_conformance import freeze
from adamp_conformance.spec_files import clauses, spec_file
from adamp_conformance.vectors import MANIFEST, Corpus, Group, Vector, manifest

CORE_BYTES = 3_000_000

# Clauses that a vector cannot show, and where they are shown.
SHOWN_ELSEWHERE = {
    "STATE-2": "mode purity, on the ambiguous cases above all",
    "STATE-4": "tests of each backend: a gradient that is not there has no bits",
    "LAYOUT-6": "the training run on digits, and tests with each framework's layers",
    "REFUSE-1": "tests of each backend: what a sparse gradient is differs",
}


def lint(corpus: Corpus, root: Path) -> Iterator[str]:
    """What is wrong with the vectors, in words.

    Ids are unique; clauses and flags exist; every clause and every flag has a vector; a vector has one outcome,
    unless it lies in `ambiguous`; twins hold the same numbers; `lo` is at most `hi`; the core is small.
    """
    flags = set(tomllib.loads(spec_file("mutants.toml").read_text()))
    vectors = [(group, vector) for group in corpus.groups for vector in group.vectors]
    cases = [vector for _, vector in vectors] + list(corpus.refusals)
    keys = Counter([(vector.id, group.dtype) for group, vector in vectors] + [(r.id, "") for r in corpus.refusals])
    yield from (f"{id} {dtype} stands in the vectors {count} times" for (id, dtype), count in keys.items() if count > 1)
    for what, known, used in (
        ("clause", set(clauses()) - set(SHOWN_ELSEWHERE), {label for case in cases for label in case.clauses}),
        ("flag", flags, {flag for case in cases for flag in case.flags}),
    ):
        yield from (f"{what} {name} has no vector" for name in sorted(known - used))
        yield from (f"{what} {name} does not exist" for name in sorted(used - known - set(SHOWN_ELSEWHERE)))
    for group, vector in vectors:
        yield from (f"{vector.id} {group.dtype}: {problem}" for problem in _problems(corpus, group, vector))
    size = sum(path.stat().st_size for path in (root / "core").iterdir())
    if size > CORE_BYTES:
        yield f"the core set has {size} bytes, more than {CORE_BYTES}"


def _problems(corpus: Corpus, group: Group, vector: Vector) -> Iterator[str]:
    for index, step in enumerate(vector.steps, 1):
        if (len(step.outcomes) > 1) != (group.folder == "ambiguous"):
            yield f"step {index} has {len(step.outcomes)} outcomes in the folder {group.folder}"
        for outcome in step.outcomes:
            for tensor, low in outcome.low.items():
                there = ~np.isnan(low)
                if np.any(low[there] > outcome.high[tensor][there]):
                    yield f"{tensor} has an empty interval at step {index}"
    if vector.twin:
        id, axes = vector.twin
        twins = [other for other in group.vectors if other.id == id]
        if not twins:
            yield f"its twin {id} is not in the group"
        elif not all(map(_same, _arrays(vector), (np.transpose(x, axes) for x in _arrays(twins[0])))):
            yield f"it does not hold the numbers of its twin {id}"


def _arrays(vector: Vector) -> Iterator[np.ndarray]:
    yield from vector.before.values()
    for step in vector.steps:
        yield step.gradient
        for outcome in step.outcomes:
            yield from outcome.low.values()
            yield from outcome.high.values()


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == np.ascontiguousarray(b).tobytes()


def regenerate(root: Path) -> Iterator[str]:
    """Which files of `root` are not, byte for byte, what the cases give today."""
    fresh = dict(freeze.files())
    for name, content in fresh.items():
        path = root / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.read_bytes() != content:
            yield f"{name} differs from what the cases give"
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name != MANIFEST and name not in fresh:
            yield f"{name} comes from no case"
    if (root / MANIFEST).read_text() != manifest(root):
        yield f"{MANIFEST} does not fit the files"
