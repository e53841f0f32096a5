"""The terminal's view of a run and of one case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamp_conformance.adapter import DTYPES, Capabilities
from adamp_conformance.implementations import Implementation
from adamp_conformance.judge import expected_outcomes
from adamp_conformance.modes import Problem, Step
from adamp_conformance.results import ERRORED, FAILED, PASSED, SKIPPED, Result
from adamp_conformance.spec_files import clauses
from adamp_spec import Bounded, Branch

SHOWN_FAILURES = 20


def print_missing(console: Console, missing: Sequence[Implementation]) -> None:
    """Names each backend that is not installed and the command that installs it."""
    for backend, extra in {(x.backend, x.extra): None for x in missing}:
        absent = sorted({module for x in missing if x.backend == backend for module in x.missing})
        console.print(
            f"[yellow]not run[/] {backend}: {', '.join(absent)} not installed;"
            + escape(f' pip install "adamp-parity[{extra},conformance]"')
        )


def print_results(console: Console, results: Sequence[Result], capabilities: Mapping[str, Capabilities]) -> None:
    """One row per implementation: checks passed, worst margin per dtype; then what failed."""
    by_implementation: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_implementation[result.implementation].append(result)

    table = Table(title="Conformance", caption="margin = largest |got - expected| / bound; at most 1 conforms", caption_justify="left")
    table.add_column("implementation", no_wrap=True)
    for title in ("passed", "failed", "errored", "skipped"):
        table.add_column(title, justify="right")
    for dtype in DTYPES:
        table.add_column(f"{dtype}\nmargin", justify="right")
    for name, mine in by_implementation.items():
        counts = {status: sum(x.status == status for x in mine) for status in (PASSED, FAILED, ERRORED, SKIPPED)}
        cells = [f"{counts[PASSED]}/{len(mine)}"]
        cells += [f"[red]{n}[/]" if n else "0" for n in (counts[FAILED], counts[ERRORED])]
        cells += [str(counts[SKIPPED])]
        cells += [_worst_margin(mine, dtype) for dtype in DTYPES]
        color = "red" if counts[FAILED] or counts[ERRORED] else "green"
        table.add_row(f"[{color}]{name}[/]", *cells)
    console.print(table)
    for name in by_implementation:
        console.print(f"  {name}: {capabilities[name].version}", style="dim")

    bad = [x for x in results if x.status in (FAILED, ERRORED)]
    for x in bad[:SHOWN_FAILURES]:
        console.print(f"[red]{x.status}[/] {x.case} {x.implementation} {x.dtype} {x.mode}: {escape(x.message)}", soft_wrap=True)
    if len(bad) > SHOWN_FAILURES:
        console.print(f"... and {len(bad) - SHOWN_FAILURES} more; --json FILE keeps them all")
    if bad:
        x = bad[0]
        console.print(f"look closer: adamp-parity explain {x.case} --backend {x.implementation} --dtype {x.dtype}")


def _worst_margin(results: Sequence[Result], dtype: str) -> str:
    values = [x.margin for x in results if x.dtype == dtype and x.margin is not None]
    return f"{max(values):.3f}" if values else "-"


def print_explanation(console: Console, problem: Problem, implementation: str, mode: str, step: Step) -> None:
    """Clauses, inputs, legal interval, got and margin of the worst step of a case, tensor by tensor."""
    case = problem.case
    console.print(f"[bold]{case.id}[/] {implementation} {problem.dtype} {mode}: step {step.after.step}")
    console.print(f"hyperparameters: {case.hyper}", highlight=False)
    for label in case.clauses:
        console.print(f"  [bold]{label}[/] {escape(clauses()[label])}", highlight=False)
    if step.verdict.problem:
        console.print(f"[red]{escape(step.verdict.problem)}[/]")
        return
    layouts = problem.layouts()
    for name, gradient in step.gradients.items():
        before = step.before.tensors(name)
        outcomes = expected_outcomes(
            case.algorithm, case.hyper, layouts[name], before, step.before.step, gradient, name in case.exact
        )
        tensor = getattr(case, "tensors", {}).get(name)
        title = f"{name} {list(gradient.shape)} {layouts[name]}" + (f": {tensor.purpose}" if tensor else "")
        console.print(f"\n[bold]{escape(title)}[/]", highlight=False)
        taken = step.verdict.branches[name]
        console.print(f"  branch: {', '.join(Branch(int(b)).name.lower() for b in np.ravel(taken))}")
        if gradient.size:
            console.print(_elements(step, name, gradient, {o.branch: o.tensors for o in outcomes}, int(np.ravel(taken)[0])))


def _elements(step: Step, name: str, gradient: np.ndarray, outcomes: Mapping[int, Mapping[str, Bounded]], branch: int) -> Table:
    """The worst element of each tensor."""
    from adamp_conformance.judge import margins

    table = Table("tensor", "element", "before", "gradient", "lowest legal", "got", "highest legal", "margin")
    got = step.after.tensors(name)
    for tensor, before in step.before.tensors(name).items():
        scores = {b: margins(got[tensor], tensors[tensor]) for b, tensors in outcomes.items()}
        score = scores.get(branch, next(iter(scores.values())))
        at = np.unravel_index(int(np.argmax(score)), score.shape) if score.shape else ()
        bounded = outcomes.get(branch, next(iter(outcomes.values())))[tensor]
        value, error = bounded.value[at], bounded.error[at]
        margin = float(score[at])
        numbers = [float(x) for x in (before[at], gradient[at], value - error, got[tensor][at], value + error)]
        style = "red" if margin > 1 else None
        table.add_row(tensor, str([int(i) for i in at]), *(f"{x:.17g}" for x in numbers), f"{margin:.3g}", style=style)
    return table
