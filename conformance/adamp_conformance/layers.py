"""Layers in all frameworks, from `spec/layouts.toml`: weights and moments carried over, and each parameter's layout.

```python
weights = convert("conv", {"weight": w, "bias": b}, "torch", "keras")  # {"kernel": ..., "bias": ...}
moments = convert("conv", {"weight": m, "bias": n}, "torch", "keras", moments=True)
layouts("conv", "keras", {"kernel": (3, 3, 4, 8), "bias": (8,)})  # {"kernel": Layout(3), "bias": Layout(None)}
```
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import jsonschema
import numpy as np

from adamp_conformance.spec_files import spec_file
from adamp_spec import Layout

FRAMEWORKS = ("torch", "keras", "linen", "nnx", "equinox", "haiku")
SPATIAL = "..."

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class Letter(NamedTuple):
    """One axis of a pattern: its name, whether it indexes rows, and whether it lies backwards."""

    name: str
    indexes_rows: bool
    backwards: bool


Axes = tuple[tuple[Letter, ...], ...]  # what each axis is made of, the outermost first; nothing: size 1


class Term(NamedTuple):
    """One of PyTorch's parameters, or one part of it."""

    parameter: str
    part: str | None


class Piece(NamedTuple):
    """A sum of terms and of constants (number, part), with the axes that it has in a framework."""

    terms: tuple[Term, ...]
    constants: tuple[tuple[float, str], ...]
    axes: Axes


@dataclass(frozen=True)
class Form:
    """A layer in one framework.

    Attributes:
      layer: names of the layer's classes or functions.
      pieces: parameter -> what it is made of, joined along the first axis.
      order: the parts in the framework's own order.
      declare: parameters whose layout nothing tells but the user.
      by_name: parameters known only while the layer has the name that its framework gives it.
      by_class: parameters known by the layer's class but not by any path.
      apart: why no layout makes this form decide as the others do, or None.
      counter: a scalar that counts the layer's calls in training, which other frameworks do not count, or None.
    """

    layer: tuple[str, ...]
    pieces: Mapping[str, tuple[Piece, ...]]
    order: tuple[str, ...] = ()
    declare: frozenset[str] = frozenset()
    by_name: frozenset[str] = frozenset()
    by_class: frozenset[str] = frozenset()
    apart: str | None = None
    counter: str | None = None

    def axes(self) -> list[tuple[Letter, ...]]:
        """The axes of all parameters."""
        return [axis for pieces in self.pieces.values() for piece in pieces for axis in piece.axes]

    def letters(self) -> list[Letter]:
        """The letters of all parameters."""
        return [letter for axis in self.axes() for letter in axis]

    def sums(self) -> frozenset[str]:
        """Parameters that hold a sum of PyTorch's parameters, so that PyTorch's cannot be told from them."""
        return frozenset(name for name, pieces in self.pieces.items() if any(len(piece.terms) > 1 for piece in pieces))


@dataclass(frozen=True)
class Row:
    """A row of the table: one layer in several frameworks.

    Attributes:
      name, title: key and heading.
      batch: the axis along which each slice decides alone, or None.
      equal: axes of one size.
      part_axis, parts: the axis whose places have names, and the names in PyTorch's order.
      forms: framework -> the layer there; PyTorch always.
      statistics: what the layer gathers in training and no optimizer steps, as a row of its own, or None.
    """

    name: str
    title: str
    batch: str | None
    equal: tuple[str, ...]
    part_axis: str | None
    parts: tuple[str, ...]
    forms: Mapping[str, Form]
    statistics: Row | None = None

    def form(self, framework: str) -> Form:
        """The layer in a framework.

        Raises:
          ValueError: the row has no such framework.
        """
        if framework not in self.forms:
            raise ValueError(f"layer {self.name!r} has no framework {framework!r}; it has {', '.join(self.forms)}")
        return self.forms[framework]

    def names(self, framework: str) -> tuple[str, ...]:
        """What the layer calls its tensors in a framework: parameters, statistics, the counter."""
        form = self.form(framework)
        gathered = self.statistics.forms.get(framework) if self.statistics else None
        return (*form.pieces, *(gathered.pieces if gathered else ()), *([form.counter] if form.counter else ()))

    def homeless(self, framework: str) -> list[Term]:
        """What PyTorch's layer has and the framework's has not: it must be zero there."""
        taken = {term for pieces in self.form(framework).pieces.values() for piece in pieces for term in piece.terms}
        missing = []
        for name, (piece,) in self.forms["torch"].pieces.items():
            has_parts = any(letter.name == self.part_axis for axis in piece.axes for letter in axis)
            if Term(name, None) not in taken:
                missing += [Term(name, p) for p in (self.parts if has_parts else (None,)) if Term(name, p) not in taken]
        return missing

    def without(self, zero: Iterable[str]) -> Row:
        """The layer whose PyTorch parameters `zero` are zero and stay so: they vanish from every sum, and from PyTorch.

        Raises:
          ValueError: PyTorch's layer has no such parameter.
        """
        gone = set(zero)
        if unknown := gone - set(self.forms["torch"].pieces):
            raise ValueError(f"layer {self.name!r} has no {sorted(unknown)} in torch")
        forms = {}
        for framework, form in self.forms.items():
            pieces = {}
            for name, given in form.pieces.items():
                kept = [x._replace(terms=tuple(t for t in x.terms if t.parameter not in gone)) for x in given]
                if framework != "torch" and all(piece.terms for piece in kept):
                    pieces[name] = tuple(kept)
                elif framework == "torch" and name not in gone:
                    pieces[name] = given
            forms[framework] = replace(form, pieces=pieces)
        return replace(self, forms=forms)

    def loss(self, source: str, target: str) -> str | None:
        """Why carrying this layer over is no bijection or makes another optimizer of it; None where it is neither."""
        for framework in (source, target):
            form = self.form(framework)
            if form.apart:
                return f"{framework} decides otherwise: {form.apart}"
            if sums := sorted(form.sums()):
                terms = {name: [term.parameter for term in form.pieces[name][0].terms] for name in sums}
                added = "; ".join(f"{name} is the sum of {' and '.join(each)}" for name, each in terms.items())
                return (
                    f"in {framework} {added}, which nothing tells apart again: in PyTorch, add all to the first, set "
                    "the others to zero, freeze them (requires_grad_(False)), and name them in the map's `zero`"
                )
            if any(piece.constants for pieces in form.pieces.values() for piece in pieces):
                return f"{framework} keeps a constant apart, and adding it rounds"
            if missing := self.homeless(framework):
                return f"{framework} has no place for {', '.join(dict.fromkeys(term.parameter for term in missing))}"
        return None


@cache
def rows() -> dict[str, Row]:
    """Every row of `spec/layouts.toml` by its name.

    Raises:
      ValueError: the table contradicts itself; jsonschema.ValidationError: it does not fit its schema.
    """
    table = tomllib.loads(spec_file("layouts.toml").read_text())
    jsonschema.validate(table, json.loads(spec_file("schema/layouts.schema.json").read_text()))
    return {name: read_row(name, entry) for name, entry in table.items()}


def convert(
    row: str | Row,
    arrays: Arrays,
    source: str,
    target: str,
    *,
    moments: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """A layer's parameters in one framework, carried over from another.

    The way back gives the same arrays, save where `spec/layouts.toml` has a sum: there two of PyTorch's biases are one
    elsewhere, and the way back gives (sum, 0).

    Args:
      row: a row of the table or its name.
      arrays: the source's parameters by their names in the table. A parameter that the layer was made without, such as
        a bias, is left out here and in the answer.
      source, target: two of `FRAMEWORKS`.
      moments: whether these are moments or gradients of the parameters, not the parameters: constants are not
        subtracted, and what belongs to a sum belongs to each of its terms.
      sizes: axis -> size where the source's shapes do not tell, as the number of `heads` in PyTorch's attention; the
        number of spatial axes is `"..."`.

    Returns:
      The target's parameters by their names in the table, in arrays of their own.

    Raises:
      ValueError: a framework or parameter that the row does not have, a parameter that is missing, a shape
        that does not fit, an axis whose size cannot be known, or a weight that the target has no place for.
    """
    row = _row(row)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    row.form(target)
    known = _measure(row, (source, "torch", target), source, {name: x.shape for name, x in arrays.items()}, sizes)
    torch = dict(arrays) if source == "torch" else _to_torch(row, source, arrays, known, moments)
    if target == "torch":
        return {name: array.copy() for name, array in torch.items()}
    return _from_torch(row, target, torch, known, moments)


def origins(row: str | Row, source: str, target: str) -> dict[str, set[str]]:
    """Which of the source's parameters each of the target's needs to be made."""
    row = _row(row)
    needed = _needed(row, source)
    return {
        name: set().union(*(needed[term.parameter] for piece in pieces for term in piece.terms))
        for name, pieces in row.form(target).pieces.items()
    }


def axis_sizes(
    row: str | Row, shapes: Shapes, source: str, target: str, sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The size of every axis that the source's shapes and `sizes` tell, to be given as `sizes` for a part of them.

    Raises:
      ValueError: as `convert`.
    """
    known = _measure(_row(row), (source, "torch", target), source, shapes, sizes)
    told = {name: size for name, size in known.sizes.items() if not name.startswith(SPATIAL)}
    return told if known.spatial is None else told | {SPATIAL: known.spatial}


def target_shapes(
    row: str | Row, shapes: Shapes, source: str, target: str, sizes: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes that `convert` gives to the target's parameters, from those of the source.

    Raises:
      ValueError: as `convert`.
    """
    row = _row(row)
    row.form(target)
    known = _measure(row, (source, "torch", target), source, shapes, sizes)
    present = {name for name, whole in _needed(row, source).items() if _present(row, source, whole, shapes)}
    answer = {}
    for name, pieces in row.forms[target].pieces.items():
        if _present(row, "torch", {term.parameter for piece in pieces for term in piece.terms}, present):
            first, *others = (known.shape(known.axes(piece.axes)) for piece in pieces)
            answer[name] = (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first
    return answer


def layouts(
    row: str | Row, framework: str, shapes: Shapes, sizes: Mapping[str, int] | None = None
) -> dict[str, Layout]:
    """The layout of each parameter of a layer that makes it decide as the layer does in the other frameworks.

    Args:
      row: a row of the table or its name.
      framework: one of `FRAMEWORKS`.
      shapes: the parameters' shapes by their names in the table.
      sizes: axis -> size where the shapes do not tell.

    Raises:
      ValueError: as `convert`.
    """
    row = _row(row)
    known = _measure(row, (framework,), framework, shapes, sizes)
    answer = {}
    for name in shapes:
        axes = known.axes(row.forms[framework].pieces[name][0].axes)
        channel, batch, view = cut(row, axes)
        view_sizes = None if view is None else [math.prod(known.size(letter) for letter in run) for run in view]
        answer[name] = Layout(channel, batch, view_sizes) if channel else Layout(None)
    return answer


# ------------------------------------------------------------------------------------------------ sizes


class _Known(NamedTuple):
    """The sizes of a row's axes in one conversion."""

    row: Row
    sizes: Mapping[str, int]
    spatial: int | None

    def axes(self, axes: Axes) -> Axes:
        return _expand(self.row, axes, self.spatial)

    def size(self, letter: Letter) -> int:
        if letter.name not in self.sizes:
            raise ValueError(
                f"layer {self.row.name!r}: the shapes do not tell the size of axis {letter.name!r}; "
                f"give it in sizes (a map says sizes = {{ {letter.name} = n }})"
            )
        return self.sizes[letter.name]

    def shape(self, axes: Axes) -> tuple[int, ...]:
        return tuple(math.prod(self.size(letter) for letter in axis) for axis in axes)


def _expand(row: Row, axes: Axes, spatial: int | None) -> Axes:
    """`...` and `1...` written out."""
    if spatial is None:
        if any(letter.name.endswith(SPATIAL) for axis in axes for letter in axis):
            raise ValueError(
                f"layer {row.name!r}: the shapes do not tell the number of spatial axes; give it in sizes "
                'as "..." (a map says sizes = { "..." = n })'
            )
        return axes
    written: list[tuple[Letter, ...]] = []
    for axis in axes:
        if axis and axis[0].name == SPATIAL:
            written += [(axis[0]._replace(name=f"{SPATIAL}{i}"),) for i in range(spatial)]
        else:
            written += [()] * spatial if axis and axis[0].name == f"1{SPATIAL}" else [axis]
    return tuple(written)


def _measure(
    row: Row, frameworks: Iterable[str], source: str, shapes: Shapes, given: Mapping[str, int] | None
) -> _Known:
    """Finds the size of every axis from the source's shapes."""
    pieces = row.form(source).pieces
    if unknown := set(shapes) - set(pieces):
        raise ValueError(f"layer {row.name!r} has no {sorted(unknown)} in {source}; it has {sorted(pieces)}")
    sizes = dict(given or {})
    axes = {letter.name.removeprefix("1") for form in row.forms.values() for letter in form.letters()}
    if unknown := set(sizes) - axes:
        raise ValueError(f"layer {row.name!r} has no axes {sorted(unknown)}; sizes may name {sorted(axes)}")
    spatial = sizes.pop(SPATIAL, None)
    if row.part_axis:
        sizes[row.part_axis] = len(row.parts)
    for name, shape in shapes.items():
        spatial = _spatial(row, source, name, pieces[name][0].axes, tuple(shape), spatial)

    equations = [
        (name, tuple(shape), total, products)
        for name, shape in shapes.items()
        for total, products in _equations([_expand(row, piece.axes, spatial) for piece in pieces[name]], shape)
    ]
    everywhere = [axis for framework in frameworks for axis in row.forms[framework].axes()]
    while True:
        before = len(sizes)
        for name, shape, total, products in equations:
            _solve(row, source, name, shape, total, products, sizes)
        if one := next((sizes[name] for name in row.equal if name in sizes), None):
            for name in row.equal:
                if sizes.setdefault(name, one) != one:
                    raise ValueError(f"layer {row.name!r}: axes {row.equal} must be of one size, got {sizes}")
        if len(sizes) == before:
            inner = next((x for x in _inseparable(everywhere) if x not in sizes), None)
            if inner is None:
                return _Known(row, sizes, spatial)
            sizes[inner] = 1  # it follows its neighbour everywhere: only their product matters


def _spatial(row: Row, source: str, name: str, axes: Axes, shape: tuple[int, ...], known: int | None) -> int | None:
    fixed = sum(not (axis and axis[0].name.endswith(SPATIAL)) for axis in axes)
    if fixed == len(axes):
        rank_fits = len(shape) == fixed
    else:
        rank_fits = known in (None, len(shape) - fixed) and len(shape) >= fixed
        known = len(shape) - fixed
    if not rank_fits:
        raise ValueError(f"layer {row.name!r} in {source}: {name!r} is {written(axes)!r} and cannot have shape {shape}")
    return known


def _equations(pieces: Sequence[Axes], shape: Sequence[int]) -> Iterator[tuple[int, list[list[str]]]]:
    """What the shape says: a total, and the products of axes that add up to it."""
    for axis, total in enumerate(shape):
        products = [[letter.name for letter in axes[axis]] for axes in pieces]
        if axis == 0:
            yield total, products
        else:
            yield from ((total, [product]) for product in products)


def _solve(
    row: Row,
    source: str,
    name: str,
    shape: tuple[int, ...],
    total: int,
    products: Iterable[Sequence[str]],
    sizes: dict[str, int],
) -> None:
    """Adds the one size that is unknown in an equation; checks it where none is."""
    products = list(products)
    unknown = {letter for product in products for letter in product if letter not in sizes}
    if len(unknown) > 1:
        return
    factor = rest = 0
    for product in products:
        value = math.prod(sizes[letter] for letter in product if letter in sizes)
        if unknown & set(product):
            factor += value
        else:
            rest += value
    if not unknown and rest == total:
        return
    if not unknown or factor == 0 or (total - rest) % factor or total < rest:
        axes = " and ".join(written(piece.axes) for piece in row.forms[source].pieces[name])
        raise ValueError(
            f"layer {row.name!r} in {source}: {name!r} is {axes!r} and cannot have shape {shape}, "
            f"where the other shapes and sizes say {sizes}"
        )
    sizes[unknown.pop()] = (total - rest) // factor


def _inseparable(axes: Sequence[tuple[Letter, ...]]) -> Iterator[str]:
    """Letters that directly follow the same letter, of their kind, wherever either of the two appears."""

    def follows(outer: str, inner: str, axis: tuple[Letter, ...]) -> bool:
        return any(
            (a.name, b.name) == (outer, inner) and a.indexes_rows == b.indexes_rows and not (a.backwards or b.backwards)
            for a, b in pairwise(axis)
        )

    for outer, inner in sorted({(a.name, b.name) for axis in axes for a, b in pairwise(axis)}):
        if all(follows(outer, inner, axis) for axis in axes if {outer, inner} & {letter.name for letter in axis}):
            yield inner


# ------------------------------------------------------------------------------------------------ arrays


def _to_torch(row: Row, source: str, arrays: Arrays, known: _Known, moments: bool) -> dict[str, np.ndarray]:
    form = row.forms[source]
    torch = {}
    for parameter, whole in _needed(row, source).items():
        if _present(row, source, whole, arrays):
            axes = known.axes(row.forms["torch"].pieces[parameter][0].axes)
            dtype = arrays[next(iter(sorted(whole)))].dtype
            torch[parameter] = np.zeros([known.size(letter) for axis in axes for letter in axis], dtype)
    for name, array in arrays.items():
        for piece, x in _pieces(form.pieces[name], array, known):
            letters = [letter for axis in known.axes(piece.axes) for letter in axis]
            x = _split(x, letters, known)
            names = [letter.name for letter in letters]
            if row.part_axis in names and form.order:
                x = x.take([form.order.index(part) for part in row.parts], names.index(row.part_axis))
            if not moments:
                x = _plus_constants(x, row, names, piece, -1)
            for i, term in enumerate(piece.terms):
                if i == 0 or moments:
                    place, order = _place(row, term, known)
                    torch[term.parameter][place] = x.transpose([names.index(letter) for letter in order])
    return {
        name: x.reshape(known.shape(known.axes(row.forms["torch"].pieces[name][0].axes))) for name, x in torch.items()
    }


def _needed(row: Row, source: str) -> dict[str, set[str]]:
    """PyTorch's parameter -> those of the source that it is made from."""
    if source == "torch":
        return {name: {name} for name in row.form(source).pieces}
    needed: dict[str, set[str]] = {name: set() for name in row.forms["torch"].pieces}
    for name, pieces in row.form(source).pieces.items():
        for piece in pieces:
            for term in piece.terms:
                needed[term.parameter].add(name)
    return needed


def _from_torch(row: Row, target: str, torch: Arrays, known: _Known, moments: bool) -> dict[str, np.ndarray]:
    form = row.forms[target]
    split = {}
    for parameter, x in torch.items():
        axes = known.axes(row.forms["torch"].pieces[parameter][0].axes)
        split[parameter] = _split(x, [letter for axis in axes for letter in axis], known)
    for term in row.homeless(target):
        if not moments and term.parameter in split and np.any(split[term.parameter][_place(row, term, known)[0]]):
            part = f"[{term.part}]" if term.part else ""
            raise ValueError(
                f"layer {row.name!r}: {target} has no place for {term.parameter}{part}, which must be zero to convert"
            )
    answer = {}
    for name, pieces in form.pieces.items():
        if not _present(row, "torch", {term.parameter for piece in pieces for term in piece.terms}, torch):
            continue
        joined = []
        for piece in pieces:
            axes = known.axes(piece.axes)
            letters = [letter for axis in axes for letter in axis]
            names = [letter.name for letter in letters]
            terms = []
            for term in piece.terms:
                place, order = _place(row, term, known)
                terms.append(split[term.parameter][place].transpose([order.index(letter) for letter in names]))
            x = np.array(terms[0])
            for other in terms[1:]:
                x = x + other
            if moments and len(terms) > 1:
                x = (x / len(terms)).astype(terms[0].dtype)  # equal in PyTorch, whose gradients are
            if not moments:
                x = _plus_constants(x, row, names, piece, 1)
            if row.part_axis in names and form.order:
                x = x.take([row.parts.index(part) for part in form.order], names.index(row.part_axis))
            x = np.flip(x, tuple(i for i, letter in enumerate(letters) if letter.backwards))
            joined.append(x.reshape(known.shape(axes)))
        answer[name] = np.concatenate(joined) if len(joined) > 1 else np.ascontiguousarray(joined[0])
    return answer


def _present(row: Row, framework: str, names: set[str], arrays: Collection[str]) -> bool:
    """Whether the arrays are there, all or none."""
    missing = names - set(arrays)
    if missing and missing != names:
        raise ValueError(
            f"layer {row.name!r}: {sorted(missing)} of {framework} missing beside {sorted(names - missing)}"
        )
    return bool(names) and not missing


def _pieces(pieces: Sequence[Piece], array: np.ndarray, known: _Known) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece of a parameter with its part of the array."""
    start = 0
    for piece in pieces:
        shape = known.shape(known.axes(piece.axes))
        end = start + shape[0] if shape else None
        yield piece, array[start:end] if shape else array
        start = end or 0


def _split(x: np.ndarray, letters: Sequence[Letter], known: _Known) -> np.ndarray:
    """One axis for each letter, none backwards."""
    x = x.reshape([known.size(letter) for letter in letters])
    return np.flip(x, tuple(i for i, letter in enumerate(letters) if letter.backwards))


def _place(row: Row, term: Term, known: _Known) -> tuple[tuple[slice | int, ...], list[str]]:
    """Where a term lies in PyTorch's split parameter, and the names of the axes that are left there."""
    axes = known.axes(row.forms["torch"].pieces[term.parameter][0].axes)
    names = [letter.name for axis in axes for letter in axis]
    if term.part is None:
        return (), names
    at = names.index(row.part_axis or "")
    return (*[slice(None)] * at, row.parts.index(term.part)), names[:at] + names[at + 1 :]


def _plus_constants(x: np.ndarray, row: Row, names: Sequence[str], piece: Piece, sign: int) -> np.ndarray:
    if not piece.constants:
        return x
    x = np.moveaxis(x, names.index(row.part_axis or ""), 0).copy()
    for constant, part in piece.constants:
        x[row.parts.index(part)] += sign * constant
    return np.moveaxis(x, 0, names.index(row.part_axis or ""))


# ------------------------------------------------------------------------------------------------ layouts


def cut(row: Row, axes: Axes) -> tuple[list[int], list[int], list[list[Letter]] | None]:
    """Channel axes, batch axes, and what each axis of the view is made of, None where no view is needed."""

    def kind(letter: Letter) -> str:
        return "channel" if letter.indexes_rows else "batch" if letter.name == row.batch else "row"

    runs = []
    for axis in axes:
        split: list[list[Letter]] = []
        for letter in axis:
            if split and kind(split[-1][-1]) == kind(letter):
                split[-1].append(letter)
            else:
                split.append([letter])
        runs.append(split or [[]])
    flat = [run for split in runs for run in split]
    places: dict[str, list[int]] = {"channel": [], "batch": [], "row": []}
    for i, run in enumerate(flat):
        places[kind(run[0]) if run else "row"].append(i)
    return places["channel"], places["batch"], flat if len(flat) > len(axes) else None


# ------------------------------------------------------------------------------------------------ the file

_OPTIONS = ("layer", "order", "declare", "by_name", "by_class", "apart", "counter", "statistics")


def read_row(name: str, entry: Mapping) -> Row:
    """A row of the table from its TOML, which fits the schema.

    Raises:
      ValueError: the row contradicts itself; the message names the place.
    """
    ((part_axis, parts),) = entry.get("parts", {None: ""}).items()
    forms: dict[str, Form] = {}
    for framework in ("torch", "keras", "flax", "linen", "nnx", "equinox", "haiku"):
        if framework in entry:
            form = _read_form(framework, entry[framework])
            forms |= {each: form for each in (("linen", "nnx") if framework == "flax" else (framework,))}
    row = Row(name, entry["title"], entry.get("batch"), tuple(entry.get("equal", ())), part_axis, _words(parts), forms)
    if "statistics" in entry["torch"]:
        gathered = {key: {"layer": x["layer"], **x["statistics"]} for key, x in entry.items() if "statistics" in x}
        row = replace(row, statistics=read_row(f"{name} statistics", {"title": entry["title"], **gathered}))
    _check_row(row)
    return row


def _read_form(framework: str, entry: Mapping) -> Form:
    pieces = {}
    for name, text in entry.items():
        if name not in _OPTIONS:
            sources = [f"{name}: {text}"] if framework == "torch" else [text] if isinstance(text, str) else text
            pieces[name] = tuple(map(_read_piece, sources))
    options: dict[str, Any] = {key: frozenset(entry.get(key, ())) for key in ("declare", "by_name", "by_class")}
    options |= {key: entry.get(key) for key in ("apart", "counter")}
    return Form(tuple(entry["layer"].split(", ")), pieces, _words(entry.get("order", "")), **options)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _read_piece(text: str) -> Piece:
    sources, _, axes = text.partition(": ")
    terms, constants = [], []
    for sign, name, part in re.findall(r"([+-]?) ?([\w.]+)(?:\[(\w+)\])?", sources):
        if re.fullmatch(r"[\d.]+", name):
            constants.append((-float(name) if sign == "-" else float(name), part))
        else:
            terms.append(Term(name, part or None))
    return Piece(tuple(terms), tuple(constants), _read_axes(axes))


def _read_axes(text: str) -> Axes:
    return tuple(
        tuple(
            Letter(word.removeprefix("~").lower(), word != word.lower(), word.startswith("~"))
            for word in token.strip("()").split()
            if word != "1"
        )
        for token in re.findall(r"\([^)]*\)|\S+", text)
    )


def written(axes: Axes) -> str:
    """Axes as `layouts.toml` writes them."""
    words = [
        " ".join(("~" if x.backwards else "") + (x.name.upper() if x.indexes_rows else x.name) for x in axis) or "1"
        for axis in axes
    ]
    return " ".join(f"({word})" if " " in word else word for word in words)


def _check_row(row: Row) -> None:
    torch = row.forms["torch"].pieces

    def complain(place: str, what: str) -> ValueError:
        return ValueError(f"layouts.toml, {row.name}, {place}: {what}")

    for framework, form in row.forms.items():
        if form.order and sorted(form.order) != sorted(row.parts):
            raise complain(framework, f"order {form.order} is not a permutation of the parts {row.parts}")
        if unknown := (form.declare | form.by_name | form.by_class) - set(form.pieces):
            raise complain(framework, f"{sorted(unknown)} are no parameters of it")
        for name, pieces in form.pieces.items():
            for piece in pieces:
                place = f"{framework} {name!r}"
                letters = sorted(x[:2] for axis in piece.axes for x in axis if x.name != f"1{SPATIAL}")
                if len(dict(letters)) != len(letters):
                    raise complain(place, f"an axis is named twice in {written(piece.axes)!r}")
                for term in piece.terms:
                    if term.parameter not in torch:
                        raise complain(place, f"PyTorch's layer has no {term.parameter!r}; it has {sorted(torch)}")
                    (origin,) = torch[term.parameter]
                    own = sorted(x[:2] for axis in origin.axes for x in axis if x.name != f"1{SPATIAL}")
                    if term.part is not None:
                        if term.part not in row.parts or row.part_axis not in dict(own):
                            raise complain(place, f"{term.parameter} has no part {term.part!r}")
                        own = [x for x in own if x[0] != row.part_axis]
                    if own != letters:
                        raise complain(
                            place, f"{written(piece.axes)!r} has other axes than PyTorch's {written(origin.axes)!r}"
                        )


def _row(row: str | Row) -> Row:
    if isinstance(row, Row):
        return row
    if row not in rows():
        raise ValueError(f"there is no layer {row!r} in layouts.toml; it has {', '.join(rows())}")
    return rows()[row]
