"""The vectors as source code or arrays, for programs that are to be checked without JSON and without Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adamp_conformance.adapter import MOMENTS
from adamp_conformance.bits import float_to_hex, to_hex
from adamp_conformance.vectors import Corpus, Group, Vector
from adamp_spec import SPEC_VERSION


def export(
    corpus: Corpus, language: str, target: Path, dtypes: Sequence[str] = (), algorithms: Sequence[str] = ()
) -> int:
    """Writes vectors for programs of one language; what must be refused is not among them.

    Args:
      corpus: the vectors.
      language: `c`, one header, for C11 and C++; `rust`, one module; `npz`, a NumPy file per group.
      target: the file, or for `npz` the folder, to write.
      dtypes, algorithms: which to write; none given means all.

    Returns:
      How many vectors were written.

    Raises:
      ValueError: the language is unknown, or no vector is of these dtypes and algorithms.
    """
    if language not in LANGUAGES:
        raise ValueError(f"there is no export for {language!r}; use one of {', '.join(LANGUAGES)}")
    groups = [
        group
        for group in corpus.groups
        if (not dtypes or group.dtype in dtypes) and (not algorithms or group.algorithm in algorithms)
    ]
    if not groups:
        raise ValueError(f"no vector is of dtype {', '.join(dtypes) or 'any'} and of {', '.join(algorithms) or 'any'}")
    LANGUAGES[language](groups, target)
    return sum(len(group.vectors) for group in groups)


def _tensors(group: Group) -> tuple[str, ...]:
    return ("p", *MOMENTS[group.algorithm])


def _words(x: np.ndarray) -> list[str]:
    """The bit pattern of each element as a literal."""
    text, digits = to_hex(x), 2 * x.dtype.itemsize
    return [f"0x{text[i : i + digits]}" for i in range(0, len(text), digits)]


def _axes(vector: Vector) -> dict[str, tuple[int, ...]]:
    """Where the rows are: the view written out, axes counted from the front, no channel where nothing is projected."""
    view = vector.shape if vector.layout.view is None else vector.layout.view
    rows = vector.layout.rows(vector.shape)
    return {"shape": vector.shape, "view": view, "batch": rows.batch, "channel": rows.channel}


def _purpose(vector: Vector) -> str:
    return f"{vector.purpose} ({', '.join(vector.flags)})" if vector.flags else vector.purpose


# C

_C_TYPES = """\
#ifndef ADAMP_VECTORS_H
#define ADAMP_VECTORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct { size_t count; const size_t *at; } AdampVectorAxes;

/* A result conforms when it lies in the intervals of one outcome. Arrays are p, m and, for adamp, v. */
typedef struct {
    const char *branch; /* of each slice of the batch axes: none, channel or layer, with commas between them */
    const void *lo[3], *hi[3];
} AdampVectorOutcome;

typedef struct { const void *g; size_t outcome_count; const AdampVectorOutcome *outcomes; } AdampVectorStep;

/* Tensors are arrays of bit patterns: uint64_t for float64, uint32_t for float32, uint16_t for half precision. They
   are row-major, and NULL without elements. Axes count from 0. */
typedef struct {
    const char *id, *group, *algorithm, *dtype;
    double lr, beta1, beta2, momentum, dampening, eps, weight_decay, delta, wd_ratio;
    bool nesterov, project_momentum;
    uint64_t step; /* taken before */
    size_t count;  /* of elements */
    AdampVectorAxes shape, view, batch, channel; /* no channel: never projected */
    const void *before[3];
    size_t step_count;
    const AdampVectorStep *steps;
} AdampVector;
"""

_C_HYPER = ("lr", "beta1", "beta2", "momentum", "dampening", "eps", "weight_decay", "delta", "wd_ratio")
_FLAGS = ("nesterov", "project_momentum")


def _write_c(groups: list[Group], target: Path) -> None:
    lines = [f"/* {_title(groups)} */\n", _C_TYPES]
    entries = []
    numbered = ((group, vector) for group in groups for vector in group.vectors)
    for number, (group, vector) in enumerate(numbered):
        lines.append(f"\n/* {vector.id}: {_purpose(vector)} */")
        entries.append(_c_vector(f"v{number}", group, vector, lines))
    lines += [
        "#define ADAMP_VECTOR_COUNT (sizeof ADAMP_VECTORS / sizeof *ADAMP_VECTORS)",
        "static const AdampVector ADAMP_VECTORS[] = {",
    ]
    lines += [f"{entry}," for entry in entries]
    lines += ["};", "", "#endif"]
    target.write_text("\n".join(lines) + "\n")


def _title(groups: list[Group]) -> str:
    count = sum(len(group.vectors) for group in groups)
    return f"{count} vectors of AdamP and SGDP, specification {SPEC_VERSION}; PROTOCOL.md says how to check by them."


def _c_vector(name: str, group: Group, vector: Vector, lines: list[str]) -> str:
    """The entry of the table; the arrays that it points to are added to `lines`."""
    word = f"uint{8 * vector.before['p'].dtype.itemsize}_t"

    def array(key: str, x: np.ndarray) -> str:
        if not x.size:
            return "NULL"
        lines.append(f"static const {word} {name}_{key}[] = {{{','.join(_words(x))}}};")
        return f"{name}_{key}"

    def tensors(key: str, arrays: dict[str, np.ndarray]) -> str:
        return _braces(array(f"{key}_{tensor}", arrays[tensor]) for tensor in _tensors(group))

    def axes(key: str, value: tuple[int, ...]) -> str:
        if not value:
            return "{0, NULL}"
        lines.append(f"static const size_t {name}_{key}[] = {_braces(map(str, value))};")
        return f"{{{len(value)}, {name}_{key}}}"

    steps = []
    for index, step in enumerate(vector.steps):
        outcomes = [
            _braces(
                [
                    _quoted(",".join(outcome.branch)),
                    tensors(f"{index}_{number}_lo", outcome.low),
                    tensors(f"{index}_{number}_hi", outcome.high),
                ]
            )
            for number, outcome in enumerate(step.outcomes)
        ]
        gradient = array(f"{index}_g", step.gradient)
        lines.append(f"static const AdampVectorOutcome {name}_{index}[] = {_braces(outcomes)};")
        steps.append(_braces([gradient, str(len(outcomes)), f"{name}_{index}"]))
    entry = [
        *map(_quoted, (vector.id, group.id, group.algorithm, group.dtype)),
        *(float(group.hyper.get(key, 0.0)).hex() for key in _C_HYPER),
        *(str(group.hyper.get(key, False)).lower() for key in _FLAGS),
        str(group.step),
        str(vector.before["p"].size),
        *(axes(key, value) for key, value in _axes(vector).items()),
        tensors("before", vector.before),
        str(len(steps)),
        f"{name}_steps",
    ]
    lines.append(f"static const AdampVectorStep {name}_steps[] = {_braces(steps)};")
    return _braces(entry)


def _braces(parts: Iterable[str]) -> str:
    return f"{{{', '.join(parts)}}}"


def _quoted(text: str) -> str:
    return json.dumps(text)  # ids and names are ASCII: the same literal in C and Rust


# Rust

_RUST_TYPES = """\
/// Tensors are slices of bit patterns, row-major: `f32::from_bits(x as u32)`, `f64::from_bits(x)`, 16 bits for half
/// precision. A result conforms when it lies in the intervals of one outcome.
pub struct Vector {
    pub id: &'static str,
    pub group: &'static str,
    pub algorithm: &'static str,
    pub dtype: &'static str,
    /// Bit patterns of `f64`, by the specification's names.
    pub hyper: &'static [(&'static str, u64)],
    pub nesterov: bool,
    pub project_momentum: bool,
    /// Steps taken before.
    pub step: u64,
    pub shape: &'static [usize],
    pub view: &'static [usize],
    pub batch: &'static [usize],
    /// Empty for a tensor that is never projected.
    pub channel: &'static [usize],
    /// p, m and, for adamp, v.
    pub before: &'static [&'static [u64]],
    /// Per step the gradient and the outcomes: the branch of each slice, the lowest p, m, v and the highest.
    #[allow(clippy::type_complexity)]
    pub steps: &'static [(
        &'static [u64],
        &'static [(&'static [&'static str], &'static [&'static [u64]], &'static [&'static [u64]])],
    )],
}
"""


def _write_rust(groups: list[Group], target: Path) -> None:
    count = sum(len(group.vectors) for group in groups)
    lines = [f"// {_title(groups)}\n", _RUST_TYPES, f"pub static VECTORS: [Vector; {count}] = ["]
    lines += [line for group in groups for vector in group.vectors for line in _rust_vector(group, vector)]
    target.write_text("\n".join([*lines, "];"]) + "\n")


def _rust_vector(group: Group, vector: Vector) -> Iterator[str]:
    def array(x: np.ndarray) -> str:
        return _slice(_words(x))

    def tensors(arrays: dict[str, np.ndarray]) -> str:
        return _slice(array(arrays[tensor]) for tensor in _tensors(group))

    hyper = [f"({_quoted(key)}, 0x{float_to_hex(x)})" for key, x in group.hyper.items() if not isinstance(x, bool)]
    yield f"    // {_purpose(vector)}"
    yield "    Vector {"
    yield f"        id: {_quoted(vector.id)},"
    yield f"        group: {_quoted(group.id)},"
    yield f"        algorithm: {_quoted(group.algorithm)},"
    yield f"        dtype: {_quoted(group.dtype)},"
    yield f"        hyper: {_slice(hyper)},"
    yield from (f"        {flag}: {str(group.hyper.get(flag, False)).lower()}," for flag in _FLAGS)
    yield f"        step: {group.step},"
    yield from (f"        {key}: {_slice(map(str, value))}," for key, value in _axes(vector).items())
    yield f"        before: {tensors(vector.before)},"
    yield "        steps: &["
    for step in vector.steps:
        outcomes = (f"({_slice(map(_quoted, x.branch))}, {tensors(x.low)}, {tensors(x.high)})" for x in step.outcomes)
        yield f"            ({array(step.gradient)}, {_slice(outcomes)}),"
    yield "        ],"
    yield "    },"


def _slice(parts: Iterable[str]) -> str:
    return f"&[{', '.join(parts)}]"


# NumPy


def _write_npz(groups: list[Group], target: Path) -> None:
    for group in groups:
        path = target / f"{group.id}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"algorithm": group.algorithm, "dtype": group.dtype, "step": group.step}
        arrays |= {f"hyper/{key}": value for key, value in group.hyper.items()}
        for vector in group.vectors:
            arrays |= {f"{vector.id}/{key}": value for key, value in _npz_vector(vector)}
        np.savez(path, **arrays)


def _npz_vector(vector: Vector) -> Iterator[tuple[str, Any]]:
    for key, axes in _axes(vector).items():
        yield key, np.array(axes, np.int64)
    for tensor, x in vector.before.items():
        yield f"before/{tensor}", _plain(x)
    for index, step in enumerate(vector.steps):
        yield f"{index}/g", _plain(step.gradient)
        for number, outcome in enumerate(step.outcomes):
            yield f"{index}/{number}/branch", np.array(outcome.branch, "U7")
            for tensor in outcome.low:
                yield f"{index}/{number}/{tensor}/lo", _plain(outcome.low[tensor])
                yield f"{index}/{number}/{tensor}/hi", _plain(outcome.high[tensor])


def _plain(x: np.ndarray) -> np.ndarray:
    """Bit patterns in place of bfloat16, which NumPy alone cannot read."""
    return x.view(np.uint16) if x.dtype.name == "bfloat16" else x


LANGUAGES: dict[str, Callable[[list[Group], Path], None]] = {"c": _write_c, "rust": _write_rust, "npz": _write_npz}
