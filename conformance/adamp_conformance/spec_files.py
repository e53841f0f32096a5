"""Where the specification's text, tables and schemas lie: inside the wheel, or in `spec/` of a checkout."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE / "spec" if (_HERE / "spec").is_dir() else _HERE.parent.parent / "spec"


def spec_file(name: str) -> Path:
    """The path of a file of the specification, such as `SPEC.md`.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path = _ROOT / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing from {_ROOT}; the installation is incomplete")
    return path


@cache
def clauses() -> dict[str, str]:
    """Label -> text of every clause of SPEC.md, such as `ADAMP-1`.

    Raises:
      ValueError: a label is defined twice.
    """
    found: dict[str, str] = {}
    for label, text in re.findall(
        r"^\*\*\[([A-Z]+-\d+)\]\*\* (.+?)(?=\n\n|\n\*\*\[|\Z)", spec_file("SPEC.md").read_text(), re.M | re.S
    ):
        if label in found:
            raise ValueError(f"clause {label} is defined twice in SPEC.md")
        found[label] = " ".join(text.split())
    return found
