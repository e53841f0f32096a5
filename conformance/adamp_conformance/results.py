"""What a run found: one record per check, kept as JSON lines that their schema closes."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from adamp_conformance.spec_files import spec_file
from adamp_spec import SPEC_VERSION

PASSED, FAILED, ERRORED, SKIPPED, EXPECTED = STATUSES = ("passed", "failed", "errored", "skipped", "expected")

DRIFT_POINTS = 64

EXIT_CONFORMS, EXIT_FAILED, EXIT_ADAPTER, EXIT_CORPUS = range(4)


@dataclass(frozen=True)
class Element:
    """The worst element of a step that failed; numbers are written with as many digits as their dtype has.

    Attributes:
      tensor: `p`, `m` or `v` of `parameter`, at index `at`.
      step: number of the step, counted from 1.
      branch: what each slice of the parameter took, as far as the judge can tell.
      before, gradient: the element's value before the step and its gradient.
      low, got, high: the legal interval and what came instead.
      margin: |got - expected| / bound.
    """

    parameter: str
    tensor: str
    at: tuple[int, ...]
    step: int
    branch: tuple[str, ...]
    before: str
    gradient: str
    low: str
    got: str
    high: str
    margin: float


@dataclass(frozen=True)
class Result:
    """One check: an implementation, a case, a dtype and a mode.

    Attributes:
      case: id of a vector or of a run.
      clauses, flags: the clauses that the case tests and the mistakes that it is for.
      status: `passed`; `failed`, it does not conform; `errored`, the adapter raised; `skipped`, the
        implementation does not support it; `expected`, it failed as a file of expected failures says.
      margin: largest |got - expected| / bound of a judged step; None where nothing is judged by a bound.
      ambiguous: whether more than one outcome was legal at some step.
      message: what is wrong, or why it was skipped; empty when passed.
      seconds: how long it took.
      element: where it failed, None where no single element did.
      drift: of a run, |p - p*| / |p*| over all parameters, p* being the oracle's free run in float64, at
        up to `DRIFT_POINTS` steps that are equally far apart, the last included; empty otherwise.
    """

    implementation: str
    case: str
    algorithm: str
    dtype: str
    mode: str
    status: str
    margin: float | None
    ambiguous: bool
    message: str
    seconds: float
    clauses: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    element: Element | None = None
    drift: tuple[float, ...] = ()


def exit_code(results: Iterable[Result]) -> int:
    """0 conforms, 1 does not, 2 an adapter failed, 3 nothing was checked, of some implementation at least."""
    found = list(results)
    counts = Counter(result.status for result in found)
    if counts[FAILED]:
        return EXIT_FAILED
    if counts[ERRORED]:
        return EXIT_ADAPTER
    passed = {result.implementation for result in found if result.status == PASSED}
    return EXIT_CONFORMS if passed and passed == {result.implementation for result in found} else EXIT_CORPUS


@dataclass(frozen=True)
class Run:
    """Header and results of a run.

    Attributes:
      spec: version of the specification.
      python, platform, numpy, device: what it ran on.
      versions: implementation -> its version and that of what it runs on.
      missing: known backends that were not installed and so not run.
      selection: the options that left cases out, empty where all were run.
      results: one per check.
    """

    spec: str
    python: str
    platform: str
    numpy: str
    device: str
    versions: dict[str, str]
    missing: tuple[str, ...]
    selection: str
    results: tuple[Result, ...]

    @classmethod
    def here(
        cls, results: list[Result], device: str, versions: dict[str, str], missing: list[str], selection: str = ""
    ) -> Run:
        """A run that was made by this process and its children."""
        return cls(
            spec=SPEC_VERSION,
            python=platform.python_version(),
            platform=platform.platform(terse=True),
            numpy=np.__version__,
            device=device,
            versions=versions,
            missing=tuple(missing),
            selection=selection,
            results=tuple(results),
        )

    @property
    def exit_code(self) -> int:
        return exit_code(self.results)


def write(path: Path, run: Run) -> None:
    """Writes header, results and footer; every line is checked against `result.schema.json` first.

    Raises:
      jsonschema.ValidationError: a record does not fit the schema, which is a bug of the harness.
    """
    header = {
        "kind": "header",
        "spec": run.spec,
        "python": run.python,
        "platform": run.platform,
        "numpy": run.numpy,
        "device": run.device,
        "implementations": run.versions,
        "missing": list(run.missing),
        "selection": run.selection,
    }
    footer = {"kind": "footer", **_counts(run.results)}
    records = [header, *({"kind": "result", **_finite(asdict(result))} for result in run.results), footer]
    for record in records:
        _validator(record["kind"]).validate(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _counts(results: Sequence[Result]) -> dict[str, int]:
    counts = Counter(result.status for result in results)
    return {status: counts[status] for status in STATUSES} | {"exit_code": exit_code(results)}


def read(path: Path) -> Run:
    """Reads a result file; each line is checked against `result.schema.json`.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not the whole of one run under this version of the specification.
    """
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    records = [_record(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]
    again = "write it again with adamp-parity run --json"
    if records[0]["kind"] != "header":
        raise ValueError(f"{path}:1: the header is missing; {again}")
    if records[-1]["kind"] != "footer":
        raise ValueError(f"{path}:{len(lines)}: the footer is missing, so the file is incomplete; {again}")
    header, *middle, footer = records
    if header["spec"] != SPEC_VERSION:
        raise ValueError(
            f"{path}:1: made under specification {header['spec']}, this is {SPEC_VERSION}; "
            "use the adamp-parity that made it, or run again"
        )
    first: dict[tuple[str, ...], int] = {}
    for number, record in enumerate(middle, 2):
        if record["kind"] != "result":
            raise ValueError(f"{path}:{number}: a second {record['kind']}; a file holds one run, keep them apart")
        name = record["implementation"]
        if name not in header["implementations"]:
            raise ValueError(f"{path}:{number}: the header does not name the implementation {name!r}; {again}")
        check = name, record["case"], record["dtype"], record["mode"]
        if first.setdefault(check, number) != number:
            raise ValueError(f"{path}:{number}: {' '.join(check)} stands in line {first[check]} already; {again}")
    results = tuple(_result(record) for record in middle)
    for key, value in _counts(results).items():
        if footer[key] != value:
            raise ValueError(f"{path}:{len(lines)}: the footer says {key} {footer[key]}, the results {value}; {again}")
    return Run(
        spec=header["spec"],
        python=header["python"],
        platform=header["platform"],
        numpy=header["numpy"],
        device=header["device"],
        versions=header["implementations"],
        missing=tuple(header["missing"]),
        selection=header["selection"],
        results=results,
    )


def _record(place: str, line: bytes) -> dict[str, Any]:
    """One line that its schema allows."""
    again = "write the file again with adamp-parity run --json"
    try:
        record = json.loads(line, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"{place}: not a whole line of JSON ({error}); {again}") from error
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in ("header", "result", "footer"):
        raise ValueError(f"{place}: kind is {kind!r}, not header, result or footer; {again}")
    for fault in _validator(kind).iter_errors(record):
        raise ValueError(f"{place}: {fault.json_path}: {fault.message}; {again}")
    return record


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of one kind of record: from a failed `oneOf` nobody learns what is wrong."""
    schema = json.loads(spec_file("schema/result.schema.json").read_text())
    return jsonschema.Draft202012Validator({"$defs": schema["$defs"], "$ref": f"#/$defs/{kind}"})


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _result(record: dict[str, Any]) -> Result:
    values = {field.name: record[field.name] for field in fields(Result)}
    element = values["element"]
    if element is not None:
        element = Element(
            **element
            | {
                "at": tuple(element["at"]),
                "branch": tuple(element["branch"]),
                "margin": _number(element["margin"]),
            }
        )
    return Result(
        **values
        | {
            "margin": _number(values["margin"]),
            "clauses": tuple(values["clauses"]),
            "flags": tuple(values["flags"]),
            "element": element,
            "drift": tuple(_number(x) for x in values["drift"]),
        }
    )


def _number(value: Any) -> Any:
    return np.inf if value == "infinite" else value


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return "infinite" if isinstance(value, float) and value == np.inf else value
