"""What the commands that time a step share: options, the machine, and files that results go to."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from benchmarks.tables import Page, Results, plot, renew, show

console = Console() if sys.stdout.isatty() else Console(width=160)

ROOT = Path(__file__).parent.parent
FORMAT = 1
_QUIET = 0.5  # load average

_file = click.Path(dir_okay=False, path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def options(models: Iterable[str], rounds: int, everything: str) -> Callable[[_Command], _Command]:
    """The options of every command.

    Args:
      models: what there is to choose from.
      rounds: the default.
      everything: what `--all` does beside writing all files.
    """
    chosen = [
        click.option(
            "--model", "models", multiple=True, type=click.Choice(list(models)), help="Default: all that fit."
        ),
        click.option(
            "--contender", "patterns", multiple=True, help="A name, or a pattern such as 'sgd*'. Default: all."
        ),
        click.option("--device", "device_name", default="cpu", show_default=True, help="cpu, cuda, ..."),
        click.option(
            "--rounds", type=click.IntRange(1), default=rounds, show_default=True, help="Timed steps of each."
        ),
        click.option("--json", "json_path", type=_file, help="Keep everything that was measured."),
        click.option(
            "--markdown", "markdown_path", type=_file, help="A page with markers, to renew the tables between."
        ),
        click.option("--plot", "plot_path", type=_file, help="Time over that of the plain optimizer, SVG or PNG."),
        click.option(
            "--all", "everything", is_flag=True, help=f"{everything} files at their places in this repository."
        ),
    ]

    def decorate(command: _Command) -> _Command:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


def select(contenders: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The contenders that any pattern matches, or all if there is none."""
    contenders = list(contenders)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in contenders):
            raise click.BadParameter(f"{pattern!r} is none of {', '.join(contenders)}", param_hint="--contender")
    return [name for name in contenders if not patterns or any(fnmatchcase(name, x) for x in patterns)]


class Session:
    """Results as they come, and the files that they go to.

    Args:
      page: how they are told.
      machine: what a measurement depends on: `environment`.
      json_path, markdown_path, plot_path: where to; None for nowhere.
      everything: whether None stands for the place in this repository.
    """

    def __init__(
        self,
        page: Page,
        machine: Results,
        json_path: Path | None,
        markdown_path: Path | None,
        plot_path: Path | None,
        everything: bool,
    ) -> None:
        if everything:
            json_path = json_path or ROOT / "benchmarks" / "results" / f"{page.tool}_{machine['device_type']}.json"
            markdown_path = markdown_path or ROOT / page.document
            plot_path = plot_path or json_path.with_suffix(".svg")
        self._results: Results = {"format": FORMAT, "environment": machine, "skipped": {}, "runs": []}
        self._page, self._json, self._markdown, self._plot = page, json_path, markdown_path, plot_path
        self._text = markdown_path.read_text(encoding="utf-8") if markdown_path else ""  # before an hour of measuring
        if machine["load"] > _QUIET:
            load = machine["load"]
            console.print(f"[yellow]the load average is {load}: on a machine that does other work, times mean little")

    def add(self, run: Results) -> None:
        """Keeps and prints a run."""
        self._results["runs"].append(run)
        show(console, self._page, run)

    def skip(self, what: str, why: str, remedy: str) -> None:
        """Keeps and prints why something is not run."""
        self._results["skipped"][what] = why
        console.print(f"[yellow]{what}: left out, {why}; {remedy}")

    def write(self) -> None:
        """Writes the files."""
        for path in (self._json, self._plot):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        if self._json:
            self._json.write_text(json.dumps(self._results, indent=1) + "\n", encoding="utf-8")
        if self._plot:
            plot(self._page, self._results, self._plot)
        if self._markdown:
            address = Path(os.path.relpath(self._plot, self._markdown.parent)).as_posix() if self._plot else None
            text = renew(self._page, self._text, self._results, address)
            self._markdown.write_text(text, encoding="utf-8")


def environment(device_type: str, gpu: str | None, threads: int, packages: Iterable[str]) -> Results:
    """What a measurement depends on.

    Args:
      device_type: `cpu` or `cuda`.
      gpu: its name, if it is measured.
      threads: that a step has.
      packages: distributions whose versions matter, where they are installed.
    """
    return {
        "date": date.today().isoformat(),
        "device_type": device_type,
        "device": gpu or _processor(),
        "cpu": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": _versions(packages),
    }


def _versions(packages: Iterable[str]) -> Mapping[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
