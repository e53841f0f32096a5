"""What both optimizers share as citizens of torch.optim: groups, checks, state, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _get_scalar_dtype,
    _use_grad_for_differentiable,
)

from adamp_spec import Rows, check_flag, check_hyperparameter, one_minus_power
from adamp_torch._layouts import Group, Table, assign_to_groups, check_layouts, group_rows, parameter_paths
from adamp_torch._paths import Batch, check_path, choose_path, fused_kernels
from adamp_torch._projection import Directions
from adamp_torch._sharding import (
    FLAT,
    Shard,
    check_gradient,
    check_moment,
    check_parameter,
    is_sharded,
    split,
    step_shards,
)

_capture_health_check = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or Optimizer._cuda_graph_capture_health_check  # its name in older releases of PyTorch
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ProjectedOptimizer(Optimizer):
    """Base class of `AdamP` and `SGDP`: a subclass says what its state, hyperparameters and update are.

    Args:
      params: as for `torch.optim.Optimizer`.
      defaults: group options.
      layouts: layouts for the groups that bring none of their own.
    """

    MOMENTS: ClassVar[tuple[str, ...]]  # state keys of tensors shaped like the parameter; "step" stands beside them

    def __init__(self, params: ParamsT, defaults: Group, layouts: Table | None) -> None:
        super().__init__(params, {**defaults, "layouts": None})
        if layouts:
            paths = parameter_paths(self.param_groups)
            open_groups = [i for i, group in enumerate(self.param_groups) if group["layouts"] is None]
            assign_to_groups(layouts, [self.param_groups[i] for i in open_groups], [paths[i] for i in open_groups])

    def _check_hyperparameters(self, group: Group) -> None:
        """Makes Python floats of the group's hyperparameters, or raises where one lies outside its domain."""
        raise NotImplementedError

    def _options(self, group: Group) -> dict[str, Any]:
        """The group's hyperparameters and flags, as keyword arguments of the update."""
        raise NotImplementedError

    def _step_plain(self, batch: Batch, foreach: bool, **others: Any) -> None:
        """Steps one group with PyTorch's own operations, tensor by tensor or many at once.

        Args:
          others: `project`, a stand-in for `adamp_torch._projection.project`, tensor by tensor only.
        """
        raise NotImplementedError

    def _directions(self, batch: Batch) -> Directions:
        """`q`, `p` and `g` of the next step of a batch of one, which stays as it is."""
        raise NotImplementedError

    def _step_fused(
        self, kernels: ModuleType, batches: list[Batch], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Steps parameters of all groups, all on one device, with kernels of our own for it."""
        raise NotImplementedError

    @torch._disable_dynamo
    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its entry "layouts", if any, is a mapping over the group's own parameters.

        Raises:
          TypeError, ValueError, RuntimeError: as the constructor; the optimizer stays as it was.
        """
        super().add_param_group(param_group)
        try:
            paths = parameter_paths(self.param_groups)[-1]
            if isinstance(param_group["layouts"], Mapping):
                assign_to_groups(param_group["layouts"], [param_group], [paths])
            self._check_group(param_group, paths)
        except Exception:
            self.param_groups.pop()
            raise
        self.__dict__.setdefault("_had_matrices", []).append(_has_matrices(param_group))

    def _check_group(self, group: Group, paths: list[str]) -> None:
        for name in ("nesterov", "capturable", "differentiable", "maximize"):
            check_flag(name, group[name])
        check_path(group)
        group["lr"] = _check_lr(group["lr"])
        self._check_hyperparameters(group)
        for path, param in zip(paths, group["params"], strict=True):
            if param.dtype not in DTYPES:
                raise TypeError(f"parameter {path!r} has dtype {param.dtype}; {_WANTED}")
            check_parameter(path, param, group["differentiable"])
        check_layouts(group, paths)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
          closure: reevaluates the model and returns the loss.

        Returns:
          The closure's loss, or None.

        Raises:
          RuntimeError: a gradient is sparse, or is no DTensor where its parameter is one, or the reverse; parameters
            have been flattened since the optimizer was made.
          TypeError: a gradient is not of a real floating-point dtype.
          ValueError: a gradient or a state tensor has another shape than its parameter.
          Nothing has been updated then.
        """
        _capture_health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "found_inf", None) is None:
            self._update()
        else:
            self._update_unscaled()
        return loss

    @torch._disable_dynamo
    def _update_unscaled(self) -> None:
        """The same where torch.amp.GradScaler leaves it to the fused path to unscale; compiled steps take another."""
        self._update()

    def _update(self) -> None:
        rows = [self._check_gradients(i) for i in range(len(self.param_groups))]
        fused: dict[torch.device, list[Batch]] = {}
        shards: list[Shard] = []
        for group, rows_of_group in zip(self.param_groups, rows, strict=True):
            batch = self._batch(group, rows_of_group)
            if any(map(is_sharded, batch.params)):
                batch, of_group = split(batch)
                shards += of_group
            path = choose_path(batch.params, group)
            if path == "fused":
                for device, here in batch.by_device().items():
                    fused.setdefault(device, []).append(here)
            else:
                self._step_plain(batch, path == "foreach")
        for device, batches in fused.items():
            self._step_on(device, batches)
        if shards:
            step_shards(shards, self._directions, partial(self._step_plain, foreach=False))

    def _step_on(self, device: torch.device, batches: list[Batch]) -> None:
        """Steps what is on one device, but for what its kernels do not know, which is stepped tensor by tensor.

        torch.amp.GradScaler has set `grad_scale` and `found_inf` where it leaves unscaling to the step.
        """
        kernels = fused_kernels(device.type)
        assert kernels is not None, "checked by `choose_path`"
        scaling = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        grad_scale, found_inf = (x if x is None else x.to(device, non_blocking=True) for x in scaling)
        if found_inf is not None and device.type == "cpu":
            if found_inf.item():
                return
            found_inf = None
        known = [[kernels.knows(x) for x in zip(b.params, b.grads, *b.moments, b.rows, strict=True)] for b in batches]
        pairs = list(zip(batches, known, strict=True))
        fit = [batch if all(k) else batch.pick([i for i, x in enumerate(k) if x]) for batch, k in pairs]
        self._step_fused(kernels, fit, grad_scale, found_inf)
        for batch, k in pairs:
            if not all(k) and (found_inf is None or not found_inf.item()):
                rest = batch.pick([i for i, x in enumerate(k) if not x])
                if grad_scale is not None:
                    rest = rest._replace(grads=[g.to(working_dtype(g.dtype)) / grad_scale for g in rest.grads])
                self._step_plain(rest, foreach=False)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch.amp.GradScaler: whether `step` unscales gradients itself and does nothing at an overflow."""
        return all(group["fused"] and not any(map(is_sharded, group["params"])) for group in self.param_groups)

    def _check_gradients(self, i: int) -> list[Rows]:
        """The rows of the parameters of group `i` that have a gradient, all of them fit to be stepped."""
        group = self.param_groups[i]
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._check_hyperparameters(group)  # a scheduler, or the user, may have changed them
            check_path(group)
            if self._had_matrices[i : i + 1] == [True] and not _has_matrices(group):
                raise RuntimeError(
                    f"the parameters of group {i} have been flattened since the optimizer was made, as by DeepSpeed "
                    f"ZeRO, {FLAT}"
                )
        for j, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"the gradient of parameter {self._path(i, j)!r} is {grad.layout}, but sparse gradients are not "
                    "supported: use sparse=False in the embedding, or set param.grad = param.grad.to_dense()"
                )
            if param.dtype not in DTYPES or grad.dtype not in DTYPES:
                raise TypeError(
                    f"parameter {self._path(i, j)!r} has dtype {param.dtype} and its gradient {grad.dtype}; {_WANTED}"
                )
            if grad.shape != param.shape:
                raise ValueError(
                    f"the gradient of parameter {self._path(i, j)!r} has shape {tuple(grad.shape)}, "
                    f"the parameter {tuple(param.shape)}: compute the gradient again after resizing a parameter"
                )
            if compiling:
                continue  # tracing may run twice, before and after `_init_group` has made the state
            state = self.state.get(param)
            if not state:
                check_parameter(self._path(i, j), param, group["differentiable"])
            if is_sharded(param) or is_sharded(grad):
                check_gradient(self._path(i, j), param, grad)
            if state and state[self.MOMENTS[0]].shape != param.shape:
                raise ValueError(
                    f"the state of parameter {self._path(i, j)!r} has shape {tuple(state[self.MOMENTS[0]].shape)}, "
                    f"the parameter {tuple(param.shape)}: make a new optimizer after resizing a parameter"
                )
        return [rows for rows, param in zip(group_rows(group), group["params"], strict=True) if param.grad is not None]

    def _path(self, i: int, j: int) -> str:
        return parameter_paths(self.param_groups)[i][j]

    def _batch(self, group: Group, rows: list[Rows]) -> Batch:
        batch = Batch([], [], [[] for _ in self.MOMENTS], [], rows, self._options(group))
        self._init_group(group, batch.params, batch.grads, batch.steps, *batch.moments)
        return batch

    def _init_group(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        state_steps: list[Tensor],
        *moments: list[Tensor],
    ) -> None:
        """Appends parameters with a gradient, gradients and state to the lists; makes the state that is missing.

        torch.compile knows this name and runs the method outside the graph.
        """
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if len(state) == 0:
                state["step"] = step_tensor(0, param, group)
                for name in self.MOMENTS:
                    state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            params.append(param)
            grads.append(param.grad)
            state_steps.append(state["step"])
            for name, tensors in zip(self.MOMENTS, moments, strict=True):
                tensors.append(state[name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what `load_state_dict` (state and groups, nothing else) or unpickling brings, after checking all of it.

        A group option that a checkpoint lacks, as those of adamp 0.3.0 and timm do, stays what it is here; one that
        it has is taken, `layouts` of None, which are PyTorch's own, too.

        Raises:
          ValueError, TypeError, RuntimeError: the state belongs to another model or optimizer, or a group
            option is one that the constructor refuses; the optimizer stays as it was.
        """
        groups = state["param_groups"]
        for group, own in zip(groups, self.__dict__.get("param_groups", groups), strict=True):
            for name, value in own.items():
                group.setdefault(name, value)
            group["foreach"], group["fused"] = own["foreach"], own["fused"]  # they choose a path, not a result
        for group, paths in zip(groups, parameter_paths(groups), strict=True):
            self._check_group(group, paths)
            for path, param in zip(paths, group["params"], strict=True):
                if entry := state["state"].get(param):
                    self._check_entry(entry, path, param)
                    entry["step"] = step_tensor(entry["step"], param, group)
        super().__setstate__(state)
        if "_had_matrices" not in self.__dict__:  # after unpickling
            self._had_matrices = [_has_matrices(group) for group in groups]

    def _check_entry(self, entry: dict[str, Any], path: str, param: Tensor) -> None:
        if set(entry) != {"step", *self.MOMENTS}:
            raise ValueError(
                f"the state of parameter {path!r} holds {sorted(entry)}, but {type(self).__name__} keeps "
                f"{['step', *self.MOMENTS]}: load a checkpoint of {type(self).__name__}"
            )
        step = entry["step"]
        is_one = isinstance(step, Tensor | int | float) and torch.as_tensor(step).numel() == 1
        if not is_one or not float(step).is_integer() or float(step) < 0:  # NaN and inf are no integers
            raise ValueError(f"the state of parameter {path!r} has step {step!r}, which is no count of steps")
        for name in self.MOMENTS:
            moment = entry[name]
            if not isinstance(moment, Tensor) or moment.dtype not in DTYPES or moment.layout is not torch.strided:
                raise ValueError(f"state {name!r} of parameter {path!r} is no dense floating-point tensor: {moment!r}")
            check_moment(path, param, name, moment)
            if moment.shape != param.shape:
                raise ValueError(
                    f"state {name!r} of parameter {path!r} has shape {tuple(moment.shape)}, the parameter "
                    f"{tuple(param.shape)}: load a checkpoint of this model, with its parameters in the same order"
                )


def _has_matrices(group: Group) -> bool:
    return any(param.ndim > 1 for param in group["params"])


_WANTED = (
    "AdamP and SGDP are defined for float64, float32, bfloat16 and float16 (view a complex tensor as two real ones)"
)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor of `dtype` is computed in (PREC-1)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def load(x: Tensor, rows: Rows, dtype: torch.dtype, differentiable: bool = False) -> Tensor:
    """`x` in the working dtype and in the shape of its rows; a copy where autograd will need it after `store`."""
    return (x.clone() if differentiable else x).to(dtype).reshape(rows.shape)


def store(x: Tensor, target: Tensor) -> None:
    """Writes `x` to `target`, in place and with the one rounding of PREC-6."""
    target.copy_(x.reshape(target.shape))


def coefficient(x: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A number as it is, a tensor as a scalar that never widens what it multiplies."""
    return x.to(dtype).reshape(()) if isinstance(x, Tensor) else x


def bias_correction(beta: float, step: Tensor, dtype: torch.dtype, capturable: bool) -> float | Tensor:
    """1 - beta**step without cancellation (PREC-2): on the host in double, or on the device when capturable."""
    if not capturable:
        return float(one_minus_power(beta, int(step.item())))
    return -torch.expm1(step.to(dtype) * math.log(beta)) if beta > 0 else 1.0


def step_tensor(value: float | Tensor, param: Tensor, group: Group) -> Tensor:
    """The step counter where torch.optim keeps it: on the host, unless the step must be capturable."""
    device = param.device if group["capturable"] else torch.device("cpu")
    dtype = torch.float32 if group["capturable"] else _get_scalar_dtype()
    return torch.as_tensor(value, dtype=dtype, device=device).reshape(())


def _check_lr(lr: float | Tensor) -> float | Tensor:
    if not isinstance(lr, Tensor):
        return check_hyperparameter("lr", lr)
    if lr.numel() != 1:
        raise ValueError(f"a tensor lr must hold one element, got shape {tuple(lr.shape)}")
    check_hyperparameter("lr", lr.item())
    return lr
