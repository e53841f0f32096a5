"""AdamP (Heo et al., ICLR 2021, arXiv 2006.08217)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adamp_spec import Rows, check_hyperparameter
from adamp_torch._base import (
    ProjectedOptimizer,
    bias_correction,
    coefficient,
    load,
    store,
    working_dtype,
)
from adamp_torch._foreach import (
    load_all,
    parts,
    per_tensor,
    stack,
    stack_rows,
    step_keys,
    step_of,
    store_all,
    unstack,
)
from adamp_torch._layouts import Group, Table
from adamp_torch._paths import Batch, pick
from adamp_torch._projection import Directions, Project, project


class AdamP(ProjectedOptimizer):
    r"""AdamW whose update loses its radial part wherever the weights are scale-invariant.

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2 \\
        q &= \Pi\big(m \,/\, (\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon)\big) \\
        p &\leftarrow p\,(1 - \eta\,\lambda\,w) - \frac{\eta}{1-\beta_1^t}\,q

    For a tensor of rank 2 or more, if :math:`|\cos(g, p)| < \delta / \sqrt{d}` in every row of length
    :math:`d`, the projection :math:`\Pi` takes the part along `p` out of each row and the decay is
    multiplied by `w = wd_ratio`; failing that, the same with the whole tensor as one row; failing that,
    :math:`\Pi(q) = q` and `w = 1`. With `delta=0` this is AdamW.

    A drop-in replacement for `adamp.AdamP` 0.3.0, whose checkpoints `load_state_dict` continues, as it
    does those of timm and, since the state is the same, of `torch.optim.AdamW`.

    State per parameter: `step` (scalar tensor, on the CPU unless `capturable`), `exp_avg` and `exp_avg_sq`
    (shape, strides and dtype of the parameter). float16 and bfloat16 parameters are computed in float32.

    Parameters may be DTensors, as `torch.distributed.fsdp.fully_shard` and tensor parallelism make them; moments are
    placed likewise. Processes exchange sums to decide, in one all-reduce for each dimension of a mesh that rows, or the
    rows of a tensor, are spread over, or two where both occur. Tensors that take part in it are stepped one by one,
    whatever `foreach` and `fused` say, which are for the others.

    Args:
      params: parameters, named parameters, or dicts of parameter groups; each group may set any option.
        Tensors of dtype float64, float32, bfloat16 or float16, of any strides.
      lr: learning rate, a number or a tensor of one element.
      betas: decay rates of the two moments, in [0, 1).
      eps: added to the denominator; floor of the norms in the cosine.
      weight_decay: decoupled weight decay.
      delta: threshold of the cosine, relative to the square root of the row length.
      wd_ratio: factor on the decay of projected tensors.
      nesterov: use :math:`\beta_1 m + (1-\beta_1) g` in place of the updated `m` in `q`.
      layouts: mapping from parameters, or from names or regular expressions on names (with named
        parameters), to `adamp_spec.Layout`. The default is `Layout(0)`: dim 0 indexes the rows, as PyTorch's
        own layers have it. A group may bring its own mapping, which then replaces this one.
      foreach: step many tensors at once. Results differ from those of the loop by rounding. The default is True
        for plain tensors on CUDA and the like, False elsewhere, as in torch.optim. Intermediate tensors hold
        up to 8 numbers of the working dtype for each of 2**25 elements, or of the largest parameter.
      fused: step all tensors of all groups with kernels of this package, compiled at the first step: by numba on CPU,
        by Triton on CUDA. The default is True for plain tensors on CPU where numba is installed, False elsewhere:
        on CUDA the kernels have been checked, but not measured. With `fused=True`, torch.amp.GradScaler leaves
        unscaling to the step. torch.compile takes another path.
      capturable: keep `step` on the parameter's device and never read it on the host.
      differentiable: let autograd run through the step.
      maximize: ascend instead of descend.

    Raises:
      ValueError: a hyperparameter outside its domain; a layout that fits no parameter, or not its own.
      TypeError: a hyperparameter of another type; a parameter of another dtype.
      RuntimeError: `foreach`, `fused` and `differentiable` exclude each other; `fused` is True on another device, or
        without the package that compiles the kernels; a parameter has been flattened, as by FullyShardedDataParallel
        (FSDP1) or DeepSpeed ZeRO; a DTensor has Partial placements, or is to be differentiated through.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        layouts: Table | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "maximize": maximize,
        }
        super().__init__(params, defaults, layouts)

    def _check_hyperparameters(self, group: Group) -> None:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
        group["betas"] = tuple(check_hyperparameter(f"beta{i + 1}", betas[i], f"betas[{i}]") for i in range(2))
        for name in ("eps", "weight_decay", "delta", "wd_ratio"):
            group[name] = check_hyperparameter(name, group[name])

    def _options(self, group: Group) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2} | {name: group[name] for name in _OPTIONS}

    def _directions(self, batch: Batch) -> Directions:
        (param,), (grad,), (t,), (rows,) = batch.params, batch.grads, batch.steps, batch.rows
        (exp_avg,), (exp_avg_sq,) = batch.moments
        return _directions(param, grad, exp_avg, exp_avg_sq, t + 1, rows, **batch.options)[0]

    def _step_plain(self, batch: Batch, foreach: bool, **others: Any) -> None:
        update: Callable[..., None] = _multi_tensor_adamp if foreach else _single_tensor_adamp
        update(batch.params, batch.grads, *batch.moments, batch.steps, batch.rows, **batch.options, **others)

    def _step_fused(
        self, kernels: ModuleType, batches: list[Batch], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        kernels.adamp(batches, grad_scale, found_inf)


_OPTIONS = (
    "lr",
    "eps",
    "weight_decay",
    "delta",
    "wd_ratio",
    "nesterov",
    "maximize",
    "capturable",
    "differentiable",
)


def _single_tensor_adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    rows: list[Rows],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
    project: Project = project,
) -> None:
    for param, grad, exp_avg, exp_avg_sq, t, r in zip(
        params, grads, exp_avgs, exp_avg_sqs, state_steps, rows, strict=True
    ):
        t += 1
        (q, p, g), (m, v) = _directions(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            t,
            r,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            nesterov=nesterov,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        eta = coefficient(lr, p.dtype)
        step_size = eta / bias_correction(beta1, t, p.dtype, capturable)
        q, ratio = project(q, p, g, r, delta=delta, wd_ratio=wd_ratio, eps=eps)
        p = _descend(p, q, ratio, eta, step_size, weight_decay)

        store(p, param)
        store(m, exp_avg)
        store(v, exp_avg_sq)


def _directions(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: Tensor,
    rows: Rows,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    nesterov: bool,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
    **_: Any,
) -> tuple[Directions, tuple[Tensor, ...]]:
    """`q`, `p` and `g` of step `t`, and the new `m` and `v`, of shape `rows.shape` and of the working dtype."""
    dtype = working_dtype(param.dtype)
    p, m, v = (load(x, rows, dtype, differentiable) for x in (param, exp_avg, exp_avg_sq))
    g = load(-grad if maximize else grad, rows, dtype)
    sqrt_bc2 = bias_correction(beta2, t, dtype, capturable) ** 0.5

    m = torch.add(beta1 * m, g, alpha=1 - beta1)  # ADAMP-1
    v = torch.addcmul(beta2 * v, g, g, value=1 - beta2)  # ADAMP-2
    n = torch.add(beta1 * m, g, alpha=1 - beta1) if nesterov else m  # ADAMP-3
    q = n / (v.sqrt() / sqrt_bc2 + eps)  # ADAMP-4
    return (q, p, g), (m, v)


def _multi_tensor_adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    rows: list[Rows],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
) -> None:
    assert not differentiable, "refused by `check_path`"
    if not params:
        return
    torch._foreach_add_(state_steps, 1)
    for part in parts(params, rows, step_keys(state_steps, capturable)):
        dtype = part.dtype
        g = load_all(pick(grads, part.indices), dtype)
        if maximize:
            g = list(torch._foreach_neg(g))
        eta = coefficient(lr, dtype)
        stored_m, stored_v = pick(exp_avgs, part.indices), pick(exp_avg_sqs, part.indices)
        m, v = load_all(stored_m, dtype), load_all(stored_v, dtype)

        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, g, alpha=1 - beta1)  # ADAMP-1
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)  # ADAMP-2
        store_all(m, stored_m)
        store_all(v, stored_v)
        n = m
        if nesterov:
            n = list(torch._foreach_mul(m, beta1))
            torch._foreach_add_(n, g, alpha=1 - beta1)  # ADAMP-3
        denominators = torch._foreach_sqrt(v)
        counts = [step_of(pick(state_steps, x.indices), rows[x.indices[0]], capturable) for x in part.stacks]
        sqrt_bc2: list[Any] = []
        for t, x in zip(counts, part.stacks, strict=True):
            sqrt_bc2 += per_tensor(bias_correction(beta2, t, dtype, capturable) ** 0.5, len(x.indices))
        torch._foreach_div_(denominators, sqrt_bc2)
        torch._foreach_add_(denominators, eps)
        directions = list(torch._foreach_div(n, denominators))  # ADAMP-4
        del m, v, n, denominators

        for t, (indices, place) in zip(counts, part.stacks, strict=True):
            like, r = params[indices[0]], rows[indices[0]]
            p = stack(pick(params, indices), like, r, dtype)
            q = stack(directions[place], like, r, dtype)
            several = stack_rows(r, len(indices))
            step_size = eta / bias_correction(beta1, t, dtype, capturable)
            q, ratio = project(q, p, stack(g[place], like, r, dtype), several, delta=delta, wd_ratio=wd_ratio, eps=eps)
            p = _descend(p, q, ratio, eta, step_size, weight_decay)
            store_all(unstack(p, like), pick(params, indices))
        del g, directions, p, q  # before the next part has its own


def _descend(
    p: Tensor,
    q: Tensor,
    ratio: Tensor | float,
    eta: float | Tensor,
    step_size: float | Tensor,
    weight_decay: float,
) -> Tensor:
    """The parameter after its decay and the step along `q`, of one tensor or of a stack."""
    if weight_decay > 0:
        p = p * (1 - eta * weight_decay * ratio)  # ADAMP-5
    return p - step_size * q  # ADAMP-6
