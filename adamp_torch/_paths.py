"""How a group is stepped: tensor by tensor, many tensors at once, or by kernels of our own."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from adamp_spec import Rows, check_flag
from adamp_torch._layouts import Group

T = TypeVar("T")
PROCESS = os.getpid()  # that has imported the package: a child that it forks must not count on OpenMP's threads


def pick(x: Sequence[T], indices: Sequence[int]) -> list[T]:
    """The entries of `x` at `indices`."""
    return [x[i] for i in indices]


def is_plain(x: Tensor) -> bool:
    """Whether `x` is a tensor or a parameter itself, and not of a subclass, such as a DTensor."""
    return type(x) in (Tensor, torch.nn.Parameter)


class Batch(NamedTuple):
    """What a step has to do for one group.

    Attributes:
      params: the parameters that have a gradient.
      grads: their gradients.
      moments: their state, one list for each of the optimizer's `MOMENTS`.
      steps: their step counters.
      rows: their rows.
      options: the keyword arguments of the update.
    """

    params: list[Tensor]
    grads: list[Tensor]
    moments: list[list[Tensor]]
    steps: list[Tensor]
    rows: list[Rows]
    options: dict[str, Any]

    def pick(self, indices: Sequence[int]) -> Batch:
        """The same for some of the parameters."""
        params, grads, steps = (pick(x, indices) for x in (self.params, self.grads, self.steps))
        moments = [pick(x, indices) for x in self.moments]
        return Batch(params, grads, moments, steps, pick(self.rows, indices), self.options)

    def by_device(self) -> dict[torch.device, Batch]:
        """The same for the parameters on each device."""
        devices = [param.device for param in self.params]
        distinct = dict.fromkeys(devices)
        if len(distinct) == 1:
            return dict.fromkeys(distinct, self)
        return {here: self.pick([i for i, device in enumerate(devices) if device == here]) for here in distinct}


Path = Literal["single", "foreach", "fused"]
_KERNELS = {"cpu": ("adamp_torch._fused_cpu", "numba"), "cuda": ("adamp_torch._fused_cuda", "triton")}


@cache
def fused_kernels(device_type: str) -> ModuleType | None:
    """The module with the kernels for a type of device, or None where there is none or what compiles it is missing."""
    try:
        return importlib.import_module(_KERNELS[device_type][0]) if device_type in _KERNELS else None
    except ImportError:
        return None


def check_path(group: Group) -> None:
    """Raises RuntimeError where the path that a group asks for does not exist, TypeError where a flag is none."""
    for name in ("foreach", "fused"):
        if group[name] is not None:
            check_flag(name, group[name])
        if group[name] and group["differentiable"]:
            raise RuntimeError(f"{name}=True does not support differentiable=True; pass {name}=None or {name}=False")
    if group["foreach"] and group["fused"]:
        raise RuntimeError("foreach=True and fused=True exclude each other; pass one of them")
    if group["fused"]:
        for device_type in _device_types(group["params"]):
            if device_type not in _KERNELS:
                raise RuntimeError(f"fused=True is for parameters on {_DEVICES}, not on {device_type}; pass fused=None")
            if fused_kernels(device_type) is None:
                package = _KERNELS[device_type][1]
                raise RuntimeError(
                    f"fused=True on {device_type} needs {package}, which cannot be imported: pip install {package}, "
                    "or pass fused=None"
                )


_DEVICES = " and ".join(_KERNELS)


def _device_types(params: Iterable[Tensor]) -> set[str]:
    return {param.device.type for param in params}


def choose_path(params: list[Tensor], group: Group) -> Path:
    """How a group is stepped: as it asks for, else as is fastest where that has been measured.

    By default that is `fused` on CPU; `foreach` where torch.optim does so by default; `single` elsewhere, and for
    torch.compile, which fuses operations itself.
    """
    if group["fused"] and not torch.compiler.is_compiling():
        return "fused"
    if group["foreach"] is not None or group["differentiable"]:
        return "foreach" if group["foreach"] else "single"
    may_fuse = group["fused"] is None and all(map(is_plain, params)) and not torch.compiler.is_compiling()
    if may_fuse and _device_types(params) == {"cpu"} and fused_kernels("cpu") is not None:
        return "fused"
    return "foreach" if _default_to_fused_or_foreach(params, group["differentiable"])[1] else "single"
