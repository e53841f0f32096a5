"""What is compared: our paths, other people's AdamP and SGDP, and the optimizers of PyTorch that are the measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer

from adamp_conformance.adapters.peers import TimmAdapter
from adamp_torch._paths import choose_path

Parameters = list[torch.nn.Parameter]

# A learning rate this small leaves the parameters, and with them every decision, as they are in any number of steps.
_OPTIONS: dict[str, dict[str, Any]] = {
    "adamp": {"lr": 1e-9, "weight_decay": 0.01},
    "sgdp": {"lr": 1e-9, "weight_decay": 0.01, "momentum": 0.9},
}
_CLASSES = {"adamp": "AdamP", "sgdp": "SGDP"}
_PLAIN = {"adamp": "AdamW", "sgdp": "SGD"}

# Tensors read and written once per element by our fused kernels, which PyTorch does not dispatch. The first pass reads
# p and g, the second p, g and the moments and writes all but g; caches may spare the second some reads.
FUSED_ACCESSES = {"adamp": 2 + 7, "sgdp": 2 + 5}


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    Attributes:
      name: as on the command line and in tables.
      algorithm: `adamp` or `sgdp`, also for the optimizer of PyTorch that is its measure.
      package: the distribution that it comes from.
      make: the optimizer of given parameters.
    """

    name: str
    algorithm: str
    package: str
    make: Callable[[Parameters], Optimizer]


def path_taken(optimizer: Optimizer) -> str | None:
    """The path of a step of one of our optimizers, which has one group; None for those of others."""
    group = optimizer.param_groups[0]
    return choose_path(group["params"], group) if type(optimizer).__module__.startswith("adamp_torch") else None


def _contender(algorithm: str, way: str, package: str, module: str | Callable[[], Any], **options: Any) -> Contender:
    cls = (_PLAIN if package == "torch" else _CLASSES)[algorithm]

    def make(params: Parameters) -> Optimizer:
        namespace = import_module(module) if isinstance(module, str) else module()
        return getattr(namespace, cls)(params, **_OPTIONS[algorithm], **options)

    return Contender(f"{cls.lower()}-{way}", algorithm, package, make)


def _floor(algorithm: str) -> Contender:
    """PyTorch's fused optimizer, after one look at parameter and gradient of every matrix.

    No AdamP or SGDP can decide before it has seen both, nor begin to write before it has decided.
    """
    base: type[Optimizer] = getattr(torch.optim, _PLAIN[algorithm])

    class Floor(base):  # type: ignore[misc, valid-type]
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.ndim > 1:
                        p.sum()
                        p.grad.sum()
            super().step(closure)

    name = f"{_CLASSES[algorithm].lower()}-floor"
    return Contender(name, algorithm, "torch", lambda params: Floor(params, **_OPTIONS[algorithm], fused=True))


def _all(algorithm: str) -> list[Contender]:
    plain, ours = ("torch", "torch.optim"), ("adamp-parity", "adamp_torch")
    return [
        _contender(algorithm, "loop", *plain, foreach=False, fused=False),
        _contender(algorithm, "foreach", *plain, foreach=True),
        _contender(algorithm, "fused", *plain, fused=True),
        _floor(algorithm),
        _contender(algorithm, "single", *ours, foreach=False, fused=False),
        _contender(algorithm, "foreach", *ours, foreach=True),
        _contender(algorithm, "fused", *ours, fused=True),
        _contender(algorithm, "default", *ours),
        _contender(algorithm, "official", "adamp", "adamp"),
        _contender(algorithm, "timm", "timm", TimmAdapter()._package),
        _contender(algorithm, "pytorch-optimizer-loop", "pytorch-optimizer", "pytorch_optimizer"),
        _contender(algorithm, "pytorch-optimizer-foreach", "pytorch-optimizer", "pytorch_optimizer", foreach=True),
    ]


CONTENDERS = {x.name: x for algorithm in _CLASSES for x in _all(algorithm)}

# By algorithm, what ratios are of: the fused optimizer without a projection, and the authors' own.
MEASURES = {algorithm: (f"{_PLAIN[algorithm].lower()}-fused", f"{algorithm}-official") for algorithm in _CLASSES}
