"""Which axes of a tensor are its channels: the one thing that a port must not guess (SPEC: LAYOUT)."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, SupportsIndex


@dataclass(frozen=True)
class Rows:
    """A layout applied to one shape: the axes that the two views of the projection sum over.

    Attributes:
      shape: the shape the tensor is read in (its own, or the layout's `view`).
      batch: axes of independent parameters; each slice along them decides alone.
      channel: axes that index the rows of the channel view.
      row: axes that make up one row; empty when a row is a single element.
      projects: whether the tensor can be projected at all (SPEC: LAYOUT-4, LAYOUT-5).
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    channel: tuple[int, ...]
    row: tuple[int, ...]
    projects: bool

    @property
    def length(self) -> int:
        """Elements in one row of the channel view."""
        return math.prod(self.shape[axis] for axis in self.row)

    @property
    def count(self) -> int:
        """Rows of the channel view in one slice."""
        return math.prod(self.shape[axis] for axis in self.channel)

    @property
    def layer(self) -> tuple[int, ...]:
        """Axes that make up the single row of the layer view."""
        return tuple(sorted(self.channel + self.row))

    @property
    def slices(self) -> tuple[int, ...]:
        """Shape of one decision per slice: `shape` with every axis but the batch axes set to 1."""
        return tuple(size if axis in self.batch else 1 for axis, size in enumerate(self.shape))

    def decides_as(self, other: Rows) -> bool:
        """Whether a tensor is stepped alike by both: the same rows, or neither projects."""
        return self == other or not (self.projects or other.projects)


@dataclass(frozen=True)
class Layout:
    """How one tensor is cut into rows.

    Hashable, and neither a pytree, a callable nor an int, so that it passes through
    `optax.inject_hyperparams` untouched.

    Args:
      channel: axis or axes that index the rows of the channel view; `None` exempts the
        tensor from projection.
      batch: axis or axes along which independent parameters lie side by side.
      view: a shape that the tensor is reshaped to (in row-major order) before `channel` and
        `batch` are read, or `None`. Negative axes count from the end of the view.

    Raises:
      TypeError: an axis or size is not an integer.
      ValueError: an axis is named twice, `channel` is empty, or a size in `view` is negative.
    """

    channel: tuple[int, ...] | None = (0,)
    batch: tuple[int, ...] = ()
    view: tuple[int, ...] | None = None

    def __init__(
        self,
        channel: int | Iterable[int] | None = 0,
        batch: int | Iterable[int] = (),
        view: Iterable[int] | None = None,
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "channel", None if channel is None else _integers("channel", channel))
        set_field(self, "batch", _integers("batch", batch))
        set_field(self, "view", None if view is None else _integers("view", view))
        if self.channel == ():
            raise ValueError("channel=() names no axis; use channel=None for a tensor that is never projected")
        if self.view is not None and min(self.view, default=0) < 0:
            raise ValueError(f"view={self.view} has a negative size; write every size out")

    @lru_cache(maxsize=4096)  # noqa: B019 - layouts are few, immutable and live as long as the process
    def rows(self, shape: tuple[int, ...]) -> Rows:
        """Applies the layout to `shape`.

        Raises:
          ValueError: an axis does not exist in `shape`, is both channel and batch, or `view`
            holds another number of elements. The message names the axis and the shape.
        """
        seen = shape if self.view is None else self.view
        if math.prod(seen) != math.prod(shape):
            raise ValueError(
                f"view={self.view} holds {math.prod(seen)} elements but shape {shape} has {math.prod(shape)}"
            )
        batch = self._axes("batch", self.batch, seen)
        channel = self._axes("channel", self.channel or (), seen) if seen else ()
        rank = len(seen) - len(batch)
        projects = self.channel is not None and rank > 1 and math.prod(seen) > 0
        if rank > 0 and set(channel) & set(batch):
            raise ValueError(f"{self} names an axis of shape {seen} as channel and as batch")
        row = tuple(axis for axis in range(len(seen)) if axis not in channel and axis not in batch)
        return Rows(seen, batch, channel, row, projects)

    def _axes(self, name: str, axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        rank = len(shape)
        for axis in axes:
            if not -rank <= axis < rank:
                raise ValueError(
                    f"{name} axis {axis} of {self} does not exist in shape {shape}; use -{rank} to {rank - 1}"
                )
        positive = tuple(sorted(axis % rank for axis in axes))
        if len(set(positive)) != len(positive):
            raise ValueError(f"{name}={axes} names one axis of shape {shape} twice")
        return positive

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON values; `Layout(**layout.to_dict())` gives it back."""
        plain = {"channel": self.channel, "batch": self.batch, "view": self.view}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def __str__(self) -> str:
        parts = [f"channel={_short(self.channel)}"]
        parts += [f"batch={_short(self.batch)}"] if self.batch else []
        parts += [f"view={self.view}"] if self.view is not None else []
        return f"Layout({', '.join(parts)})"


def _integers(name: str, value: int | Iterable[int]) -> tuple[int, ...]:
    entries = tuple(value) if isinstance(value, Iterable) else (value,)
    if any(isinstance(entry, bool) or not isinstance(entry, SupportsIndex) for entry in entries):
        raise TypeError(f"{name} must hold integers, got {value!r}")
    return tuple(operator.index(entry) for entry in entries)


def _short(axes: tuple[int, ...] | None) -> str:
    return str(axes[0]) if axes is not None and len(axes) == 1 else str(axes)


class Rule(NamedTuple):
    """A built-in default: paths that `pattern` is found in, of rank `rank` (any rank where None)."""

    pattern: str
    layout: Layout
    rank: int | None = None


class Assignment(NamedTuple):
    """One parameter's layout and where it came from ('override ...', 'rule ...' or 'default')."""

    shape: tuple[int, ...]
    layout: Layout
    origin: str


def assign_layouts(
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[str, Layout],
    rules: Sequence[Rule] = (),
    default: Layout = Layout(),
    *,
    all_used: bool = True,
) -> dict[str, Assignment]:
    """Gives every named parameter its layout (SPEC: LAYOUT-7).

    A key of `table` that is a parameter's whole path wins; otherwise the one key that
    `re.search` finds in the path; otherwise the first rule that applies; otherwise `default`.

    Args:
      shapes: path -> shape of each parameter.
      table: the user's overrides, path or regular expression -> Layout.
      rules: the framework's own rules, the first that applies wins.
      default: what is left.
      all_used: whether a key of `table` that matches nothing is an error.

    Raises:
      ValueError: a parameter matches two keys, a key matches no parameter, a key is not a
        regular expression, or a layout does not fit its parameter's shape.
      TypeError: a value of `table` is not a Layout.
    """
    patterns = {}
    for key, layout in table.items():
        if not isinstance(layout, Layout):
            raise TypeError(f"layouts[{key!r}] must be an adamp_spec.Layout, got {layout!r}")
        if key in shapes:  # a whole path names that parameter only, whatever it would mean as a pattern
            continue
        try:
            patterns[key] = re.compile(key)
        except re.error as error:
            raise ValueError(f"layouts key {key!r} is not a regular expression: {error}") from error

    assigned = {}
    unused = set(table)
    for path, shape in shapes.items():
        keys = [path] if path in table else [key for key, pattern in patterns.items() if pattern.search(path)]
        if len(keys) > 1:
            raise ValueError(f"parameter {path!r} matches several layouts keys: {keys}; make them exclusive")
        unused.difference_update(keys)
        if keys:
            chosen = Assignment(shape, table[keys[0]], f"override {keys[0]!r}")
        else:
            chosen = _built_in(path, shape, rules, default)
        try:
            chosen.layout.rows(shape)
        except ValueError as error:
            raise ValueError(f"layout of parameter {path!r} ({chosen.origin}): {error}") from None
        assigned[path] = chosen
    if unused and all_used:
        raise ValueError(f"layouts keys {sorted(unused)} match no parameter; the parameters are {sorted(shapes)}")
    return assigned


def _built_in(path: str, shape: tuple[int, ...], rules: Sequence[Rule], default: Layout) -> Assignment:
    for rule in rules:
        if (rule.rank is None or rule.rank == len(shape)) and re.search(rule.pattern, path):
            return Assignment(shape, rule.layout, f"rule {rule.pattern!r}")
    return Assignment(shape, default, "default")


def format_layouts(assigned: Mapping[str, Assignment]) -> str:
    """A plain text table: parameter, shape, layout, rows per slice x row length, origin."""
    lines = [("parameter", "shape", "layout", "rows", "chosen by")]
    for path, (shape, layout, origin) in assigned.items():
        rows = layout.rows(shape)
        lines.append(
            (
                path,
                str(shape),
                str(layout),
                f"{rows.count} x {rows.length}" if rows.projects else "not projected",
                origin,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
