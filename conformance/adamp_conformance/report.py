"""The terminal's view of a run and of one case."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamp_conformance.implementations import Implementation
from adamp_conformance.judge import expected_outcomes, worst_elements
from adamp_conformance.modes import Outcome, Problem, Step
from adamp_conformance.results import ERRORED, FAILED, PASSED, SKIPPED, Result
from adamp_conformance.spec_files import clauses
from adamp_spec import Branch, Layout

SHOWN_FAILURES = 20


def print_missing(console: Console, missing: Sequence[Implementation]) -> None:
    """Names each backend that is not installed and the command that installs it."""
    for backend, extra in {(x.backend, x.extra): None for x in missing}:
        absent = sorted({module for x in missing if x.backend == backend for module in x.missing})
        console.print(
            f"[yellow]not run[/] {backend}: {', '.join(absent)} not installed;"
            + escape(f' pip install "adamp-parity[{extra},conformance]"')
        )


def print_results(console: Console, results: Sequence[Result], versions: Mapping[str, str]) -> None:
    """One row per implementation: checks passed, worst margin per dtype; then what failed."""
    by_implementation: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_implementation[result.implementation].append(result)

    table = Table(title="checks, and worst margin per dtype", title_justify="left")
    table.add_column("", no_wrap=True)
    for title in ("passed", "fail", "error", "skip", *_SHORT.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for name, mine in by_implementation.items():
        counts = Counter(result.status for result in mine)
        color = "red" if counts[FAILED] or counts[ERRORED] else "green"
        table.add_row(
            f"[{color}]{name}[/]",
            f"{counts[PASSED]}/{len(mine)}",
            *(f"[red]{counts[status]}[/]" if counts[status] else "0" for status in (FAILED, ERRORED)),
            str(counts[SKIPPED]),
            *(_worst_margin(mine, dtype) for dtype in _SHORT),
        )
    console.print(table)
    console.print("margin: largest |got - expected| / bound of any judged step; at most 1 conforms", style="dim")
    for name in by_implementation:
        console.print(f"{name}: {versions[name]}", style="dim", highlight=False)

    bad = [x for x in results if x.status in (FAILED, ERRORED)]
    for x in bad[:SHOWN_FAILURES]:
        where = f"{x.case} {x.implementation} {x.dtype} {x.mode}"
        console.print(f"[red]{x.status}[/] {where}: {escape(x.message)}", soft_wrap=True, highlight=False)
    if len(bad) > SHOWN_FAILURES:
        console.print(f"... and {len(bad) - SHOWN_FAILURES} more; --json FILE keeps them all")
    judged = [x for x in bad if x.mode in ("step", "shadow")]  # what explain replays
    if judged:
        x = judged[0]
        command = f"adamp-parity explain {x.case} --backend {x.implementation} --dtype {x.dtype}"
        console.print(f"look closer: {command}", soft_wrap=True, highlight=False)


def _worst_margin(results: Sequence[Result], dtype: str) -> str:
    values = [x.margin for x in results if x.dtype == dtype and x.margin is not None]
    return f"{max(values):.3f}" if values else "-"


def print_explanation(console: Console, problem: Problem, implementation: str, outcome: Outcome) -> None:
    """Clauses, inputs, legal interval, got and margin of the worst step of a case, tensor by tensor."""
    case, step = problem.case, outcome.worst
    assert step is not None

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(f"[bold]{case.id}[/] {implementation} {problem.dtype}, step {step.after.step}")
    line(f"hyperparameters {case.hyper}")
    for label in case.clauses:
        line(f"[bold]{label}[/] {escape(clauses()[label])}")
    if step.verdict.problem:
        line(f"[red]{escape(step.verdict.problem)}[/]")
        return
    for name, gradient in step.gradients.items():
        layout = problem.layouts()[name]
        tensor = case.tensors.get(name)
        purpose = f": {tensor.purpose}" if tensor else ""
        branches = step.verdict.branches[name].ravel()
        line(f"\n[bold]{name}[/] {escape(str(list(gradient.shape)))} {layout}{purpose}")
        line(f"  branch {', '.join(Branch(b).name.lower() for b in branches)}")
        if gradient.size:
            for text in _elements(problem, step, name, layout):
                line(text)


def _elements(problem: Problem, step: Step, name: str, layout: Layout) -> Iterator[str]:
    """The worst element of the parameter and of each moment."""
    before, got, gradient = step.before.tensors(name), step.after.tensors(name), step.gradients[name]
    case = problem.case
    outcomes = expected_outcomes(
        case.algorithm, case.hyper, layout, before, step.before.step, gradient, name in case.exact
    )
    scores = worst_elements(got, outcomes, step.verdict.branches[name], layout.rows(gradient.shape))
    digits = 17 if problem.dtype == "float64" else 9
    for tensor, (at, margin, bounded) in scores.items():
        value, error = bounded.value[at], bounded.error[at]
        old, slope, low, new, high = (
            f"{float(x):.{digits}g}"
            for x in (before[tensor][at], gradient[at], value - error, got[tensor][at], value + error)
        )
        color = "green" if margin <= 1 else "red"
        yield f"  {tensor}{escape(str(list(at)))} was {old}, gradient {slope}"
        yield f"    legal {low} to {high}, got {new}, margin [{color}]{margin:.3g}[/]"


_SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
