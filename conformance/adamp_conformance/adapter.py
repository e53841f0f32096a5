"""What the harness drives: one small class per implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from adamp_spec import Layout

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# Names of an algorithm's moments, in the order of the oracle's state.
MOMENTS = {"adamp": ("m", "v"), "sgdp": ("m",)}

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Capabilities:
    """What an implementation says of itself.

    Attributes:
      name: of the implementation, such as `torch`.
      version: of the implementation and what it runs on.
      execution: how a step is executed: `eager`, `graph`, `jit`, `xla`.
      algorithms: subset of `adamp`, `sgdp`.
      dtypes: keys of `DTYPES`.
      weights: the form in which the framework's own layers store weights: `torch`, (out, in, ...),
        or `keras`, (..., in, out).
      layouts: `any`, or `first`: rows are always the first axis, without batch axes, view or exemption.
      fixed: hyperparameters that the implementation has no switch for, and the value that it stands at.
    """

    name: str
    version: str
    execution: str
    algorithms: tuple[str, ...]
    dtypes: tuple[str, ...]
    weights: Literal["torch", "keras"]
    layouts: Literal["any", "first"] = "any"
    fixed: Mapping[str, Any] = field(default_factory=dict)


class Parameter(NamedTuple):
    """A tensor to optimize; `layout=None` leaves the layout to the implementation's own default for the name."""

    value: np.ndarray
    layout: Layout | None


@dataclass(frozen=True)
class State:
    """Everything that decides the next step.

    Attributes:
      step: steps taken.
      parameters: name -> value.
      moments: moment (`m`, `v`) -> name -> value.
      branches: name -> `adamp_spec.Branch` per slice of the last step, where the implementation knows it.
    """

    step: int
    parameters: dict[str, np.ndarray]
    moments: dict[str, dict[str, np.ndarray]]
    branches: dict[str, np.ndarray] | None = field(default=None, compare=False)

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The parameter (`p`) and the moments of one name."""
        return {"p": self.parameters[name]} | {moment: arrays[name] for moment, arrays in self.moments.items()}


class Adapter(Protocol):
    """Drives one implementation through one problem at a time. Expected values are never handed to it.

    A method raises whatever its implementation raises. Where a vector is to be refused that is the refusal;
    anywhere else the harness reports it as an adapter error.
    """

    def capabilities(self) -> Capabilities:
        """What the implementation supports."""

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        """Starts a problem at step 0 with zero moments.

        Args:
          algorithm: `adamp` or `sgdp`.
          hyper: hyperparameters under the specification's names.
          parameters: what to optimize; one dtype throughout.
        """

    def load(self, state: State) -> None:
        """Replaces parameters, moments and step count."""

    def step(self, gradients: Arrays) -> None:
        """Takes one step; `gradients` are not to be written to."""

    def dump(self) -> State:
        """A copy of the present state."""
