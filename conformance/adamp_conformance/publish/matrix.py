"""The matrices of implementations by dtype and by clause, for a page of the documentation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from adamp_conformance.publish.summary import SHORT_DTYPES
from adamp_conformance.results import PASSED, SKIPPED, Result, Run
from adamp_conformance.spec_files import clauses

BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
_DTYPE = "float32"


def renew(page: str, run: Run) -> str:
    """The page with the matrices of this run between its two markers.

    Raises:
      ValueError: a marker is missing, or the run is a selection.
    """
    if run.selection:
        raise ValueError(f"the results are those of a selection, {run.selection}; the page needs all cases")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, between which the matrices are written")
    return "\n".join([before + BEGIN, *_lines(run), END + after])


def _lines(run: Run) -> Iterator[str]:
    yield "Checks that pass, of those that apply, by type:"
    yield ""
    yield from _table(run, list(SHORT_DTYPES), lambda result: (result.dtype,))
    yield ""
    yield f"And in {_DTYPE} by clause; a check counts for every clause that its case tests, whichever it violates:"
    yield ""
    yield from _table(run, list(clauses()), lambda result: result.clauses if result.dtype == _DTYPE else ())


def _table(run: Run, rows: list[str], keys: Callable[[Result], tuple[str, ...]]) -> Iterator[str]:
    names = list(run.versions)
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for result in run.results:
        for key in keys(result):
            counts[key, result.implementation][result.status] += 1
    yield f"| | {' | '.join(names)} |"
    yield f"| --- |{' ---: |' * len(names)}"
    for row in rows:
        cells = [_cell(counts[row, name]) for name in names]
        if any(cells):
            yield f"| {row} | {' | '.join(cells)} |"


def _cell(counts: Counter[str]) -> str:
    """Bold where something did not pass."""
    applying = counts.total() - counts[SKIPPED]
    if not applying:
        return ""
    text = f"{counts[PASSED]}/{applying}"
    return text if counts[PASSED] == applying else f"**{text}**"
