"""The Markdown summary, made for the step summary of a continuous integration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape

from adamp_conformance.publish.summary import (
    SHORT_DTYPES,
    Kind,
    count,
    explanation,
    kinds,
    margin_text,
    skips,
    standings,
)
from adamp_conformance.results import ERRORED, EXPECTED, FAILED, PASSED, SKIPPED, STATUSES, Run

SHOWN_KINDS = 20


def render_markdown(run: Run, notes: Mapping[str, str], purposes: Mapping[str, str]) -> str:
    """A table with one row per implementation, then what failed, folded."""
    return "\n".join(_lines(run, notes, purposes)) + "\n"


def _lines(run: Run, notes: Mapping[str, str], purposes: Mapping[str, str]) -> Iterator[str]:
    yield f"### AdamP and SGDP, specification {run.spec}"
    yield ""
    yield _row("", "verdict", *STATUSES, *SHORT_DTYPES.values())
    yield _row("---", "---", *["---:"] * (len(STATUSES) + len(SHORT_DTYPES)))
    for x in standings(run):
        margins = [margin_text(x.worst[dtype]) if dtype in x.worst else "-" for dtype in SHORT_DTYPES]
        numbers = [f"{x.counts[PASSED]}/{x.total}", *(str(x.counts[status]) for status in STATUSES[1:])]
        yield _row(_escaped(x.implementation), f"{_SIGNS[x.status]} {x.verdict}", *numbers, *margins)
    yield ""
    yield "Under a dtype: the worst margin, the largest |got - expected| / bound of a judged step. At most 1 conforms."
    if run.missing:
        yield ""
        yield f"Not installed and so not run: {', '.join(map(_escaped, run.missing))}."
    for status, title in (
        (FAILED, "failed"),
        (ERRORED, "errored: the adapter raised"),
        (EXPECTED, "failed as expected"),
    ):
        found = kinds(run.results, status)
        if found:
            yield ""
            yield f"#### {count(sum(len(kind.results) for kind in found), 'check')} {title}"
        for kind in found[:SHOWN_KINDS]:
            yield from _kind(kind, notes, purposes)
        if len(found) > SHOWN_KINDS:
            yield ""
            yield f"and {count(len(found) - SHOWN_KINDS, 'more kind')}, in the result file."
    skipped = skips(run.results)
    if skipped:
        yield ""
        yield "#### Skipped"
        yield ""
        yield from (f"- {_escaped(name)}: {number}, {_escaped(reason)}" for (name, reason), number in skipped.items())
    yield ""
    where = f"Python {run.python}, NumPy {run.numpy}, {run.platform}, {run.device}"
    versions = [f"{name}: {version}" for name, version in run.versions.items()]
    yield "<sub>" + "; ".join(map(_escaped, [where, *versions])) + "</sub>"


def _kind(kind: Kind, notes: Mapping[str, str], purposes: Mapping[str, str]) -> Iterator[str]:
    worst = kind.worst
    what = f"{worst.implementation}, {kind.family}, {count(len(kind.results), 'check')}"
    text = f"{worst.implementation} {worst.case} {worst.dtype} {worst.mode}\n{explanation(worst, notes, purposes)}"
    yield ""
    # HTML, because a fence in somebody's message would end a fenced block; a blank line would end the HTML.
    yield f"<details><summary>{escape(what)}: {escape(' '.join(worst.message.split()))}</summary>"
    yield f"<pre>{escape(chr(10).join(line for line in text.splitlines() if line.strip()), quote=False)}</pre>"
    yield "</details>"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """As it stands, on one line: nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]|~&<])", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


_SIGNS = {PASSED: "✅", FAILED: "❌", ERRORED: "💥", SKIPPED: "⏭️", EXPECTED: "🟡"}
