"""The conformance harness of AdamP and SGDP: vectors, adapters, judge, reports and the command `adamp-parity`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adamp_conformance.adapter import Adapter, Capabilities, Parameter, State
    from adamp_conformance.pytest_plugin import suite

__all__ = ["Adapter", "Capabilities", "Parameter", "State", "suite"]


def __getattr__(name: str) -> Any:
    """Imported on use: pytest imports this package, for its plugin, wherever the distribution is installed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'pytest_plugin' if name == 'suite' else 'adapter'}"), name)
