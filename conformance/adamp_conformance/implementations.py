"""The implementations that the suite knows, and which of them can run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from adamp_conformance.adapter import Adapter


@dataclass(frozen=True)
class Implementation:
    """One way to execute one implementation; each is a row of the report.

    Attributes:
      backend: the implementation, such as `keras`.
      execution: how it executes a step.
      adapter: `module:class` under `adamp_conformance.adapters`.
      needs: modules that must be importable.
      extra: the extra of this distribution that installs them, empty for none.
    """

    backend: str
    execution: str
    adapter: str
    needs: tuple[str, ...] = ()
    extra: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.execution}"

    @property
    def missing(self) -> tuple[str, ...]:
        """Needed modules that are not installed."""
        return tuple(module for module in self.needs if find_spec(module) is None)

    def factory(self, device: str) -> Callable[[], Adapter]:
        """Makes adapters on `device`; imports the framework."""
        module, _, name = self.adapter.partition(":")
        make = getattr(importlib.import_module(f"adamp_conformance.adapters.{module}"), name)
        return lambda: make(self.execution, device)


ORACLE = Implementation("oracle", "numpy", "oracle:OracleAdapter")
IMPLEMENTATIONS = (
    ORACLE,
    Implementation("torch", "eager", "torch:TorchAdapter", ("torch",), "torch"),
    *(
        Implementation("keras", execution, "keras:KerasAdapter", ("keras", "tensorflow"), "tf")
        for execution in ("eager", "graph", "xla")
    ),
    *(
        Implementation("optax", execution, "optax:OptaxAdapter", ("jax", "optax"), "jax")
        for execution in ("eager", "jit")
    ),
)


def select(wanted: Iterable[str]) -> list[Implementation]:
    """The implementations named by backend (`keras`) or in full (`keras-xla`); all for nothing wanted.

    Raises:
      ValueError: a name is unknown.
    """
    wanted = set(wanted)
    known = {name for x in IMPLEMENTATIONS for name in (x.backend, x.name)}
    if unknown := sorted(wanted - known):
        raise ValueError(f"unknown backend {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return [x for x in IMPLEMENTATIONS if not wanted or {x.backend, x.name} & wanted]
