"""Layouts in parameter groups.

The user gives a mapping from parameters or names to `Layout`; a group keeps, under "layouts", one entry per
parameter: `None` for PyTorch's own meaning (dim 0), or `Layout.to_dict()`. Instead of a list of `None`
the group keeps `None`. These plain values travel in `state_dict`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamp_spec import Assignment, Layout, Rows, assign_layouts, format_layouts

Group = dict[str, Any]
Table = Mapping[Tensor | str, Layout]
StoredLayout = dict[str, Any] | None
DEFAULT = Layout(0)


def parameter_paths(groups: Sequence[Group]) -> list[list[str]]:
    """What to call each parameter of each group: its name where that is known and unique, else 'group.index'."""
    names = Counter(name for group in groups for name in group.get("param_names", ()))
    paths = []
    for i, group in enumerate(groups):
        known = group.get("param_names", [None] * len(group["params"]))
        paths.append([name if names[name] == 1 else f"{i}.{j}" for j, name in enumerate(known)])
    return paths


def assign_to_groups(table: Table, groups: Sequence[Group], paths: Sequence[Sequence[str]]) -> None:
    """Resolves `table` on the parameters of `groups` and stores each group's "layouts".

    Raises:
      ValueError: a key is not a parameter of these groups, matches none or is given without names; two keys
        match one parameter; a layout does not fit its parameter's shape.
      TypeError: `table` is not a mapping, a value not a Layout, a key neither a parameter nor a string.
    """
    if not isinstance(table, Mapping):
        raise TypeError(f"layouts must be a mapping from parameters or names to adamp_spec.Layout, got {table!r}")
    params = {
        path: param
        for group, names in zip(groups, paths, strict=True)
        for path, param in zip(names, group["params"], strict=True)
    }
    path_of = {id(param): path for path, param in params.items()}
    by_name = {key: layout for key, layout in table.items() if isinstance(key, str)}
    if by_name and not all("param_names" in group for group in groups):
        raise ValueError(
            f"layouts names {sorted(by_name)}, but the parameters have no names: pass model.named_parameters(), "
            "or use the parameters themselves as keys"
        )
    assigned = assign_layouts({path: tuple(param.shape) for path, param in params.items()}, by_name, default=DEFAULT)
    for key, layout in table.items():
        if isinstance(key, str):
            continue
        if not isinstance(key, Tensor):
            raise TypeError(f"a layouts key must be a parameter or a name, got {key!r}")
        if id(key) not in path_of:
            raise ValueError(
                f"a layouts key, a tensor of shape {tuple(key.shape)}, is not a parameter of this optimizer"
            )
        path = path_of[id(key)]
        if assigned[path].origin != "default":
            raise ValueError(f"parameter {path!r} has a layout by name and by tensor; keep one of the keys")
        assigned.update(assign_layouts({path: tuple(key.shape)}, {path: layout}))

    for group, names in zip(groups, paths, strict=True):
        group["layouts"] = [
            None if assigned[path].origin == "default" else assigned[path].layout.to_dict() for path in names
        ]


def check_layouts(group: Group, paths: Sequence[str]) -> None:
    """Raises unless the stored "layouts" of a group, which may come from a checkpoint, fit its parameters."""
    stored = group["layouts"]
    if stored is None:
        return
    if not isinstance(stored, list) or len(stored) != len(paths):
        raise ValueError(f"layouts must be a mapping from parameters or names to adamp_spec.Layout, got {stored!r}")
    for path, param, layout in zip(paths, group["params"], stored, strict=True):
        try:
            _as_layout(layout).rows(tuple(param.shape))
        except (TypeError, ValueError) as error:
            raise ValueError(f"layout {layout!r} of parameter {path!r}: {error}") from None


def group_rows(group: Group) -> list[Rows]:
    """The rows of each parameter of a group."""
    return [_rows(layout, tuple(param.shape)) for layout, param in _with_layouts(group)]


def group_layouts(group: Group) -> list[Layout]:
    """The layout of each parameter of a group."""
    return [_as_layout(stored) for stored, _ in _with_layouts(group)]


def _with_layouts(group: Group) -> list[tuple[StoredLayout, Tensor]]:
    params = group["params"]
    return list(zip(group["layouts"] or [None] * len(params), params, strict=True))


def _as_layout(stored: StoredLayout) -> Layout:
    return DEFAULT if stored is None else Layout(**stored)


@torch.compiler.assume_constant_result  # a function of the layout and the shape, which torch.compile guards
def _rows(stored: StoredLayout, shape: tuple[int, ...]) -> Rows:
    return _as_layout(stored).rows(shape)


def describe(optimizer: Optimizer) -> str:
    """A table of what `optimizer`, an `AdamP` or `SGDP`, takes for the rows of each parameter.

    Columns: parameter (its name where known, else 'group.index'), shape, layout, rows per slice x row
    length, and whether the layout is the default (dim 0) or an override.
    """
    groups = optimizer.param_groups
    return format_layouts(
        {
            path: Assignment(tuple(param.shape), _as_layout(stored), "override" if stored else "default")
            for group, paths in zip(groups, parameter_paths(groups), strict=True)
            for path, (stored, param) in zip(paths, _with_layouts(group), strict=True)
        }
    )
