"""Maps between the tensors of two models, and snapshots carried over by them.

```toml
source = "torch"
target = "keras"

[[layer]]
row = "conv"                      # of spec/layouts.toml
source = "layer1.0.conv1.*"       # the star stands for the names that the row gives its tensors
target = "layer1_0_conv1/*"
```
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import ml_dtypes  # noqa: F401 - makes bfloat16 known to NumPy
import numpy as np
import tomli_w

from adamp_conformance import layers
from adamp_conformance.layers import Row
from adamp_conformance.spec_files import spec_file
from adamp_spec import Layout, snapshot
from adamp_spec.snapshot import MOMENTS, Entry, Snapshot, Tensor, numpy_dtype

SAME = "same"
Place = str | Mapping[str, str]
_APART = "give each a name of its own, by a star or in a table"


class MapError(ValueError):
    """A map that contradicts itself, or does not fit the models that it is for."""


@dataclass(frozen=True)
class Pair:
    """One layer in both models.

    Attributes:
      row: its row in `layouts.toml` or among the map's own, or "same" for a tensor that goes over as it is.
      source, target: where its tensors are, as a pattern whose star stands for the row's names of them, or as a
        table from these names to the model's. Several, where the other model stacks the layers in one.
      sizes: axes that the source's shapes do not tell.
      zero: PyTorch's parameters of the layer that are frozen at zero and are nowhere in the other model.
      stack: the axis of the stack.
      note: why these belong together.
    """

    row: str
    source: tuple[Place, ...]
    target: tuple[Place, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    zero: tuple[str, ...] = ()
    stack: int = 0
    note: str = ""

    def __str__(self) -> str:
        return f"{self.row} from {_written(self.source)} to {_written(self.target)}"

    def toml(self) -> str:
        """Its table in a map file, `[[layer]]`, to which others can be added."""

        def plain(places: tuple[Place, ...]) -> Any:
            return places[0] if len(places) == 1 else list(places)

        entry = {"row": self.row, "source": plain(self.source), "target": plain(self.target)}
        options = {"sizes": dict(self.sizes), "zero": list(self.zero), "stack": self.stack, "note": self.note}
        written = tomli_w.dumps({"layer": entry | {name: value for name, value in options.items() if value}})
        return written.replace("[layer]", "[[layer]]", 1)  # alone, tomli_w may write all in one line


@dataclass(frozen=True)
class Map:
    """Which layer of one model is which of another, whose framework is another.

    Attributes:
      source, target: two of `adamp_conformance.layers.FRAMEWORKS`.
      pairs: the layers.
      rows: rows of its own, as `layouts.toml` has them.
    """

    source: str
    target: str
    pairs: tuple[Pair, ...]
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Map:
        """Reads a map.

        Raises:
          MapError: it is no TOML, or not what `schema/map.schema.json` describes.
          OSError: it cannot be read.
        """
        try:
            table = tomllib.loads(Path(path).read_text())
            jsonschema.validate(table, json.loads(spec_file("schema/map.schema.json").read_text()))
            jsonschema.validate(table.get("rows", {}), json.loads(spec_file("schema/layouts.schema.json").read_text()))
            for name, row in table.get("rows", {}).items():
                layers.read_row(name, row)
        except jsonschema.ValidationError as error:
            raise MapError(f"{os.fspath(path)!r}, {error.json_path}: {error.message}") from error
        except ValueError as error:
            raise MapError(f"{os.fspath(path)!r}: {error}") from error
        pairs = []
        for entry in table["layer"]:
            places = {side: tuple(x if isinstance(x := entry[side], list) else [x]) for side in ("source", "target")}
            pairs.append(Pair(**{**entry, **places, "zero": tuple(entry.get("zero", ()))}))
        return cls(table["source"], table["target"], tuple(pairs), table.get("rows", {}))

    def write(self, path: str | os.PathLike[str], comments: Sequence[str] = (), doubtful: Sequence[Pair] = ()) -> None:
        """Writes what `read` reads, and comments after it, among them pairs that may have to be added."""
        head = tomli_w.dumps({"source": self.source, "target": self.target})
        rows = [tomli_w.dumps({"rows": self.rows})] if self.rows else []
        lines = [*comments, *(line for pair in doubtful for line in ("", *pair.toml().splitlines()))]
        parts = [head, *(pair.toml() for pair in self.pairs), *rows, "".join(f"# {x}".rstrip() + "\n" for x in lines)]
        Path(path).write_text("\n".join(part for part in parts if part))

    def reversed(self) -> Map:
        """The way back."""
        pairs = (replace(pair, source=pair.target, target=pair.source) for pair in self.pairs)
        return Map(self.target, self.source, tuple(pairs), self.rows)

    def row(self, name: str) -> Row:
        """A row by the name that a pair gives it.

        Raises:
          MapError: there is none.
        """
        if name in self.rows:
            return layers.read_row(name, self.rows[name])
        if name not in layers.rows():
            known = ", ".join([*self.rows, *layers.rows()])
            raise MapError(f"there is no row {name!r}; there are {SAME}, {known}")
        return layers.rows()[name]

    def apply(self, given: Snapshot, tensors: Mapping[str, Tensor]) -> tuple[Snapshot, dict[str, Tensor]]:
        """Carries a snapshot over.

        Args:
          given: of the source.
          tensors: its tensors; their `read` gives NumPy arrays.

        Returns:
          The snapshot of the target, and its tensors. These are made when they are read, from those of one layer.

        Raises:
          MapError: a tensor of the snapshot is in no pair, or in two; two pairs make one tensor; a shape does not fit;
            a layer cannot be carried back again, or would decide otherwise than in the source.
        """
        work = _Conversion(self, given, tensors)
        for pair in self.pairs:
            try:
                work.carry(pair)
            except ValueError as error:
                raise MapError(f"{pair}: {error}") from error
        if work.left:
            raise MapError(f"the map leaves out {list(work.left)} of the snapshot: add the layers that they belong to")
        entries = {name: held.entry for name, held in work.made.items() if held.entry}
        made = {
            f"{kind}/{name}": Tensor(held.dtypes[kind], held.shape, partial(held.read, kind))
            for kind in (*work.kinds, "other")
            for name, held in work.made.items()
            if kind in held.dtypes
        }
        return replace(given, parameters=entries), made


def convert_snapshot(source: str | os.PathLike[str], target: str | os.PathLike[str], map: Map) -> None:
    """Writes to `target` what a map makes of the snapshot `source`; one layer of it is in memory, or one stack.

    Raises:
      MapError: as `Map.apply`; nothing is written.
      adamp_spec.snapshot.SnapshotError: the file is no snapshot, or damaged.
      OSError: a file cannot be read or written.
    """
    with snapshot.opened(source) as (given, tensors):
        snapshot.write(target, *map.apply(given, tensors))


# ------------------------------------------------------------------------------------------------ tensors on their way


class _Held(NamedTuple):
    """A tensor with its moments.

    Attributes:
      shape: of all of them.
      dtypes: kind -> dtype; the kinds are "parameter" and the moments, or "other".
      entry: what the snapshot says of it, None for "other".
      read: gives the array of a kind.
    """

    shape: tuple[int, ...]
    dtypes: Mapping[str, str]
    entry: Entry | None
    read: Callable[[str], np.ndarray]


class _Conversion:
    """A snapshot on its way over a map: what is left of it, and what is made."""

    def __init__(self, map: Map, given: Snapshot, tensors: Mapping[str, Tensor]) -> None:
        self.map = map
        self.kinds = ("parameter", *MOMENTS[given.algorithm])
        self.step = max((entry.step for entry in given.parameters.values()), default=0)
        self.left: dict[str, _Held] = {}
        self.made: dict[str, _Held] = {}

        @lru_cache(maxsize=1)  # several tensors may be made of one
        def read(name: str, kind: str) -> np.ndarray:
            return np.asarray(tensors[f"{kind}/{name}"].read())

        names = [*given.parameters, *(x.removeprefix("other/") for x in tensors if x.startswith("other/"))]
        for name in names:
            entry = given.parameters.get(name)
            kinds = self.kinds if entry else ("other",)
            if name in self.left:
                raise MapError(f"{name!r} is a parameter of the snapshot and another tensor; a map needs one name each")
            self.left[name] = _Held(
                tensors[f"{kinds[0]}/{name}"].shape,
                {kind: tensors[f"{kind}/{name}"].dtype for kind in kinds},
                entry,
                partial(read, name),
            )

    def carry(self, pair: Pair) -> None:
        """Adds what becomes of the layers of one pair.

        Raises:
          ValueError: as `Map.apply`.
        """
        if min(len(pair.source), len(pair.target)) > 1:
            raise ValueError("layers are stacked on one side; on the other, each is named")
        row = None if pair.row == SAME else self.map.row(pair.row)
        given = [self._take(place, row) for place in pair.source]
        if (count := len(pair.target)) > 1:
            given = [{name: _slice(x, pair.stack, i, count) for name, x in given[0].items()} for i in range(count)]
        made = [self._converted(row, pair, layer) for layer in given]
        if len(pair.source) > 1:
            if len({frozenset(layer) for layer in made}) > 1:
                raise ValueError("the layers of the stack do not all have the same tensors")
            made = [{name: _stacked([layer[name] for layer in made], pair.stack) for name in made[0]}]
        fresh: dict[str, _Held] = {}
        for name in made[0]:  # a stack that is read once gives this to all layers
            for place, layer in zip(pair.target, made, strict=True):
                full = _full_name(place, name)
                if full in fresh:
                    raise ValueError(f"several tensors would be {full!r} of the target; {_APART}")
                if full in self.made:
                    raise ValueError(f"{full!r} of the target is made by another pair, too")
                fresh[full] = layer[name]
        self.made |= fresh

    def _take(self, place: Place, row: Row | None) -> dict[str, _Held]:
        """A layer's tensors by the row's names."""
        names = row.names(self.map.source) if row else ("",)
        if isinstance(place, str):
            found = {name: full for name in names if (full := place.replace("*", name)) in self.left}
            missing = [] if found else [place]
        else:
            found = dict(place)
            missing = [full for full in found.values() if full not in self.left]
        if missing:
            raise ValueError(f"the snapshot has no {missing}, or another pair took them; left are {list(self.left)}")
        if unknown := sorted(set(found) - set(names)):
            raise ValueError(f"the row has no {unknown} in {self.map.source}; it has {list(names)}")
        if len(set(found.values())) < len(found):
            raise ValueError(f"several of {', '.join(found)} would be one tensor of the source; {_APART}")
        return {name: self.left.pop(full) for name, full in found.items()}

    def _converted(self, row: Row | None, pair: Pair, given: Mapping[str, _Held]) -> dict[str, _Held]:
        """One layer in the target, by the row's names there."""
        if row is None:
            return dict(given)
        source, target = self.map.source, self.map.target
        plain = row.without(pair.zero)
        for name in set(row.form(source).pieces) - set(plain.form(source).pieces):
            if name in given and (given[name].entry or np.any(given[name].read("other"))):
                raise ValueError(f"{name} is to be zero for good: freeze it at zero before training")
        made = _carried(plain, source, target, given, pair.sizes)
        if zeros := set(row.form(target).pieces) - set(plain.form(target).pieces):
            shapes = {name: x.shape for name, x in given.items() if name in row.form(source).pieces}
            made_shapes = layers.target_shapes(row, shapes, source, target, pair.sizes)
            dtype = next(iter(next(iter(given.values())).dtypes.values()))
            made |= {name: _constant(np.zeros(made_shapes[name], np.uint8), dtype) for name in zeros & set(made_shapes)}
        if row.statistics and source in row.statistics.forms:
            found = [name for name in row.statistics.form(source).pieces if name in given]
            if found and target not in row.statistics.forms:
                raise ValueError(
                    f"the row has no place in {target} for {', '.join(found)}: name the layer's other tensors in a "
                    "table, and carry these by pairs of their own"
                )
            if found:
                made |= _carried(row.statistics, source, target, given, pair.sizes)
                if counter := row.form(target).counter:
                    made[counter] = _constant(np.asarray(self.step), "I64")
        return made


def _carried(
    row: Row, source: str, target: str, layer: Mapping[str, _Held], sizes: Mapping[str, int]
) -> dict[str, _Held]:
    """What becomes of those tensors of a layer that a row has."""
    given = {name: held for name, held in layer.items() if name in row.form(source).pieces}
    if not given:
        return {}
    absent = [name for name, whole in layers.origins(row, source, "torch").items() if not whole & set(given)]
    row = row.without({*absent, *_later_terms(row, source, target)})
    if reason := row.loss(source, target):
        raise ValueError(reason)
    shapes = {name: held.shape for name, held in given.items()}
    sizes = layers.axis_sizes(row, shapes, source, target, sizes)
    made_shapes = layers.target_shapes(row, shapes, source, target, sizes)
    here, there = layers.layouts(row, source, shapes, sizes), layers.layouts(row, target, made_shapes, sizes)
    made = {}
    for name, whole in layers.origins(row, source, target).items():
        parts = {key: given[key] for key in sorted(whole)}

        def read(kind: str, name: str = name, parts: Mapping[str, _Held] = parts) -> np.ndarray:
            arrays = {key: held.read(kind) for key, held in parts.items()}
            moments = kind not in ("parameter", "other")
            return layers.convert(row, arrays, source, target, moments=moments, sizes=sizes)[name]

        layout = _layout(parts, here, there[name], target)
        made[name] = _joined(parts, made_shapes[name], layout, read)
    return made


def _later_terms(row: Row, source: str, target: str) -> set[str]:
    """PyTorch's parameters that two other frameworks know as later terms of sums only, and so not at all."""
    if "torch" in (source, target):
        return set()
    pieces = [x for framework in (source, target) for each in row.form(framework).pieces.values() for x in each]
    later = {term.parameter for piece in pieces for term in piece.terms[1:]}
    return later - {piece.terms[0].parameter for piece in pieces}


def _layout(parts: Mapping[str, _Held], here: Mapping[str, Layout], there: Layout, target: str) -> Layout:
    """The layout by which a tensor of the target decides as its parts do.

    Raises:
      ValueError: there is none.
    """
    trained = {name: held for name, held in parts.items() if held.entry}
    rows = {name: held.entry.layout.rows(held.shape) for name, held in trained.items() if held.entry}
    if not any(found.projects for found in rows.values()):
        return Layout(None)
    for name, held in trained.items():
        if rows[name] != here[name].rows(held.shape):
            raise ValueError(
                f"{name} decides by {held.entry and held.entry.layout}, and what {target} has for it, by {here[name]}: "
                "train it with this one in `layouts`; with the other it is another optimizer"
            )
    return there


def _joined(
    parts: Mapping[str, _Held], shape: tuple[int, ...], layout: Layout, read: Callable[[str], np.ndarray]
) -> _Held:
    """A tensor that is made of others, which must be alike."""
    entries, dtypes = [held.entry for held in parts.values()], [held.dtypes for held in parts.values()]
    alike = [entry and (entry.group, entry.step) for entry in entries]
    if any(x != alike[0] for x in alike) or any(x != dtypes[0] for x in dtypes):
        raise ValueError(
            f"{sorted(parts)} become one tensor: all must be trained or all frozen, of one group, step count and dtype"
        )
    entry = entries[0] and replace(entries[0], layout=layout)
    return _Held(shape, dtypes[0], entry, read)


def _constant(x: np.ndarray, dtype: str) -> _Held:
    return _Held(x.shape, {"other": dtype}, None, lambda _: x.astype(numpy_dtype(dtype)))


def _stacked(parts: Sequence[_Held], axis: int) -> _Held:
    """Layers of one kind in one tensor; each decides alone."""
    shape = parts[0].shape
    if any(part.shape != shape for part in parts):
        raise ValueError(f"the layers of the stack have several shapes, {sorted({part.shape for part in parts})}")
    layouts = {part.entry.layout for part in parts if part.entry}
    if len(layouts) > 1:
        raise ValueError(f"the layers of the stack have several layouts, {', '.join(map(str, layouts))}")
    if not 0 <= axis <= len(shape):
        raise ValueError(f"layers of shape {shape} have no axis {axis} to be stacked along")
    layout = Layout(None)
    if layouts and (rows := (given := layouts.pop()).rows(shape)).projects:
        at = axis if given.view is None else _axis_of_view(rows.shape, shape[:axis])
        seen = (*rows.shape[:at], len(parts), *rows.shape[at:])
        channel, batch = ([x + (x >= at) for x in axes] for axes in (rows.channel, rows.batch))
        layout = Layout(channel, sorted([at, *batch]), seen if given.view else None)

    whole = (*shape[:axis], len(parts), *shape[axis:])

    def read(kind: str) -> np.ndarray:
        # Filled layer by layer: np.stack would hold all of them twice.
        stack = np.empty(whole, numpy_dtype(parts[0].dtypes[kind]))
        for layer, part in zip(np.moveaxis(stack, axis, 0), parts, strict=True):
            layer[...] = part.read(kind)
        return stack

    return _joined({str(i): part for i, part in enumerate(parts)}, whole, layout, read)


def _slice(stack: _Held, axis: int, index: int, count: int) -> _Held:
    """One layer of a stack."""
    if axis >= len(stack.shape) or stack.shape[axis] != count:
        raise ValueError(f"a stack of shape {stack.shape} does not have {count} layers along axis {axis}")
    layout = Layout(None)
    if stack.entry and (rows := stack.entry.layout.rows(stack.shape)).projects:
        at = axis if stack.entry.layout.view is None else _axis_of_view(rows.shape, stack.shape[:axis])
        if at not in rows.batch:
            raise ValueError(f"{stack.entry.layout} does not let each layer of a stack along axis {axis} decide alone")
        channel, batch = ([x - (x > at) for x in axes if x != at] for axes in (rows.channel, rows.batch))
        layout = Layout(channel, batch, (*rows.shape[:at], *rows.shape[at + 1 :]) if stack.entry.layout.view else None)
    shape = (*stack.shape[:axis], *stack.shape[axis + 1 :])
    return _joined({"": stack}, shape, layout, lambda kind: stack.read(kind).take(index, axis))


def _axis_of_view(view: Sequence[int], before: Sequence[int]) -> int:
    """How many axes of a view make up the axes `before` of what it is a view of."""
    products = [*accumulate(view, mul, initial=1)]
    if math.prod(before) not in products:
        raise ValueError(f"a view of shape {tuple(view)} has no place for the axis of a stack after {tuple(before)}")
    return products.index(math.prod(before))


def _full_name(place: Place, name: str) -> str:
    if isinstance(place, str):
        return place.replace("*", name)
    if name not in place:
        raise ValueError(f"the map does not say what {name!r} is called in the target; it says {dict(place)}")
    return place[name]


def _written(places: Sequence[Place]) -> str:
    return ", ".join(place if isinstance(place, str) else " ".join(place.values()) for place in places)
