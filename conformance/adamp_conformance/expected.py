"""Expected failures: what is known not to conform, why, and until when that is accepted.

A file of them is TOML, one table each:

    [[expected]]
    case = "adamp/threshold/*"        # id or glob
    implementation = "keras-*"        # name or glob; without it, every implementation
    dtype = "bfloat16"                # without it, every dtype
    mode = "step"                     # without it, every mode
    reason = "rounds the moments twice"
    url = "https://example.org/issues/12"
    expires = 2027-01-31

It is strict. What an entry speaks of must fail: a check that passes fails because of its entry, an entry that has
expired excuses nothing, and one that speaks of no check at all is refused.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

import jsonschema

from adamp_conformance.results import ERRORED, EXPECTED, FAILED, PASSED, Result
from adamp_conformance.runner import Check
from adamp_conformance.spec_files import spec_file


@dataclass(frozen=True)
class Expectation:
    """One table of the file; `*` matches everything.

    Attributes:
      case, implementation: globs.
      dtype, mode: names or `*`.
      reason: why it fails.
      url: where that is discussed, or empty.
      expires: the last day on which the failure is accepted.
    """

    case: str
    reason: str
    expires: date
    implementation: str = "*"
    dtype: str = "*"
    mode: str = "*"
    url: str = ""

    def speaks_of(self, implementation: str, case: str, dtype: str, mode: str) -> bool:
        return (
            fnmatchcase(case, self.case)
            and fnmatchcase(implementation, self.implementation)
            and self.dtype in ("*", dtype)
            and self.mode in ("*", mode)
        )

    def __str__(self) -> str:
        where = [self.case, *(x for x in (self.implementation, self.dtype, self.mode) if x != "*")]
        return f"the expected failure {' '.join(where)!r}"


def read(path: Path, checks: Iterable[Check]) -> tuple[Expectation, ...]:
    """The entries of a file, each of which must speak of one of `checks`.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not TOML, not what `expected.schema.json` says, or an entry speaks of no check.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML ({error})") from error
    plain = json.loads(json.dumps(document, default=str))  # dates become text, as the schema knows them
    schema = json.loads(spec_file("schema/expected.schema.json").read_text())
    for fault in jsonschema.Draft202012Validator(schema).iter_errors(plain):
        raise ValueError(f"{path}: {fault.json_path}: {fault.message}")
    known = {(check.implementation.name, check.case, check.dtype, check.mode) for check in checks}
    entries = []
    for index, table in enumerate(plain["expected"]):
        try:
            entry = Expectation(**table | {"expires": date.fromisoformat(table["expires"])})
        except ValueError as error:
            raise ValueError(f"{path}: $.expected[{index}].expires: {error}") from error
        if not any(entry.speaks_of(*check) for check in known):
            raise ValueError(f"{path}: {entry} speaks of no check of this suite; correct it or remove it")
        entries.append(entry)
    return tuple(entries)


def apply(results: Iterable[Result], entries: Sequence[Expectation], today: date) -> list[Result]:
    """The results after what was expected: a failure that an entry excuses has the status `expected`.

    A check that passed although an entry speaks of it, and a failure whose entry expired before `today`, have failed.
    What was skipped stays so.
    """
    return [_applied(result, entries, today) for result in results]


def _applied(result: Result, entries: Sequence[Expectation], today: date) -> Result:
    mine = [x for x in entries if x.speaks_of(result.implementation, result.case, result.dtype, result.mode)]
    if not mine or result.status not in (PASSED, FAILED, ERRORED):
        return result
    if result.status == PASSED:
        why = f"passed, against {mine[0]} ({mine[0].reason}): remove the entry, or narrow it to what fails"
        return replace(result, status=FAILED, message=why)
    if overdue := [entry for entry in mine if entry.expires < today]:
        why = f"{overdue[0]} expired on {overdue[0].expires}: mend what fails, or give the entry another day"
        return replace(result, status=FAILED, message=f"{result.message} ({why})")
    why = " ".join(filter(None, (mine[0].reason, mine[0].url)))
    return replace(result, status=EXPECTED, message=f"{result.message} (expected until {mine[0].expires}: {why})")
