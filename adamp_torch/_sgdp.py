"""SGDP (Heo et al., ICLR 2021, arXiv 2006.08217)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamp_spec import Rows, check_hyperparameter, check_nesterov
from adamp_torch._base import (
    ProjectedOptimizer,
    check_flag,
    coefficient,
    load,
    store,
    working_dtype,
)
from adamp_torch._foreach import load_all, parts, stack, stack_rows, store_all, unstack
from adamp_torch._layouts import Group, Table
from adamp_torch._paths import Batch, pick
from adamp_torch._projection import Directions, Project, project


class SGDP(ProjectedOptimizer):
    r"""SGD with decoupled decay whose update loses its radial part wherever the weights are scale-invariant.

    .. math::
        m &\leftarrow \mu\,m + (1-\text{dampening})\,g, \qquad q = \Pi(m) \\
        p &\leftarrow p\,\Big(1 - \eta\,\frac{\lambda}{1-\mu}\,w\Big) - \eta\,q

    Projection and `w` are those of `AdamP`. The momentum buffer starts at zero and dampening applies from
    the first step (unlike `torch.optim.SGD`). With `delta=0` nothing is projected.

    A drop-in replacement for `adamp.SGDP` 0.3.0 with `project_momentum=True`, whose checkpoints
    `load_state_dict` continues; with `project_momentum=False` it is the paper's Algorithm 1 and today's timm.

    State per parameter: `step` (scalar tensor, on the CPU unless `capturable`; counts, enters nothing) and
    `momentum` (shape, strides and dtype of the parameter). float16 and bfloat16 parameters are computed
    in float32. DTensors are stepped as by `AdamP`.

    Args:
      params: parameters, named parameters, or dicts of parameter groups; each group may set any option.
        Tensors of dtype float64, float32, bfloat16 or float16, of any strides.
      lr: learning rate, a number or a tensor of one element.
      momentum: decay rate of the buffer, in [0, 1).
      dampening: the gradient enters the buffer multiplied by 1 - dampening; in [0, 1].
      weight_decay: decoupled weight decay, applied as weight_decay / (1 - momentum).
      nesterov: step along :math:`g + \mu m` in place of `m`; needs a momentum above 0.
      eps: floor of the norms in the cosine; added to the norm that the projection divides by.
      delta: threshold of the cosine, relative to the square root of the row length.
      wd_ratio: factor on the decay of projected tensors.
      project_momentum: keep the projected direction as the buffer, which is what the official package does.
        No effect with `nesterov`.
      layouts, foreach, fused, capturable, differentiable, maximize: as for `AdamP`.

    Raises:
      ValueError: a hyperparameter outside its domain; a layout that fits no parameter, or not its own.
      TypeError: a hyperparameter of another type; a parameter of another dtype.
      RuntimeError: `foreach`, `fused` and `differentiable` exclude each other; `fused` is True on another device, or
        without the package that compiles the kernels; a parameter has been flattened, as by FullyShardedDataParallel
        (FSDP1) or DeepSpeed ZeRO; a DTensor has Partial placements, or is to be differentiated through.
    """

    MOMENTS = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_momentum: bool = False,
        layouts: Table | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "project_momentum": project_momentum,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "maximize": maximize,
        }
        super().__init__(params, defaults, layouts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for entry in state["state"].values():
            if isinstance(entry, dict) and "momentum" in entry:
                entry.setdefault("step", 0)  # the official package and timm do not count SGDP's steps
        super().__setstate__(state)

    def _check_hyperparameters(self, group: Group) -> None:
        check_flag("project_momentum", group["project_momentum"])
        for name in ("momentum", "dampening", "weight_decay", "eps", "delta", "wd_ratio"):
            group[name] = check_hyperparameter(name, group[name])
        check_nesterov(group["nesterov"], group["momentum"])

    def _options(self, group: Group) -> dict[str, Any]:
        return {name: group[name] for name in _OPTIONS}

    def _directions(self, batch: Batch) -> Directions:
        (param,), (grad,), (rows,), ((buffer,),) = batch.params, batch.grads, batch.rows, batch.moments
        return _directions(param, grad, buffer, rows, **batch.options)[0]

    def _step_plain(self, batch: Batch, foreach: bool, **others: Any) -> None:
        update: Callable[..., None] = _multi_tensor_sgdp if foreach else _single_tensor_sgdp
        update(batch.params, batch.grads, *batch.moments, batch.steps, batch.rows, **batch.options, **others)

    def _step_fused(
        self, kernels: ModuleType, batches: list[Batch], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        kernels.sgdp(batches, grad_scale, found_inf)


_OPTIONS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "eps",
    "delta",
    "wd_ratio",
    "project_momentum",
    "maximize",
    "capturable",
    "differentiable",
)


def _single_tensor_sgdp(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    state_steps: list[Tensor],
    rows: list[Rows],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    eps: float,
    delta: float,
    wd_ratio: float,
    project_momentum: bool,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
    project: Project = project,
) -> None:
    for param, grad, buffer, t, r in zip(params, grads, momenta, state_steps, rows, strict=True):
        t += 1
        (q, p, g), (m,) = _directions(
            param,
            grad,
            buffer,
            r,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            maximize=maximize,
            differentiable=differentiable,
        )
        eta = coefficient(lr, p.dtype)
        q, ratio = project(q, p, g, r, delta=delta, wd_ratio=wd_ratio, eps=eps)
        if project_momentum and not nesterov:
            m = q  # SGDP-3
        p = _descend(p, q, ratio, eta, weight_decay, momentum)

        store(p, param)
        store(m, buffer)


def _directions(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor,
    rows: Rows,
    *,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    differentiable: bool,
    **_: Any,
) -> tuple[Directions, tuple[Tensor, ...]]:
    """`q`, `p` and `g` of a step, and the new `m`, of shape `rows.shape` and of the working dtype."""
    dtype = working_dtype(param.dtype)
    p, m = (load(x, rows, dtype, differentiable) for x in (param, buffer))
    g = load(-grad if maximize else grad, rows, dtype)

    m = torch.add(momentum * m, g, alpha=1 - dampening)  # SGDP-1
    q = g + momentum * m if nesterov else m  # SGDP-2
    return (q, p, g), (m,)


def _multi_tensor_sgdp(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    state_steps: list[Tensor],
    rows: list[Rows],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    eps: float,
    delta: float,
    wd_ratio: float,
    project_momentum: bool,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
) -> None:
    assert not differentiable, "refused by `check_path`"
    if not params:
        return
    torch._foreach_add_(state_steps, 1)
    for part in parts(params, rows, [None] * len(params)):
        dtype = part.dtype
        g = load_all(pick(grads, part.indices), dtype)
        if maximize:
            g = list(torch._foreach_neg(g))
        eta = coefficient(lr, dtype)
        stored = pick(momenta, part.indices)
        m = load_all(stored, dtype)

        torch._foreach_mul_(m, momentum)
        torch._foreach_add_(m, g, alpha=1 - dampening)  # SGDP-1
        store_all(m, stored)
        directions = m
        if nesterov:
            directions = list(torch._foreach_mul(m, momentum))
            torch._foreach_add_(directions, g)  # SGDP-2
        del m

        for indices, place in part.stacks:
            like, r = params[indices[0]], rows[indices[0]]
            p, q, gradient = (stack(x, like, r, dtype) for x in (pick(params, indices), directions[place], g[place]))
            q, ratio = project(q, p, gradient, stack_rows(r, len(indices)), delta=delta, wd_ratio=wd_ratio, eps=eps)
            if project_momentum and not nesterov:
                store_all(unstack(q, like), pick(momenta, indices))  # SGDP-3
            p = _descend(p, q, ratio, eta, weight_decay, momentum)
            store_all(unstack(p, like), pick(params, indices))
        del g, directions, p, q  # before the next part has its own


def _descend(
    p: Tensor, q: Tensor, ratio: Tensor | float, eta: float | Tensor, weight_decay: float, momentum: float
) -> Tensor:
    """The parameter after its decay and the step along `q`, of one tensor or of a stack."""
    if weight_decay > 0:
        p = p * (1 - eta * (weight_decay / (1 - momentum)) * ratio)  # SGDP-4
    return p - eta * q  # SGDP-5
