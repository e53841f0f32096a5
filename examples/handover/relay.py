"""A training that goes from framework to framework, every step of it judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from batches import digits, text
from trainers import Arrays, Held, Trainer, trainer

from adamp_conformance.adapter import State
from adamp_conformance.judge import judge_step
from adamp_conformance.port.derive import propose
from adamp_conformance.port.maps import Map, convert_snapshot
from adamp_spec.snapshot import MOMENTS

BATCHES = {"resnet": digits, "transformer": text, "recurrent": digits}


class Step(NamedTuple):
    """One step of a training: what it held before and after, and what happened in between.

    Attributes:
      loss: of the batch, before.
      margin: the judge's; at most 1.
      decisions: by each parameter's name, the branch that its elements took, in its shape.
    """

    before: Held
    after: Held
    loss: float
    margin: float
    decisions: Arrays


def map_between(source: Trainer, target: Trainer) -> Map:
    """The derived map.

    Raises:
      ValueError: a layer of one has none in the other.
    """
    proposal = propose(source.training.inventory(), target.training.inventory())
    if left := [*proposal.unmatched_source, *proposal.unmatched_target]:
        raise ValueError(f"no counterpart for {left}")
    return proposal.map


def hand_over(source: Trainer, target: Trainer, map: Map) -> None:
    """The target goes on where the source stands."""
    with TemporaryDirectory() as folder:
        here, there = Path(folder) / "source.safetensors", Path(folder) / "target.safetensors"
        source.training.save_snapshot(here)
        convert_snapshot(here, there, map)
        target.training.load_snapshot(there)


def carried(held: Held, map: Map) -> Held:
    """The same in the names and forms of the map's target."""
    header, tensors = map.apply(held.snapshot, held.lazy())
    return Held(header, {name: tensor.read() for name, tensor in tensors.items()})


def carried_beside(held: Held, arrays: Arrays, map: Map) -> Arrays:
    """Arrays of the parameters' names, shapes and dtypes, such as gradients, go over as momentum does."""
    momentum = {f"m/{name}": x for name, x in arrays.items()}
    there = carried(held._replace(tensors=held.tensors | momentum), map)
    return {name: there.tensors[f"m/{name}"] for name in there.snapshot.parameters}


def judge(before: Held, gradients: Arrays, after: Held) -> tuple[float, Arrays]:
    """The margin and the decisions of a step, as `Step` has them.

    Raises:
      AssertionError: the step is not the oracle's.
    """
    worst, decisions = 0.0, Arrays()
    for group, hyper in enumerate(before.snapshot.groups):
        entries = {name: entry for name, entry in before.snapshot.parameters.items() if entry.group == group}
        layouts = {name: entry.layout for name, entry in entries.items()}
        mine = {name: gradients[name] for name in entries}
        verdict = judge_step(before.snapshot.algorithm, asdict(hyper), layouts, _state(before), mine, _state(after))
        assert verdict.conforms, f"{verdict.problem or verdict.place}, margin {verdict.margin:.3g}"
        worst = max(worst, verdict.margin)
        for name, branches in verdict.branches.items():
            x = gradients[name]
            everywhere = np.broadcast_to(branches, layouts[name].rows(x.shape).shape)
            decisions[name] = everywhere.reshape(x.shape).astype(x.dtype)
    return worst, decisions


def train(example: str, runner: Trainer, steps: Iterable[int]) -> Iterator[Step]:
    """Trains on the batches of these steps, and judges each."""
    before = runner.hold()
    for step in steps:
        loss, gradients = runner.gradients(*BATCHES[example](step))
        runner.step(gradients)
        after = runner.hold()
        yield Step(before, after, loss, *judge(before, gradients, after))
        before = after


def relay(example: str, order: Sequence[str], length: int) -> Iterator[Step]:
    """A training that goes on in the next framework after every `length` steps, and at last in the first again.

    What the steps hold is in the first one's names and forms.
    """
    trainers = {framework: trainer(example, framework) for framework in order}
    source = first = trainers[order[0]]
    for leg, runner in enumerate([*trainers.values(), first]):
        if runner is not source:
            hand_over(source, runner, map_between(source, runner))
        home = None if runner is first else map_between(runner, first)
        for step in train(example, runner, range(leg * length, (leg + 1) * length)):
            if home is not None:
                decisions = carried_beside(step.before, step.decisions, home)
                before, after = carried(step.before, home), carried(step.after, home)
                step = step._replace(before=before, after=after, decisions=decisions)
            yield step
        source = runner


def _state(held: Held) -> State:
    def named(kind: str) -> Arrays:
        return {name: held.tensors[f"{kind}/{name}"] for name in held.snapshot.parameters}

    moments = {moment: named(moment) for moment in MOMENTS[held.snapshot.algorithm]}
    return State(held.snapshot.common_step("the judge"), named("parameter"), moments)
