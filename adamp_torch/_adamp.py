"""AdamP (Heo et al., ICLR 2021, arXiv 2006.08217)."""

from __future__ import annotations

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
from adamp_torch._layouts import Group, Table
from adamp_torch._projection import project


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
      foreach, fused: only `None` and `False`, the loop over single tensors, are available yet.
      capturable: keep `step` on the parameter's device and never read it on the host.
      differentiable: let autograd run through the step.
      maximize: ascend instead of descend.

    Raises:
      ValueError: a hyperparameter outside its domain; a layout that fits no parameter, or not its own.
      TypeError: a hyperparameter of another type; a parameter of another dtype.
      RuntimeError: `foreach` or `fused` is True.
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

    def _update_group(self, group: Group, rows: list[Rows]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        state_steps: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        self._init_group(group, params, grads, state_steps, exp_avgs, exp_avg_sqs)
        beta1, beta2 = group["betas"]
        _single_tensor_adamp(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            state_steps,
            rows,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            delta=group["delta"],
            wd_ratio=group["wd_ratio"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
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
) -> None:
    """Steps `params`, `exp_avgs`, `exp_avg_sqs` and `state_steps` in place."""
    for param, grad, exp_avg, exp_avg_sq, t, r in zip(
        params, grads, exp_avgs, exp_avg_sqs, state_steps, rows, strict=True
    ):
        dtype = working_dtype(param.dtype)
        p, m, v = (load(x, r, dtype, differentiable) for x in (param, exp_avg, exp_avg_sq))
        g = load(-grad if maximize else grad, r, dtype)
        t += 1
        eta = coefficient(lr, dtype)
        step_size = eta / bias_correction(beta1, t, dtype, capturable)
        sqrt_bc2 = bias_correction(beta2, t, dtype, capturable) ** 0.5

        m = torch.add(beta1 * m, g, alpha=1 - beta1)  # ADAMP-1
        v = torch.addcmul(beta2 * v, g, g, value=1 - beta2)  # ADAMP-2
        n = torch.add(beta1 * m, g, alpha=1 - beta1) if nesterov else m  # ADAMP-3
        q = n / (v.sqrt() / sqrt_bc2 + eps)  # ADAMP-4
        q, ratio = project(q, p, g, r, delta=delta, wd_ratio=wd_ratio, eps=eps)
        if weight_decay > 0:
            p = p * (1 - eta * weight_decay * ratio)  # ADAMP-5
        p = p - step_size * q  # ADAMP-6

        store(p, param)
        store(m, exp_avg)
        store(v, exp_avg_sq)
