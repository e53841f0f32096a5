"""Layers around which images may be flattened, or made of features: the order of their features is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

from adamp_conformance import layers
from adamp_conformance.port.inventory import Inventory, Layer


class _Features(NamedTuple):
    """How many features a layer takes and gives.

    Attributes:
      kind: "conv"; "dense" for what else makes features of features; "norm" for all others, which give what they take.
      taken, given: the numbers that its rows allow; empty where they count no features.
    """

    kind: str
    taken: set[int]
    given: set[int]


def flattened(inventory: Inventory, takes_images: bool = False, makes_images: bool = False) -> set[int]:
    """The places of the layers before which images may be flattened, or of whose outputs images may be made.

    Layers may come in another order than they are called in, and what is between them is not known. So a layer of
    features is above suspicion only if it takes what the one before it gives, or takes itself from somewhere above
    suspicion: a count that one of them takes of flattened images is suspicious in all. Norms, of which models are
    declared in many orders, may follow any layer that gives as much. What gives images must give their channels.

    Args:
      inventory: of the model.
      takes_images: whether there may be images though there are no convolutions.
      makes_images: whether the last layer of features may give images.
    """
    features = [_features(inventory, layer) for layer in inventory.layers]
    if not takes_images and not makes_images and all(x.kind != "conv" for x in features):
        return set()
    suspicious: set[int] = set()
    while True:
        found, taken = _found(features, suspicious, makes_images)
        if taken <= suspicious:
            return found
        suspicious |= taken


def _found(features: Sequence[_Features], suspicious: set[int], makes_images: bool) -> tuple[set[int], set[int]]:
    """What `flattened` returns if these counts are suspicious, and the counts that suspects take."""
    channels = {n for x in features if x.kind == "conv" for n in x.taken}
    last = max((i for i, x in enumerate(features) if x.kind == "dense"), default=None)
    found: set[int] = set()
    taken: set[int] = set()
    given: set[int] = set()  # by any layer before
    offered: set[int] = set()  # by the layer before, norms aside, and by what it has taken from

    def agree(own: set[int], others: set[int]) -> bool:
        return not own or bool(own & (others | {1}))  # one feature has no order

    for i, x in enumerate(features):
        norm = x.kind == "norm"
        near = (next((y for y in beside if y.kind != "norm"), x) for beside in (features[:i][::-1], features[i + 1 :]))
        before, after = (y if y.kind == "conv" != x.kind else None for y in near)
        if norm and before and after:  # it may be of either, and after a concatenation
            before = after = None
        if after is not None:
            gives = agree(x.given, after.taken)
        else:
            gives = not (makes_images and i == last) or agree(x.given, set())
        if x.kind == "conv":
            takes = True
        elif norm:
            takes = agree(x.taken, given | channels) and (before is None or agree(x.taken, before.given))
        else:
            takes = agree(x.taken, offered - suspicious)
        if not (gives and takes):
            found.add(i)
        if not takes:
            taken |= x.taken
        if norm:
            continue
        if gives:
            given |= x.given
        offered = (x.given if gives else set()) | (x.taken if takes and x.kind != "conv" else set())
    return found, taken


def _features(inventory: Inventory, layer: Layer) -> _Features:
    """What the rows of a layer's class say of its features."""
    framework, kind = inventory.framework, "norm"
    taken: set[int] = set()
    given: set[int] = set()
    possible = [row for row in layers.rows().values() if inventory.may_be(layer, row)]
    possible += [row.statistics for row in possible if row.statistics and framework in row.statistics.forms]
    for row in possible:
        sizes = inventory.axis_sizes(layer, row, framework, layer.sizes)
        size = partial(_first_product, sizes)
        if "channel" in sizes:
            if max(map(math.prod, inventory.shapes_of(layer).values())) == sizes["channel"]:  # not over whole images
                taken, given = taken | {sizes["channel"]}, given | {sizes["channel"]}
        elif sizes:
            kind = "conv" if "conv" in row.name else "dense"
            taken |= size(("in", "groups"), ("heads", "dim"))
            given |= size(("out", "groups"), ("hidden",), ("m", "in"), ("heads", "dim"), ("dim",))
            given |= {2 * n for n in size(("hidden",))}  # in both directions
    return _Features(kind, taken, given)


def _first_product(sizes: Mapping[str, int], *choices: tuple[str, ...]) -> set[int]:
    """The size of the first of these axes that is there, together with those that belong to it."""
    found = (math.prod(sizes.get(axis, 1) for axis in axes) for axes in choices if axes[0] in sizes)
    return set(islice(found, 1))
