"""What every report says: how each implementation stands, what failed and why, in words."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adamp_conformance.results import ERRORED, EXPECTED, FAILED, PASSED, SKIPPED, Element, Result, Run
from adamp_conformance.spec_files import clauses

SHORT_DTYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Standing:
    """How one implementation stands.

    Attributes:
      counts: status -> number of checks.
      partial: whether only a selection of the cases was run.
      worst: dtype -> largest margin; a dtype in which nothing was judged by a bound is absent.
    """

    implementation: str
    version: str
    counts: Counter[str]
    partial: bool
    worst: dict[str, float]

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def status(self) -> str:
        """The worst that was found: one failure is a failure."""
        order = (FAILED, ERRORED, EXPECTED, SKIPPED, PASSED)
        return next(status for status in order if self.counts[status])

    @property
    def verdict(self) -> str:
        """One line for a person."""
        if self.counts[FAILED]:
            return "does not conform"
        if self.counts[ERRORED]:
            return "could not be judged: its adapter failed"
        if not self.counts[PASSED]:
            return "nothing passed"
        if self.counts[EXPECTED]:
            return f"conforms but for {count(self.counts[EXPECTED], 'expected failure')}"
        verdict = "conforms in all that it supports" if self.counts[SKIPPED] else "conforms"
        return f"{verdict}, in a selection of the cases" if self.partial else verdict


def standings(run: Run) -> list[Standing]:
    """One per implementation that has results, in their order."""
    by_implementation: dict[str, list[Result]] = defaultdict(list)
    for result in run.results:
        by_implementation[result.implementation].append(result)
    return [
        Standing(
            name,
            run.versions[name],
            Counter(result.status for result in mine),
            bool(run.selection),
            {dtype: worst for dtype in SHORT_DTYPES if (worst := worst_margin(mine, dtype)) is not None},
        )
        for name, mine in by_implementation.items()
    ]


def worst_margin(results: Iterable[Result], dtype: str | None = None) -> float | None:
    """The largest margin, None where nothing was judged by a bound."""
    return max((x.margin for x in results if x.margin is not None and dtype in (None, x.dtype)), default=None)


def margin_text(margin: float) -> str:
    """A margin with three decimals; one above 1, however little, never reads as 1."""
    return f"{margin:.3f}" if margin <= 1 else f"{max(margin, 1.001):.4g}"


def count(number: int, noun: str) -> str:
    """`1 failure`, `2 failures`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def family(case: str) -> str:
    """`adamp/views` of `adamp/views/channel`: the vectors that share hyperparameters, or a run."""
    return "/".join(case.split("/")[:2])


@dataclass(frozen=True)
class Kind:
    """Results that went wrong alike: one implementation, one status, one family, and one message but for its numbers.

    Attributes:
      results: the one with the largest margin first.
    """

    results: tuple[Result, ...]

    @property
    def worst(self) -> Result:
        return self.results[0]

    @property
    def family(self) -> str:
        return family(self.worst.case)


def kinds(results: Iterable[Result], *statuses: str) -> list[Kind]:
    """Results of these statuses by kind, the most frequent first."""
    alike: dict[tuple[object, ...], list[Result]] = defaultdict(list)
    for result in results:
        if result.status in statuses:
            message = _VARYING.sub("*", result.message)
            alike[result.implementation, result.status, family(result.case), message].append(result)
    found = [Kind(tuple(sorted(some, key=lambda x: -(x.margin or 0.0)))) for some in alike.values()]
    return sorted(found, key=lambda kind: (statuses.index(kind.worst.status), -len(kind.results)))


def suspects(results: Sequence[Result]) -> list[tuple[str, int, int]]:
    """(flag, vectors that failed, all vectors) of the mistakes that failing vectors are for.

    Those come first that most failing and fewest passing vectors are for (the harmonic mean of both shares); an
    algorithm of which nothing failed says nothing.
    """
    vectors = [result for result in results if result.flags and result.status != SKIPPED]
    failing = [result for result in vectors if result.status == FAILED]
    algorithms = {_algorithm(result) for result in failing}
    total = Counter(flag for result in vectors if _algorithm(result) in algorithms for flag in result.flags)
    failed = Counter(flag for result in failing for flag in result.flags)
    found = [(flag, failed[flag], total[flag]) for flag in failed]
    return sorted(found, key=lambda x: -x[1] / (x[2] + len(failing)))


def _algorithm(result: Result) -> str:
    return result.case.partition("/")[0]


_VARYING = re.compile(r"'[^']*'|\b[pmv] of\b|\[[^\]]*\]|0x[0-9a-f]+|\b(?:inf|nan|\d[\d.]*(?:e[+-]?\d+)?)\b")


def replay(result: Result) -> str:
    """The command that shows the same again."""
    where = ["--adapter", result.implementation, "--dtype", result.dtype]
    if result.mode in ("step", "refuse", "shadow"):
        return shlex.join(["adamp-parity", "explain", result.case, *where])
    return shlex.join(["adamp-parity", "run", *where, "--mode", result.mode, "-k", result.case])


def place(element: Element) -> str:
    """Which element: `p[3, 5] of 'dense' at step 1, branch channel`."""
    branch = f", branch {', '.join(dict.fromkeys(element.branch))}" if element.branch else ""
    return f"{element.tensor}{list(element.at)} of {element.parameter!r} at step {element.step}{branch}"


def explanation(result: Result, notes: Mapping[str, str], purposes: Mapping[str, str]) -> str:
    """All that is known of a result that is not a pass, as lines of plain text."""
    lines: list[str] = [result.message]
    if purpose := purposes.get(result.case):
        lines.append(f"the case: {purpose}")
    lines += [f"{label}: {clauses().get(label, NO_CLAUSE)}" for label in result.clauses]
    lines += [f"meant to catch {flag}{': ' + notes[flag] if flag in notes else ''}" for flag in result.flags]
    if result.margin is not None:
        lines.append(f"margin {margin_text(result.margin)}; at most 1 conforms")
    if element := result.element:
        lines += [
            place(element),
            f"  before    {element.before}",
            f"  gradient  {element.gradient}",
            f"  legal     {element.low} to {element.high}",
            f"  got       {element.got}",
        ]
    return "\n".join([*lines, f"again: {replay(result)}"])


NO_CLAUSE = "not a clause of this version of the specification"


def skips(results: Sequence[Result]) -> dict[tuple[str, str], int]:
    """(implementation, reason) -> number of checks that were skipped for it."""
    return Counter((x.implementation, x.message) for x in results if x.status == SKIPPED)
