"""Answers that were recorded elsewhere, in a results file (`spec/PROTOCOL.md`), as an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from adamp_conformance.adapter import Arrays, Capabilities, Parameter, State
from adamp_conformance.protocol import read_answers
from adamp_conformance.vectors import Group, load


class RecordedAdapter:
    """Gives back, for each group of vectors, the states that a results file holds.

    Raises:
      ProtocolError, OSError: the file is not a results file, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.recorded, self.answers = _answers(path)
        self.path = path

    def capabilities(self) -> Capabilities:
        return self.recorded

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        group = next(group for group in load().groups if _is(group, algorithm, hyper, parameters))
        if group.id not in self.answers:
            raise ValueError(f"{self.path} has no answer to {group.id}")
        self.names = set(parameters)
        self.states = iter(self.answers[group.id])
        self.state = group.initial(group.dtype, self.recorded.weights)

    def load(self, state: State) -> None:
        """The file's states start from the vectors' own."""

    def step(self, gradients: Arrays) -> None:
        self.state = next(self.states)

    def dump(self) -> State:
        def mine(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {name: x for name, x in arrays.items() if name in self.names}

        state = self.state
        moments = {moment: mine(arrays) for moment, arrays in state.moments.items()}
        return State(state.step, mine(state.parameters), moments, state.branches and mine(state.branches))


@cache
def _answers(path: Path) -> tuple[Capabilities, dict[str, list[State]]]:
    return read_answers(path, load())


def _is(group: Group, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> bool:
    before = {vector.name: vector.before["p"] for vector in group.vectors}
    return (group.algorithm, group.hyper) == (algorithm, dict(hyper)) and all(
        name in before and before[name].dtype == value.dtype and before[name].tobytes() == value.tobytes()
        for name, (value, _) in parameters.items()
    )
