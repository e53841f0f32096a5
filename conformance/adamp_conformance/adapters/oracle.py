"""The oracle itself, on plain NumPy arrays: it must pass its own suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import adamp_spec
from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities, Parameter, State
from adamp_conformance.judge import algorithms
from adamp_spec import SPEC_VERSION, Layout


class OracleAdapter:
    """`adamp_spec`, or a package like it, in each tensor's own working type."""

    def __init__(self, execution: str = "numpy", device: str = "cpu", rules: Any = adamp_spec) -> None:
        self.execution = execution
        self.rules = rules

    def capabilities(self) -> Capabilities:
        version = f"spec {SPEC_VERSION}, numpy {np.__version__}"
        return Capabilities("oracle", version, self.execution, tuple(MOMENTS), tuple(DTYPES), "torch")

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        make_hyper, self.make_state, self.take_step = algorithms(self.rules)[algorithm]
        self.hyper = make_hyper(**hyper)
        layouts = {name: parameter.layout or Layout() for name, parameter in parameters.items()}
        self.layouts = {name: self.rules.Layout(**layout.to_dict()) for name, layout in layouts.items()}
        for name, parameter in parameters.items():
            self.layouts[name].rows(parameter.value.shape)
        values = {name: parameter.value.copy() for name, parameter in parameters.items()}
        zeros = {moment: {name: np.zeros_like(x) for name, x in values.items()} for moment in MOMENTS[algorithm]}
        self.state = State(0, values, zeros)

    def load(self, state: State) -> None:
        for name in state.parameters:
            value, *moments = state.tensors(name).values()
            if any(x.shape != value.shape for x in moments):
                raise ValueError(f"the moments of {name!r} must have the parameter's shape {list(value.shape)}")
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
