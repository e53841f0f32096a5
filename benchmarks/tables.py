"""Results as tables, in the terminal and in Markdown, and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.contenders import CONTENDERS, MEASURES

Results = dict[str, Any]
_TITLES = {"adamp": "AdamP", "sgdp": "SGDP"}


def _columns(run: Results, algorithm: str) -> list[tuple[str, Any]]:
    """Heading and text of an entry, of the columns that the run has anything for."""
    plain, official = MEASURES[algorithm]

    def share(x: Results) -> str:
        moved = x["accesses"] * run["elements"] * _SIZES[run["dtype"]]
        return f"{moved / x['quartiles'][1] / run['copy_bytes_per_second'][1]:.0%}"

    columns: list[tuple[str, Any]] = [
        ("ms", lambda x: _milliseconds(x["quartiles"][1])),
        ("quartiles", lambda x: f"{_milliseconds(x['quartiles'][0])} to {_milliseconds(x['quartiles'][2])}"),
        (f"/ {plain}", lambda x: _ratio(x["ratios"].get(plain))),
        (f"/ {official}", lambda x: _ratio(x["ratios"].get(official))),
        ("accesses", lambda x: f"{x['accesses']:.1f}{'*' if x['accesses_are'] == 'declared' else ''}"),
        ("of copy bandwidth", share),
        ("operations", lambda x: str(x["operations"])),
        ("reads", lambda x: str(x["reads"])),
    ]
    if any("launches" in x for x in run["contenders"]):
        columns += [(name, lambda x, name=name: str(x.get(name, ""))) for name in ("launches", "copies", "syncs")]
    return [*columns, ("first step, s", lambda x: f"{x['first_seconds']:.2f}")]


_PRINTED = 1 + 6
_SIZES = {"float32": 4, "bfloat16": 2}


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"


def _ratio(x: list[float] | None) -> str:
    return "" if x is None else f"{x[1]:.2f} ({x[0]:.2f} to {x[2]:.2f})"


def _name(x: Results) -> str:
    return f"{x['name']} ({x['path']})" if x["name"].endswith("-default") and x.get("path") else x["name"]


def _headline(run: Results) -> str:
    low, middle, high = (f"{x / 1e9:.3g}" for x in run["copy_bytes_per_second"])
    return (
        f"{run['model']}, {run['dtype']}: {run['elements']:,} elements in {run['tensors']} tensors, {run['rounds']} "
        f"rounds; copies at {middle} GB/s ({low} to {high})"
    )


def _tables(run: Results) -> Iterator[tuple[str, list[str], list[Results], list[list[str]], list[str]]]:
    """By algorithm: its name, headings, entries that were measured and their cells, and words on the others."""
    for algorithm in _TITLES:
        entries = [x for x in run["contenders"] if x["algorithm"] == algorithm]
        measured = [x for x in entries if x["status"] == "measured"]
        columns = _columns(run, algorithm)
        cells = [[_name(x), *(text(x) for _, text in columns)] for x in measured]
        others = [f"{x['name']}: {x['status']}, {x['reason']}" for x in entries if x["status"] != "measured"]
        if entries:
            yield _TITLES[algorithm], ["", *(heading for heading, _ in columns)], measured, cells, others


def show(console: Console, run: Results) -> None:
    """Prints one run, without what only a page has room for."""
    console.print(f"\n[bold]{escape(_headline(run))}")
    for _, headings, entries, cells, others in _tables(run):
        table = Table(*headings[:_PRINTED])
        for column in table.columns[1:]:
            column.justify = "right"
        for entry, row in zip(entries, cells, strict=True):
            table.add_row(*row[:_PRINTED], style="bold" if CONTENDERS[entry["name"]].ours else "")
        console.print(table)
        for line in others:
            console.print(f"[yellow]{escape(line)}", soft_wrap=True, highlight=False)


# --- Markdown --------------------------------------------------------------------------------------------------------


def markers(device_type: str) -> tuple[str, str]:
    """The lines between which a page has the tables of a type of device."""
    return f"<!-- torch_step {device_type}: begin -->", f"<!-- torch_step {device_type}: end -->"


def renew(page: str, results: Results, plot: str | None) -> str:
    """The page with these results between the markers of their device.

    Args:
      page: Markdown.
      results: what the JSON file holds.
      plot: address of the plot, as seen from the page.

    Raises:
      ValueError: a marker is missing.
    """
    begin, end = markers(results["environment"]["device_type"])
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page needs the lines {begin} and {end}, between which the tables are written")
    return "\n".join([before + begin, *_lines(results, plot), end + after])


def _lines(results: Results, plot: str | None) -> Iterator[str]:
    environment = results["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    cores = f"{environment['threads']} threads of {environment['cpu_count']} logical cores"
    yield f"On {environment['device']}, {cores}, load {environment['load']};"
    yield f"Python {environment['python']}, {packages}; {environment['date']}."
    if plot:
        yield ""
        yield f"![Time of a step, relative to PyTorch's fused optimizer]({plot})"
    for run in results["runs"]:
        yield ""
        yield f"### {_headline(run)}"
        for _, headings, entries, cells, others in _tables(run):
            yield ""
            yield f"| {' | '.join(headings)} |"
            yield f"| --- |{' ---: |' * (len(headings) - 1)}"
            for entry, row in zip(entries, cells, strict=True):
                name = f"**{row[0]}**" if CONTENDERS[entry["name"]].ours else row[0]
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


def plot(results: Results, path: Path) -> None:
    """Draws the time of a step over that of PyTorch's fused optimizer: medians, and lines between quartiles."""
    runs, algorithms = results["runs"], list(_TITLES)
    names = {a: [x.name for x in CONTENDERS.values() if x.algorithm == a] for a in algorithms}
    figure = Figure(figsize=(2 + 3 * len(runs), 6), layout="constrained")
    grid = figure.subplots(len(algorithms), len(runs), sharex=True, sharey="row", squeeze=False)
    for axes_of_row, algorithm in zip(grid, algorithms, strict=True):
        plain, _ = MEASURES[algorithm]
        for axes, run in zip(axes_of_row, runs, strict=True):
            for x in run["contenders"]:
                if x["algorithm"] != algorithm or plain not in x.get("ratios", {}):
                    continue
                low, middle, high = x["ratios"][plain]
                colour = "tab:red" if CONTENDERS[x["name"]].ours else "tab:grey"
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
    with matplotlib.rc_context({"svg.hashsalt": "torch_step"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
