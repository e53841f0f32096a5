"""How strong the vectors are: what became of each wrong optimizer, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from adamp_conformance.mutants import ENOUGH, Kills

_COMMAND = "adamp-parity mutate --markdown docs/mutants.md"


def survives(kills: Kills) -> bool:
    """Whether fewer than two vectors kill a mutant, or none that is for its mistake."""
    return len({id for id, _ in kills.vectors}) < ENOUGH or not kills.flagged


def matrix(found: Sequence[Kills]) -> Table:
    """One row per wrong optimizer."""
    table = Table(title="wrong optimizers", title_justify="left")
    for title in ("mutant", "of", "violates"):
        table.add_column(title, no_wrap=True)
    for title in ("killed by", "of its flag"):
        table.add_column(title, justify="right")
    table.add_column("first killer", no_wrap=True)
    table.add_column("random data")
    for x in found:
        color = "red" if survives(x) else "green"
        first = " ".join(x.vectors[0]) if x.vectors else "-"
        counts = (str(len(x.vectors)), str(x.flagged))
        noticed = "noticed" if x.random else "[yellow]not noticed[/]"
        table.add_row(f"[{color}]{escape(x.mutant.id)}[/]", x.algorithm, x.mutant.clause, *counts, first, noticed)
    return table


def summary(found: Sequence[Kills]) -> str:
    """The score in a sentence."""
    killed = sum(not survives(x) for x in found)
    noticed = sum(x.random for x in found)
    return (
        f"{killed} of {len(found)} wrong optimizers are killed, each by at least {ENOUGH} vectors;"
        f" random data and np.allclose notice {noticed}"
    )


def markdown(found: Sequence[Kills]) -> str:
    """The page `docs/mutants.md`."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Sequence[Kills]) -> Iterator[str]:
    yield "# How strong the vectors are"
    yield ""
    yield f"Written by `{_COMMAND}`; a test holds it to the truth."
    yield ""
    yield (
        "A suite is worth what it notices. `spec/mutants.toml` lists wrong optimizers, each the oracle with a piece of"
        " its text exchanged: mistakes that somebody has made, or will. Every one must be killed by at least"
        f" {ENOUGH} different vectors, and by one that was built for its mistake."
    )
    yield ""
    yield f"**{summary(found)}** ({sum(x.random for x in found) / len(found):.0%})."
    yield ""
    yield (
        "For contrast, the last column says whether the test that optimizers usually get notices the mutant: ten steps"
        " on normal random data in float32, for three shapes, with the default hyperparameters, with weight decay and"
        " with Nesterov momentum, compared with the right result by `np.allclose` at its default tolerance. A mutant of"
        " both algorithms counts twice; `killed by` counts a vector in each dtype that it is frozen in."
    )
    yield ""
    yield "| mutant | of | violates | killed by | of its flag | random data |"
    yield "| --- | --- | --- | ---: | ---: | --- |"
    for x in found:
        noticed = "noticed" if x.random else "**not noticed**"
        cells = (f"`{x.mutant.id}`", x.algorithm, x.mutant.clause, str(len(x.vectors)), str(x.flagged), noticed)
        yield f"| {' | '.join(cells)} |"
