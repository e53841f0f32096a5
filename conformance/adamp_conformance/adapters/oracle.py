"""The oracle itself, on plain NumPy arrays: it must pass its own suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities, Parameter, State
from adamp_conformance.judge import ALGORITHMS
from adamp_spec import SPEC_VERSION, Layout


class OracleAdapter:
    """`adamp_spec` in each tensor's own working type."""

    def __init__(self, execution: str = "eager", device: str = "cpu") -> None:
        self.execution = execution

    def capabilities(self) -> Capabilities:
        version = f"spec {SPEC_VERSION}, numpy {np.__version__}"
        return Capabilities("oracle", version, self.execution, tuple(MOMENTS), tuple(DTYPES), "torch")

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        make_hyper, self.make_state, self.take_step = ALGORITHMS[algorithm]
        self.hyper = make_hyper(**hyper)
        self.layouts = {name: parameter.layout or Layout() for name, parameter in parameters.items()}
        values = {name: parameter.value.copy() for name, parameter in parameters.items()}
        zeros = {moment: {name: np.zeros_like(x) for name, x in values.items()} for moment in MOMENTS[algorithm]}
        self.state = State(0, values, zeros)

    def load(self, state: State) -> None:
        self.state = state

    def step(self, gradients: Arrays) -> None:
        parameters, branches = {}, {}
        moments: dict[str, dict[str, np.ndarray]] = {moment: {} for moment in self.state.moments}
        with np.errstate(all="ignore"):
            for name, gradient in gradients.items():
                before, *old = self.state.tensors(name).values()
                state = self.make_state(self.state.step, *old)
                parameters[name], after, branches[name] = self.take_step(
                    before, gradient, state, self.hyper, self.layouts[name]
                )
                for moment in moments:
                    moments[moment][name] = getattr(after, moment)
        self.state = State(self.state.step + 1, parameters, moments, branches)

    def dump(self) -> State:
        return self.state
