"""The terminal's view of a run and of one case."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamp_conformance.diagnose import Diagnosis
from adamp_conformance.implementations import Implementation, resolve
from adamp_conformance.modes import Outcome, Problem
from adamp_conformance.publish.summary import SHORT_DTYPES, count, kinds, margin_text, replay, standings, suspects
from adamp_conformance.results import ERRORED, FAILED, PASSED, SKIPPED, Run
from adamp_conformance.runner import Entry
from adamp_conformance.spec_files import clauses
from adamp_spec import Branch

SHOWN_KINDS = 20


def print_missing(console: Console, missing: Sequence[Implementation]) -> None:
    """Names each backend that is not installed and the command that installs it."""
    for backend, extra in {(x.backend, x.extra): None for x in missing}:
        absent = sorted({module for x in missing if x.backend == backend for module in x.missing})
        console.print(
            f"[yellow]not run[/] {backend}: {', '.join(absent)} not installed;"
            + escape(f' pip install "adamp-parity[{extra},conformance]"')
        )


def print_results(console: Console, run: Run) -> None:
    """One row per implementation: checks passed, worst margin per dtype; then what failed, alike things once."""
    stands = standings(run)
    table = Table(title="checks, and worst margin per dtype", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold", min_width=12)
    for title in ("passed", "fail", "error", "skip", *SHORT_DTYPES.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for x in stands:
        color = "red" if x.counts[FAILED] or x.counts[ERRORED] else "green"
        table.add_row(
            f"[{color}]{escape(x.implementation)}[/]",
            f"{x.counts[PASSED]}/{x.total}",
            *(f"[red]{x.counts[status]}[/]" if x.counts[status] else "0" for status in (FAILED, ERRORED)),
            str(x.counts[SKIPPED]),
            *(margin_text(x.worst[dtype]) if dtype in x.worst else "-" for dtype in SHORT_DTYPES),
        )
    console.print(table)
    console.print("margin: largest |got - expected| / bound of any judged step; at most 1 conforms", style="dim")
    for x in stands:
        console.print(f"{x.implementation}: {x.version}", style="dim", highlight=False)

    def line(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    found = kinds(run.results, FAILED, ERRORED)
    for kind in found[:SHOWN_KINDS]:
        worst = kind.worst
        others = f" (and {count(len(kind.results) - 1, 'check')} alike)" if kind.results[1:] else ""
        where = f"{worst.case} {escape(worst.implementation)} {worst.dtype} {worst.mode}"
        line(f"[red]{worst.status}[/] {where}: {escape(worst.message)}{others}")
    if len(found) > SHOWN_KINDS:
        line(f"... and {len(found) - SHOWN_KINDS} more kinds of failure; --json FILE keeps them all")
    for x in stands:
        if suspected := suspects([result for result in run.results if result.implementation == x.implementation]):
            words = ", ".join(f"[bold]{flag}[/] ({failed} of {total})" for flag, failed, total in suspected[:5])
            line(f"{escape(x.implementation)} fails vectors that are for: {words}")
            if _has_adapter(x.implementation):
                line(f"what it follows instead: {escape(shlex.join(['adamp-parity', 'diagnose', x.implementation]))}")
    if found and _has_adapter(found[0].worst.implementation):
        line(f"look closer: {escape(replay(found[0].worst))}")


def _has_adapter(name: str) -> bool:
    """Whether --adapter takes the name: recorded answers have none."""
    try:
        return bool(resolve(name))
    except ValueError:
        return False


def print_explanation(
    console: Console, entry: Entry, implementation: str, problem: Problem | None, outcome: Outcome
) -> None:
    """Clauses, inputs, legal interval, got and margin of the worst step of a case, tensor by tensor."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(f"[bold]{entry.id}[/] {implementation}: {escape(entry.purpose)}")
    for label in entry.clauses:
        line(f"[bold]{label}[/] {escape(clauses()[label])}")
    step = outcome.worst
    if problem and step:
        line(f"hyperparameters {problem.case.hyper}")
    if problem and step and not step.verdict.problem:
        for name, gradient in step.gradients.items():
            branches = (Branch(b).name.lower() for b in step.verdict.branches[name].ravel())
            line(f"\n[bold]{name}[/] {escape(str(list(gradient.shape)))} {problem.layouts()[name]}")
            line(f"  branch {', '.join(branches)}, step {step.after.step}, {problem.dtype}")
            for x in problem.elements(step, name).values():
                line(f"  {x.tensor}{escape(str(list(x.at)))} was {x.before}, gradient {x.gradient}")
                line(f"    legal {x.low} to {x.high}, got {x.got}, margin {x.margin:.3g}")
    line(f"[red]{escape(outcome.problem)}[/]" if outcome.problem else "[green]conforms[/]")


def print_diagnosis(console: Console, implementation: str, found: Diagnosis) -> None:
    """Which rule an implementation follows at each choice point, with the vectors that tell."""
    title = f"{implementation}, {found.algorithm}: {found.conforming} of {found.answers} one-step vectors conform"
    table = Table("choice", "follows", "rule", "vectors that tell", title=title, title_justify="left")
    for point, option, telling, explained in found.findings:
        told = telling or option.mutant
        evidence = "vectors for other mistakes" if told else "none: cannot be told"
        evidence = f"{explained} of {telling}" if telling else evidence
        color = "yellow" if option.mutant else "green"
        follows = f"[{color}]{option.name.replace('_', ' ')}[/]"
        rule = option.rule if not option.mutant else f"{option.rule} (ours: {point.options[0].rule})"
        table.add_row(point.name.replace("_", " "), follows if told else "-", escape(rule) if told else "", evidence)
    console.print(table)
    for mutant in found.others:
        text = f"and it behaves like the wrong optimizer [bold]{mutant.id}[/], which violates {mutant.clause}: "
        console.print(text + escape(clauses()[mutant.clause]), highlight=False)
    for what, left in (
        ("vectors make it raise", [answer for answer in found.unexplained if answer.after is None]),
        ("answers fit no rule that is known", [answer for answer in found.unexplained if answer.after is not None]),
    ):
        if left:
            ids = [f"{answer.vector.id} in {answer.group.dtype}" for answer in left]
            console.print(f"[red]{len(ids)} {what}[/], such as {', '.join(ids[:3])}", highlight=False)
