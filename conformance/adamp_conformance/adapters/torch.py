"""`adamp_torch` as an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

import adamp_torch
from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities, Parameter, State

_KEYS = {"adamp": {"m": "exp_avg", "v": "exp_avg_sq"}, "sgdp": {"m": "momentum"}}


class TorchAdapter:
    """`adamp_torch.AdamP` and `SGDP`, single-tensor path."""

    def __init__(self, execution: str = "eager", device: str = "cpu") -> None:
        self.execution = execution
        self.device = device

    def capabilities(self) -> Capabilities:
        return Capabilities(
            "torch", f"torch {torch.__version__}", self.execution, tuple(MOMENTS), tuple(DTYPES), "torch"
        )

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        self.algorithm = algorithm
        self.parameters = {name: torch.nn.Parameter(self._tensor(x.value)) for name, x in parameters.items()}
        options = dict(hyper)
        if algorithm == "adamp":
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        options["layouts"] = {self.parameters[name]: x.layout for name, x in parameters.items() if x.layout is not None}
        make = adamp_torch.AdamP if algorithm == "adamp" else adamp_torch.SGDP
        self.optimizer = make(self.parameters.values(), **options)
        zeros = {
            moment: {name: np.zeros_like(x.value) for name, x in parameters.items()} for moment in MOMENTS[algorithm]
        }
        self.load(State(0, {name: x.value for name, x in parameters.items()}, zeros))

    def load(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._tensor(state.parameters[name]))
        saved = self.optimizer.state_dict()
        saved["state"] = {
            index: {"step": torch.tensor(float(state.step))}
            | {key: self._tensor(state.moments[moment][name]) for moment, key in _KEYS[self.algorithm].items()}
            for index, name in enumerate(self.parameters)
        }
        self.optimizer.load_state_dict(saved)

    def step(self, gradients: Arrays) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self._tensor(gradients[name], copy=False)
        self.optimizer.step()

    def dump(self) -> State:
        states = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        (step,) = {int(state["step"]) for state in states.values()}
        moments = {
            moment: {name: _array(state[key]) for name, state in states.items()}
            for moment, key in _KEYS[self.algorithm].items()
        }
        return State(step, {name: _array(parameter) for name, parameter in self.parameters.items()}, moments)

    def _tensor(self, x: np.ndarray, copy: bool = True) -> torch.Tensor:
        """Gradients are not copied on the CPU, so that a step that writes to them is seen."""
        x = x.copy() if copy else x
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(x).to(self.device)


def _array(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return x.numpy().copy()
