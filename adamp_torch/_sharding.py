"""Parameters that several processes hold together, as `torch.distributed.tensor.DTensor`.

A process computes on the part that it holds. Where rows, or the rows of a slice, lie with several processes, it needs
their sums, and those of all parameters travel together:

1. the sums over each row, across the dimensions of the device mesh that cut rows in pieces;
2. per slice the number of rows that fail the test and the sums over all rows, across those that share out whole rows.

Each is one all-reduce, a SUM in float64, for each dimension of a mesh that it concerns, however many the tensors. A
process without elements adds zeros. All decide by the same thresholds, those of the whole tensor, on the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from adamp_spec import Rows
from adamp_torch._paths import Batch, is_plain
from adamp_torch._projection import Decision, Directions, Sums, Tally, decide, row_sums, subtract, tally

T = TypeVar("T", Sums, Tally)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor. (Plain tensors do not make anyone wait for `torch.distributed.tensor`.)"""
    if is_plain(x) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


# --- what is refused -------------------------------------------------------------------------------------------------

_FLATTENED = {"_fsdp_flattened": "torch.distributed.fsdp.FullyShardedDataParallel", "ds_id": "DeepSpeed ZeRO"}
FLAT = (
    "which makes one dimension of all: nothing would be projected, and AdamP would silently be AdamW. Shard the model "
    "with torch.distributed.fsdp.fully_shard, which keeps the shapes of parameters"
)


def check_parameter(path: str, param: Any, differentiable: bool) -> None:
    """Raises RuntimeError where a parameter is flattened, waits to be summed, or cannot be differentiated through."""
    for mark, flattened_by in _FLATTENED.items():
        if getattr(param, mark, None) is not None:
            raise RuntimeError(f"parameter {path!r} is flattened by {flattened_by}, {FLAT}")
    if is_sharded(param):
        if any(placement.is_partial() for placement in param.placements):
            raise RuntimeError(
                f"parameter {path!r} is {_words(param)}, which is the terms of a sum that has not been formed: "
                "redistribute it to Shard or Replicate placements"
            )
        if differentiable:
            raise RuntimeError(f"differentiable=True does not support parameter {path!r}, which is {_words(param)}")


def check_gradient(path: str, param: Any, grad: Any) -> None:
    """Raises RuntimeError unless a gradient is on the mesh that its parameter is on, or neither is on one."""
    if _place(grad)[:1] != _place(param)[:1]:
        raise RuntimeError(
            f"the gradient of parameter {path!r} is {_words(grad)}, the parameter {_words(param)}: make the optimizer "
            "after the model has been sharded, of the parameters that it then has"
        )


def check_moment(path: str, param: Any, name: str, moment: Any) -> None:
    """Raises RuntimeError unless a state tensor lies as its parameter does."""
    if _place(moment) != _place(param):
        raise RuntimeError(
            f"state {name!r} of parameter {path!r} is {_words(moment)}, the parameter {_words(param)}: load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )


def _place(x: Any) -> tuple[Any, ...]:
    return (x.device_mesh, tuple(x.placements)) if is_sharded(x) else ()


def _words(x: Any) -> str:
    return f"a DTensor on {x.device_mesh} with placements {tuple(x.placements)}" if is_sharded(x) else "a plain tensor"


# --- what a process holds --------------------------------------------------------------------------------------------


class Axes(NamedTuple):
    """How a layout reads the axes of a parameter, if need be one by one.

    Attributes:
      shape: the parameter's.
      roles: of each of its axes: "batch", "channel", "row", or "mixed" where the layout's `view` splits it into
        axes of several roles.
      rows: the layout on these axes, those of the view in place of mixed ones.
      runs: axes of the parameter, the axes of `rows` that hold the same elements, and whether they are mixed.
    """

    shape: tuple[int, ...]
    roles: tuple[str, ...]
    rows: Rows
    runs: tuple[tuple[range, range, bool], ...]


class Shard(NamedTuple):
    """A process's part of a parameter that it cannot decide on alone.

    Attributes:
      batch: a batch of one, of plain tensors. Its rows are the parameter's axes that are summed over first.
      axes: of the whole parameter.
      across_rows: process groups that hold pieces of the same rows, or rows that are found with a `view` only.
      across_slices: process groups that hold rows of the same slices.
      places: the part of each mixed axis that lies here, where not all of it does.
      device: where collectives take place.
    """

    batch: Batch
    axes: Axes
    across_rows: tuple[ProcessGroup, ...]
    across_slices: tuple[ProcessGroup, ...]
    places: dict[int, Tensor]
    device: torch.device

    @property
    def test(self) -> dict[str, float]:
        """The options that a decision depends on."""
        return {name: self.batch.options[name] for name in ("delta", "eps")}

    def to_rows(self, x: Tensor) -> Tensor:
        """Sums on the parameter's axes, over what lies here, as sums on those of `axes.rows`."""
        for axis, here in self.places.items():
            sizes = [self.axes.shape[axis] if i == axis else size for i, size in enumerate(x.shape)]
            x = x.new_zeros(sizes).index_copy_(axis, here, x)
        sizes = []
        for own, seen, mixed in self.axes.runs:
            sizes += [self.axes.rows.shape[i] for i in seen] if mixed else [x.shape[i] for i in own]
        x = x.reshape(sizes)
        return x.sum(self.axes.rows.row, keepdim=True) if self.axes.rows.row else x

    def from_rows(self, x: Tensor) -> Tensor:
        """What was decided on the axes of `axes.rows`, for what lies here, on the parameter's."""
        expanded, sizes = list(x.shape), []
        for own, seen, mixed in self.axes.runs:
            if mixed:
                expanded[seen.start : seen.stop] = [self.axes.rows.shape[i] for i in seen]
            sizes += [self.axes.shape[i] for i in own] if mixed else [x.shape[i] for i in seen]
        x = x.expand(expanded).reshape(sizes)
        for axis, here in self.places.items():
            x = x.index_select(axis, here)
        return x


@lru_cache(maxsize=4096)
def read_axes(shape: tuple[int, ...], rows: Rows) -> Axes:
    """Traces the roles of axes, which `rows` gives for a view of `shape`, back to the axes of `shape`."""
    role_of = {axis: role for role in ("batch", "channel", "row") for axis in getattr(rows, role)}
    sizes: list[int] = []
    axes_of: dict[str, list[int]] = {"batch": [], "channel": [], "row": []}
    roles = [""] * len(shape)
    runs = []
    for own, seen in _runs(shape, rows.shape):
        found = {role_of[axis] for axis in seen if rows.shape[axis] > 1} or {role_of[seen[0]]}
        mixed = len(found) > 1
        role = "mixed" if mixed else min(found)
        start = len(sizes)
        for axis in seen if mixed else own:
            axes_of[role_of[axis] if mixed else role].append(len(sizes))
            sizes.append(rows.shape[axis] if mixed else shape[axis])
        for axis in own:
            roles[axis] = role
        runs.append((own, range(start, len(sizes)), mixed))
    batch, channel, row = map(tuple, axes_of.values())
    return Axes(shape, tuple(roles), Rows(tuple(sizes), batch, channel, row, rows.projects), tuple(runs))


def _runs(shape: tuple[int, ...], view: tuple[int, ...]) -> list[tuple[range, range]]:
    """The shortest runs of axes of two shapes that hold the same elements, none of which is 0."""
    runs = []
    i = j = 0
    while i < len(shape) and j < len(view):
        start, (m, n) = (i, j), (shape[i], view[j])
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                m, i = m * shape[i], i + 1
            else:
                n, j = n * view[j], j + 1
        if m * math.prod(shape[i:]) == m:  # what is left are ones
            i = len(shape)
        runs.append((range(start[0], i), range(start[1], j)))
    return runs


@torch._disable_dynamo
def split(batch: Batch) -> tuple[Batch, list[Shard]]:
    """A batch as plain tensors: what this process can step alone, and what takes the sums of others.

    Gradients with other placements than their parameters are redistributed, as operations on DTensors do.
    """
    alone, rows_alone, shards = [], list(batch.rows), []
    grads = [_placed_as(param, grad) for param, grad in zip(batch.params, batch.grads, strict=True)]
    here = batch._replace(
        params=[_local(x) for x in batch.params],
        grads=[_local(x) for x in grads],
        moments=[[_local(x) for x in tensors] for tensors in batch.moments],
    )
    for i, (param, local, rows) in enumerate(zip(batch.params, here.params, batch.rows, strict=True)):
        cuts = _cuts(param)
        if not cuts or not rows.projects:
            alone.append(i)
            if cuts:
                rows_alone[i] = Rows(tuple(local.shape), (), (), tuple(range(local.ndim)), False)
        elif rows.shape == param.shape and all(axis in rows.batch for axis in cuts):
            alone.append(i)
            rows_alone[i] = replace(rows, shape=tuple(local.shape), projects=local.numel() > 0)
        else:
            shards.append(_shard(param, here.pick([i]), cuts))
    return here._replace(rows=rows_alone).pick(alone), shards


def _placed_as(param: Any, grad: Any) -> Tensor:
    return grad if _place(grad) == _place(param) else grad.redistribute(placements=param.placements)


def _local(x: Any) -> Tensor:
    """The part of a tensor that lies here, which shares its memory."""
    if not is_sharded(x):
        return x
    local = x.to_local()
    return local.wait() if hasattr(local, "wait") else local  # a collective may be under way


def _cuts(param: Any) -> dict[int, list[ProcessGroup]]:
    """The axes of a parameter that lie in parts with the processes of a group, or of several."""
    cuts: dict[int, list[ProcessGroup]] = {}
    if is_sharded(param):
        for i, placement in enumerate(param.placements):
            if not placement.is_replicate() and param.device_mesh.size(i) > 1:
                cuts.setdefault(placement.dim % param.ndim, []).append(param.device_mesh.get_group(i))
    return cuts


def _shard(param: Any, batch: Batch, cuts: dict[int, list[ProcessGroup]]) -> Shard:
    (local,), (rows,) = batch.params, batch.rows
    axes = read_axes(tuple(param.shape), rows)

    def across(*roles: str) -> tuple[ProcessGroup, ...]:
        return tuple(group for axis, groups in cuts.items() if axes.roles[axis] in roles for group in groups)

    first = tuple(axis for axis, role in enumerate(axes.roles) if role == "row")
    mesh = param.device_mesh
    return Shard(
        batch._replace(rows=[Rows(tuple(local.shape), (), (), first, True)]),
        axes,
        across("row", "mixed"),
        across("channel"),
        {axis: _index(param, axis) for axis in cuts if axes.roles[axis] == "mixed"},
        local.device if local.device.type == mesh.device_type else torch.device(mesh.device_type),
    )


def _index(param: Any, axis: int) -> Tensor:
    """Which elements of an axis lie here."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    sizes = [-1 if i == axis else 1 for i in range(param.ndim)]
    numbers = torch.arange(param.shape[axis], device=param.to_local().device).reshape(sizes)
    placements = [x if not x.is_replicate() and x.dim % param.ndim == axis else Replicate() for x in param.placements]
    placed = distribute_tensor(numbers, param.device_mesh, placements, src_data_rank=None)  # without communication
    return placed.to_local().reshape(-1).to(numbers.device)


# --- the step --------------------------------------------------------------------------------------------------------


@torch._disable_dynamo
def step_shards(shards: list[Shard], directions: Callable[[Batch], Directions], step: Callable[..., None]) -> None:
    """Takes a step of all parameters that processes must decide on together.

    Directions are computed twice, before and after the decision, lest those of all tensors be kept.

    Args:
      shards: in the same order in all processes, those of all groups.
      directions: `q`, `p` and `g` of a batch of one, which stays as it is.
      step: steps a batch of one, with what it is given for `project`.
    """
    sums = [Sums(*map(shard.to_rows, row_sums(*directions(shard.batch), shard.batch.rows[0]))) for shard in shards]
    sums = _add_up(sums, [shard.across_rows for shard in shards], shards)
    tallies = [tally(x, shard.axes.rows, **shard.test) for x, shard in zip(sums, shards, strict=True)]
    tallies = _add_up(tallies, [shard.across_slices for shard in shards], shards)
    for shard, of_rows, of_slices in zip(shards, sums, tallies, strict=True):
        decision = decide(of_rows, of_slices, shard.axes.rows, **shard.test)
        step(shard.batch, project=partial(_project, Decision(*map(shard.from_rows, decision))))


def _project(
    decision: Decision, q: Tensor, p: Tensor, g: Tensor, rows: Rows, *, wd_ratio: float, **_: Any
) -> tuple[Tensor, Tensor]:
    return subtract(q, p, decision, wd_ratio)


def _add_up(terms: list[T], across: list[tuple[ProcessGroup, ...]], shards: list[Shard]) -> list[T]:
    """Adds up what processes of some groups each hold of `terms`: all that goes to one group in one all-reduce."""
    terms = list(terms)
    for group in dict.fromkeys(chain.from_iterable(across)):
        members = [i for i, groups in enumerate(across) if group in groups]
        flat = [x.to(shards[i].device, torch.float64).reshape(-1) for i in members for x in terms[i]]
        buffer = torch.cat(flat)
        torch.distributed.all_reduce(buffer, group=group)
        totals = iter(buffer.split([x.numel() for x in flat]))
        for i in members:
            terms[i] = type(terms[i])(*(next(totals).to(x.device, x.dtype).reshape(x.shape) for x in terms[i]))
    return terms
