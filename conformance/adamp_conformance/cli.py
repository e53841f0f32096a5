"""The command `adamp-parity`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from adamp_conformance import expected, publish, report
from adamp_conformance.adapter import DTYPES
from adamp_conformance.diagnose import ask, diagnose
from adamp_conformance.export import LANGUAGES, export
from adamp_conformance.freeze import generate
from adamp_conformance.implementations import IMPLEMENTATIONS, Implementation, recorded_by, select
from adamp_conformance.judge import ALGORITHMS
from adamp_conformance.lint import lint, regenerate
from adamp_conformance.mutants import hunt, mutants
from adamp_conformance.port import commands
from adamp_conformance.publish import matrix, mutation
from adamp_conformance.publish.words import notes, purposes
from adamp_conformance.results import (
    EXIT_ADAPTER,
    EXIT_CONFORMS,
    EXIT_CORPUS,
    EXIT_FAILED,
    Result,
    Run,
    read,
    write,
)
from adamp_conformance.runner import MODES, catalogue, replay, select_checks
from adamp_conformance.runner import run as run_checks
from adamp_conformance.second_oracle import verify_vector
from adamp_conformance.vectors import CorpusError, load, vectors_root
from adamp_spec import SPEC_VERSION

# Where no terminal says how wide it is, tables are as wide as they need: a name that is broken is not found by grep.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000)

# The tensors are small and the processes many: threads of their own would only compete.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")

adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="A known name (torch, keras-xla; see list), package.module:Class, or exec:COMMAND. Default: all of ours."
    " Repeatable.",
)
device_option = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)

jobs_option = click.option(
    "--jobs", type=click.IntRange(1), default=os.cpu_count(), show_default="cores", help="Processes."
)


class _Main(click.Group):
    """Turns a damaged corpus into its exit code, wherever it is met."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except CorpusError as error:
            console.print(f"[red]the corpus is not intact[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
            sys.exit(EXIT_CORPUS)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="adamp-parity", message=f"%(package)s %(version)s, specification {SPEC_VERSION}")
@click.pass_context
def main(context: click.Context) -> None:
    """Checks that implementations of AdamP and SGDP take the steps that the specification defines; ports trainings."""
    context.obj = console
    if (here := str(Path.cwd())) not in sys.path:  # an adapter may stand in the project's folder, as for python -m
        sys.path.insert(0, here)
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for variable in _ONE_THREAD:
        os.environ.setdefault(variable, "1")


def report_options(command: Any) -> Any:
    """The files that a run can be published in."""
    file = click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option(
            "--badges", type=click.Path(file_okay=False, path_type=Path), help="Folder for badges (shields.io)."
        ),
        click.option("--junit", type=file, help="JUnit XML."),
        click.option("--markdown", type=file, help="A summary in Markdown."),
        click.option("--html", type=file, help="One self-contained page."),
    ):
        command = option(command)
    return command


@main.command()
@adapter_option
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Default: all. Repeatable.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Default: all. Repeatable.")
@device_option
@click.option("-k", "text", default="", help="Only cases whose name contains this text.")
@click.option(
    "--results",
    "recorded",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Answers that were recorded elsewhere (spec/PROTOCOL.md). Repeatable.",
)
@click.option(
    "--expected",
    "expectations",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A TOML file of failures that are known, each with a reason and a last day.",
)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the results as JSON lines.")
@report_options
@jobs_option
def run(
    adapters: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    text: str,
    recorded: Sequence[Path],
    expectations: Path | None,
    path: Path | None,
    jobs: int,
    **reports: Path | None,
) -> None:
    """Run the suite on whatever adapters are installed.

    Exit codes: 0 everything selected conforms; 1 something does not; 2 an adapter failed or one that was asked for
    is not installed; 3 the vectors are not intact or nothing was selected.
    """
    named = [*(_chosen(adapters) if adapters or not recorded else []), *map(recorded_by, recorded)]
    chosen = list({x.name: x for x in named}.values())
    missing = [x for x in chosen if x.missing]
    report.print_missing(console, missing)
    if missing and adapters:
        sys.exit(EXIT_ADAPTER)
    installed = [x for x in chosen if not x.missing]
    checks = select_checks(installed, modes, dtypes, text)
    if not checks:
        console.print(
            f"[red]nothing to check[/]: no case contains {text!r} in mode {_words(modes)} and dtype {_words(dtypes)}"
        )
        console.print("adamp-parity list shows the cases")
        sys.exit(EXIT_CORPUS)
    try:
        entries = expected.read(expectations, select_checks(installed)) if expectations else ()
    except (OSError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--expected") from error

    found: dict[tuple[str, ...], Result] = {}
    versions: dict[str, str] = {}
    with _progress() as progress:
        task = progress.add_task("checks", total=len(checks))
        for done in run_checks(checks, device, jobs):
            found.update((_key(result), result) for _, result in done.results)
            name = done.implementation.name
            versions[name] = done.version or versions.get(name, "could not be loaded")
            progress.advance(task, len(done.results))
    results = expected.apply(
        (found[x.implementation.name, x.case, x.dtype, x.mode] for x in checks), entries, date.today()
    )
    ordered = {x.name: versions[x.name] for x in installed if x.name in versions}
    chosen_options = {"-k": [text] if text else [], "--mode": modes, "--dtype": dtypes}
    selection = " ".join(f"{option} {value}" for option, values in chosen_options.items() for value in values)
    outcome = Run.here(results, device, ordered, sorted({x.backend for x in missing}), selection)
    report.print_results(console, outcome)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, outcome)
    publish.write(outcome, **reports, notes=notes(), purposes=purposes())
    sys.exit(outcome.exit_code)


@main.command("report")
@click.argument("path", metavar="RESULTS", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@report_options
@click.option(
    "--matrix",
    "page",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A page of documentation, whose matrices are renewed between its markers.",
)
def publish_results(path: Path, page: Path | None, **reports: Path | None) -> None:
    """Publish the results that run --json kept; exit codes as for run."""
    try:
        outcome = read(path)
        if page is not None:
            page.write_text(matrix.renew(page.read_text(), outcome))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    publish.write(outcome, **reports, notes=notes(), purposes=purposes())
    report.print_results(console, outcome)
    sys.exit(outcome.exit_code)


@main.command("list")
def list_cases() -> None:
    """List the cases, what each is for, and the adapters that are known by name."""
    table = Table()
    table.add_column("case", no_wrap=True)
    for title in ("modes", "dtypes", "purpose", "clauses", "flags"):
        table.add_column(title)
    for entry in catalogue().values():
        lists = (
            ", ".join(words) for words in (entry.modes, entry.problems, [entry.purpose], entry.clauses, entry.flags)
        )
        table.add_row(entry.id, *lists)
    console.print(table)
    implementations = Table("adapter", "installed", "install with")
    for x in IMPLEMENTATIONS:
        hint = f'pip install "adamp-parity\\[{x.extra},conformance]"' if x.extra else ""
        implementations.add_row(x.name, "no" if x.missing else "yes", hint)
    console.print(implementations)


@main.command()
@click.argument("case_id", metavar="CASE")
@adapter_option
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@device_option
def explain(case_id: str, adapters: Sequence[str], dtype: str, device: str) -> None:
    """Show one case: its clauses, and for the worst step inputs, expected interval, got and margin.

    Exit codes as for run.
    """
    entry = catalogue().get(case_id)
    if entry is None:
        raise click.BadParameter(f"there is no case {case_id!r}; see adamp-parity list", param_hint="CASE")
    if dtype not in entry.problems:
        raise click.BadParameter(f"{case_id} is run in {', '.join(entry.problems)}", param_hint="--dtype")
    chosen = _chosen(adapters or ["oracle"])
    if missing := [x for x in chosen if x.missing]:
        report.print_missing(console, missing)
        sys.exit(EXIT_ADAPTER)
    conforms = True
    for implementation in chosen:
        try:
            problem, outcome = replay(entry, dtype, implementation.factory(device))
        except (Exception, SystemExit) as error:
            console.print(f"[red]errored[/] {implementation.name}: {type(error).__name__}: {escape(str(error))}")
            sys.exit(EXIT_ADAPTER)
        report.print_explanation(console, entry, implementation.name, problem, outcome)
        conforms &= outcome.problem is None
    sys.exit(EXIT_CONFORMS if conforms else EXIT_FAILED)


@main.command("diagnose")
@click.argument("adapter")
@device_option
def diagnose_adapter(adapter: str, device: str) -> None:
    """Say in words which rules an implementation follows, and where they are not ours.

    Exit codes: 0 it follows ours; 1 it does not; 2 the adapter failed or is not installed; 3 the vectors are damaged,
    or none of them is for it.
    """
    groups = load().groups
    conforms = True
    for implementation in _chosen([adapter]):
        if implementation.missing:
            report.print_missing(console, [implementation])
            sys.exit(EXIT_ADAPTER)
        try:
            make = implementation.factory(device)
            answers = list(ask(make, make().capabilities(), groups))
        except (Exception, SystemExit) as error:
            console.print(f"[red]errored[/] {implementation.name}: {type(error).__name__}: {escape(str(error))}")
            sys.exit(EXIT_ADAPTER)
        if all(answer.half for answer in answers):
            console.print(f"[red]nothing to check[/]: {escape(implementation.name)} has no step in float64 or float32")
            sys.exit(EXIT_CORPUS)
        for algorithm in ALGORITHMS:
            if mine := [answer for answer in answers if answer.group.algorithm == algorithm]:
                found = diagnose(algorithm, mine)
                report.print_diagnosis(console, implementation.name, found)
                conforms &= found.conforms
    sys.exit(EXIT_CONFORMS if conforms else EXIT_FAILED)


@main.command()
@click.option("-k", "text", default="", help="Only mutants whose name contains this text.")
@click.option(
    "--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the page of the documentation."
)
@jobs_option
def mutate(text: str, markdown: Path | None, jobs: int) -> None:
    """Put every wrong optimizer of mutants.toml to the vectors: each must be killed by at least two.

    Exit codes: 0 all are killed; 1 one survives; 3 the vectors are not intact or nothing was selected.
    """
    if text and markdown:
        raise click.UsageError("--markdown writes the page of all mutants; leave out -k")
    load()
    chosen = [mutant for mutant in mutants().values() if text in mutant.id]
    if not chosen:
        console.print(f"[red]nothing to check[/]: no mutant's name contains {text!r}")
        sys.exit(EXIT_CORPUS)
    found = []
    with _progress() as progress, ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for kills in progress.track(pool.map(hunt, chosen, chunksize=4), total=len(chosen), description="mutants"):
            found += kills
    console.print(mutation.matrix(found))
    console.print(mutation.summary(found))
    if markdown:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(mutation.markdown(found))
    sys.exit(EXIT_FAILED if any(map(mutation.survives, found)) else EXIT_CONFORMS)


@main.group()
def vectors() -> None:
    """The frozen vectors: check, generate, export."""


@vectors.command("lint")
def lint_vectors() -> None:
    """Check what must be true of the vectors as a whole, and that the cases still give them, byte for byte."""
    root = vectors_root()
    _exit_with([*lint(load(), root), *regenerate(root)], "the vectors are in order")


@vectors.command("verify")
@click.option("-k", "text", default="", help="Only vectors whose name contains this text.")
@jobs_option
def verify_vectors(text: str, jobs: int) -> None:
    """Check every interval with the second oracle, in 200 bits."""
    chosen = [(group, x) for group in load().groups for x in group.vectors if text in x.id]
    if not chosen:
        console.print(f"[red]nothing to check[/]: no vector's name contains {text!r}")
        sys.exit(EXIT_CORPUS)
    problems: list[str] = []
    with _progress() as progress, ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        groups, each = zip(*chosen, strict=True)
        verdicts = pool.map(verify_vector, each, groups, chunksize=16)
        for found in progress.track(verdicts, total=len(chosen), description="vectors"):
            problems += found
    _exit_with(problems, f"both oracles agree on {len(chosen)} vectors")


@vectors.command("generate")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def generate_vectors(folder: Path) -> None:
    """Write the vectors that the cases give into an empty FOLDER; frozen vectors are never overwritten."""
    try:
        generate(folder)
    except (FileExistsError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    console.print(f"written to {folder}", highlight=False)


@vectors.command("export")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--lang", "language", type=click.Choice(list(LANGUAGES)), required=True)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Default: all. Repeatable.")
@click.option("--algorithm", "chosen", multiple=True, type=click.Choice(list(ALGORITHMS)), help="Default: both.")
def export_vectors(target: Path, language: str, dtypes: Sequence[str], chosen: Sequence[str]) -> None:
    """Write the vectors as source of another language, or as NumPy files, to TARGET."""
    corpus = load()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        count = export(corpus, language, target, dtypes, chosen)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    console.print(f"{count} vectors written to {target}", highlight=False)


main.add_command(commands.map_models)
main.add_command(commands.port)


def _words(chosen: Sequence[str]) -> str:
    return ", ".join(chosen) or "any"


def _key(result: Result) -> tuple[str, ...]:
    return result.implementation, result.case, result.dtype, result.mode


def _exit_with(problems: Sequence[str], otherwise: str) -> None:
    for problem in problems:
        console.print(f"[red]{escape(problem)}[/]", soft_wrap=True, highlight=False)
    if not problems:
        console.print(otherwise, highlight=False)
    sys.exit(EXIT_CORPUS if problems else EXIT_CONFORMS)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _chosen(adapters: Sequence[str]) -> list[Implementation]:
    try:
        return select(adapters)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--adapter") from error


if __name__ == "__main__":
    main()
