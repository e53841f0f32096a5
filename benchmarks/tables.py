"""Results as tables, in the terminal and in Markdown, and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Results = dict[str, Any]
Columns = list[tuple[str, Callable[[Results], str]]]
_TITLES = {"adamp": "AdamP", "sgdp": "SGDP"}
_PRINTED = 1 + 6


@dataclass(frozen=True)
class Page:
    """How a command tells its results.

    Attributes:
      tool: the command, in the markers and in the names of its files.
      document: the page in this repository.
      caption: what the plot shows.
      measures: by algorithm, headings of the ratios; the first is drawn.
      columns: gives, for a run and an algorithm, headings and the text of an entry, behind those of time.
    """

    tool: str
    document: str
    caption: str
    measures: Mapping[str, Sequence[str]]
    columns: Callable[[Results, str], Columns]


def _columns(page: Page, run: Results, algorithm: str) -> Columns:
    def share(x: Results, heading: str) -> str:
        low, middle, high = x["ratios"].get(heading, (None,) * 3)
        return "" if middle is None else f"{middle:.2f} ({low:.2f} to {high:.2f})"

    return [
        ("ms", lambda x: _milliseconds(x["quartiles"][1])),
        ("quartiles", lambda x: f"{_milliseconds(x['quartiles'][0])} to {_milliseconds(x['quartiles'][2])}"),
        *((f"/ {y}", lambda x, y=y: share(x, y)) for y in page.measures[algorithm]),
        *page.columns(run, algorithm),
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"


def _name(x: Results) -> str:
    return f"{x['name']} ({x['path']})" if x["name"].endswith("-default") and x.get("path") else x["name"]


def _headline(run: Results) -> str:
    words = f"{run['model']}, {run['dtype']}: {run['elements']:,} elements in {run['tensors']} tensors"
    words += f", {run['rounds']} rounds"
    if bandwidth := run.get("copy_bytes_per_second"):
        low, middle, high = (f"{x / 1e9:.3g}" for x in bandwidth)
        words += f"; copies at {middle} GB/s ({low} to {high})"
    return words


def _tables(page: Page, run: Results) -> Iterator[tuple[str, list[str], list[Results], list[list[str]], list[str]]]:
    """By algorithm: its name, headings, entries that were measured and their cells, and words on the others."""
    for algorithm in _TITLES:
        entries = [x for x in run["contenders"] if x["algorithm"] == algorithm]
        measured = [x for x in entries if x["status"] == "measured"]
        columns = _columns(page, run, algorithm)
        cells = [[_name(x), *(text(x) for _, text in columns)] for x in measured]
        others = [f"{x['name']}: {x['status']}, {x['reason']}" for x in entries if x["status"] != "measured"]
        if entries:
            yield _TITLES[algorithm], ["", *(heading for heading, _ in columns)], measured, cells, others


def show(console: Console, page: Page, run: Results) -> None:
    """Prints one run, without what only a page has room for."""
    console.print(f"\n[bold]{escape(_headline(run))}")
    for _, headings, entries, cells, others in _tables(page, run):
        table = Table(*headings[:_PRINTED])
        for column in table.columns[1:]:
            column.justify = "right"
        for entry, row in zip(entries, cells, strict=True):
            table.add_row(*row[:_PRINTED], style="bold" if entry["ours"] else "")
        console.print(table)
        for line in others:
            console.print(f"[yellow]{escape(line)}", soft_wrap=True, highlight=False)


# --- Markdown --------------------------------------------------------------------------------------------------------


def markers(page: Page, device_type: str) -> tuple[str, str]:
    """The lines between which a page has the tables of a type of device."""
    return f"<!-- {page.tool} {device_type}: begin -->", f"<!-- {page.tool} {device_type}: end -->"


def renew(page: Page, text: str, results: Results, plot: str | None) -> str:
    """The page's text with these results between the markers of their device.

    Args:
      page: whose results.
      text: Markdown.
      results: what the JSON file holds.
      plot: address of the plot, as seen from the page.

    Raises:
      ValueError: a marker is missing.
    """
    begin, end = markers(page, results["environment"]["device_type"])
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page needs the lines {begin} and {end}, between which the tables are written")
    return "\n".join([before + begin, *_lines(page, results, plot), end + after])


def _lines(page: Page, results: Results, plot: str | None) -> Iterator[str]:
    environment = results["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    cores = f"{environment['threads']} threads of {environment['cpu_count']} logical cores"
    yield f"On {environment['device']}, {cores}, load {environment['load']};"
    yield f"Python {environment['python']}, {packages}; {environment['date']}."
    if plot:
        yield ""
        yield f"![{page.caption}]({plot})"
    for run in results["runs"]:
        yield ""
        yield f"### {_headline(run)}"
        for _, headings, entries, cells, others in _tables(page, run):
            yield ""
            yield f"| {' | '.join(headings)} |"
            yield f"| --- |{' ---: |' * (len(headings) - 1)}"
            for entry, row in zip(entries, cells, strict=True):
                name = f"**{row[0]}**" if entry["ours"] else row[0]
                yield f"| {' | '.join([name, *row[1:]])} |"
            if others:
                yield ""
            for line in others:
                yield f"- {line.replace('|', '/')}"
    if skipped := results["skipped"]:
        yield ""
        yield f"Not measured: {'; '.join(f'{model} ({why})' for model, why in skipped.items())}."
    yield ""


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(page: Page, results: Results, path: Path) -> None:
    """Draws the first of the ratios of each algorithm: medians, and lines between quartiles."""
    runs, algorithms = results["runs"], list(_TITLES)
    entries = [x for run in runs for x in run["contenders"]]
    names = {a: list(dict.fromkeys(x["name"] for x in entries if x["algorithm"] == a)) for a in algorithms}
    figure = Figure(figsize=(2 + 3 * len(runs), 6), layout="constrained")
    grid = figure.subplots(len(algorithms), len(runs), sharex=True, sharey="row", squeeze=False)
    for axes_of_row, algorithm in zip(grid, algorithms, strict=True):
        plain = page.measures[algorithm][0]
        for axes, run in zip(axes_of_row, runs, strict=True):
            for x in run["contenders"]:
                if x["algorithm"] != algorithm or plain not in x.get("ratios", {}):
                    continue
                low, middle, high = x["ratios"][plain]
                colour = "tab:red" if x["ours"] else "tab:grey"
                y = names[algorithm].index(x["name"])
                axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.5)
                axes.plot(middle, y, "o", color=colour)
                axes.annotate(f"{middle:.2f}", (middle, y), (0, 4), textcoords="offset points", ha="center", fontsize=7)
            axes.set_xscale("log")
            axes.axvline(1, color="black", linewidth=0.8)
            axes.grid(axis="x", which="both", linewidth=0.3)
            axes.set_yticks(range(len(names[algorithm])), names[algorithm], fontsize=8)
            axes.set_xlabel(f"time / {plain}", fontsize=8)
    for axes, run in zip(grid[0], runs, strict=True):
        axes.set_title(f"{run['model']}, {run['dtype']}", fontsize=9)
    for axes_of_row in grid:
        axes_of_row[0].invert_yaxis()
    with matplotlib.rc_context({"svg.hashsalt": page.tool}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
