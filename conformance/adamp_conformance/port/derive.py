"""Maps derived from two models: which layer of one is which of the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from adamp_conformance import layers
from adamp_conformance.port.inventory import PARAMETER, Inventory, Layer, classes
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
    """

    map: Map
    unmatched_source: tuple[Unmatched, ...]
    unmatched_target: tuple[Unmatched, ...]


def propose(source: Inventory, target: Inventory) -> Proposal:
    """Derives the map from one model to another.

    Two layers fit when a row of `layouts.toml` carries all tensors of the one into those of the other and back. What
    fits is matched by name; then, where equally many layers fit one another and nothing else, in order; then layers
    that the other model stacks in one, likewise.
    """
    source, target = _with_sequences(source, target), _with_sequences(target, source)
    work = _Matching(source, target)
    work.match(work.left_source(), work.left_target())
    work.match(_bundles(work.left_source(), source), work.left_target())
    work.match(work.left_source(), _bundles(work.left_target(), target))
    work.match(work.left_source(), work.left_target())  # where a layer of a stack would have fitted, too
    pairs = tuple(pair for *_, pair in sorted(work.pairs, key=lambda each: each[1].places[0]))
    return Proposal(Map(source.framework, target.framework, pairs), *work.unmatched())


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


class _Matching:
    """Two inventories, the pairs that are found, and what is left."""

    def __init__(self, source: Inventory, target: Inventory) -> None:
        self.source, self.target = source, target
        self._turned = (source.framework in _CHANNELS_FIRST) != (target.framework in _CHANNELS_FIRST)
        self.pairs: list[tuple[_Item, _Item, Pair]] = []
        self._fits: dict[tuple, _Fit | str] = {}

    def left_source(self) -> list[_Item]:
        taken = {place for item, _, _ in self.pairs for place in item.places}
        return [_item(self.source, [i]) for i in range(len(self.source.layers)) if i not in taken]

    def left_target(self) -> list[_Item]:
        taken = {place for _, item, _ in self.pairs for place in item.places}
        return [_item(self.target, [i]) for i in range(len(self.target.layers)) if i not in taken]

    def fit(self, source: _Item, target: _Item) -> _Fit | str:
        """How two items fit, or why they do not."""
        if self._turned and (_follows_images(self.source, source) or _follows_images(self.target, target)):
            return _FLATTENED
        key = source.signature, target.signature
        if key not in self._fits:
            self._fits[key] = _fit(self.source, source, self.target, target)
        return self._fits[key]

    def match(self, sources: list[_Item], targets: list[_Item]) -> None:
        """Adds the pairs that names tell, and then those that order tells."""
        prefixes = _prefix(self.source), _prefix(self.target)
        for cut in (False, True):  # without the models' own names only where these do not say it
            named: dict[tuple[str, ...], list[_Item]] = {}
            for item in sources:
                for words in _names(item, prefixes[0] if cut else ()):
                    named.setdefault(words, []).append(item)
            for target in list(targets):
                found = [x for words in _names(target, prefixes[1] if cut else ()) for x in named.get(words, ())]
                fitting = {x.places: x for x in found if x in sources and isinstance(self.fit(x, target), _Fit)}
                if len(fitting) == 1:
                    (source,) = fitting.values()
                    self._add(source, target, "")
                    sources, targets = _without(sources, source), _without(targets, target)
        for loosely in (False, True):
            for ours, theirs in self._in_order(sources, targets, loosely):
                if not any(self._crosses(s, t) for s, t in zip(ours, theirs, strict=True)):
                    for s, t in zip(ours, theirs, strict=True):
                        self._add(s, t, IN_ORDER if len(ours) > 1 else ONLY_ONE)
                        sources, targets = _without(sources, s), _without(targets, t)

    def _in_order(
        self, sources: list[_Item], targets: list[_Item], loosely: bool
    ) -> list[tuple[list[_Item], list[_Item]]]:
        """Equally many items that fit one another and nothing else.

        Parameters of one module have no order that all frameworks know, so that their own names must agree. Only where
        there is one, `loosely`, it may have another name.
        """
        groups: dict[frozenset[int], list[_Item]] = {}
        for target in targets:
            fitting = frozenset(
                i
                for i, x in enumerate(sources)
                if isinstance(self.fit(x, target), _Fit) and (loosely or _alike(x, target))
            )
            groups.setdefault(fitting, []).append(target)
        found = []
        for fitting, group in groups.items():
            ours = [sources[i] for i in sorted(fitting)]
            told = not loosely or len(group) == 1 or all(x.layers[0].kind != PARAMETER for x in (*ours, *group))
            if told and len(ours) == len(group) and not any(fitting & other for other in groups if other != fitting):
                found.append((ours, group))
        return found

    def _crosses(self, source: _Item, target: _Item) -> bool:
        """Whether names have put layers of this fit into another order, so that order tells nothing."""
        return any(
            (source.places < s.places) != (target.places < t.places)
            for s, t, _ in self.pairs
            if (s.signature, t.signature) == (source.signature, target.signature) and _alike(s, source)
        )

    def _add(self, source: _Item, target: _Item, note: str) -> None:
        fit = self.fit(source, target)
        assert isinstance(fit, _Fit)
        self.pairs.append((source, target, fit.pair(source, target, note)))

    def unmatched(self) -> tuple[tuple[Unmatched, ...], tuple[Unmatched, ...]]:
        sources, targets = self.left_source(), self.left_target()

        def why(own: Sequence[_Item], others: Sequence[_Item], reasons: list[_Fit | str], at: int) -> str:
            """Why `own[at]` is left, whose fits to the others are `reasons`."""
            fitting = [x.path for x, fit in zip(others, reasons, strict=True) if isinstance(fit, _Fit)]
            if fitting:
                rivals = [x.path for i, x in enumerate(own) if x.signature == own[at].signature and i != at]
                also = f", as do {_some(rivals)}" if rivals else ""
                return f"fits {_some(fitting)}{also}; neither names nor order tell which is which: say it in the map"
            near: dict[str, list[str]] = {}
            for x, fit in zip(others, reasons, strict=True):
                near.setdefault(str(fit), []).append(x.path)
            near.pop(_OTHER_KIND, None)
            texts = [f"with {_some(paths)}: {reason}" for reason, paths in near.items()]
            return "; ".join(texts[:3]) or "nothing of its kind is left in the other model"

        return (
            tuple(
                Unmatched(x.layers[0], why(sources, targets, [self.fit(x, t) for t in targets], i))
                for i, x in enumerate(sources)
            ),
            tuple(
                Unmatched(x.layers[0], why(targets, sources, [self.fit(s, x) for s in sources], i))
                for i, x in enumerate(targets)
            ),
        )


# ------------------------------------------------------------------------------------------------ names


def _words(path: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", path.lower()))


def _prefix(inventory: Inventory) -> tuple[str, ...]:
    """The model's own name: what all paths begin with."""
    parents = [re.split(r"[./]", layer.path)[:-1] for layer in inventory.layers]
    shared = takewhile(lambda each: len(set(each)) == 1, zip(*parents, strict=False))
    return _words("/".join(each[0] for each in shared))


def _names(item: _Item, prefix: tuple[str, ...]) -> set[tuple[str, ...]]:
    words = _words(item.path)
    return {words, words[len(prefix) :]}


def _alike(source: _Item, target: _Item) -> bool:
    """Whether two items, if one is a parameter, have the same name in their modules."""
    if PARAMETER not in (source.layers[0].kind, target.layers[0].kind):
        return True
    return _words(source.path)[-1:] == _words(target.path)[-1:]


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
    """Layers that the other model may stack: alike, and told apart by one number in their paths or by nothing."""
    groups: dict[tuple, dict[int, int]] = {}
    for item in items:
        (place,) = item.places
        groups.setdefault(("", item.signature), {})[place] = place
        for number in re.finditer(r"\d+", item.path):
            path = item.path[: number.start()] + item.path[number.end() :]
            groups.setdefault((path, number.start(), item.signature), {})[int(number[0])] = place
    bundles: dict[tuple[int, ...], _Item] = {}
    for (path, *_), found in groups.items():
        if len(found) > 1:
            places = tuple(found[number] for number in sorted(found))
            bundles[places] = _item(inventory, places, path)  # a path tells more than none
    return list(bundles.values())


def _with_sequences(own: Inventory, other: Inventory) -> Inventory:
    """PyTorch's sequences that are one layer in the other model, such as Keras' separable convolution, joined."""
    kinds = {layer.kind for layer in other.layers}
    joined = list(own.layers)
    for row in layers.rows().values():
        if own.framework != "torch" or "Sequential" not in row.forms["torch"].layer or other.framework not in row.forms:
            continue
        if not kinds & classes(row.forms[other.framework], other.framework):
            continue
        for first, second in zip(own.layers, own.layers[1:], strict=False):
            path = first.path.removesuffix("0")
            parts = {f"0.{name}": x for name, x in first.tensors.items()}
            parts |= {f"1.{name}": x for name, x in second.tensors.items()}
            whole = Layer(path.removesuffix("."), "Sequential", parts, {})
            ends = path == "" or path.endswith(".")
            if (first.path, second.path) == (f"{path}0", f"{path}1") and ends and _fits_any(whole, own, other):
                joined[joined.index(first)] = whole
                joined.remove(second)
    return own._replace(layers=tuple(joined))


def _follows_images(inventory: Inventory, item: _Item) -> bool:
    """Whether an item is a dense layer right after a convolution and has other inputs than that has channels."""
    framework, layer = inventory.framework, item.layers[0]
    dense = layers.rows()["dense"]
    before = [x for x in inventory.layers[: item.places[0]] if max(map(len, _shapes(inventory, x).values())) > 1]
    if layer.kind not in classes(dense.form(framework), framework) or not before or "Conv" not in before[-1].kind:
        return False
    channels = set()
    for row in (row for name, row in layers.rows().items() if "conv" in name and framework in row.forms):
        with suppress(KeyError, ValueError):  # the convolution of another row
            sizes = layers.axis_sizes(row, _shapes(inventory, before[-1]), framework, framework, before[-1].sizes)
            channels.add(sizes["out"] * sizes.get("groups", 1) if "out" in sizes else sizes["in"] * sizes["m"])
    inputs = layers.axis_sizes(dense, _shapes(inventory, layer), framework, framework)["in"]
    return bool(channels) and inputs not in channels


def _fits_any(layer: Layer, own: Inventory, other: Inventory) -> bool:
    own = own._replace(layers=(layer,))
    targets = (_item(other, [i]) for i in range(len(other.layers)))
    return any(isinstance(_fit(own, _item(own, [0]), other, target), _Fit) for target in targets)


# ------------------------------------------------------------------------------------------------ fits

_OTHER_KIND = "another kind"
_FLATTENED = (
    "has other inputs than the convolution before it has channels: after Flatten they are in another order there, so "
    "write its row (docs/porting.md)"
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
        tensors = [*_shapes(source, ours).values(), *_shapes(target, theirs).values()]
        if len(tensors) == 2 and (ours.kind == theirs.kind or all(len(shape) < 2 for shape in tensors)):
            yield _Fit(SAME, {}, ())  # a vector, such as what is left of a tied layer, is the same in every framework
        return
    sides = (source, ours), (target, theirs)
    for name, row in layers.rows().items():
        if any(
            inventory.framework not in row.forms
            or layer.kind not in classes(row.forms[inventory.framework], inventory.framework)
            or (layer.rows and name not in layer.rows)
            for inventory, layer in sides
        ):
            continue
        known = {**ours.sizes, **theirs.sizes}
        told: dict[str, int] = {}
        for (inventory, layer), (other, _) in (sides, sides[::-1]):
            shapes = _shapes(inventory, layer)
            parameters = {x: shape for x, shape in shapes.items() if x in row.forms[inventory.framework].pieces}
            with suppress(ValueError):  # that it does not fit is said when it is carried
                told |= layers.axis_sizes(row, parameters, inventory.framework, other.framework, known)
        for zero in dict.fromkeys(((), _frozen(*sides[0]), _frozen(*sides[1]))):
            for axis in (None, *told):
                yield _Fit(name, known if axis is None else {axis: told[axis]} | known, zero)


def _shapes(inventory: Inventory, layer: Layer) -> dict[str, tuple[int, ...]]:
    return {name: inventory.shapes[full] for name, full in layer.tensors.items()}


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
        if found != wanted:
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
        shapes = _shapes(inventory, layer)
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
