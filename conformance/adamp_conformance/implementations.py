"""The implementations that the suite knows by name, and how others are named."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from adamp_conformance.adapter import Adapter

EXEC = "exec:"


@dataclass(frozen=True)
class Implementation:
    """One way to execute one implementation; each is a row of the report.

    Attributes:
      backend: the implementation, such as `keras`.
      execution: how it executes a step; empty where nothing distinguishes executions.
      adapter: `module:class` of an adapter, or something that makes one.
      arguments: whether the adapter is made with execution and device as arguments, as ours are.
      needs: modules that must be importable.
      extra: the extra of this distribution that installs them, empty for none.
      ours: whether it is run when nothing is asked for.
      recorded: whether it only holds answers to vectors.
    """

    backend: str
    execution: str
    adapter: str | Callable[[], Adapter]
    needs: tuple[str, ...] = ()
    extra: str = ""
    arguments: bool = True
    ours: bool = False
    recorded: bool = False

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.execution}" if self.execution else self.backend

    @property
    def missing(self) -> tuple[str, ...]:
        """Needed modules that are not installed."""
        return tuple(module for module in self.needs if find_spec(module) is None)

    def factory(self, device: str) -> Callable[[], Adapter]:
        """Makes adapters on `device`; imports the framework."""
        make = _imported(self.adapter) if isinstance(self.adapter, str) else self.adapter
        return partial(make, *((self.execution, device) if self.arguments else ()))


def _imported(path: str) -> Callable[..., Adapter]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _ours(backend: str, adapter: str, needs: tuple[str, ...], extra: str, *executions: str) -> list[Implementation]:
    path = f"adamp_conformance.adapters.{backend}:{adapter}"
    return [Implementation(backend, execution, path, needs, extra, ours=True) for execution in executions]


def _peer(backend: str, adapter: str, module: str, execution: str = "eager") -> Implementation:
    path = f"adamp_conformance.adapters.peers:{adapter}"
    return Implementation(backend, execution, path, ("torch", module), "peers")


(ORACLE,) = _ours("oracle", "OracleAdapter", (), "", "numpy")
IMPLEMENTATIONS = (
    ORACLE,
    *_ours("torch", "TorchAdapter", ("torch",), "torch", "eager", "foreach"),
    *_ours("torch", "TorchAdapter", ("torch", "numba"), "torch", "fused"),
    Implementation("torch", "sharded", "adamp_conformance.adapters.torch_sharded:ShardedAdapter", ("torch",), "torch"),
    *_ours("keras", "KerasAdapter", ("keras", "tensorflow"), "tf", "eager", "graph", "xla"),
    *(
        Implementation("keras", x, "adamp_conformance.adapters.keras_process:KerasProcessAdapter", ("keras", x), "all")
        for x in ("jax", "torch")
    ),
    *_ours("optax", "OptaxAdapter", ("jax", "optax"), "jax", "eager", "jit"),
    *(
        Implementation("optax", execution, f"adamp_conformance.adapters.{adapter}", ("jax", "optax"), "jax")
        for execution, adapter in (
            ("donated", "optax:OptaxAdapter"),
            ("x64", "optax:OptaxAdapter"),
            ("sharded", "optax_sharded:ShardedAdapter"),
        )
    ),
    _peer("adamp", "AdampAdapter", "adamp"),
    _peer("timm", "TimmAdapter", "timm"),
    _peer("torch-optimizer", "TorchOptimizerAdapter", "torch_optimizer"),
    _peer("pytorch-optimizer", "PytorchOptimizerAdapter", "pytorch_optimizer", "loop"),
    _peer("pytorch-optimizer", "PytorchOptimizerAdapter", "pytorch_optimizer", "foreach"),
)


def resolve(adapter: str | Callable[[], Adapter]) -> list[Implementation]:
    """What an adapter's name, or something that makes one, stands for.

    Args:
      adapter: a known backend (`keras`: every execution) or row (`keras-xla`); `package.module:Class`, made without
        arguments; `exec:COMMAND`, a program that speaks the protocol of `spec/PROTOCOL.md`; or a callable.

    Raises:
      ValueError: no such name, module or attribute.
    """
    if not isinstance(adapter, str):
        return [Implementation(getattr(adapter, "__name__", repr(adapter)), "", adapter, arguments=False)]
    if known := [x for x in IMPLEMENTATIONS if adapter in (x.backend, x.name)]:
        return known
    if adapter.startswith(EXEC):
        from adamp_conformance.adapters.process import ProcessAdapter

        command = adapter.removeprefix(EXEC)
        return [Implementation(adapter, "", partial(ProcessAdapter, command), arguments=False)]
    if ":" not in adapter:
        names = sorted({name for x in IMPLEMENTATIONS for name in (x.backend, x.name)})
        raise ValueError(
            f"unknown adapter {adapter!r}; known are {', '.join(names)}, and package.module:Class or {EXEC}COMMAND"
        )
    try:
        _imported(adapter)
    except (Exception, SystemExit) as error:  # the module is not ours
        raise ValueError(f"adapter {adapter!r} cannot be imported: {error}") from error
    return [Implementation(adapter, "", adapter, arguments=False)]


def recorded_by(path: Path) -> Implementation:
    """The implementation whose answers a results file holds."""
    from adamp_conformance.adapters.recorded import RecordedAdapter

    return Implementation(str(path), "", partial(RecordedAdapter, path), arguments=False, recorded=True)


def select(wanted: Iterable[str]) -> list[Implementation]:
    """The implementations that `wanted` names, in their order; ours for nothing wanted.

    Raises:
      ValueError: a name is unknown; see `resolve`.
    """
    found = [implementation for name in wanted for implementation in resolve(name)]
    return list(dict.fromkeys(found)) or [x for x in IMPLEMENTATIONS if x.ours]
