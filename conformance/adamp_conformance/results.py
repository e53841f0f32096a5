"""What a run found: one record per check, kept as JSON lines that their schema closes."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from adamp_conformance.spec_files import spec_file
from adamp_spec import SPEC_VERSION

PASSED, FAILED, ERRORED, SKIPPED = STATUSES = ("passed", "failed", "errored", "skipped")

EXIT_CONFORMS, EXIT_FAILED, EXIT_ADAPTER, EXIT_CORPUS = range(4)


@dataclass(frozen=True)
class Result:
    """One check: an implementation, a case, a dtype and a mode.

    Attributes:
      status: `passed`; `failed`, it does not conform; `errored`, the adapter raised; `skipped`, the
        implementation does not support the dtype or the algorithm.
      margin: largest |got - expected| / bound of a judged step; None where nothing is judged by a bound.
      ambiguous: whether more than one outcome was legal at some step.
      message: what is wrong, or why it was skipped; empty when passed.
      seconds: how long it took.
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


def exit_code(results: Iterable[Result]) -> int:
    """0 conforms, 1 does not, 2 an adapter failed, 3 nothing was checked."""
    counts = Counter(result.status for result in results)
    if counts[FAILED]:
        return EXIT_FAILED
    if counts[ERRORED]:
        return EXIT_ADAPTER
    return EXIT_CONFORMS if counts[PASSED] else EXIT_CORPUS


def write(path: Path, results: list[Result], device: str, versions: dict[str, str], missing: list[str]) -> None:
    """Writes header, results and footer; every line is checked against `result.schema.json` first.

    Raises:
      jsonschema.ValidationError: a record does not fit the schema, which is a bug of the harness.
    """
    header = {
        "kind": "header",
        "spec": SPEC_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "numpy": np.__version__,
        "device": device,
        "implementations": versions,
        "missing": missing,
    }
    counts = Counter(result.status for result in results)
    footer = {"kind": "footer", "exit_code": exit_code(results), **{status: counts[status] for status in STATUSES}}
    records = [header, *({"kind": "result", **_finite(asdict(result))} for result in results), footer]
    validator = jsonschema.Draft202012Validator(json.loads(spec_file("schema/result.schema.json").read_text()))
    for record in records:
        validator.validate(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return record | {"margin": "infinite"} if record["margin"] == np.inf else record
