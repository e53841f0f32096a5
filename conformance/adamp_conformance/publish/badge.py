"""Badges: the JSON that an endpoint badge of shields.io reads."""

from __future__ import annotations

import json
import re

from adamp_conformance.publish.summary import SHORT_DTYPES, margin_text, standings
from adamp_conformance.results import ERRORED, EXPECTED, FAILED, PASSED, SKIPPED, Run


def render_badges(run: Run) -> dict[str, str]:
    """File name -> badge of one implementation, which says the specification's version and what was counted.

    Everything that was selected is in the denominator; what was skipped or failed as expected did not pass.
    """
    found = {}
    for x in standings(run):
        mine = [result for result in run.results if result.implementation == x.implementation]
        algorithms = "+".join(name for key, name in _ALGORITHMS.items() if any(y.algorithm == key for y in mine))
        dtypes = " ".join(short for dtype, short in SHORT_DTYPES.items() if any(y.dtype == dtype for y in mine))
        worst = f" worst {margin_text(max(x.worst.values()))}" if x.worst else ""
        badge = {
            "schemaVersion": 1,
            "label": f"{algorithms} {run.spec} {dtypes}{' (selection)' if run.selection else ''}",
            "message": f"{x.counts[PASSED]}/{x.total}{worst}",
            "color": _COLORS[x.status] if x.counts[PASSED] or x.status in (FAILED, ERRORED) else "lightgrey",
        }
        found[f"{re.sub(r'[^A-Za-z0-9._]+', '-', x.implementation)}.json"] = json.dumps(badge) + "\n"
    return found


_ALGORITHMS = {"adamp": "AdamP", "sgdp": "SGDP"}
_COLORS = {PASSED: "brightgreen", SKIPPED: "yellowgreen", EXPECTED: "yellow", FAILED: "red", ERRORED: "red"}
