"""Hyperparameters of both algorithms and their domains (SPEC: HYPER; `hyperparameters.toml` holds the same table)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar, NamedTuple


class Domain(NamedTuple):
    """An interval that holds its lower end, and its upper end where `closed`."""

    low: float
    high: float
    closed: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, Real):
            return False
        number = float(value)
        return self.low <= number < self.high or (self.closed and number == self.high)

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}{']' if self.closed else ')'}"


SMALLEST_NORMAL_FLOAT32 = 2.0**-126

DOMAINS = {
    "lr": Domain(0.0, math.inf),
    "beta1": Domain(0.0, 1.0),
    "beta2": Domain(0.0, 1.0),
    "momentum": Domain(0.0, 1.0),
    "dampening": Domain(0.0, 1.0, closed=True),
    "eps": Domain(
        SMALLEST_NORMAL_FLOAT32, math.inf
    ),  # survives rounding to every working type, so nothing divides by 0
    "weight_decay": Domain(0.0, math.inf),
    "delta": Domain(0.0, math.inf),
    "wd_ratio": Domain(0.0, math.inf),
}


def check_hyperparameter(name: str, value: object, spelling: str | None = None) -> float:
    """Returns `value` as a float if it lies in the domain of hyperparameter `name`.

    Args:
      name: the specification's name, a key of `DOMAINS`.
      value: any real number; NaN lies in no domain.
      spelling: what the caller's framework calls it, for the message.

    Raises:
      TypeError: `value` is not a real number.
      ValueError: `value` lies outside the domain.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{spelling or name} must be a real number, got {value!r}")
    if value not in DOMAINS[name]:
        raise ValueError(f"{spelling or name} must be in {DOMAINS[name]}, got {value!r}")
    return float(value)


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


class _Checked:
    algorithm: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name in DOMAINS:
                object.__setattr__(self, field.name, check_hyperparameter(field.name, value))
            else:
                check_flag(field.name, value)


@dataclass(frozen=True)
class AdamPHyper(_Checked):
    """Hyperparameters of AdamP, binary64 (SPEC: HYPER-1).

    Raises:
      TypeError, ValueError: a value of another type, or outside its domain.
    """

    algorithm: ClassVar[str] = "adamp"

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    delta: float = 0.1
    wd_ratio: float = 0.1
    nesterov: bool = False


@dataclass(frozen=True)
class SGDPHyper(_Checked):
    """Hyperparameters of SGDP, binary64 (SPEC: HYPER-1); `lr` has no default.

    Raises:
      TypeError, ValueError: a value of another type or outside its domain, or Nesterov
        without momentum (SPEC: HYPER-3).
    """

    algorithm: ClassVar[str] = "sgdp"

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    eps: float = 1e-8
    delta: float = 0.1
    wd_ratio: float = 0.1
    project_momentum: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nesterov(self.nesterov, self.momentum)


def check_nesterov(nesterov: bool, momentum: float) -> None:
    """Raises ValueError for SGDP's Nesterov form without momentum (SPEC: HYPER-3)."""
    if nesterov and momentum == 0:
        raise ValueError(f"nesterov=True needs a momentum above 0, got momentum={momentum!r}")
