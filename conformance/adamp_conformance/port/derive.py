"""Maps derived from two models: which layer of one is which of the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from adamp_conformance import layers
from adamp_conformance.port.flattening import flattened
from adamp_conformance.port.inventory import PARAMETER, Inventory, Layer
from adamp_conformance.port.maps import SAME, Map, Pair, Place
from adamp_spec import Layout, SGDPHyper
from adamp_spec.snapshot import Entry, Snapshot, Tensor

IN_ORDER = "by order"
ONLY_ONE = "the only one that fits"


class Unmatched(NamedTuple):
    """A layer that no pair of the map has, and why."""

    layer: Layer
    why: str


class Proposal(NamedTuple):
    """A map between two models, and what is missing in it.

    Attributes:
      map: its pairs are in the target's order.
      unmatched_source, unmatched_target: the layers in no pair; where there are none, the map is complete.
      doubtful: pairs of these that fit, if nothing is flattened or reshaped at them.
    """

    map: Map
    unmatched_source: tuple[Unmatched, ...]
    unmatched_target: tuple[Unmatched, ...]
    doubtful: tuple[Pair, ...]


def propose(source: Inventory, target: Inventory) -> Proposal:
    """Derives the map from one model to another.

    Two layers fit when a row of `layouts.toml` carries all tensors of the one into those of the other and back. What
    fits is matched by name; then, where equally many layers fit one another and nothing else, in order; then layers
    that the other model stacks in one, likewise. Where images may be flattened, the row may be another: such layers
    are left to the user.
    """
    work = _Matching(source, target)
    work.match(work.left(0), work.left(1))
    work.match(_bundles(work.left(0), source), work.left(1))
    work.match(work.left(0), _bundles(work.left(1), target))
    work.match(work.left(0), work.left(1))  # where a layer of a stack would have fitted, too
    return work.proposal()


class _Item(NamedTuple):
    """A layer, or several that are stacked in one layer of the other model.

    Attributes:
      path: of the layer; of several, without the number that tells them apart.
      layers: of its inventory.
      places: their indices in the inventory.
      signature: equal for what fits the same.
    """

    path: str
    layers: tuple[Layer, ...]
    places: tuple[int, ...]
    signature: tuple


class _Found(NamedTuple):
    """A pair of the map, and what it is made of: an item of the source, one of the target."""

    items: tuple[_Item, _Item]
    pair: Pair


class _Matching:
    """Two inventories, the pairs that are found, and what is left."""

    def __init__(self, source: Inventory, target: Inventory) -> None:
        self.sides = source, target
        self.found: list[_Found] = []
        self._fits: dict[tuple, _Fit | str] = {}
        self._counted = _counted(source), _counted(target)

    def left(self, side: int) -> list[_Item]:
        """The layers of the source, 0, or the target, 1, that are in no pair."""
        taken = {place for found in self.found for place in found.items[side].places}
        return [_item(self.sides[side], [i]) for i in range(len(self.sides[side].layers)) if i not in taken]

    def fit(self, source: _Item, target: _Item) -> _Fit | str:
        """How two items fit, or why they do not."""
        key = source.signature, target.signature
        if key not in self._fits:
            self._fits[key] = _fit(self.sides[0], source, self.sides[1], target)
        return self._fits[key]

    def _names(self, side: int, item: _Item, prefix: tuple[str, ...]) -> set[tuple[str, ...]]:
        """What somebody called an item, with and without the model's own name; nothing where a library did."""
        words = _words(item.path)
        return set() if item.places[0] in self._counted[side] else {words, words[len(prefix) :]}

    def match(self, sources: list[_Item], targets: list[_Item]) -> None:
        """Adds the pairs that names tell, and then those that order tells."""
        for ours, theirs in (((), ()), (_prefix(self.sides[0]), _prefix(self.sides[1]))):
            named: dict[tuple[str, ...], list[_Item]] = {}
            for item in sources:
                for words in self._names(0, item, ours):
                    named.setdefault(words, []).append(item)
            for target in list(targets):
                same = [x for words in self._names(1, target, theirs) for x in named.get(words, ())]
                fitting = {x.places: x for x in same if x in sources and isinstance(self.fit(x, target), _Fit)}
                if len(fitting) == 1:
                    (source,) = fitting.values()
                    self._add(source, target, "")
                    sources, targets = _without(sources, source), _without(targets, target)
        named_alike = {tuple(x.signature for x in found.items) for found in self.found}
        for group in self._in_order(sources, targets):
            for source, target in group:
                alone = len(group) == 1 and (source.signature, target.signature) not in named_alike
                self._add(source, target, ONLY_ONE if alone else IN_ORDER)

    def _in_order(self, sources: list[_Item], targets: list[_Item]) -> Iterator[list[tuple[_Item, _Item]]]:
        """Equally many items that fit one another and nothing else, and of which no two share a layer.

        Parameters of one module have no order that all frameworks know; of several, their own names must agree.
        """
        groups: dict[frozenset[int], list[_Item]] = {}
        for target in targets:
            fitting = frozenset(i for i, x in enumerate(sources) if isinstance(self.fit(x, target), _Fit))
            groups.setdefault(fitting, []).append(target)
        for fitting, theirs in groups.items():
            if len(fitting) != len(theirs) or any(fitting & other for other in groups if other != fitting):
                continue
            ours = sorted((sources[i] for i in sorted(fitting)), key=_own_name)
            theirs = sorted(theirs, key=_own_name)
            if len(ours) == 1 or list(map(_own_name, ours)) == list(map(_own_name, theirs)):
                yield list(zip(ours, theirs, strict=True))

    def _add(self, source: _Item, target: _Item, note: str) -> None:
        fit = self.fit(source, target)
        assert isinstance(fit, _Fit)
        self.found.append(_Found((source, target), fit.pair(source, target, note)))

    def proposal(self) -> Proposal:
        """The map without the pairs whose row may be another, and why layers are in none."""
        unmatched: tuple[list[Unmatched], list[Unmatched]] = ([], [])
        turned = (self.sides[0].framework in _CHANNELS_FIRST) != (self.sides[1].framework in _CHANNELS_FIRST)
        takes, makes = any(x.takes_images for x in self.sides), any(x.makes_images for x in self.sides)
        marked = [flattened(inventory, takes, makes) if turned else set() for inventory in self.sides]
        kept, doubtful = [], []
        for found in sorted(self.found, key=lambda each: each.items[1].places[0]):
            if not any(places & set(item.places) for places, item in zip(marked, found.items, strict=True)):
                kept.append(found.pair)
                continue
            doubtful.append(found.pair)
            for own, item, other in zip(unmatched, found.items, found.items[::-1], strict=True):
                why = _FLATTENED.format(other=other.path, row=found.pair.row)
                own.extend(Unmatched(layer, why) for layer in item.layers)
        for side in (0, 1):
            items, others = self.left(side), self.left(1 - side)
            unmatched[side].extend(Unmatched(x.layers[0], self._why(side, x, items, others)) for x in items)
        source, target = (inventory.framework for inventory in self.sides)
        return Proposal(Map(source, target, tuple(kept)), tuple(unmatched[0]), tuple(unmatched[1]), tuple(doubtful))

    def _why(self, side: int, item: _Item, own: Sequence[_Item], others: Sequence[_Item]) -> str:
        """Why an item is left, among its own and those of the other model."""
        near: dict[str, list[str]] = {}  # why not -> those that do not fit for it
        for other in others:
            fit = self.fit(other, item) if side else self.fit(item, other)
            near.setdefault("" if isinstance(fit, _Fit) else fit, []).append(other.path)
        if fitting := near.get("", []):
            rivals = [x.path for x in own if x.signature == item.signature and x != item]
            also = f", as do {_some(rivals)}" if rivals else ""
            return f"fits {_some(fitting)}{also}; neither names nor order tell which is which: say it in the map"
        near.pop(_OTHER_KIND, None)
        texts = [f"with {_some(paths)}: {reason}" for reason, paths in near.items()]
        return "; ".join(texts[:3]) or "nothing of its kind is left in the other model"


# ------------------------------------------------------------------------------------------------ names


def _words(path: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", path.lower()))


def _prefix(inventory: Inventory) -> tuple[str, ...]:
    """The model's own name: what all paths begin with."""
    parents = [re.split(r"[./]", layer.path)[:-1] for layer in inventory.layers]
    shared = takewhile(lambda each: len(set(each)) == 1, zip(*parents, strict=False))
    return _words("/".join(each[0] for each in shared))


def _counted(inventory: Inventory) -> set[int]:
    """The layers in whose paths is a name that the library gives by class and number, which may be any's name.

    Linen says Dense_0, Dense_1. Keras and Haiku say dense, dense_1: known by the layer's class, and of what contains it
    by one without a number beside those with one; Keras goes on counting in the next model.
    """
    if inventory.framework not in ("keras", "linen", "haiku"):
        return set()
    parts = [layer.path.split("/") for layer in inventory.layers]
    found = {"/".join(names[:n]) for names in parts for n in range(1, len(names) + 1)}
    if inventory.framework == "linen":
        counted = {path for path in found if re.search(r"(^|/)[A-Z][^/]*_\d+$", path)}
    else:
        bare = {path: re.sub(r"_\d+$", "", path) for path in found}
        counted = {path for path, name in bare.items() if path != name and name in found}
        counted |= {bare[path] for path in counted}
        counted |= {
            layer.path
            for layer in inventory.layers
            if bare[layer.path].rpartition("/")[2].replace("_", "") == layer.kind.lower()
        }
    return {i for i, names in enumerate(parts) if any("/".join(names[:n]) in counted for n in range(1, len(names) + 1))}


def _own_name(item: _Item) -> tuple[str, ...]:
    """Of a parameter, what its module calls it."""
    return _words(item.path)[-1:] if item.layers[0].kind == PARAMETER else ()


def _without(items: Iterable[_Item], taken: _Item) -> list[_Item]:
    return [x for x in items if not set(x.places) & set(taken.places)]


def _some(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _place(tensors: Mapping[str, str]) -> Place:
    """A pattern whose star stands for the names of a layer's tensors, or these names where there is none."""
    name, full = next(iter(tensors.items()))
    before, found, after = full.rpartition(name)
    pattern = f"{before}*{after}"
    return pattern if found and all(pattern.replace("*", x) == y for x, y in tensors.items()) else dict(tensors)


# ------------------------------------------------------------------------------------------------ items


def _item(inventory: Inventory, places: Sequence[int], path: str | None = None) -> _Item:
    members = tuple(inventory.layers[i] for i in places)
    first = members[0]
    tensors = tuple((name, inventory.shapes[x], x in inventory.trained) for name, x in sorted(first.tensors.items()))
    signature = (len(members), first.kind, tuple(sorted(first.sizes.items())), first.rows, tensors)
    return _Item(first.path if path is None else path, members, tuple(places), signature)


def _bundles(items: Sequence[_Item], inventory: Inventory) -> list[_Item]:
    """Layers that the other model may stack: alike, and told apart by one number in their paths."""
    groups: dict[tuple, dict[int, int]] = {}
    for item in items:
        for number in re.finditer(r"\d+", item.path):
            path = item.path[: number.start()] + item.path[number.end() :]
            groups.setdefault((path, number.start(), item.signature), {})[int(number[0])] = item.places[0]
    return [
        _item(inventory, [found[number] for number in sorted(found)], path)
        for (path, *_), found in groups.items()
        if len(found) > 1
    ]


# ------------------------------------------------------------------------------------------------ fits

_OTHER_KIND = "another kind"
_FLATTENED = (
    "is {other!r}, but one of them takes or gives other features than the layers around it: after Flatten or before "
    "Reshape these are in another order there, so write its row (docs/porting.md); if nothing is flattened or reshaped "
    "there, its row is {row!r}: adamp-parity map -o writes that as a comment, to be uncommented"
)
_CHANNELS_FIRST = {"torch", "equinox"}
_WOULD_BE = "would be "


class _Fit(NamedTuple):
    """How two items are the same layer: what their pair says besides their tensors."""

    row: str
    sizes: Mapping[str, int]
    zero: tuple[str, ...]

    def pair(self, source: _Item, target: _Item, note: str = "") -> Pair:
        here, there = (tuple(map(self._place, item.layers)) for item in (source, target))
        return Pair(self.row, here, there, self.sizes, self.zero, note=note)

    def _place(self, layer: Layer) -> Place:
        return next(iter(layer.tensors.values())) if self.row == SAME else _place(layer.tensors)


def _fit(source: Inventory, ours: _Item, target: Inventory, theirs: _Item) -> _Fit | str:
    """How two items fit, by the first row that carries the one into the other and back, or why none does."""
    if min(len(ours.layers), len(theirs.layers)) > 1:
        return _OTHER_KIND
    here, there = ours.layers[0].sizes, theirs.layers[0].sizes
    if any(here[axis] != there[axis] for axis in here.keys() & there.keys()):
        return f"one has {dict(here)}, the other {dict(there)}"
    reasons = []
    for fit in _candidates(source, ours.layers[0], target, theirs.layers[0]):
        given = Map(source.framework, target.framework, (fit.pair(ours, theirs),))
        if len(theirs.layers) > 1:  # a layout of a stack follows from that of its layers
            refused = _refused(given.reversed(), target, theirs, source, ours)
        else:
            refused = _refused(given, source, ours, target, theirs)
        if refused is None:
            return fit
        reasons.append(refused)
    last = reasons[-1] if reasons else _OTHER_KIND
    return next((x for x in reasons if x.startswith(_WOULD_BE)), last)  # it says the most


def _candidates(source: Inventory, ours: Layer, target: Inventory, theirs: Layer) -> Iterator[_Fit]:
    if PARAMETER in (ours.kind, theirs.kind):
        tensors = [*source.shapes_of(ours).values(), *target.shapes_of(theirs).values()]
        if len(tensors) == 2 and (ours.kind == theirs.kind or all(len(shape) < 2 for shape in tensors)):
            yield _Fit(SAME, {}, ())  # a vector, such as what is left of a tied layer, is the same in every framework
        return
    sides = (source, ours), (target, theirs)
    for name, row in layers.rows().items():
        if not all(inventory.may_be(layer, row) for inventory, layer in sides):
            continue
        known = {**ours.sizes, **theirs.sizes}
        here = source.axis_sizes(ours, row, target.framework, known)
        there = target.axis_sizes(theirs, row, source.framework, known)
        untold = {axis: (here | there)[axis] for axis in sorted(here.keys() ^ there.keys())}  # by one of them
        for zero in dict.fromkeys(((), _frozen(*sides[0]), _frozen(*sides[1]))):
            yield _Fit(name, untold | known, zero)


def _frozen(inventory: Inventory, layer: Layer) -> tuple[str, ...]:
    """What is not trained of a layer of PyTorch that is trained, such as an LSTM's second bias."""
    if inventory.framework != "torch" or not inventory.trained & set(layer.tensors.values()):
        return ()
    return tuple(name for name, full in layer.tensors.items() if full not in inventory.trained)


def _refused(given: Map, source: Inventory, ours: _Item, target: Inventory, theirs: _Item) -> str | None:
    """Why a map of one pair does not carry one item into the other and back; None where it does."""
    row = None if given.pairs[0].row == SAME else layers.rows()[given.pairs[0].row]
    try:
        there = _sample(source, ours, row, given.pairs[0].sizes)
        made = given.apply(*there)
        back = given.reversed().apply(*made)
    except ValueError as error:
        return str(error).removeprefix(f"{given.pairs[0]}: ")
    for (_, tensors), inventory, item in ((made, target, theirs), (back, source, ours)):
        found = {x.partition("/")[2]: (tensor.shape, x.startswith("other/")) for x, tensor in tensors.items()}
        names = {full: name for layer in item.layers for name, full in layer.tensors.items()}
        wanted = {x: (inventory.shapes[x], x not in inventory.trained) for x in names}
        if found == wanted:
            continue
        apart = sorted(names[x] for x in found.keys() & wanted.keys() if found[x][1] != wanted[x][1])
        if {x: shape for x, (shape, _) in found.items()} == {x: shape for x, (shape, _) in wanted.items()}:
            return (
                f"{_WOULD_BE}the same, but only one model's optimizer has {', '.join(apart)}: train it in both or in "
                "none (PyTorch: leave it out of the optimizer; Keras: trainable=False; Optax: keep it in others)"
            )
        return f"{_WOULD_BE}{_listed(found, names)}, and is {_listed(wanted, names)}"
    return None


def _listed(tensors: Mapping[str, tuple[tuple[int, ...], bool]], names: Mapping[str, str]) -> str:
    """Shapes by the names in the layer; of several layers, those of the last."""
    short = {names.get(full, full): what for full, what in sorted(tensors.items())}
    return ", ".join(f"{name} {shape}{' frozen' * frozen}".lstrip() for name, (shape, frozen) in short.items())


def _sample(
    inventory: Inventory, item: _Item, row: layers.Row | None, sizes: Mapping[str, int]
) -> tuple[Snapshot, dict[str, Tensor]]:
    """A snapshot of one item's tensors, all zero, with the layouts that its row asks for."""
    framework = inventory.framework
    entries: dict[str, Entry] = {}
    tensors: dict[str, Tensor] = {}
    for layer in item.layers:
        shapes = inventory.shapes_of(layer)
        known = {name: x for name, x in shapes.items() if row and name in row.form(framework).pieces}
        chosen = layers.layouts(row, framework, known, sizes) if row and known else {}
        for name, full in layer.tensors.items():
            tensor = Tensor("F32", shapes[name], partial(np.zeros, shapes[name], np.float32))
            if full in inventory.trained:
                entries[full] = Entry(0, 0, chosen.get(name, Layout(None)))
                tensors |= {f"parameter/{full}": tensor, f"m/{full}": tensor}
            else:
                tensors[f"other/{full}"] = tensor
    return Snapshot("sgdp", (SGDPHyper(lr=0.0),), entries), tensors
