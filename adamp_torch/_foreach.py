"""Many tensors at once: which of them go together, and the copies that make one tensor of them.

Tensors that are alike are stacked along a new first axis. A stack of `n` tensors is one tensor with one more batch
axis (SPEC: LAYOUT-2), so that what is defined for one tensor holds for a stack: every slice decides alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamp_spec import Rows
from adamp_torch._base import working_dtype

# Elements of a part. Intermediate tensors live no longer than their part: this bounds them, whatever the model's size.
PART = 1 << 25


class Stack(NamedTuple):
    """Tensors of one shape, strides, rows and step: their positions among all, and among those of their part."""

    indices: list[int]
    place: slice


class Part(NamedTuple):
    """Tensors of one device and dtype: their positions, the dtype that they are computed in, their stacks."""

    indices: list[int]
    dtype: torch.dtype
    stacks: list[Stack]


def parts(params: Sequence[Tensor], rows: Sequence[Rows], steps: Sequence[int | None]) -> Iterator[Part]:
    """Splits parameters into parts of at most `PART` elements, or of one tensor.

    (`torch.optim.Optimizer._group_tensors_by_device_and_dtype` leaves all dtypes together while torch.compile traces.)
    """
    groups: dict[Hashable, dict[Hashable, list[int]]] = {}
    for i, (p, r, t) in enumerate(zip(params, rows, steps, strict=True)):
        groups.setdefault((p.device, p.dtype), {}).setdefault((p.shape, p.stride(), r, t), []).append(i)
    for alike in groups.values():
        part: list[list[int]] = []
        room = PART
        for indices in alike.values():
            size = max(params[indices[0]].numel(), 1)
            while indices:
                if part and room < size:
                    yield _part(params, part)
                    part, room = [], PART
                fit = max(room // size, 1)
                part.append(indices[:fit])
                room -= size * fit
                indices = indices[fit:]
        yield _part(params, part)


def _part(params: Sequence[Tensor], stacks: list[list[int]]) -> Part:
    together = [i for indices in stacks for i in indices]
    ends = [sum(map(len, stacks[: k + 1])) for k in range(len(stacks))]
    placed = [Stack(x, slice(end - len(x), end)) for x, end in zip(stacks, ends, strict=True)]
    return Part(together, working_dtype(params[together[0]].dtype), placed)


def load_all(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in the working dtype: the list itself where they have it, else copies."""
    if all(x.dtype == dtype for x in tensors):
        return tensors
    copies = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def store_all(tensors: list[Tensor], targets: list[Tensor]) -> None:
    """Writes tensors to `targets`, in place and with the one rounding of PREC-6."""
    if tensors is not targets:
        torch._foreach_copy_(targets, tensors)


def stack(tensors: list[Tensor], like: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """`n` tensors of the shape of `like` as one, of the working dtype and of shape `(n, *rows.shape)`, to read from.

    Each has the strides of the parameter `like` in memory, so that parameters are copied in one go.
    """
    if len(tensors) == 1 and tensors[0].dtype == dtype:
        return tensors[0].reshape(1, *rows.shape)
    strides = torch.empty_like(like).stride()  # those of `like`, unless it has gaps
    stacked = torch.empty_strided(
        (len(tensors), *like.shape), (max(like.numel(), 1), *strides), dtype=dtype, device=like.device
    )
    torch._foreach_copy_(unstack(stacked, like), tensors)
    return stacked.reshape(len(tensors), *rows.shape)


def unstack(stacked: Tensor, like: Tensor) -> list[Tensor]:
    """The tensors, of the shape of `like`, that make up a stack."""
    return list(stacked.reshape(len(stacked), *like.shape).unbind())


def stack_rows(rows: Rows, n: int) -> Rows:
    """The rows of a stack of `n` tensors that have `rows` each."""
    batch, channel, row = ([axis + 1 for axis in axes] for axes in (rows.batch, rows.channel, rows.row))
    return Rows((n, *rows.shape), (0, *batch), tuple(channel), tuple(row), rows.projects)


def step_keys(state_steps: Sequence[Tensor], capturable: bool) -> list[int | None]:
    """What tells steps apart in a stack: the count, so that coefficients are numbers; nothing where it is not read."""
    return [None if capturable else int(t.item()) for t in state_steps]


def step_of(state_steps: list[Tensor], rows: Rows, capturable: bool) -> Tensor:
    """The step count of a stack, which all share; or, when capturable, of each tensor, to go with the stack."""
    return torch.stack(state_steps).reshape(-1, *(1 for _ in rows.shape)) if capturable else state_steps[0]


def per_tensor(x: float | Tensor, n: int) -> list[Any]:
    """A coefficient of a stack of `n` tensors, for each of them."""
    return list(x.reshape(-1).unbind()) if isinstance(x, Tensor) else [x] * n
