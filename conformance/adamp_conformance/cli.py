"""The command `adamp-parity`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from adamp_conformance import report
from adamp_conformance.adapter import DTYPES
from adamp_conformance.implementations import IMPLEMENTATIONS, Implementation, select
from adamp_conformance.modes import MODES, Problem, create, walk
from adamp_conformance.results import EXIT_ADAPTER, EXIT_CONFORMS, EXIT_CORPUS, EXIT_FAILED, Result, exit_code, write
from adamp_conformance.suite import BY_ID, CASES, Check, select_checks
from adamp_conformance.suite import run as run_checks
from adamp_spec import SPEC_VERSION

console = Console()

# The tensors are small and the processes many: threads of their own would only compete.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")

backend_option = click.option(
    "--backend",
    "backends",
    multiple=True,
    help="oracle, torch, keras, optax, or one execution such as keras-xla. Repeatable.",
)
device_option = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="adamp-parity", message=f"%(package)s %(version)s, specification {SPEC_VERSION}")
def main() -> None:
    """Checks that implementations of AdamP and SGDP take the steps that the specification defines."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for variable in _ONE_THREAD:
        os.environ.setdefault(variable, "1")


@main.command()
@backend_option
@click.option("--mode", "modes", multiple=True, type=click.Choice(list(MODES)), help="Default: all. Repeatable.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Default: all. Repeatable.")
@device_option
@click.option("-k", "text", default="", help="Only cases whose name contains this text.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the results as JSON lines.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count(), show_default="cores", help="Processes.")
def run(
    backends: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    text: str,
    path: Path | None,
    jobs: int,
) -> None:
    """Run the suite on whatever backends are installed.

    Exit codes: 0 everything selected conforms; 1 something does not; 2 an adapter failed or a backend that was
    asked for is not installed; 3 nothing was selected.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    chosen = _chosen(backends)
    missing = [x for x in chosen if x.missing]
    report.print_missing(console, missing)
    if missing and backends:
        sys.exit(EXIT_ADAPTER)
    installed = [x for x in chosen if not x.missing]
    checks = select_checks(installed, modes, dtypes, text)
    if not checks:
        console.print(f"[red]nothing to check[/]: no case contains {text!r} with these modes and dtypes")
        console.print("adamp-parity list shows the cases")
        sys.exit(EXIT_CORPUS)

    found: dict[Check, Result] = {}
    versions: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checks", total=len(checks))
        for done in run_checks(checks, device, jobs):
            found.update(done.results)
            name = done.implementation.name
            versions[name] = done.version or versions.get(name, "could not be loaded")
            progress.advance(task, len(done.results))
    results = [found[check] for check in checks]
    report.print_results(console, results, versions)
    if path is not None:
        write(path, results, device, versions, sorted({x.backend for x in missing}))
    sys.exit(exit_code(results))


@main.command("list")
def list_cases() -> None:
    """List the cases, what each is for, and the implementations."""
    table = Table()
    table.add_column("case", no_wrap=True)
    for title in ("modes", "dtypes", "tensors", "clauses"):
        table.add_column(title)
    for case in CASES:
        tensors = ", ".join(case.tensors) or case.purpose
        table.add_row(case.id, ", ".join(case.modes), ", ".join(case.dtypes), tensors, ", ".join(case.clauses))
    console.print(table)
    implementations = Table("implementation", "installed", "install with")
    for x in IMPLEMENTATIONS:
        hint = f'pip install "adamp-parity\\[{x.extra},conformance]"' if x.extra else ""
        implementations.add_row(x.name, "no" if x.missing else "yes", hint)
    console.print(implementations)


@main.command()
@click.argument("case_id", metavar="CASE")
@backend_option
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@device_option
def explain(case_id: str, backends: Sequence[str], dtype: str, device: str) -> None:
    """Show one case: its clauses, and for the worst step inputs, expected interval, got and margin.

    Exit codes as for run.
    """
    case = BY_ID.get(case_id)
    if case is None:
        raise click.BadParameter(f"there is no case {case_id!r}; see adamp-parity list", param_hint="CASE")
    if dtype not in case.dtypes:
        raise click.BadParameter(f"{case_id} is run in {', '.join(case.dtypes)}", param_hint="--dtype")
    chosen = _chosen(backends or ["oracle"])
    if missing := [x for x in chosen if x.missing]:
        report.print_missing(console, missing)
        sys.exit(EXIT_ADAPTER)
    conforms = True
    for implementation in chosen:
        try:
            make = implementation.factory(device)
            problem = Problem(case, dtype, make().capabilities().weights)
            adapter = create(make, problem)
            adapter.load(problem.initial())
            outcome = walk(adapter, problem, case.steps)
        except Exception as error:
            console.print(f"[red]errored[/] {implementation.name}: {type(error).__name__}: {escape(str(error))}")
            sys.exit(EXIT_ADAPTER)
        report.print_explanation(console, problem, implementation.name, outcome)
        conforms &= outcome.problem is None
    sys.exit(EXIT_CONFORMS if conforms else EXIT_FAILED)


def _chosen(backends: Sequence[str]) -> list[Implementation]:
    try:
        return select(backends)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--backend") from error


if __name__ == "__main__":
    main()
