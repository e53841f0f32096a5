"""What a model is made of: its layers, as `spec/layouts.toml` names them, and the tensors of each.

One walk for each framework. Importing this module imports none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from adamp_conformance.layers import Form, Row, axis_sizes, rows

PARAMETER = "Parameter"  # the kind of a tensor that is no known layer's
LIBRARIES = {
    "torch": "torch",
    "keras": "keras",
    "linen": "flax.linen",
    "nnx": "flax.nnx",
    "equinox": "equinox",
    "haiku": "haiku",
}
_CONTAINERS = {"Sequential", "Module"}  # of other layers, to which the tensors belong


class Layer(NamedTuple):
    """A layer with tensors of its own.

    Attributes:
      path: where it is in the model, as its framework writes paths; empty for the model itself.
      kind: its class, as in `layouts.toml`; "Parameter" for a tensor that is no known layer's.
      tensors: name in the layer, as in `layouts.toml`, -> name in the model, as in a snapshot.
      sizes: axes that no shape tells, such as PyTorch's `heads`.
      rows: those of `layouts.toml` that it can be, where neither class nor shapes tell; empty where they do.
    """

    path: str
    kind: str
    tensors: Mapping[str, str]
    sizes: Mapping[str, int]
    rows: tuple[str, ...] = ()


class Inventory(NamedTuple):
    """All layers of a model, in its own order; after them the tensors that are no layer's.

    Attributes:
      framework: one of `adamp_conformance.layers.FRAMEWORKS`.
      shapes: name in the model -> shape, of every tensor that a snapshot holds.
      trained: the names of those that the optimizer steps.
      takes_images, makes_images: whether something besides its convolutions tells so: inputs or outputs of four axes or
        more, a layer that flattens or reshapes.
    """

    framework: str
    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]
    trained: frozenset[str]
    takes_images: bool = False
    makes_images: bool = False

    def shapes_of(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """The shapes of a layer's tensors by their names in the layer."""
        return {name: self.shapes[full] for name, full in layer.tensors.items()}

    def may_be(self, layer: Layer, row: Row) -> bool:
        """Whether a row is of a layer's class."""
        if self.framework not in row.forms or (layer.rows and row.name not in layer.rows):
            return False
        return layer.kind in classes(row.forms[self.framework], self.framework)

    def axis_sizes(self, layer: Layer, row: Row, target: str, known: Mapping[str, int]) -> dict[str, int]:
        """The sizes of a row's axes that a layer's parameters tell; none if it is not of this row."""
        names = row.form(self.framework).pieces
        shapes = {name: shape for name, shape in self.shapes_of(layer).items() if name in names}
        with suppress(ValueError):
            return axis_sizes(row, shapes, self.framework, target, known)
        return {}


def torch_inventory(model: Any, trained: Iterable[str] | None = None) -> Inventory:
    """The layers of a `torch.nn.Module`, in the order of `named_modules`.

    Args:
      trained: names of the optimizer's parameters; None: those that require a gradient.

    Raises:
      ValueError: a name of `trained` is no parameter's.
    """
    import torch

    parameters = dict(model.named_parameters())  # without the second names of tied ones
    names = {name for name, x in parameters.items() if x.requires_grad} if trained is None else {*trained}
    if unknown := names - set(parameters):
        raise ValueError(f"the model has no parameters {sorted(unknown)}; it has {sorted(parameters)}")
    stepped = {id(parameters[name]) for name in names}
    shapes = {
        name: tuple(x.shape)
        for name, x in model.state_dict(keep_vars=True).items()
        if isinstance(x, torch.Tensor) and (name in names or id(x) not in stepped)
    }

    def found() -> Iterator[_Found]:
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            if not isinstance(module, torch.nn.RNNBase):
                yield _Found(path, (f"{prefix}*",), module)
                continue
            kind = f"{module.mode.partition('_')[0]}Cell"  # the mode is LSTM, GRU, RNN_TANH or RNN_RELU
            for layer in range(module.num_layers):
                for way in ("", "_reverse")[: 1 + module.bidirectional]:
                    alone = module.num_layers == 1 and not module.bidirectional
                    cell = path if alone else f"{prefix}l{layer}{way}"
                    yield _Found(cell, (f"{prefix}*_l{layer}{way}",), module, kind)

    flattens, makes = (
        any(isinstance(x, kind) for x in model.modules()) for kind in (torch.nn.Flatten, torch.nn.Unflatten)
    )
    return _inventory("torch", found(), shapes, names)._replace(takes_images=flattens, makes_images=makes)


def keras_inventory(model: Any) -> Inventory:
    """The layers of a built `keras.Model`, outer before inner, each in the order in which its owner has it.

    Raises:
      ValueError: the model is not built.
    """
    import keras

    if not model.built:
        raise ValueError(f"{model.name!r} is not built; call it on data or model.build(input_shape) first")
    variables = {x.path: x for x in model.variables if x.name != "seed_generator_state"}  # random states

    def found(layer: Any) -> Iterator[_Found]:
        yield _Found(layer.path, (f"{layer.path}/*",), layer)
        for inner in layer._layers:
            yield from found(inner)

    trained = {x.path for x in model.trainable_variables}
    shapes = {path: tuple(x.shape) for path, x in variables.items()}
    inputs, outputs = getattr(model, "inputs", None), getattr(model, "outputs", None)  # a subclassed model has none
    flattens = any(isinstance(x, keras.layers.Flatten) for x in model._flatten_layers())
    reshapes = [x.target_shape for x in model._flatten_layers() if isinstance(x, keras.layers.Reshape)]
    return _inventory("keras", found(model), shapes, trained)._replace(
        takes_images=_images(inputs) if inputs else flattens,
        makes_images=_images(outputs or ()) or any(1 not in (x[-1], x[-2]) for x in reshapes if len(x) > 2),
    )


def nnx_inventory(model: Any, params: Any, others: Any = None) -> Inventory:
    """The layers of an `nnx.Module`, in the order of attributes.

    Args:
      params, others: as in the snapshot.
    """
    from flax import nnx

    trees = _Trees(params, others)

    def found(path: str, module: Any, above: tuple[Any, ...]) -> Iterator[_Found]:
        yield _Found(path, trees.patterns(path), module)
        own = list(vars(module))
        children = [(key, x) for key, x in nnx.iter_children(module) if isinstance(x, nnx.Pytree)]
        for key, inner in sorted(children, key=lambda each: own.index(each[0]) if each[0] in own else 0):
            if not any(inner is x for x in above):  # one module may be in several places, of which a state knows one
                yield from found(f"{path}/{key}" if path else str(key), inner, (*above, inner))

    return trees.inventory("nnx", found("", model, (model,)))


def linen_inventory(module: Any, params: Any, others: Any = None, inputs: tuple[Any, ...] = ()) -> Inventory:
    """The layers of a `linen.Module`, in the order of their calls in an `init` that computes nothing.

    Args:
      params, others: as in the snapshot.
      inputs: its arguments, whose shapes matter.
    """
    import jax
    from flax import linen

    trees = _Trees(params, others)
    seen: dict[str, Any] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.setdefault("/".join(context.module.path), context.module)
        return call(*args, **kwargs)

    with linen.intercept_methods(watch):
        jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    found = (_Found(path, trees.patterns(path), x) for path, x in seen.items())
    return trees.inventory("linen", found)._replace(takes_images=_images(jax.tree.leaves(inputs)))


def equinox_inventory(model: Any, params: Any, others: Any = None) -> Inventory:
    """The layers of an `equinox.Module`, in the order of its tree.

    Args:
      params, others: as in the snapshot.
    """
    import jax

    from adamp_jax._layouts import path_name

    trees = _Trees(params, others)
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: _kind("equinox", x) is not None)
    found = (_Found(path := path_name(key), trees.patterns(path), x) for key, x in leaves)
    return trees.inventory("equinox", found)


def haiku_inventory(transformed: Any, params: Any, others: Any = None, inputs: tuple[Any, ...] = ()) -> Inventory:
    """The layers of what `haiku.transform` gave, in the order of their calls in an `init` that computes nothing.

    Args:
      transformed: with or without state.
      params, others: as in the snapshot.
      inputs: its arguments, whose shapes matter.
    """
    import haiku as hk
    import jax

    trees = _Trees(params, others)
    seen: dict[str, Any] = {}
    stacks = [""]  # around the call: within layer_stack, names begin anew

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__init__":
            return call(*args, **kwargs)
        path = stacks[-1] + context.module.module_name
        seen.setdefault(path, context.module)
        if not path.rpartition("/")[2].startswith("__layer_stack"):
            return call(*args, **kwargs)
        stacks.append(f"{path}/")
        try:
            return call(*args, **kwargs)
        finally:
            stacks.pop()

    with hk.intercept_methods(watch):
        jax.eval_shape(lambda: transformed.init(jax.random.key(0), *inputs))
    found = (_Found(path, trees.patterns(path), x) for path, x in seen.items())
    return trees.inventory("haiku", found)._replace(takes_images=_images(jax.tree.leaves(inputs)))


def classes(form: Form, framework: str) -> frozenset[str]:
    """The names of a form's classes in one framework: of "linen.Dense, nnx.Linear", Linen has Dense."""
    other_flax = {"linen", "nnx"} - {framework}
    named = (name.partition(".") for name in form.layer)
    return frozenset(rest or first for first, _, rest in named if first not in other_flax)


# ------------------------------------------------------------------------------------------------ what walks share


class _Found(NamedTuple):
    """What a walk has met.

    Attributes:
      path: in the model.
      patterns: where its tensors may be; the star stands for a name of `layouts.toml`.
      layer: the framework's own object.
      kind: its class where the object does not tell.
    """

    path: str
    patterns: tuple[str, ...]
    layer: Any
    kind: str | None = None


class _Trees:
    """The tensors of a model in JAX: parameters, and what it holds besides."""

    def __init__(self, params: Any, others: Any) -> None:
        import jax

        from adamp_jax._layouts import path_name

        def named(tree: Any) -> dict[str, tuple[int, ...]]:
            return {path_name(key): np.shape(x) for key, x in jax.tree_util.tree_leaves_with_path(tree)}

        self.params, self.others = named(params), named(others)
        collections = dict.fromkeys(name.partition("/")[0] for name in self.others)  # such as batch_stats
        inside = {name.partition("/")[0] for name in self.params} == {"params"}  # `init` gave them so
        self.roots = ("params/" if inside else "", *(f"{name}/" for name in collections), "")

    def patterns(self, path: str) -> tuple[str, ...]:
        """Where a layer's tensors may be."""
        return tuple(f"{root}{path}/*" if path else f"{root}*" for root in self.roots)

    def inventory(self, framework: str, found: Iterable[_Found]) -> Inventory:
        return _inventory(framework, found, self.params | self.others, self.params)


def _inventory(
    framework: str, found: Iterable[_Found], shapes: Mapping[str, tuple[int, ...]], trained: Iterable[str]
) -> Inventory:
    """Gives each tensor to the first layer that claims it."""
    left = dict.fromkeys(shapes)
    owners: dict[str, int] = {}
    layers = []
    for path, patterns, layer, given in found:
        kind = given or _kind(framework, layer)
        tensors = {}
        for name in _tensors(framework).get(kind or "", ()):
            places = (pattern.replace("*", name) for pattern in patterns)
            if (place := next((x for x in places if x in left), None)) is not None:
                del left[place]
                tensors[name] = place
        if kind and tensors:
            layers.append(Layer(path, kind, tensors, _sizes(kind, layer), _rows(kind, layer)))
        for pattern in patterns:
            owners.setdefault(pattern.partition("*")[0], len(owners))

    def owner(name: str) -> int:
        """When the walk came to the module that has the tensor; by name, block_10 would come before block_2."""
        return next((owners[name[:i]] for i in range(len(name), -1, -1) if name[:i] in owners), -1)

    layers += [Layer(name, PARAMETER, {"": name}, {}) for name in sorted(left, key=owner)]
    return Inventory(framework, tuple(layers), dict(shapes), frozenset(trained))


def _images(tensors: Iterable[Any]) -> bool:
    return any(np.ndim(x) > 3 for x in tensors)


@cache
def _tensors(framework: str) -> dict[str, tuple[str, ...]]:
    """Class -> the names that `layouts.toml` has for its tensors, in all rows."""
    names: dict[str, dict[str, None]] = {}
    for row in rows().values():
        if framework in row.forms:
            for kind in classes(row.forms[framework], framework) - _CONTAINERS:
                names.setdefault(kind, {}).update(dict.fromkeys(row.names(framework)))
    return {kind: tuple(each) for kind, each in names.items()}


def _kind(framework: str, layer: Any) -> str | None:
    """The layer's class in `layouts.toml`, itself or a base, if its framework's library has it."""
    library = LIBRARIES[framework]
    for base in type(layer).__mro__:
        if base.__name__ in _tensors(framework) and f"{base.__module__}.".startswith(f"{library}."):
            return base.__name__
    return None


def _sizes(kind: str, layer: Any) -> dict[str, int]:
    """Axes that the layer knows and its shapes do not tell."""
    if kind.lower() == "multiheadattention" and hasattr(layer, "num_heads"):
        return {"heads": int(layer.num_heads)}
    if "Transpose" in kind and getattr(layer, "groups", 1) > 1:
        return {"groups": int(layer.groups)}
    return {}


def _rows(kind: str, layer: Any) -> tuple[str, ...]:
    """The rows that the layer can be, where other rows have its class and may have its shapes."""
    if "Transpose" in kind and hasattr(layer, "transpose_kernel"):
        return ("conv_transpose_kernel",) if layer.transpose_kernel else ("conv_transpose",)
    if kind.startswith("Einsum"):
        equation = layer.equation if hasattr(layer, "equation") else layer.einsum_str
        inputs, kernel, outputs = (set(x) for x in re.findall(r"[a-zA-Z]+", equation.replace("...", "")))
        if inputs & kernel & outputs:
            return "stacked", "stacked_on_axis_1"
        return ("dense_general_out",) if len(kernel - inputs) > 1 else ("dense_general_in",)
    if kind.endswith("General"):
        features = layer.features if hasattr(layer, "features") else layer.out_features
        return ("dense_general_out",) if np.size(features) > 1 else ("dense_general_in",)
    return ()
