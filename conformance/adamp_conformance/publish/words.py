"""What flags and cases mean, in words, as the installed vectors say."""

from __future__ import annotations

import json
from functools import cache

from adamp_conformance.runner import catalogue
from adamp_conformance.vectors import NOTES, vectors_root


@cache
def notes() -> dict[str, str]:
    """Flag -> what the mistake does."""
    return {flag: note["effect"] for flag, note in json.loads((vectors_root() / NOTES).read_text()).items()}


@cache
def purposes() -> dict[str, str]:
    """Case -> what it is for."""
    return {case: entry.purpose for case, entry in catalogue().items()}
