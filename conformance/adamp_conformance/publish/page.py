"""The HTML page: one file that asks nothing of the network and runs no script."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from adamp_conformance.publish import summary
from adamp_conformance.publish.summary import (
    NO_CLAUSE,
    SHORT_DTYPES,
    Kind,
    Standing,
    margin_text,
    standings,
    worst_margin,
)
from adamp_conformance.results import ERRORED, EXPECTED, FAILED, PASSED, SKIPPED, STATUSES, Result, Run
from adamp_conformance.spec_files import clauses

SHOWN_KINDS = 30  # of one implementation
SHOWN_CHECKS = 20  # of one kind

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Section:
    """Results that went wrong: implementation -> kinds.

    The n-th kind of the m-th implementation has the id `anchor-m-n`, the implementation itself `anchor-m`, from 1.
    """

    anchor: str
    title: str
    kinds: dict[str, list[Kind]]


@dataclass(frozen=True)
class Cell:
    """Some checks of one implementation.

    Attributes:
      status: the worst among them; skips are ignored where something was checked.
      margin: the largest in float64 and float32, None where nothing was judged by a bound; in half
        precision it is near 1 whatever is done.
      link: id of the place that explains one of its failures, empty for none.
    """

    status: str
    passed: int
    total: int
    margin: float | None
    link: str


@dataclass(frozen=True)
class Row:
    """A row of a table with one column per implementation; None where it has no such check."""

    name: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Panel:
    """One implementation's drift: points of a polyline, and the drift at the end in words."""

    implementation: str
    points: str
    end: str


@dataclass(frozen=True)
class Plot:
    """The drift of all implementations in one run, on one scale of decades; `ticks` are (y, label)."""

    title: str
    ticks: list[tuple[float, str]]
    panels: list[Panel]


# The colour scale of margins: (largest margin, label); what is above the last but one does not conform.
HEATS = [(0.25, "0 to 0.25"), (0.5, "to 0.5"), (0.75, "to 0.75"), (0.9, "to 0.9"), (1.0, "to 1"), (math.inf, "above 1")]

# left, top, right and bottom edge of the plotted area, in the units of the picture
LEFT, TOP, RIGHT, BOTTOM = 42, 6, 196, 92


def render_html(run: Run, notes: Mapping[str, str], purposes: Mapping[str, str]) -> str:
    """The page as text.

    Args:
      run: the run.
      notes: flag -> what the mistake is.
      purposes: case -> what it is for.
    """
    environment = Environment(
        loader=PackageLoader("adamp_conformance"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code": _code,
        "margin": margin_text,
        "heat": _heat,
        "short": lambda dtype: SHORT_DTYPES[dtype],
        "count": summary.count,
        "place": summary.place,
        "replay": summary.replay,
    }
    stands = standings(run)
    sections = [
        _section("failures", "What failed", run, stands, FAILED, ERRORED),
        _section("expected", "What failed as expected", run, stands, EXPECTED),
    ]
    links = _links(sections)
    columns = [x.implementation for x in stands]
    texts = clauses() | {x: NO_CLAUSE for result in run.results for x in result.clauses if x not in clauses()}
    by_label = {label: [x for x in run.results if label in x.clauses] for label in texts}
    chapters = _grouped(texts, lambda label: label.split("-")[0])
    return environment.get_template("report.html.j2").render(
        run=run,
        standings=stands,
        counts=Counter(result.status for result in run.results),
        statuses=STATUSES,
        sections=[section for section in sections if section.kinds],
        shown_kinds=SHOWN_KINDS,
        shown_checks=SHOWN_CHECKS,
        skips=summary.skips(run.results),
        places=_places(sections),
        chapters={
            name: [_row(label, by_label[label], columns, links) for label in labels]
            for name, labels in chapters.items()
        },
        clauses=texts,
        notes=notes,
        purposes=purposes,
        margins=_margins(run.results),
        worst_margin=worst_margin,
        heats=HEATS,
        families=[
            _row(name, some, columns, links)
            for name, some in sorted(_grouped(run.results, lambda x: summary.family(x.case)).items())
        ],
        plots=[_plot(some) for some in _grouped(run.results, _curve).values() if any(x.drift for x in some)],
        edges=(LEFT, TOP, RIGHT, BOTTOM),
    )


Item = TypeVar("Item")


def _grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    found: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)


def _margins(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """(mode, dtype) -> what was judged by a bound; modes in the order of the run, dtypes from wide to narrow."""
    modes = list(_grouped(results, lambda x: x.mode))
    dtypes = list(SHORT_DTYPES)
    judged = _grouped((x for x in results if x.margin is not None), lambda x: (x.mode, x.dtype))
    return dict(sorted(judged.items(), key=lambda item: (modes.index(item[0][0]), dtypes.index(item[0][1]))))


def _curve(result: Result) -> tuple[str, str, str]:
    return result.case, result.dtype, result.mode


def _section(anchor: str, title: str, run: Run, stands: Sequence[Standing], *statuses: str) -> Section:
    kinds = _grouped(summary.kinds(run.results, *statuses), lambda kind: kind.worst.implementation)
    return Section(
        anchor, title, {x.implementation: kinds[x.implementation] for x in stands if x.implementation in kinds}
    )


def _places(sections: Sequence[Section]) -> dict[str, str]:
    """Where what went wrong with each implementation begins."""
    return {name: f"{section.anchor}-{m}" for section in reversed(sections) for m, name in enumerate(section.kinds, 1)}


def _links(sections: Sequence[Section]) -> dict[Result, str]:
    """Where each result that went wrong is explained."""
    return {
        result: f"{section.anchor}-{m}-{n}" if n <= SHOWN_KINDS else f"{section.anchor}-{m}"
        for section in sections
        for m, kinds in enumerate(section.kinds.values(), 1)
        for n, kind in enumerate(kinds, 1)
        for result in kind.results
    }


def _row(name: str, results: Iterable[Result], columns: Iterable[str], links: Mapping[Result, str]) -> Row:
    mine = _grouped(results, lambda x: x.implementation)
    return Row(name, [_cell(mine[x], links) if x in mine else None for x in columns])


def _cell(results: Sequence[Result], links: Mapping[Result, str]) -> Cell:
    counts = Counter(result.status for result in results)
    status = next(x for x in (FAILED, ERRORED, EXPECTED, PASSED, SKIPPED) if counts[x])
    link = next((links[x] for x in results if x.status == status and x in links), "")
    wide = [x for x in results if x.dtype in ("float64", "float32")]
    return Cell(status, counts[PASSED], len(results), worst_margin(wide), link)


def _heat(margin: float) -> int:
    """Which step of the colour scale; a margin that is no number is above all."""
    return next((i for i, (largest, _) in enumerate(HEATS) if margin <= largest), len(HEATS) - 1)


def _plot(results: Sequence[Result]) -> Plot:
    curves = [x for x in results if x.drift]
    logs = [math.log10(x) for curve in curves for x in curve.drift if 0 < x < math.inf]
    low = math.floor(min(logs, default=-17))
    high = max(math.ceil(max(logs, default=-16)), low + 1)

    def y(drift: float) -> float:
        log = low if drift <= 0 else min(math.log10(drift), high)
        return round(TOP + (high - max(log, low)) / (high - low) * (BOTTOM - TOP), 1)

    def points(drift: Sequence[float]) -> str:
        apart = (RIGHT - LEFT) / max(len(drift) - 1, 1)
        return " ".join(f"{round(LEFT + i * apart, 1):g},{y(x):g}" for i, x in enumerate(drift))

    stride = math.ceil((high - low) / 3)
    ticks = [(y(10.0**decade), f"1e{decade}") for decade in range(low, high + 1, stride)]
    if any(0.0 in curve.drift for curve in curves):
        ticks[0] = ticks[0][0], "0"
    panels = [Panel(x.implementation, points(x.drift), f"{x.drift[-1]:.1e}") for x in curves]
    first = curves[0]
    return Plot(f"{first.case} {first.dtype}", ticks, panels)


def _code(text: str) -> Markup:
    """What stands between backticks becomes code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
