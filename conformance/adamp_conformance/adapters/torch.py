"""`adamp_torch` as an adapter, on what the adapters of all `torch.optim` optimizers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

import adamp_torch
from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities, Parameter, State
from adamp_spec import Layout

Layouts = dict[torch.Tensor | str, Layout]

_KEYS = {"adamp": {"m": "exp_avg", "v": "exp_avg_sq"}, "sgdp": {"m": "momentum"}}


class OptimizerAdapter:
    """A `torch.optim.Optimizer` under the keywords and state keys of the package `adamp`, driven as a user drives it.

    It is given its state through `load_state_dict`. Until then the state is of its own making: none, which is read
    as step 0 and zeros, and from the first step on what it made.
    """

    def __init__(self, execution: str = "eager", device: str = "cpu") -> None:
        self.execution = execution
        self.device = device

    def _make(self, options: dict[str, Any], layouts: Layouts) -> torch.optim.Optimizer:
        """The optimizer of `self.algorithm` for `self.parameters`."""
        raise NotImplementedError

    def _save_step(self, saved: dict[str, Any], step: int) -> None:
        """Writes the step count into a state dict."""
        for entry in saved["state"].values():
            entry["step"] = step

    def _steps(self) -> set[int]:
        """The step counts that the optimizer holds; one, or there is something wrong."""
        return {int(entry["step"]) for entry in self.optimizer.state.values()}

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        self.algorithm = algorithm
        self.parameters = {name: torch.nn.Parameter(self._tensor(x.value)) for name, x in parameters.items()}
        options = dict(hyper)
        if algorithm == "adamp":
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        layouts: Layouts = {self.parameters[name]: x.layout for name, x in parameters.items() if x.layout is not None}
        self.optimizer = self._make(options, layouts)

    def load(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._tensor(state.parameters[name]))
        saved = self.optimizer.state_dict()
        saved["state"] = {
            index: {key: self._tensor(state.moments[moment][name]) for moment, key in _KEYS[self.algorithm].items()}
            for index, name in enumerate(self.parameters)
        }
        self._save_step(saved, state.step)
        self.optimizer.load_state_dict(saved)

    def step(self, gradients: Arrays) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self._tensor(gradients[name], copy=False)
        self.optimizer.step()

    def dump(self) -> State:
        parameters = {name: _array(parameter) for name, parameter in self.parameters.items()}
        states = [self.optimizer.state.get(parameter) for parameter in self.parameters.values()]
        pairs = list(zip(parameters.items(), states, strict=True))
        moments = {
            moment: {name: _array(state[key]) if state else np.zeros_like(x) for (name, x), state in pairs}
            for moment, key in _KEYS[self.algorithm].items()
        }
        (step,) = self._steps() or {0}
        return State(step, parameters, moments)

    def _tensor(self, x: np.ndarray, copy: bool = True) -> torch.Tensor:
        """Gradients are not copied on the CPU, so that a step that writes to them is seen."""
        x = x.copy() if copy else x
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(x).to(self.device)


class TorchAdapter(OptimizerAdapter):
    """`adamp_torch.AdamP` and `SGDP`: tensor by tensor (`eager`), many at once (`foreach`), own kernels (`fused`)."""

    def capabilities(self) -> Capabilities:
        return Capabilities(
            "torch", f"torch {torch.__version__}", self.execution, tuple(MOMENTS), tuple(DTYPES), "torch"
        )

    def _make(self, options: dict[str, Any], layouts: Layouts) -> torch.optim.Optimizer:
        make = adamp_torch.AdamP if self.algorithm == "adamp" else adamp_torch.SGDP
        paths: dict[str, Any] = {name: self.execution == name for name in ("foreach", "fused")}
        return make(self.parameters.values(), **options, **paths, layouts=layouts)


def _array(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return x.numpy().copy()
