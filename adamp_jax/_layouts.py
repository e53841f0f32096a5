"""Which axes of each parameter are its channels: the built-in rules, overrides, and a table of both."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamp_spec import Assignment, Layout, Rule, assign_layouts, format_layouts

Layouts = Layout | Mapping[str, Layout] | Any | Callable[[optax.Params], Any] | None  # Any: a tree, see `adamp`

# Names that Flax, Equinox and Haiku give by themselves. The reference is dim 0 of PyTorch's own weight (SPEC: LAYOUT).
RULES = (
    Rule(r"embeddings?$", Layout(0)),  # one row per token
    # Named by hand, and of PyTorch's shape everywhere: (1, N, D), (N, D)
    Rule(r"(^|/)((cls|class)_?token|pos(ition(al)?)?_?emb(ed(ding)?s?)?)$", Layout(0)),
    Rule(r"(^|/)(query|key|value)/kernel$", Layout((-2, -1)), rank=3),  # Flax attention: (in, heads, head_dim)
    Rule(r"(Layer|RMS|layer_|rms_)[Nn]orm[^/]*/(scale|bias|offset)$", Layout(-1)),  # over several axes: (H, W, C)
    Rule(r"(^|/)ConvTranspose(_\d+)?/kernel$", Layout(-2)),  # Flax: (k.., in, out), and PyTorch's dim 0 is `in`
    # Vectors in PyTorch; elsewhere (heads, head_dim) in Flax attention, (out, 1, 1) in Equinox, (1, 1, 1, C) in Haiku.
    Rule(r"(^|/)(bias|b|scale|offset)$", Layout(None)),
    Rule(r"(^|/)weight(_ih|_hh)?$", Layout(0)),  # Equinox: (out, in, k..)
    Rule(r"(^|/)(kernel|w|w_i|w_h)$", Layout(-1)),  # Flax and Haiku: (k.., in, out)
)
DEFAULT = Layout(-1)


def describe(params: optax.Params, layouts: Layouts = None) -> str:
    """A table of the parameters, their layouts, and what chose each layout.

    Names cannot tell everything: look here once per model, and override what is wrong. What the
    rules cannot see: parameters stacked by ``nn.scan`` or ``vmap`` (add ``batch=``), transposed
    convolutions under a name of their own and Equinox's (channels are the input's axis), biases of
    Equinox's norms over several axes, and ``DenseGeneral`` kernels with several output axes.

    Args:
      params: a tree of parameters; anything with a shape will do.
      layouts: as for :func:`adamp_jax.adamp`.

    Returns:
      One line per parameter: path, shape, layout, rows per slice times row length, and the origin
      of the layout (an override, a rule, or the default: the last axis).

    Raises:
      ValueError, TypeError: as `init` of the optimizer would.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamp_jax import describe
      >>> from adamp_spec import Layout
      >>> params = {"Conv_0": {"bias": jnp.ones(8), "kernel": jnp.ones((3, 3, 4, 8))}, "mix": jnp.ones((6, 5))}
      >>> print(describe(params, {"mix": Layout(channel=0)}))
      parameter      shape         layout                rows           chosen by
      Conv_0/bias    (8,)          Layout(channel=None)  not projected  rule '(^|/)(bias|b|scale|offset)$'
      Conv_0/kernel  (3, 3, 4, 8)  Layout(channel=-1)    8 x 36         rule '(^|/)(kernel|w|w_i|w_h)$'
      mix            (6, 5)        Layout(channel=0)     6 x 5          override 'mix'
    """
    return format_layouts(assign(params, layouts))


def assign(params: optax.Params, layouts: Layouts) -> dict[str, Assignment]:
    """The layout of every parameter, by path (SPEC: LAYOUT-7)."""
    shapes = {"/".join(keys): jnp.shape(leaf) for keys, leaf in _leaves(params)}
    if not shapes:  # optax.tree_map_params calls init with a placeholder, which is not for the user's function
        return {}
    if callable(layouts) and not any(isinstance(x, Layout) for x in jax.tree.leaves(layouts)):
        layouts = layouts(params)  # but an Equinox module that holds layouts is callable, too
    if layouts is None or (isinstance(layouts, Mapping) and jax.tree_util.all_leaves(layouts.values())):
        # Under optax.masked and optax.partition, a key may be meant for a parameter that is hidden here.
        nodes = jax.tree.leaves(params, is_leaf=_is_absent)
        hides = any(isinstance(node, optax.MaskedNode) for node in nodes)
        return assign_layouts(shapes, layouts or {}, RULES, DEFAULT, all_used=not hides)
    for leaf in jax.tree.leaves(layouts):
        if not isinstance(leaf, Layout):
            raise TypeError(
                "layouts must be None, an adamp_spec.Layout, a mapping from path to Layout, a tree of Layouts like the "
                f"parameters or a prefix of it, or a function from the parameters to one of these, got {leaf!r}"
            )
    table, origins = {}, {}
    for path, (key, layout) in spread(layouts, params, "layouts").items():
        if layout is not None:  # what is said of a whole subtree is said of its matrices
            table[path] = layout if key == path or len(shapes[path]) > 1 else Layout(None)
            origins[path] = f"override {key!r}" if key else "override"
    assigned = assign_layouts(shapes, table, RULES, DEFAULT)
    return {path: x._replace(origin=origins.get(path, x.origin)) for path, x in assigned.items()}


def spread(tree: Any, params: optax.Params, argument: str) -> dict[str, tuple[str, Any]]:
    """What `tree`, which is like `params` or a prefix of it, says about each parameter.

    Containers may differ in type: only their keys are compared.

    Returns:
      The path of each parameter -> the path of the leaf of `tree` that covers it, and that leaf.

    Raises:
      ValueError: nothing covers a parameter, or a leaf other than None covers none.
    """
    given = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)}
    found = {}
    for keys, _ in _leaves(params):
        covering = next((keys[:n] for n in range(len(keys) + 1) if keys[:n] in given), None)
        if covering is None:
            names = ["/".join(each) for each in given]
            raise ValueError(f"{argument} is a tree without a leaf for parameter {'/'.join(keys)!r}; it has {names}")
        found["/".join(keys)] = "/".join(covering), given[covering]
    # What is None or hidden among the parameters may have leaves in `tree`, at it, above it and below it.
    nodes = {_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_absent)}
    above = {keys[:n] for keys in {(), *nodes} for n in range(len(keys) + 1)}
    for keys, leaf in given.items():
        if leaf is not None and keys not in above and not any(keys[:n] in nodes for n in range(len(keys))):
            raise ValueError(f"{argument} is a tree with a leaf at {'/'.join(keys)!r}, where there is no parameter")
    return found


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as text, without the box that Flax puts around a variable."""
    return "/".join(_keys(path))


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _leaves(params: optax.Params) -> list[tuple[tuple[str, ...], Any]]:
    leaves = [(_keys(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    names = ["/".join(keys) for keys, _ in leaves]
    if len(set(names)) < len(names):
        raise ValueError(f"several parameters share a path; the paths are {names}")
    return leaves


def _is_absent(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)
