"""Other people's AdamP and SGDP for PyTorch as adapters: what these packages compute, with nothing corrected."""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch

from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities
from adamp_conformance.adapters.torch import Layouts, OptimizerAdapter

_CLASSES = {"adamp": "AdamP", "sgdp": "SGDP"}

# None of them has a switch for it, and False is what paper and specification call SGDP.
_FIXED = {"project_momentum": False}


class _Peer(OptimizerAdapter):
    """The classes `AdamP` and `SGDP` of an installed distribution; rows are always the first axis.

    Hyperparameters in `Capabilities.fixed` are not passed on.
    """

    distribution: ClassVar[str]

    def capabilities(self) -> Capabilities:
        version = f"{self.distribution} {metadata.version(self.distribution)}, torch {torch.__version__}"
        return Capabilities(
            self.distribution, version, self.execution, tuple(MOMENTS), tuple(DTYPES), "torch", "first", _FIXED
        )

    def _package(self) -> Any:
        """What has the classes as attributes."""
        return import_module(self.distribution.replace("-", "_"))

    def _make(self, options: dict[str, Any], layouts: Layouts) -> torch.optim.Optimizer:
        make = getattr(self._package(), _CLASSES[self.algorithm])
        return make(self.parameters.values(), **{name: x for name, x in options.items() if name not in _FIXED})


class AdampAdapter(_Peer):
    """The authors' package `adamp`, and those that keep its state: AdamP counts its steps, SGDP does not."""

    distribution = "adamp"

    def step(self, gradients: Arrays) -> None:
        super().step(gradients)
        if self.algorithm == "sgdp":  # no step count enters its result; here is one for `State`
            for entry in self.optimizer.state.values():
                entry["step"] = entry.get("step", 0) + 1


class TorchOptimizerAdapter(AdampAdapter):
    """`torch-optimizer` by jettify."""

    distribution = "torch-optimizer"


class TimmAdapter(AdampAdapter):
    """The classes of timm, at their own defaults; the factory `create_optimizer_v2` has others."""

    distribution = "timm"

    def _package(self) -> Any:
        """The folder `timm.optim` alone: `import timm` needs a torchvision for the same torch, these two do not."""
        if "timm_optim" not in sys.modules:
            package = ModuleType("timm_optim")
            package.__path__ = [str(metadata.distribution("timm").locate_file("timm/optim"))]
            sys.modules["timm_optim"] = package
        modules = {name: import_module(f"timm_optim.{algorithm}") for algorithm, name in _CLASSES.items()}
        return SimpleNamespace(**{name: getattr(module, name) for name, module in modules.items()})


class PytorchOptimizerAdapter(_Peer):
    """`pytorch-optimizer` by kozistr: execution `loop`, its default, or `foreach`. A group has one step count."""

    distribution = "pytorch-optimizer"

    def __init__(self, execution: str = "loop", device: str = "cpu") -> None:
        super().__init__(execution, device)

    def _make(self, options: dict[str, Any], layouts: Layouts) -> torch.optim.Optimizer:
        return super()._make(options | {"foreach": self.execution == "foreach"}, layouts)

    def _save_step(self, saved: dict[str, Any], step: int) -> None:
        for group in saved["param_groups"]:
            group["step"] = step

    def _steps(self) -> set[int]:
        return {group.get("step", 0) for group in self.optimizer.param_groups}
