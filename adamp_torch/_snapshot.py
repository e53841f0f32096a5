"""Snapshots of a model and its optimizer, which every backend reads (SNAPSHOT.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import Buffer, Module, Parameter

from adamp_spec import AdamPHyper, Layout, SGDPHyper, snapshot
from adamp_spec.snapshot import MOMENTS, NUMPY, Entry, Hyper, Place, Snapshot, SnapshotError
from adamp_torch._adamp import AdamP
from adamp_torch._base import DTYPES, ProjectedOptimizer, step_tensor
from adamp_torch._layouts import Group, group_layouts
from adamp_torch._sharding import is_sharded

_NAMES = {
    dtype: NUMPY[str(dtype).removeprefix("torch.")]
    for dtype in (*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_STEPS = 2**24  # beyond, float32 has no odd numbers


def save_snapshot(path: str | os.PathLike[str], model: Module, optimizer: ProjectedOptimizer) -> None:
    """Writes the model's tensors and the optimizer's state to a file that the other backends read, too.

    Tensor after tensor goes through the host's memory; the file is there whole or not at all. What it does not hold:
    learning rate schedules, `foreach` and the like, which choose a path and not a result, and random states.

    Args:
      path: the file; one that is there is replaced.
      model: holds the optimizer's parameters.
      optimizer: `AdamP` or `SGDP`.

    Raises:
      ValueError: the optimizer has a parameter that the model lacks; it ascends (`maximize`).
      TypeError: the optimizer is another one; a tensor is sharded, or of a dtype that a snapshot cannot hold; the model
        has extra state.
      OSError: the file cannot be written.
    """
    algorithm, hyper = _hyperparameters(optimizer)
    names, others = _named(model, optimizer)
    entries: dict[str, Entry] = {}
    tensors: dict[str, snapshot.Tensor] = {}
    for i, _, param, layout in _parameters(optimizer):
        state = optimizer.state.get(param) or {}
        name = names[param]
        entries[name] = Entry(i, int(state.get("step", 0)), layout)
        tensors[f"parameter/{name}"] = _tensor(name, param)
        for kind, key in zip(MOMENTS[algorithm], optimizer.MOMENTS, strict=True):
            tensors[f"{kind}/{name}"] = _tensor(f"{name}, {key}", state.get(key, param.new_zeros(()).expand_as(param)))
    tensors |= {f"other/{name}": _tensor(name, x) for name, x in others.items()}
    snapshot.write(path, Snapshot(algorithm, hyper, entries), tensors)


@torch.no_grad()
def load_snapshot(path: str | os.PathLike[str], model: Module, optimizer: ProjectedOptimizer) -> None:
    """Loads what `save_snapshot` of any backend has written: parameters, moments, steps and hyperparameters.

    Args:
      path: the file.
      model: has tensors of the same names, shapes and dtypes.
      optimizer: `AdamP` or `SGDP`, with the same layouts, and groups that keep apart what differs.

    Raises:
      adamp_spec.snapshot.SnapshotError: the file is no snapshot, is damaged, or does not fit. Nothing has changed then.
      ValueError, TypeError: as `save_snapshot`.
    """
    algorithm, _ = _hyperparameters(optimizer)
    names, others = _named(model, optimizer)
    places = {
        names[param]: Place(_NAMES[param.dtype], tuple(param.shape), i, layout)
        for i, _, param, layout in _parameters(optimizer)
    }
    kept = {name: (_NAMES[x.dtype], tuple(x.shape)) for name, x in others.items()}
    with snapshot.opened(path) as (saved, tensors):
        become = saved.check_target(tensors, algorithm, places, kept)
        if late := [name for name, entry in saved.parameters.items() if entry.step > _STEPS]:
            raise SnapshotError(
                f"parameters {late} have taken more than {_STEPS} steps, which PyTorch's count cannot hold"
            )
        _own_rates(optimizer)
        for i, hyper in become.items():
            _take_over(optimizer.param_groups[i], hyper)
        for _, group, param, _ in _parameters(optimizer):
            name = names[param]
            _fill(param, tensors[f"parameter/{name}"])
            state = optimizer.state[param]
            state["step"] = step_tensor(saved.parameters[name].step, param, group)
            for kind, key in zip(MOMENTS[algorithm], optimizer.MOMENTS, strict=True):
                moment = tensors[f"{kind}/{name}"]
                if key not in state or _NAMES[state[key].dtype] != moment.dtype:
                    state[key] = torch.empty_like(param, dtype=_DTYPES[moment.dtype])
                _fill(state[key], moment)
        for name, x in others.items():
            _fill(x, tensors[f"other/{name}"])


def _parameters(optimizer: ProjectedOptimizer) -> Iterator[tuple[int, Group, Tensor, Layout]]:
    for i, group in enumerate(optimizer.param_groups):
        for param, layout in zip(group["params"], group_layouts(group), strict=True):
            yield i, group, param, layout


def _named(model: Module, optimizer: ProjectedOptimizer) -> tuple[dict[Tensor, str], dict[str, Tensor]]:
    """The names of the optimizer's parameters, and what the model holds besides."""
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    optimized = [param for *_, param, _ in _parameters(optimizer)]
    if strangers := [tuple(param.shape) for param in optimized if param not in names]:
        raise ValueError(f"the optimizer has parameters of shapes {strangers} that are not in the model")
    held: dict[str, Any] = model.state_dict(keep_vars=True)
    mine = set(map(id, optimized))
    others = {name: x for name, x in held.items() if id(x) not in mine}
    for name, x in {**others, **{names[param]: param for param in optimized}}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name!r} of the model's state is {type(x).__name__}, and a snapshot holds tensors only")
        if is_sharded(x):
            raise TypeError(f"{name!r} is sharded; gather it first (get_model_state_dict with full_state_dict=True)")
        if x.dtype not in _NAMES:
            raise TypeError(f"{name!r} is {x.dtype}, which a snapshot cannot hold")
    return names, others


def _hyperparameters(optimizer: ProjectedOptimizer) -> tuple[str, tuple[Hyper, ...]]:
    """The algorithm, and each group's hyperparameters as the specification names them."""
    if not isinstance(optimizer, ProjectedOptimizer):
        raise TypeError(f"the optimizer is {type(optimizer).__name__}; make it adamp_torch.AdamP or SGDP")
    if any(group["maximize"] for group in optimizer.param_groups):
        raise ValueError("maximize=True has no counterpart in the other frameworks: negate the loss instead")
    hyper: type[Hyper] = AdamPHyper if isinstance(optimizer, AdamP) else SGDPHyper
    found = []
    for group in optimizer.param_groups:
        given = group | dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False)) | {"lr": float(group["lr"])}
        found.append(hyper(**{field.name: given[field.name] for field in fields(hyper)}))
    return hyper.algorithm, tuple(found)


def _own_rates(optimizer: ProjectedOptimizer) -> None:
    """Gives each group a tensor of its own for a learning rate that several share, as the constructor makes it."""
    seen: list[Tensor] = []
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            if any(group["lr"] is x for x in seen):
                group["lr"] = group["lr"].clone()
            seen.append(group["lr"])


def _take_over(group: Group, hyper: Hyper) -> None:
    """Gives a group the hyperparameters of a snapshot."""
    given = asdict(hyper)
    if isinstance(hyper, AdamPHyper):
        given["betas"] = (given.pop("beta1"), given.pop("beta2"))
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(given.pop("lr"))
    group.update(given)


def _tensor(name: str, x: Tensor) -> snapshot.Tensor:
    def read() -> Any:
        return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    return snapshot.Tensor(_NAMES[x.dtype], tuple(x.shape), read)


def _fill(x: Tensor, tensor: snapshot.Tensor) -> None:
    """Reads a tensor's elements straight into its memory, or by way of the host's where they lie otherwise."""
    direct = x.device.type == "cpu" and x.is_contiguous() and type(x) in (Tensor, Parameter, Buffer)
    host = x.detach() if direct else torch.empty(x.shape, dtype=x.dtype)
    tensor.read(host.reshape(-1).view(torch.uint8).numpy())
    if direct:
        torch.autograd.graph.increment_version(x)  # as an operation in place does
    else:
        x.copy_(host)
