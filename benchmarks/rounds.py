"""Rounds: contenders take turns, each after a copy that empties the caches; and what is made of their seconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np

OURS = "adamp-parity"
COPIED = 1 << 28  # bytes, several times what any cache holds

Work = Callable[[], object]
Clock = Callable[[Work], float]
Entry = dict[str, Any]  # what the JSON file holds of a contender


def on_host(work: Work) -> float:
    """Seconds until work returns."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def interleave(
    works: Mapping[str, Work], rounds: int, clock: Clock, before: Work
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times every work once in each round, in an order that starts with another one each time.

    Args:
      works: name -> what is timed.
      rounds: how often.
      clock: gives the seconds of a work.
      before: what is done before each, untimed.

    Returns:
      Name -> seconds, by round; name -> why it failed, and then it is in the first no more.
    """
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    with _no_garbage_collection():
        for i in range(rounds):
            first = i % max(len(names), 1)
            for name in names[first:] + names[:first]:
                if name in failures:
                    continue
                before()
                try:
                    seconds[name].append(clock(works[name]))
                except Exception as error:
                    failures[name] = reason(error)
                    del seconds[name]
    return seconds, failures


@contextmanager
def _no_garbage_collection() -> Any:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quartiles(x: Iterable[float]) -> list[float]:
    """The first quartile, the median and the third."""
    return [float(q) for q in np.percentile(list(x), [25, 50, 75])]


def ratios(x: list[float], measure: list[float]) -> list[float]:
    """Quartiles of the ratio to another contender in the same round."""
    return quartiles(a / b for a, b in zip(x, measure, strict=True))


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def copies_on_host() -> Work:
    """A copy that empties the caches of the processor."""
    source, target = (np.ones(COPIED, np.uint8) for _ in range(2))
    return lambda: np.copyto(target, source)


# --- contenders ------------------------------------------------------------------------------------------------------


def entry(name: str, algorithm: str, *packages: str) -> Entry:
    """What is kept of a contender, before it is measured.

    Args:
      name: as on the command line and in tables.
      algorithm: the table that it is in.
      *packages: the distribution that it comes from, and what else it needs.
    """
    kept: Entry = {"name": name, "algorithm": algorithm, "ours": packages[0] == OURS, "status": "measured"}
    for package in packages:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return kept | {"status": "missing", "reason": f"{package} is not installed"}
    return kept


def take_turns(
    entries: Iterable[Entry], start: Callable[[Entry], Work], rounds: int, clock: Clock, before: Work
) -> None:
    """Starts every contender and times each once in each round; its entry gets the seconds, or why it failed.

    Args:
      entries: one for each; those that are not to be measured stay as they are.
      start: gives the step of a contender; may add to its entry.
      rounds, clock, before: as for `interleave`.
    """
    works: dict[str, Work] = {}
    chosen = {x["name"]: x for x in entries if x["status"] == "measured"}
    for name, kept in chosen.items():
        try:
            works[name] = start(kept)
        except Exception as error:
            fail(kept, reason(error))
    seconds, failures = interleave(works, rounds, clock, before)
    for name, why in failures.items():
        fail(chosen[name], why)
    for name, own in seconds.items():
        chosen[name]["seconds"] = own


def fail(kept: Entry, why: str) -> None:
    """Marks a contender that was to be measured as failed."""
    if kept["status"] == "measured":
        kept |= {"status": "failed", "reason": why}


def compare(entries: Sequence[Entry], measures: Mapping[str, Mapping[str, str]]) -> None:
    """Adds quartiles and ratios to the entries that have seconds.

    Args:
      entries: one for each contender.
      measures: name -> what its ratios are of: heading -> name.
    """
    seconds = {x["name"]: x["seconds"] for x in entries if "seconds" in x}
    for kept in entries:
        if (own := seconds.get(kept["name"])) is not None:
            present = {heading: seconds[x] for heading, x in measures[kept["name"]].items() if x in seconds}
            kept["quartiles"] = quartiles(own)
            kept["ratios"] = {heading: ratios(own, x) for heading, x in present.items()}
