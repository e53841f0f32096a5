"""Trains each example across hand-overs and without, judges every step, draws both: python examples/handover/page.py

Takes some minutes. Writes `docs/handover/*.svg`, and the table in `docs/handover.md`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from relay import Step, relay, train
from trainers import Held, Trainer, trainer

import adamp_torch  # noqa: F401 - before TensorFlow
from adamp_spec import Branch

DOCS = Path(__file__).parents[2] / "docs"
LENGTH = 30  # steps between hand-overs
ORDERS = {
    "resnet": ("torch", "keras", "flax"),
    "transformer": ("flax", "torch", "keras"),
    "recurrent": ("keras", "flax", "torch"),
}
NAMES = {"torch": "PyTorch", "keras": "Keras", "flax": "Flax"}
BRANCHES = {Branch.CHANNEL: "by channel", Branch.LAYER: "as a whole", Branch.NONE: "not projected"}


def nudged(runner: Trainer) -> Trainer:
    """The same training, each of whose parameters is a single rounding off."""
    held = runner.hold()
    parameters = {name: x for name, x in held.tensors.items() if name.startswith("parameter/")}
    moved = {name: np.nextafter(x, np.float32(np.inf)) for name, x in parameters.items()}
    runner.take(held._replace(tensors=held.tensors | moved))
    return runner


def drift(held: Held, beside: Held) -> float:
    """Distance of all parameters from those beside, relative to the norm of the latter."""
    names = [name for name in beside.tensors if name.startswith("parameter/")]
    far = sum(np.sum((held.tensors[name] - beside.tensors[name].astype(np.float64)) ** 2) for name in names)
    return float(np.sqrt(far / sum(np.sum(beside.tensors[name].astype(np.float64) ** 2) for name in names)))


def norms(held: Held) -> dict[str, float]:
    """The norm of each parameter that may be projected."""
    tensors = {name: held.tensors[f"parameter/{name}"] for name in held.snapshot.parameters}
    return {
        name: float(np.linalg.norm(x))
        for name, x in tensors.items()
        if held.snapshot.parameters[name].layout.rows(x.shape).projects
    }


def alike(a: Step, b: Step) -> bool:
    """Whether each slice of each parameter took the same branch."""
    return all(np.array_equal(x, b.decisions[name]) for name, x in a.decisions.items())


def draw(example: str, handed: Sequence[Step], alone: Sequence[Step], moved: Sequence[Step]) -> None:
    """One figure: what differs between the runs, then what each of them does."""
    first, second, third = (NAMES[framework] for framework in ORDERS[example])
    at = np.arange(1, len(alone) + 1)
    figure, axes = plt.subplots(3, 2, figsize=(10, 9), sharex=True, layout="constrained")
    loss, apart = axes[0]
    loss.plot(at, [step.loss for step in alone], color="0.6", linewidth=3, label=f"uninterrupted, {first}")
    loss.plot(at, [step.loss for step in handed], color="C3", linewidth=1, label="handed over")
    loss.set_title("loss of the batch")
    loss.legend()
    for run, label, color in ((handed, "handed over", "C3"), (moved, "a rounding at the start instead", "0.6")):
        far = [drift(step.after, beside.after) for step, beside in zip(run, alone, strict=True)]
        apart.plot(at, far, color=color, label=label)
    apart.set_yscale("log")
    apart.set_title("drift: relative distance from the uninterrupted run")
    apart.legend()
    for column, run, label in ((0, alone, f"uninterrupted, {first}"), (1, handed, "handed over")):
        weights, decisions = axes[1:, column]
        start = norms(run[0].before)
        for name in start:
            weights.plot(at, [norms(step.after)[name] / start[name] for step in run], linewidth=1)
        weights.set_title(f"norm of each weight, 1 at the start: {label}")
        shares = [
            [np.mean([np.mean(step.decisions[name] == branch) for name in start]) for step in run]
            for branch in BRANCHES
        ]
        decisions.stackplot(at, shares, labels=BRANCHES.values(), colors=("C0", "C9", "0.9"), step="mid")
        decisions.set_title(f"share of weights projected: {label}")
        decisions.set_xlabel("step")
    axes[1, 1].sharey(axes[1, 0])
    axes[2, 0].legend(loc="center right")
    for panel in (loss, apart, axes[1, 1], axes[2, 1]):
        for leg, name in enumerate((first, second, third, first)):
            mark(panel, leg * LENGTH + 0.5, name)
    (DOCS / "handover").mkdir(exist_ok=True)
    figure.savefig(DOCS / "handover" / f"{example}.svg", metadata={"Date": None})
    plt.close(figure)


def mark(panel: Axes, start: float, name: str) -> None:
    """Where a framework takes over."""
    if start > 1:
        panel.axvline(start, color="black", linewidth=0.5, linestyle="--")
    panel.text(start + 0.5, 1, name, transform=panel.get_xaxis_transform(), va="top", fontsize=8)


def main() -> None:
    torch.set_num_threads(1)  # further ones gain nothing on arrays as small as these
    plt.rcParams |= {"svg.hashsalt": "adamp-parity", "svg.fonttype": "none"}
    rows = []
    for example, order in ORDERS.items():
        steps = range(LENGTH * (len(order) + 1))
        handed = list(relay(example, order, LENGTH))
        alone = list(train(example, trainer(example, order[0]), steps))
        moved = list(train(example, nudged(trainer(example, order[0])), steps))
        draw(example, handed, alone, moved)
        rows.append(row(example, handed, alone, moved))
    page = DOCS / "handover.md"
    head = "| | steps | margin | same decisions | loss, handed over | uninterrupted | drift | of a rounding |\n"
    table = head + "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n" + "".join(rows)
    place = re.compile("(?<=<!-- table:begin -->\n).*(?=<!-- table:end -->)", re.DOTALL)
    page.write_text(place.sub(table, page.read_text()))


def row(example: str, handed: Sequence[Step], alone: Sequence[Step], moved: Sequence[Step]) -> str:
    """A line of the table."""
    ends = [np.mean([step.loss for step in run[-10:]]) for run in (handed, alone)]
    apart = [drift(run[-1].after, alone[-1].after) for run in (handed, moved)]
    margin = max(step.margin for step in handed)
    same = sum(map(alike, handed, alone))
    way = ", ".join(NAMES[framework] for framework in (*ORDERS[example], ORDERS[example][0]))
    numbers = [str(len(handed)), f"{margin:.2f}", str(same), *(f"{x:.3f}" for x in ends), *(f"{x:.1e}" for x in apart)]
    return f"| {example}: {way} | {' | '.join(numbers)} |\n"


if __name__ == "__main__":
    main()
